"""The event that ended a solve, as a differentiable function of all that moves it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import gradients
from ..gradients import REPLAYS, undifferentiable
from ..native import engine as native
from ..problem import ODEProblem, like
from ..solution import Stats


def crossing(p: ODEProblem, record: Any, gradient: str | None) -> tuple[Tensor, Tensor]:
    """Event time (0-d) and state (n,), with gradients by the implicit function theorem.

    The event moves with everything that moves `event_fn(t, y(t))`. Newton's iteration on it, from the event itself and
    with its slope held, changes no value and makes one more order of derivative exact each time (Chen, Amos & Nickel
    2021, theorem 1, is the first).
    """
    if p.rows is not None:
        return native.crossing(p, record, gradient)
    if p.swept is not None and p.batch > 1:
        return native.crossing_of_sweep(p, record)
    y = record.ys[-1]
    t = p.t.detach().new_tensor(record.event_t)
    event_fn = p.event_fn
    assert event_fn is not None
    if not torch.is_grad_enabled():
        return t, y
    recorded = gradient is None and p.method.kind != "scipy"
    step = record.last if recorded or gradient in REPLAYS else None
    with torch.no_grad():
        slope = native.slope(p, t.to(y), y) if step is None else native.output_slope(p, step, record.event_t)
    at, state = t.to(torch.float64).clone(), y
    for _ in range(2 if recorded else 1):
        value = event_fn(at.to(y), state).reshape(-1)
        which = int(value.detach().abs().argmin()) if len(value) > 1 else 0
        speed = rate(lambda t, y: event_fn(t, y).reshape(-1)[which], t.to(y), y, slope)  # noqa: B023
        if not value.requires_grad and not (y.requires_grad and speed == 0.0):
            return t, y
        if speed == 0.0:
            at, state = undifferentiable(
                f"event_fn does not change along the solution at the event (t={float(t):.6g}): the event's time has no "
                "derivative there (it grazes zero, or event_fn is not differentiable).",
                at,
                y,
                of=(value,),
            )
            break
        residual = value[which].to(torch.float64)
        at = at - (residual - residual.detach()) / speed
        if recorded and step is not None:
            state = native.output_at(p, step, at)
        else:
            state = y + slope * (at - at.detach()).to(y)
    return at.to(t), state


@torch.enable_grad()
def rate(g: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor, slope: Tensor) -> float:
    """dg/dt along a solution, by autograd.

    Args:
        g: `g(t, y)` -> 0-d. slope: (n,), dy/dt at (t, y).

    Returns:
        0 where g is not differentiable.
    """
    point, moment = y.detach().requires_grad_(), t.detach().clone().requires_grad_()
    value = g(moment, point)
    if not value.requires_grad:
        return 0.0
    dt, dy = torch.autograd.grad(value, (moment, point), allow_unused=True)
    return (0.0 if dt is None else float(dt)) + (0.0 if dy is None else float(dy @ slope))


def leg(engine: gradients.Engine, p: ODEProblem, stats: Stats, gradient: str | None, needed: bool, dense: bool) -> Any:
    """Solve `p` over its times, or until its event, which is then the last of the record's states.

    An engine that does not do so itself is asked for the event first, and then for the solve up to that time, as for
    any other solve and its gradient.

    Args:
        gradient, needed, dense: as in `gradients.solve`.
    """
    find = getattr(engine, "first_event", None)
    if p.event_fn is None or find is None:
        return gradients.solve(engine, p, stats, gradient, needed, dense)
    with torch.no_grad():
        found = find(p, stats)
    if not (dense or (needed and torch.is_grad_enabled())) and len(p.times) == 2:
        return found
    end, passed, nothing = found.event_t, len(p.times), {"event_fn": None, "onward": False}
    q = like(p, **nothing)
    if end is not None:
        sign = p.direction
        passed = bisect.bisect_left(p.times, sign * end, key=lambda t: sign * t)
        if passed == 0:  # it is at the start
            return like(found, ys=torch.stack([p.y0, p.y0]), passed=1)
        if p.times[passed : passed + 1] == [end]:  # after an output at that very time
            end, passed = math.nextafter(end, sign * math.inf), passed + 1
        q = like(p, **nothing, times=[*p.times[:passed], end], t=torch.cat([p.t[:passed], p.t.new_tensor([end])]))
    accepted, rejected = stats.naccept, stats.nreject
    record = gradients.solve(engine, q, stats, gradient, needed, dense)
    stats.naccept, stats.nreject = stats.naccept + accepted, stats.nreject + rejected
    p.params, p.makes_leaves = q.params, q.makes_leaves
    return like(record, event_t=end, passed=passed, fired=found.fired, sizes=found.sizes)
