"""The front of the Julia engine: what `gradients.py` and the front door call."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ends, forward
from ..errors import BadOption, JuliaError, NonFiniteState, NotCompiled, NotConverged, SolveError, StepSizeTooSmall
from ..gradients import Gradients, other_function, time_gradient
from ..methods import Method
from ..methods.explicit import ExplicitTableau
from ..methods.stiff import EsdirkTableau, RosenbrockTableau
from ..parameters import by_tensor
from ..problem import NO_OPTIONS, AdjointSettings, Field, ODEProblem, SolverOptions, SystemsLayout, like
from ..solution import Stats
from . import packages, places, runtime
from .calls import Calls, Held
from .function import JuliaFunction
from .memory import AdjointRequest, Outcome, ReplayRequest, Request
from .packages import SECOND_ORDER as _SECOND
from .parts import Parts, cannot_split, for_parts
from .rhs import RHS, Callbacks, Source
from .sweep import Sweep, abreast, alone, controlled, is_swept, many_tolerances, may_be_alone, weights

log = logging.getLogger("pyjlode")

NAME = "julia"

GRADIENTS = ("discrete", "checkpointed", "backsolve", "interpolating", "quadrature", "gauss", "forward")
# Those that take the steps again.
_REPLAYS = ("discrete", "checkpointed")

# What is right for stiff problems there. With "gauss" SciMLSensitivity gives a stiff method the Jacobian of f; with
# others it must difference the adjoint's right-hand side, which takes minutes for Robertson's reaction or goes wrong.
# And the adjoint reads the state off the forward solve's dense output: for most stiff methods a cubic, from which the
# gradient of that reaction at rtol=1e-8 comes out with errors from 3e-4 (bdf) to 7e-1 (rosenbrock23).
_STIFF_METHODS = ("rodas5p", "radau5")
# Compiled sensitivities of so many numbers take less time than an adjoint: benchmarks/compiled.py --part gradient.
_FEW_SENSITIVITIES = 200
_OPTIONS = {"first_step", "min_step", "max_step", "max_num_steps", "step_t", "jump_t", "step_size"}
_OPTIONS |= {"max_events", "batch_dims", "specialize", "progress", "consistent"}
# Of the step control, where that is ours.
_CONTROL = {"safety", "ifactor", "dfactor"}


@dataclass
class Record:
    """What a solve leaves behind.

    Attributes:
        ys: (T, n) states at the output times; with an event, at the start and at the event.
        dense: the dense output, (M,) times -> (M, n), where it was to be kept.
        event_t: time of the event.
        passed: how many of the output times lie before the event, the start among them.
        fired, sizes: as the native engine's record has them.
        last: nothing here: the steps are Julia's.
        event_times, event_slopes: of a sweep, (B,) float64 times of the events, NaN where there is none, and (B, d)
            dy/dt there.
    """

    ys: Tensor
    dense: DenseOutput | SweptOutput | None = None
    event_t: float | None = None
    passed: int = 1
    fired: tuple[int, ...] = ()
    sizes: tuple[float, ...] = ()
    last: None = None
    event_times: Any = None
    event_slopes: Tensor | None = None


@dataclass
class Memory:
    """What a forward solve keeps for its vector-Jacobian product.

    Attributes:
        sensitivities: with respect to y0 and the problem's parameters, shape (T, n, n + |theta|).
        wrt: the parameters in the order in which their gradients are asked for.
        systems: of a sweep.
    """

    problem: ODEProblem
    record: Record
    gradient: str
    rhs: Callbacks | None
    solve: Held | None
    sensitivities: Tensor | None = None
    wrt: tuple[Tensor, ...] = ()
    systems: Sweep | None = None

    @property
    def asks_again(self) -> bool:
        """Whether the product calls f again."""
        return self.sensitivities is None and self.rhs is not None


class DenseOutput:
    """The solution as a function of time, from Julia's."""

    def __init__(self, rhs: Callbacks, solve: Held) -> None:
        self.rhs, self.solve = rhs, solve

    def __reduce__(self) -> Any:
        return self.solve.__reduce__()  # says why not

    def __call__(self, times: Tensor) -> Tensor:
        """Times of shape (M,) -> states of shape (M, n)."""
        out = torch.empty(len(times), self.rhs.n, dtype=self.rhs.dtype, device=self.rhs.place.device)
        ts = times.detach().to("cpu", torch.float64).contiguous()
        with torch.no_grad(), runtime.julia() as calls:
            self.rhs.here(calls)
            _call(self.rhs, calls.interpolate, self.solve, ts, out)
        return out


