"""Simplified Newton iteration, and the Jacobian and factors that are kept while they serve (HW IV.8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import ODEProblem
from ..solution import Stats
from .linear import Jacobian, Linear, System

# In a recorded solve the stages are reached by iterations that autograd does not see, then polished by this many exact
# Newton steps that it does: each makes one more order of derivative exact (the implicit function theorem is the first).
POLISH_RECORDED = 2
POLISH_REPLAY = 1

# Above this rate of convergence the Jacobian is renewed for the next step (HW (IV.8.12)).
_SLOW = 1e-3
# A step so many times longer than the one that a Jacobian was made for gets a new one. What an old one is wrong by
# counts in proportion to dt, and no rate of convergence tells: where it makes a slow component a fast one, Newton's
# corrections of that are next to nothing, and look converged. So it is after a transient, when steps grow fast.
_GROWN = 4.0
# Steps whose sizes differ by rounding share their factors.
_SAME = 1e-9


class Converged(NamedTuple):
    """What an iteration came to: `why` is empty where it converged."""

    x: Any
    iterations: int
    rate: float
    eta: float
    why: str = ""


SINGULAR = "the iteration matrix is singular"


def newton_tolerance(p: ODEProblem) -> float:
    """How far below the tolerance of the step its equations are solved (HW IV.8; Shampine & Reichelt 1997)."""
    eps = torch.finfo(p.y0.dtype).eps
    rtol = p.rtol.min().item() if isinstance(p.rtol, Tensor) and p.rtol.numel() else float(p.rtol)
    rtol = max(rtol, 100 * eps)
    return max(10 * eps / rtol, min(0.03, rtol**0.5))


def newton(
    x: Tensor,
    change: Callable[[Tensor], Tensor],
    size: Callable[[Tensor], float],
    *,
    tol: float,
    max_iters: int,
    eta: float,
    stats: Stats,
    solved: Callable[[Tensor], bool] = lambda x: False,
) -> Converged:
    """x with change(x) = 0, by x += change(x) (HW IV.8, (8.8)-(8.11)).

    Args:
        change: the Newton correction at x.
        size: norm of a correction, in units of the step's tolerance.
        eta: rate / (1 - rate) of the last iteration with these factors, by which one correction may be found enough;
            1 where there was none, and then one is never enough: a wrong Jacobian makes small corrections too.
        solved: whether the equations hold at x to rounding. There corrections need not become smaller.
    """
    last, rate = math.nan, math.nan
    known = eta < 1
    eta = max(eta, torch.finfo(x.dtype).eps) ** 0.8
    for k in range(max_iters):
        dx = change(x)
        stats.nnewton += 1
        length = size(dx)
        if not math.isfinite(length):
            return Converged(x, k + 1, rate, 1.0, "f is NaN or infinite there, or the iteration matrix is singular")
        if k:
            rate = length / last if last else 0.0
            if rate >= 1:
                if solved(x):
                    return Converged(x, k + 1, math.nan, eta)
                return Converged(x, k + 1, rate, 1.0, "Newton's iteration diverges")
            eta = rate / (1 - rate)
            if rate ** (max_iters - k - 1) * eta * length > tol:
                return Converged(x, k + 1, rate, 1.0, f"{max_iters} Newton iterations are not enough")
        x = x + dx
        if length == 0 or ((k or known) and eta * length <= tol):
            return Converged(x, k + 1, rate, eta)
        last = length
    return Converged(x, max_iters, rate, 1.0, f"{max_iters} Newton iterations are not enough")


_REFINED = 4


def settled(
    x: Tensor, linearise: Callable[[Tensor], tuple[System, Tensor]], size: Callable[[Tensor], float], tol: float
) -> tuple[Tensor, System]:
    """The solution near an accepted x, by exact Newton steps, and the system of the last: where a step is linearised.

    A gradient asks for more than the step did. What is stiff multiplies what the accepted numbers lack to solve the
    step's equations; one exact correction squares that, as a rule, and it costs nothing beside the Jacobian.

    Args:
        linearise: x -> the system there, and the correction.
        size: norm of a correction, in units of the step's tolerance.
        tol: a correction up to this is the last one.
    """
    for _ in range(_REFINED):
        system, dx = linearise(x)
        length = size(dx)
        if not math.isfinite(length):
            break
        x = x + dx
        if length <= tol:
            break
    return x, system


class Frozen:
    """A Jacobian, and the factors of `shift / dt M - J` made of it, kept over steps.

    Args:
        shifts: one system for each.
    """

    def __init__(self, linear: Linear, shifts: Sequence[float | complex]) -> None:
        self.linear, self.shifts = linear, shifts
        self.J: Jacobian | None = None
        self.current = False  # J is that of this step
        self.made_for = math.nan  # dt, of J
        self.dt = math.nan  # that the factors belong to
        self.systems: list[System] = []
        self.eta = 1.0

    def forget(self) -> None:
        self.J, self.current = None, False

    def renew(self, t: Tensor, y: Tensor, dt: float) -> None:
        self.J, self.current, self.made_for = self.linear.jacobian(t, y), True, dt
        self.dt = math.nan

    def factors(self, dt: float) -> list[System]:
        """Factors of `shift / dt M - J`; those of the last step where dt is the same."""
        assert self.J is not None
        if not abs(dt - self.dt) <= _SAME * abs(dt):
            self.systems = [self.linear.system(self.J, shift / dt, iterated=True) for shift in self.shifts]
            # The rate at another step size says nothing of this one, where an old Jacobian may be far off.
            self.dt, self.eta = dt, 1.0
        return self.systems

    def converge(self, t: Tensor, y: Tensor, dt: float, iterate: Callable[[list[System]], Converged]) -> Converged:
        """What `iterate` comes to with the kept Jacobian; where that fails, with one of (t, y)."""
        while True:
            if self.J is None or abs(dt) > _GROWN * abs(self.made_for):
                self.renew(t, y, dt)
            systems = self.factors(dt)
            ok = all(system.ok for system in systems)
            done = iterate(systems) if ok else Converged(None, 0, math.nan, 1.0, SINGULAR)
            self.eta = done.eta
            if not done.why:
                return done
            if self.current:  # a shorter step gets a Jacobian of its own, if it fails with this one
                self.current = False
                return done
            self.forget()

    def judge(self, done: Converged) -> None:
        """After an accepted step: is the Jacobian good for one more?"""
        self.current = False
        if done.iterations > 2 and done.rate > _SLOW:
            self.J = None


def damped(iterations: int, max_iters: int, safety: float) -> float:
    """The safety factor, lower where Newton's iteration was slow (HW (IV.8.21))."""
    return safety * (2 * max_iters + 1) / (2 * max_iters + iterations)
