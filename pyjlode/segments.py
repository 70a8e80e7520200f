"""A solve with `events`: a chain of solves, each up to the next event, and what the events make of the state between.

The gradient through an event is that of the chain. Its time and the state there are functions of all that moves them by
the implicit function theorem (`engines.crossing`). The solve that follows starts at that time: where the steps are
recorded it does so literally, its times having a graph; an adjoint is given the state that the solution from there has
at the number that the time is, to first order (the saltation matrix: Aizerman & Gantmakher 1958; Kong, Payne, Zhu &
Johnson, Saltation matrices: the essential tool for linearizing hybrid dynamical systems, 2024).
"""

from __future__ import annotations

import bisect
import contextlib
import math
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import numbers, progress
from .engines import choice
from .engines.crossing import crossing, leg, rate
from .errors import BadOption, InconsistentStart, SolveError, TooManyEvents
from .jumps import Event, Events
from .notices import log_once
from .problem import Equation, Layout, ODEProblem, Prepared, like
from .solution import Occurrence, Solution, Stats, Steps, interpolant
from .solver import Solver

# Events one after the other between which time does not advance, of different conditions; and rounding units of time
# within which the same one happens again: bounces that follow each other ever faster.
_STILL, _AGAIN = 20, 16
_COUNTS = ("naccept", "nreject", "njac", "nlu", "nnewton")


def solved(solver: Solver, e: Equation, *, dense: bool) -> Solution:
    """Solve an equation that has events.

    Args:
        dense: keep the dense output.

    Raises:
        BadOption: what is said does not go with events.
        TooManyEvents: there are more than `max_events`, or they follow each other without end.
    """
    start = time.perf_counter()
    if numbers.transformed():
        raise BadOption("events do not work under torch.func and forward mode: use autograd's backward pass.")
    if e.event_fn is not None:
        raise BadOption("give event_fn or events, not both: an event that ends the solve is Event(..., terminal=True).")
    if solver._forward.options.get("batch_dims"):
        raise BadOption(
            "events are of the whole state, and options['batch_dims'] makes systems of it with steps of their own. "
            "Leave batch_dims out; or use event_fn, which ends each system at its own event."
        )
    if solver._forward.options.get("estimates"):
        raise BadOption("options['estimates'] are of one solve, and events make several: leave one of them out.")
    chain = Chain(solver, e, dense, solver.engine)
    try:
        follow(chain)
    except SolveError as error:
        reason = None if isinstance(error, TooManyEvents) else choice.second(solver.engine, chain.made, error)
        if reason is None:
            raise
        chain = Chain(solver, e, dense, "torch")
        chain.stats.reason = reason
        log_once(chain.stats.engine, reason, chain.stats.method, chain.made.gradient or "through the solver")
        follow(chain)
    chain.stats.wall = time.perf_counter() - start
    return chain.solution()


def follow(chain: Chain) -> None:
    """Make the solves of a chain, as `f` is to be called in them."""
    p = chain.made.problem
    device = p.y0.device.type
    with contextlib.ExitStack() as within:
        if torch.is_autocast_enabled(device):
            within.enter_context(torch.autocast(device, enabled=False))
        if p.options.progress:
            within.enter_context(progress.shown(p))
        chain.run()


class Point(NamedTuple):
    """Where a chain stands.

    Attributes:
        t: the time. moment: the same as a 0-d float64 tensor with its graph.
        y: (n,) the state.
    """

    t: float
    moment: Tensor
    y: Tensor


@dataclass
class Part:
    """One solve of the chain.

    Attributes:
        end: its last time.
    """

    end: float
    record: Any