class SweptOutput:
    """The same of the systems of a sweep."""

    def __init__(self, systems: Sweep, solve: Held) -> None:
        self.systems, self.solve = systems, solve

    def __reduce__(self) -> Any:
        return self.solve.__reduce__()  # says why not

    def __call__(self, times: Tensor) -> Tensor:
        """Times of shape (M,), or (B, M) -> states of shape (M, n)."""
        with torch.no_grad(), runtime.julia() as calls:
            return self.systems.interpolate(calls, self.solve, times)


def recommended(p: ODEProblem, *, asked: bool = False) -> str:
    """What `adjoint=True` means: sensitivities only where they are compiled, and few.

    Args:
        asked: f was called, so that the parameters of `p` are known.
    """
    if _cannot_replay(p) is None:
        return "discrete"
    n, m = p.y0.numel(), sum(x.numel() for x in p.params)
    few = asked and n * (n + m) <= _FEW_SENSITIVITIES and p.method.kind == "adaptive"
    return "forward" if few and _in_order(p) is not None else "gauss"


def cannot(p: ODEProblem, gradient: str | None) -> str | None:
    """Why this engine cannot solve `p` with this gradient method; None if it can."""
    if p.method.julia is None:
        return f"method={p.method.name!r} has no counterpart there"
    if p.method.kind == "julia" and (second := [x for x in packages.of(p.method.julia).values() if x in _SECOND]):
        return (
            f"the methods of {second[0]}.jl are for problems of second order, which are not made there; the native "
            "engine has such methods (docs/second_order.md)"
        )
    if p.y0.device.type not in ("cpu", "cuda"):
        return f"the state lies on {p.y0.device}, and Julia is given tensors on the CPU and on CUDA devices"
    if places.of(p.y0).kind != places.HOST and isinstance(p.f.f, JuliaFunction):
        return f"the state lies on {p.y0.device}, and a julia_function is code for the CPU"
    if p.y0.device.type == "cuda" and (obstacle := runtime.without("CUDA")):
        return f"the state lies on {p.y0.device}, and {obstacle}"
    if gradient is not None and gradient not in GRADIENTS:
        return f"adjoint={gradient!r} is one of the native engine's"
    if p.split is not None and gradient != "forward" and (obstacle := cannot_split(p)):
        return obstacle
    if gradient == "checkpointed" and not isinstance(p.method.tableau, ExplicitTableau):
        return f"adjoint='checkpointed' is there for explicit methods, and not for {p.method.name!r}"
    if gradient in _REPLAYS and (obstacle := _cannot_replay(p, at_once=True)):
        return f"adjoint={gradient!r} takes the steps again there, and that cannot be done {obstacle}"
    if gradient not in (None, "forward", *_REPLAYS) and (obstacle := _cannot_adjoin(p, gradient)):
        return obstacle
    rows = p.own_times is not None or (p.rows is not None and p.rows.own)
    if rows and (p.compile is False or p.batch == 1 or not abreast(p)):
        return "t has a row for each system, which there takes compile=True and a method that sweeps solve abreast"
    if p.batch > 1 and p.options.on_failure == "nan" and not abreast(p):
        return f"on_failure='nan' is known to methods that sweeps solve abreast there, and not to {p.method.name!r}"
    if p.batch > 1 and (obstacle := _cannot_sweep(p, gradient)):
        return f"options['batch_dims'] solves systems one by one there, and that {obstacle}"
    if p.batch == 1 and p.options.batch_dims and p.event_fn is not None:
        return "a batch of one system with an event_fn is not solved as a batch there"
    if p.mass is not None and gradient is not None and (obstacle := _cannot_differentiate_masses(p, gradient)):
        return f"with a mass_matrix {obstacle}"
    if (name := packages.fully_implicit(p.method.julia)) and (obstacle := _cannot_pose_implicitly(p, gradient)):
        return f"{name}, which solves systems F(t, y, y') = 0, {obstacle}"
    if (
        "RadauIIA" in p.method.julia
        and p.method.kind in ("stiff", "julia")
        and (many_tolerances(p) or gradient == "forward")
    ):
        sensitivities = (
            "" if many_tolerances(p) else ", and adjoint='forward' solves for sensitivities, whose units differ"
        )
        return f"{p.method.name} takes one rtol and one atol for all{sensitivities}"
    for solve in _solves(p):
        changed = {name for name, value in vars(solve.options).items() if value != getattr(NO_OPTIONS, name)}
        changed -= {"on_failure"} if p.batch > 1 else set()
        changed -= _OPTIONS | (_CONTROL if solve.method.kind == "adaptive" else set())
        if changed:
            return f"options {sorted(changed)} configure the native engine's own loop"
        if any(vars(solve.callbacks).values()):
            return "f has callbacks (callback_step and the like), which the native engine calls"
    return None


def inaccurate(p: ODEProblem) -> bool:
    """Whether the error of Julia's method may be thousands of tolerances: see `methods/table.py`."""
    return p.split is None and p.method.name in ("kencarp5", "kvaerno5")


