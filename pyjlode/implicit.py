"""Fully implicit systems F(t, y, y') = 0 as systems M z' = g(t, z).

Where F is linear in y' with constant coefficients, z is y. Else let W be a basis of what F sees of y', which is the row
space of dF/dy'. With u = Wᵀ y' the system is

    0 = F(t, y, W u),    Wᵀ y' = u

for z = (y, u). Its index is 1 exactly where that of F is: where [dF/dy V, dF/dy' W] is regular, V a basis of the null
space of dF/dy' (März, Numerical methods for differential-algebraic equations, Acta Numerica 1, 1992). So every method,
adjoint and engine for systems with a mass matrix solves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from . import arguments, numbers
from .errors import BadOption, BadShape, HighIndex, InconsistentStart, NotConverged
from .problem import Equation, ODEProblem
from .solution import Solution
from .systems import Implicit

if TYPE_CHECKING:
    from .solver import Solver

# Of u, which follows from y: no step is made for it.
_NO_TOLERANCE = 1e30


class Slopes(nn.Module):
    """The field g of z = (y, u).

    Attributes:
        W: (d, r), orthonormal. checks: whether a start that is not consistent is refused.
    """

    def __init__(self, of: Implicit, W: Tensor, checks: bool) -> None:
        super().__init__()
        self.of, self.W, self.checks = of, W, checks

    def forward(self, t: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(t, (y, u)) -> (F(t, y, W u), u)."""
        y, u = z
        return self.of.F(t, y, (self.W.to(u) @ u).reshape(y.shape)), u

    def look_at_start(self, p: ODEProblem, given: Tensor) -> None:
        """Check the start that was made consistent against the one that was given.

        Raises:
            InconsistentStart: y had to change.
        """
        change = (p.y0 - given).detach()
        if self.checks and p.norm(change / (p.atol + p.rtol * given.detach().abs())) > 1:
            off = float(change[: len(self.W)].abs().max())
            raise InconsistentStart(
                f"h0 does not satisfy F(t, y, y') = 0 for any y' at t={p.times[0]:.6g}: its algebraic part is off by "
                f"{off:.3g}, more than rtol and atol. Pass a consistent h0, or options={{'consistent': 'compute'}} to "
                "have the algebraic part computed from the rest."
            )


Solve: TypeAlias = "Callable[[Any, Equation], Solution[Any]]"


def solved(solver: Solver, e: Equation, solve: Solve) -> Solution[Any]:
    """
    Args:
        solve: solves an equation whose field is not implicit, or is with its `mass_matrix`.

    Raises:
        BadOption: of what an implicit field does not go with, or what F sees of y' is not constant.
    """
    if e.mass_matrix is not None:
        raise BadOption("mass_matrix: an Implicit field has one of its own.")
    if not isinstance(e.h0, Tensor) or e.h0.is_complex() or solver._forward.options.get("batch_dims"):
        raise BadOption("an Implicit field is for a state that is one real tensor, and not for batch_dims.")
    t0 = torch.as_tensor(e.t).reshape(-1)[0].detach().to(e.h0)
    M = e.f.mass(t0, e.h0)
    if M is not None:
        return solve(solver, e._replace(mass_matrix=M))
    try:
        solution = solve(*posed(solver, e, t0))
    except (HighIndex, NotConverged) as error:
        if isinstance(error, NotConverged) and (error.dt or error.t != float(t0)):
            raise
        raise explained(error, float(t0)) from error
    whole = solution._interpolant
    return replace(solution, h=solution.h[0], _interpolant=whole and (lambda t: whole(t)[0]))


