"""Step-size control: the first step, and the next one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..problem import ODEProblem, SolverOptions


@torch.no_grad()
def initial_step(p: ODEProblem, f0: Tensor, order: int, limit: float) -> float:
    """Size of the first step: Hairer, Nørsett & Wanner, Solving ODEs I, II.4, "Starting Step Size", in the unit of time
    that the start has itself, |y| / |f| or |f| / |f'|, so that a change of units changes nothing.

    Args:
        f0: slope at t0, shape (n,).
        order: of the local error of the method.
        limit: no longer than this (the time span, `max_step`).
    """
    scale = p.atol + p.y0.abs() * p.rtol
    d0, d1 = p.norm(p.y0 / scale), p.norm(f0 / scale)
    span = limit if math.isfinite(limit) else abs(p.times[1] - p.times[0])
    h0 = 1e-6 * span
    if d1 and d1 * span > 1e-10:
        # From a start that is next to nothing the state may go far beyond the tolerance, but not at once.
        h0 = 0.01 * d0 / d1 if d0 >= 1e-5 else min(h0, 1e4 / d1)
    h0 = min(h0, limit)
    dt = math.copysign(h0, p.direction)
    f1 = p.f(p.time(p.times[0] + dt), p.y0 + dt * f0)
    d2 = p.norm((f1 - f0) / scale) / h0 if h0 else 0.0
    if not math.isfinite(d2):  # the trial step already left the domain of f
        return h0 * 1e-3
    unit = min(100 * h0, max(d1 / d2, h0)) if d2 else 100 * h0
    d = max(d1 * unit, d2 * unit * unit)
    h1 = unit * (0.01 / d) ** (1 / order) if d > 1e-15 else unit
    return min(100 * h0, h1, limit)


# Below this the step is far from the tolerance: nothing to smooth, and the I controller gets there sooner.
FAR = 0.1


def next_factor(
    err: float, previous: float, accepted: bool, order: int, pi: tuple[float, float], o: SolverOptions
) -> float:
    """Factor from this step size to the next: PI control after an accepted step near the tolerance, else I control.

    Gustafsson, Control theoretic techniques for stepsize selection in explicit Runge-Kutta methods, ACM TOMS 17 (1991);
    Söderlind, Digital filters in adaptive time-stepping, ACM TOMS 29 (2003). Both controllers aim at the same error,
    `safety**order`, so that the choice between them does not change what `safety` means.

    Args:
        err: norm of the error over the tolerance, of this step; not negative, may be infinite or NaN.
        previous: the same of the last accepted step.
        order: of the local error.
        pi: (beta1, beta2); (1 / order, 0) is I control.
    """
    if err == 0:
        return o.ifactor
    if not accepted:
        return max(o.dfactor, min(1.0, o.safety * err ** (-1 / order))) if math.isfinite(err) else o.dfactor
    beta1, beta2 = pi if err > FAR else (1 / order, 0.0)
    factor = o.safety ** (order * (beta1 - beta2)) * err**-beta1 * previous**beta2
    return min(o.ifactor, max(o.dfactor, factor))
