"""The front of the Julia engine: what `gradients.py` and the front door call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import failures
from ..errors import NonFiniteState, NotConverged, SolveError
from ..gradients import Gradients, time_gradient
from ..problem import ODEProblem, SolverOptions, is_finite
from ..solution import Stats
from . import runtime
from .memory import borrow
from .rhs import RHS

NAME = "julia"

# What `adjoint=True` means here.
RECOMMENDED = "gauss"

GRADIENTS = ("backsolve", "interpolating", "quadrature", "gauss")
_OPTIONS = {"first_step", "min_step", "max_step", "max_num_steps", "step_t", "jump_t", "step_size"}


@dataclass
class Record:
    """What a solve leaves behind.

    Attributes:
        ys: (T, n) states at the output times; with an event, at the start and at the event.
        dense: the dense output, (M,) times -> (M, n), where it was to be kept.
        event_t: time of the event.
        last: nothing here: the steps are Julia's.
    """

    ys: Tensor
    dense: DenseOutput | None = None
    event_t: float | None = None
    last: None = None


@dataclass
class Memory:
    """What a forward solve keeps for its vector-Jacobian product."""

    problem: ODEProblem
    record: Record
    gradient: str
    rhs: RHS | None
    solve: Any


class DenseOutput:
    """The solution as a function of time, from Julia's."""

    def __init__(self, rhs: RHS, solve: Any) -> None:
        self.rhs, self.solve = rhs, solve

    def __call__(self, times: Tensor) -> Tensor:
        """Times of shape (M,) -> states of shape (M, n)."""
        out = torch.empty(len(times), self.rhs.n, dtype=self.rhs.dtype)
        with torch.no_grad(), runtime.julia() as jl:
            ts = times.detach().to(torch.float64).cpu().contiguous()
            _call(self.rhs, jl.interpolate_b, self.solve, borrow(jl, ts), borrow(jl, out))
        return out


def cannot(p: ODEProblem, gradient: str | None) -> str | None:
    """Why this engine cannot solve `p` with this gradient method; None if it can."""
    if p.method.julia is None:
        return f"method={p.method.name!r} has no counterpart there"
    if p.y0.device.type != "cpu":
        return f"the state lies on {p.y0.device}, and this version hands only CPU tensors to Julia"
    if gradient is not None and gradient not in GRADIENTS:
        return f"adjoint={gradient!r} replays or extends the steps of the native engine"
    default = SolverOptions()
    changed = {name for name, value in vars(p.options).items() if value != getattr(default, name)}
    if changed - _OPTIONS:
        return f"options {sorted(changed - _OPTIONS)} configure the native engine's own loop"
    if any((p.callbacks.step, p.callbacks.accept, p.callbacks.reject)):
        return "f has callbacks (callback_step and the like), which the native engine calls"
    return None


def solve(p: ODEProblem, stats: Stats, *, recorded: bool = False, dense: bool = False) -> Record:
    assert not recorded, "the front door keeps solves that autograd must follow from this engine"
    return _solve(p, stats, None, dense)[0]


def solve_for_vjp(p: ODEProblem, stats: Stats, gradient: str, *, dense: bool = False) -> Memory:
    """Solve `p` and keep what `vjp` needs for the gradient method named."""
    record, rhs, solution = _solve(p, stats, gradient, dense)
    return Memory(p, record, gradient, rhs, solution)


def vjp(memory: Memory, g: Tensor, *, again: bool) -> Gradients:
    """Gradients of a loss with cotangents g (T, n) of the states at the output times."""
    p, record, rhs = memory.problem, memory.record, memory.rhs
    if rhs is None:  # nothing was solved
        return Gradients(g.sum(0), time_gradient(p, record, g, torch.zeros_like(p.y0)), [None] * len(p.params))
    assert p.adjoint is not None
    times = p.times if record.event_t is None else [p.times[0], record.event_t]
    a, theta = torch.zeros_like(p.y0), torch.zeros(rhs.params.size, dtype=p.y0.dtype)
    with torch.no_grad(), runtime.julia() as jl:
        runtime.sensitivity()
        settings = p.adjoint
        _call(
            rhs,
            jl.adjoint_b,
            borrow(jl, a),
            borrow(jl, theta),
            memory.solve,
            memory.gradient,
            jl.algorithm(settings.method.julia),
            borrow(jl, torch.tensor(times, dtype=torch.float64)),
            borrow(jl, g.contiguous()),
            rtol=_tolerance(jl, settings.rtol),
            atol=_tolerance(jl, settings.atol),
            max_steps=settings.options.max_num_steps,
        )
    params = [x.to(q.device, q.dtype) for x, q in zip(rhs.params.leaves(theta), p.params)]
    return Gradients(a + g[0], time_gradient(p, record, g, a), params)


