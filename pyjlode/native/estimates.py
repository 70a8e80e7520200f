"""What a solver estimates as it goes, the local error and the stiffness, as functions of all that the solve depends on:
a model that has them in its loss learns a field that is cheap to solve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..errors import BadOption
from ..problem import ODEProblem
from ..solution import Stats
from .explicit import ExplicitStep
from .step import Step


class Estimates:
    """Adds up the estimates of the accepted steps of one solve in its `Stats`.

    Source: Pal, Ma, Shah & Rackauckas, Opening the blackbox: accelerating neural differential equations by regularizing
    internal solver heuristics, 2021, section 3.
    """

    def __init__(self, p: ODEProblem, stats: Stats) -> None:
        self.stats = stats
        self.error = self.stiffness = p.y0.new_zeros(())
        self._tell()

    def add(self, step: Step) -> None:
        assert isinstance(step, ExplicitStep)
        length = abs(step.interval.t1 - step.interval.t0)
        self.error = self.error + length * local_error(step)
        self.stiffness = self.stiffness + stiffness(step)
        self._tell()

    def _tell(self) -> None:
        self.stats.error_estimate, self.stats.stiffness_estimate = self.error, self.stiffness


def local_error(step: ExplicitStep) -> Tensor:
    """The root mean square of the estimated local error, 0-d, in the units of the state."""
    rk = step.rk
    K, dt = step.K.head(rk.s + rk.fsal), rk.size(step.interval)
    errors = [_rms(torch.mv(K, row) * dt) for row in rk.c.E]
    if len(errors) == 1:
        return errors[0]
    # As the step size control has it for DOP853.
    fifth, third = errors
    both = torch.hypot(fifth, 0.1 * third)
    return torch.where(both > 0, fifth * fifth / torch.where(both > 0, both, 1), 0)


def stiffness(step: ExplicitStep) -> Tensor:
    """How fast f changes between the last stage and the end of the step, which have (almost) one time: an estimate of
    the largest |eigenvalue| of df/dh, 0-d (Shampine 1977; Hairer & Wanner IV.2)."""
    rk, last = step.rk, step.rk.s - 1
    Y = step.K.add_to(step.y, last, rk.c.rows[last], rk.size(step.interval))
    rise, run = _rms(step.f1 - step.K.get(last)), _rms(step.y1 - Y)
    return torch.where(run > 0, rise / torch.where(run > 0, run, 1), 0)


def _rms(x: Tensor) -> Tensor:
    # Unlike the root of a sum of squares this has a derivative, zero, where x is zero.
    return vector_norm(x) / max(x.numel(), 1) ** 0.5


def refuse(p: ODEProblem, gradient: str | None = None) -> None:
    """
    Raises:
        BadOption: estimates were asked for, and this solve cannot give them.
    """
    if not p.options.estimates:
        return
    why = None
    if p.compile:
        why = "compiled steps keep them to themselves: leave out compile=True"
    elif gradient:
        why = f"adjoint={gradient!r} has no gradient of them: use adjoint=False"
    elif p.transformed and p.event_fn:
        why = "under torch.func and forward mode they do not go with event_fn"
    elif p.rows is not None:
        why = "systems with steps of their own have none in common: leave out batch_dims"
    if why:
        raise BadOption(f"options['estimates']: {why}.")