class Chain:
    """The solves between events, one after the other."""

    def __init__(self, solver: Solver, e: Equation, dense: bool, engine: str) -> None:
        self.solver, self.e, self.dense, self.engine = solver, e, dense, engine
        self.made: Prepared = solver._prepare(e._replace(events=None), engine)
        self.stats: Stats = self.made.stats
        p = self.made.problem
        assert p.layout is not None
        self.layout: Layout = p.layout
        self.times, self.sign = p.times, p.direction
        self.t, self.whole = p.t, p.t.to(torch.float64)
        self.events = Events.read(e.events, p.times)
        self.condition = self.events.conditions(p.layout) if self.events.watched else None
        self.steps: Steps | None = self.made.engine.watch(p) if dense else None
        self.blocks: list[Tensor] = [p.y0[None]]
        self.done = 1  # outputs so far
        self.parts: list[Part] = []
        self.happened: list[Occurrence] = []
        self.ended: Point | None = None
        self.step: float | None = None
        self.nfe = 0
        self.start = p.y0

    def run(self) -> None:
        p = self.made.problem
        stops, still = self.events.stops, 0
        last: dict[int, float] = {}  # when each condition crossed zero
        here = Point(p.times[0], self.whole[0], p.y0)
        signs, f0 = self.restart(p, here, (), here.y, ()) if self.condition else (None, p.f0)
        while True:
            stop = stops[0] if stops else None
            end = stop.t if stop else self.times[-1]
            fired: tuple[int, ...] = ()
            sizes: tuple[float, ...] = ()
            before = here.t
            reached = near(here.t, end)
            if not reached:
                here, fired, sizes = self.solve(here, end, stop.time if stop else None, signs, f0)
            if fired:
                indices = [self.events.watched[i] for i in fired]
            else:
                self.pass_outputs(here.y, end)
                if stop is None:
                    break
                indices = [stop.index]
                if reached:
                    here = self.later(here, end, stop.time.to(self.whole))
                stops.pop(0)
                while stops and stops[0].t == end:
                    indices.append(stops.pop(0).index)
            if near(here.t, self.times[-1]):
                self.pass_outputs(here.y, self.times[-1])
            still = still + 1 if fired and near(before, here.t) else 0
            if still == _STILL or any(i in last and near(here.t, last[i], _AGAIN) for i in fired):
                raise self.too_many(here.t, "events follow each other so fast that time no longer advances,")
            last.update(dict.fromkeys(fired, here.t))
            there = self.happen(here, indices)
            if any(map(self.ends, indices)):
                self.ended = here
                break
            if self.done == len(self.times):
                break
            signs, f0 = self.restart(self.made.problem, there, fired, here.y, sizes)
            here = there

    def pass_outputs(self, y: Tensor, end: float) -> None:
        """Give y at the times of the user's up to `end`."""
        j = bisect.bisect_right(self.times, self.sign * end, self.done, key=lambda t: self.sign * t)
        if j > self.done:
            self.blocks.append(y[None].expand(j - self.done, -1))
            self.done = j

    def solve(
        self, here: Point, end: float, stop: Tensor | None, signs: tuple[float, ...] | None, f0: Tensor | None
    ) -> tuple[Point, tuple[int, ...], tuple[float, ...]]:
        """Solve from here to `end`, or to the first event before it.

        Args:
            stop: `end` with its graph, where something happens there; None for the last of the user's times.
            signs: of the conditions just after the start. f0: f at the start, where it is known.

        Returns:
            Where it ended, which conditions crossed zero there, and the largest magnitudes that they had.
        """
        first = not self.parts
        recorded = self.literal
        start = here.moment if recorded or first else here.moment.detach()
        y = here.y if recorded or first else self.shifted(here, f0)
        j = bisect.bisect_left(self.times, self.sign * end, self.done, key=lambda t: self.sign * t)
        last = self.whole[-1] if stop is None else stop.to(self.whole)
        moves = stop is not None and not recorded and stop.requires_grad
        t = torch.cat([start.reshape(1), self.whole[self.done : j], (last.detach() if moves else last).reshape(1)])
        if not self.made.needed and torch.is_grad_enabled() and (y.requires_grad or t.requires_grad):
            self.prepare(y, t)
            recorded, f0 = self.literal, None
        p = self.made.problem
        q: ODEProblem = like(
            p, y0=y, t=t, times=[here.t, *self.times[self.done : j], end], f0=None if recorded and not first else f0
        )
        if self.condition:
            vars(q).update(event_fn=self.condition, onward=True, directions=self.events.directions, signs=signs)
        if self.step is not None:
            q.options = replace(p.options, first_step=self.step)
        if not first and q.mass is not None:
            try:
                q.y0 = choice.consistent(q)
            except InconsistentStart as error:
                raise InconsistentStart(f"The state after an event (here: h0): {error}") from error
            q.f0 = q.f0 if q.options.consistent == "check" else None
        record = self.counted(q)
        self.step = getattr(record, "restart", None)
        self.made.needed = self.made.needed or bool(q.params)
        p.params, p.makes_leaves = q.params, q.makes_leaves
        ys = record.ys
        inner = j - self.done
        if record.event_t is None:
            self.add(ys[1 : 1 + inner])
            self.parts.append(Part(end, record))
            y = ys[-1]
            if stop is None:
                return Point(end, last, y), (), ()
            if moves or (recorded and j < len(self.times) and self.times[j] == end):
                y = self.moved(q, end, ys[-1], last if moves else None)
            if j < len(self.times) and self.times[j] == end:  # the output is at its own time, where that moves
                own = self.whole[j] - last + last.detach() if recorded else self.whole[j]
                self.add(self.moved(q, end, ys[-1], own)[None])
            return Point(end, last, y), (), ()
        self.add(ys[1 : min(record.passed, 1 + inner)])
        fired = record.fired
        self.parts.append(Part(record.event_t, record))
        of = self.events.conditions(self.layout, [self.events.watched[fired[0]]])
        moment, y = crossing(like(q, event_fn=of), record, self.made.gradient)
        return Point(record.event_t, moment, y), fired, record.sizes

    def add(self, ys: Tensor) -> None:
        if len(ys):
            self.blocks.append(ys)
            self.done += len(ys)

    def counted(self, q: ODEProblem) -> Any:
        """Solve, and add its work to that of the solves before."""
        stats = self.stats
        before = {name: getattr(stats, name) for name in _COUNTS}
        switches = stats.switches
        vars(stats).update(dict.fromkeys(_COUNTS, 0), switches=[])
        record = leg(self.made.engine, q, stats, self.made.gradient, self.made.needed, self.dense)
        for name in _COUNTS:
            setattr(stats, name, getattr(stats, name) + before[name])
        stats.switches = switches + stats.switches
        return record

    def prepare(self, y: Tensor, t: Tensor) -> None:
        """Something requires grad from here on and did not before: the affects or conditions depend on it."""
        e = self.e._replace(h0=self.layout.unflatten(y), t=t, events=None)
        old = self.made.problem
        self.nfe += old.f.nfe
        self.made = self.solver._prepare(e, self.engine)
        self.made.problem.callbacks, self.made.stats = old.callbacks, self.stats
        self.stats.engine, self.made.needed = self.made.engine.NAME, True

    @property
    def literal(self) -> bool:
        """Whether a solve starts at a time that has a graph: where steps are recorded, and where fixed ones are taken
        again, so that the gradient is that of their numbers."""
        made = self.made
        taken_again = made.gradient == "discrete" and made.engine.NAME == "torch"
        return made.gradient is None or (taken_again and not made.problem.method.adaptive)

    def later(self, here: Point, t: float, moment: Tensor) -> Point:
        """The same point as one at `t`, which is the same number or almost, but moves with another time."""
        y = here.y
        if torch.is_grad_enabled() and (here.moment.requires_grad or moment.requires_grad):
            apart = (moment - moment.detach()) - (here.moment - here.moment.detach())
            y = y + slope(self.made.problem, here.t, y) * apart.to(y)
        return Point(t, moment, y)

    def moved(self, q: ODEProblem, t: float, y: Tensor, moment: Tensor | None) -> Tensor:
        """The state y (n,) at a time t as it moves with that time, `moment`, to first order."""
        if moment is None or not (torch.is_grad_enabled() and moment.requires_grad):
            return y
        return y + slope(q, t, y) * (moment - moment.detach()).to(y)

    def shifted(self, here: Point, f0: Tensor | None) -> Tensor:
        """The state here, (n,), as a function of the time at which it is taken, which then is a number."""
        if not (torch.is_grad_enabled() and here.moment.requires_grad):
            return here.y
        k = slope(self.made.problem, here.t, here.y) if f0 is None else f0.detach()
        return here.y - k * (here.moment - here.moment.detach()).to(here.y)

    def happen(self, here: Point, indices: list[int]) -> Point:
        """Have events happen, in the order in which the user gave them."""
        p, y = self.made.problem, here.y
        t = here.moment.to(y)
        for i in sorted(indices):
            if len(self.happened) == p.options.max_events:
                raise self.too_many(here.t, f"max_events={p.options.max_events} events")
            before = self.layout.unflatten(y)
            after = self.events.affected(i, t, before, self.layout)
            self.happened.append(Occurrence(here.moment.to(self.t), i, before, after))
            if after is not before:
                y = self.layout.flatten(after)
        return here._replace(y=y)

    def ends(self, i: int) -> bool:
        """Whether event i, which has just happened, ends the solve."""
        event = self.events.all[i]
        if not isinstance(event, Event) or not event.terminal:
            return False
        return event.terminal == 1 or sum(x.index == i for x in self.happened) == event.terminal

    def too_many(self, t: float, what: str) -> TooManyEvents:
        last = [x.index for x in self.happened[-3:]]
        return TooManyEvents(
            f"{what} by t={t:.9g} (the last ones: {', '.join(f'events[{i}]' for i in last)}). Where bounces get "
            "shorter and shorter, infinitely many end in a finite time (Zeno's paradox), beyond which this model says "
            "nothing: end the solve before, by a terminal event or an earlier t[-1], or have the affect hold the state "
            "there: a component of it, set to 0, that f multiplies by. If there are that many events, raise "
            "options['max_events'].",
            t=t,
            dt=0.0,
        )

    def restart(
        self, p: ODEProblem, here: Point, fired: tuple[int, ...], before: Tensor, sizes: tuple[float, ...]
    ) -> tuple[tuple[float, ...] | None, Tensor | None]:
        """The signs that the conditions have just after an event, and f there, if it was asked for.

        A condition that is zero, up to rounding, has the sign that its rate of change gives it.

        Args:
            fired: which of them had just crossed zero. before: (n,) the state before the event.
            sizes: their magnitudes so far.
        """
        native = self.made.engine.NAME == "torch"
        needs = torch.is_grad_enabled() and here.moment.requires_grad and self.made.gradient is not None
        f0 = slope(p, here.t, here.y) if (native and self.happened) or needs else p.f0 if not self.happened else None
        if self.condition is None:
            return None, f0
        t, y = p.time(here.t), here.y.detach()
        with torch.no_grad():
            values = self.condition(t, y).tolist()
            crossed = self.condition(t, before.detach()).tolist() if fired else values
        eps = torch.finfo(y.dtype).eps
        signs = []
        for i, v in enumerate(values):
            small = 8 * eps * sizes[i] if sizes else 0.0
            if i in fired:
                small = max(small, 10 * abs(crossed[i]))
            if abs(v) <= small:
                k = slope(p, here.t, y) if f0 is None else f0.detach()
                v = self.sign * rate(lambda t, y, i=i: self.condition(t, y)[i], t, y, k)  # type: ignore[misc]
            signs.append(float((v > 0) - (v < 0)))
        return tuple(signs), f0

    def solution(self) -> Solution:
        p, stats = self.made.problem, self.stats
        blocks, t, event_t = self.blocks, self.t, None
        if self.ended is not None:
            event_t = self.ended.moment.to(t)
            blocks, t = [*blocks, self.ended.y[None]], torch.cat([t[: self.done], event_t.reshape(1)])
        ys = torch.cat(blocks)
        stats.nfe = self.nfe + p.f.nfe
        output = None
        if self.dense:
            end = self.times[-1] if self.ended is None else self.ended.t
            whole: ODEProblem = like(p, times=[self.times[0], end])
            blind = ys.requires_grad and self.made.gradient is not None
            output = interpolant(Pieces(self.parts, self.sign, ys), whole, self.layout, None, blind)
        return Solution(t, self.layout.unflatten(ys), stats, event_t, output, self.steps, self.happened)


