"""Reversible Runge-Kutta steps of fixed size (McCallum & Foster, Efficient, accurate and stable gradients for neural
ODEs, 2024, Sec. 3).

Beside the state y goes a second one, z, with z = y at the start. For the increment Ψ(h, t, y) of an explicit method,

    y1 = λ y + (1 - λ) z + Ψ(h, t, z)
    z1 = z - Ψ(-h, t + h, y1)

which is of the method's order, and whose inverse asks for the same increments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..methods.explicit import ExplicitTableau
from ..notices import warn_once
from ..problem import ODEProblem
from . import interpolation
from .step import Interval, fraction, stage_times

# λ. Below 1 it makes the two states meet again; undone, roundings grow by 1/λ a step.
COUPLING = 0.99
# The part of the state's size by which the two may part before a warning.
_APART = 0.1
_ENDS = np.array([0.0, 1.0])


class Other(NamedTuple):
    """What a step needs to be taken again: z at its start, (n,); None where it is y."""

    start: Tensor | None


class Reversible:
    """Makes the steps of one method for one problem."""

    def __init__(self, p: ODEProblem, *, recorded: bool = False) -> None:
        tab = p.method.tableau
        assert isinstance(tab, ExplicitTableau)
        self.p, self.tab, self.recorded = p, tab, recorded or p.transformed
        self.rows = [row.tolist() for row in (*tab.A, tab.B)]
        self.backwards = 1 - tab.C

    def step(self, interval: Interval, y: Tensor, data: Other) -> ReversibleStep:
        """Take one step: shapes (n,)."""
        dt = interval.dt if self.recorded else interval.t1 - interval.t0
        z = y if data.start is None else data.start
        base = y if data.start is None else COUPLING * y + (1 - COUPLING) * z
        y1 = base + self.increment(interval, z, dt)
        z1 = z + self.increment_back(interval, y1, dt)
        return ReversibleStep(self, interval, y, y1, z1, data)

    def backward(self, interval: Interval, y1: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
        """The states that a step to y1, z1 came from."""
        dt = interval.t1 - interval.t0
        z = z1 - self.increment_back(interval, y1, dt)
        return (y1 - (1 - COUPLING) * z - self.increment(interval, z, dt)) / COUPLING, z

    def increment(self, interval: Interval, y: Tensor, dt: float | Tensor) -> Tensor:
        """Ψ(h, t, y), (n,)."""
        return self.along(stage_times(interval, self.tab.C, y), y, dt)

    def increment_back(self, interval: Interval, y1: Tensor, dt: float | Tensor) -> Tensor:
        """-Ψ(-h, t + h, y1), (n,)."""
        return -self.along(stage_times(interval, self.backwards, y1), y1, -dt)

    def along(self, t: tuple[Tensor, ...], y: Tensor, dt: float | Tensor) -> Tensor:
        K: list[Tensor] = []
        for i, time in enumerate(t):
            K.append(self.p.f(time, y + weighted(self.rows[i], K, dt) if i else y))
        return weighted(self.rows[-1], K, dt)

    def look_apart(self, y: Tensor, z: Tensor) -> None:
        """Warn where the second state no longer is the first."""
        apart, size = (y - z).detach().abs().amax(), y.detach().abs().amax()
        if not self.p.transformed and bool(apart > _APART * size):
            warn_once(
                "reversible",
                f"{self.p.method.name}: the two states of the reversible method have parted by {float(apart):.2g}, "
                f"where the state has the size {float(size):.2g}. Its steps are too long for this f, or the system "
                "forgets its past too fast, which a reversible method cannot follow for long. Use smaller steps, or "
                "another method with adjoint='checkpointed'. (This warning is shown once.)",
            )


class ReversibleStep:
    """A step; the slopes at its ends are evaluated when dense output asks for them.

    Attributes:
        left: z at its end, (n,).
    """

    def __init__(self, maker: Reversible, interval: Interval, y: Tensor, y1: Tensor, z1: Tensor, data: Other) -> None:
        self.maker, self.interval, self.y, self.y1, self.left, self.data = maker, interval, y, y1, z1, data
        self.slopes: Any = None

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        if self.slopes is None:
            f, (t0, t1) = self.maker.p.f, stage_times(self.interval, _ENDS, self.y)
            self.slopes = f(t0, self.y), f(t1, self.y1)
        return interpolation.hermite(fraction(self.interval, times), self.interval.dt, self.y, self.y1, *self.slopes)


def weighted(row: list[float], K: list[Tensor], dt: float | Tensor) -> Tensor:
    """dt Σ row_j K_j, (n,)."""
    total = sum((w * k for w, k in zip(row, K) if w), torch.zeros_like(K[0]))
    assert isinstance(total, Tensor)
    return (dt.to(total) if isinstance(dt, Tensor) else dt) * total
