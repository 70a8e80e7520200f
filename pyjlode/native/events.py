"""Finding the first zero crossing of an event function along the dense output."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from ..events import Margin
from ..problem import ODEProblem
from .explicit import ExplicitStep
from .interpolation import output
from .step import Step

# The event function is looked at this many times within a step, so that a crossing there and back is not stepped over.
LOOKS = 4


class EventFinder:
    """Watches the event functions of a problem from step to step."""

    def __init__(self, p: ODEProblem) -> None:
        self.p = p
        self.margin: Any = Margin(p)

    def look(self, step: Step) -> float | None:
        """Time of the first crossing within the step, or None."""
        t0, t1 = step.interval.t0, step.interval.t1
        times = [t0 + (t1 - t0) * i / LOOKS for i in range(1, LOOKS)]
        # Not without a graph in a recorded solve: the step keeps the slopes that its dense output asks for here.
        states = [*output(self.p, step, times), step.y1]
        before, good = t0, math.inf
        for t, y in zip([*times, t1], states):
            margin = self.margin(t, y)
            if margin <= 0:
                return self.crossing(step, before, t, good if math.isfinite(good) else None, margin)
            before, good = t, margin
        return None

    @torch.no_grad()
    def crossing(self, step: Step, a: float, b: float, ga: float | None, gb: float) -> float:
        """Zero of the margin between a (positive) and b (not positive): secants, guarded by bisection.

        A secant that ends close to one side of the bracket is made twice as long, so that it ends on the other side of
        the zero and the bracket shrinks to it (as in Alefeld, Potra & Shi 1995, algorithm 748).

        Returns the last time before the crossing that floating point tells from it, so that a solve restarted there is
        on the near side.
        """

        at = step.pointwise() if isinstance(step, ExplicitStep) and self.p.method.adaptive else None

        def margin(t: float) -> float:
            return self.margin(t, output(self.p, step, [t])[0] if at is None else at(t))

        if ga is None:
            ga = margin(a)
            if ga <= -1e-6 * gb:  # zero at the start, as after a bounce: it rises from there, and has fallen again by b
                x = a + (b - a) / 2
                while x not in (a, b) and (g := margin(x)) <= 0:
                    b, gb, x = x, g, a + (x - a) / 2
                if x not in (a, b):
                    a, ga = x, g
                elif ga <= 0:
                    return a
        for i in range(200):
            finest = 2 * sys.float_info.epsilon * max(abs(a), abs(b))
            if abs(b - a) <= finest:
                break
            if gb == 0:  # is that the zero itself, or is it flat from the zero on, as relu is?
                x = b + 2 * finest * (1 if a > b else -1)
                if (g := margin(x)) > 0:
                    return x
                x = a + (b - a) / 2
            else:
                x = longer(a, b, (b - a) * (ga / (ga - gb)), finest)
            if i % 4 == 3 or not min(a, b) < x < max(a, b):
                x = a + (b - a) / 2
                if x in (a, b):
                    break
            g = margin(x)
            if g > 0:
                a, ga = x, g
            else:
                b, gb = x, g
        return a


def longer(a: float, b: float, way: float, finest: float) -> float:
    """Where to look in the bracket from a to b for a zero that is expected at a + way."""
    width = abs(b - a)
    if abs(way) < 0.02 * width:
        return a + math.copysign(max(2 * abs(way), 0.9 * finest), b - a)
    rest = width - abs(way)
    if rest < 0.02 * width:
        return b + math.copysign(max(2 * rest, 0.9 * finest), a - b)
    return a + way
