"""What a solve keeps for its steps to be taken again, last one first: all states, some of them, or the last one."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import GradientUnavailable
from ..methods.stiff import RosenbrockTableau
from ..numbers import as_like
from ..problem import ODEProblem
from ..solution import Stats
from .explicit import ExplicitRK
from .implicit import ImplicitRK
from .multistep import AdamsStep, Past
from .reversible import Other, Reversible, ReversibleStep
from .rosenbrock import Rosenbrock
from .second import Second
from .step import Interval, Step


class Kept(NamedTuple):
    """What is needed to take a step again: for a multistep method its past, and the slope that it adds to it; for an
    adaptive implicit method what its maker wants (`data`)."""

    interval: Interval
    y: Tensor
    past: Past | None = None
    slope: Tensor | None = None
    data: Any = None


def kept(step: Step) -> Kept:
    if isinstance(step, AdamsStep):
        return Kept(step.interval, step.y, step.before, step.f0)
    return Kept(step.interval, step.y.detach(), data=getattr(step, "data", None))


class Keeper(Protocol):
    """Keeps the accepted steps of a solve."""

    def add(self, step: Step) -> None: ...

    def last_first(self, start: int, *, again: bool) -> Iterable[Kept]:
        """The steps from number `start` on, last one first.

        Args:
            again: they will be asked for once more.
        """
        ...

    def __len__(self) -> int: ...


class All:
    """Every step with its state (`adjoint="discrete"`)."""

    def __init__(self) -> None:
        self.steps: list[Kept] = []

    def add(self, step: Step) -> None:
        self.steps.append(kept(step))

    def last_first(self, start: int, *, again: bool) -> Iterable[Kept]:
        return reversed(self.steps[start:])

    def __len__(self) -> int:
        return len(self.steps)


class Times:
    """The intervals of the steps of a solve, at nine bytes each where none has a graph."""

    def __init__(self) -> None:
        self.ends, self.jumps = array("d"), bytearray()
        self.tracked: list[Interval] = []

    def add(self, interval: Interval) -> None:
        if isinstance(interval.dt, Tensor):
            self.tracked.append(interval)
            return
        if not self.ends:
            self.ends.append(interval.t0)
        self.ends.append(interval.t1)
        self.jumps.append(2 * interval.after_jump + interval.before_jump)

    def __getitem__(self, i: int) -> Interval:
        if self.tracked:
            return self.tracked[i]
        t0, t1 = self.ends[i], self.ends[i + 1]
        return Interval(t0, t1, t0, t1 - t0, self.jumps[i] > 1, self.jumps[i] % 2 == 1)

    def __len__(self) -> int:
        return len(self.tracked) or len(self.jumps)


@dataclass
class Point:
    """The state at the start of step `i`."""

    i: int
    y: Tensor
    level: float


class Checkpoints:
    """The states of O(log steps) of the steps; those between are computed again (`adjoint="checkpointed"`).

    How many steps there will be is not known in the solve. Where they are kept is decided as it goes: Wang, Moin &
    Iaccarino, Minimal repetition dynamic checkpointing algorithm for unsteady adjoint calculation, SIAM J. Sci. Comput.
    31 (2009) 2549-2567, Algorithm 1. For a given number of states the repetitions are as few as those of Griewank &
    Walther's binomial checkpoints (Algorithm 799: revolve, ACM TOMS 26, 2000).
    """

    def __init__(self, p: ODEProblem) -> None:
        self.p, self.times = p, Times()
        self.points: list[Point] = []

    def __len__(self) -> int:
        return len(self.times)

    def add(self, step: Step) -> None:
        i = len(self.times)
        self.times.add(step.interval)
        place(self.points, Point(i, step.y.detach(), math.inf if i == 0 else 0), slots(i))

    def last_first(self, start: int, *, again: bool) -> Iterator[Kept]:
        assert start == 0
        points = list(self.points) if again else self.points
        room = slots(len(self.times))
        for i in reversed(range(len(self.times))):
            at = points[-1]
            if at.i < i:
                for j, y in enumerate(self.retaken(at, i), at.i + 1):
                    if j < i:
                        place(points, Point(j, y, 0), room)
                yield Kept(self.times[i], y)
            else:
                points.pop()
                yield Kept(self.times[i], at.y)

    def retaken(self, at: Point, end: int) -> Iterator[Tensor]:
        """The states after each step from that which begins at a point to that before number `end`."""
        step, y = taker(self.p), at.y
        for i in range(at.i, end):
            y = step(self.times[i], y)
            yield y


def slots(steps: int) -> int:
    """How many states are kept of so many steps: with these 1.7 steps are taken again for each of 1000, and 1.9 for
    each of 30 000."""
    return 4 + 4 * steps.bit_length()


def place(points: list[Point], new: Point, room: int) -> None:
    """Keep one more state, in place of another one if there is no room."""
    if len(points) >= room:
        highest = 0.0
        for k in range(len(points) - 1, 0, -1):
            if points[k].level < highest:  # dispensable: a later one has a higher level
                del points[k]
                break
            highest = max(highest, points[k].level)
        else:
            new.level = points.pop().level + 1
    points.append(new)


def taker(p: ODEProblem) -> Callable[[Interval, Tensor], Tensor]:
    """Takes steps one after the other as the solve took them, without graph: (interval, y) -> y1."""
    known: Tensor | None = None
    if p.method.kind == "implicit":
        implicit = ImplicitRK(p)
        return lambda interval, y: implicit.step(interval, y).y1
    if p.method.kind == "second":
        second = Second(p)

        def of_second(interval: Interval, y: Tensor) -> Tensor:
            nonlocal known
            step = second.step(interval, y, known)
            known = step.end
            return step.y1

        return of_second
    if isinstance(p.method.tableau, RosenbrockTableau):
        rosenbrock = Rosenbrock(replace(p, f0=None), Stats("", "", ""), p.method.tableau)

        def of_rosenbrock(interval: Interval, y: Tensor) -> Tensor:
            step, _, _ = rosenbrock.attempt(interval, y)
            rosenbrock.f0, rosenbrock.J = rosenbrock.f1, None
            return step.y1

        return of_rosenbrock
    explicit, adaptive = ExplicitRK(p), p.method.adaptive

    def of_explicit(interval: Interval, y: Tensor) -> Tensor:
        nonlocal known
        step = explicit.step(interval, y, None if interval.after_jump else known, estimate=adaptive)
        known = step.f1 if adaptive else None
        return step.y1

    return of_explicit


class Reversed:
    """The last state alone: the steps of a method that can undo them are undone one by one (`adjoint="reversible"`)."""

    def __init__(self, p: ODEProblem) -> None:
        self.p, self.times, self.last = p, Times(), (p.y0, p.y0)

    def __len__(self) -> int:
        return len(self.times)

    def add(self, step: Step) -> None:
        self.times.add(step.interval)
        y1 = step.y1.detach()
        self.last = y1, step.left.detach() if isinstance(step, ReversibleStep) else y1

    def last_first(self, start: int, *, again: bool) -> Iterator[Kept]:
        assert start == 0
        y, other = self.last
        if self.p.method.kind == "reversible":
            reversible = Reversible(self.p)
            for i in reversed(range(len(self.times))):
                y, other = reversible.backward(self.times[i], y, other)
                yield Kept(self.times[i], y, data=Other(other if i else None))
        else:
            second = Second(self.p)
            for i in reversed(range(len(self.times))):
                y = second.backward(self.times[i], y)
                yield Kept(self.times[i], y)
        self.check(y)

    def check(self, y: Tensor) -> None:
        """
        Raises:
            GradientUnavailable: rounding took the way back from the solve.
        """
        y0, eps = self.p.y0.detach(), torch.finfo(y.dtype).eps
        allowed = as_like(self.p.atol, y) + (as_like(self.p.rtol, y) + 1e4 * eps) * y0.abs().amax()
        if not bool(((y - y0).abs() <= allowed).all()):
            raise GradientUnavailable(
                f"the way back ends {float((y - y0).abs().max()):.2g} from h0: steps are undone to rounding, and this "
                "system makes roundings grow. Use adjoint='checkpointed', whose memory grows by the logarithm of the "
                "number of steps."
            )