def called_back(p: ODEProblem, gradient: str | None) -> str:
    """Why Julia's solver would call f back, so that the native engine is faster; empty where it would not, or nothing
    is known to be faster.

    A solve without a gradient is faster here even so: benchmarks/julia.py --part call.
    """
    if gradient is None or p.compile is not None or isinstance(p.f.f, JuliaFunction):
        return ""
    if p.method.kind in ("adaptive", "fixed") or (p.split is not None and gradient == "discrete"):
        from .codegen.field import called_back  # half the cost of importing this package

        found = (called_back(like(p, f=f), gradient) for f in p.split or (p.f,))
        return next(filter(None, found), "")
    if gradient != "gauss" or not may_be_alone(p):
        return ""
    from .codegen.program import FirstTime

    # The next solve has its exact gradient: to load SciMLSensitivity for this one takes longer than to solve it.
    return str(p.f.program) if isinstance(p.f.program, FirstTime) else ""


def _solves(p: ODEProblem) -> list[ODEProblem | AdjointSettings]:
    """The forward solve, and the backward one if its settings are known."""
    return [p, p.adjoint] if p.adjoint else [p]


def _cannot_adjoin(p: ODEProblem, gradient: str) -> str | None:
    for solve in _solves(p):
        method = solve.method
        if not method.adaptive or solve.options.step_size is not None:
            return (
                f"adjoint={gradient!r} with {method.name!r} and fixed steps would be wrong there: nothing controls the "
                "error on the way back. What is right is 'forward'"
            )
        if method.controlled and (gradient != "gauss" or method.name not in _STIFF_METHODS):
            return (
                f"adjoint={gradient!r} with {method.name!r}, a stiff method, would be inaccurate there; what is "
                "accurate is 'gauss' with 'rodas5p' or 'radau5', or 'forward'"
            )
    if p.adjoint and p.adjoint.norm is not None:
        return "adjoint_options['norm'] is a function, which the native engine calls"
    if p.adjoint and p.adjoint.seminorm and gradient in ("backsolve", "interpolating"):
        return (
            f"adjoint={gradient!r} has the parameters' part in its error norm there, so no 'seminorm'; 'gauss' and "
            "'quadrature' do not solve for them"
        )
    return None


def _cannot_differentiate_masses(p: ODEProblem, gradient: str) -> str | None:
    assert p.mass is not None
    if gradient not in ("gauss", "forward"):
        return f"its adjoints are 'gauss' and 'forward' there, and not {gradient!r}"
    if gradient == "forward" and (p.mass.requires_grad or p.t.requires_grad):
        return "adjoint='forward' has no gradients by it and by times there; adjoint=True has"
    if isinstance(p.f.f, JuliaFunction):
        return "a julia_function is not differentiated there"
    if places.of(p.y0).kind != places.HOST:
        return f"it is not differentiated on {p.y0.device} there"
    if p.event_fn is not None:  # the slope of an algebraic component, by dense output, was off by 3e-3 at rtol=1e-9
        return "gradients through an event are the native engine's"
    return None


def _cannot_pose_implicitly(p: ODEProblem, gradient: str | None) -> str | None:
    if places.of(p.y0).kind != places.HOST:
        return "is not given a state on a device there"
    if gradient is not None and p.mass is None:
        return f"has no gradients but of systems with a mass_matrix, and of Implicit fields: not by {gradient!r}"
    if gradient == "forward":
        return "has gradients by adjoint=True there"
    if p.adjoint and packages.fully_implicit(p.adjoint.method.julia or ""):
        return "cannot solve the adjoint, which is none: pass adjoint_method='rodas5p' or 'radau5'"
    return None


def _cannot_replay(p: ODEProblem, *, at_once: bool = False) -> str | None:
    """Args:
    at_once: a field that is met for the first time is compiled for it.
    """
    if p.split is not None:
        return "through an event" if p.event_fn is not None else "through jump_t" if p.options.jump_t else None
    if isinstance(p.method.tableau, RosenbrockTableau) and (p.batch > 1 or alone(p, at_once=at_once)):
        return None  # of a sweep, whose other needs `_cannot_sweep` knows
    if may_be_alone(p):
        return f"with {p.method.name!r}, but for a field of few operations that is compiled with its derivatives"
    if not isinstance(p.method.tableau, ExplicitTableau):
        return f"with {p.method.name!r}, which is not an explicit Runge-Kutta method of both engines"
    if isinstance(p.f.f, JuliaFunction):
        return "for a julia_function"
    if p.event_fn is not None and p.batch == 1:
        return "through an event"
    if p.options.jump_t:
        return "through jump_t"
    if p.t.requires_grad and not p.method.adaptive:
        return "where fixed steps move with t"
    return None


