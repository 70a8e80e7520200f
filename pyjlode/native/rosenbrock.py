"""Rosenbrock steps: one Jacobian and one factorisation a step, and no iteration (HW IV.7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..derivatives import REFUSALS, directional
from ..methods.stiff import RosenbrockTableau
from ..numbers import as_like, kept
from ..problem import ODEProblem
from ..solution import Stats
from . import controller, interpolation
from .linear import Jacobian, Linear, System
from .newton import POLISH_RECORDED, SINGULAR
from .step import Interval, fraction, stage_times
from .stiffness import Attempt

Solve = Callable[[Tensor, Any], Tensor]

# Up to this size of a system its recorded Jacobian costs less than a recorded product with it in each stage.
_RECORDED = 32


class Coefficients:
    """A tableau as tensors of one dtype on one device: rows[i] (i,) of A and of C; m, E (s,); P (s, q) float64."""

    def __init__(self, tab: RosenbrockTableau, dtype: torch.dtype, device: torch.device) -> None:
        def tensor(x: np.ndarray) -> Tensor:
            return torch.tensor(x, dtype=dtype, device=device)

        self.A = [tensor(tab.A[i, :i]) for i in range(tab.stages)]
        self.C = [tensor(tab.C[i, :i]) for i in range(tab.stages)]
        self.m, self.E = tensor(tab.m), tensor(tab.E)
        self.P = torch.tensor(tab.P, dtype=torch.float64, device=device)
        # Where the last stage lies at y1 its slope is the first of the next step.
        self.fsal = bool(np.array_equal(tab.A[-1], tab.m))


coefficients = kept(maxsize=16)(Coefficients)


class Rosenbrock:
    """Makes the steps of one Rosenbrock method for one problem."""

    def __init__(self, p: ODEProblem, stats: Stats, tab: RosenbrockTableau) -> None:
        self.p, self.tab = p, tab
        self.c = coefficients(tab, p.y0.dtype, p.y0.device)
        self.linear = Linear(p, stats)
        self.f0 = p.f0  # f at the start of the next step, where it is known
        self.J: Jacobian | None = None  # the same of the Jacobian
        self.f1: Tensor | None = None
        self.previous = 1.0
        self.order = tab.error_order + 1

    def attempt(self, interval: Interval, y: Tensor) -> Attempt:
        t = stage_times(interval, self.tab.alpha, y)
        if interval.after_jump or self.f0 is None:
            self.f0 = self.p.f(t[0], y)
        if interval.after_jump or self.J is None:
            self.linear.reach = abs(interval.t1 - interval.t0)
            self.J = self.linear.jacobian(t[0], y, rate=True)
        W = self.linear.system(self.J, 1 / (self.tab.gamma * (interval.t1 - interval.t0)))
        if not W.ok:
            return Attempt(None, math.inf, SINGULAR)
        step = self.step(interval, t, y, W)
        return Attempt(step, self.error(step))

    def step(self, interval: Interval, t: tuple[Tensor, ...], y: Tensor, W: System) -> RosenbrockStep:
        f, A, C, J, f0 = self.p.f, self.c.A, self.c.C, self.J, self.f0
        assert J is not None
        assert J.rate is not None
        assert f0 is not None
        dt = interval.t1 - interval.t0
        U: Any = [None] * self.tab.stages if self.p.transformed else y.new_empty(self.tab.stages, y.numel())
        columns = None if self.p.transformed else U.T
        U[0] = W.solve(torch.add(f0, J.rate, alpha=self.tab.gammas[0] * dt))
        for i in range(1, self.tab.stages):
            before = torch.stack(U[:i], 1) if columns is None else columns[:, :i]
            k = f(t[i], torch.addmv(y, before, A[i]))
            rhs = torch.add(k, self.linear.times_mass(torch.mv(before, C[i])), alpha=1 / dt)
            if self.tab.gammas[i]:
                rhs = torch.add(rhs, J.rate, alpha=self.tab.gammas[i] * dt)
            U[i] = W.solve(rhs)
        self.f1 = k if self.c.fsal else None
        if columns is None:
            U = torch.stack(U)
            columns = U.T
        return RosenbrockStep(self, interval, y, torch.addmv(y, columns, self.c.m), U)

    def error(self, step: RosenbrockStep) -> float:
        scale = self.p.atol + self.p.rtol * torch.maximum(step.y.abs(), step.y1.abs())
        return self.p.norm(torch.mv(step.U.T, self.c.E) / scale)

    def accept(self, err: float, size: float) -> float:
        factor = controller.next_factor(err, self.previous, True, self.order, self.p.method.pi, self.p.options)
        self.previous = max(err, 1e-4)
        self.f0, self.J = self.f1, None
        return factor

    def reject(self, err: float, size: float) -> float:
        return controller.next_factor(err, self.previous, False, self.order, self.p.method.pi, self.p.options)

    def again(self, interval: Interval, y: Tensor, data: Any = (), polish: int = POLISH_RECORDED) -> RosenbrockStep:
        """The step under autograd."""
        tab, c = self.tab, self.c
        t = stage_times(interval, tab.alpha, y)
        dt = interval.dt.to(y) if isinstance(interval.dt, Tensor) else interval.dt
        self.linear.reach = abs(interval.t1 - interval.t0)
        solve = self.recorded_system(t[0], y, dt) or self.polished_system(t[0], y, dt, interval, polish)
        U: list[Tensor] = []
        for i in range(tab.stages):
            Y, carry = y, torch.zeros_like(y)
            if i:
                stacked = torch.stack(U).T
                Y, carry = y + stacked @ c.A[i], self.linear.times_mass(stacked @ c.C[i]) / dt
            k = self.p.f(t[i], Y)
            U.append(solve(k + carry, tab.gammas[i] * dt))
        # A recorded solve goes on from this step, not from the attempt at it: what rounding makes of the difference
        # between a state and the slope of another grows from step to step.
        self.f0 = k.detach() if c.fsal else None
        stacked = torch.stack(U)
        return RosenbrockStep(self, interval, y, y + stacked.T @ c.m, stacked)

    def recorded_system(self, t: Tensor, y: Tensor, dt: float | Tensor) -> Solve | None:
        """(rhs, weight of df/dt) -> u with a Jacobian that has a graph: for small systems."""
        linear = self.linear
        if linear.d > _RECORDED or linear.difference or linear.blind_to_time or self.p.jac is not None:
            return None
        try:
            _, J, rate = linear.reverse_columns(t, y, True)
        except REFUSALS:
            return None
        mass = torch.eye(linear.d, dtype=y.dtype, device=y.device) if linear.mass is None else linear.mass
        W = linear.made(mass * (1 / (self.tab.gamma * dt)) - J)
        return lambda rhs, along: W.solve(rhs + rate * along)

    def polished_system(self, t: Tensor, y: Tensor, dt: float | Tensor, interval: Interval, polish: int) -> Solve:
        """The same with products alone. A stage solves a linear system whose matrix depends on y: what it lacks to
        solve the recorded system is nothing, but has the derivative that the solution has."""
        p, linear = self.p, self.linear
        J = linear.jacobian(t, y, rate=True)
        W = linear.system(J, 1 / (self.tab.gamma * (interval.t1 - interval.t0)))

        def solve(rhs: Tensor, along: float | Tensor) -> Tensor:
            assert J.rate is not None
            if linear.difference:  # autograd has no products with this J, which is a constant to it
                return W.solve(rhs + J.rate * along)
            with torch.no_grad():
                u = W.solve(rhs + J.rate * along)
            for _ in range(polish):
                if linear.blind_to_time:
                    product = directional(p, t, y, None, u) + J.rate * along
                else:
                    product = directional(p, t, y, as_like(along, t), u)
                u = u + W.solve(rhs + product - linear.times_mass(u) / (self.tab.gamma * dt))
            return u

        return solve


class RosenbrockStep:
    """A step and its stages U, (s, n)."""

    data = ()  # the step can be taken again from y alone

    def __init__(self, rk: Rosenbrock, interval: Interval, y: Tensor, y1: Tensor, U: Tensor) -> None:
        self.rk, self.interval, self.y, self.y1, self.U = rk, interval, y, y1, U

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        P = self.rk.c.P
        theta = fraction(self.interval, times)
        weights = (interpolation.powers(theta, P.shape[1]) @ P.T.to(theta)).to(self.y, non_blocking=True)
        return self.y + weights.to(self.U) @ self.U
