"""The integration loop: methods make steps, and here they meet outputs, events and callbacks."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ends import no_event, stops, too_many_steps, too_small
from ..errors import BadOption, NonFiniteState
from ..methods.explicit import ExplicitTableau
from ..numbers import listed, on_host, rows
from ..problem import Callbacks, ODEProblem, is_finite
from ..solution import Stats
from . import controller
from .checkpoints import All, Keeper
from .events import EventFinder
from .explicit import Crawl, ExplicitRK, ExplicitStep
from .implicit import ImplicitRK
from .interpolation import DenseOutput, output
from .multistep import Adams
from .reversible import Other, Reversible
from .second import Second
from .step import Interval, Step, length
from .stiff import replayer, stiff_steps

OnStep = Callable[[Step], None]


class Head(NamedTuple):
    """The graph of the first steps of a solve, from `y0` to the end of the last of them.

    Attributes:
        steps: how many.
        y1: (n,) the state after them.
        ys: (m, n) outputs within them, without that at the start.
    """

    steps: int
    y1: Tensor
    ys: Tensor | None


@dataclass
class Record:
    """What a solve leaves behind.

    Attributes:
        ys: (T, n) states at the output times; with an event, at the start and at the event.
        kept: the accepted steps, as far as they were to be kept.
        head: the graph of the first of them, where they were recorded.
        dense: the dense output, (M,) times -> (M, n), where it was to be kept.
        event_t: time of the event.
        passed: how many of the output times lie before the event, the start among them.
        fired: which elements of the event function crossed zero there.
        sizes: the largest magnitude that each of these elements was seen to have.
        event: the same as a 0-d tensor with its derivatives, under a transform; then each sample has its own.
        size: (n,) the largest value of each element at the ends of steps, where the solve has a continuous adjoint.
        nodes: times of a grid that was the user's own, for the same.
        next_dt: size of the step that would come next (adaptive methods).
        restart: of explicit ones the same, had the last step not been cut short by a stop.
        last: the step that the event lies in.
    """

    ys: Tensor
    kept: Keeper
    head: Head | None = None
    dense: Any = None
    event_t: float | None = None
    passed: int = 1
    fired: tuple[int, ...] = ()
    sizes: tuple[float, ...] = ()
    event: Tensor | None = None
    size: Tensor | None = None
    nodes: list[float] | None = None
    next_dt: float | None = None
    restart: float | None = None
    last: Step | None = None


def solve(
    p: ODEProblem,
    stats: Stats,
    *,
    recorded: float = 0,
    steps: Keeper | None = None,
    dense: bool = False,
    on_step: OnStep | None = None,
) -> Record:
    """Integrate `p` over its times, or until its event.

    Args:
        recorded: how many of the first steps autograd records; where it does not, buffers are used again. All of them
            where the problem is `transformed`, whose levels of derivatives are others than autograd's.
        steps: keeps what is needed to take the steps again.
        dense: keep the dense output.
        on_step: called with each accepted step while its data are alive.
    """
    if p.transformed:
        recorded = math.inf
    # An f that is watched is called with gradients on, to see whether something in it needs one: as all else is here,
    # where nothing else in a step would be recorded for that.
    on = recorded > 0 or (p.f.watched and not p.method.controlled)
    with contextlib.nullcontext() if p.transformed else torch.set_grad_enabled(on):
        record = _solve(p, stats, recorded, steps, dense, on_step)
    if not is_finite(record.ys.detach()):
        raise _non_finite_output(p, record.ys)
    return record


def _solve(
    p: ODEProblem, stats: Stats, recorded: float, keeper: Keeper | None, keep_dense: bool, on_step: OnStep | None
) -> Record:
    sign, times = p.direction, p.times
    # Where the user's t requires grad, steps carry their times as tensors with a graph back to it.
    tracked = p.moving and (recorded > 0 or keeper is not None)
    ordered = [sign * t for t in times]
    finder = EventFinder(p) if p.event_fn is not None else None
    endless = finder is not None and not p.onward
    record = Record(p.y0, All() if keeper is None else keeper)
    steps = make_steps(p, stats, record, recorded, tracked, keep_dense, sign * math.inf if endless else times[-1])
    if p.adjoint:
        record.size = p.y0.detach().abs()
        record.nodes = [times[0]] if p.options.grid_constructor else None
    blocks, dense = [p.y0[None]], []
    i, n = 1, 0  # next output, number of the step
    step = None
    for step in steps:
        n += 1
        interval = step.interval
        if keep_dense:
            dense.append(step)
        if keeper is not None:
            keeper.add(step)
        if on_step:
            on_step(step)
        if record.size is not None:
            record.size = torch.maximum(record.size, step.y1.detach().abs())
            if record.nodes is not None:
                record.nodes.append(interval.t1)

        if finder:
            record.event_t = finder.look(step)
            if record.event_t is not None:
                j = i if endless else bisect.bisect_right(ordered, sign * record.event_t, i)
                if j > i:
                    blocks.append(output(p, step, p.t[i:j] if tracked else times[i:j]))
                blocks.append(output(p, step, [record.event_t]))
                record.last, record.passed, record.fired = step, j, finder.margin.fired
                break

        j = i if endless else bisect.bisect_right(ordered, sign * interval.t1, i)
        if j > i:
            at_end = times[j - 1] == interval.t1 and is_node(p, j - 1, tracked)
            inside = slice(i, j - at_end)
            if inside.stop > inside.start:
                wanted = p.t[inside] if tracked else times[inside]
                blocks.append(output(p, step, wanted))
            if at_end:
                blocks.append(step.y1[None])
            i = j
        if n == recorded:
            record.head = Head(n, step.y1, torch.cat(blocks[1:]) if blocks[1:] else None)
            blocks = [block.detach() for block in blocks]
            torch.set_grad_enabled(False)
    if step is not None and 0 < n < recorded < math.inf:
        record.head = Head(n, step.y1, torch.cat(blocks[1:]) if blocks[1:] else None)
    if finder:
        record.sizes = tuple(finder.margin.sizes)
    record.ys = torch.cat(blocks) if recorded == math.inf else torch.cat(blocks).detach()
    record.dense = DenseOutput(dense) if dense else None
    return record


def make_steps(
    p: ODEProblem, stats: Stats, record: Record, recorded: float, tracked: bool, keep: bool, end: float
) -> Iterator[Step]:
    """Accepted steps from `p.times[0]` to `end` (infinite: for ever)."""
    if p.method.controlled:
        return stiff_steps(p, stats, record, recorded > 0, tracked, end)
    if p.method.kind == "adaptive":
        return adaptive_steps(p, stats, record, recorded, tracked, keep, end)
    return fixed_steps(p, stats, recorded, tracked, keep)


def is_node(p: ODEProblem, i: int, tracked: bool) -> bool:
    """Whether a step that ends at the value of output time i is one that ends at that time by design.

    The difference is the derivative in time: the state at a node that moves with `t[i]`, or the dense output as `t[i]`
    moves past a node that does not.
    """
    return not tracked or i == len(p.times) - 1 or (not p.method.adaptive and p.options.step_size is None)


def stepper(p: ODEProblem, *, recorded: bool) -> Callable[[Interval, Tensor, Any], Step]:
    """The step function of the problem's method: (interval, y, past) -> step; `data` in place of a past for those of
    `stiff_steps`."""
    if p.method.controlled:
        return replayer(p)
    if p.method.kind == "implicit":
        implicit = ImplicitRK(p, recorded=recorded)
        return lambda interval, y, past: implicit.step(interval, y)
    if p.method.kind == "adams":
        return Adams(p, recorded=recorded).step
    if p.method.kind == "second":
        second = Second(p, recorded=recorded)
        return lambda interval, y, past: second.step(interval, y)
    if p.method.kind == "reversible":
        return Reversible(p, recorded=recorded).step
    rk = ExplicitRK(p, recorded=recorded)
    return lambda interval, y, past: rk.step(interval, y, None, estimate=False)


def adaptive_steps(
    p: ODEProblem, stats: Stats, record: Record, recorded: float, tracked: bool, keep: bool, end: float
) -> Iterator[ExplicitStep]:
    """Accepted steps of an embedded pair, from `p.times[0]` to `end` (infinite: for ever)."""
    o, sign = p.options, p.direction
    tab = p.method.tableau
    assert isinstance(tab, ExplicitTableau)
    rk: Any = p.compiled or ExplicitRK(p, recorded=recorded > 0, keep=keep)
    order = tab.error_order + 1
    t, y = p.times[0], p.y0
    if t == end:
        return
    with torch.enable_grad():
        at: float | Tensor = p.t[0].to(torch.float64) if tracked else t
    ends = stops(p, end)
    jumps = set(o.jump_t)

    k0 = p.f0
    if k0 is None or tracked or 0 < recorded < math.inf:
        k0 = p.f(at.to(y) if isinstance(at, Tensor) else p.time(t), y)
    if not is_finite(k0.detach()):
        raise NonFiniteState(f"f returned NaN or infinity at the start, t={t:.6g}.", t=t, dt=0.0)
    limit = min(o.max_step, abs(end - t))
    dt = min(o.first_step or controller.initial_step(p, k0.detach(), order, limit), limit)

    err, previous, abs_y = 0.0, 1.0, y.detach().abs()
    after_jump, n, made = False, 0, 0
    crawl = Crawl(tab) if p.layout else None
    called, shown = p.callbacks != Callbacks(), y
    rejected = math.nan  # where a step from here ended that was not accepted
    while t != end:
        if n == o.max_num_steps:
            raise too_many_steps(p, t, dt, end)
        n += 1
        dt = min(max(dt, o.min_step), o.max_step)
        t1, wanted = t + sign * dt, dt
        stop = ends[0]
        # A step that would end just short of a stop ends on it: no sliver is left over.
        if sign * (t1 - stop) >= -1e-10 * dt:
            t1 = stop
        if t1 in (t, rejected):  # floating-point time has nothing in between
            raise too_small(p, t, sign * dt, err)
        if math.isinf(t1):
            raise no_event(p, t, sign * dt)
        reach, start = t1 - t, at
        h: float | Tensor = reach
        if tracked:
            with torch.enable_grad():
                h = length(p, at, t1, reach, end, stop)
        if called:
            shown = y if recorded == math.inf else y.detach()
        if p.callbacks.step:
            p.callbacks.step(t, shown, reach)
        step = rk.step(Interval(t, t1, at, h, after_jump, t1 in jumps), y, k0)
        if p.compiled:
            abs_y1, err = abs_y, step.err
        else:
            with torch.no_grad():
                abs_y1 = step.y1.abs()
                err = step.error(p.rtol, p.atol, abs_y, abs_y1)
        accepted = err <= 1 or (abs(reach) <= o.min_step and math.isfinite(err))
        if accepted:
            stats.naccept += 1
            if p.callbacks.accept:
                p.callbacks.accept(t, shown, reach)
            dt = abs(reach) * controller.next_factor(err, previous, True, order, p.method.pi, o)
            previous, rejected = max(err, 1e-4), math.nan
            record.next_dt, record.restart = dt, max(dt, wanted) if t1 == stop else dt
            yield step
            t, y, abs_y = t1, step.y1, abs_y1
            at = t
            if tracked:
                with torch.enable_grad():
                    at = start + h
            if t == end:
                return
            after_jump = t in jumps
            k0 = None if after_jump else step.f1
            made += 1
            if crawl and k0 is not None:
                crawl.look(made, step, end)
            if made == recorded:
                rk = ExplicitRK(p, keep=keep)
                y, k0 = y.detach(), None if k0 is None else k0.detach()
            if t == stop:
                ends.pop(0)
        else:
            stats.nreject += 1
            if p.callbacks.reject:
                p.callbacks.reject(t, shown, reach)
            if abs(reach) <= o.min_step:
                raise too_small(p, t, reach, err)
            rejected = t1
            dt = abs(reach) * controller.next_factor(err, previous, False, order, p.method.pi, o)
            k0 = step.f0


def fixed_steps(p: ODEProblem, stats: Stats, recorded: float, tracked: bool, keep: bool) -> Iterator[Step]:
    """Steps of a method without error control, over its grid."""
    o = p.options
    implicit = ImplicitRK(p, recorded=recorded > 0) if p.method.kind == "implicit" else None
    adams = Adams(p, recorded=recorded > 0) if p.method.kind == "adams" else None
    second = Second(p, recorded=recorded > 0) if p.method.kind == "second" else None
    reversible, other = Reversible(p, recorded=recorded > 0) if p.method.kind == "reversible" else None, Other(None)
    rk = None
    if p.method.kind == "fixed":
        rk = p.compiled or ExplicitRK(p, recorded=recorded > 0, keep=keep)
    y, past = p.y0, None
    f0 = p.f0 if not (tracked or o.perturb or 0 < recorded < math.inf) else None
    known = None if f0 is None or second is None else f0[second.n :]
    for n, interval in enumerate(_grid(p, tracked)):
        if second and n == 0:
            second.check()
        if rk and n == recorded > 0:
            rk, y = ExplicitRK(p, keep=keep), y.detach()
        if p.callbacks.step:
            p.callbacks.step(interval.t0, y if recorded == math.inf else y.detach(), interval.t1 - interval.t0)
        step: Step
        if rk:
            step = rk.step(interval, y, f0)
        elif implicit:
            step = implicit.step(interval, y)
            stats.njac = implicit.njac
        elif second:
            step = second.step(interval, y, known)
            known = step.end
        elif reversible:
            step = reversible.step(interval, y, other)
            other = Other(step.left)
        else:
            assert adams
            step = adams.step(interval, y, past)
            past = step.past
        stats.naccept += 1
        yield step
        y, f0 = step.y1, None
    if reversible and other.start is not None:
        reversible.look_apart(y, other.start)


def _grid(p: ODEProblem, tracked: bool) -> Iterator[Interval]:
    o, sign, times = p.options, p.direction, p.times
    if o.step_size is not None:
        t0 = times[0]
        n = math.inf
        if p.event_fn is None or p.onward:
            n = max(1, math.ceil(abs(times[-1] - t0) / o.step_size - 1e-9)) if len(times) > 1 else 0
        elif o.grid_constructor:
            raise BadOption("with event_fn a fixed-step method needs options['step_size'], not a grid.")
        if math.inf > n > o.max_num_steps:
            raise too_many_steps(p, t0, o.step_size, times[-1])
        i = 0
        with torch.enable_grad():
            at: float | Tensor = p.t[0].to(torch.float64) if tracked else t0
        while i < n:
            if i == o.max_num_steps:
                raise no_event(p, t0 + sign * i * o.step_size, sign * o.step_size)
            start, stop = t0 + sign * i * o.step_size, t0 + sign * (i + 1) * o.step_size
            if i + 1 == n:
                stop = times[-1]
            h: float | Tensor = stop - start
            with torch.enable_grad():
                if tracked:
                    h = p.t[-1].to(torch.float64) - at if i + 1 == n else on_host(h)
            yield Interval(start, stop, at, h, o.perturb, o.perturb)
            with torch.enable_grad():
                at = at + h if tracked else stop
            i += 1
        return
    if p.event_fn is not None and not p.onward:
        raise BadOption(f"{p.method.name} with event_fn needs options={{'step_size': ...}}: it has no grid of its own.")
    with torch.enable_grad():
        made = o.grid_constructor(p.t) if o.grid_constructor else p.t
        grid = listed(made) if o.grid_constructor else times
        nodes: Sequence[float | Tensor] = made.to(torch.float64).unbind() if tracked else grid
    if o.grid_constructor:
        steps = [sign * (b - a) for a, b in zip(grid, grid[1:])]
        if not grid or grid[0] != times[0] or grid[-1] != times[-1] or not all(s > 0 for s in steps):
            raise BadOption(
                "options['grid_constructor'] must return times that run strictly from t[0] to t[-1]; it returned "
                f"{len(grid)} times{f' from {grid[0]:.6g} to {grid[-1]:.6g}' if grid else ''}."
            )
    for a, b, at, to in zip(grid, grid[1:], nodes, nodes[1:]):
        with torch.enable_grad():
            h = to - at
        yield Interval(a, b, at, h, o.perturb, o.perturb)


def _non_finite_output(p: ODEProblem, ys: Tensor) -> NonFiniteState:
    """Which output went bad first, and in which step: the solve is repeated, looking at every step."""
    good = torch.isfinite(rows(ys)).all(2).all(0) if p.transformed else torch.isfinite(ys).all(1)
    bad = int((~good).nonzero()[0, 0]) if ys.shape[1] else 0
    times = p.times
    message = f"the state is NaN or infinite at the output t={times[min(bad, len(times) - 1)]:.6g}"
    t, dt = times[min(bad, len(times) - 1)], 0.0
    if not p.method.adaptive and bad:
        again = replace(p, f0=None, callbacks=type(p.callbacks)())
        with torch.no_grad():
            for i, step in enumerate(fixed_steps(again, Stats("", "", ""), 0, False, True)):
                if not is_finite(step.y1):
                    t, dt = step.interval.t0, step.interval.t1 - step.interval.t0
                    message += f": it went bad in step {i + 1}, from t={t:.6g} with dt={dt:.3g}"
                    break
    return NonFiniteState(
        f"{p.method.name}: {message}. Steps too long for the problem blow up like this: use smaller ones, an adaptive "
        "method, or a domain in which f is finite.",
        t=t,
        dt=dt,
    )
