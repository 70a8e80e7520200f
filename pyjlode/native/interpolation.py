"""Dense output: polynomials within a step, and their union over a solve."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numbers import listed
from ..problem import ODEProblem
from .step import Step, fraction


def linear(theta: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
    """Straight line: theta (M,), states (n,) -> (M, n)."""
    theta = theta.to(y0, non_blocking=True)[:, None]
    return y0 + theta * (y1 - y0)


def hermite(theta: Tensor, dt: float | Tensor, y0: Tensor, y1: Tensor, f0: Tensor, f1: Tensor) -> Tensor:
    """Cubic Hermite (Hairer, Nørsett & Wanner II.6.7): theta (M,), states and slopes (n,) -> (M, n)."""
    x = theta[:, None]
    rise = (x * x * (3 - 2 * x)).to(y0, non_blocking=True)
    slope0 = (x * (1 - x) ** 2 * dt).to(y0, non_blocking=True)
    slope1 = (x * x * (x - 1) * dt).to(y0, non_blocking=True)
    return y0 + rise * (y1 - y0) + slope0 * f0 + slope1 * f1


def powers(theta: Tensor, degree: int) -> Tensor:
    """theta (M,) -> (M, degree): theta, theta**2, ..."""
    return theta[:, None].expand(-1, degree).cumprod(1)


def output(p: ODEProblem, step: Step, times: list[float] | Tensor) -> Tensor:
    """States at M times within a step, as `interp` has them between the points of a fixed grid: (M, n)."""
    if not p.method.adaptive and p.options.interp == "linear":
        return linear(fraction(step.interval, times), step.y, step.y1)
    return step.interpolate(times)


class DenseOutput:
    """The solution as a function of time: the steps of a solve, each with its polynomial.

    Args:
        steps: accepted steps in the order in which they were made.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.sign = 1.0 if steps[0].interval.t1 >= steps[0].interval.t0 else -1.0
        self.ends = [self.sign * step.interval.t1 for step in steps]

    @property
    def span(self) -> tuple[float, float]:
        """First and last time, in the order of integration."""
        return self.steps[0].interval.t0, self.steps[-1].interval.t1

    def at(self, t: float) -> Tensor:
        """State at one time: shape (n,)."""
        return self.step(t).interpolate([t])[0]

    def step(self, t: float) -> Step:
        """The step that covers `t` (the first or last one for times at, or a rounding beyond, the ends)."""
        return self.steps[min(bisect.bisect_left(self.ends, self.sign * t), len(self.steps) - 1)]

    def __call__(self, times: Tensor) -> Tensor:
        """States at `times` of shape (M,): shape (M, n). Differentiable in `times` and, in a recorded solve, in all."""
        if times.numel() == 0:
            return self.steps[0].y.new_zeros(0, self.steps[0].y.numel())
        owner = [self.step(t) for t in listed(times)]
        rows: list[Tensor] = []
        i = 0
        while i < len(owner):  # runs of times in the same step share one matrix product
            j = i + 1
            while j < len(owner) and owner[j] is owner[i]:
                j += 1
            rows.append(owner[i].interpolate(times[i:j]))
            i = j
        return torch.cat(rows)