def _cannot_sweep(p: ODEProblem, gradient: str | None) -> str | None:
    if not p.compile and (p.compile is False or not abreast(p)):
        return "needs compile=True"
    if gradient is not None and (gradient != "discrete" or not abreast(p)):
        return (
            "has gradients by adjoint=True for explicit methods with error control and for Rosenbrock methods there: "
            f"not by {gradient!r} with {p.method.name!r}"
        )
    if p.event_fn is not None and (not abreast(p) or (p.swept or p.rows) is None):
        return f"takes no event_fn with {p.method.name!r}"
    if p.mass is not None or p.options.jump_t or p.options.step_t:
        return "takes no mass_matrix, step_t or jump_t"
    if many_tolerances(p) and not abreast(p):
        return f"takes one rtol and one atol for all with {p.method.name!r}"
    if p.layout is None or any(p.layout.complex):
        return "needs a real state"
    return None


def solve(p: ODEProblem, stats: Stats, *, recorded: bool = False, dense: bool = False) -> Record:
    assert not recorded, "the front door keeps solves that autograd must follow from this engine"
    if not dense and (found := _again(p, stats, "f")):
        return Record(found[0])
    return _solve(p, stats, None, dense)[0]


def first_event(p: ODEProblem, stats: Stats) -> Record:
    """The first event of `p`, which is to go `onward` over its times: a record whose two states are those at the start
    and at the event, or at the end where there is none."""
    o = p.options
    q = like(p, times=[p.times[0], p.times[-1]], options=replace(o, step_t=(*o.step_t, *p.times[1:])))
    record, rhs, _ = _solve(q, stats, None, False)
    if rhs is None:
        return record
    margin = rhs.margin
    record.sizes, at = tuple(margin.sizes), record.event_t
    assert at is not None
    if margin.fired and p.direction * at < p.direction * p.times[-1]:
        record.fired = margin.fired
    else:
        record.event_t = None
    return record


def solve_for_vjp(p: ODEProblem, stats: Stats, gradient: str, *, dense: bool = False) -> Memory:
    """Solve `p` and keep what `vjp` needs for the gradient method named."""
    if gradient == "forward":
        ordered = _in_order(p) or p
        if not dense and (found := _again(ordered, stats, "sensitivities")):
            record = Record(found[0])
            return Memory(ordered, record, gradient, None, None, forward.split(ordered, record), p.params)
        augmented = forward.augment(ordered)
        if ordered.method.controlled or ordered.mass is not None:
            augmented.atol = forward.sensitivity_atol(ordered)
        record, rhs, solution = _solve(augmented, stats, None, dense, ordered)
        return Memory(ordered, record, gradient, rhs, solution, forward.split(ordered, record), p.params)
    if gradient in _REPLAYS and not dense and (found := _again(p, stats, gradient)):
        assert p.repeats is not None
        repeated = p.repeats[gradient]
        if repeated.replay is None:
            repeated.replay = replay_request(p)
        return Memory(p, Record(found[0]), gradient, repeated.again(p, found[2]), found[1])
    if is_swept(p, gradient):
        swept: list[Sweep] = []
        record, rhs, solution = _solve(p, stats, gradient, dense, swept=swept)
        return Memory(p, record, gradient, rhs, solution, systems=swept[0] if swept else None)
    record, rhs, solution = _solve(p, stats, gradient, dense)
    return Memory(p, record, gradient, rhs, solution)


