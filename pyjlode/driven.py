"""Systems driven by data: sampled signals as functions of time, and controlled differential equations along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadDtype, BadOption, BadShape, BadTime
from .methods import unknown
from .numbers import listed, on_host

KINDS = ("linear", "hermite", "natural")


class Interpolation(nn.Module):
    """A function of time through samples: `X(t)`, and `X.derivative(t)`.

    Within the span of its samples a channel is a polynomial between each two times. Before its first sample, and after
    its last, it is constant. A sample that is NaN is missing: that channel is interpolated over it. Differentiable by
    the samples and by the time asked for.

    Args:
        x: shape (T,), or (..., T, D): D channels of any batch of signals, float32 or float64; NaN where there is no
            sample. A channel without any sample is zero. Or a list of signals with times of their own, of shape
            (T_i, D).
        t: shape (T,), strictly increasing, at least two times, common to the batch; 0, 1, 2, ... if nothing is said.
            For a list of signals, a list of times of shape (T_i,).
        kind: "linear"; "hermite", cubic, with the slope at each sample that the line from the sample before has, so
            that the curve up to a sample does not depend on what comes after the next; "natural", the cubic spline with
            two continuous derivatives, whose second one is zero at its ends.

    Attributes:
        kinks: the times between which it is smooth, without the first and the last.

    Raises:
        BadShape, BadTime, BadDtype, BadOption: an argument is not of these.

    Sources: Kidger, Morrill, Foster & Lyons, Neural controlled differential equations for irregular time series, 2020;
    for "hermite" Morrill, Kidger, Yang & Lyons, On the choice of interpolation scheme for neural CDEs, 2022.
    """

    knots: Tensor
    pieces: Tensor

    def __init__(self, x: Any, t: Any = None, kind: str = "linear") -> None:
        super().__init__()
        if kind not in KINDS:
            raise BadOption(unknown(kind, "interpolation", list(KINDS)))
        if isinstance(x, (list, tuple)):
            times, pieces, self.jumps = together(x, t, kind)
        else:
            rows = one(x)
            times = knots(t, len(rows))
            pieces, self.jumps = polynomials(rows, moments(times, rows), kind)
        self.kind, self.kinks = kind, tuple(listed(times)[1:-1])
        self.register_buffer("knots", moments(times, pieces), persistent=False)
        if pieces.requires_grad:  # it has a graph, and no buffer has
            self.pieces = pieces
        else:
            self.register_buffer("pieces", pieces, persistent=False)

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last time."""
        return float(self.knots[0]), float(self.knots[-1])

    @property
    def options(self) -> dict[str, tuple[float, ...]]:
        """For `odeint(f, ..., options=X.options)` where `f` uses `X(t)`: steps end at the kinks."""
        return {"step_t": self.kinks} if self.kinks else {}

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients (degree + 1, ...) of the pieces that times lie in, and the times since their starts."""
        each = t.reshape(-1)
        i = torch.searchsorted(self.knots[1:-1], each)
        c, s = self.pieces.index_select(0, i), each - self.knots.index_select(0, i)
        return (c.movedim(1, 0), s.reshape(-1, *[1] * (c.ndim - 2))) if t.ndim else (c[0], s[0])

    def forward(self, t: Tensor | float) -> Tensor:
        """The signals at times.

        Args:
            t: shape () or (M,); a time at which two pieces meet is of the earlier one.

        Returns:
            shape (..., D), with M in front where `t` has shape (M,); for samples of shape (T,), that of `t`.
        """
        c, s = self.at(self.time(t))
        return horner(c, s)

    def derivative(self, t: Tensor | float) -> Tensor:
        """dX/dt at times: as for the signals."""
        c, s = self.at(self.time(t))
        n = len(c) - 1
        value = n * c[n]
        for k in range(n - 1, 0, -1):
            value = k * c[k] + s * value
        return value

    def time(self, t: Tensor | float) -> Tensor:
        if isinstance(t, Tensor):
            return t.to(self.knots)
        return torch.as_tensor(t, dtype=self.knots.dtype, device=self.knots.device)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, {len(self.knots)} times, {tuple(self.pieces.shape[2:])}"


class CDE(nn.Module):
    """The vector field of `dh = g(t, h) dX`, for `pyjlode.odeint`.

    Args:
        g: `g(t, h)` -> a matrix (..., H, D) for `h` of shape (..., H).
        X: the control, of D channels: an `Interpolation`, or anything with `derivative(t)` -> (..., D).

    Source: Kidger, Morrill, Foster & Lyons, Neural controlled differential equations for irregular time series, 2020.
    """

    def __init__(self, g: Callable[[Tensor, Tensor], Tensor], X: Any) -> None:
        super().__init__()
        if not callable(getattr(X, "derivative", None)):
            raise BadOption(f"X must have a method derivative(t), as pyjlode.Interpolation has; got {X!r:.80}.")
        self.g, self.X = g, X

    @property
    def options(self) -> dict[str, tuple[float, ...]]:
        """For `odeint(cde, ..., options=cde.options)`: steps end where dX/dt has kinks or jumps."""
        kinks = getattr(self.X, "kinks", ())
        return {"jump_t" if getattr(self.X, "jumps", True) else "step_t": kinks} if kinks else {}

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """
        Raises:
            BadShape: `g` does not return a matrix that takes dX/dt to the shape of `h`.
        """
        rate, matrix = self.X.derivative(t), self.g(t, h)
        if matrix.shape[-2:] != (*h.shape[-1:], *rate.shape[-1:]):
            raise BadShape(
                f"g(t, h) has shape {tuple(matrix.shape)}; for h of shape {tuple(h.shape)} and {rate.shape[-1]} "
                f"channels of X it must be {(*h.shape, rate.shape[-1])}."
            )
        return (matrix @ rate[..., None]).squeeze(-1)


def knots(t: Any, n: int) -> Tensor:
    """The times of n samples, checked: (n,) float64 on the host."""
    if t is None:
        times = torch.arange(n, dtype=torch.float64, device="cpu")
    else:
        try:
            times = (t.detach() if isinstance(t, Tensor) else on_host(t)).to("cpu", torch.float64)
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadTime(f"t must be a tensor or floats; got {t!r:.80}.") from error
        if isinstance(t, Tensor) and t.requires_grad:
            raise BadTime("t requires grad, and there is no gradient by the times of samples; pass t.detach().")
    if times.shape != (n,):
        raise BadShape(f"t must have shape ({n},), a time for each sample; got {tuple(times.shape)}.")
    if n < 2:
        raise BadShape(f"there must be at least two times to interpolate between; got {n}.")
    if not bool(torch.isfinite(times).all()) or bool((times.diff() <= 0).any()):
        raise BadTime("t must be finite and strictly increasing.")
    return times


def one(x: Any) -> Tensor:
    """Samples with their times in front, checked: (T, ...)."""
    if not isinstance(x, Tensor) or x.ndim == 0 or (x.ndim > 1 and x.numel() == 0):
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise BadShape(f"x must be a tensor of shape (T,) or (..., T, D), or a list of them; got {got}.")
    if x.dtype not in (torch.float32, torch.float64):
        raise BadDtype(f"x has dtype {x.dtype}; samples must be float32 or float64.")
    return x if x.ndim == 1 else x.movedim(-2, 0)


def moments(t: Tensor, x: Tensor) -> Tensor:
    """Times as numbers of the dtype of x, on its device."""
    at = t.to(x)
    if bool((at.diff() <= 0).any()):
        raise BadTime(f"t has times that {x.dtype}, the dtype of x, does not tell apart; use float64.")
    return at


def together(x: Sequence[Tensor], t: Any, kind: str) -> tuple[Tensor, Tensor, bool]:
    """The pieces of signals with times of their own, each of them the curve that it is alone.

    Args:
        x: N tensors of shape (T_i, D). t: N of shape (T_i,).

    Returns:
        The union of their times, (T,); pieces (T - 1, degree + 1, N, D); whether a derivative jumps.
    """
    if not x or not all(isinstance(part, Tensor) and part.ndim == 2 for part in x):
        raise BadShape("a list of signals must hold tensors of shape (T_i, D).")
    if not isinstance(t, (list, tuple)) or len(t) != len(x):
        raise BadShape(f"a list of {len(x)} signals needs a list of as many t, with times of each.")
    if len({part.shape[1] for part in x}) > 1:
        raise BadShape(f"all signals must have as many channels; got {[part.shape[1] for part in x]}.")
    times = [knots(own, len(part)) for own, part in zip(t, x)]
    union = torch.unique(torch.cat(times))
    starts = moments(union, x[0])[:-1]
    made, jumps = [], False
    for own, part in zip(times, x):
        at = moments(own, one(part))
        pieces, jump = polynomials(part, at, kind)
        i = torch.searchsorted(at[1:-1], starts, right=True)
        c, s = list(pieces[i].unbind(1)), (starts - at[i])[:, None]
        for m in range(len(c) - 1):  # the polynomial in powers of the time since the later start
            for n in range(len(c) - 2, m - 1, -1):
                c[n] = c[n] + s * c[n + 1]
        first, last = part_ends(pieces, at)
        early, late = (starts < at[0])[:, None], (starts >= at[-1])[:, None]
        c = [torch.where(early | late, torch.zeros_like(x), x) for x in c]
        c[0] = torch.where(early, first, torch.where(late, last, c[0]))
        made.append(torch.stack(c, 1))
        jumps = jumps or jump or bool((early | late).any())
    return union, torch.stack(made, 2), jumps


def part_ends(pieces: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last value of a curve, (D,) each."""
    return pieces[0, 0], horner(pieces[-1], t[-1] - t[-2])


