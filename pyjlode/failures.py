"""What a failed solve says: the same words whichever engine failed."""

from __future__ import annotations

import math

from .errors import EventNotFound, MaxStepsReached, NonFiniteState, StepSizeTooSmall
from .problem import ODEProblem

_STIFF = "method='radauIIA5' or 'trbdf2' with options={'step_size': ...}"


def too_small(p: ODEProblem, t: float, dt: float, err: float) -> StepSizeTooSmall | NonFiniteState:
    if not math.isfinite(err):
        return NonFiniteState(
            f"f or the state is NaN or infinite just after t={t:.9g}, however small the step (tried: dt={dt:.3g}). "
            "f leaves its domain there, or the solution blows up at that time.",
            t=t,
            dt=dt,
        )
    return StepSizeTooSmall(
        f"{p.method.name}: at t={t:.9g} the tolerance (rtol, atol) asks for steps below dt={dt:.3g}, which no longer "
        "moves t or is at min_step. The problem is stiff, f jumps there, or the solution blows up. If it is stiff use "
        f"an implicit method: {_STIFF}. If f jumps at known times, list them in options['jump_t'].",
        t=t,
        dt=dt,
    )


def too_many_steps(p: ODEProblem, t: float, dt: float, end: float) -> MaxStepsReached | EventNotFound:
    if math.isinf(end):
        return no_event(p, t, dt)
    return MaxStepsReached(
        f"{p.method.name}: max_num_steps={p.options.max_num_steps} steps did not reach t={end:.6g}; the solve is at "
        f"t={t:.6g} with dt={dt:.3g}. If steps are this small because the problem is stiff, use {_STIFF}; otherwise "
        "loosen rtol and atol or raise options['max_num_steps'].",
        t=t,
        dt=dt,
    )


def no_event(p: ODEProblem, t: float, dt: float) -> EventNotFound:
    return EventNotFound(
        f"event_fn did not cross zero up to t={t:.6g} (dt={dt:.3g}); the solve ends here. Check its sign and the "
        "direction of time (t[1] against t[0], or reverse_time), or raise options['max_num_steps'].",
        t=t,
        dt=dt,
    )
