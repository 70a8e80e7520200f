"""Finding the first zero crossing of an event function along the dense output."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from ..events import Margin
from ..problem import ODEProblem
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
        """Zero of the margin between a (positive) and b (not positive): Illinois regula falsi, guarded by bisection.

        Returns the last time before the crossing that floating point tells from it, so that a solve restarted there is
        on the near side.
        """

        def margin(t: float) -> float:
            return self.margin(t, output(self.p, step, [t])[0])

        if ga is None:
            ga = margin(a)
            if ga <= 0:  # zero at the start, as after a bounce: it rises from there, and has fallen again by b
                x = a + (b - a) / 2
                while x not in (a, b) and (g := margin(x)) <= 0:
                    b, gb, x = x, g, a + (x - a) / 2
                if x in (a, b):
                    return a
                a, ga = x, g
        wa = wb = 1.0
        for i in range(200):
            if abs(b - a) <= 2 * sys.float_info.epsilon * max(abs(a), abs(b)):
                break
            if gb == 0:  # is that the zero itself, or is it flat from the zero on, as relu is?
                x = b + 4 * sys.float_info.epsilon * max(abs(a), abs(b)) * (1 if a > b else -1)
                if (g := margin(x)) > 0:
                    return x
                x = a + (b - a) / 2
            else:
                x = (wb * gb * a - wa * ga * b) / (wb * gb - wa * ga)
            if i % 4 == 3 or not min(a, b) < x < max(a, b):
                x = a + (b - a) / 2
                if x in (a, b):
                    break
            g = margin(x)
            if g > 0:
                a, ga, wa = x, g, 1.0
                wb /= 2
            else:
                b, gb, wb = x, g, 1.0
                wa /= 2
        return a
