"""`NeuralCDE`: a recurrent network in continuous time, driven by the data that it reads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..driven import CDE, KINDS, Interpolation, knots
from ..errors import BadOption, BadShape
from ..methods import find, unknown
from ..odeint import odeint, solve
from ..solution import Stats
from ..solver import check


class Matrix(nn.Module):
    """A network (..., H) -> (..., H, D), bounded by tanh: without a bound a long control lets h grow without one.

    Args:
        hidden: H. channels: D. width: of its `depth` hidden layers.
    """

    def __init__(self, hidden: int, channels: int, width: int = 64, depth: int = 1) -> None:
        super().__init__()
        sizes = [hidden, *[width] * depth]
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], hidden * channels), nn.Tanh())
        self.hidden, self.channels = hidden, channels

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        made: Tensor = self.net(h)
        return made.reshape(*h.shape[:-1], self.hidden, self.channels)


class NeuralCDE(nn.Module):
    """Reads series and tells a vector of each: `h(t0) = initial(X(t0))`, `dh = g(t, h) dX`, out comes `readout(h)`.

    X interpolates the series, with time as its first channel. A value that is NaN is missing; whether that says
    something too is for the network to find in counts of what was observed so far, which are more channels
    (`observed=True`). Series of different lengths, or times of their own, come as lists: the state of one that has
    ended stands still.

    Args:
        channels: D, of the data.
        hidden: H, of the state.
        outputs: of the readout, a linear map; None gives the state itself.
        g: `g(t, h)` -> (..., H, C) for h of shape (..., H); C is 1 + D, or 1 + 2 D with `observed`. By default a
            `Matrix` with one hidden layer of 64.
        interpolation: "hermite", "linear" or "natural", as in `pyjlode.Interpolation`. The last one sees a whole series
            before it is read.
        observed: add how often each channel was observed so far.
        return_trajectory: give the outputs at all times of the data, not only at the last.
        solver_options: keyword arguments for `pyjlode.solve`. `adjoint` is True here, `rtol` 1e-4 and `atol` 1e-6, if
            nothing else is said. Steps of methods that choose them end at the times of the data.

    Attributes:
        initial: from the channels of X at its start to the state. readout: from the state to the outputs.
        stats: the account of the last call, a `pyjlode.Stats`; None before the first.

    Raises:
        BadOption: an argument is not of these. TypeError: `solver_options` has a name that `pyjlode.solve` does not
            know.

    Source: Kidger, Morrill, Foster & Lyons, Neural controlled differential equations for irregular time series, 2020.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        outputs: int | None = None,
        *,
        g: nn.Module | None = None,
        interpolation: str = "hermite",
        observed: bool = False,
        return_trajectory: bool = False,
        **solver_options: Any,
    ) -> None:
        super().__init__()
        if interpolation not in KINDS:
            raise BadOption(unknown(interpolation, "interpolation", list(KINDS)))
        solver_options = {"adjoint": True, "rtol": 1e-4, "atol": 1e-6, **solver_options}
        inspect.signature(odeint).bind(None, None, None, **solver_options)
        check(solver_options)
        width = 1 + (2 if observed else 1) * channels
        self.channels, self.interpolation, self.observed = channels, interpolation, observed
        self.return_trajectory, self.solver_options = return_trajectory, solver_options
        self.initial = nn.Linear(width, hidden)
        self.g = Matrix(hidden, width) if g is None else g
        self.readout: nn.Module = nn.Identity() if outputs is None else nn.Linear(hidden, outputs)
        self.stats: Stats | None = None

    def control(self, x: Tensor | Sequence[Tensor], t: Any = None) -> Interpolation:
        """X: the data with their time, and what was observed, as further channels.

        Args:
            x, t: as in `forward`.
        """
        if isinstance(x, Tensor):
            if x.ndim < 2 or x.shape[-1] != self.channels:
                raise BadShape(f"x must have shape (..., T, {self.channels}); got {tuple(x.shape)}.")
            times = knots(t, x.shape[-2])
            return Interpolation(self.extended(x, times), times, self.interpolation)
        own = [None] * len(x) if t is None else t
        if len(own) != len(x):
            raise BadShape(f"a list of {len(x)} series needs a list of as many t; got {len(own)}.")
        moments = [knots(b, len(a)) for a, b in zip(x, own)]
        return Interpolation([self.extended(a, b) for a, b in zip(x, moments)], moments, self.interpolation)

    def extended(self, x: Tensor, t: Tensor) -> Tensor:
        """x (..., T, D) with more channels at times t (T,)."""
        time = t.to(x)[:, None].expand(*x.shape[:-1], 1)
        counts = [(~x.isnan()).cumsum(-2).to(x)] if self.observed else []
        return torch.cat([time, x, *counts], -1)

    def forward(self, x: Tensor | Sequence[Tensor], t: Any = None) -> Tensor:
        """Read series.

        Args:
            x: shape (..., T, D), NaN where a value is missing; or a list of N series of shape (T_i, D).
            t: shape (T,), strictly increasing; 0, 1, 2, ... if nothing is said. For a list of series, a list of (T_i,).

        Returns:
            The outputs at the end, (..., outputs); with `return_trajectory` (T, ..., outputs), at all times of the data
            (of a list: at the union of their times).

        Raises:
            BadShape, BadTime: x and t are not such. What `pyjlode.solve` raises.
        """
        X = self.control(x, t)
        cde = CDE(self.g, X)
        first, last = X.span
        moments = [first, *X.kinks, last] if self.return_trajectory else [first, last]
        options = dict(self.solver_options.get("options") or {})
        row = find(self.solver_options.get("method") or "dopri5")
        if row.adaptive and row.kind not in ("scipy", "julia") and not options.keys() & {"jump_t", "step_t"}:
            options |= cde.options
        how = {**self.solver_options, "options": options}
        h0 = self.initial(X(X.knots[0]))
        solution = solve(cde, h0, torch.tensor(moments, dtype=torch.float64), dense=False, **how)
        self.stats = solution.stats
        out: Tensor = self.readout(solution.h if self.return_trajectory else solution.h[-1])
        return out

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.solver_options.items())
        return f"channels={self.channels}, interpolation={self.interpolation!r}, observed={self.observed}{options}"
