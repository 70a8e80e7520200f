"""Event functions as one number that falls through zero at the first event."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import NonFiniteState
from .problem import ODEProblem


class Margin:
    """The event functions of a problem as one: positive before the first of them has crossed zero, and not after.

    All functions are taken times their sign at the start, so that the first one to cross is the first zero of their
    minimum. A function that is zero at the start gets the sign that it takes next: leaving zero is not crossing it.
    """

    def __init__(self, p: ODEProblem) -> None:
        assert p.event_fn is not None
        self.p, self.event_fn = p, p.event_fn
        self.signs: list[float] = []
        self(p.times[0], p.y0)

    @torch.no_grad()
    def __call__(self, t: float, y: Tensor) -> float:
        """Smallest event function at (t, y), y of shape (n,); infinite where none has a sign yet."""
        values = self.event_fn(self.p.time(t), y).detach().reshape(-1).tolist()
        if any(map(math.isnan, values)):
            raise NonFiniteState(f"event_fn returned NaN at t={t:.6g}.", t=t, dt=0.0)
        self.signs = self.signs or [0.0] * len(values)
        self.signs = [s or float((v > 0) - (v < 0)) for s, v in zip(self.signs, values)]
        return min(s * v if s else math.inf for s, v in zip(self.signs, values))