def vjp(memory: Memory, g: Tensor, *, again: bool) -> Gradients:
    """Gradients of a loss with cotangents g (T, n) of the states at the output times."""
    p, record, rhs = memory.problem, memory.record, memory.rhs
    if memory.sensitivities is not None:
        grads = forward.contract(p, record, memory.sensitivities, g, None)
        found = by_tensor(p.params, grads.params, memory.wrt)
        return grads._replace(params=[torch.zeros_like(x) if g is None else g for x, g in zip(memory.wrt, found)])
    if rhs is None:  # nothing was solved
        still = p.t.new_zeros(p.t.shape, dtype=torch.float64)  # of rows of times that are all the same
        by_t = time_gradient(p, record, g, torch.zeros_like(p.y0), p.f) if p.own_times is None else still
        return Gradients(g.sum(0), by_t, [None] * len(p.params))
    if memory.systems is not None:
        return _pull(memory, memory.systems, g)
    if memory.gradient in _REPLAYS:
        return _replay(memory, g)
    assert p.adjoint is not None
    times = p.times if record.event_t is None else [p.times[0], record.event_t]
    settings = p.adjoint
    a, theta = torch.zeros_like(p.y0), p.y0.new_zeros(rhs.params.size)
    by_mass, slopes = _room(p, len(times))
    theta = torch.cat([theta, by_mass])
    o = settings.options
    request = AdjointRequest(first_step=o.first_step or 0.0, **_stepping(settings.method, o))
    # The adjoint is linear in its cotangents: solved with the largest of them 1, it does not depend on their unit.
    scale = float(g.abs().max())
    scale = scale if 0.0 < scale < math.inf else 1.0
    request.lend(du0=a, dp=theta, g=(g / scale).contiguous())
    if slopes is not None:
        request.lend(slopes=slopes)
    request.lend_numbers(times=times, stops=o.step_t, jumps=o.jump_t)
    request.lend_tolerances(settings.rtol, _adjoint_atol(settings, record.ys))
    with torch.no_grad(), runtime.julia() as calls:
        if p.mass is None:  # the adjoint of such systems is PyJLODE.jl's own
            runtime.sensitivity()
        rhs.here(calls)
        outcome = _call(
            rhs,
            calls.adjoint,
            memory.solve,
            memory.gradient,
            _algorithm(calls, settings.method, memory.gradient),
            request,
        )
    if not isinstance(rhs, RHS):
        count(p.f, outcome.nf)
    if not outcome.succeeded:
        backward = like(p, method=settings.method, options=o, times=times[::-1], event_fn=None)
        raise _failure(outcome, backward, f"the backward solve of adjoint={memory.gradient!r}: ")
    a, theta = a * scale, theta * scale
    of_params = rhs.parameter_gradients(theta[: rhs.params.size])
    if by_mass.numel():
        assert p.mass is not None
        of_mass = theta[rhs.params.size :].view_as(p.mass).T
        of_params = [of_mass if x is p.mass else of_x for x, of_x in zip(p.params, of_params)]
    slope = p.f if slopes is None else _at_outputs(p, times, slopes)
    return Gradients(a + g[0], time_gradient(p, record, g, a, slope), of_params)


def _at_outputs(p: ODEProblem, times: list[float], slopes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Slopes at these times, (T, n), as a function of the time and of the state there."""
    known = {float(p.time(t)): slope for t, slope in zip(times, slopes)}
    return lambda t, y: known[float(t)]


def _room(p: ODEProblem, points: int) -> tuple[Tensor, Tensor | None]:
    """For the gradient by the mass matrix, (n²,), where that is wanted; and for the slopes at the outputs, (T, n),
    where those of a solution are not f."""
    if p.mass is None:
        return p.y0.new_zeros(0), None
    return p.y0.new_zeros(p.mass.numel() if p.mass.requires_grad else 0), p.y0.new_zeros(points, p.y0.numel())


def _replay(memory: Memory, g: Tensor) -> Gradients:
    """The gradients of the numbers that came out: each step is taken again in Julia, and pulled back through."""
    p, rhs = memory.problem, memory.rhs
    assert rhs is not None
    request = rhs.replaying
    if request is None:
        request = replay_request(p)
    g = g.contiguous().resolve_neg()
    both = p.y0.new_empty(p.y0.numel() + rhs.size)
    with unrecorded(), runtime.julia() as calls:
        rhs.refill()
        rhs.here(calls)
        replayed = _call(rhs, functools.partial(calls.replay, whole=False), memory.solve, request, both, g)
    _count(p, rhs, replayed.nf)
    rtol = p.rtol if isinstance(p.rtol, float) else float(torch.as_tensor(p.rtol).max())
    if not replayed.apart <= rtol + apart_by_rounding(both.dtype):
        raise other_function()
    a, grads = rhs.apart(both)
    by_t = time_gradient(p, memory.record, g, a, p.f)
    return Gradients(a.add_(g[0]), by_t, grads)


def _pull(memory: Memory, systems: Sweep, g: Tensor) -> Gradients:
    """The same for a sweep."""
    p = memory.problem
    assert memory.solve is not None
    with unrecorded(), runtime.julia() as calls:
        a, by_t, grads, nf = systems.pull(calls, memory.solve, memory.record.ys, g)
    count(p.f, nf)
    return Gradients(a + g[0], by_t, grads)


def apart_by_rounding(dtype: torch.dtype) -> float:
    """How far apart a step and its replay may come out by rounding alone, in units of the state."""
    return 1e4 * torch.finfo(dtype).eps


def replay_request(p: ODEProblem) -> ReplayRequest:
    """What is said of a replay before there are cotangents."""
    request, tab = ReplayRequest(), p.method.tableau
    request.lend_numbers(times=p.times)
    assert isinstance(tab, (ExplicitTableau, EsdirkTableau))
    request.stages = tab.stages
    if isinstance(tab, ExplicitTableau):
        request.lend(**{name: x for name, x in weights(tab).items() if name in "acp"})
    else:  # the solve left its equations at its tolerances
        assert tab.explicit is not None
        request.lend(a=torch.tensor(np.stack([tab.A, tab.explicit])), c=torch.tensor(tab.C))
        request.atol = float(torch.as_tensor(p.atol).max())
    return request


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """Within this context autograd records nothing; of no cost where it does not anyway."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


_NOTHING = contextlib.nullcontext()


def _adjoint_atol(settings: AdjointSettings, ys: Tensor) -> Tensor:
    """The absolute tolerance of an adjoint whose largest cotangent is 1.

    That of the settings has the state's unit: it says below which part of the state, `atol / rtol`, errors no longer
    count in proportion. So it does for the adjoint; but more than a thousandth of its largest part always counts.
    """
    largest = float(ys.abs().max()) or 1.0
    rtol, atol = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (settings.rtol, settings.atol))
    part = (atol / (rtol * largest)).nan_to_num(1.0).clamp(1e-3, 1.0)
    return torch.where(rtol > 0, rtol * part, atol)


