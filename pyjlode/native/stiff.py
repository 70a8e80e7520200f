"""The integration loop of the adaptive implicit methods: attempts that may fail, and the sizes of the next ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ends import no_event, stops, too_many_steps, too_small
from ..errors import NonFiniteState, NotConverged
from ..methods.stiff import EsdirkTableau, NDFTableau, RadauTableau, RosenbrockTableau
from ..numbers import derivatives
from ..problem import Field, ODEProblem, is_finite
from ..solution import Stats
from . import controller
from .auto import Auto
from .bdf import Bdf
from .esdirk import Esdirk
from .linear import Linear
from .newton import POLISH_RECORDED, POLISH_REPLAY
from .radau import Radau
from .rosenbrock import Rosenbrock
from .step import Interval, Step, length
from .stiffness import Maker, linked


def maker(p: ODEProblem, stats: Stats) -> Maker:
    """Makes the steps of the problem's method."""
    tab = p.method.tableau
    if isinstance(tab, RosenbrockTableau):
        return Rosenbrock(p, stats, tab)
    if isinstance(tab, EsdirkTableau):
        return Esdirk(p, stats, tab)
    if isinstance(tab, RadauTableau):
        return Radau(p, stats, tab)
    if isinstance(tab, NDFTableau):
        return Bdf(p, stats, tab)
    return Auto(p, stats)


def replayer(p: ODEProblem) -> Callable[[Interval, Tensor, Any], Step]:
    """The step function (interval, y, data) -> step, under autograd, from what `kept` steps hold."""
    made = maker(p, Stats("", "", ""))
    return lambda interval, y, data: made.again(interval, y, data, POLISH_REPLAY)


def stiff_steps(p: ODEProblem, stats: Stats, record: Any, recorded: bool, tracked: bool, end: float) -> Iterator[Step]:
    """Accepted steps of an adaptive implicit method, from `p.times[0]` to `end` (infinite: for ever).

    Args:
        record: its `next_dt` is kept up to date.
        recorded: autograd follows the solve. Attempts are made without it; a step that counts is made again with it.
    """
    o, sign = p.options, p.direction
    t, y = p.times[0], p.y0
    if t == end:
        return
    with torch.enable_grad():
        at: float | Tensor = p.t[0].to(torch.float64) if tracked else t
    ends, jumps = stops(p, end), set(o.jump_t)
    dt = first_size(p, abs(end - t))
    polish = max(POLISH_RECORDED, derivatives()) if p.transformed else POLISH_RECORDED
    make = maker(replace(p, f0=None if p.f0 is None else p.f0.detach()), stats)
    after_jump, err, why, n = False, 0.0, "", 0
    before: Any = None
    while t != end:
        if n == o.max_num_steps:
            raise too_many_steps(p, t, dt, end)
        n += 1
        dt = min(max(dt, o.min_step), o.max_step)
        t1, stop = t + sign * dt, ends[0]
        # A step that would end just short of a stop ends on it: no sliver is left over.
        if sign * (t1 - stop) >= -1e-10 * dt:
            t1 = stop
        # Floating-point time has nothing in between, or so little that dt is mostly rounding.
        if t1 == t or (t1 != stop and abs(t1 - t) < 10 * math.ulp(t) and dt > o.min_step):
            raise failed(p, t, sign * dt, err, why)
        if math.isinf(t1):
            raise no_event(p, t, sign * dt)
        reach = t1 - t
        shown = y if recorded else y.detach()
        if p.callbacks.step:
            p.callbacks.step(t, shown, reach)
        interval = Interval(t, t1, t, reach, after_jump, t1 in jumps)
        with torch.no_grad():
            step, err, why = make.attempt(interval, y.detach())
        if step is not None and (err <= 1 or (abs(reach) <= o.min_step and math.isfinite(err))):
            stats.naccept += 1
            if p.callbacks.accept:
                p.callbacks.accept(t, shown, reach)
            with torch.no_grad():
                dt = abs(reach) * make.accept(err, abs(reach))
            record.next_dt = dt
            with torch.enable_grad():
                if tracked:
                    h = length(p, at, t1, reach, end, stop)
                    interval = interval._replace(at=at, dt=h)
                    at = at + h
            if recorded:
                step = before = make.again(interval, y, linked(getattr(step, "data", None), before), polish)
            elif tracked:
                step.interval = interval
            yield step
            t, y = t1, step.y1
            after_jump = t in jumps
            if t == stop:
                ends.pop(0)
        else:
            stats.nreject += 1
            if p.callbacks.reject:
                p.callbacks.reject(t, shown, reach)
            if abs(reach) <= o.min_step:
                raise failed(p, t, reach, err, why)
            with torch.no_grad():
                dt = abs(reach) * make.reject(err, abs(reach))


@torch.no_grad()
def first_size(p: ODEProblem, span: float) -> float:
    """Size of the first step. With a mass matrix the slope is that of the components that have one."""
    o = p.options
    f0 = p.f(p.time(p.times[0]), p.y0) if p.f0 is None else p.f0.detach()
    if not is_finite(f0):
        t = p.times[0]
        raise NonFiniteState(f"f returned NaN or infinity at the start, t={t:.6g}.", t=t, dt=0.0)
    limit = min(o.max_step, span)
    if o.first_step:
        return min(o.first_step, limit)
    if p.mass is not None:
        linear, f = Linear(p, Stats("", "", "")), p.f
        p = replace(p, f=Field(lambda t, y: linear.slope(f(t, y))))
        f0 = linear.slope(f0)
    return controller.initial_step(p, f0, p.method.start_order, limit)


def failed(p: ODEProblem, t: float, dt: float, err: float, why: str) -> Exception:
    if not why or "NaN" in why:
        return too_small(p, t, dt, err)
    return NotConverged(
        f"{p.method.name}: the equations of the step from t={t:.9g} were not solved, however small the step (tried: "
        f"dt={dt:.3g}): {why}. f may jump there (name the time in options['jump_t']), its Jacobian may be wrong "
        "(jac=), or, with a mass matrix, the system may be of an index above 1 there.",
        t=t,
        dt=dt,
    )