def posed(solver: Solver, e: Equation, t0: Tensor) -> tuple[Solver, Equation]:
    """How the system of z = (y, u) is solved."""
    f, y0, said = e.f, e.h0, solver._forward
    if not said.method.mass:
        arguments.mass_matrix(torch.eye(1), said.method, arguments.layout_of(y0), 1)  # says which methods do
    if e.events is not None or e.jac is not None:
        raise BadOption(
            "events and jac are for an Implicit field that is linear in y' with constant coefficients, which this one "
            "is not. Write it with a mass_matrix, for the state (y, z) with y' = z."
        )
    W, slope = visible(f, t0, y0), torch.zeros_like(y0) if f.dy0 is None else f.dy0.to(y0)
    if slope.shape != y0.shape:
        raise BadShape(f"dy0 has shape {tuple(slope.shape)}, and h0 {tuple(y0.shape)}.")
    d, r = W.shape
    mass = W.new_zeros(d + r, d + r)
    mass[d:, :d] = W.T
    usual = arguments.DEFAULTS[y0.dtype]
    changed: dict[str, Any] = {"atol": (usual[1] if solver.atol is None else solver.atol, _NO_TOLERANCE)}
    if isinstance(solver.rtol, Tensor) and solver.rtol.ndim:
        changed["rtol"] = (solver.rtol, usual[0])
    if solver.adjoint_atol is not None:
        changed["adjoint_atol"] = (solver.adjoint_atol, _NO_TOLERANCE)
    checks = said.options.get("consistent", "check") == "check"
    changed["options"] = {**said.options, "consistent": "compute"}
    own, event_fn = type(solver)(**{**solver._said, **changed}), e.event_fn
    equation = e._replace(
        f=Slopes(f, W, checks),
        h0=(y0, W.T @ slope.reshape(-1)),
        mass_matrix=mass,
        event_fn=event_fn and (lambda t, z: event_fn(t, z[0])),
    )
    return own, equation


def visible(f: Implicit, t: Tensor, y: Tensor) -> Tensor:
    """W, (d, r), of dF/dy' at the start.

    Raises:
        BadOption: the null space of dF/dy' is another one near by.
    """
    y = y.detach()
    dy = torch.zeros_like(y) if f.dy0 is None else f.dy0.detach().to(y)
    ways = torch.cos(torch.arange(1.0, 3 * y.numel() + 1, device=y.device)).to(y).reshape(3, *y.shape)
    size = y.abs().mean() + 1e-3
    leading = [
        f.leading(t + s * (1 + t.abs()), y + s * size * ways[0], dy + s * (size * ways[1] + dy.abs() * ways[2]))
        for s in (0.0, 1e-2, -0.3)
    ]
    leading = [E for E in leading if bool(E.detach().isfinite().all())]
    if not leading:
        raise BadOption(
            "dF/dy' is NaN or infinite at the start, with the y' that dy0= of Implicit gives (zero by default). Pass "
            "dy0, a guess of y' there."
        )
    # A coefficient that happens to be zero at the start, as that of y'² with y' = 0, is seen beside it.
    stacked = torch.cat(leading)
    E = stacked.detach()
    _, sizes, Vh = torch.linalg.svd(E)
    rank = int((sizes > 1e-7 * sizes.amax()).sum())
    for some in leading[1:]:
        if int(torch.linalg.matrix_rank(some.detach(), rtol=1e-7)) != rank:
            raise BadOption(
                "what F(t, y, y') sees of y' changes: the null space of dF/dy' is not constant, which Implicit takes. "
                "Write y' = z, 0 = F(t, y, z) for the components of y' that come and go, with a mass_matrix, if that "
                "is of index 1."
            )
    W, V = Vh[:rank].T.contiguous(), Vh[rank:].T
    hidden = stacked @ V
    if not moves(hidden):
        return W
    # To first order in E with its rank kept; with V as in native/dae.py.
    return W + V @ (W.T @ torch.linalg.pinv(E) @ hidden).T


def moves(x: Tensor) -> bool:
    """Whether x, which is zero, depends on anything that requires grad."""
    if numbers.transformed():
        return x.numel() > 0
    if not x.requires_grad or not x.numel():
        return False
    leaves, seen, todo = [], set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [after for after, _ in node.next_functions]
    ways = torch.cos(torch.arange(1.0, x.numel() + 1, device=x.device)).to(x).reshape(x.shape)
    grads = torch.autograd.grad((x * ways).sum(), leaves, allow_unused=True, retain_graph=True)
    return any(g is not None and bool(g.any()) for g in grads)


def explained(error: Exception, t: float) -> Exception:
    """An error of the start of M z' = g, in terms of F."""
    if isinstance(error, HighIndex):
        return HighIndex(
            f"F(t, y, y') = 0 is not of index 1 at t={t:.6g}: it does not determine y' and the algebraic part of y "
            "there. Differentiate its algebraic equations in time once or more, and pass that; or, if dF/dy' is "
            "singular only at the y' that dy0= of Implicit gives (zero by default), pass another guess."
        )
    assert isinstance(error, NotConverged)
    return NotConverged(
        f"no y' with F(t, y, y') = 0 was found at the start, t={t:.6g}. Pass an h0 nearer to a consistent one, and a "
        "guess of y' by dy0= of Implicit.",
        t=t,
        dt=0.0,
    )
