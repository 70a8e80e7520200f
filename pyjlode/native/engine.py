"""The front of the native engine: what `gradients.py` and the front door call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import forward
from ..errors import BadOption
from ..problem import ODEProblem
from ..solution import Stats
from . import dae, loop, scipy_ivp, sensitivity
from .loop import Record
from .sensitivity import Gradients

NAME = "torch"

# What `adjoint=True` means here. The replay is exact, and needs neither a second solve nor a choice of tolerances.
RECOMMENDED = "discrete"


@dataclass
class Memory:
    """What a forward solve keeps for its vector-Jacobian product."""

    problem: ODEProblem
    record: Record
    gradient: str
    sensitivities: Tensor | None = None


def solve(p: ODEProblem, stats: Stats, *, recorded: bool = False, dense: bool = False) -> Record:
    """Solve `p`; with `recorded`, under autograd."""
    if p.method.kind == "scipy":
        return scipy_ivp.solve(p, stats, dense=dense)
    return loop.solve(p, stats, recorded=math.inf if recorded else 0, dense=dense)


def consistent(p: ODEProblem) -> Tensor:
    """y0 as the algebraic equations of `p`, which has a mass matrix, allow it; with a graph."""
    return dae.consistent(p)


def slope(p: ODEProblem, t: Tensor, y: Tensor) -> Tensor:
    """dy/dt of the solution through (t, y), shape (n,)."""
    return p.f(t, y) if p.mass is None else dae.Algebra(p).slope(t, y)


def solve_for_vjp(p: ODEProblem, stats: Stats, gradient: str, *, dense: bool = False) -> Memory:
    """Solve `p` and keep what `vjp` needs for the gradient method named."""
    kept = dense or gradient in ("interpolating", "quadrature", "gauss")
    if p.method.kind == "scipy":
        if gradient not in ("backsolve", "interpolating"):
            raise BadOption(
                f"adjoint={gradient!r} follows the steps of the solver, which scipy_solver keeps to itself; use "
                "adjoint='backsolve' or 'interpolating'."
            )
        return Memory(p, scipy_ivp.solve(p, stats, dense=kept), gradient)
    if gradient == "forward":
        record, S = sensitivity.solve_forward(p, stats, dense=dense)
        return Memory(p, record, gradient, S)
    if gradient == "discrete":
        return Memory(p, loop.solve(p, stats, recorded=sensitivity.graph_steps(p), steps=True, dense=kept), gradient)
    return Memory(p, loop.solve(p, stats, dense=kept), gradient)


def vjp(memory: Memory, g: Tensor, *, again: bool) -> Gradients:
    """Gradients of a loss with cotangents g (T, n) of the states at the output times.

    Args:
        again: this memory will be used once more.
    """
    p, record = memory.problem, memory.record
    with torch.no_grad():
        if memory.gradient == "discrete":
            return sensitivity.discrete(p, record, g, again=again)
        if memory.gradient == "forward":
            assert memory.sensitivities is not None
            return forward.contract(
                p, record, memory.sensitivities, g, None if p.mass is None else dae.Algebra(p).slope
            )
        return sensitivity.continuous(p, record, g, memory.gradient)
