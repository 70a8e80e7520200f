"""A vector field and its products as C functions that Julia's solvers call."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..derivatives import directional, directional_by_reverse, jacobian, pull_back, vjp
from ..events import Margin
from ..forward import Jacobian as SensitivityJacobian
from ..notices import warn_once
from ..parameters import graph_mark
from ..problem import Layout, ODEProblem
from . import places
from .calls import Calls, Held
from .function import JuliaFunction
from .memory import Clock, Functions, ReplayRequest, Request, Views

_PLAIN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double)
_PRODUCT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double)

# A margin of no sign yet: large, and finite for the root finder.
_FAR = 1e300
# A margin that is zero: Julia's root finder takes any zero that it meets for the crossing, and there are functions that
# are flat from there on, as relu is.
_CROSSED = -1e-150


class Callbacks:
    """C functions of a problem that Julia calls.

    An exception in one of them cannot pass through Julia's solver: it is kept in `error`, and `raise_error` raises it
    in Python. Julia abandons the solve, since the function did not say as its last act that it is done. An exception
    of a signal handler's (Ctrl-C, a time limit) can come before the first statement, where nothing can catch it: then
    it arrives in `lost` by `listening`, as does a KeyboardInterrupt that was lost elsewhere (in a `__del__`), which the
    next function raises.

    Args:
        calls: the functions of PyJLODE.jl.

    Attributes:
        replaying: what is said of replays, where that is kept.
    """

    def __init__(self, calls: Calls, p: ODEProblem) -> None:
        self.p, self.done = p, calls.done
        self.n, self.dtype, self.place = p.y0.numel(), p.y0.dtype, places.of(p.y0)
        self.error: BaseException | None = None
        self.lost: list[BaseException] = []
        self.functions: dict[str, Any] = {}
        self.callables: list[Callable[..., None]] = []
        self.field: Held
        self.replaying: ReplayRequest | None = None
        if p.event_fn is not None:
            self.margin = Margin(p, patient=True)
            self.functions["event"] = self.function(_PLAIN, self.guard("event"))

    @functools.cached_property
    def params(self) -> Layout:
        """How the parameters lie in Julia's vector of them."""
        return Layout(list(self.p.params))

    @property
    def parts(self) -> Sequence[Callbacks]:
        """The fields that are asked for: this one, or its parts."""
        return (self,)

    @property
    def size(self) -> int:
        """Numbers in a gradient by the parameters."""
        return self.params.size

    @property
    def pointers(self) -> dict[str, int]:
        """Addresses of the functions."""
        return {name: ctypes.cast(f, ctypes.c_void_p).value or 0 for name, f in self.functions.items()}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context: what ctypes would otherwise print, an exception that no function caught."""
        before, here = sys.unraisablehook, threading.get_ident()

        def hook(what: sys.UnraisableHookArgs) -> None:
            ours = what.object in self.callables or "ctypes" in (what.err_msg or "")
            here_lost = threading.get_ident() == here and (ours or isinstance(what.exc_value, KeyboardInterrupt))
            if here_lost and what.exc_value is not None:
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
        error, self.error = self.error, None
        if error is not None:
            raise error
        if self.lost:
            raise self.lost.pop()

    def function(self, kind: Any, f: Callable[..., None]) -> Any:
        """A Python function as a C function."""
        self.callables.append(f)
        return kind(f)

    def guard(self, name: str) -> Callable[..., None]:
        """The method of that name as a C function can have it. It does not hold this object, which holds it."""
        ref, done = weakref.ref(self), self.done

        def guarded(*args: Any) -> None:
            try:
                this = ref()
                assert this is not None
                if this.lost:
                    raise this.lost.pop()
                getattr(this, name)(*args)
                done.value = 1
            except BaseException as error:
                done.value = 0
                if (this := ref()) is not None:
                    this.error = error

        return guarded

    def look_back(self, times: Sequence[float], states: Tensor) -> None:
        """After a solve, with the states at the output times, shape (T, n)."""

    def repeat(self, calls: Calls, algorithm: Held, request: Request) -> None:
        """Keep what makes the next such solve faster: nothing, where Python is called back."""

    def refill(self) -> None:
        """Have the field look at the values that it had in the solve: here it looks at the user's own."""

    def parameter_gradients(self, theta: Tensor) -> list[Tensor | None]:
        """Of a gradient by the parameters, shape (m,), those by `p.params`."""
        return [x.to(q.device, q.dtype) for x, q in zip(self.params.leaves(theta), self.p.params)]

    def look(self, address: int, n: int | None = None) -> Tensor:
        """Shape (n,), by default that of the state: a tensor for the duration of a callback, never the user's."""
        return self.place.look(address, self.n if n is None else n, self.dtype)

    def apart(self, both: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """A gradient by the state and then by the parameters, shape (n + m,): that by the state, and those by
        `p.params`."""
        return both[: self.n], self.parameter_gradients(both[self.n :])

    def state(self, address: int) -> Tensor:
        """Shape (n,): a copy, for what autograd may keep."""
        return self.look(address).clone()

    def here(self, calls: Calls) -> None:
        """Have Julia's work for this field go where PyTorch's goes now: on the host that is one place."""

    def event(self, margin: int, u: int, t: float) -> None:
        value = self.margin(t, self.state(u))
        if self.p.onward:  # the end is an event, too
            value = min(value, self.p.direction * (self.p.times[-1] - t))
        ctypes.c_double.from_address(margin).value = min(value, _FAR) or _CROSSED


class Source(Callbacks):
    """A field that is Julia code: only its event function is called back."""

    def __init__(self, calls: Calls, p: ODEProblem, f: JuliaFunction) -> None:
        super().__init__(calls, p)
        theta = f.params.detach().to(self.dtype).contiguous()
        self.field = calls.source(self.dtype, self.n, f.handle, theta, self.pointers.get("event", 0))


class RHS(Callbacks):
    """The C functions of one problem's vector field and products. Whoever calls into Julia with `field` must hold this.

    Args:
        calls: the functions of PyJLODE.jl.
        gradient: name of the gradient method that will be asked for; None for none.
    """

    def __init__(self, calls: Calls, p: ODEProblem, gradient: str | None) -> None:
        super().__init__(calls, p)
        # Both products are asked for, one after the other.
        self.joint = gradient in ("discrete", "interpolating", "backsolve")
        self.pending: list[Tensor | None] | None = None
        self.views = Views(self.place, torch.Size([self.n]) if p.f.shape is None else p.f.shape, self.dtype)
        self.functions |= {
            "f": self.function(_PLAIN, self.f()),
            **{name: self.function(_PLAIN, self.guard(name)) for name in ("jac", "tgrad")},
            **{name: self.function(_PRODUCT, self.guard(name)) for name in ("jvp", "vjp", "vjp_p")},
        }
        parameters = self.params.size if gradient else 0
        functions = Functions(
            n=self.n,
            parameters=parameters,
            kind=self.place.kind,
            device=self.place.device.index or 0,
            stream=self.place.stream(),
            **self.pointers,
        )
        self.field = calls.field(self.dtype, functions)
        self.views.owner = self.field

    def here(self, calls: Calls) -> None:
        if self.place.kind == places.CUDA:
            calls.stream(self.field, self.place.stream())

    def check_kept(self) -> None:
        """Warn, once, if f kept what it was shown."""
        if self.views.kept():
            warn_once(
                "kept state",
                "f kept its argument h beyond its return. On the Julia engine h is a view of the solver's own memory, "
                "which is overwritten as the solve goes on: keep h.clone(). (This warning is shown once.)",
            )

    def f(self) -> Callable[[int, int, float], None]:
        # The innermost call of all: one Python function, and every name that it uses a local one.
        views, field, dtype, place, clock = self.views, self.p.f, self.dtype, self.place, Clock(self.place, self.dtype)
        f, shape, ref, done, lost = field.f, self.views.shape, weakref.ref(self), self.done, self.lost
        note = field.seen.note if field.seen else None
        watched = field.watched

        def call(du: int, u: int, t: float) -> None:
            nonlocal clock, f
            try:
                if lost:
                    raise lost.pop()
                nfe = field.nfe = field.nfe + 1
                clock.cell.value = t
                y = views[u]
                try:
                    k = f(clock.tensor, y)
                except RuntimeError as error:
                    if not field.wants_graph(error, y):
                        raise
                    f = field.with_graph
                    k = f(clock.tensor, y)
                if watched and k.requires_grad:
                    field.look(k, clock.tensor, y)
                if k.shape != shape:
                    raise field.changed(t, k)
                if note and nfe & (nfe - 1) == 0:
                    note(t, y.reshape(-1))
                views[du].copy_(k)
                if clock.kept():
                    clock = Clock(place, dtype)
                done.value = 1
            except BaseException as error:
                done.value = 0
                if (this := ref()) is not None:
                    this.error = error

        return call

    def jac(self, J: int, u: int, t: float) -> None:
        out = self.look(J, self.n * self.n).view(self.n, self.n)
        time, y = self.p.time(t), self.state(u)
        full = jacobian(self.p, time, y) if self.p.jac is None else self.p.jac(time, y).view(self.n, self.n)
        out.copy_(full.T)

    def tgrad(self, dT: int, u: int, t: float) -> None:
        time, y = self.p.time(t), self.state(u)
        if isinstance(self.p.jac, SensitivityJacobian):  # autograd does not look into what it calls
            self.look(dT).copy_(self.p.jac.rate(time, y))
        else:
            self.look(dT).copy_(directional_by_reverse(self.p, time, y, torch.ones_like(time), None))

    def jvp(self, out: int, v: int, u: int, t: float) -> None:
        product = directional(self.p, self.p.time(t), self.state(u), None, self.state(v))
        self.look(out).copy_(product)

    def vjp(self, out: int, v: int, u: int, t: float) -> None:
        wrt = None if self.joint else ()
        _, (y_bar, *rest) = vjp(self.p, self.p.time(t), self.state(u), self.state(v), wrt)
        target = self.look(out)
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
        self.look(out, self.params.size).copy_(self.params.flatten_leaves(filled))