def watch(p: ODEProblem) -> None:
    """Nothing of its steps is told: they are Julia's."""


def needed(p: ODEProblem) -> str | None:
    """What of `p` only this engine can solve, in words."""
    if p.method.kind == "julia":
        return f"method={p.method.name!r}"
    return "a julia_function" if isinstance(p.f.f, JuliaFunction) else None


def _in_order(p: ODEProblem) -> ODEProblem | None:
    if p.compile is False or isinstance(p.f.f, JuliaFunction):
        return None
    from .codegen.field import in_order  # half the cost of importing this package

    return in_order(p)


def _solve(
    p: ODEProblem,
    stats: Stats,
    gradient: str | None,
    dense: bool,
    of: ODEProblem | None = None,
    swept: list[Sweep] | None = None,
) -> tuple[Record, Callbacks | None, Held | None]:
    """Solve.

    Args:
        of: the problem that `p` is the one of the sensitivities of.
        swept: gets the systems of a sweep, if given.
    """
    points = len(p.times) if p.own_times is None else p.own_times.shape[1]
    if len(p.times) == 1 or p.y0.numel() == 0:
        return Record(p.y0.detach().expand(points, -1).clone()), None, None
    asked, gradient = gradient, "discrete" if gradient in _REPLAYS else gradient
    o, as_sweep = p.options, is_swept(p, gradient)
    # Dense output has all steps, and then these are enough for the gradient.
    keep = 2 if asked == "checkpointed" and not dense else int(gradient == "discrete" or (dense and as_sweep))
    y0 = p.y0.detach().contiguous()
    out = y0.new_empty(points, y0.numel())
    # A method of the user's own keeps to a grid if it is given one.
    fixed = not p.method.adaptive or o.step_size is not None
    request = Request(
        first_step=(o.step_size if fixed else o.first_step) or 0.0,
        **_stepping(p.method, o),
        fixed=fixed,
        dense=dense or gradient not in (None, "discrete"),
        keep=keep,
        full=o.specialize == "full",
    )
    # Beside the user's tensors there may be sensitivities; and a sweep's norm is of one system.
    if p.layout is not None and p.layout.sizes != [y0.numel()]:
        sizes = [*p.layout.sizes, y0.numel() - sum(p.layout.sizes)]
        sizes = p.layout.widths if isinstance(p.layout, SystemsLayout) else sizes
        request.lend(offsets=torch.tensor([0, *sizes], device="cpu").cumsum(0))
    # Not `out` itself: that gets a graph which holds the solve, which holds the request.
    request.lend(u0=y0, out=out.detach())
    request.lend_numbers(times=p.times, stops=o.step_t, jumps=o.jump_t)
    request.lend_tolerances(p.rtol, p.atol)
    if p.mass is not None:
        request.lend(mass=p.mass.T.to("cpu").contiguous())
    if p.method.kind == "adaptive" and isinstance(p.method.tableau, ExplicitTableau) and p.batch == 1:
        # Of a compiled field of which only states are asked for, our own loop takes the steps that SciML's would.
        tab = p.method.tableau
        request.stages, request.fsal, request.order = tab.stages, tab.fsal, p.method.order
        request.lend(**weights(tab))
    if p.batch > 1 and dense and not abreast(p):
        raise BadOption(
            f"the systems of a batch keep no dense output on the Julia engine with {p.method.name!r}: call "
            "solve(..., dense=False)."
        )
    # An f that is watched is called with gradients on, to see whether something in it needs one.
    with torch.set_grad_enabled(p.f.watched), runtime.julia() as calls:
        algorithm = _algorithm(calls, p.method if p.split is None else for_parts(p.method), gradient)
        solution, known = None, 1
        output: DenseOutput | SweptOutput | None = None
        if as_sweep:
            systems = Sweep(p, differentiated=gradient is not None)
            rhs = _field(calls, systems.first, gradient, stats)
            solution, outcome = systems.solve(calls, rhs, algorithm, request, stats)
            if swept is not None:
                swept.append(systems)
            if dense and solution is not None:
                output = SweptOutput(systems, solution)
        else:
            rhs = _field(calls, p, gradient, stats, of) if p.split is None else _parts(calls, p, gradient, stats)
            if isinstance(rhs, RHS):  # Julia asks for the first slope itself; of a large state each array counts
                p.f0 = p.f.probed = None
            solution, outcome = _call(rhs, calls.solve, rhs.field, algorithm, request)
            try:
                known = len(p.times) if outcome.succeeded and p.event_fn is None else 1
                rhs.look_back(p.times[:known], out.detach()[:known])
            except NotCompiled:
                if p.compile:
                    raise
                return _solve(p, stats, asked, dense, of)
            if p.repeats is not None and not (rhs.functions or dense) and gradient in (None, "discrete"):
                rhs.repeat(calls, algorithm, request)
    for part in rhs.parts:
        if isinstance(part, RHS):
            part.check_kept()
            _remember(of or part.p, p.times[:known], out.detach()[:known])
    _count(of or p, rhs, outcome.nf)
    _look_at(outcome, p, stats)
    event_t = outcome.event_time
    if dense and solution and not as_sweep:
        output = DenseOutput(rhs, solution)
    record = Record(out, output, None if math.isnan(event_t) else event_t)
    if p.batch > 1 and p.event_fn is not None:
        record.event_times, record.event_slopes = systems.event_times, systems.event_slopes
    elif p.event_fn is not None and record.event_t is None:
        raise ends.no_event(p, outcome.t, outcome.dt)
    return record, rhs, solution