def horner(c: Tensor, s: Tensor) -> Tensor:
    """The value at s of the polynomial with coefficients c (degree + 1, ...), the constant one first."""
    value = c[-1]
    for a in reversed(c[:-1].unbind()):
        value = a + s * value
    return value


def polynomials(x: Tensor, t: Tensor, kind: str) -> tuple[Tensor, bool]:
    """The pieces between samples, in powers of the time since each began.

    Args:
        x: (T, ...), NaN where a sample is missing. t: (T,).

    Returns:
        (T - 1, degree + 1, ...), and whether the derivative jumps somewhere.
    """
    width = t.diff().reshape(-1, *[1] * (x.ndim - 1))
    missing = x.isnan()
    gaps = bool(missing.any())
    seen = ~missing
    filled = fill(x, t, seen) if gaps else x
    rise = filled.diff(dim=0) / width
    if kind == "linear":
        return torch.stack([filled[:-1], rise], 1), True
    if kind == "hermite":
        left, right = torch.cat([rise[:1], rise[:-1]]), rise
        if gaps:  # a curve begins as its first piece does
            before = seen.cumsum(0)[:-1] <= 1
            left = torch.where(before, rise, left)
    else:
        on_spline, slopes = splines(x, t, seen)
        left, right = slopes[:-1], slopes[1:]
    outside = torch.zeros_like(rise, dtype=torch.bool)
    if gaps:  # constant there
        begun, ended = seen.cumsum(0) > 0, seen.flip(0).cumsum(0).flip(0) == 0
        outside = ~begun[:-1] | ended[1:]
        left, right = (torch.where(outside, torch.zeros_like(m), m) for m in (left, right))
        if kind == "natural":
            filled = torch.where(begun & ~ended, on_spline, filled)
            rise = filled.diff(dim=0) / width
    c = (3 * rise - 2 * left - right) / width
    d = (left + right - 2 * rise) / width**2
    return torch.stack([filled[:-1], left, c, d], 1), bool(outside.any())


