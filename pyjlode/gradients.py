"""The one autograd Function: the forward pass is a solve, the backward pass asks the same engine for its product."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import numbers, parameters
from .derivatives import check_graph
from .errors import BadOption, Discovered, GradientUnavailable
from .methods import Method, unknown
from .problem import ODEProblem, like
from .solution import Stats, Steps

# Name -> what it is, for the documentation and for the error on an unknown name.
GRADIENTS: dict[str, str] = {
    "discrete": "replays each accepted step backward: the exact gradient of the numbers that came out",
    "checkpointed": "as discrete, with the states of O(log steps) of the steps, the rest being computed again",
    "reversible": "as discrete, without any states: undoes the steps of a method that is reversible",
    "backsolve": "solves h backward beside the adjoint: O(1) memory in the number of steps",
    "interpolating": "solves the adjoint along the dense output of the forward solve",
    "quadrature": "solves the adjoint, then integrates over time for the parameters by adaptive quadrature",
    "gauss": "as interpolating, with the parameters' integral by Gauss quadrature in each step: no state of their size",
    "forward": "solves the sensitivities beside the state: for few parameters and few states",
}
# Those that replay the steps: the exact gradient of the numbers that came out.
REPLAYS = ("discrete", "checkpointed", "reversible")
# Those with a backward solve, which may have settings of its own.
CONTINUOUS = ("backsolve", "interpolating", "quadrature", "gauss")


class Gradients(NamedTuple):
    """dL/dy0 (n,), dL/dt (T,) or None where t wants none, dL/dparam for each parameter or None where f never used
    it."""

    y0: Tensor
    t: Tensor | None
    params: Sequence[Tensor | None]


def reached(p: ODEProblem, record: Any) -> list[float]:
    """The times of a record's states."""
    return p.times if record.event_t is None else [*p.times[: record.passed], record.event_t]


