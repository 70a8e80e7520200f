"""Fields of systems with a form that some methods make use of; to all others they are fields as any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import BadShape


class SecondOrder(nn.Module):
    """The field of `q'' = a(t, q, v)` with `v = q'`, for a state that is the pair `(q, v)`.

    `odeint(SecondOrder(a), (q0, v0), t)` is solved by every method. The symplectic methods and those of Nyström
    (`docs/second_order.md`) use that `q' = v`. A module, so that its parameters are those of `a`.

    Args:
        a: `a(t, q, v) -> q''` with `t` a 0-d tensor; `q`, `v` and the result have the structure and the shapes of `q0`,
            a tensor or a pytree of tensors. A module, a function, or any callable.

    Raises:
        BadShape: in the solve, where the state is not a pair.

    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.14.
    """

    def __init__(self, a: Callable[[Tensor, Any, Any], Any]) -> None:
        super().__init__()
        if not callable(a):
            raise BadShape(f"SecondOrder takes the acceleration as a function a(t, q, v); got a {type(a).__name__}.")
        self.a = a

    def forward(self, t: Tensor, h: Any) -> Any:
        """(t, (q, v)) -> (v, a(t, q, v))."""
        if not isinstance(h, (tuple, list)) or len(h) != 2:
            raise BadShape(
                f"the state of a SecondOrder field must be the pair (q, v); it is a {type(h).__name__}. Pass "
                "h0=(q0, v0)."
            )
        q, v = h
        return v, self.a(t, q, v)


class Split(nn.Module):
    """The field `f = stiff + nonstiff`, whose parts an IMEX method solves in two ways: `stiff` implicitly, `nonstiff`
    explicitly. To every other method it is their sum.

    `odeint(Split(stiff, nonstiff), h0, t, method="kencarp4")` pays where Newton's iteration on the whole field is dear
    and only one part, often a linear one, makes it stiff. A module, so that its parameters are those of both parts.

    Args:
        stiff, nonstiff: each `(t, h) -> dh/dt` as `f` of `odeint`.

    Source: Kennedy & Carpenter, Additive Runge-Kutta schemes for convection-diffusion-reaction equations, Appl. Numer.
    Math. 44 (2003) 139-181.
    """

    def __init__(self, stiff: Callable[[Tensor, Any], Any], nonstiff: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        for name, part in (("stiff", stiff), ("nonstiff", nonstiff)):
            if not callable(part):
                raise BadShape(f"Split takes two functions of (t, h); {name} is a {type(part).__name__}.")
        self.stiff, self.nonstiff = stiff, nonstiff

    def forward(self, t: Tensor, h: Any) -> Any:
        """(t, h) -> stiff(t, h) + nonstiff(t, h)."""
        a, b = self.stiff(t, h), self.nonstiff(t, h)
        return a + b if isinstance(a, Tensor) else pytree.tree_map(torch.add, a, b)


class Implicit(nn.Module):
    """The field of the fully implicit system `F(t, y, y') = 0`, of index 1.

    `odeint(Implicit(F), y0, t, method="radau5")` solves it by the methods that take a `mass_matrix` (docs/dae.md): as
    `M y' = f(t, y)` where F is linear in `y'` with constant coefficients, else beside the part of `y'` that F depends
    on.
    `options={"consistent": "compute"}` makes `y0` consistent. A module, so that its parameters are those of `F`.

    Args:
        F: `F(t, y, dy) -> residual`, of the shape of `y`, which is one real tensor.
        dy0: a guess of `y'` at the start, of the shape of `y`; zero by default. Of several roots the one near by is
            taken. Not looked at where F is linear in `y'`.

    Raises:
        BadOption: in the solve, where the null space of dF/dy' is not constant.
        HighIndex: the index is above 1.

    Source: Brenan, Campbell & Petzold, Numerical Solution of Initial-Value Problems in Differential-Algebraic
    Equations, SIAM 1996.
    """

    def __init__(self, F: Callable[[Tensor, Tensor, Tensor], Tensor], dy0: Tensor | None = None) -> None:
        super().__init__()
        if not callable(F):
            raise BadShape(f"Implicit takes the residual as a function F(t, y, dy); got a {type(F).__name__}.")
        self.F, self.dy0 = F, dy0

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """(t, y) -> -F(t, y, 0)."""
        if not isinstance(h, Tensor):
            raise BadShape(f"the state of an Implicit field must be one tensor; it is a {type(h).__name__}.")
        return -self.F(t, h, torch.zeros_like(h))

    def mass(self, t: Tensor, y: Tensor) -> Tensor | None:
        """dF/dy', (d, d); None if it is not a constant."""
        y = y.detach()
        M = self.leading(t, y, torch.zeros_like(y))
        # Two other points: what is not constant shows at nearly all of them.
        other = y.abs().mean() + 1
        for shift in (0.37, -1.13):
            moved = self.leading(t + shift * (1 + t.abs()), y + shift * other, torch.full_like(y, shift) * other)
            if not torch.allclose(moved, M, rtol=1e-6, atol=1e-9 * float(M.detach().abs().max())):
                return None
        return M

    def leading(self, t: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """dF/dy' at a point, (d, d)."""

        def residual(v: Tensor) -> Tensor:
            return self.F(t, y, v.reshape(y.shape)).reshape(-1)

        return torch.func.jacrev(residual)(dy.reshape(-1))
