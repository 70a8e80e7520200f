"""The linear algebra of implicit steps: Jacobians of f, and the systems `shift M - J` that are solved with them.

A problem of B independent systems of size d (options["batch_dims"]; else B = 1 and d = n) has a block (d, d) for each.
No matrix here has more than B d² numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..derivatives import REFUSALS, directional, directional_by_reverse, pulled
from ..errors import BadOption
from ..notices import warn_once
from ..numbers import anywhere, as_like, read
from ..problem import ODEProblem, is_finite
from ..solution import Stats
from ..tracing import compiled

# Above this size of one system GMRES with Jacobian-vector products replaces LU of the dense Jacobian. GMRES has no
# preconditioner here, and LU is the faster of the two up to this size (`python benchmarks/stiff.py --dense-limit`: a
# reaction with diffusion, and a dense network), so that the limit is one of memory: a solve with LU takes ten times d²
# numbers, radau5 seventeen times. A preconditioner would need to know the structure of J; who knows it passes jac=,
# which is always factorised.
DENSE_LIMIT = 4000


class Jacobian(NamedTuple):
    """df/dy at one point.

    Attributes:
        t, y: the point, 0-d and (n,).
        blocks: (B, d, d); None where the Jacobian is known by its products only.
        rate: df/dt, (n,), where it was asked for.
        f: f(t, y), (n,), where it came along.
        graph: f(t, y) and the y that it is a function of; and its product Jᵀ u, and u, of which that is a function.
            Products go through it again and again; None where they are had in another way.
    """

    t: Tensor
    y: Tensor
    blocks: Tensor | None
    rate: Tensor | None = None
    f: Tensor | None = None
    graph: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


class Linear:
    """Jacobians and linear systems of one problem; counts them.

    Args:
        stats: `njac` and `nlu` are counted there.
    """

    def __init__(self, p: ODEProblem, stats: Stats) -> None:
        self.p, self.stats = p, stats
        self.B = p.batch
        self.d = p.y0.numel() // max(p.batch, 1)
        self.free = self.d > DENSE_LIMIT and p.jac is None
        self.difference = False  # finite differences: autograd could not differentiate f
        self.compiled = False  # f runs through what `torch.compile` made
        self.blind_to_time = p.blind_to_time  # f reads t as a number, which no derivative sees ...
        self.rates = 0  # ... and how often it looked as if f did not depend on t
        # The time in which f changes, as far as a difference in time minds it: the size of a step, where that is known.
        self.reach = min((abs(b - a) for a, b in zip(p.times, p.times[1:])), default=1.0)
        self.mass = None if p.mass is None else p.mass.to(p.y0)
        rtol = p.rtol.min().item() if isinstance(p.rtol, Tensor) and p.rtol.numel() else float(p.rtol)
        self.krylov_tol = max(1e-2 * min(rtol, 1e-2), 50 * torch.finfo(p.y0.dtype).eps)

    # --- Products with M ----------------------------------------------------------------------------------------------

    def times_mass(self, v: Tensor) -> Tensor:
        """M v for v of shape (n,) or (s, n), real or complex."""
        if self.mass is None:
            return v
        return (v.reshape(*v.shape[:-1], self.B, self.d) @ self.mass.T.to(v.dtype)).reshape(v.shape)

    def slope(self, f: Tensor) -> Tensor:
        """y' of M y' = f, and zero where M is silent: (n,)."""
        if self.mass is None:
            return f
        return (f.reshape(self.B, self.d) @ torch.linalg.pinv(self.mass).T).reshape(-1)

    # --- Jacobians ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def jacobian(self, t: Tensor, y: Tensor, *, rate: bool = False) -> Jacobian:
        """df/dy, and df/dt with `rate`, at one point: by the user's `jac`, by reverse-mode products (all rows in one
        pass, or one by one), or by central differences, whichever first can be had. The Jacobian is square, so that
        neither mode is narrower; the reverse one takes a fifth of the time of the forward one here (Robertson)."""
        if torch.is_inference_mode_enabled():  # where nothing has a graph
            with torch.inference_mode(False):
                return self.jacobian(t.clone(), y.clone(), rate=rate)
        self.stats.njac += 1
        if self.free and self.p.transformed:
            raise BadOption(
                f"{self.p.method.name} solves systems of more than {DENSE_LIMIT} numbers by GMRES, which no transform "
                "of torch.func and no forward mode can follow: pass jac=, or options={'batch_dims': ...} if the system "
                "falls apart, or use an explicit method."
            )
        t, y = t.detach(), y.detach()
        slope = self.time_derivative(t, y) if rate and (self.free or self.p.jac) else None
        if self.free:
            return Jacobian(t, y, None, slope, graph=None if self.p.products else self.graph(t, y))
        if self.p.jac is not None:
            return Jacobian(t, y, self.p.jac(t, y).reshape(self.B, self.d, self.d), slope)
        reason = ""
        if not self.difference:
            try:
                k, blocks, slope = self.reverse_columns(t, y, rate)
                slope = self.seen(t, y, slope) if rate else None
                return self.made_finite(Jacobian(t, y, blocks, slope, k.detach()))
            except REFUSALS as refusal:
                reason = str(refusal).split("\n")[0][:120]
        blocks = self.difference_columns(t, y)
        if not self.difference and anywhere(blocks):  # without one f is constant, as its lack of a graph says
            self.difference = True
            warn_once(
                "finite differences",
                f"autograd cannot differentiate f ({reason}); its Jacobian is taken by finite differences. Pass "
                "jac=, or write f in PyTorch's operations on its arguments, without .detach() and .item(). (This "
                "warning is shown once.)",
            )
        return Jacobian(t, y, blocks, self.time_derivative(t, y) if rate else None)

    def made_finite(self, J: Jacobian) -> Jacobian:
        """J; where it has NaN and f has none near by (the derivative of `where` has, if the branch not taken has) the
        differences of f."""
        assert J.blocks is not None
        if is_finite(J.blocks) and (J.rate is None or is_finite(J.rate)):
            return J
        rate = None if J.rate is None else self.time_difference(J.t, J.y)
        return J._replace(blocks=self.difference_columns(J.t, J.y), rate=rate)

    def tangents(self, y: Tensor) -> Tensor:
        """(d, n): unit vector j in every system at once."""
        return torch.eye(self.d, dtype=y.dtype, device=y.device).repeat(1, self.B)

    def as_blocks(self, columns: Tensor) -> Tensor:
        """(d, n), row j the derivative by element j of each system -> (B, d, d)."""
        return columns.reshape(self.d, self.B, self.d).permute(1, 2, 0)

    def reverse_columns(self, t: Tensor, y: Tensor, rate: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """f (n,), df/dy (B, d, d) and, with `rate`, df/dt (n,), with a graph where autograd records.

        `torch.func` says the same more slowly: three times for small systems, and seconds at its first use. But it
        does not look at the graph behind y, which autograd walks through to its start.
        """
        if not y.numel():
            empty = torch.zeros_like(y)
            return empty, y.new_zeros(self.B, self.d, self.d), empty if rate else None
        recorded = torch.is_grad_enabled()
        if self.p.transformed or self.compiled or (recorded and not y.is_leaf):
            pulled_back: Any = torch.func.vjp(self.p.f, t, y)
            k, pull = pulled_back
            slope, products = pulled(pull, self.tangents(y))
            if rate and self.B > 1:  # the pulled one is a sum over the systems
                slope = directional(self.p, t, y, torch.ones_like(t), torch.zeros_like(y))
            return k, products.reshape(self.d, self.B, self.d).transpose(0, 1), slope if rate else None
        k, at, point = self.graphed(t, y, recorded)
        if self.compiled:  # under `torch.func` PyTorch runs such a function as it was written
            return self.reverse_columns(t, y, rate)
        wanted = [point, at] if rate and self.B == 1 else [point]
        rows, *by_time = self.all_rows(k, wanted, recorded)
        if rows is None:
            raise RuntimeError("no graph leads from its result to the state")
        blocks = rows.reshape(self.d, self.B, self.d).transpose(0, 1)
        if not rate:
            return k, blocks, None
        # One system's row i is the derivative of element i; of several systems that by t is a sum over them.
        if self.B > 1:
            return k, blocks, self.time_derivative(t, y)
        return k, blocks, k.new_zeros(k.shape) if by_time[0] is None else by_time[0]

    def graphed(self, t: Tensor, y: Tensor, recorded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """f (n,) with a graph, and the time and state that it leads to; notes whether f is `compiled`.

        Raises:
            RuntimeError: f has no graph.
        """
        # Aliases: what f knows of y and t in another way is not a part of df/dy.
        at, point = (
            (x.view_as(x) if x.requires_grad else self.p.leaf(x) for x in (t, y))
            if recorded
            else (x.detach().requires_grad_() for x in (t, y))
        )
        with torch.enable_grad():
            k = self.p.f(at, point)
        if not k.requires_grad:
            raise RuntimeError("its result has no graph")
        self.compiled = compiled(k)
        return k, at, point

    def all_rows(self, k: Tensor, wanted: list[Tensor], recorded: bool) -> Sequence[Tensor | None]:
        """For each wanted tensor the d products of its Jacobian with `tangents`, (d, *shape)."""
        units = self.tangents(k)
        kwargs: dict[str, Any] = {"allow_unused": True, "create_graph": recorded}
        try:
            return torch.autograd.grad(k, wanted, units, is_grads_batched=True, retain_graph=True, **kwargs)
        except REFUSALS:  # something in f has no batching rule: one backward pass a row
            each = [torch.autograd.grad(k, wanted, unit, retain_graph=True, **kwargs) for unit in units]
        return [None if rows[0] is None else torch.stack(rows) for rows in zip(*each)]

    def difference_columns(self, t: Tensor, y: Tensor) -> Tensor:
        """Central differences, each column of all systems at once."""
        step = torch.finfo(y.dtype).eps ** (1 / 3) * torch.maximum(y.abs(), self.typical(y))
        columns = [
            (self.p.f(t, y + e * step) - self.p.f(t, y - e * step))
            / (2 * step).reshape(self.B, self.d)[:, j : j + 1].expand(self.B, self.d).reshape(-1)
            for j, e in enumerate(self.tangents(y))
        ]
        return self.as_blocks(torch.stack(columns))

    def typical(self, y: Tensor) -> Tensor:
        """Size of an element below which it counts as zero, (n,): atol over rtol, within the size of its system."""
        rtol = as_like(self.p.rtol, y).clamp_min(torch.finfo(y.dtype).eps ** 0.5)
        size = (as_like(self.p.atol, y) / rtol).expand_as(y)
        rows = y.abs().view(self.B, self.d)
        whole = rows.amax(1, keepdim=True).expand_as(rows).reshape(-1)
        size = torch.where(whole > 0, torch.minimum(torch.maximum(size, 1e-6 * whole), whole), size)
        return torch.where(size > 1e3 * torch.finfo(y.dtype).tiny, size, 1.0)

    def time_derivative(self, t: Tensor, y: Tensor) -> Tensor:
        """df/dt, (n,). By the reverse mode twice: nothing is left to do where f does not depend on t."""
        if self.difference or self.blind_to_time:
            return self.time_difference(t, y)
        return self.seen(t, y, directional_by_reverse(self.p, t, y, torch.ones_like(t), None))

    def time_difference(self, t: Tensor, y: Tensor) -> Tensor:
        before, after, step = self.in_time(t, y)
        return (after - before) / step

    def in_time(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
        """f a little before and after t, and the time between."""
        eps, at = torch.finfo(y.dtype).eps, read(t.detach())
        step = max(eps ** (1 / 3) * self.reach, 64 * eps * abs(at))
        first, last = self.p.time(at - step), self.p.time(at + step)
        return self.p.f(first, y), self.p.f(last, y), read(last.double() - first.double())

    def seen(self, t: Tensor, y: Tensor, slope: Tensor | None) -> Tensor:
        """df/dt; where it is nothing at all, a difference tells whether f reads t as a number. It is asked the first,
        second, fourth ... time: f may depend on t at some times and states only."""
        if slope is None or self.blind_to_time:
            return self.time_difference(t, y)
        if anywhere(slope):
            return slope
        self.rates += 1
        if self.rates & (self.rates - 1):
            return slope
        before, after, step = self.in_time(t, y)
        change, size = (after - before).abs(), torch.maximum(before.abs(), after.abs())
        self.blind_to_time = anywhere(change > 1e3 * torch.finfo(y.dtype).eps * size)
        return (after - before) / step if self.blind_to_time else slope

    # --- Systems ------------------------------------------------------------------------------------------------------

    def system(self, J: Jacobian, shift: float | complex, *, iterated: bool = False) -> System:
        """`shift M - J`, ready to be solved.

        Args:
            iterated: its solutions are corrections, whose errors the next one mends.
        """
        if J.blocks is None:
            return self.krylov(
                lambda v: shift * self.times_mass(v) - self.product(J, v),
                lambda v: shift * self.times_mass_transposed(v) - self.product_transposed(J, v),
            )
        self.stats.nlu += 1
        W = -J.blocks
        if isinstance(shift, complex):
            W = W.to(torch.promote_types(W.dtype, torch.complex64))
        if self.mass is None:
            W.diagonal(dim1=-2, dim2=-1).add_(shift)
        else:
            W = W + shift * self.mass
        return self.made(W, iterated=iterated)

    def made(self, W: Tensor, *, iterated: bool = False) -> Inverse | Factors:
        """A block for each system, ready to be solved. Under a transform by its inverse, as in `numbers`."""
        return Inverse(W) if self.p.transformed or (iterated and self.d <= _INVERTED) else Factors(W)

    def krylov(self, apply: Apply, apply_transposed: Apply) -> Krylov:
        return Krylov(apply, apply_transposed, self.krylov_tol)

    def times_mass_transposed(self, v: Tensor) -> Tensor:
        if self.mass is None:
            return v
        return (v.reshape(*v.shape[:-1], self.B, self.d) @ self.mass.to(v.dtype)).reshape(v.shape)

    def graph(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """What the products with one Jacobian share."""
        try:
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                k = self.p.f(t, y)
                u = torch.zeros_like(k, requires_grad=True)
                back = torch.autograd.grad(k, y, u, create_graph=True)[0]
            torch.autograd.grad(back, u, y, retain_graph=True)
        except REFUSALS:
            return None
        return k, y, back, u

    def product(self, J: Jacobian, v: Tensor) -> Tensor:
        """J v, (n,)."""
        if v.is_complex():
            return torch.complex(self.product(J, v.real), self.product(J, v.imag))
        if J.blocks is not None:
            return (J.blocks @ v.reshape(self.B, self.d, 1)).reshape(-1)
        if self.p.products:
            return self.p.products[0](J.t, v)
        if J.graph is not None:
            return torch.autograd.grad(J.graph[2], J.graph[3], v, retain_graph=True)[0]
        return directional(self.p, J.t, J.y, None, v)

    def product_transposed(self, J: Jacobian, v: Tensor) -> Tensor:
        """Jᵀ v, (n,)."""
        if v.is_complex():
            return torch.complex(self.product_transposed(J, v.real), self.product_transposed(J, v.imag))
        if J.blocks is not None:
            return (J.blocks.mT @ v.reshape(self.B, self.d, 1)).reshape(-1)
        if self.p.products:
            return self.p.products[1](J.t, v)
        if J.graph is not None:
            return torch.autograd.grad(J.graph[0], J.graph[1], v, retain_graph=True)[0]
        with torch.enable_grad():
            y = J.y.detach().requires_grad_()
            k = self.p.f(J.t, y)
            out = torch.autograd.grad(k, y, v, allow_unused=True)[0] if k.requires_grad else None
        return torch.zeros_like(v) if out is None else out


Apply = Callable[[Tensor], Tensor]

# Up to this size of a block its inverse, which takes one to three times as long as its factors and serves in a third of
# the time, is the faster of the two over the two or three corrections of a step (radau5, bdf; one system and 256).
_INVERTED = 8


class Inverse:
    """The inverse of a block for each system, (B, d, d). `ok` is False where one is singular.

    Its product is not the solution to the last digit (Higham, Accuracy and Stability of Numerical Algorithms, ch. 14),
    which a correction need not be.
    """

    def __init__(self, W: Tensor) -> None:
        self.shape = W.shape[:-1]
        self.inverse, info = torch.linalg.inv_ex(W if len(W) > 1 else W[0])
        self.ok = not anywhere(info)

    def solve(self, rhs: Tensor) -> Tensor:
        """(B d,) -> (B d,)."""
        if self.shape[0] == 1:
            return torch.mv(self.inverse, rhs)
        return torch.bmm(self.inverse, rhs.reshape(*self.shape, 1)).reshape(-1)


class Factors:
    """LU factors of a block for each system, (B, d, d). `ok` is False where one is singular."""

    def __init__(self, W: Tensor) -> None:
        self.shape = W.shape[:-1]
        self.lu, self.pivots, info = torch.linalg.lu_factor_ex(W if len(W) > 1 else W[0])
        self.ok = not anywhere(info)

    def solve(self, rhs: Tensor) -> Tensor:
        """(B d,) -> (B d,)."""
        column = rhs.reshape(*self.shape, 1) if self.shape[0] > 1 else rhs.reshape(-1, 1)
        return torch.linalg.lu_solve(self.lu, self.pivots, column).reshape(-1)


class Krylov:
    """A system known by its products, solved by GMRES; differentiable in the right-hand side."""

    ok = True

    def __init__(self, apply: Apply, apply_transposed: Apply, tol: float) -> None:
        self.apply, self.apply_transposed, self.tol = apply, apply_transposed, tol

    def solve(self, rhs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and rhs.requires_grad:
            return _KrylovSolve.apply(self, rhs)
        return gmres(self.apply, rhs.detach(), self.tol)


class _KrylovSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, system: Krylov, rhs: Tensor) -> Tensor:
        ctx.system = system
        return gmres(system.apply, rhs, system.tol)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        s: Krylov = ctx.system
        return None, Krylov(s.apply_transposed, s.apply, s.tol).solve(g)


System: TypeAlias = Inverse | Factors | Krylov

_RESTART, _CYCLES = 60, 10


@torch.no_grad()
def gmres(apply: Apply, b: Tensor, tol: float) -> Tensor:
    """Restarted GMRES (Saad & Schultz, SIAM J. Sci. Stat. Comput. 7, 1986): x with |b - A x| <= tol |b|.

    NaN where it does not get there, which the caller takes for a step that was not solved.
    """
    x, r, size = torch.zeros_like(b), b, float(torch.linalg.vector_norm(b))
    target = tol * size
    V = b.new_empty(_RESTART + 1, b.numel())
    for _ in range(_CYCLES):
        if size <= target:
            return x
        V[0] = r / size
        H = np.zeros((_RESTART + 1, _RESTART), dtype=complex if b.is_complex() else float)
        # ν H = 0: what is left of the residual is its part along ν, and needs no least squares to be known.
        nu = np.zeros(_RESTART + 1, dtype=H.dtype)
        nu[0] = 1
        for j in range(_RESTART):
            basis, w = V[: j + 1], apply(V[j])
            for _again in range(2):  # Gram-Schmidt, twice for orthogonality to rounding
                h = basis.conj() @ w
                w = w - h @ basis
                H[: j + 1, j] += h.cpu().numpy()
            norm = float(torch.linalg.vector_norm(w))
            H[j + 1, j] = norm
            if norm == 0 or norm != norm:
                break
            nu[j + 1] = -(nu[: j + 1] @ H[: j + 1, j]) / norm
            V[j + 1] = w / norm
            if not size / np.linalg.norm(nu[: j + 2]) > 0.3 * target:
                break
        k = j + 1
        if norm != norm:
            break
        e = np.zeros(k + 1, dtype=H.dtype)
        e[0] = size
        coefficients = np.linalg.lstsq(H[: k + 1, :k], e, rcond=None)[0]
        x = x + torch.from_numpy(coefficients).to(b) @ V[:k]
        r = b - apply(x)
        size = float(torch.linalg.vector_norm(r))
    return x if size <= target else torch.full_like(b, torch.nan)
