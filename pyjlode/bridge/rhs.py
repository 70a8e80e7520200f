"""A vector field and its products as C functions that Julia's solvers call."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..derivatives import directional, directional_by_reverse, jacobian, pull_back, vjp
from ..events import Margin
from ..notices import warn_once
from ..parameters import graph_mark
from ..problem import Layout, ODEProblem
from .calls import Calls, Held
from .function import JuliaFunction
from .memory import Clock, Functions, Request, Views, look

_PLAIN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double)
_PRODUCT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double)

# A margin of no sign yet: large, and finite for the root finder.
_FAR = 1e300


class Callbacks:
    """C functions of a problem that Julia calls.

    An exception in one of them cannot pass through Julia's solver: it is kept in `error`, the function returns 1, on
    which Julia abandons the solve, and `raise_error` raises it in Python. Ctrl-C while Julia computes is an exception
    in the next function before its first statement, where nothing can catch it: it arrives in `lost`, by `listening`,
    and the function after that one raises it.
    """

    def __init__(self, p: ODEProblem) -> None:
        self.p = p
        self.n, self.dtype = p.y0.numel(), p.y0.dtype
        self.error: BaseException | None = None
        self.lost: list[BaseException] = []
        self.functions: dict[str, Any] = {}
        self.field: Held
        if p.event_fn is not None:
            self.margin = Margin(p)
            self.functions["event"] = _PLAIN(self.guard("event"))

    @functools.cached_property
    def params(self) -> Layout:
        """How the parameters lie in Julia's vector of them."""
        return Layout(list(self.p.params))

    @property
    def pointers(self) -> dict[str, int]:
        """Addresses of the functions."""
        return {name: ctypes.cast(f, ctypes.c_void_p).value or 0 for name, f in self.functions.items()}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context: what ctypes would otherwise print, a KeyboardInterrupt that no function caught."""
        before = sys.unraisablehook

        def hook(what: sys.UnraisableHookArgs) -> None:
            if isinstance(what.exc_value, KeyboardInterrupt):
                self.lost.append(what.exc_value)
            else:
                before(what)

        sys.unraisablehook = hook
        try:
            yield
        finally:
            sys.unraisablehook = before
        if self.lost:
            raise self.lost.pop()

    def raise_error(self) -> None:
        """Raise what a callback raised, if one did, with its own traceback."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def guard(self, name: str) -> Callable[..., int]:
        """The method of that name as a C function can have it. It does not hold this object, which holds it."""
        ref = weakref.ref(self)

        def guarded(*args: Any) -> int:
            this = ref()
            assert this is not None
            try:
                if this.lost:
                    raise this.lost.pop()
                getattr(this, name)(*args)
            except BaseException as error:
                this.error = error
                return 1
            return 0

        return guarded

    def repeat(self, calls: Calls, algorithm: Held, request: Request) -> None:
        """Keep what makes the next such solve faster: nothing, where Python is called back."""

    def parameter_gradients(self, theta: Tensor) -> list[Tensor | None]:
        """Of a gradient by the parameters, shape (m,), those by `p.params`."""
        return [x.to(q.device, q.dtype) for x, q in zip(self.params.leaves(theta), self.p.params)]

    def state(self, address: int) -> Tensor:
        """Shape (n,): a copy, for what autograd may keep."""
        return look(address, self.n, self.dtype).clone()

    def event(self, margin: int, u: int, t: float) -> None:
        value = self.margin(t, self.state(u))
        ctypes.c_double.from_address(margin).value = min(value, _FAR)


class Source(Callbacks):
    """A field that is Julia code: only its event function is called back."""

    def __init__(self, calls: Calls, p: ODEProblem, f: JuliaFunction) -> None:
        super().__init__(p)
        theta = f.params.detach().to(self.dtype).contiguous()
        self.field = calls.source(self.dtype, self.n, f.handle, theta, self.pointers.get("event", 0))


class RHS(Callbacks):
    """The C functions of one problem's vector field and products. Whoever calls into Julia with `field` must hold this.

    Args:
        calls: the functions of PyJLODE.jl.
        gradient: name of the gradient method that will be asked for; None for none.
    """

    def __init__(self, calls: Calls, p: ODEProblem, gradient: str | None) -> None:
        super().__init__(p)
        self.joint = gradient in ("interpolating", "backsolve")  # both products are asked for, one after the other
        self.pending: list[Tensor | None] | None = None
        self.views = Views(p.f.shape or torch.Size([self.n]), self.dtype)
        self.functions |= {
            "f": _PLAIN(self.f()),
            "jac": _PLAIN(self.guard("jac")),
            "tgrad": _PLAIN(self.guard("tgrad")),
            "jvp": _PRODUCT(self.guard("jvp")),
            "vjp": _PRODUCT(self.guard("vjp")),
            "vjp_p": _PRODUCT(self.guard("vjp_p")),
        }
        parameters = self.params.size if gradient else 0
        self.field = calls.field(self.dtype, Functions(n=self.n, parameters=parameters, **self.pointers))
        self.views.owner = self.field

    def check_kept(self) -> None:
        """Warn, once, if f kept what it was shown."""
        if self.views.kept():
            warn_once(
                "kept state",
                "f kept its argument h beyond its return. On the Julia engine h is a view of the solver's own memory, "
                "which is overwritten as the solve goes on: keep h.clone(). (This warning is shown once.)",
            )

    def f(self) -> Callable[[int, int, float], int]:
        # The innermost call of all: one Python function, and every name that it uses a local one.
        views, field, dtype, clock = self.views, self.p.f, self.dtype, Clock(self.dtype)
        f, shape, ref, lost = field.f, self.views.shape, weakref.ref(self), self.lost

        def call(du: int, u: int, t: float) -> int:
            nonlocal clock
            try:
                if lost:
                    raise lost.pop()
                field.nfe += 1
                clock.cell.value = t
                k = f(clock.tensor, views[u])
                if k.shape != shape:
                    raise field.changed(t, k)
                views[du].copy_(k)
                if clock.kept():
                    clock = Clock(dtype)
            except BaseException as error:
                this = ref()
                assert this is not None
                this.error = error
                return 1
            return 0

        return call

    def jac(self, J: int, u: int, t: float) -> None:
        out = look(J, self.n * self.n, self.dtype).view(self.n, self.n)
        time, y = self.p.time(t), self.state(u)
        full = jacobian(self.p, time, y) if self.p.jac is None else self.p.jac(time, y).view(self.n, self.n)
        out.copy_(full.T)

    def tgrad(self, dT: int, u: int, t: float) -> None:
        time, y = self.p.time(t), self.state(u)
        look(dT, self.n, self.dtype).copy_(directional_by_reverse(self.p, time, y, torch.ones_like(time), None))

    def jvp(self, out: int, v: int, u: int, t: float) -> None:
        product = directional(self.p, self.p.time(t), self.state(u), None, self.state(v))
        look(out, self.n, self.dtype).copy_(product)

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
            mark, point = graph_mark(), (self.p.time(t), self.state(u).requires_grad_())
            with torch.enable_grad():
                k = self.p.f(*point)
            grads = pull_back(self.p, k, self.p.params, self.state(v), mark, point)
        filled = [torch.zeros_like(q) if g is None else g for q, g in zip(self.p.params, grads)]
        look(out, self.params.size, self.dtype).copy_(self.params.flatten_leaves(filled))
