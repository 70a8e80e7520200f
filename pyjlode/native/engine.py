"""The front of the native engine: what `gradients.py` and the front door call."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import forward
from ..derivatives import check_graph
from ..errors import BadOption
from ..gradients import REPLAYS
from ..numbers import on_host
from ..parameters import graph_mark
from ..problem import Callback, ODEProblem, like
from ..solution import Stats, Steps
from . import checkpoints, dae, estimates, explicit, interpolation, loop, sample_events, samples, scipy_ivp, sensitivity
from .sensitivity import Gradients
from .step import Step

NAME = "torch"
OWN_STEPS = samples.OWN_STEPS


def _own_steps() -> Any:
    """What solves systems each on its own; loaded when first asked for, as compiled steps are: few need them."""
    from .samples import engine

    return engine


def _compiled() -> Any:
    from . import compiled

    return compiled


def recommended(p: ODEProblem, *, asked: bool = False) -> str:
    """What `adjoint=True` means: the replay is exact, and needs neither a second solve nor a choice of tolerances."""
    return "interpolating" if p.method.kind == "scipy" else "discrete"


@dataclass
class Memory:
    """What a forward solve keeps for its vector-Jacobian product."""

    problem: ODEProblem
    record: Any
    gradient: str
    sensitivities: Tensor | None = None

    @property
    def asks_again(self) -> bool:
        """Whether the product calls f again: not where all of its graph is kept, or its sensitivities are."""
        head = self.record.head
        if self.gradient == "discrete" and self.problem.compiled is not None:
            return False
        if self.problem.rows is not None:
            return self.gradient != "discrete" or self.record.tape is None or self.record.late is not None
        return self.sensitivities is None and (head is None or head.steps < len(self.record.kept))


def solve(p: ODEProblem, stats: Stats, *, recorded: bool = False, dense: bool = False) -> Any:
    """Solve `p`; with `recorded`, under autograd."""
    estimates.refuse(p)
    if p.compile:
        compiled = _compiled()
        if p.rows is not None:
            p = _own_steps().prepare(p, stats, dense=dense)
            return compiled.finished(p, lambda: _own_steps().solve(p, stats, dense=dense))
        p = compiled.prepare(p, stats, dense=dense)
        return compiled.finished(p, lambda: loop.solve(p, stats, dense=dense))
    if p.method.kind == "scipy":
        if p.transformed:
            raise BadOption(
                "method='scipy_solver' leaves PyTorch, and no transform of torch.func and no forward mode follows it "
                "there; use one of the other methods."
            )
        return scipy_ivp.solve(p, stats, dense=dense)
    if p.rows is not None:
        return _own_steps().solve(p, stats, recorded=recorded, dense=dense)
    if p.transformed and p.event_fn:
        return sample_events.solve(p, stats, dense=dense)
    on_step = estimates.Estimates(p, stats).add if p.options.estimates else None
    return loop.solve(p, stats, recorded=math.inf if recorded else 0, dense=dense, on_step=on_step)


def watch(p: ODEProblem) -> Steps | None:
    """Have the steps of a solve noted as they are tried; the user's callbacks are called as before."""
    if p.method.kind == "scipy" or p.rows is not None:
        return None
    steps, own = Steps(), p.callbacks

    def note(into: list[tuple[float, float]], then: Callback | None) -> Callback:
        def noted(t0: float, y0: Any, dt: float) -> None:
            into.append((t0, dt))
            if then:
                then(t0, y0, dt)

        return noted

    if p.method.adaptive:
        p.callbacks = replace(own, accept=note(steps.accepted, own.accept), reject=note(steps.rejected, own.reject))
    else:  # there every step is accepted
        p.callbacks = replace(own, step=note(steps.accepted, own.step))
    return steps


def consistent(p: ODEProblem) -> Tensor:
    """y0 as the algebraic equations of `p`, which has a mass matrix, allow it; with a graph."""
    return dae.consistent(p)


def slope(p: ODEProblem, t: Tensor, y: Tensor) -> Tensor:
    """dy/dt of the solution through (t, y), shape (n,)."""
    return p.f(t, y) if p.mass is None else dae.Algebra(p).slope(t, y)


def output_at(p: ODEProblem, step: Step, t: Tensor) -> Tensor:
    """The dense output at a time within a step, t being 0-d: shape (n,)."""
    return interpolation.output(p, step, t[None])[0]


def without_graph(x: Any) -> Any:
    """A step, or what it is made of, with its numbers and without their graph."""
    if isinstance(x, Tensor):
        return x.detach()
    if isinstance(x, (tuple, list)):
        parts = [without_graph(part) for part in x]
        return type(x)._make(parts) if hasattr(x, "_make") else type(x)(parts)
    if not isinstance(x, (Step, explicit.Recorded)):
        return x
    bare = copy.copy(x)
    for name in getattr(x, "__slots__", None) or vars(x):
        setattr(bare, name, without_graph(getattr(x, name)))
    return bare


