"""A vector field and its products as C functions that Julia's solvers call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..derivatives import jacobian, pull_back, vjp
from ..events import Margin
from ..problem import Layout, ODEProblem
from .memory import JULIA_TYPES, Views, look

_PLAIN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double)
_PRODUCT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double)

# A margin of no sign yet: large, and finite for the root finder.
_FAR = 1e300


class RHS:
    """The C functions of one problem. Whoever calls into Julia with `field` must hold this.

    An exception in one of them cannot pass through Julia's solver: it is kept in `error`, the function returns 1, on
    which Julia abandons the solve, and `raise_error` raises it in Python.

    Args:
        jl: the module `PyJLODE`.
        gradient: name of the gradient method that will be asked for; None for none.
    """

    def __init__(self, jl: Any, p: ODEProblem, *, gradient: str | None = None, implicit: bool = False) -> None:
        self.p = p
        self.n, self.dtype = p.y0.numel(), p.y0.dtype
        self.params = Layout(list(p.params))
        self.joint = gradient in ("interpolating", "backsolve")  # both products are asked for, one after the other
        self.pending: list[Tensor | None] | None = None
        self.error: BaseException | None = None
        self.views = Views(p.f.shape or torch.Size([self.n]), self.dtype)
        self.functions: dict[str, Any] = {"f": _PLAIN(self.guard(self.f()))}
        if implicit:
            self.functions["jac"] = _PLAIN(self.guard(self.jac))
            self.functions["tgrad"] = _PLAIN(self.guard(self.tgrad))
        if gradient is not None:
            self.functions["vjp"] = _PRODUCT(self.guard(self.vjp))
            self.functions["vjp_p"] = _PRODUCT(self.guard(self.vjp_p))
        if p.event_fn is not None:
            self.margin = Margin(p)
            self.functions["event"] = _PLAIN(self.guard(self.event))
        pointers = {name: ctypes.cast(f, ctypes.c_void_p).value for name, f in self.functions.items()}
        self.field = jl.Field[getattr(jl, JULIA_TYPES[self.dtype])](self.n, **pointers)
        self.views.owner = self.field

    def raise_error(self) -> None:
        """Raise what a callback raised, if one did, with its own traceback."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def guard(self, call: Callable[..., None]) -> Callable[..., int]:
        def guarded(*args: Any) -> int:
            try:
                call(*args)
            except BaseException as error:
                self.error = error
                return 1
            return 0

        return guarded

    def f(self) -> Callable[[int, int, float], None]:
        # Every name that the innermost call of all uses is a local one.
        views, f, dtype, tensor = self.views, self.p.f.raw, self.dtype, torch.tensor

        def call(du: int, u: int, t: float) -> None:
            views[du].copy_(f(tensor(t, dtype=dtype), views[u]))

        return call

    def state(self, address: int) -> Tensor:
        """Shape (n,): a copy, for what autograd may keep."""
        return look(address, self.n, self.dtype).clone()

    def jac(self, J: int, u: int, t: float) -> None:
        out = look(J, self.n * self.n, self.dtype).view(self.n, self.n)
        out.copy_(jacobian(self.p, self.p.time(t), self.state(u)).T)

    def tgrad(self, dT: int, u: int, t: float) -> None:
        time, y = self.p.time(t), self.state(u)
        with torch.enable_grad():
            time.requires_grad_()
            k = self.p.f(time, y)
        out = look(dT, self.n, self.dtype)
        if not k.requires_grad:
            out.zero_()
            return
        # df/dt of all components by forward mode through reverse mode: v -> v df/dt is linear, and its derivative by v.
        v = torch.zeros_like(k, requires_grad=True)
        with torch.enable_grad():
            (product,) = torch.autograd.grad(k, time, v, create_graph=True, allow_unused=True)
        if product is None or not product.requires_grad:
            out.zero_()
            return
        (rate,) = torch.autograd.grad(product, v, allow_unused=True)
        out.zero_() if rate is None else out.copy_(rate)

    def vjp(self, out: int, v: int, u: int, t: float) -> None:
        wrt = self.p.params if self.joint else ()
        _, (y_bar, *rest) = vjp(self.p, self.p.time(t), self.state(u), self.state(v), wrt)
        target = look(out, self.n, self.dtype)
        target.zero_() if y_bar is None else target.copy_(y_bar)
        if self.joint:
            self.pending = rest

    def vjp_p(self, out: int, v: int, u: int, t: float) -> None:
        grads, self.pending = self.pending, None
        if grads is None:
            with torch.enable_grad():
                k = self.p.f(self.p.time(t), self.state(u))
            grads = pull_back(self.p, k, self.p.params, self.state(v))
        filled = [torch.zeros_like(q) if g is None else g for q, g in zip(self.p.params, grads)]
        look(out, self.params.size, self.dtype).copy_(self.params.flatten_leaves(filled))

    def event(self, margin: int, u: int, t: float) -> None:
        value = self.margin(t, self.state(u))
        ctypes.c_double.from_address(margin).value = min(value, _FAR)
