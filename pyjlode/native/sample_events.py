"""Events under `torch.func`: each sample of a `vmap` has its own.

All samples take the same steps until the last of them has met its event. Those that have met it stand still, and no
longer count in the error norm.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import numbers
from ..errors import GradientUnavailable, NonFiniteState
from ..numbers import Samples
from ..problem import Field, ODEProblem, like
from ..solution import Stats
from . import loop
from .checkpoints import All
from .events import LOOKS, EventFinder
from .interpolation import DenseOutput, output
from .step import Step


class Margins:
    """As `events.Margin`, for each sample: (samples,)."""

    def __init__(self, p: ODEProblem, samples: Samples) -> None:
        assert p.event_fn is not None
        self.p, self.samples, self.event_fn = p, samples, p.event_fn
        self.signs: np.ndarray | None = None
        self(p.times[0], p.y0)

    @torch.no_grad()
    def __call__(self, t: float, y: Tensor) -> np.ndarray:
        values = self.samples.array(self.event_fn(self.p.time(t), y).reshape(-1))
        if np.isnan(values).any():
            raise NonFiniteState(f"event_fn returned NaN at t={t:.6g}.", t=t, dt=0.0)
        signs = np.zeros_like(values) if self.signs is None else self.signs
        self.signs = np.where(signs == 0, np.sign(values), signs)
        return np.where(self.signs == 0, math.inf, self.signs * values).min(1, initial=math.inf)


class SampleFinder(EventFinder):
    """Finds the event of one sample."""

    def __init__(self, margins: Margins, i: int) -> None:
        self.p, self.margin = margins.p, lambda t, y: float(margins(t, y)[i])


def solve(p: ODEProblem, stats: Stats, *, dense: bool) -> loop.Record:
    """Integrate until each sample has met its event.

    Returns:
        A record whose `event` and `ys` (2, n) carry derivatives, by the implicit function theorem.
    """
    samples = Samples()
    done = np.zeros(samples.count, dtype=bool)
    original, norm = p.f, p.norm

    def field(t: Tensor, y: Tensor) -> Tensor:
        k = original(t, y)
        return torch.where(samples.wrap(done), torch.zeros_like(k), k) if done.any() else k

    moving = like(p, f=Field(field), norm=_Of(norm, samples, done) if samples.count > 1 else norm)
    margins = Margins(p, samples)
    record = loop.Record(p.y0, All())
    steps = loop.make_steps(moving, stats, record, math.inf, p.moving, dense, p.direction * math.inf)
    kept: list[Step] = []
    event_t: Tensor | None = None
    state = p.y0
    for step in steps:
        if dense:
            kept.append(step)
        looks = {i: SampleFinder(margins, i).look(step) for i in crossed(step, margins) if not done[i]}
        met = {i: t for i, t in looks.items() if t is not None}
        if not met:
            continue
        times = np.array([met.get(i, step.interval.t1) for i in range(samples.count)])
        here = np.array([i in met for i in range(samples.count)])
        at, there = located(moving, step, samples, times, here)
        mask = samples.wrap(here)
        event_t = at if event_t is None else torch.where(mask, at, event_t)
        state = torch.where(mask, there, state)
        done[list(met)] = True
        if done.all():
            break
    done[:] = False  # what is evaluated later (dense output) is f
    assert event_t is not None
    record.ys, record.event = torch.stack([p.y0, state]), event_t
    record.dense = DenseOutput(kept) if dense else None
    return record


class _Of:
    """The error norm, of the samples that still move."""

    def __init__(self, norm: Any, samples: Samples, done: np.ndarray) -> None:
        self.norm, self.samples, self.done = norm, samples, done

    def __call__(self, flat: Tensor) -> float:
        if not self.done.any():
            return self.norm(flat)
        still = self.samples.wrap(~self.done)
        return self.norm(torch.where(still, flat, torch.zeros_like(flat)))


def crossed(step: Step, margins: Margins) -> list[int]:
    """The samples whose margin falls to zero somewhere in the step."""
    t0, t1 = step.interval.t0, step.interval.t1
    times = [t0 + (t1 - t0) * i / LOOKS for i in range(1, LOOKS)]
    states = [*output(margins.p, step, times), step.y1]
    # A sign that is found here must not be known before the finder of one sample looks.
    before = margins.signs
    found = np.any([margins(t, y) <= 0 for t, y in zip([*times, t1], states)], axis=0).nonzero()[0].tolist()
    if found:
        margins.signs = before
    return found


def located(p: ODEProblem, step: Step, samples: Samples, times: np.ndarray, here: np.ndarray) -> tuple[Tensor, Tensor]:
    """Time (0-d) and state (n,) of the events at `times` (samples,), with derivatives for the samples that are `here`.

    As `engines.crossing`: Newton's iteration on the event, which changes no value.
    """
    assert p.event_fn is not None
    event_fn = p.event_fn
    start = samples.wrap(times)
    y = numbers.constant(output(p, step, start[None])[0])
    which = samples.wrap(np.abs(samples.array(event_fn(start.to(y), y).reshape(-1))).argmin(1)).to(y.device)

    def value(t: Tensor) -> tuple[Tensor, Tensor]:
        state = output(p, step, t[None])[0]
        return event_fn(t.to(y), state).reshape(-1).gather(0, which[None])[0].to(torch.float64), state

    first, pull = torch.func.vjp(lambda t: value(t)[0], start)[:2]
    rates = samples.array(pull(torch.ones_like(first))[0])
    if ((rates == 0) & here).any() and numbers.derivatives():
        raise GradientUnavailable(
            "event_fn does not change along the solution at the event: the event's time has no derivative there (it "
            "grazes zero, or event_fn is not differentiable)."
        )
    rate = samples.wrap(np.where(here & (rates != 0), rates, 1.0))
    at, (residual, state) = start, value(start)
    for _ in range(max(2, numbers.derivatives())):
        at = at - (residual - numbers.constant(residual)) / rate
        residual, state = value(at)
    return at.to(p.t.dtype), state
