"""Numerical differentiation formulas of variable order in backward differences (Shampine & Reichelt, The MATLAB ODE
suite, SIAM J. Sci. Comput. 18, 1997), at a quasi-constant step."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..methods.stiff import NDFTableau
from ..problem import ODEProblem
from ..solution import Stats
from .linear import Jacobian, Linear, System
from .newton import _SAME, POLISH_RECORDED, Converged, Frozen, damped, newton, newton_tolerance, settled
from .step import Interval, fraction, stage_times
from .stiffness import Attempt

_MAX_ITERS = 4
# The estimate of a step's error is sharp, and a solution's error is the sum of its steps': a step is to be so much
# shorter than the estimate allows. That is a part of the tolerance that gets smaller with the order (2.2 times at order
# 1, ten times at 5), as it has to: the tight tolerances that high orders serve are where more steps add up. CVODE aims
# at a sixth; the other methods here estimate the error of a formula of lower order, which does the same.
_SHORTER = 1.47
_END = np.ones(1)
_ROWS = 8  # backward differences of order 0 to 7: two above the highest order


class Past(NamedTuple):
    """What a step needs to be taken again.

    Attributes:
        start: (8, n), backward differences before the step; None in a first step, which makes its own.
        dt: signed step that they belong to.
        order: of the step.
        d: (n,), by how much the converged y1 differs from the prediction.
    """

    start: Tensor | None
    dt: float
    order: int
    d: Tensor


def rescaling(order: int, ratio: float | Tensor) -> Tensor:
    """(order + 1, order + 1) float64: the differences of the same polynomial at a step `ratio` times as long.

    (R(ratio) R(1))ᵀ with R of Shampine & Reichelt, Sec. 2.2: R[i, j] = Π_{m=1..i} (m - 1 - ratio j) / m.
    """
    fixed, moving, U = _factors(order)
    if isinstance(ratio, Tensor):
        R = (torch.from_numpy(fixed).to(ratio) + ratio * torch.from_numpy(moving).to(ratio)).cumprod(0)
        return (R @ torch.from_numpy(U).to(ratio)).T
    return torch.from_numpy(((fixed + ratio * moving).cumprod(0) @ U).T)


@functools.cache
def _factors(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factor m of R[i, j] is fixed[m, j] + ratio moving[m, j], that of m = 0 is 1; and R(1). All (order + 1,)²."""
    m = np.arange(1.0, order + 1)[:, None]
    ones, j = np.ones((1, order + 1)), np.arange(order + 1.0)
    fixed, moving = np.concatenate([ones, (m - 1) / m * ones]), np.concatenate([0 * ones, -j / m])
    return fixed, moving, (fixed + moving).cumprod(0)


class Sums:
    """The differences of a prediction of one order, and those after its step, as products with those before, D (8, n).

    Attributes:
        ahead: (2, 8): the predicted y1, and ψ = Σ_j γ_j D_j / α.
        after, added: (8, 8), (8,): the differences after a step whose y1 is d more than predicted, after D + added dᵀ.
            That of order + 1 is d, and each below it is the one above it more than before.
    """

    def __init__(self, tab: NDFTableau, order: int, like: Tensor) -> None:
        q = order
        ahead = np.zeros((2, _ROWS))
        ahead[0, : q + 1], ahead[1, 1 : q + 1] = 1, tab.gamma[1 : q + 1] / tab.alpha[q]
        after, added = np.eye(_ROWS), np.zeros(_ROWS)
        after[: q + 1, : q + 1] = np.triu(np.ones((q + 1, q + 1)))
        added[: q + 3] = 1
        after[q + 1, q + 1], after[q + 2, q + 1], after[q + 2, q + 2] = 0, -1, 0
        self.ahead, self.after, self.added = (torch.from_numpy(x).to(like) for x in (ahead, after, added))

    def updated(self, D: Tensor, d: Tensor) -> Tensor:
        return torch.addr(self.after @ D, self.added, d)