@torch.no_grad()
def output_slope(p: ODEProblem, step: Step, t: float) -> Tensor:
    """dy/dt of the dense output within a step, shape (n,): of the numbers that came out, not of the solution that they
    stand for."""
    if step.y1.requires_grad:  # autograd would walk through all steps before, to find that nothing there is asked for
        step = without_graph(step)
    with torch.enable_grad():
        at = on_host([t]).requires_grad_()
        y = interpolation.output(p, step, at)[0]
        bar = torch.zeros_like(y, requires_grad=True)
        by_time = torch.autograd.grad(y, at, bar, create_graph=True)[0]
        return torch.autograd.grad(by_time, bar)[0]


def crossing(p: ODEProblem, record: Any, gradient: str | None) -> tuple[Tensor, Tensor]:
    """Times and states of the events of systems that each have their own."""
    return _own_steps().crossing(p, record, gradient)


def crossing_of_sweep(p: ODEProblem, record: Any) -> tuple[Tensor, Tensor]:
    """The same of the record of a sweep, whose gradient is that of the states at times that are held."""
    assert p.swept is not None
    t, y = _own_steps().moved(p, p.swept, record.event_times, record.ys[1], lambda: record.event_slopes, None)
    return t.reshape(p.swept.shape), y


def apart(p: ODEProblem) -> str | None:
    """Why the systems of `p` cannot each have steps of their own; None if they can."""
    return samples.cannot(p)


def of_systems(p: ODEProblem, f: Any) -> Any:
    """The user's f as a function of a time for each system, (B,)."""
    return _own_steps().fitted(p, f)


def event_of_systems(p: ODEProblem, event_fn: Any) -> Any:
    """The user's event function of times (B,) and flat states (n,): (B, m)."""
    return _own_steps().fitted_event(p, event_fn)


def solve_for_vjp(p: ODEProblem, stats: Stats, gradient: str, *, dense: bool = False) -> Memory:
    """Solve `p` and keep what `vjp` needs for the gradient method named."""
    estimates.refuse(p, gradient)
    kept = dense or gradient in ("interpolating", "quadrature", "gauss")
    if p.compile:
        compiled, own = _compiled(), _own_steps()
        if p.rows is not None:
            p, states = own.prepare(p, stats, gradient=gradient, dense=kept), gradient == "discrete"
            return Memory(p, compiled.finished(p, lambda: own.solve(p, stats, states=states, dense=kept)), gradient)
        p = compiled.prepare(p, stats, gradient=gradient, dense=kept)
        steps = checkpoints.All() if gradient == "discrete" else None
        return Memory(p, compiled.finished(p, lambda: loop.solve(p, stats, steps=steps, dense=kept)), gradient)
    if p.method.kind == "scipy":
        if gradient not in ("backsolve", "interpolating"):
            raise BadOption(
                f"adjoint={gradient!r} follows the steps of the solver, which scipy_solver keeps to itself; use "
                "adjoint='backsolve' or 'interpolating'."
            )
        return Memory(p, scipy_ivp.solve(p, stats, dense=kept), gradient)
    if p.rows is not None and gradient != "forward":
        return Memory(p, _own_steps().solve(p, stats, states=gradient == "discrete", dense=kept), gradient)
    if gradient == "forward":
        p = like(p, rows=None)
        record, S = sensitivity.solve_forward(p, stats, dense=dense)
        return Memory(p, record, gradient, S)
    if gradient in ("checkpointed", "reversible"):
        keeper = checkpoints.Checkpoints(p) if gradient == "checkpointed" else checkpoints.Reversed(p)
        return Memory(p, loop.solve(p, stats, steps=keeper, dense=kept), gradient)
    if gradient == "discrete":
        mark = graph_mark()
        record = loop.solve(p, stats, recorded=sensitivity.graph_steps(p), steps=checkpoints.All(), dense=kept)
        if head := record.head:
            outputs = [head.y1] if head.ys is None else [head.y1, head.ys]
            if check_graph(p, outputs, (p.y0, p.t), mark):
                p = like(p, retain_graph=True)
        return Memory(p, record, gradient)
    return Memory(p, loop.solve(p, stats, dense=kept), gradient)


def vjp(memory: Memory, g: Tensor, *, again: bool) -> Gradients:
    """Gradients of a loss with cotangents g (T, n) of the states at the output times.

    Args:
        again: this memory will be used once more.
    """
    p, record = memory.problem, memory.record
    with torch.no_grad():
        if memory.gradient == "discrete" and p.rows is not None:
            return _own_steps().discrete(p, record, g, again=again)
        if memory.gradient in REPLAYS:
            return sensitivity.discrete(p, record, g, again=again)
        if memory.gradient == "forward":
            assert memory.sensitivities is not None
            return forward.contract(
                p, record, memory.sensitivities, g, None if p.mass is None else dae.Algebra(p).slope
            )
        return sensitivity.continuous(p, record, g, memory.gradient)
