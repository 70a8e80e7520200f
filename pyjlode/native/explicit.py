"""Explicit Runge-Kutta steps."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods.explicit import ExplicitTableau
from ..notices import warn
from ..numbers import kept, read
from ..problem import ODEProblem
from . import interpolation
from .step import Interval, fraction, stage_times


class Buffered:
    """Stage derivatives of a step in one preallocated (rows, n) buffer: a stage sum is one matrix-vector product.

    For solves that autograd does not record.
    """

    def __init__(self, rows: int, like: Tensor, shape: torch.Size | None) -> None:
        K = torch.empty(rows, like.numel(), dtype=like.dtype, device=like.device)
        self.rows = K.unbind(0)
        self.shaped = self.rows if shape is None else K.view(rows, *shape).unbind(0)
        columns = K.T
        self.heads = [columns.narrow(1, 0, i) for i in range(rows + 1)]

    def start(self, k: Tensor) -> None:
        """Stage 0, known from the step before: shape (n,)."""
        self.rows[0].copy_(k)

    def put(self, i: int, k: Tensor) -> None:
        """Stage i as f returned it."""
        self.shaped[i].copy_(k)

    def get(self, i: int) -> Tensor:
        return self.rows[i]

    def head(self, i: int) -> Tensor:
        """Shape (n, i): the first i stages."""
        return self.heads[i]

    def add_to(self, y: Tensor, i: int, row: Tensor, dt: float | Tensor) -> Tensor:
        """y + dt K row: y (n,), row (i,), K the first i stages -> (n,)."""
        return torch.addmv(y, self.heads[i], row, alpha=dt)  # type: ignore[arg-type]  # a number: nothing is recorded

    def advance(self, y: Tensor, i: int, row: Tensor, dt: float | Tensor) -> Tensor:
        """As `add_to`, for the state at the end of a step. `addmv` rounds y once for each stage, which in float32 adds
        up over the steps: there the increment is summed first."""
        if y.dtype != torch.float32:
            return self.add_to(y, i, row, dt)
        return torch.add(y, torch.mv(self.heads[i], row), alpha=dt)  # type: ignore[arg-type]


class Recorded:
    """The same for solves that autograd records: the stages stay the tensors that f returned."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def start(self, k: Tensor) -> None:
        self.rows[:] = [k]

    def put(self, i: int, k: Tensor) -> None:
        self.rows[i:] = [k.reshape(-1)]

    def get(self, i: int) -> Tensor:
        return self.rows[i]

    def head(self, i: int) -> Tensor:
        return torch.stack(self.rows[:i]).T

    def add_to(self, y: Tensor, i: int, row: Tensor, dt: float | Tensor) -> Tensor:
        # As a product with a row from the left: the derivative with respect to each stage is then contiguous, which
        # the backward pass of f is given.
        row = row * (dt.to(row) if isinstance(dt, Tensor) else dt)
        return torch.addmm(y[None], row[None], torch.stack(self.rows[:i])).reshape(-1)

    def advance(self, y: Tensor, i: int, row: Tensor, dt: float | Tensor) -> Tensor:
        if y.dtype != torch.float32:
            return self.add_to(y, i, row, dt)
        row = row * (dt.to(row) if isinstance(dt, Tensor) else dt)
        return y + torch.mm(row[None], torch.stack(self.rows[:i])).reshape(-1)


class Coefficients:
    """A tableau as tensors of one dtype on one device.

    Attributes:
        rows: rows[i], shape (i,), weighs the earlier rows of K for the point of row i: the stages, then
            y1 itself (rows[s] is B), then the extra stages of dense output.
        C: (rows,) their times, in units of the step.
        E: error weights, each (s,) or, with f(t1, y1), (s + 1,).
        P: (rows, degree) float64, dense output; None where the tableau has none.
    """

    def __init__(self, tab: ExplicitTableau, dtype: torch.dtype, device: torch.device) -> None:
        def tensor(x: np.ndarray) -> Tensor:
            return torch.tensor(x, dtype=dtype, device=device)

        s, extra = tab.stages, len(tab.C_extra)
        stages = [*(tab.A[i, :i] for i in range(s)), tab.B, *(tab.A_extra[j, : s + 1 + j] for j in range(extra))]
        self.rows = [tensor(row) for row in stages]
        self.C = np.concatenate([tab.C, [1.0], tab.C_extra])
        self.E = [] if tab.E is None else [tensor(row[: s + tab.fsal]) for row in tab.E]
        self.P = None if tab.P is None else torch.tensor(tab.P, dtype=torch.float64, device=device)


coefficients = kept(maxsize=64)(Coefficients)


