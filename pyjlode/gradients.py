"""The one autograd Function: the forward pass is a solve, the backward pass asks the same engine for its product."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import BadOption, GradientUnavailable
from .methods import unknown
from .problem import ODEProblem, like
from .solution import Stats

# Name -> what it is, for the documentation and for the error on an unknown name.
GRADIENTS: dict[str, str] = {
    "discrete": "replays each accepted step backward: the exact gradient of the numbers that came out",
    "backsolve": "solves h backward beside the adjoint: O(1) memory in the number of steps",
    "interpolating": "solves the adjoint along the dense output of the forward solve",
    "quadrature": "solves the adjoint, then integrates over time for the parameters by adaptive quadrature",
    "gauss": "as interpolating, with the parameters' integral by Gauss quadrature in each step: no state of their size",
    "forward": "solves the sensitivities beside the state: for few parameters and few states",
}


class Gradients(NamedTuple):
    """dL/dy0 (n,), dL/dt (T,) or None where t wants none, dL/dparam for each parameter or None where f never used
    it."""

    y0: Tensor
    t: Tensor | None
    params: Sequence[Tensor | None]


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
        for i in range(1, len(p.times) if record.event_t is None else 1):
            values[i] = float(g[i] @ slope(p.time(p.times[i]), record.ys[i]))
        values[0] = -float(a @ slope(p.time(p.times[0]), p.y0)) if len(p.times) > 1 else 0.0
    return torch.tensor(values, dtype=torch.float64)


class Engine(Protocol):
    """What an engine offers; `pyjlode.native.engine` is one."""

    NAME: str
    RECOMMENDED: str

    def solve(self, p: ODEProblem, stats: Stats, *, recorded: bool = False, dense: bool = False) -> Any: ...

    def solve_for_vjp(self, p: ODEProblem, stats: Stats, gradient: str, *, dense: bool = False) -> Any: ...

    def vjp(self, memory: Any, g: Tensor, *, again: bool) -> Any: ...


def find(adjoint: bool | str, engine: Engine, p: ODEProblem) -> str | None:
    """The name of the gradient method that `adjoint` asks for; None is differentiation through the solver.

    Raises:
        BadOption: no such gradient method; the message lists the near names.
    """
    if adjoint is False:
        return None
    if adjoint is True:
        return "interpolating" if p.method.kind == "scipy" else engine.RECOMMENDED
    if adjoint not in GRADIENTS:
        raise BadOption(unknown(adjoint, "gradient method (adjoint=)", list(GRADIENTS)))
    if adjoint == "backsolve" and p.mass is not None:
        raise BadOption("adjoint='backsolve' does not solve systems with a mass_matrix; use 'discrete' or 'gauss'.")
    if adjoint == "backsolve" and p.method.controlled and not p.options.allow_unstable:
        raise BadOption(
            "adjoint='backsolve' solves h' = f(t, h) backward in time, where what a stiff system damps grows: its "
            f"gradient would be wrong ({p.method.name} is for stiff systems). Use adjoint=True, 'interpolating' or "
            "'gauss', or insist by options={'allow_unstable': True}."
        )
    return adjoint


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        p: ODEProblem,
        stats: Stats,
        gradient: str,
        dense: bool,
        out: list[Any],
        y0: Tensor,
        t: Tensor,
        *params: Tensor,
    ) -> Tensor:
        p = like(p, y0=y0.detach().requires_grad_(), t=t.detach().requires_grad_(ctx.needs_input_grad[7]))
        memory = engine.solve_for_vjp(p, stats, gradient, dense=dense)
        ctx.engine, ctx.memory, ctx.stats, ctx.nfe = engine, memory, stats, p.f
        # Autograd's own check that nothing which the backward pass reads was changed in place in between. The output
        # goes this way too: kept in `memory` it would hold itself alive.
        record, ys = memory.record, memory.record.ys
        ctx.save_for_backward(y0, t, ys if gradient != "discrete" else None, *params)
        out.append(record)
        memory.record = like(record, ys=None)
        return ys

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise GradientUnavailable(
                f"adjoint={ctx.memory.gradient!r} gives first derivatives only, and create_graph=True asks for more. "
                "Solve with adjoint=False, which can be differentiated again."
            )
        _, t, ys, *_ = ctx.saved_tensors
        start, before = time.perf_counter(), ctx.nfe.nfe
        ctx.memory.record.ys = ys
        try:
            # `loss.backward(retain_graph=True)` announces another backward pass.
            again = torch._C._autograd._get_current_graph_task_keep_graph()
            grads = ctx.engine.vjp(ctx.memory, g, again=again)
        finally:
            ctx.memory.record.ys = None
        ctx.stats.nfe_backward += ctx.nfe.nfe - before
        ctx.stats.wall_backward += time.perf_counter() - start
        grad_t = grads.t if grads.t is None else grads.t.to(t)
        return None, None, None, None, None, None, grads.y0, grad_t, *grads.params


class _Undifferentiable(torch.autograd.Function):
    """Passes states on; its backward pass says why there is none."""

    @staticmethod
    def forward(ctx: Any, ys: Tensor, *inputs: Tensor) -> Tensor:
        return ys.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        raise GradientUnavailable(
            "adjoint=False differentiates through the solver's operations, and scipy_solver's are not PyTorch's. Use "
            "adjoint=True (which is 'interpolating' for it) or adjoint='backsolve'."
        )


def solve(engine: Engine, p: ODEProblem, stats: Stats, gradient: str | None, needed: bool, dense: bool) -> Any:
    """Solve `p` so that its result carries the gradient asked for; returns the engine's record.

    Args:
        gradient: name of the gradient method; None differentiates through the solver.
        needed: whether anything requires grad at all.
    """
    if not needed or gradient is None:
        record = engine.solve(p, stats, recorded=needed, dense=dense)
        if needed and p.method.kind == "scipy":
            record.ys = _Undifferentiable.apply(record.ys, p.y0, *p.params)
        return record
    out: list[Any] = []
    ys = _Solve.apply(engine, p, stats, gradient, dense, out, p.y0, p.t, *p.params)
    return like(out[0], ys=ys)
