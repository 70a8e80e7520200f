"""Adams methods on a fixed grid (Hairer, Nørsett & Wanner III.1 and III.5), of the order that the history allows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..methods.explicit import RK4
from ..notices import warn
from ..numbers import as_like, on_host, read, solve
from ..problem import ODEProblem
from . import interpolation
from .explicit import ExplicitRK
from .step import Interval, fraction, stage_times

START_ORDER = 4  # of the Runge-Kutta method that makes the first steps
MAX_ITERS = 4


class Past(NamedTuple):
    """f at earlier grid points, newest first."""

    times: tuple[float | Tensor, ...]
    slopes: tuple[Tensor, ...]


def adams_weights(nodes: Tensor) -> Tensor:
    """Weights b with `sum b_j g(nodes_j)` = integral of g over [0, 1] for polynomials of degree < len(nodes).

    Computed for the nodes as they are, so that the order holds on grids that are not uniform.

    Args:
        nodes: (m,) float64, times of the known slopes in units of the step, 0 its start and 1 its end.
    """
    # Powers of node / reach are within [-1, 1], which keeps the Vandermonde system well scaled.
    m, reach = len(nodes), nodes.detach().abs().max().clamp(min=1.0)
    degree = torch.arange(m, dtype=nodes.dtype, device=nodes.device)
    moments = reach**-degree / (degree + 1)
    return solve((nodes / reach) ** degree[:, None], moments)


class Adams:
    """Makes the steps of `explicit_adams` (Bashforth) and `implicit_adams` (Bashforth predicts, Moulton corrects)."""

    def __init__(self, p: ODEProblem, *, recorded: bool = False) -> None:
        o = p.options
        self.p = p
        self.corrects = p.method.name == "implicit_adams"
        self.order = o.max_order or (12 if self.corrects else 5)
        self.max_iters = MAX_ITERS if o.max_iters is None else o.max_iters
        if self.order < START_ORDER:
            warn(
                f"max_order={self.order} is below {START_ORDER}: every step is of the Runge-Kutta method of order 4 "
                "that starts the Adams methods."
            )
        self.starter = ExplicitRK(p, recorded=recorded, keep=True, tableau=RK4)

    def step(self, interval: Interval, y: Tensor, carry: Past | None) -> AdamsStep:
        (t0,) = stage_times(interval, np.zeros(1), y)
        f0 = self.p.f(t0, y)
        past = carry or Past((), ())
        past = Past((interval.at, *past.times), (f0, *past.slopes))
        if self.order < START_ORDER or len(past.slopes) < START_ORDER:
            y1 = self.starter.step(interval, y, f0).y1
        else:
            nodes = [(t - interval.at) / interval.dt for t in past.times]
            y1 = y + self.increment(interval, nodes[: self.order], past.slopes[: self.order])
            if self.corrects:
                y1 = self.correct(interval, nodes[: self.order - 1], past.slopes[: self.order - 1], y, y1)
        keep = max(self.order - 1, 1)
        return AdamsStep(self, interval, y, y1, carry, Past(past.times[:keep], past.slopes[:keep]), f0)

    def increment(self, interval: Interval, nodes: list[float | Tensor], slopes: tuple[Tensor, ...]) -> Tensor:
        if isinstance(interval.dt, Tensor):
            x = torch.stack([as_like(node, interval.dt) for node in nodes])
        else:
            x = on_host(nodes)
        like = slopes[0]
        return torch.mv(torch.stack(slopes, 1), (adams_weights(x) * interval.dt).to(like, non_blocking=True))

    def correct(
        self, interval: Interval, nodes: list[float | Tensor], slopes: tuple[Tensor, ...], y: Tensor, y1: Tensor
    ) -> Tensor:
        """Fixed-point iteration on the Adams-Moulton equation, from the predicted `y1`."""
        p = self.p
        (t1,) = stage_times(interval, np.ones(1), y)
        for _ in range(self.max_iters):
            before = y1
            y1 = y + self.increment(interval, [1.0, *nodes], (p.f(t1, y1), *slopes))
            with torch.no_grad():
                scale = p.atol + p.rtol * torch.maximum(before.abs(), y1.abs())
                ratio = (y1 - before).abs() / scale
            if not ratio.numel() or read(ratio.max()) < 1:
                return y1
        warn(
            f"implicit_adams: the corrector at t={interval.t0:.6g} did not settle to rtol and atol in {self.max_iters} "
            "iterations; the step is taken with its last iterate. Use smaller steps, raise options['max_iters'], or "
            "loosen the tolerances."
        )
        return y1


class AdamsStep:
    """A step, and the history that the next one needs."""

    def __init__(
        self, adams: Adams, interval: Interval, y: Tensor, y1: Tensor, before: Past | None, past: Past, f0: Tensor
    ) -> None:
        self.adams, self.interval, self.y, self.y1, self.f0 = adams, interval, y, y1, f0
        self.before, self.past = before, past

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        theta = fraction(self.interval, times)
        (t1,) = stage_times(self.interval, np.ones(1), self.y)
        f1 = self.adams.p.f(t1, self.y1)
        return interpolation.hermite(theta, self.interval.dt, self.y, self.y1, self.f0, f1)