def time_gradient(
    p: ODEProblem, record: Any, g: Tensor, a: Tensor, slope: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor | None:
    """dL/dt_i = g_i y'(t_i), and dL/dt_0 = -a(t_0) y'(t_0) with a before g_0 is added to it.

    Args:
        slope: (t, y) -> y', where it is not f.
    """
    if not p.t.requires_grad:
        return None
    values, slope = [0.0] * len(p.times), slope or p.f
    with torch.no_grad():
        for i in range(1, len(p.times) if record.event_t is None else record.passed):
            values[i] = float(g[i] @ slope(p.time(p.times[i]), record.ys[i]))
        values[0] = -float(a @ slope(p.time(p.times[0]), p.y0)) if len(p.times) > 1 else 0.0
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class Engine(Protocol):
    """What an engine offers; `pyjlode.native.engine` is one.

    Attributes:
        NAME: what the user calls it.
    """

    NAME: str

    def recommended(self, p: ODEProblem, *, asked: bool = False) -> str: ...

    def watch(self, p: ODEProblem) -> Steps | None: ...

    def solve(self, p: ODEProblem, stats: Stats, *, recorded: bool = False, dense: bool = False) -> Any: ...

    def solve_for_vjp(self, p: ODEProblem, stats: Stats, gradient: str, *, dense: bool = False) -> Any: ...

    def vjp(self, memory: Any, g: Tensor, *, again: bool) -> Any: ...


def check(adjoint: Any, method: Method, allow_unstable: bool) -> None:
    """
    Raises:
        BadOption: no such gradient method, and the message lists the near names; or it is wrong with this solver.
    """
    if adjoint is False or adjoint is True:
        return
    if adjoint not in GRADIENTS:
        raise BadOption(unknown(adjoint, "gradient method (adjoint=)", list(GRADIENTS)))
    if adjoint == "checkpointed" and not method.alone:
        raise BadOption(
            f"adjoint='checkpointed' takes steps again from their states alone, and those of {method.name} depend on "
            "what earlier steps left (Jacobians, factors, differences). Use 'rodas5p' or 'rosenbrock23' for a stiff "
            "system, or adjoint='discrete'."
        )
    if adjoint == "reversible" and not method.reversible:
        raise BadOption(
            f"adjoint='reversible' undoes the steps of a method, which {method.name} does not allow. Use "
            "'reversible_rk4', a symplectic method (such as 'yoshida4', for f=pyjlode.SecondOrder(a)), or "
            "adjoint='checkpointed' to save memory."
        )
    if adjoint == "forward" and method.kind == "second":
        raise BadOption(
            f"adjoint='forward' solves a system that is not of second order, which {method.name} is for. Use "
            "adjoint=True."
        )
    if adjoint == "backsolve" and method.controlled and not allow_unstable:
        raise BadOption(
            "adjoint='backsolve' solves h' = f(t, h) backward in time, where what a stiff system damps grows: its "
            f"gradient would be wrong ({method.name} is for stiff systems). Use adjoint=True, 'interpolating' or "
            "'gauss', or insist by options={'allow_unstable': True}."
        )


def find(adjoint: bool | str, engine: Engine, p: ODEProblem) -> str | None:
    """The name of the gradient method that `adjoint`, which was checked, asks for; None is differentiation through the
    solver.

    Raises:
        BadOption: it is wrong for this problem.
    """
    if adjoint is False:
        return None
    if adjoint is True:
        return engine.recommended(p)
    if adjoint == "backsolve" and p.mass is not None:
        raise BadOption("adjoint='backsolve' does not solve systems with a mass_matrix; use 'discrete' or 'gauss'.")
    return adjoint


class _Solve(torch.autograd.Function):
    """The states of a solve that was made before, as a function of y0, t and the parameters."""

    @staticmethod
    def forward(
        ctx: Any, engine: Engine, memory: Any, stats: Stats, sight: Sight | None, y0: Tensor, t: Tensor, *params: Tensor
    ) -> Tensor:
        ctx.engine, ctx.memory, ctx.stats, ctx.sight = engine, memory, stats, sight
        # Autograd's own check that nothing which the backward pass reads was changed in place in between. The output
        # goes this way too: kept in `memory` it would hold itself alive.
        record, ys = memory.record, memory.record.ys
        ctx.save_for_backward(y0, t, ys if memory.gradient not in REPLAYS or t.requires_grad else None, *params)
        memory.record = like(record, ys=None)
        return ys

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        memory = ctx.memory
        if torch.is_grad_enabled():
            raise first_only(memory.gradient)
        _, t, ys, *_ = ctx.saved_tensors
        p = memory.problem
        start, before = time.perf_counter(), p.nfe
        memory.record.ys = ys
        try:
            # `loss.backward(retain_graph=True)` announces another backward pass.
            again = torch._C._autograd._get_current_graph_task_keep_graph()
            with parameters.bound(p.bindings, p.params), parameters.unheard(p.params):
                if ctx.sight:
                    ctx.sight.check(p)
                grads = numbers.for_each(lambda g, again: ctx.engine.vjp(memory, g, again=again), g, again)
        finally:
            memory.record.ys = None
        ctx.stats.nfe_backward += p.nfe - before
        ctx.stats.wall_backward += time.perf_counter() - start
        grad_t = grads.t if grads.t is None else grads.t.to(t)
        return None, None, None, None, grads.y0, grad_t, *grads.params


def first_only(gradient: str) -> GradientUnavailable:
    """The error of a backward pass that is to be differentiated in turn."""
    return GradientUnavailable(
        f"adjoint={gradient!r} gives first derivatives only, and create_graph=True asks for more. Solve with "
        "adjoint=False (and without compile=True), which can be differentiated again."
    )


class Sight(NamedTuple):
    """f at the end of a solve: what it uses there, and whether a backward pass has the same f.

    Attributes:
        t, y: the point. k: f there, without graph.
    """

    t: Tensor
    y: Tensor
    k: Tensor

    @classmethod
    def of(cls, p: ODEProblem, record: Any) -> Sight:
        """
        Raises:
            Discovered: f uses tensors there that it was not known to use.
        """
        if p.rows is not None:
            t, y = record.end
        else:
            end = p.times[-1] if record.event_t is None else record.event_t
            t, y = p.asked(end, p.times[0]), record.ys[-1].detach()
        k, reached = look(p, t, y)
        if p.makes_leaves:  # what recurs in a second call is none of these
            look(p, t, y)
        if not p.reached <= reached:
            # Is what f used at the start out of use here, or was it lost in a result that f keeps?
            beyond = torch.nextafter(t, t + p.direction * (1 + t.abs()))
            if not p.reached.isdisjoint(look(p, beyond, y)[1] - reached):
                raise GradientUnavailable(
                    "f keeps results for times at which it was called before (in a cache), made while nothing was "
                    "recorded: the gradient of what they were made of would be lost. Keep none, or solve with "
                    "adjoint=False."
                )
        return cls(t, y, k)

    def check(self, p: ODEProblem) -> None:
        """
        Raises:
            GradientUnavailable: f is another one now.
        """
        with torch.no_grad():
            k = p.f(self.t, self.y)
        eps = torch.finfo(k.dtype).eps ** 0.5
        if k.numel() and not float((k - self.k).abs().max()) <= eps * float(self.k.abs().max()):
            raise other_function()


def look(p: ODEProblem, t: Tensor, y: Tensor) -> tuple[Tensor, set[int]]:
    """f(t, y) without graph, and the `id` of each of the problem's parameters that its graph reaches.

    Raises:
        Discovered: it reaches others.
    """
    mark = parameters.graph_mark()
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        k = p.f(t, y)
    check_graph(p, [k], (t, y), mark)
    reached = parameters.strangers([k], {id(t), id(y)}, {}, mark)[0]
    return k.detach().clone(), {id(x) for x in reached}


def other_function() -> GradientUnavailable:
    """The error of a backward pass whose f is not that of the forward solve."""
    return GradientUnavailable(
        "f gives other values in the backward pass than it gave in the solve, so that a gradient made of them would be "
        "wrong. Either f is random (dropout: put it into eval(), or draw the noise once for each solve), or what it "
        "reads was changed in between (a number, an attribute, a buffer). Run backward() before changing it, or solve "
        "with adjoint=False, which does not call f again."
    )


class _Undifferentiable(torch.autograd.Function):
    """Passes tensors on; its backward pass says why there is none, unless nothing is asked of it."""

    @staticmethod
    def forward(ctx: Any, why: str, passed: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.why, ctx.rest = why, len(inputs) - passed
        return tuple(x.clone() for x in inputs[:passed])

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Any, ...]:
        if any(bool(g.any()) for g in bars):
            raise GradientUnavailable(ctx.why)
        return None, None, *bars, *[None] * ctx.rest


def undifferentiable(why: str, *tensors: Tensor, of: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """The tensors as results whose gradient cannot be had.

    Args:
        of: what else they are functions of.
    """
    return _Undifferentiable.apply(why, len(tensors), *tensors, *of)


_SCIPY = (
    "adjoint=False differentiates through the solver's operations, and scipy_solver's are not PyTorch's. Use "
    "adjoint=True (which is 'interpolating' for it) or adjoint='backsolve'."
)


# A solve that finds more of what f uses begins again; f uses so many things one after the other, and not more.
_BEGINNINGS = 50


def solve(engine: Engine, p: ODEProblem, stats: Stats, gradient: str | None, needed: bool, dense: bool) -> Any:
    """Solve `p` so that its result carries the gradient asked for; returns the engine's record.

    Args:
        gradient: name of the gradient method; None differentiates through the solver.
        needed: whether anything requires grad at all.
    """
    asked = p
    if not needed:
        try:
            return _unrecorded(engine, p, stats, dense)
        except Discovered as error:
            p = _extended(p, error, stats)
    if gradient is None:
        record = engine.solve(p, stats, recorded=True, dense=dense)
        if p.method.kind == "scipy":
            (record.ys,) = undifferentiable(_SCIPY, record.ys, of=(p.y0, *p.params))
        return record
    for attempt in itertools.count():
        leaf = like(p, y0=p.y0.detach().requires_grad_(), t=p.t.detach().requires_grad_(p.t.requires_grad))
        if p.mass is not None and p.mass.requires_grad:  # what it was made of is not reached through it as well
            leaf.mass = p.mass.detach().requires_grad_()
            leaf.params = tuple(leaf.mass if x is p.mass else x for x in p.params)
        try:
            with torch.no_grad(), parameters.unheard(p.params):
                memory = engine.solve_for_vjp(leaf, stats, gradient, dense=dense)
                in_julia = stats.compiled and engine.NAME == "julia"
                sight = Sight.of(leaf, memory.record) if memory.asks_again and not in_julia else None
            break
        except Discovered as error:
            if attempt == _BEGINNINGS:
                raise GradientUnavailable(
                    "every call of f reaches tensors of the calls before it: f keeps what it computes with its graph, "
                    "as in a buffer that it returns and writes to again. Return a new tensor from each call, or solve "
                    "with adjoint=False."
                ) from error
            p = _extended(p, error, stats)
            if attempt:  # new ones in every solve are f's own
                p = like(p, makes_leaves=True)
    asked.params, asked.makes_leaves = p.params, p.makes_leaves  # for a solve that goes on from here
    record = memory.record
    ys = _Solve.apply(engine, memory, stats, sight, p.y0, p.t, *p.params)
    return like(record, ys=ys)


def _unrecorded(engine: Engine, p: ODEProblem, stats: Stats, dense: bool) -> Any:
    """Solve `p`, of which nothing is known to need a gradient.

    Raises:
        Discovered: something does, which f did not use at the start.
    """
    if not torch.is_grad_enabled() or p.named:
        return engine.solve(p, stats, dense=dense)
    fields = [p.f, *(p.split or ())]
    for f in fields:
        f.watched = True
    try:
        record = engine.solve(p, stats, dense=dense)
        if engine.NAME == "julia" and not stats.compiled:
            Sight.of(p, record)
    finally:
        for f in fields:
            f.watched = False
    return record


def _extended(p: ODEProblem, found: Discovered, stats: Stats) -> ODEProblem:
    """The problem with more parameters, which were found in the course of its solve; that begins again."""
    vars(stats).update(vars(Stats(stats.engine, stats.reason, stats.method, stats.copied)))
    return like(p, params=(*p.params, *{id(x): x for x in found.tensors}.values()))
