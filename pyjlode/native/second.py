"""Steps of the methods for systems of second order, whose flat state is (q, v), each of half its length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadOption
from ..methods.second import NystromTableau, SymplecticTableau
from ..numbers import anywhere
from ..problem import ODEProblem
from . import interpolation
from .step import Interval, fraction, stage_times


class Second:
    """Makes the steps of one method for one problem."""

    def __init__(self, p: ODEProblem, *, recorded: bool = False) -> None:
        self.p, self.recorded = p, recorded or p.transformed
        self.n = p.y0.numel() // 2
        tab = p.method.tableau
        assert isinstance(tab, (SymplecticTableau, NystromTableau))
        self.kicked = isinstance(tab, SymplecticTableau)
        self.wants_second_order = not isinstance(tab, SymplecticTableau) or tab.quadratic
        if isinstance(tab, SymplecticTableau):
            self.kicks, self.drifts = tab.kicks.tolist(), tab.drifts.tolist()
            # A field that depends on time is one of (q, t) for the kicks, and of (v, t) for the drifts.
            ahead = np.cumsum(tab.drifts) - tab.drifts, np.cumsum(tab.kicks)
            self.C = np.concatenate(ahead)
            self.reuses = tab.kicks[0] != 0 and tab.drifts[-1] == 0
        else:
            self.tab, self.C, self.reuses = tab, tab.C, False

    def check(self) -> None:
        """
        Raises:
            BadOption: the field is not of the form that the method is for.
        """
        p, n, name = self.p, self.n, self.p.method.name
        if self.wants_second_order and not p.second_order:
            raise BadOption(
                f"{name} has its order for q'' = a(t, q, v) only, and is told so by f=pyjlode.SecondOrder(a); for "
                "another f over (q, v) use 'yoshida4', or a method for systems of first order."
            )
        if not self.kicked:
            return
        with torch.no_grad():
            t, y = p.start, p.y0.detach()
            f0 = p.f(t, y) if p.f0 is None else p.f0.detach()
            q, v = y[:n], y[n:]
            if _differ(f0[n:], p.f(t, torch.cat([q, _moved(v)]))[n:]):
                raise BadOption(
                    f"{name} needs a second part of f (the acceleration) that does not depend on v, and this one does: "
                    "explicit symplectic steps exist for separable systems only. Use method='nystrom4' with "
                    "SecondOrder(a), or one for systems of first order, such as 'gl4', which is symplectic for all."
                )
            if not p.second_order and _differ(f0[:n], p.f(t, torch.cat([_moved(q), v]))[:n]):
                raise BadOption(
                    f"{name} needs a first part of f (q') that does not depend on q, and this one does: explicit "
                    "symplectic steps exist for separable systems only. Use one for systems of first order, such as "
                    "'gl4', which is symplectic for all."
                )

    def size(self, interval: Interval) -> float | Tensor:
        """The length of a step, as a tensor only where its graph is wanted."""
        return interval.dt if self.recorded else interval.t1 - interval.t0

    def acceleration(self, t: Tensor, q: Tensor, v: Tensor) -> Tensor:
        """(n,) each."""
        return self.p.f(t, torch.cat([q, v]))[self.n :]

    def step(self, interval: Interval, y: Tensor, known: Tensor | None = None) -> SecondStep:
        """Take one step: shapes (2 n,).

        Args:
            known: the acceleration at its start, (n,), where the method asks for it and the step before knew it.
        """
        made = self.kicks_and_drifts if self.kicked else self.nystrom
        return made(interval, y, known)

    def kicks_and_drifts(self, interval: Interval, y: Tensor, known: Tensor | None) -> SecondStep:
        n, dt, s = self.n, self.size(interval), len(self.kicks)
        t = stage_times(interval, self.C, y)
        q, v = y[:n], y[n:]
        k = known if self.reuses and not interval.after_jump else None
        for i in range(s):
            if self.kicks[i]:
                k = self.acceleration(t[i], q, v) if i or k is None else k
                v = add(v, k, self.kicks[i], dt)
            if self.drifts[i]:
                rate = v if self.p.second_order else self.p.f(t[s + i], torch.cat([q, v]))[:n]
                q = add(q, rate, self.drifts[i], dt)
        return SecondStep(self, interval, y, torch.cat([q, v]), k if self.reuses else None)

    def nystrom(self, interval: Interval, y: Tensor, known: Tensor | None) -> SecondStep:
        n, dt, tab = self.n, self.size(interval), self.tab
        t = stage_times(interval, tab.C, y)
        q, v = y[:n], y[n:]
        K: list[Tensor] = []

        def along(weights: np.ndarray) -> Tensor:
            return sum((w * k for w, k in zip(weights.tolist(), K) if w), torch.zeros_like(v))

        for i, c in enumerate(tab.C.tolist()):
            rate = add(v, along(tab.A[i]), 1.0, dt) if not c else add(v, along(tab.A[i] / c), 1.0, dt)
            K.append(self.acceleration(t[i], add(q, rate, c, dt), add(v, along(tab.D[i]), 1.0, dt)))
        rate = add(v, along(tab.Bq), 1.0, dt)
        return SecondStep(self, interval, y, torch.cat([add(q, rate, 1.0, dt), add(v, along(tab.Bv), 1.0, dt)]))

    def backward(self, interval: Interval, y1: Tensor) -> Tensor:
        """The state that a symplectic step to y1 came from: its kicks and drifts undone, last one first."""
        n, dt = self.n, interval.t1 - interval.t0
        t = stage_times(interval, self.C, y1)
        q, v = y1[:n], y1[n:]
        for i in reversed(range(len(self.kicks))):
            if self.drifts[i]:
                rate = v if self.p.second_order else self.p.f(t[len(self.kicks) + i], torch.cat([q, v]))[:n]
                q = add(q, rate, -self.drifts[i], dt)
            if self.kicks[i]:
                v = add(v, self.acceleration(t[i], q, v), -self.kicks[i], dt)
        return torch.cat([q, v])


class SecondStep:
    """A step; the slopes at its ends are evaluated when dense output asks for them.

    Attributes:
        end: the acceleration at its end, (n,), where it is the next step's first.
    """

    def __init__(self, maker: Second, interval: Interval, y: Tensor, y1: Tensor, end: Tensor | None = None) -> None:
        self.maker, self.interval, self.y, self.y1, self.end = maker, interval, y, y1, end
        self.slopes: Any = None

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        if self.slopes is None:
            f, (t0, t1) = self.maker.p.f, stage_times(self.interval, np.array([0.0, 1.0]), self.y)
            self.slopes = f(t0, self.y), f(t1, self.y1)
        return interpolation.hermite(fraction(self.interval, times), self.interval.dt, self.y, self.y1, *self.slopes)


def add(x: Tensor, k: Tensor, weight: float, dt: float | Tensor) -> Tensor:
    """x + weight dt k, (n,)."""
    return x + (weight * dt).to(x) * k if isinstance(dt, Tensor) else torch.add(x, k, alpha=weight * dt)


def _moved(x: Tensor) -> Tensor:
    """Another x of about the same size: a function that gives the same there does not depend on it."""
    return torch.where(x == 0, x.abs().mean() + (x == 0).all().to(x), 1.37 * x) if x.numel() else x


def _differ(a: Tensor, b: Tensor) -> bool:
    same = (a - b).abs() <= 1e3 * torch.finfo(a.dtype).eps * a.abs().amax() if a.numel() else a == b
    return anywhere(torch.isfinite(a) & ~same)
