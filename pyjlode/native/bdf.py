"""Numerical differentiation formulas of variable order in backward differences (Shampine & Reichelt, The MATLAB ODE
suite, SIAM J. Sci. Comput. 18, 1997), at a quasi-constant step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..problem import ODEProblem
from ..solution import Stats
from .linear import Factors, Jacobian, Krylov, Linear
from .newton import _SAME, POLISH_RECORDED, Converged, Frozen, damped, newton, newton_tolerance
from .step import Interval, fraction, stage_times
from .stiff_tableaus import NDFTableau
from .stiffness import Attempt

_MAX_ITERS = 4
_ROWS = 8  # backward differences of order 0 to 7: two above the highest order


class Past(NamedTuple):
    """What a step needs to be taken again.

    Attributes:
        D: (8, n), backward differences before the step; None in a first step, which makes its own.
        dt: signed step that they belong to.
        order: of the step.
        d: (n,), by how much the converged y1 differs from the prediction.
    """

    D: Tensor | None
    dt: float
    order: int
    d: Tensor


def rescaling(order: int, ratio: float | Tensor) -> Tensor:
    """(order + 1, order + 1) float64: the differences of the same polynomial at a step `ratio` times as long."""
    R, U = _differences(order, ratio), _differences(order, 1.0)
    return (R @ U.to(R)).T


def _differences(order: int, ratio: float | Tensor) -> Tensor:
    """R of Shampine & Reichelt, Sec. 2.2: R[i, j] = Π_{m=1..i} (m - 1 - ratio j) / m."""
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    m = torch.arange(1, order + 1, dtype=torch.float64, device=ratio.device)
    factors = (m[:, None] - 1 - ratio * m[None, :]) / m[:, None]
    inner = torch.cat([torch.ones_like(factors[:1]), factors]).cumprod(0)
    first = torch.zeros_like(inner[:, :1])
    first[0] = 1
    return torch.cat([first, inner], 1)


class Bdf:
    """Makes the steps of the NDF for one problem."""

    def __init__(self, p: ODEProblem, stats: Stats, tab: NDFTableau) -> None:
        self.p, self.stats, self.tab = p, stats, tab
        self.gamma = torch.tensor(tab.gamma, dtype=p.y0.dtype, device=p.y0.device)
        self.linear = Linear(p, stats)
        self.frozen = Frozen(self.linear, [1.0])
        self.max_order = min(p.options.max_order or tab.order, tab.order)
        self.max_iters = p.options.max_iters or _MAX_ITERS
        self.tol = newton_tolerance(p)
        self.f0 = p.f0
        self.D: Tensor | None = None  # (8, n)
        self.dt, self.order, self.equal = math.nan, 1, 0
        self.tried: BdfStep | None = None

    @property
    def J(self) -> Jacobian | None:
        return self.frozen.J

    def first(self, interval: Interval, y: Tensor, f0: Tensor | None = None) -> Tensor:
        """Backward differences at order 1 from the slope at the start: (8, n)."""
        (t0,) = stage_times(interval, np.zeros(1), y)
        slope = self.linear.slope(self.p.f(t0, y) if f0 is None else f0)
        dt = interval.dt.to(y) if isinstance(interval.dt, Tensor) else interval.dt
        return torch.cat([y[None], (slope * dt)[None], y.new_zeros(_ROWS - 2, y.numel())])

    def attempt(self, interval: Interval, y: Tensor) -> Attempt:
        dt = interval.t1 - interval.t0
        if interval.after_jump:
            self.D, self.f0 = None, None
            self.frozen.forget()
        fresh = self.D is None
        if fresh:
            self.order, self.equal, self.dt = 1, 0, dt
            before: Tensor | None = None
            D = self.first(interval, y, self.f0)
        else:
            before = self.D
            assert self.D is not None
            D = self.rescaled(self.D, self.order, dt / self.dt)
        q, alpha = self.order, float(self.tab.alpha[self.order])
        (t1,) = stage_times(interval, np.ones(1), y)
        predicted = D[: q + 1].sum(0)
        psi = (self.gamma[1 : q + 1] / alpha) @ D[1 : q + 1]
        scale = self.p.atol + self.p.rtol * predicted.abs()
        c = dt / alpha

        def iterate(systems: list[Factors | Krylov]) -> Converged:
            return newton(
                torch.zeros_like(y),
                lambda d: systems[0].solve(self.p.f(t1, predicted + d) - self.linear.times_mass(psi + d) / c),
                lambda dd: self.p.norm(dd / scale),
                tol=self.tol,
                max_iters=self.max_iters,
                eta=1.0,
                stats=self.stats,
            )

        done = self.frozen.converge(t1, predicted, c, iterate)
        if done.why:
            return Attempt(None, math.inf, done.why)
        self.done = done
        after = self.updated(D, q, done.x)
        past = Past(before, self.dt, q, done.x)
        self.tried = BdfStep(interval, y, after, past)
        self.scale = self.p.atol + self.p.rtol * after[0].abs()
        return Attempt(self.tried, self.p.norm(done.x * float(self.tab.error[q]) / self.scale))

    def rescaled(self, D: Tensor, order: int, ratio: float | Tensor) -> Tensor:
        if not isinstance(ratio, Tensor) and abs(ratio - 1) <= _SAME:
            return D
        head = rescaling(order, ratio).to(D) @ D[: order + 1]
        return torch.cat([head, D[order + 1 :]])

    def updated(self, D: Tensor, order: int, d: Tensor) -> Tensor:
        """Differences at the end of the step: that of order + 1 is d, and each is the one above it more than before."""
        rows = [d, d - D[order + 1]]
        for i in range(order, -1, -1):
            rows.insert(0, D[i] + rows[0])
        return torch.cat([torch.stack(rows), D[order + 3 :]])

    def accept(self, err: float, size: float) -> float:
        assert self.tried is not None
        o, q = self.p.options, self.order
        dt = self.tried.interval.t1 - self.tried.interval.t0
        if not abs(dt / self.dt - 1) <= _SAME:
            self.equal = 0
        self.D, self.dt, self.f0 = self.tried.D, dt, None
        self.equal += 1
        self.frozen.current = False
        if self.equal < q + 1:
            return 1.0
        errors = {q: err}
        if q > 1:
            errors[q - 1] = self.p.norm(self.D[q] * float(self.tab.error[q - 1]) / self.scale)
        if q < self.max_order:
            errors[q + 1] = self.p.norm(self.D[q + 2] * float(self.tab.error[q + 1]) / self.scale)
        factors = {k: e ** (-1 / (k + 1)) if e > 0 else math.inf for k, e in errors.items()}
        self.order = max(factors, key=lambda k: factors[k])
        self.equal = 0
        return min(o.ifactor, damped(self.done.iterations, self.max_iters, o.safety) * factors[self.order])

    def reject(self, err: float, size: float) -> float:
        self.equal = 0
        if not math.isfinite(err):
            return 0.5
        o = self.p.options
        safety = damped(self.done.iterations, self.max_iters, o.safety)
        return min(0.9, max(o.dfactor, safety * err ** (-1 / (self.order + 1))))

    def again(self, interval: Interval, y: Tensor, data: Past, polish: int = POLISH_RECORDED) -> BdfStep:
        """The step under autograd, from the differences before it and its converged d."""
        p, q, alpha = self.p, data.order, float(self.tab.alpha[data.order])
        if data.D is None:
            D = self.first(interval, y)
        else:
            D = self.rescaled(data.D, q, interval.dt / data.dt)
        (t1,) = stage_times(interval, np.ones(1), y)
        predicted = D[: q + 1].sum(0)
        psi = (self.gamma[1 : q + 1] / alpha) @ D[1 : q + 1]
        size = (interval.t1 - interval.t0) / alpha
        c = interval.dt.to(y) / alpha if isinstance(interval.dt, Tensor) else size
        d = data.d
        with torch.no_grad():
            W = self.linear.system(self.linear.jacobian(t1, predicted + d), 1 / size)
        for _ in range(polish):
            d = d + W.solve(p.f(t1, predicted + d) - self.linear.times_mass(psi + d) / c)
        after = self.updated(D, q, d)
        self.D = after.detach()  # a recorded solve goes on from the polished differences
        return BdfStep(interval, y, after, data)


def linked(data: Any, before: BdfStep | None) -> Any:
    """`data` of a step, with the differences that the recorded step before it left."""
    if isinstance(data, Past) and data.D is not None and before is not None:
        return data._replace(D=before.D)
    return data


class BdfStep:
    """A step and the backward differences D at its end, (8, n): their polynomial is its dense output."""

    def __init__(self, interval: Interval, y: Tensor, D: Tensor, data: Past) -> None:
        self.interval, self.y, self.D, self.data = interval, y, D, data
        self.y1 = D[0]

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        theta = fraction(self.interval, times)
        j = torch.arange(self.data.order, dtype=theta.dtype, device=theta.device)
        weights = ((theta[:, None] - 1 + j) / (1 + j)).cumprod(1)
        return self.y1 + weights.to(self.D) @ self.D[1 : self.data.order + 1]