class Bdf:
    """Makes the steps of the NDF for one problem."""

    def __init__(self, p: ODEProblem, stats: Stats, tab: NDFTableau) -> None:
        self.p, self.stats = p, stats
        self.sums = [Sums(tab, order, p.y0) for order in range(tab.order + 1)]
        self.linear = Linear(p, stats)
        self.frozen = Frozen(self.linear, [1.0])
        self.alpha = tab.alpha.tolist()
        # Index k: error of order k over the backward difference k + 1.
        self.constant = (tab.error * _SHORTER ** np.arange(1.0, len(tab.error) + 1)).tolist()
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
        q, sums = self.order, self.sums[self.order]
        (t1,) = stage_times(interval, _END, y)
        predicted, psi = (sums.ahead @ D).unbind()
        scale = predicted.abs() * self.p.rtol + self.p.atol
        c, eps = dt / self.alpha[q], torch.finfo(y.dtype).eps

        def solved(d: Tensor) -> bool:
            left, right = c * self.p.f(t1, predicted + d), self.linear.times_mass(psi + d)
            return bool(((left - right).abs() <= 10 * eps * (left.abs() + right.abs())).all())

        def iterate(systems: list[System]) -> Converged:
            return newton(
                torch.zeros_like(y),
                lambda d: systems[0].solve(
                    torch.sub(self.p.f(t1, predicted + d), self.linear.times_mass(psi + d), alpha=1 / c)
                ),
                lambda dd: self.p.norm(dd / scale),
                tol=self.tol,
                max_iters=self.max_iters,
                eta=1.0,
                stats=self.stats,
                solved=solved,
            )

        done = self.frozen.converge(t1, predicted, c, iterate)
        if done.why:
            return Attempt(None, math.inf, done.why)
        self.done = done
        after = sums.updated(D, done.x)
        past = Past(before, self.dt, q, done.x)
        self.tried = BdfStep(interval, y, after, past)
        self.scale = self.tried.y1.abs() * self.p.rtol + self.p.atol
        return Attempt(self.tried, self.constant[q] * self.p.norm(done.x / self.scale))

    def rescaled(self, D: Tensor, order: int, ratio: float | Tensor) -> Tensor:
        if not isinstance(ratio, Tensor) and abs(ratio - 1) <= _SAME:
            return D
        head = rescaling(order, ratio).to(D, non_blocking=True) @ D[: order + 1]
        return torch.cat([head, D[order + 1 :]])

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
            errors[q - 1] = self.constant[q - 1] * self.p.norm(self.D[q] / self.scale)
        if q < self.max_order:
            errors[q + 1] = self.constant[q + 1] * self.p.norm(self.D[q + 2] / self.scale)
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
        p, q, sums, alpha = self.p, data.order, self.sums[data.order], self.alpha[data.order]
        if data.start is None:
            D = self.first(interval, y)
        else:
            D = self.rescaled(data.start, q, interval.dt / data.dt)
        (t1,) = stage_times(interval, _END, y)
        predicted, psi = (sums.ahead @ D).unbind()
        size = (interval.t1 - interval.t0) / alpha
        c = interval.dt.to(y) / alpha if isinstance(interval.dt, Tensor) else size

        def linearise(d: Tensor) -> tuple[System, Tensor]:
            J = self.linear.jacobian(t1, predicted + d)
            W = self.linear.system(J, 1 / size)
            k = p.f(t1, predicted + d) if J.f is None else J.f
            return W, W.solve(torch.sub(k, self.linear.times_mass(psi + d), alpha=1 / size))

        with torch.no_grad():
            scale = predicted.abs() * p.rtol + p.atol
            d, W = settled(data.d, linearise, lambda dd: p.norm(dd / scale), self.tol)
        for _ in range(polish):
            d = d + W.solve(p.f(t1, predicted + d) - self.linear.times_mass(psi + d) / c)
        after = sums.updated(D, d)
        self.D = after.detach()  # a recorded solve goes on from the polished differences
        return BdfStep(interval, y, after, data)


class BdfStep:
    """A step and the backward differences D at its end, (8, n): their polynomial is its dense output."""

    def __init__(self, interval: Interval, y: Tensor, D: Tensor, data: Past) -> None:
        self.interval, self.y, self.D, self.data = interval, y, D, data
        self.y1 = D[0]
        self.left = D

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        theta = fraction(self.interval, times)
        j = torch.arange(self.data.order, dtype=theta.dtype, device=theta.device)
        weights = ((theta[:, None] - 1 + j) / (1 + j)).cumprod(1)
        return self.y1 + weights.to(self.D, non_blocking=True) @ self.D[1 : self.data.order + 1]