def fill(x: Tensor, t: Tensor, seen: Tensor) -> Tensor:
    """x (T, ...) with straight lines over what is missing, constant beyond the ends; zero where all is missing."""
    n = len(x)
    place = torch.arange(n, device=x.device).reshape(-1, *[1] * (x.ndim - 1)).expand(x.shape)
    before = torch.where(seen, place, -1).cummax(0).values
    after = torch.where(seen, place, n).flip(0).cummin(0).values.flip(0)
    low = torch.where(before >= 0, before, after).clamp(max=n - 1)
    high = torch.where(after < n, after, before).clamp(min=0)
    known = torch.where(seen, x, torch.zeros_like(x))
    a, b, ta, tb = known.gather(0, low), known.gather(0, high), t[low], t[high]
    part = (t.reshape(-1, *[1] * (x.ndim - 1)) - ta) / torch.where(high > low, tb - ta, torch.ones_like(ta))
    return torch.where(seen, known, a + part * (b - a))


def splines(x: Tensor, t: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Values and slopes (T, ...) at all times of the natural cubic splines through the samples; zero where a channel
    has fewer than two."""
    if bool(seen.all()):
        return x, natural(x.reshape(len(x), -1), t).reshape(x.shape)
    flat, mask = x.reshape(len(x), -1), seen.reshape(len(x), -1)
    columns = [flat.new_zeros(2, len(x))] * flat.shape[1]
    patterns, kind = torch.unique(mask, dim=1, return_inverse=True)
    for k in range(patterns.shape[1]):  # all channels with samples at the same times together
        rows, of = patterns[:, k].nonzero()[:, 0], (kind == k).nonzero()[:, 0]
        if len(rows) > 1:
            part = flat[rows][:, of]
            both = torch.stack(between(part, natural(part, t[rows]), t[rows], t))
            for j, column in zip(of.tolist(), both.unbind(2)):
                columns[j] = column
    found = torch.stack(columns, 2).reshape(2, *x.shape)
    return found[0], found[1]


def natural(x: Tensor, t: Tensor) -> Tensor:
    """Slopes (T, C) of the natural cubic splines through x (T, C) at t (T,): the tridiagonal equations of the second
    derivatives' continuity."""
    n = len(t)
    width = t.diff()
    rise = x.diff(dim=0) / width[:, None]
    inverse = (1 / width).tolist()
    right = 3 * rise / width[:, None]
    below, diagonal = [0.0, *inverse], [2 * (a + b) for a, b in zip([0.0, *inverse], [*inverse, 0.0])]
    none = right.new_zeros(1, x.shape[1])
    rhs = list((torch.cat([right, none]) + torch.cat([none, right])).unbind())
    for i in range(1, n):  # elimination without pivots: the matrix is diagonally dominant
        factor = below[i] / diagonal[i - 1]
        diagonal[i] -= factor * below[i]
        rhs[i] = rhs[i] - factor * rhs[i - 1]
    slopes = [rhs[-1] / diagonal[-1]]
    for i in range(n - 2, -1, -1):
        slopes.append((rhs[i] - inverse[i] * slopes[-1]) / diagonal[i])
    return torch.stack(slopes[::-1])


def between(x: Tensor, slopes: Tensor, knots: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Values and slopes (M, C) at times t (M,) of the curves through x (K, C) with slopes (K, C) at the knots (K,)."""
    i = torch.searchsorted(knots[1:-1].contiguous(), t)
    width = (knots[i + 1] - knots[i])[:, None]
    s = (t - knots[i])[:, None] / width
    a, b, ma, mb = x[i], x[i + 1], slopes[i], slopes[i + 1]
    value = a + s * s * (3 - 2 * s) * (b - a) + width * s * (1 - s) * ((1 - s) * ma - s * mb)
    slope = 6 * s * (1 - s) * (b - a) / width + (1 - s) * (1 - 3 * s) * ma + s * (3 * s - 2) * mb
    return value, slope