def _remember(p: ODEProblem, times: list[float], states: Tensor) -> None:
    """Note of a first solve, which was called back, what is of use where the next is compiled.

    Args:
        states: at these times, shape (T, n), perhaps with sensitivities.
    """
    if p.f.seen:
        from .codegen.program import look_again  # half the cost of importing this package

        look_again(p.f, times, states[:, : p.y0.numel()])


def _count(p: ODEProblem, rhs: Callbacks, calls: int) -> None:
    """Note calls of the field of `p`, or of its parts, that is not called back."""
    for part in rhs.parts:
        if not isinstance(part, RHS):
            count(p.f if part is rhs else part.p.f, calls)


def count(f: Field, calls: int) -> None:
    """Note calls of a field that is not called back: for itself, and where the user's function counts its calls."""
    f.nfe += calls
    if f.program is not None:
        program, source = f.program
        for slot, step in zip(source.counters, program.trace.steps):
            slot.set(slot.get() + calls * step)
        for i, step in program.trace.adds.items():
            with torch.no_grad():
                source.tensors[i].add_(calls * step)


def _stepping(method: Method, o: SolverOptions) -> dict[str, float]:
    """How steps are chosen, as a request has it."""
    stepping = {"min_step": o.min_step, "max_step": o.max_step, "max_steps": o.max_num_steps}
    if method.kind != "adaptive":
        return stepping
    # SciML's own choice for explicit methods, (0.7 / k, 0.4 / k), lets steps grow so slowly that a short solve takes up
    # to twice as many, and aims at a third of the error: the same tolerance would mean something else on each engine.
    return stepping | controlled(method, o)


def _look_at(outcome: Outcome, p: ODEProblem, stats: Stats) -> None:
    """Take down the work of a solve, and raise if it failed."""
    stats.naccept, stats.nreject, stats.njac = outcome.naccept, outcome.nreject, outcome.njac
    stats.nlu, stats.nnewton = outcome.nlu, outcome.nnewton
    if not outcome.succeeded:
        raise _failure(outcome, p, f"system {outcome.system - 1} of the batch: " if p.batch > 1 else "")


def _again(p: ODEProblem, stats: Stats, name: str) -> tuple[Tensor, Held | None, Outcome] | None:
    """The states of a solve like an earlier one, shape (T, n), its steps, and how it went; None where none was kept
    that is.

    Args:
        name: of the function that is the field's, "f" or "sensitivities", or of the gradient that steps of "f" are kept
            for.
    """
    if p.repeats is None or name not in p.repeats:
        return None
    repeated = p.repeats[name]
    try:
        with unrecorded(), runtime.julia() as calls:
            program, source = p.f.program
            y0 = repeated.first(p.y0)
            out = y0.new_empty(len(p.times), len(y0))
            held, outcome = repeated.solve(calls, program.read(source), y0, out)
        count(p.f, outcome.nf)
        _look_at(outcome, p, stats)
    except BaseException:
        p.repeats.pop(name, None)
        raise
    stats.compiled = p.f.program[0].mode
    return out, held, outcome


