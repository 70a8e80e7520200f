"""Implicit Runge-Kutta steps of fixed size, from their tableau alone: fully implicit or diagonally implicit."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..derivatives import jacobian
from ..errors import NotConverged
from ..methods.explicit import ImplicitTableau
from ..numbers import derivatives, factored, solve
from ..problem import ODEProblem, rms_norm
from . import interpolation
from .step import Interval, fraction, numpy_dtype, stage_times

# In a recorded solve the stages are reached by Newton iterations that autograd does not see, then polished by this many
# that it does. With the exact Jacobian at the solution each of them makes one more order of derivative exact.
_RECORDED_NEWTON = 2


class ImplicitRK:
    """Makes the steps of one implicit Runge-Kutta method for one problem."""

    def __init__(self, p: ODEProblem, *, recorded: bool = False) -> None:
        tab = p.method.tableau
        assert isinstance(tab, ImplicitTableau)
        self.p, self.tab, self.recorded = p, tab, recorded or p.transformed
        self.njac = 0
        self.A = torch.from_numpy(tab.A.astype(numpy_dtype(p.y0))).to(p.y0.device)
        self.B = torch.from_numpy(tab.B.astype(numpy_dtype(p.y0))).to(p.y0.device)
        # A diagonally implicit method is solved stage by stage, the others all stages at once.
        s = len(tab.B)
        self.blocks = [slice(i, i + 1) for i in range(s)] if tab.diagonal else [slice(0, s)]
        self.max_iters = p.options.max_iters or 100

    def stage_slopes(self, times: tuple[Tensor, ...], y: Tensor, K: Tensor, dt: float | Tensor, rows: slice) -> Tensor:
        """f at stages `rows` for stage slopes K (s, n): shape (rows, n)."""
        h = dt.to(y) if isinstance(dt, Tensor) else dt
        Y = y + h * (self.A[rows] @ K)
        return torch.stack([self.p.f(t, Yi) for t, Yi in zip(times[rows], Y)])

    def newton_matrix(self, A: Tensor, jacobians: list[Tensor], dt: float) -> Tensor:
        """I - dt (A x J) with the Jacobian of stage i in block row i: shape (s n, s n)."""
        s, n = len(jacobians), jacobians[0].shape[0]
        M = torch.einsum("ij,iab->iajb", A, torch.stack(jacobians)).mul_(-dt).reshape(s * n, s * n)
        M.diagonal().add_(1)
        return M

    @torch.no_grad()
    def solve(self, interval: Interval, times: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Stage slopes K (s, n) by simplified Newton iteration (Hairer & Wanner, Solving ODEs II, IV.8)."""
        dt = interval.t1 - interval.t0
        (start,) = stage_times(interval, np.zeros(1), y)
        J = jacobian(self.p, start, y)
        self.njac += 1
        K = self.p.f(start, y).repeat(len(self.tab.B), 1)
        scale = self.p.atol + self.p.rtol * y.abs()
        # Solve to rounding, or a hundred times below the tolerance where rounding is far away: what is left of the
        # residual must not be seen in the order of the method.
        target = max(1e-10 if y.dtype == torch.float64 else 1e-3, 0.0)
        floor = 4 * torch.finfo(y.dtype).eps * (rms_norm(y / scale) + abs(dt) * rms_norm(K[0] / scale))
        for rows in self.blocks:
            if self.tab.diagonal and float(self.A[rows, rows]) == 0:  # an explicit stage
                K = replaced(K, rows, self.stage_slopes(times, y, K, dt, rows))
                continue
            A = self.A[rows, rows]
            inverse = factored(self.newton_matrix(A, [J] * len(A), dt))
            last = math.inf
            for iteration in range(self.max_iters):
                residual = self.stage_slopes(times, y, K, dt, rows) - K[rows]
                change = inverse(residual.reshape(-1, 1)).reshape_as(residual)
                K = replaced(K, rows, K[rows] + change)
                size = abs(dt) * rms_norm(change / scale)
                if size <= max(target, floor):
                    break
                if not math.isfinite(size) or (iteration > 2 and size > 2 * last):
                    raise self.failed(interval, "its Newton iteration diverges")
                if size > 0.5 * last:  # slow: the Jacobian of the step's start is too far from the stages
                    Y = y + dt * (self.A[rows] @ K)
                    stages = [jacobian(self.p, t, Yi) for t, Yi in zip(times[rows], Y)]
                    self.njac += len(stages)
                    inverse = factored(self.newton_matrix(A, stages, dt))
                last = size
            else:
                raise self.failed(interval, f"{self.max_iters} Newton iterations were not enough")
        return K

    def failed(self, interval: Interval, why: str) -> NotConverged:
        dt = interval.t1 - interval.t0
        return NotConverged(
            f"{self.p.method.name}: the equations of the step from t={interval.t0:.6g} with dt={dt:.3g} were not "
            f"solved: {why}. Use smaller steps (options={{'step_size': ...}}), or raise options['max_iters'].",
            t=interval.t0,
            dt=dt,
        )

    def step(self, interval: Interval, y: Tensor, carry: None = None) -> ImplicitStep:
        times = stage_times(interval, self.tab.C, y)
        K = self.solve(interval, times, y)
        h = interval.dt.to(y) if isinstance(interval.dt, Tensor) else interval.dt
        if self.recorded:
            K = self.polish(interval, times, y, K)
        return ImplicitStep(self, interval, y, y + h * torch.mv(K.T, self.B), K)

    def polish(self, interval: Interval, times: tuple[Tensor, ...], y: Tensor, K: Tensor) -> Tensor:
        """Newton iterations that autograd records, so that derivatives follow the implicit function theorem."""
        dt = interval.t1 - interval.t0
        with torch.no_grad():
            Y = y + dt * (self.A @ K)
            M = self.newton_matrix(self.A, [jacobian(self.p, t, Yi) for t, Yi in zip(times, Y)], dt)
            self.njac += len(Y)
        polish = max(_RECORDED_NEWTON, derivatives()) if self.p.transformed else _RECORDED_NEWTON
        for _ in range(polish):
            residual = self.stage_slopes(times, y, K, interval.dt, slice(0, len(K))) - K
            K = K + solve(M, residual.reshape(-1)).reshape_as(K)
        return K


def replaced(K: Tensor, rows: slice, new: Tensor) -> Tensor:
    """K (s, n) with other rows. Not in place: `vmap` may see samples in these that it does not see in K."""
    return new if len(new) == len(K) else torch.cat([K[: rows.start], new, K[rows.stop :]])


class ImplicitStep:
    """A step with the slopes at its ends for cubic output."""

    def __init__(self, rk: ImplicitRK, interval: Interval, y: Tensor, y1: Tensor, K: Tensor) -> None:
        self.rk, self.interval, self.y, self.y1, self.K = rk, interval, y, y1, K

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        theta = fraction(self.interval, times)
        start, end = stage_times(self.interval, np.array([0.0, 1.0]), self.y)
        f0, f1 = self.rk.p.f(start, self.y), self.rk.p.f(end, self.y1)
        return interpolation.hermite(theta, self.interval.dt, self.y, self.y1, f0, f1)
