"""Systems M y' = f(t, y) with a singular M and of index 1: consistent states, slopes, and the adjoint's jumps.

N and V are bases of the left and right null space of M: Nᵀ f = 0 are the algebraic equations, and V spans the changes
of y that M does not see. The index is 1 where Nᵀ J V is regular (HW VI.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import HighIndex, InconsistentStart, NotConverged
from ..numbers import anywhere, as_like, null_spaces, read, solve
from ..problem import ODEProblem, is_finite
from ..solution import Stats
from .linear import Linear

_MAX_ITERS = 50


class Algebra:
    """The algebraic equations of one problem; `none` where M is regular."""

    def __init__(self, p: ODEProblem) -> None:
        self.p, self.linear = p, Linear(p, Stats("", "", ""))
        assert self.linear.mass is not None
        self.M: Tensor | None = self.linear.mass.detach()
        self.N, self.V = null_spaces(self.M)
        self.none = self.N.shape[1] == 0

    def blocks(self, t: Tensor, y: Tensor) -> Tensor:
        """The Jacobian, (B, d, d)."""
        J = self.linear.jacobian(t, y).blocks
        assert J is not None
        return J

    def pivot(self, J: Tensor, t: Tensor) -> Tensor:
        """Nᵀ J V, (B, m, m)."""
        G = self.N.T @ J @ self.V
        sizes = torch.linalg.svdvals(
            G / torch.linalg.matrix_norm(J).clamp_min(torch.finfo(G.dtype).tiny)[:, None, None]
        )
        if anywhere(sizes[:, -1] <= 100 * len(self.N) * torch.finfo(G.dtype).eps):
            raise HighIndex(
                f"the system M h' = f(t, h) is not of index 1 at t={float(t):.6g}: its algebraic equations do not "
                "determine the algebraic part of h there. Differentiate them in time once or more, and pass that."
            )
        return G

    def rows(self, v: Tensor) -> Tensor:
        """(B d,) -> (B, d)."""
        return v.reshape(self.linear.B, self.linear.d)

    def along(self, change: Tensor) -> Tensor:
        """A change of y within V, (n,), as V follows M; and N does so from now on.

        To first order in M with its rank kept (Golub & Pereyra, SIAM J. Numer. Anal. 10, 1973): V - M⁺ dM V, and
        N - (dM M⁺)ᵀ N.
        """
        mass = self.p.mass
        if mass is None or not mass.requires_grad:
            return change
        assert self.M is not None
        moved, pseudo = mass.to(self.M) - self.M, torch.linalg.pinv(self.M)
        self.N, self.V = self.N - (moved @ pseudo).T @ self.N, self.V - pseudo @ moved @ self.V
        return (self.rows(change) @ self.V.detach() @ self.V.T).reshape(-1)

    def correction(self, t: Tensor, y: Tensor) -> Tensor:
        """Newton's correction of y within V, towards Nᵀ f(t, y) = 0: (n,). With a graph, where autograd records."""
        G = self.pivot(self.blocks(t, y.detach()), t)
        residual = self.rows(self.p.f(t, y)) @ self.N
        return -(solve(G, residual) @ self.V.T).reshape(-1)

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        """y' of the solution through (t, y): M y' = f and Nᵀ (J y' + ∂f/∂t) = 0, (n,). Without graph."""
        f = self.rows(self.p.f(t, y))
        assert self.M is not None
        if self.none:
            return torch.linalg.solve(self.M, f.T).T.reshape(-1)
        J = self.linear.jacobian(t, y, rate=True)
        assert J.blocks is not None
        assert J.rate is not None
        matrix = torch.cat([self.M.expand_as(J.blocks), self.N.T @ J.blocks], 1)
        right = torch.cat([f, -self.rows(J.rate) @ self.N], 1)
        return torch.linalg.lstsq(matrix, right[..., None]).solution.reshape(-1)

    def adjoint_start(self, t: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint at a time where it gets the cotangent `a` of y (Cao, Li, Petzold & Serban, SIAM J. Sci. Comput.
        24, 2003, Sec. 3).

        The part of `a` along V is that of algebraic components, which follow from the others: their equations carry it
        over, by a multiplier μ in N.

        Returns:
            λ with Mᵀ λ = a - Jᵀ μ and Vᵀ Jᵀ λ = 0, and μ; (n,) each.
        """
        assert self.M is not None
        a = self.rows(a)
        if self.none:
            return torch.linalg.solve(self.M.T, a.T).T.reshape(-1), torch.zeros_like(a).reshape(-1)
        J = self.blocks(t, y)
        G = self.pivot(J, t)
        mu = torch.linalg.solve(G.mT, a @ self.V) @ self.N.T
        right = a - torch.einsum("bij,bi->bj", J, mu)
        matrix = torch.cat([self.M.T.expand_as(J), self.V.T @ J.mT], 1)
        right = torch.cat([right, right.new_zeros(len(right), self.V.shape[1])], 1)
        return torch.linalg.lstsq(matrix, right[..., None]).solution.reshape(-1), mu.reshape(-1)


def consistent(p: ODEProblem) -> Tensor:
    """y0, checked or made consistent with the algebraic equations (Brown, Hindmarsh & Petzold, Consistent initial
    condition calculation for differential-algebraic systems, SIAM J. Sci. Comput. 19, 1998).

    Raises:
        InconsistentStart: the equations do not hold, and options["consistent"] is "check".
        HighIndex: the system is not of index 1 there.
        NotConverged: they could not be solved.
    """
    algebra = Algebra(p)
    if algebra.none or not p.y0.numel():
        return p.y0
    t, y = p.time(p.times[0]), p.y0.detach()

    def size(change: Tensor) -> float:
        return p.norm(change / (p.atol + p.rtol * y.abs()))

    with torch.no_grad():
        change = algebra.correction(t, y)
    if p.options.consistent == "check":
        if size(change) > 1:
            off = read(change.abs().max())
            raise InconsistentStart(
                f"h0 does not satisfy the algebraic equations of M h' = f(t, h) at t={p.times[0]:.6g}: its algebraic "
                f"part is off by {off:.3g}, more than rtol and atol. Pass a consistent h0, or options="
                "{'consistent': 'compute'} to have the algebraic part computed from the rest."
            )
        return p.y0
    with torch.no_grad():
        y = solved(algebra, t, y, change)
    if not torch.is_grad_enabled():
        return y
    # What follows changes no value: it has the derivative that the implicit function theorem gives.
    at, change = p.t[0].to(y) if p.moving else t, y - p.y0.detach()
    z = p.y0 + algebra.along(change)
    for _ in range(2):
        z = z + algebra.correction(at, z)
    return z


def solved(algebra: Algebra, t: Tensor, y: Tensor, change: Tensor) -> Tensor:
    """Newton's iteration on the algebraic part, halved while the residual grows."""
    p = algebra.p

    def residual(y: Tensor) -> float:
        r = algebra.rows(p.f(t, y)) @ algebra.N
        return read(torch.linalg.vector_norm(r)) if is_finite(r) else float("inf")

    at = residual(y)
    for _ in range(_MAX_ITERS):
        factor = 1.0
        while factor > 1e-6 and not residual(y + factor * change) <= at:
            factor /= 2
        y = y + factor * change
        scale = 8 * torch.finfo(y.dtype).eps * y.abs().max() + 1e-6 * as_like(p.atol, y)
        at = residual(y)
        if at == 0 or not anywhere((factor * change).abs() > scale):
            return y
        change = algebra.correction(t, y)
    raise NotConverged(
        f"the algebraic equations of M h' = f(t, h) were not solved at the start, t={float(t):.6g}, by changing the "
        f"algebraic part of h0: a residual of {at:.3g} is left. Pass an h0 nearer to a consistent one.",
        t=float(t),
        dt=0.0,
    )
