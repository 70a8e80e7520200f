"""Training aids: what helps where a fit of the whole series at once settles for a wrong minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BadOption, BadShape
from ..odeint import odeint
from . import matching


class Shots(NamedTuple):
    """What `multiple_shooting` gives.

    Attributes:
        h: shape (T, ...), the states at all times, each from the piece that it lies in.
        gaps: shape (S - 1, ...), where each piece ends less where the next one starts.
    """

    h: Tensor
    gaps: Tensor


def multiple_shooting(
    f: Callable[[Tensor, Tensor], Tensor], starts: Tensor, t: Tensor, length: int, **solver_options: Any
) -> Shots:
    """Solve a long series in short pieces, each from a start of its own; all pieces are one batch.

    Errors cannot grow over more than one piece, so the loss has fewer wrong minima than that of one long solve. Train
    `starts` with the field, and put the gaps into the loss, so that the pieces become one solution:

        starts = torch.nn.Parameter(x[:-1:length].clone())
        h, gaps = multiple_shooting(f, starts, t, length)
        loss = (h - x).square().mean() + 10 * gaps.square().mean()

    Args:
        f: as in `odeint`, for one state or a batch of them.
        starts: shape (S, ...), the states at times number 0, `length`, 2 `length` ... ; S is (T - 1) / length, rounded
            up.
        t: shape (T,), at least two times, strictly increasing or decreasing.
        length: intervals between times in a piece; the last piece may be shorter.
        solver_options: for `pyjlode.odeint`. Here `adjoint` is True if nothing else is said.

    Raises:
        BadShape: there are not as many starts as pieces, or `t` is not of shape (T,).
        BadOption: `length` is less than one.
        What `pyjlode.odeint` raises.

    Source: Bock & Plitt, A multiple shooting algorithm for direct solution of optimal control problems, 1984; for
    neural ODEs, Turan & Jäschke, Multiple shooting for training neural differential equations on time series, 2021.
    """
    if t.dim() != 1 or len(t) < 2:
        raise BadShape(f"multiple_shooting takes t of shape (T,), T > 1; got {tuple(t.shape)}.")
    if length < 1:
        raise BadOption(f"a piece has at least one interval; got length={length}.")
    last = len(t) - 1
    pieces = -(-last // length)
    if starts.dim() == 0 or len(starts) != pieces:
        got = tuple(starts.shape)
        raise BadShape(f"{last} intervals in pieces of {length} need {pieces} starts, x[:-1:{length}]; got {got}.")
    first = length * torch.arange(pieces, device=t.device)
    # The last row is filled up with its last time, where its solution stays.
    times = t[(first[:, None] + torch.arange(length + 1, device=t.device)).clamp(max=last)]
    how = {"adjoint": True, **solver_options}
    how["options"] = {**(how.get("options") or {}), "batch_dims": 1}
    h = odeint(f, starts, times, **how)
    k = torch.arange(last + 1, device=h.device)
    piece = (k // length).clamp(max=pieces - 1)
    return Shots(h[k - piece * length, piece], h[-1, :-1] - starts[1:])


def collocate(x: Tensor, t: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """States and slopes of a noisy series, by a parabola fitted around each time.

    What `gradient_matching` needs. Exact where the series is a parabola.

    Args:
        x: shape (T, ...), the series.
        t: shape (T,), its times, increasing, at any distances.
        width: how far a fit reaches to either side, in units of `t`; what lies near counts more (Epanechnikov's
            weights). Wide enough for a handful of times; narrower than a quarter of a period.

    Returns:
        `(h, dh)`, both of the shape of `x`.

    Raises:
        BadShape: shapes do not fit together.
        BadOption: the width reaches fewer than three times somewhere.

    Source: Fan & Gijbels, Local polynomial modelling and its applications, 1996, section 3.1; for ODEs, Varah, A spline
    least squares method for numerical parameter estimation in differential equations, 1982; Roesch, Rackauckas &
    Stumpf, Collocation based training of neural ordinary differential equations, 2021.
    """
    if t.dim() != 1 or x.dim() == 0 or len(x) != len(t):
        raise BadShape(f"collocate takes x (T, ...) and t (T,); got {tuple(x.shape)} and {tuple(t.shape)}.")
    if not width > 0:
        raise BadOption(f"the width must be positive; got {width}.")
    away = (t - t[:, None]) / width  # (T, T): of each time, seen from each
    weights = (1 - away.square()).clamp_min(0).sqrt()
    fewest = int((weights > 0).sum(1).min()) if len(t) else 3
    if fewest < 3:
        raise BadOption(f"width={width:g} reaches {fewest} times somewhere, and a parabola needs 3: take a larger one.")
    powers = torch.stack([torch.ones_like(away), away, away.square()], -1).to(x.dtype)
    weights = weights.to(x.dtype)[..., None]
    fitted = torch.linalg.lstsq(weights * powers, weights * x.reshape(len(t), -1)).solution  # (T, 3, D)
    return fitted[:, 0].reshape(x.shape), (fitted[:, 1] / width).reshape(x.shape)


def gradient_matching(f: Callable[[Tensor, Tensor], Tensor], t: Tensor, h: Tensor, dh: Tensor) -> Tensor:
    """0-d: the mean of |f(t, h) - dh|². Trains a field without a solve; a warm start for the fit that solves.

    Args:
        f: as in `odeint`, for one state. It is called for all times at once, if it then gives each what it gives it
            alone; else it is mapped by `torch.func.vmap`.
        t: shape (T,).
        h, dh: shape (T, ...), as `collocate` makes them.

    Raises:
        BadShape: shapes do not fit together.

    Source: as of `collocate`.
    """
    if t.dim() != 1 or h.shape != dh.shape or h.dim() == 0 or len(h) != len(t):
        raise BadShape(
            "gradient_matching takes t (T,), and h and dh of one shape (T, ...); got "
            f"{tuple(t.shape)}, {tuple(h.shape)} and {tuple(dh.shape)}."
        )
    return (matching.each(f, t.reshape(-1, *[1] * (h.dim() - 1)).to(h.dtype), h) - dh).square().mean()
