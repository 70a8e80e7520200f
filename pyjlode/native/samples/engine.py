"""The front of what solves independent systems each on its own: what the native engine calls."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ...errors import BadOption
from ...gradients import Gradients
from ...methods.stiff import RosenbrockTableau
from ...problem import ODEProblem
from ...solution import Stats
from . import events, replay
from .events import moved
from .explicit import Explicit
from .field import fitted, fitted_event
from .loop import Search, SystemsRecord
from .rosenbrock import Rosenbrock
from .steps import Maker

__all__ = ["SystemsRecord", "crossing", "discrete", "fitted", "fitted_event", "moved", "prepare", "solve"]


def make(p: ODEProblem, stats: Stats | None = None, *, keep: bool = False) -> Maker:
    """Makes the steps of the problem's method. Args: keep: steps are kept after the next one is made."""
    if isinstance(p.method.tableau, RosenbrockTableau):
        return Rosenbrock(p, stats or Stats("", "", ""))
    if p.compiled is not None:
        from .compiled import Compiled

        return Compiled(p)
    return Explicit(p, keep=keep)


def prepare(p: ODEProblem, stats: Stats, *, gradient: str | None = None, dense: bool = False) -> ODEProblem:
    """The problem with compiled steps of its systems, where `compile=True` asks for them."""
    from .compiled import prepare

    return prepare(p, stats, gradient=gradient, dense=dense)


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
    maker = make(p, stats, keep=dense and not recorded)
    search = Search(p, stats, maker, steps=recorded, states=states, dense=dense and not recorded, outputs=not recorded)
    # An f that is watched is called with gradients on, as in `native.loop.solve`.
    with contextlib.nullcontext() if p.transformed else torch.set_grad_enabled(p.f.watched and not p.method.controlled):
        record = search.run()
    return replay.forward(p, record, make(p), dense=dense) if recorded else record


def discrete(p: ODEProblem, record: SystemsRecord, g: Tensor, *, again: bool) -> Gradients:
    """The exact gradients of a loss with cotangents g (T, n) of the outputs. Args: again: they are asked for again."""
    return replay.discrete(p, record, g, make(p), again=again)


def crossing(p: ODEProblem, record: SystemsRecord, gradient: str | None) -> tuple[Tensor, Tensor]:
    """Times and states of the events, with their gradients, in the shape of the batch and flat."""
    assert p.rows is not None
    t, y = events.crossing(p, record, make(p), gradient is None)
    return t.reshape(p.rows.shape), y