def _solve(p: ODEProblem, stats: Stats, gradient: str | None, dense: bool) -> tuple[Record, RHS | None, Any]:
    if len(p.times) == 1 or p.y0.numel() == 0:
        return Record(p.y0.detach().expand(len(p.times), -1).clone()), None, None
    o = p.options
    y0 = p.y0.detach().contiguous()
    out = torch.empty(len(p.times), y0.numel(), dtype=y0.dtype)
    with torch.no_grad(), runtime.julia() as jl:
        algorithm = jl.algorithm(p.method.julia)
        adaptive, implicit = jl.traits(algorithm)
        rhs = RHS(jl, p, gradient=gradient, implicit=implicit)
        fixed = p.method.kind not in ("adaptive", "scipy")
        sizes = p.layout.sizes if p.layout is not None else [y0.numel()]
        solution, outcome = _call(
            rhs,
            jl.solve,
            rhs.field,
            algorithm,
            borrow(jl, y0),
            borrow(jl, torch.tensor(p.times, dtype=torch.float64)),
            borrow(jl, out),
            borrow(jl, torch.tensor([0, *sizes]).cumsum(0)),
            rtol=_tolerance(jl, p.rtol),
            atol=_tolerance(jl, p.atol),
            parameters=rhs.params.size if gradient else 0,
            adaptive=adaptive and not fixed,
            first_step=(o.step_size if fixed else o.first_step) or 0.0,
            max_step=o.max_step,
            min_step=o.min_step,
            max_steps=o.max_num_steps,
            stops=borrow(jl, torch.tensor(o.step_t, dtype=torch.float64)),
            jumps=borrow(jl, torch.tensor(o.jump_t, dtype=torch.float64)),
            dense=dense or gradient is not None,
        )
    code, t, dt, stats.naccept, stats.nreject, stats.njac, _, _, event_t = outcome
    if code not in ("Success", "Terminated", "Default"):
        raise _failure(p, code, t, dt)
    if not is_finite(out):
        raise NonFiniteState(f"{p.method.name}: the state is NaN or infinite by t={t:.6g}.", t=t, dt=dt)
    record = Record(out, DenseOutput(rhs, solution) if dense else None, None if math.isnan(event_t) else event_t)
    if p.event_fn is not None and record.event_t is None:
        raise failures.no_event(p, t, dt)
    return record, rhs, solution


def _call(rhs: RHS, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call Julia; what a callback raised there is raised here as itself."""
    try:
        return function(*args, **kwargs)
    except Exception:
        rhs.raise_error()
        raise


def _tolerance(jl: Any, tol: float | Tensor) -> Any:
    return borrow(jl, tol.contiguous()) if isinstance(tol, Tensor) else tol


def _failure(p: ODEProblem, code: str, t: float, dt: float) -> SolveError:
    if code == "MaxIters":
        return failures.too_many_steps(p, t, dt, math.inf if p.event_fn else p.times[-1])
    if code == "DtLessThanMin":
        return failures.too_small(p, t, dt, 1.0)
    if code in ("DtNaN", "Unstable"):
        return failures.too_small(p, t, dt, math.nan)
    if code == "ConvergenceFailure":
        return NotConverged(f"{p.method.name}: the equations of a step at t={t:.6g} were not solved.", t=t, dt=dt)
    return SolveError(f"{p.method.name}: Julia's solver gave up at t={t:.6g}: {code}.", t=t, dt=dt)
