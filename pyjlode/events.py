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
    One of which only one direction counts is left out until it is on the side from which it may cross.

    Args:
        patient: leave out a function that does not have its sign at the start, as after a bounce it may not up to
            rounding, until it is seen to have it. For a search that would take that for a crossing.

    Attributes:
        signs: of each function before it crosses; 0 where that is not known yet, or it is not to be looked at.
        since: the time, times the direction, from which on each counts.
        sizes: the largest magnitude of each function so far.
        fired: which functions had crossed at the earliest time at which one was seen to have.
    """

    def __init__(self, p: ODEProblem, *, patient: bool = False) -> None:
        assert p.event_fn is not None
        self.p, self.event_fn, self.forward, self.patient = p, p.event_fn, p.direction, patient
        self.start = self.furthest = p.times[0]
        self.signs: list[float] = []
        self.since: list[float] = []
        self.sizes: list[float] = []
        self.fired: tuple[int, ...] = ()
        self.fired_at = math.inf
        self(p.times[0], p.y0)

    @torch.no_grad()
    def __call__(self, t: float, y: Tensor) -> float:
        """Smallest event function at (t, y), y of shape (n,); infinite where none has a sign yet."""
        values = self.event_fn(self.p.time(t), y).detach().reshape(-1).tolist()
        if any(map(math.isnan, values)):
            what = "event_fn" if not self.p.onward else "a condition of events"
            raise NonFiniteState(f"{what} returned NaN at t={t:.6g}.", t=t, dt=0.0)
        if not self.signs:
            self.signs = [self.counted(i, s) for i, s in enumerate(self.p.signs or [0.0] * len(values))]
            self.since, self.sizes = [self.forward * t] * len(values), [0.0] * len(values)
            if self.patient:
                self.since = [math.inf if s and s * v <= 0 else x for x, s, v in zip(self.since, self.signs, values)]
        gone = self.forward * t
        if gone >= self.forward * self.furthest:  # not where a crossing is searched for between times seen already
            self.furthest = t
            self.sizes = [max(size, abs(v)) for size, v in zip(self.sizes, values)]
            if not (self.p.signs and t == self.start):
                self.arm(gone, values)
        products = [s * v if s and gone >= since else math.inf for s, v, since in zip(self.signs, values, self.since)]
        margin = min(products)
        if margin <= 0 and gone < self.fired_at and t != self.start:
            self.fired_at, self.fired = gone, tuple(i for i, x in enumerate(products) if x <= 0)
        return margin

    def arm(self, gone: float, values: list[float]) -> None:
        """Give functions without a sign that of their values at a time."""
        for i, (s, v) in enumerate(zip(self.signs, values)):
            if s == 0 and (found := self.counted(i, float((v > 0) - (v < 0)))):
                self.signs[i] = found
                if self.p.directions and self.p.directions[i]:
                    self.since[i] = gone
            elif s * v > 0 and math.isinf(self.since[i]):
                self.since[i] = gone

    def counted(self, i: int, sign: float) -> float:
        """The sign, or 0 where a crossing from that side does not count."""
        return 0.0 if self.p.directions and sign == self.p.directions[i] else sign
