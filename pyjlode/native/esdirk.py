"""Diagonally implicit Runge-Kutta steps with an explicit first stage and error control (HW IV.6, IV.8)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..methods.stiff import EsdirkTableau
from ..numbers import kept
from ..problem import ODEProblem
from ..solution import Stats
from . import controller, interpolation
from .linear import Linear, System
from .newton import POLISH_RECORDED, Converged, Frozen, damped, newton, newton_tolerance, settled
from .step import Interval, fraction, stage_times
from .stiffness import Attempt

_MAX_ITERS = 7
_END = np.ones(1)
_KEEP = 1.2  # a step that could grow by less keeps its size, and with it its factors (HW IV.8)


class Coefficients:
    """rows[i], (i,): A before the diagonal, and those of the explicit method beside it; B, E (s,); P (s, q) float64."""

    def __init__(self, tab: EsdirkTableau, dtype: torch.dtype, device: torch.device) -> None:
        def tensor(x: np.ndarray) -> Tensor:
            return torch.tensor(x, dtype=dtype, device=device)

        self.rows = [tensor(tab.A[i, :i]) for i in range(tab.stages)]
        self.explicit = [] if tab.explicit is None else [tensor(tab.explicit[i, :i]) for i in range(tab.stages)]
        self.B, self.E = tensor(tab.B), tensor(tab.E)
        self.P = torch.tensor(tab.P, dtype=torch.float64, device=device)


coefficients = kept(maxsize=16)(Coefficients)


class Stages(NamedTuple):
    """What a step needs to be taken again.

    Attributes:
        start: (n,), the slope that the step before left, K[0]; None where it is f at the start. The two differ by what
            Newton's iteration left of the last stage, times the stiffness.
        K: (s, n), the accepted slopes.
    """

    start: Tensor | None
    K: Tensor


class Esdirk:
    """Makes the steps of one ESDIRK method for one problem."""

    def __init__(self, p: ODEProblem, stats: Stats, tab: EsdirkTableau) -> None:
        self.p, self.stats, self.tab = p, stats, tab
        self.c = coefficients(tab, p.y0.dtype, p.y0.device)
        self.smoothed = tab.smoothed
        # The part that is solved implicitly, and the rest, if f is split.
        self.f, self.rest = p.f, None if p.split is None else p.split[1]
        if p.split is not None:
            self.f = p.split[0]
        self.linear = Linear(replace(p, f=self.f), stats)
        self.frozen = Frozen(self.linear, [1 / tab.gamma])
        self.max_iters = p.options.max_iters or _MAX_ITERS
        self.tol = newton_tolerance(p)
        self.f0 = p.f0
        self.f1: Tensor | None = None
        self.carried = False  # f0 is the slope that the step before left
        self.previous = 1.0
        self.order = tab.error_order + 1

    def attempt(self, interval: Interval, y: Tensor) -> Attempt:
        t = stage_times(interval, self.tab.C, y)
        if interval.after_jump or self.f0 is None or self.rest:
            self.f0, self.carried = self.f(t[0], y), False
        if interval.after_jump:
            self.frozen.forget()
        dt = interval.t1 - interval.t0
        self.done = self.frozen.converge(t[0], y, dt, lambda systems: self.stages(systems[0], dt, t, y))
        if self.done.why:
            return Attempt(None, math.inf, self.done.why)
        K, others = self.done.x
        self.f1 = K[-1]
        data = Stages(K[0] if self.carried else None, K)
        K = K if others is None else K + others
        step = EsdirkStep(self, interval, y, torch.addmv(y, K.T, self.c.B, alpha=dt), K, data)
        return Attempt(step, self.error(step, dt))

    def stages(self, W: System, dt: float, t: tuple[Tensor, ...], y: Tensor) -> Converged:
        """The slopes (s, n), those of the explicit part, and how the slowest stage converged."""
        p, g, f, rest = self.p, self.tab.gamma, self.f, self.rest
        scale = p.atol + p.rtol * y.abs()
        K: Any = [None] * self.tab.stages if p.transformed else y.new_empty(self.tab.stages, y.numel())
        assert self.f0 is not None
        K[0], slowest, eta = self.f0, 0, self.frozen.eta
        others = [rest(t[0], y)] if rest else []
        for i in range(1, self.tab.stages):
            before = torch.stack(K[:i]) if p.transformed else K[:i]
            base = torch.addmv(y, before.T, self.c.rows[i], alpha=dt)
            if rest:
                base = torch.addmv(base, torch.stack(others, 1), self.c.explicit[i], alpha=dt)

            def change(z: Tensor, t: Tensor = t[i], base: Tensor = base) -> Tensor:
                return W.solve(f(t, base + z) - z / (g * dt))

            done = newton(
                K[i - 1] * (g * dt),
                change,
                lambda dz: p.norm(dz / scale),
                tol=self.tol,
                max_iters=self.max_iters,
                eta=eta,
                stats=self.stats,
            )
            if done.why:
                return done
            K[i], eta = done.x / (g * dt), done.eta
            if rest:
                others.append(rest(t[i], base + done.x))
            if done.iterations > slowest:
                slowest, rate = done.iterations, done.rate
        slopes = torch.stack(K) if p.transformed else K
        return Converged((slopes, torch.stack(others) if rest else None), slowest, rate, eta)

    def error(self, step: EsdirkStep, dt: float) -> float:
        """The estimate; where it needs it, damped in the stiff components by the iteration matrix (Hosea & Shampine
        1996)."""
        scale = self.p.atol + self.p.rtol * torch.maximum(step.y.abs(), step.y1.abs())
        estimate = torch.mv(step.K.T, self.c.E)
        if self.smoothed:
            (W,) = self.frozen.factors(dt)
            return self.p.norm(W.solve(estimate.div_(self.tab.gamma)) / scale)
        return abs(dt) * self.p.norm(estimate / scale)

    def accept(self, err: float, size: float) -> float:
        o = self.p.options
        safety = damped(self.done.iterations, self.max_iters, 1.0)
        factor = safety * controller.next_factor(err, self.previous, True, self.order, self.p.method.pi, o)
        self.previous, self.f0, self.carried = max(err, 1e-4), self.f1, True
        self.frozen.judge(self.done)
        return 1.0 if self.frozen.J is not None and 1 <= factor < _KEEP else factor

    def reject(self, err: float, size: float) -> float:
        return controller.next_factor(err, self.previous, False, self.order, self.p.method.pi, self.p.options)

    def again(self, interval: Interval, y: Tensor, data: Stages, polish: int = POLISH_RECORDED) -> EsdirkStep:
        """The step under autograd, from the slope at its start and its accepted slopes."""
        p, g = self.p, self.tab.gamma
        t = stage_times(interval, self.tab.C, y)
        dt = interval.dt.to(y) if isinstance(interval.dt, Tensor) else interval.dt
        size = interval.t1 - interval.t0
        scale = p.atol + p.rtol * y.detach().abs()
        f, rest = self.f, self.rest
        K = [f(t[0], y) if data.start is None else data.start]
        others = [rest(t[0], y)] if rest else []
        for i in range(1, self.tab.stages):
            base = y + dt * (torch.stack(K).T @ self.c.rows[i])
            if rest:
                base = base + dt * (torch.stack(others).T @ self.c.explicit[i])

            def linearise(k: Tensor, t: Tensor = t[i], base: Tensor = base) -> tuple[System, Tensor]:
                Y = base + size * g * k
                J = self.linear.jacobian(t, Y)
                W = self.linear.system(J, 1 / (g * size))
                return W, W.solve((f(t, Y) if J.f is None else J.f) - k) / (g * size)

            with torch.no_grad():
                k, W = settled(data.K[i], linearise, lambda dk: p.norm(dk * (g * size) / scale), self.tol)
            for _ in range(polish):
                k = k + W.solve(f(t[i], base + dt * g * k) - k) / (g * dt)
            K.append(k)
            if rest:
                others.append(rest(t[i], base + dt * g * k))
        self.f0 = K[-1].detach()  # a recorded solve goes on from the polished slopes
        stacked = torch.stack(K) + torch.stack(others) if rest else torch.stack(K)
        return EsdirkStep(self, interval, y, y + dt * (stacked.T @ self.c.B), stacked, data)


class EsdirkStep:
    """A step and its slopes K, (s, n)."""

    def __init__(self, rk: Esdirk, interval: Interval, y: Tensor, y1: Tensor, K: Tensor, data: Stages) -> None:
        self.rk, self.interval, self.y, self.y1, self.K, self.data = rk, interval, y, y1, K, data
        self.left = K[-1]
        self.f1: Tensor | None = None

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        theta, P = fraction(self.interval, times), self.rk.c.P
        if self.rk.rest:  # the weights are those of the implicit method alone
            if self.f1 is None:
                (t1,) = stage_times(self.interval, _END, self.y)
                self.f1 = self.rk.p.f(t1, self.y1)
            return interpolation.hermite(theta, self.interval.dt, self.y, self.y1, self.K[0], self.f1)
        weights = interpolation.powers(theta, P.shape[1]) @ P.T.to(theta) * self.interval.dt
        return self.y + weights.to(self.y, non_blocking=True) @ self.K
