"""`method="auto"`: explicit steps, and implicit ones while the problem is stiff."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods.explicit import TSIT5
from ..methods.stiff import NDF, RODAS5P
from ..numbers import outside, read, rows
from ..problem import ODEProblem
from ..solution import Stats
from . import controller
from .bdf import Bdf
from .explicit import ExplicitRK, ExplicitStep
from .linear import DENSE_LIMIT
from .newton import POLISH_RECORDED
from .rosenbrock import Rosenbrock
from .step import Interval
from .stiffness import Attempt, Maker

# |λ dt| on the boundary of tsit5's stability region, on the negative real axis, with some room.
_BOUNDARY = 3.2
# From this part of it on a step counts as on the boundary: the tighter the tolerance, the further inside of it does the
# error of the stiff components hold the step.
_NEAR = 0.7
# So many steps on the boundary one after the other make a problem stiff (HW IV.2), so many below it end that.
_STIFF_AFTER, _EASY_AFTER = 12, 6
# Up to this size of a system its eigenvalues cost less than the step.
_EIGENVALUES = 64


class Explicit:
    """tsit5 as a maker, with the estimate of |λ dt|."""

    def __init__(self, p: ODEProblem) -> None:
        self.p, self.rk = p, ExplicitRK(p, keep=True, tableau=TSIT5)
        self.f0 = p.f0
        self.step: ExplicitStep | None = None
        self.previous = 1.0
        self.order = TSIT5.error_order + 1

    def attempt(self, interval: Interval, y: Tensor) -> Attempt:
        if interval.after_jump:
            self.f0 = None
        self.step = self.rk.step(interval, y, self.f0)
        self.f0 = self.step.f0
        err = self.step.error(self.p.rtol, self.p.atol, y.abs(), self.step.y1.abs())
        return Attempt(self.step, err)

    def accept(self, err: float, size: float) -> float:
        factor = controller.next_factor(err, self.previous, True, self.order, self.p.method.pi, self.p.options)
        assert self.step is not None
        self.previous, self.f0 = max(err, 1e-4), self.step.f1
        return factor

    def reject(self, err: float, size: float) -> float:
        return controller.next_factor(err, self.previous, False, self.order, self.p.method.pi, self.p.options)

    def stretch(self) -> float:
        assert self.step is not None
        return self.step.stretch()

    def again(self, interval: Interval, y: Tensor, data: Any, polish: int) -> ExplicitStep:
        step = ExplicitRK(self.p, recorded=True, tableau=TSIT5).step(interval, y, None)
        self.f0 = step.f1.detach()  # a recorded solve goes on from here
        return step


class Auto:
    """Switches between tsit5 and a stiff method: rodas5p for systems whose Jacobian is factorised, else bdf."""

    def __init__(self, p: ODEProblem, stats: Stats) -> None:
        self.p, self.stats = p, stats
        self.explicit = Explicit(p)
        self.large = p.y0.numel() // max(p.batch, 1) > DENSE_LIMIT
        self.name = "bdf" if self.large else "rodas5p"
        self.implicit = self.make_implicit(p)
        self.stiff = False
        self.count = 0  # steps one after the other that speak for the other method
        self.end = p.times[0]
        v = np.random.default_rng(0).standard_normal(p.y0.numel())
        self.v = torch.from_numpy(v / np.linalg.norm(v)).to(p.y0)

    def make_implicit(self, p: ODEProblem) -> Bdf | Rosenbrock:
        return Bdf(p, self.stats, NDF) if self.large else Rosenbrock(p, self.stats, RODAS5P)

    @property
    def active(self) -> Maker:
        return self.implicit if self.stiff else self.explicit

    def attempt(self, interval: Interval, y: Tensor) -> Attempt:
        attempt = self.active.attempt(interval, y)
        self.end = interval.t1
        return attempt

    def accept(self, err: float, size: float) -> float:
        radius = self.radius() if self.stiff else 0.0
        factor = self.active.accept(err, size)
        if self.stiff:
            self.count = self.count + 1 if radius * size * factor < 0.5 * _BOUNDARY else 0
            if self.count == _EASY_AFTER:
                self.switch()
        else:
            self.count = self.count + 1 if self.explicit.stretch() > _NEAR * _BOUNDARY else max(0, self.count - 2)
            if self.count == _STIFF_AFTER:
                self.switch()
        return factor

    def switch(self) -> None:
        self.stiff, self.count = not self.stiff, 0
        fresh = replace(self.p, f0=None)
        if self.stiff:
            self.implicit = self.make_implicit(fresh)
        else:
            self.explicit = Explicit(fresh)
        self.stats.switches.append((self.end, self.name if self.stiff else "tsit5"))

    def radius(self) -> float:
        """The largest |λ| of the Jacobian that the step used: its eigenvalues, or for large ones a power iteration that
        goes on from step to step."""
        J = self.implicit.J
        assert J is not None
        linear = self.implicit.linear
        if J.blocks is not None and linear.d <= _EIGENVALUES:
            if not J.y.numel():
                return 0.0
            if self.p.transformed:
                with outside():
                    return float(torch.linalg.eigvals(rows(J.blocks)).abs().amax())
            return float(torch.linalg.eigvals(J.blocks).abs().amax())
        size = 0.0
        for _ in range(3):
            v = linear.product(J, self.v)
            size = read(torch.linalg.vector_norm(v))
            if not size:
                return 0.0
            self.v = v / size
        return size

    def reject(self, err: float, size: float) -> float:
        return self.active.reject(err, size)

    def again(self, interval: Interval, y: Tensor, data: Any, polish: int = POLISH_RECORDED) -> Any:
        made: Maker = self.explicit if data is None else self.implicit
        return made.again(interval, y, data, polish)