class ExplicitRK:
    """Makes the steps of one explicit Runge-Kutta method for one problem.

    Args:
        recorded: autograd follows the solve. So it is for a problem that is `transformed`.
        keep: steps are kept after the next one is made (dense output), so each needs stages of its own.
        tableau: the method, where it is not that of the problem.
    """

    def __init__(
        self, p: ODEProblem, *, recorded: bool = False, keep: bool = False, tableau: ExplicitTableau | None = None
    ) -> None:
        tab = tableau or p.method.tableau
        assert isinstance(tab, ExplicitTableau)
        self.p, self.recorded = p, recorded or p.transformed
        self.c = coefficients(tab, p.y0.dtype, p.y0.device)
        self.s, self.fsal = tab.stages, tab.fsal
        self.rows = len(self.c.rows)
        self.C = self.c.C[: self.s + self.fsal]
        self.buffer = None if self.recorded or keep else Buffered(self.rows, p.y0, p.f.shape)

    def stages(self) -> Buffered | Recorded:
        if self.recorded:
            return Recorded()
        return self.buffer or Buffered(self.rows, self.p.y0, self.p.f.shape)

    def size(self, interval: Interval) -> float | Tensor:
        """The length of a step, as a tensor only where its graph is wanted."""
        return interval.dt if self.recorded else interval.t1 - interval.t0

    def step(self, interval: Interval, y: Tensor, k0: Tensor | None, *, estimate: bool = True) -> ExplicitStep:
        """Take one step (Hairer, Nørsett & Wanner II.1): shapes (n,).

        Args:
            k0: f at the start of the step, where it is known.
            estimate: `error` will be asked for.
        """
        f, K, rows, dt, s = self.p.f.shaped, self.stages(), self.c.rows, self.size(interval), self.s
        t = stage_times(interval, self.C, y)
        if k0 is None:
            K.put(0, f(t[0], y))
        else:
            K.start(k0)
        for i in range(1, s):
            K.put(i, f(t[i], K.add_to(y, i, rows[i], dt)))
        y1 = K.advance(y, s, rows[s], dt)
        fsal = self.fsal and estimate
        if fsal:
            K.put(s, f(t[s], y1))
        return ExplicitStep(self, interval, y, y1, K, s + fsal)


class ExplicitStep:
    """A step and its stages; the end's slope and the extra stages of dense output are evaluated when asked for."""

    __slots__ = ("K", "done", "interval", "rk", "y", "y1")

    def __init__(self, rk: ExplicitRK, interval: Interval, y: Tensor, y1: Tensor, K: Any, done: int) -> None:
        self.rk, self.interval, self.y, self.y1, self.K = rk, interval, y, y1, K
        self.done = done  # rows of K that are filled

    @property
    def f0(self) -> Tensor:
        """f at the start of the step, shape (n,)."""
        return self.K.get(0)

    @property
    def f1(self) -> Tensor:
        """f at the end of the step, shape (n,)."""
        if self.done == self.rk.s:
            (t1,) = stage_times(self.interval, _ONE, self.y)
            self.K.put(self.rk.s, self.rk.p.f.shaped(t1, self.y1))
            self.done += 1
        return self.K.get(self.rk.s)

    def error(self, rtol: float | Tensor, atol: float | Tensor, abs_y: Tensor, abs_y1: Tensor) -> float:
        """Norm of the local error over the tolerance; the step is good if it is at most 1."""
        K, norm = self.K.head(self.rk.s + self.rk.fsal), self.rk.p.norm
        # The error is dt E K; the scale is divided by dt instead, which costs nothing where the tolerances are numbers.
        dt = abs(self.interval.t1 - self.interval.t0)
        if self.rk.p.transformed:
            scale = torch.maximum(abs_y, abs_y1) * (rtol / dt) + atol / dt
            errors = [norm(torch.mv(K, row) / scale) for row in self.rk.c.E]
        else:
            scale = torch.maximum(abs_y, abs_y1).mul_(rtol / dt).add_(atol / dt)
            errors = [norm(torch.mv(K, row).div_(scale)) for row in self.rk.c.E]
        if len(errors) == 1:
            return errors[0]
        # DOP853: the fifth-order error damped by the third-order one (Hairer, Nørsett & Wanner II.10).
        fifth, third = errors
        return fifth * (fifth / math.hypot(fifth, 0.1 * third)) if fifth else fifth

    def stretch(self) -> float:
        """|λ dt| seen between the last stage and the end of the step (HW (IV.2.14)).

        In units of the tolerance: what is stiff has little part in the solution, and the rest would hide it.
        """
        p, dt, last = self.rk.p, self.interval.t1 - self.interval.t0, self.rk.s - 1
        Y = self.K.add_to(self.y, last, self.rk.c.rows[last], dt)
        rise, run = self.f1 - self.K.get(last), self.y1 - Y
        scale = p.atol + p.rtol * self.y.abs()
        rise, run = ((x / scale).reshape(p.batch, -1).square().sum(1) for x in (rise, run))
        ratio = torch.where(run > 0, rise / run, 0.0).sqrt()
        return abs(dt) * read(ratio.amax()) if ratio.numel() else 0.0

    def complete(self) -> None:
        """Evaluate what dense output needs beyond the step's own stages."""
        _ = self.f1
        if self.done < self.rk.rows:
            times = stage_times(self.interval, self.rk.c.C[self.done :], self.y)
            dt = self.rk.size(self.interval)
            for i, t in enumerate(times, self.done):
                self.K.put(i, self.rk.p.f.shaped(t, self.K.add_to(self.y, i, self.rk.c.rows[i], dt)))
            self.done = self.rk.rows

    def pointwise(self) -> Callable[[float], Tensor] | None:
        """`interpolate` for one time after the other, without graph: the same numbers in a quarter of the time. None
        where the tableau has no polynomials."""
        P = self.rk.c.P
        if P is None:
            return None
        self.complete()
        y, start, dt = self.y.detach(), float(self.interval.at), float(self.interval.dt)
        Q, K = P.T.to("cpu", torch.float64), self.K.head(self.rk.rows).T.detach()

        def at(t: float) -> Tensor:
            theta = (t - start) / dt
            powers = list(itertools.accumulate([theta] * len(Q), operator.mul))
            weights = (torch.tensor([powers], dtype=torch.float64, device="cpu") @ Q * dt).to(y, non_blocking=True)
            return torch.addmm(y, weights, K)[0]

        return at

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        theta, dt, P = fraction(self.interval, times), self.interval.dt, self.rk.c.P
        if P is None:
            return interpolation.hermite(theta, dt, self.y, self.y1, self.f0, self.f1)
        self.complete()
        weights = (interpolation.powers(theta, P.shape[1]) @ P.T.to(theta) * dt).to(self.y, non_blocking=True)
        return torch.addmm(self.y, weights, self.K.head(self.rk.rows).T)


