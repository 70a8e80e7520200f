"""Events that go on: what a user says of them, and what of it is read before a solve."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import BadDtype, BadOption, BadShape, BadTime
from .numbers import listed, on_host
from .problem import Layout

Affect = Callable[[Tensor, Any], Any]


@dataclass(frozen=True)
class Event:
    """Something that happens whenever a function of the state crosses zero.

    Args:
        condition: `condition(t, h)` -> a tensor of one floating-point number, one for the whole state. `t` is 0-d, `h`
            like `h0`. It may depend on parameters.
        affect: `affect(t, h)` -> the state after the event, like `h0`; it may depend on parameters. None leaves the
            state as it is: the event is only noted in `Solution.events`.
        direction: +1: only where the condition rises through zero, in the direction in which the solve goes. -1: only
            where it falls. 0: both.
        terminal: the solve ends at the event; a number n: where it happens for the nth time.

    Raises:
        BadOption: an argument is not of these.
    """

    condition: Callable[[Tensor, Any], Tensor]
    affect: Affect | None = None
    direction: int = 0
    terminal: bool | int = False

    def __post_init__(self) -> None:
        if not callable(self.condition):
            raise BadOption(f"condition must be a function condition(t, h); got a {type(self.condition).__name__}.")
        _check_affect(self.affect)
        if self.direction not in (-1, 0, 1):
            raise BadOption(f"direction must be +1 (rising), -1 (falling) or 0 (both); got {self.direction!r}.")
        if not isinstance(self.terminal, int) or self.terminal < 0:
            raise BadOption(f"terminal must be True, False or a number of times; got {self.terminal!r}.")


@dataclass(frozen=True, eq=False)
class At:
    """Something that happens at given times.

    Args:
        times: a tensor of shape () or (N,), or floats, in any order. Those before `t[0]`, at `t[-1]` and beyond are not
            part of the solve. A tensor that requires grad gets its gradient.
        affect: `affect(t, h)` -> the state after it, like `h0`.

    Raises:
        BadTime, BadOption: an argument is not of these.
    """

    times: Any
    affect: Affect

    def __post_init__(self) -> None:
        try:
            times = self.times if isinstance(self.times, Tensor) else on_host(self.times)
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadTime(f"At: times must be a tensor or floats; got {self.times!r:.80}.") from error
        if times.ndim > 1 or times.is_complex() or not bool(torch.isfinite(times).all()):
            raise BadTime(f"At: times must be finite, of shape () or (N,); got {times!r:.80}.")
        if self.affect is None:
            raise BadOption("At needs an affect(t, h); to get the state at a time, ask for it in t.")
        _check_affect(self.affect)
        object.__setattr__(self, "times", times)


def with_args(args: tuple[Any, ...], events: Any) -> Any:
    """Events whose functions take (t, h), made of those that take (t, h, *args)."""
    if not isinstance(events, Iterable):
        return events

    def given(f: Any) -> Any:
        return f and (lambda t, h: f(t, h, *args))

    return [
        replace(x, condition=given(x.condition), affect=given(x.affect))
        if isinstance(x, Event)
        else replace(x, affect=given(x.affect))
        if isinstance(x, At)
        else x
        for x in events
    ]


def _check_affect(affect: Any) -> None:
    if affect is not None and not callable(affect):
        raise BadOption(f"affect must be a function affect(t, h); got a {type(affect).__name__}.")


@dataclass(frozen=True)
class Stop:
    """One time at which something happens.

    Attributes:
        index: which of the user's events it belongs to.
        time: 0-d float64, with its graph.
    """

    t: float
    index: int
    time: Tensor


@dataclass
class Events:
    """The events of one solve.

    Attributes:
        all: the user's.
        watched: indices of those with a condition.
        stops: the times at which others happen, in the order in which they do.
    """

    all: tuple[Event | At, ...]
    watched: list[int]
    stops: list[Stop]

    @classmethod
    def read(cls, given: Any, times: list[float]) -> Events:
        """
        Args:
            times: of the solve.

        Raises:
            BadOption: these are no events.
        """
        if isinstance(given, (Event, At)) or not isinstance(given, Iterable):
            raise BadOption(f"events must be a list of pyjlode.Event and pyjlode.At; got {given!r:.80}.")
        events = tuple(given)
        for event in events:
            if not isinstance(event, (Event, At)):
                hint = f" A function of (t, h) is pyjlode.Event({event!r:.40})." if callable(event) else ""
                raise BadOption(f"events must be a list of pyjlode.Event and pyjlode.At; it holds {event!r:.80}.{hint}")
        sign = 1.0 if len(times) < 2 or times[1] > times[0] else -1.0
        stops = []
        for i, event in enumerate(events):
            if isinstance(event, At):
                moments = event.times.reshape(-1).to(torch.float64)
                stops += [Stop(t, i, x) for t, x in zip(listed(moments), moments.unbind())]
        stops = [x for x in stops if sign * times[0] <= sign * x.t < sign * times[-1]]
        stops.sort(key=lambda x: sign * x.t)
        return cls(events, [i for i, event in enumerate(events) if isinstance(event, Event)], stops)

    @property
    def directions(self) -> tuple[int, ...] | None:
        found = tuple(event.direction for event in self.all if isinstance(event, Event))
        return found if any(found) else None

    def conditions(self, layout: Layout, which: list[int] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Conditions on the flat state: `(t, y) -> (m,)`.

        Args:
            which: indices of events; None for all that have one.
        """
        calls = [(i, self.all[i].condition) for i in (self.watched if which is None else which)]  # type: ignore[union-attr]

        def values(t: Tensor, y: Tensor) -> Tensor:
            h = layout.unflatten(y)
            found = [_one(i, condition(t, h)) for i, condition in calls]
            return found[0] if len(found) == 1 else torch.cat(found)

        return values

    def affected(self, i: int, t: Tensor, h: Any, layout: Layout) -> Any:
        """What event i makes of the state h at a time t, 0-d.

        Raises:
            BadShape, BadDtype: it is not like h.
        """
        affect = self.all[i].affect
        if affect is None:
            return h
        leaves = layout.result_leaves(h)
        versions = [0 if x.is_inference() else x._version for x in leaves]
        out = affect(t, h)
        what = f"affect of events[{i}]"
        if versions != [0 if x.is_inference() else x._version for x in leaves]:
            raise BadShape(f"{what} changed h in place; it must leave h as it is and return the new state.")
        if out is None:
            raise BadShape(f"{what} returned None; it must return the new state, like h0.")
        try:
            made = layout.result_leaves(out)
        except BadShape as error:
            raise BadShape(str(error).replace("what f returned", f"what {what} returned")) from None
        for k, (x, shape, dtype) in enumerate(zip(made, layout.shapes, layout.dtypes)):
            part = f"tensor {k} of what {what} returned" if len(made) > 1 else f"what {what} returned"
            if not isinstance(x, Tensor) or x.shape != shape:
                got = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise BadShape(f"{part} is {got}; the state has the shape {tuple(shape)} there.")
            if x.dtype != dtype or x.device != layout.device:
                got = f"has dtype {x.dtype}" if x.dtype != dtype else f"lies on {x.device}"
                raise BadDtype(f"{part} {got}; the state has {dtype} on {layout.device} there.")
        return made[0] if layout.spec.is_leaf() else torch.utils._pytree.tree_unflatten(list(made), layout.spec)


def _one(i: int, value: Any) -> Tensor:
    """The value of a condition, (1,)."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise BadShape(
            f"condition of events[{i}] must return one number for the whole state, a tensor of one element; got {got}. "
            "Several conditions are several Events, or the smallest of them; for an event of each system of a batch "
            "use event_fn with options['batch_dims']."
        )
    if not value.is_floating_point():
        raise BadDtype(
            f"condition of events[{i}] must return a floating-point number, whose crossing of zero is the event; got "
            f"{value.dtype}."
        )
    return value.reshape(1)