def _field(calls: Calls, p: ODEProblem, gradient: str | None, stats: Stats, of: ODEProblem | None = None) -> Callbacks:
    """The problem's vector field for Julia: compiled where that can be and is not forbidden, else called back.

    Args:
        of: the problem that `p` is the one of the sensitivities of.

    Raises:
        NotCompiled: `compile=True`, and it cannot be.
    """
    if isinstance(p.f.f, JuliaFunction):
        return Source(calls, p, p.f.f)
    place = places.of(p.y0)
    if package := places.PACKAGES.get(place.kind):
        runtime.load(package)
    if p.compile is False or package:
        stats.not_compiled = f"the state lies on {place.device}" if package else "compile=False"
        if p.compile:
            raise NotCompiled(f"{stats.not_compiled}, and what is compiled runs on the CPU")
        return RHS(calls, p, gradient)
    from .codegen.field import Compiled  # half the cost of importing this package

    try:
        compiled = Compiled(calls, p, gradient, of)
    except NotCompiled as error:
        if p.compile:
            raise
        stats.compiled, stats.not_compiled = "", str(error)
        log.info("f is called back: %s", error)
        return RHS(calls, p, gradient)
    stats.compiled = compiled.program.mode
    return compiled


def _parts(calls: Calls, p: ODEProblem, gradient: str | None, stats: Stats) -> Parts:
    """The field of a problem as its parts. Of "interpolating", too, both products are asked for, one by one."""
    return Parts(
        calls,
        p,
        gradient is not None,
        lambda q: _field(calls, q, None if gradient is None else "interpolating", stats),
        stats,
    )


def _call(rhs: Callbacks, function: Any, *args: Any) -> Any:
    """Call Julia; what a callback raised there is raised here as itself."""
    if not rhs.functions:  # nothing is called back
        return function(*args)
    try:
        with rhs.listening():
            return function(*args)
    except Exception as error:
        rhs.raise_error()
        if isinstance(error, JuliaError) and not str(error):
            raise JuliaError("a function that was called back did not come to its end.") from error
        raise


def _algorithm(calls: Calls, method: Method, gradient: str | None) -> Held:
    expression = method.julia or ""
    if gradient not in (None, "discrete") and "Vern" in expression:
        # Verner's methods make the last stages of their dense output when it is asked for. Within SciMLSensitivity's
        # adjoints these come out wrong: a gradient at rtol=1e-8 was off by 1e-3.
        expression = re.sub(r"\bVern([6-9])\(\)", r"Vern\1(lazy=false)", expression)
    for name, package in packages.of(expression).items():
        if runtime.without(package):
            raise BadOption(
                f"method={method.name!r}: {name} is in {package}.jl, which is not among Julia's packages. Add it to "
                f'the project that `pyjlode doctor` names: import Pkg; Pkg.add("{package}")'
            )
        runtime.load(package, into="PyJLODE.Names")
    try:
        return runtime.algorithm(calls, expression)
    except JuliaError as error:
        raise BadOption(f"method={method.name!r}: Julia does not make a solver of that: {error}") from error


def _failure(outcome: Outcome, p: ODEProblem, what: str) -> SolveError:
    """The error of a solve that failed.

    Args:
        what: it was, for the message.
    """
    failure = _cause(outcome, p)
    failure.args = (f"{what}{failure}",)
    return failure


def _cause(outcome: Outcome, p: ODEProblem) -> SolveError:
    code, t, dt, finite = outcome.code.decode(), outcome.t, outcome.dt, bool(outcome.finite)
    if code in ("Success", "Terminated", "Default"):
        return NonFiniteState(f"{p.method.name}: the state is NaN or infinite by t={t:.6g}.", t=t, dt=dt)
    if code == "MaxIters":
        return ends.too_many_steps(p, t, dt, math.inf if p.event_fn and not p.onward else p.times[-1])
    too_small = code == "Unstable" and finite
    if too_small and p.method.controlled:
        return StepSizeTooSmall(
            f"{p.method.name}: at t={t:.9g} no step succeeds, down to dt={dt:.3g}: the solution blows up, f jumps "
            "there, or the equations of a step are not solved; the last if 'rodas5p' or 'bdf' gets past this time.",
            t=t,
            dt=dt,
        )
    if too_small or code == "DtLessThanMin":
        return ends.too_small(p, t, dt, 1.0)
    if code in ("DtNaN", "Unstable"):
        return ends.too_small(p, t, dt, math.nan)
    if code == "ConvergenceFailure":
        return NotConverged(f"{p.method.name}: the equations of a step at t={t:.6g} were not solved.", t=t, dt=dt)
    return SolveError(f"{p.method.name}: Julia's solver gave up at t={t:.6g}: {code}.", t=t, dt=dt)
