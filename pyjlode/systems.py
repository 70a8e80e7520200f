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