class Pieces:
    """The dense outputs of a chain as one; at the time of an event it is the state before that.

    Attributes:
        ys: (T, n) the outputs.
    """

    def __init__(self, parts: list[Part], sign: float, ys: Tensor) -> None:
        self.parts, self.sign, self.ys = parts, sign, ys
        self.ends = [sign * part.end for part in parts]
        self.dense = self if parts else None

    def __call__(self, times: Tensor) -> Tensor:
        """States at `times` of shape (M,): shape (M, n)."""
        last = len(self.parts) - 1
        owner = [min(bisect.bisect_left(self.ends, self.sign * t), last) for t in numbers.listed(times)]
        rows: list[Tensor] = [self.ys.new_zeros(0, self.ys.shape[1])]
        i = 0
        while i < len(owner):
            j = i + 1
            while j < len(owner) and owner[j] == owner[i]:
                j += 1
            rows.append(self.parts[owner[i]].record.dense(times[i:j]))
            i = j
        return torch.cat(rows)


def near(a: float, b: float, ulps: int = 4) -> bool:
    """Whether floating-point time has hardly anything between a and b."""
    return abs(a - b) <= ulps * math.ulp(max(abs(a), abs(b)))


@torch.no_grad()
def slope(p: ODEProblem, t: float, y: Tensor) -> Tensor:
    """dy/dt of the solution through (t, y), (n,), without graph."""
    return choice.slope(p, p.time(t), y.detach()).detach().clone()
