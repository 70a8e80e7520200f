"""The event that ended a solve, as a differentiable function of all that moves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gradients import REPLAYS, undifferentiable
from ..native import engine as native
from ..problem import ODEProblem


def crossing(p: ODEProblem, record: Any, gradient: str | None) -> tuple[Tensor, Tensor]:
    """Event time (0-d) and state (n,), with gradients by the implicit function theorem.

    The event moves with everything that moves `event_fn(t, y(t))`. Newton's iteration on it, from the event itself and
    with its slope held, changes no value and makes one more order of derivative exact each time (Chen, Amos & Nickel
    2021, theorem 1, is the first).
    """
    if p.rows is not None:
        return native.crossing(p, record, gradient)
    y = record.ys[-1]
    t = p.t.detach().new_tensor(record.event_t)
    assert p.event_fn is not None
    if not torch.is_grad_enabled():
        return t, y
    recorded = gradient is None and p.method.kind != "scipy"
    step = record.last if recorded or gradient in REPLAYS else None
    with torch.no_grad():
        slope = native.slope(p, t.to(y), y) if step is None else native.output_slope(p, step, record.event_t)
    at, state = t.to(torch.float64).clone(), y
    for _ in range(2 if recorded else 1):
        value = p.event_fn(at.to(y), state).reshape(-1)
        with torch.enable_grad():
            point, moment = y.detach().requires_grad_(), t.to(y).clone().requires_grad_()
            c = p.event_fn(moment, point).reshape(-1)
            which = int(c.detach().abs().argmin())
            dt, dy = (
                torch.autograd.grad(c[which], (moment, point), allow_unused=True) if c.requires_grad else (None, None)
            )
        rate = (0.0 if dt is None else float(dt)) + (0.0 if dy is None else float(dy @ slope))
        if not value.requires_grad and not (y.requires_grad and rate == 0.0):
            return t, y
        if rate == 0.0:
            at, state = undifferentiable(
                f"event_fn does not change along the solution at the event (t={float(t):.6g}): the event's time has no "
                "derivative there (it grazes zero, or event_fn is not differentiable).",
                at,
                y,
                of=(value,),
            )
            break
        residual = value[which].to(torch.float64)
        at = at - (residual - residual.detach()) / rate
        if recorded and step is not None:
            state = native.output_at(p, step, at)
        else:
            state = y + slope * (at - at.detach()).to(y)
    return at.to(t), state
