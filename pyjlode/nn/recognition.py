"""Recognition networks: from a series, a distribution of the latent state that it began in.

Both read a series backward, from its last observation to the first and on to the time of the latent state. Neither sees
what is masked: rows without any observation, wherever they are and whatever their times, change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F

from ..odeint import odeint
from .series import series

# One Euler step for each gap is one line, which needs no solver. There are as many gaps as observations.
_ONE_STEP: dict[str, Any] = {"method": "euler", "adjoint": False}


class ODERNN(nn.Module):
    """A recurrent network whose hidden state moves by an ODE between observations, and by a GRU cell at each.

    Each sequence of a batch has gaps of its own: all are stretched to the unit of time and solved as one, so that the
    cost goes with the observations of a sequence and not with the union of all.

    Args:
        features: D, of each observation.
        hidden: H, of the hidden state.
        latent: Z, of the latent state.
        f: `f(t, h) -> dh/dt` for `h` of shape (B, H), per unit of time; `t` is the fraction of the gap that is passed.
        solver_options: keyword arguments for `pyjlode.odeint`. One Euler step for each gap, and `adjoint=False`, if
            nothing else is said.

    Source: Rubanova, Chen & Duvenaud, Latent ODEs for irregularly-sampled time series, 2019, algorithm 1.
    """

    def __init__(
        self, features: int, hidden: int, latent: int, f: Callable[[Tensor, Tensor], Tensor], **solver_options: Any
    ) -> None:
        super().__init__()
        self.f = f
        self.cell = nn.GRUCell(2 * features, hidden)
        self.head = nn.Linear(hidden, 2 * latent)
        self.solver_options: dict[str, Any] = {**_ONE_STEP, **solver_options}

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None, t0: float = 0.0) -> Independent:
        """The distribution of the latent state at `t0`: batch shape (B,), event shape (Z,).

        Args:
            x, t, mask: shapes (B, T, D), (T,) or (B, T), and (B, T, D) or (B, T), as in `LatentODE`.
            t0: the time of the latent state.

        Raises:
            BadShape, BadTime: a series is not as it should be; and what `pyjlode.odeint` raises.
        """
        s = series(x, t, mask, t0)
        inputs = torch.cat([s.x, s.mask.to(s.x)], -1)
        h = x.new_zeros(len(x), self.cell.hidden_size)
        last, seen = s.t[:, -1], torch.zeros_like(s.observed[:, 0])
        for i in reversed(range(x.shape[1])):
            now = s.observed[:, i]
            # Nothing moves before the first observation, nor to a time at which there is none.
            h = self._move(h, torch.where(seen & now, last - s.t[:, i], 0).to(h))
            h = torch.where(now[:, None], self.cell(inputs[:, i], h), h)
            last, seen = torch.where(now, s.t[:, i], last), seen | now
        return normal(self.head(self._move(h, torch.where(seen, last - t0, 0).to(h))))

    def _move(self, h: Tensor, gap: Tensor) -> Tensor:
        if not bool(gap.any()):
            return h
        if self.solver_options == _ONE_STEP:
            dh = self.f(gap.new_zeros(()), h)
            if isinstance(dh, Tensor) and dh.shape == h.shape and dh.dtype == h.dtype:  # else odeint says what is wrong
                return h + gap[:, None] * dh
        return odeint(_Stretched(self.f, gap), h, (0.0, 1.0), **self.solver_options)[-1]


class GRURecognition(nn.Module):
    """A GRU that is told how much time has passed between observations.

    Args:
        features: D, of each observation.
        hidden: H, of the hidden state.
        latent: Z, of the latent state.

    Source: as the baseline "RNN with time deltas" in Rubanova, Chen & Duvenaud, Latent ODEs for irregularly-sampled
    time series, 2019; the cell is Cho et al., Learning phrase representations using RNN encoder-decoder, 2014.
    """

    def __init__(self, features: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2 * features + 2, hidden)
        self.head = nn.Linear(hidden, 2 * latent)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None, t0: float = 0.0) -> Independent:
        """The distribution of the latent state at `t0`: batch shape (B,), event shape (Z,).

        Args:
            x, t, mask: shapes (B, T, D), (T,) or (B, T), and (B, T, D) or (B, T), as in `LatentODE`.
            t0: the time of the latent state.

        Raises:
            BadShape, BadTime: a series is not as it should be.
        """
        s = series(x, t, mask, t0)
        # All inputs at once, latest first: what a step of the recurrence costs is one cell.
        times = torch.where(s.observed, s.t, torch.inf).flip(1)
        later = F.pad(times.cummin(1).values[:, :-1], (1, 0), value=torch.inf)  # of the next observation
        passed = torch.where(later.isfinite(), later - s.t.flip(1), 0)
        inputs = torch.cat([s.x, s.mask.to(s.x)], -1).flip(1)
        inputs = torch.cat([inputs, torch.stack([passed, s.t.flip(1) - t0], -1).to(inputs)], -1)
        h = x.new_zeros(len(x), self.cell.hidden_size)
        for now, entry in zip(s.observed.flip(1).unbind(1), inputs.unbind(1)):
            h = torch.where(now[:, None], self.cell(entry, h), h)
        return normal(self.head(h))


class _Stretched(nn.Module):
    """`f` over a gap of its own for each row, as over the unit of time. A new one for each gap: a backward pass must
    meet the gap of its own solve."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], gap: Tensor) -> None:
        super().__init__()
        self.f, self.gap = f, gap[:, None]

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.gap * self.f(t, h)


def normal(parameters: Tensor) -> Independent:
    """Mean and unbounded scale, shape (..., 2 Z) -> a normal distribution of vectors of Z independent elements."""
    mean, scale = parameters.chunk(2, -1)
    # The variance can neither vanish nor, since softplus grows like its argument, explode in one step of training.
    return Independent(Normal(mean, F.softplus(scale) + 1e-4), 1)
