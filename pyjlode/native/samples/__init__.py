"""Independent systems in a batch, each with steps, times and an event of its own."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...errors import BadOption
from ...gradients import Gradients
from ...problem import ODEProblem
from ...solution import Stats
from ..stiff_tableaus import RosenbrockTableau
from ..tableaus import ExplicitTableau
from . import events, replay
from .explicit import Explicit
from .field import fitted, fitted_event
from .loop import Search, SystemsRecord
from .steps import Maker

__all__ = ["OWN_STEPS", "SystemsRecord", "cannot", "crossing", "discrete", "fitted", "fitted_event", "solve"]

# Names of the methods that give each system steps of its own: explicit pairs, and Rosenbrock methods.
OWN_STEPS = ("dopri5", "tsit5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "vern7", "vern9")


def make(p: ODEProblem, *, keep: bool = False) -> Maker:
    return Explicit(p, keep=keep)


def cannot(p: ODEProblem) -> str | None:
    """Why the systems of `p` cannot have steps of their own; None if they can."""
    if p.method.name not in OWN_STEPS:
        return f"{p.method.name} takes the same steps for all systems of a batch"
    if p.mass is not None:
        return "a mass_matrix makes all systems of a batch take the same steps"
    if p.options.norm is not None:
        return "options['norm'] is of all systems together, which makes them take the same steps"
    return None


def solve(
    p: ODEProblem, stats: Stats, *, recorded: bool = False, states: bool = False, dense: bool = False
) -> SystemsRecord:
    """Solve the systems of `p`.

    Args:
        recorded: under autograd. A problem that is `transformed` always is.
        states: keep what is needed to take the steps again. dense: keep the dense output.
    """
    recorded = recorded or p.transformed
    if p.transformed and p.event_fn is not None:
        raise BadOption(
            "options['batch_dims'] with event_fn does not work under torch.func and forward mode: map the solve of one "
            "system by torch.func.vmap, which gives each its own event."
        )
    maker = make(p, keep=dense and not recorded)
    search = Search(p, stats, maker, states=states, dense=dense and not recorded, outputs=not recorded)
    with contextlib.nullcontext() if p.transformed else torch.no_grad():
        record = search.run()
    return replay.forward(p, record, make(p), dense=dense) if recorded else record


def discrete(p: ODEProblem, record: SystemsRecord, g: Tensor) -> Gradients:
    """The gradients of a loss with cotangents g (T, n) of the outputs, by taking each step again."""
    return replay.discrete(p, record, g, make(p))


def crossing(p: ODEProblem, record: SystemsRecord, gradient: str | None) -> tuple[Tensor, Tensor]:
    """Times and states of the events, with their gradients, in the shape of the batch and flat."""
    assert p.rows is not None
    t, y = events.crossing(p, record, make(p), gradient is None)
    return t.reshape(p.rows.shape), y
