"""Radau IIA steps of order 5 with error control: RADAU5 (HW IV.8)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..methods.stiff import RadauTableau
from ..problem import ODEProblem, rms_norm
from ..solution import Stats
from . import interpolation
from .linear import Jacobian, Linear, System
from .newton import POLISH_RECORDED, Converged, Frozen, damped, newton, newton_tolerance, settled
from .step import Interval, fraction, stage_times
from .stiffness import Attempt

_MAX_ITERS = 6
_KEEP = 1.2  # a step that could grow by less keeps its size, and with it its factors


class Radau:
    """Makes the steps of RADAU5 for one problem."""

    def __init__(self, p: ODEProblem, stats: Stats, tab: RadauTableau) -> None:
        def tensor(x: np.ndarray) -> Tensor:
            return torch.tensor(x, dtype=p.y0.dtype, device=p.y0.device)

        self.p, self.stats, self.tab = p, stats, tab
        self.T, self.T_inverse, self.A = tensor(tab.T), tensor(np.linalg.inv(tab.T)), tensor(tab.A)
        re, im = tab.pair.real, tab.pair.imag
        self.spectrum = tensor(np.array([[tab.real, 0, 0], [0, re, im], [0, -im, re]]))  # T⁻¹ A⁻¹ T
        self.A_inverse, self.e = tensor(np.linalg.inv(tab.A)), tensor(tab.e)
        self.P = torch.tensor(tab.P, dtype=torch.float64, device=p.y0.device)
        self.C1 = np.append(tab.C, 0.0)  # the stages, then the start
        self.linear = Linear(p, stats)
        self.frozen = Frozen(self.linear, [tab.real, tab.pair.conjugate()])
        self.max_iters = p.options.max_iters or _MAX_ITERS
        self.tol = newton_tolerance(p)
        self.f0 = p.f0
        self.last: RadauStep | None = None  # the last accepted step: predicts the stages of the next
        self.tried: RadauStep | None = None
        self.size_old, self.err_old = math.nan, math.nan
        self.rejected = False

    def attempt(self, interval: Interval, y: Tensor) -> Attempt:
        *t, t0 = stage_times(interval, self.C1, y)
        if interval.after_jump:
            self.f0, self.last = None, None
            self.frozen.forget()
        if self.f0 is None:
            self.f0 = self.p.f(t0, y)
        dt = interval.t1 - interval.t0
        size = y.abs()
        scale = size * self.p.rtol + self.p.atol
        W0 = self.predict(interval, y)

        def iterate(systems: list[System]) -> Converged:
            return newton(
                W0,
                lambda W: self.change(W, t, y, dt, systems),
                lambda dW: self.norm(dW / scale),
                tol=self.tol,
                max_iters=self.max_iters,
                eta=self.frozen.eta,
                stats=self.stats,
            )

        done = self.frozen.converge(t0, y, dt, iterate)
        if done.why:
            return Attempt(None, math.inf, done.why)
        self.done = done
        Z = self.T @ done.x
        self.tried = RadauStep(self.P, interval, y, y + Z[2], Z)
        return Attempt(self.tried, self.error(self.tried, t0, dt, size))

    def norm(self, stages: Tensor) -> float:
        """Of (3, n): that of the stages' root mean square."""
        if self.p.norm is rms_norm:  # of all elements
            return rms_norm(stages)
        return self.p.norm(stages.square().mean(0).sqrt())

    def predict(self, interval: Interval, y: Tensor) -> Tensor:
        """Transformed stages of the last step's collocation polynomial, extended (HW (IV.8.5)): (3, n)."""
        if self.last is None:
            return y.new_zeros(3, y.numel())
        before, dt = self.last.interval, interval.t1 - interval.t0
        theta = (interval.t0 - before.t0 + self.tab.C * dt) / (before.t1 - before.t0)
        weights = np.stack([theta, theta**2, theta**3], 1) @ self.tab.P.T
        weights[:, 2] -= 1  # from the end of that step on, where its last stage is
        return self.T_inverse @ (torch.from_numpy(weights).to(y, non_blocking=True) @ self.last.Z)

    def change(self, W: Tensor, t: list[Tensor], y: Tensor, dt: float, systems: list[System]) -> Tensor:
        """Newton's correction in the transformed variables W = T⁻¹ Z, which falls apart into a real and a complex
        system (HW (IV.8.4))."""
        F = torch.stack([self.p.f(ti, Y) for ti, Y in zip(t, (y + self.T @ W).unbind())])
        rhs = torch.addmm(self.T_inverse @ F, self.spectrum, self.linear.times_mass(W), alpha=-1 / dt)
        real, pair = systems
        first = real.solve(rhs[0])
        rest = pair.solve(torch.complex(rhs[1], rhs[2]))
        return torch.stack([first, rest.real, rest.imag])

    def error(self, step: RadauStep, t0: Tensor, dt: float, size: Tensor) -> float:
        """HW (IV.8.19), and (8.20) after a rejected or at the first step."""
        assert self.f0 is not None
        scale = torch.maximum(size, step.y1.abs()) * self.p.rtol + self.p.atol
        combined = self.linear.times_mass(torch.mv(step.Z.T, self.e)) / dt
        real = self.frozen.systems[0]
        estimate = real.solve(self.f0 + combined)
        err = self.p.norm(estimate / scale)
        if err > 1 and (self.rejected or self.last is None):
            estimate = real.solve(self.p.f(t0, step.y + estimate) + combined)
            err = self.p.norm(estimate / scale)
        return err

    def accept(self, err: float, size: float) -> float:
        o = self.p.options
        assert self.tried is not None
        factor = self.predicted(err, size) * damped(self.done.iterations, self.max_iters, o.safety)
        factor = min(o.ifactor, max(o.dfactor, factor))
        self.frozen.judge(self.done)
        self.size_old, self.err_old, self.rejected = size, max(err, 1e-10), False
        self.last = self.tried
        self.f0 = None
        return 1.0 if self.frozen.J is not None and 1 <= factor < _KEEP else factor

    def reject(self, err: float, size: float) -> float:
        self.rejected = True
        if not math.isfinite(err):
            return 0.5
        o = self.p.options
        factor = self.predicted(err, size) * damped(self.done.iterations, self.max_iters, o.safety)
        return min(0.9, max(o.dfactor, factor))

    def predicted(self, err: float, size: float) -> float:
        """Gustafsson's predictive controller (HW (IV.8.25))."""
        err = max(err, 1e-10)
        k = 1 / (self.tab.error_order + 1)
        factor = err**-k
        if math.isfinite(self.err_old):
            factor *= min(1.0, size / self.size_old * (self.err_old / err) ** k)
        return factor

    def again(self, interval: Interval, y: Tensor, data: Tensor, polish: int = POLISH_RECORDED) -> RadauStep:
        """The step under autograd, from its converged stages `data` (3, n): Newton's iteration on the slopes K, with
        the Jacobian at each stage."""
        p, A, M = self.p, self.A, self.linear.times_mass
        *t, _ = stage_times(interval, self.C1, y)
        size = interval.t1 - interval.t0
        dt = interval.dt.to(y) if isinstance(interval.dt, Tensor) else interval.dt
        scale = p.atol + p.rtol * y.detach().abs()

        def linearise(K: Tensor) -> tuple[System, Tensor]:
            stages = [self.linear.jacobian(ti, Y) for ti, Y in zip(t, y + size * (A @ K))]
            system = self.coupled(stages, size)
            F = torch.stack([p.f(ti, J.y) if J.f is None else J.f for ti, J in zip(t, stages)])
            return system, self.unblocked(system.solve(self.blocked(F - M(K))))

        with torch.no_grad():
            K = self.A_inverse @ data / size
            K, system = settled(K, linearise, lambda dK: self.norm(size * (A @ dK) / scale), self.tol)
        for _ in range(polish):
            F = torch.stack([p.f(ti, Y) for ti, Y in zip(t, y + dt * (A @ K))])
            K = K + self.unblocked(system.solve(self.blocked(F - M(K))))
        Z = dt * (A @ K)
        return RadauStep(self.P, interval, y, y + Z[-1], Z)

    def blocked(self, K: Tensor) -> Tensor:
        """(3, B d) -> (B 3 d,): the stages of one system together."""
        return K.reshape(3, self.linear.B, self.linear.d).transpose(0, 1).reshape(-1)

    def unblocked(self, v: Tensor) -> Tensor:
        return v.reshape(self.linear.B, 3, self.linear.d).transpose(0, 1).reshape(3, -1)

    def coupled(self, jacobians: list[Jacobian], dt: float) -> System:
        """The system of all stages, `M x 1 - dt A x J` with a Jacobian for each stage."""
        B, d, A = self.linear.B, self.linear.d, self.A
        if jacobians[0].blocks is None:

            def apply(v: Tensor) -> Tensor:
                K = self.unblocked(v)
                J = torch.stack([self.linear.product(Ji, x) for Ji, x in zip(jacobians, dt * (A @ K))])
                return self.blocked(self.linear.times_mass(K) - J)

            def apply_transposed(v: Tensor) -> Tensor:
                K = self.unblocked(v)
                J = torch.stack([self.linear.product_transposed(Ji, x) for Ji, x in zip(jacobians, K)])
                return self.blocked(self.linear.times_mass_transposed(K) - dt * (A.T @ J))

            return self.linear.krylov(apply, apply_transposed)
        blocks = torch.stack([J.blocks for J in jacobians if J.blocks is not None], 1)  # (B, 3, d, d)
        W = torch.einsum("ij,biac->biajc", A, blocks).mul_(-dt)
        mass = torch.eye(d, dtype=W.dtype, device=W.device) if self.linear.mass is None else self.linear.mass
        W.diagonal(dim1=1, dim2=3).add_(mass[None, :, :, None])
        return self.linear.made(W.reshape(B, 3 * d, 3 * d))


class RadauStep:
    """A step and its stages less y, Z (3, n); the collocation polynomial goes through them."""

    def __init__(self, P: Tensor, interval: Interval, y: Tensor, y1: Tensor, Z: Tensor) -> None:
        self.P, self.interval, self.y, self.y1, self.Z = P, interval, y, y1, Z

    @property
    def data(self) -> Tensor:
        return self.Z.detach()

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        theta = fraction(self.interval, times)
        weights = interpolation.powers(theta, 3) @ self.P.T.to(theta)
        return self.y + weights.to(self.y, non_blocking=True) @ self.Z