_ONE = np.ones(1)

# Stiffness is looked for in so many steps out of so many, from the hundredth on: a solve of fewer is quick.
LOOKED_AT, PERIOD, FIRST = 16, 500, 100
# So many of them on the boundary of stability, or as near to it as a tight tolerance holds a step that is not limited
# by accuracy, make the problem stiff for the method (HW IV.2) ...
ON_BOUNDARY, NEAR = 14, 0.7
# ... and so many steps that are left at this size, a crawl.
CRAWL = 2000


class Crawl:
    """Says once in a solve that the method crawls, held by its stability."""

    def __init__(self, tab: ExplicitTableau) -> None:
        self.near, self.hits, self.said = NEAR * boundary(tab), 0, False

    def look(self, n: int, step: ExplicitStep, end: float) -> None:
        """Look at step number n, from 1."""
        phase = (n - FIRST) % PERIOD
        if self.said or n < FIRST or phase >= LOOKED_AT:
            return
        interval = step.interval
        left = (end - interval.t1) / (interval.t1 - interval.t0) if math.isfinite(end) else n
        if left <= CRAWL:
            self.hits = 0
            return
        with torch.no_grad():
            self.hits = (self.hits if phase else 0) + (step.stretch() > self.near)
        if self.hits >= ON_BOUNDARY:
            self.said = True
            name, t, dt = step.rk.p.method.name, interval.t1, interval.t1 - interval.t0
            there = f"some {left:.0f} more of them to t={end:.6g}" if math.isfinite(end) else f"{n} so far"
            warn(
                f"{name}: the problem is stiff at t={t:.6g}. Steps of dt={dt:.3g} are as long as the method is stable "
                f"for, and not as the tolerance asks; there are {there}. Use method='auto', which finds out, or one "
                "for stiff systems ('radau5', 'rodas5p', 'bdf')."
            )


@functools.lru_cache(maxsize=32)
def boundary(tab: ExplicitTableau) -> float:
    """Where the method's region of stability ends on the negative real axis."""
    s = len(tab.B)
    powers, moments = np.ones(s), [1.0]
    for _ in range(s):  # R(z) = 1 + Σ z^(k+1) B A^k 1
        moments.append(float(tab.B @ powers))
        powers = tab.A[:s, :s] @ powers
    z = -np.arange(1, 4000) * 0.005
    return float(-z[np.argmax(np.abs(np.polynomial.polynomial.polyval(z, moments)) > 1 + 1e-9)])
