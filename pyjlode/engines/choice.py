"""Which engine solves a problem, and why. Only this room knows them all."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .. import gradients, transforms
from ..bridge import engine as julia
from ..bridge import plans, runtime, sweep
from ..errors import BadOption, EngineUnavailable, EventNotFound, MaxStepsReached, NotCompiled, SolveError
from ..gradients import Engine
from ..native import engine as native
from ..notices import warn
from ..parameters import Held
from ..problem import Callbacks, Equation, ODEProblem, Prepared, flat_field, like

ENGINES = ("auto", "torch", "julia")
ALIASES = {"native": "torch"}  # what the documentation calls it
ENGINE_VARIABLE = "PYJLODE_ENGINE"  # what "auto" means, where the user has set it: "torch" or "julia"

# Products of numbers in a call of f from which on nothing is gained by Julia: benchmarks/compiled.py --part size.
_LARGE = 10_000_000


def named(name: Any) -> str:
    """The name of an engine, of which "native" is another word for "torch".

    Raises:
        BadOption: no such engine.
    """
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in ENGINES:
        raise BadOption(f"engine must be 'auto', 'julia' or 'torch' (also called 'native'); got {name!r}.")
    return name


def choose(name: str, p: ODEProblem, adjoint: bool | str, *, recorded: bool = False) -> tuple[Engine, str]:
    """The engine for a problem, and why it is that one.

    Args:
        name: what the user asked for.
        recorded: autograd must follow the solver's own operations.

    Raises:
        BadOption: the engine asked for cannot solve the problem.
        EngineUnavailable: it is not there.
    """
    reason, only = f"asked for by engine={name!r}", julia.needed(p)
    if name == "auto" and not only and os.environ.get(ENGINE_VARIABLE, "auto") != "auto":
        name, reason = os.environ[ENGINE_VARIABLE], f"asked for by {ENGINE_VARIABLE}"
        name = ALIASES.get(name, name)
        if name not in ("torch", "julia"):
            raise BadOption(f"{ENGINE_VARIABLE} must be 'torch', 'julia' or 'auto'; it is {name!r}.")
    if name == "torch" and not only:
        return native, reason
    if p.transformed:
        if name == "auto" and not only:
            return native, transforms.REASON
        raise BadOption(f"the Julia engine cannot do this: {transforms.REASON}. Use engine='torch'.")
    if only:
        if name == "torch":
            raise BadOption(f"{only} needs Julia; use engine='julia'.")
        name, reason = "julia", f"{only} needs it"
    found = runtime.find()
    if isinstance(found, str):
        if name == "julia":
            raise EngineUnavailable(f"engine='julia': {found}")
        return native, found
    gradient = gradients.find(adjoint, julia, p)
    obstacle = julia.cannot(p, gradient if torch.is_grad_enabled() else None)
    if recorded:
        obstacle = "adjoint=False differentiates through the solver's own operations, which are not PyTorch's there"
    if obstacle is None and name == "auto" and p.compile is None and _large(p):
        return native, "f is large, its own time is what counts, and the native engine asks it less often"
    if obstacle is None and name == "auto" and julia.inaccurate(p):
        return native, f"the error of Julia's method for {p.method.name!r} may be thousands of tolerances"
    if obstacle is None and name == "auto" and p.y0.device.type != "cpu":
        return native, f"the state lies on {p.y0.device}, where Julia's solver would call f back"
    if obstacle is None and name == "auto" and p.batch > 1 and p.compile is None:
        if why := sweep.uncompiled(p, gradient if torch.is_grad_enabled() else None):
            return native, f"the Julia engine would not solve the systems abreast ({why})"
        return julia, f"Julia is set up by {found.source}, and solves the systems abreast"
    if obstacle is None and name == "auto" and torch.is_grad_enabled() and (why := julia.called_back(p, gradient)):
        return native, f"Julia's solver would call f back ({why}), and then the native engine is faster"
    if obstacle is None:
        return julia, reason if name == "julia" else f"Julia is set up by {found.source}"
    if name == "julia":
        raise BadOption(f"the Julia engine cannot do this: {obstacle}. Change that, or use engine='torch'.")
    return native, f"the Julia engine cannot do this: {obstacle}"


def confirm(
    found: tuple[Engine, str], name: str, p: ODEProblem, adjoint: bool | str, *, recorded: bool = False
) -> tuple[Engine, str]:
    """What was chosen, or another engine now that more is known of the problem: what f depends on, or the settings of
    the backward solve. The native engine solves all that comes to it."""
    return found if found[0] is native else choose(name, p, adjoint, recorded=recorded)


def apart(
    engine: Engine, p: ODEProblem, f: Any, event_fn: Any, gradient: str | None, autocast: bool
) -> tuple[Any, str]:
    """Have each system of the batch in `p` solved with steps of its own, by the native engine, if that can be.

    Args:
        f, event_fn: the user's. gradient: the gradient method.

    Returns:
        f as a function of a time for each system, or the user's; and why they have common steps, where they have.

    Raises:
        BadOption: they have common steps, and something was asked for that needs more.
    """
    assert p.rows is not None
    assert p.layout is not None
    if engine is not native:  # a sweep solves them one by one
        if event_fn is not None and p.batch > 1:
            p.event_fn = native.event_of_systems(like(p), event_fn)
        p.swept, p.rows = p.rows, None
        return f, ""
    asked = "t with a row for each system" if p.rows.own else "event_fn with an event for each" if event_fn else ""
    asked = "on_failure='nan'" if p.options.on_failure == "nan" else asked
    why = native.apart(p)
    if gradient in ("checkpointed", "reversible"):
        why = why or f"adjoint={gradient!r} keeps them in common"
    if why:
        if asked:
            raise BadOption(f"{asked} needs steps of their own for the systems of a batch, and {why}. {_OWN}")
        p.rows = None
        return f, f"common steps: {why}"
    if gradient is not None and gradient != "discrete" and asked:
        raise BadOption(
            f"adjoint={gradient!r} solves all systems of a batch backward with common steps, which cannot be with "
            f"{asked}. Use adjoint=True or adjoint=False."
        )
    layout = p.layout
    if unheard := [name for name, call in vars(p.callbacks).items() if call]:
        warn(f"f's callbacks ({', '.join(unheard)}) are not called where each system has steps of its own.")
        p.callbacks = Callbacks()
    fitted = native.of_systems(p, f)
    p.f = flat_field(fitted, layout, autocast)
    p.f.source = None
    if event_fn is not None:
        p.event_fn = native.event_of_systems(p, event_fn)
    return fitted, ""


_OWN = f"Methods that give each its own: {', '.join(native.OWN_STEPS)}."


def _large(p: ODEProblem) -> bool:
    """Whether an explicit method solves a large network: one whose parameters, times the rows of the state that it is
    given, are many."""
    if p.method.kind != "adaptive" or p.layout is None or not p.layout.bare:
        return False
    rows = p.layout.shapes[0][:-1].numel()
    return rows * sum(x.numel() for x in Held(p.f.source or p.f.f).wanted) > _LARGE


def planned(solver: Any, name: str, e: Equation) -> plans.Call | None:
    """The call, where an engine may have kept what was made of an earlier one that is like it.

    Args:
        solver: what was said of how to solve, hashable.
        name: the engine that it names.
    """
    if name == "torch" or not runtime.started():
        return None
    meant = os.environ.get(ENGINE_VARIABLE) if name == "auto" else None
    if meant == "torch":
        return None
    if e.event_fn is not None or e.mass_matrix is not None or e.jac is not None or e.adjoint_params is not None:
        return None
    first = e.t[0] if isinstance(e.t, (list, tuple)) and e.t else e.t
    if isinstance(first, (list, tuple)) or (isinstance(first, Tensor) and first.ndim > (first is e.t)):
        return None  # times of each system of a batch
    return plans.call(e.f, e.h0, e.t, (solver, meant))


def second(name: str, made: Prepared, error: SolveError | NotCompiled) -> str | None:
    """Why the native engine should try what Julia's solver failed at, if it should: with a method for stiff systems, of
    which each engine has its own, that did not just need more steps; or where it was found late that systems of a batch
    cannot be compiled.

    Args:
        name: the engine that the user asked for.
    """
    p = made.problem
    if isinstance(error, NotCompiled):
        if name != "auto" or p.compile or julia.needed(p) or not sweep.is_swept(p, made.gradient):
            return None
        sweep.refuse(p, made.gradient if made.needed else None, str(error))
        return f"the Julia engine cannot do this: {error}"
    if name != "auto" or os.environ.get(ENGINE_VARIABLE) == "julia" or made.engine is not julia:
        return None
    if not p.method.controlled or p.compile or julia.needed(p):
        return None
    if isinstance(error, EventNotFound):
        return None
    if isinstance(error, MaxStepsReached) and abs(error.t - p.times[0]) >= 1e-3 * abs(p.times[-1] - p.times[0]):
        return None
    return f"Julia's solver failed: {error}"


# The algebraic equations of a singular mass matrix are solved in PyTorch, whichever engine then solves the rest.
consistent = native.consistent
slope = native.slope
