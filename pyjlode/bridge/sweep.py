"""Independent systems in one call: each solved by itself within Julia, with steps of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..capture.surroundings import surroundings
from ..errors import NonFiniteState, NotCompiled
from ..methods import Method, hairer
from ..methods.explicit import ExplicitTableau
from ..methods.stiff import RosenbrockTableau
from ..parameters import by_tensor
from ..problem import Field, Layout, ODEProblem, SolverOptions, like
from ..solution import Stats, SystemStats
from .calls import Calls, Held
from .function import JuliaFunction
from .memory import Abreast, Outcome, PullRequest, Request, Systems


class _Parts(TorchFunctionMode):
    """Within this context PyTorch computes with other tensors in the place of some.

    Args:
        parts: by the `id` of a tensor, what stands for it.
    """

    def __init__(self, parts: dict[int, Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def part(x: Tensor) -> Tensor:
            return self.parts.get(id(x), x)

        args, kwargs = pytree.tree_map_only(Tensor, part, (args, kwargs or {}))
        return func(*args, **kwargs)


class Sweep:
    """Systems that lie in a batch.

    The field of one system is f, called for a batch of one, with that system's parts of the tensors that f holds. Which
    of these lie there in parts, one for each system, shows f itself: where the part of one changes, the slopes of the
    others do not.

    Args:
        p: with a `batch` of systems.
        differentiated: gradients will be asked for.
        of: computes the flat values of `p.f` of a time, a flat state, and how that lies; by default from `p.f.source`.

    Attributes:
        first: the problem of the first of them.
        failed: (B,) those that failed, and ends: (B,) where, once they were solved abreast.

    Raises:
        NotCompiled: f cannot be captured.
    """

    def __init__(
        self,
        p: ODEProblem,
        *,
        differentiated: bool = False,
        of: Callable[[Tensor, Tensor, Layout], Tensor] | None = None,
    ) -> None:
        from ..capture.held import held_by  # half the cost of importing this package

        assert p.layout is not None
        self.p, self.differentiated = p, differentiated
        if p.batch == 1 and not p.options.batch_dims:
            self._of_one()
            return
        dims = p.options.batch_dims
        batch, one = p.layout.shapes[0][:dims], (slice(0, 1),) * dims
        source = held_by(p.f, p.y0.dtype)
        self.known = _known(p, source)
        self.tensors = source.tensors
        self.held = [x.detach() for x in source.tensors]
        may_vary = [i for i, x in enumerate(source.tensors) if x.shape[:dims] == batch]
        self.proven = self.known in _apart
        if len(_apart) >= _KEPT:
            _apart.clear()
        self.apart = _apart.get(self.known) or frozenset(i for i in may_vary if self._is_apart(source.tensors[i]))
        self.varying = [i in self.apart for i in range(len(self.held))]
        parts = {
            id(x): (y[one] if varying else y).detach().requires_grad_(differentiated and x.requires_grad)
            for x, y, varying in zip(source.tensors, self.held, self.varying)
        }
        layout, f = _one_of(p.layout, dims), of or _flat_of(p.f)

        def of_one(t: Tensor, h: Tensor) -> Tensor:
            with _Parts(parts):
                return f(t, h, layout)

        size = p.y0.numel() // p.batch
        y0 = p.y0.detach()[:size]
        self.first = replace(
            p,
            f=Field(of_one, None, p.f.source, parts, layout),
            y0=y0,
            f0=None if p.f0 is None else p.f0[:size],
            layout=layout,
            batch=1,
            rows=None,
            swept=None,
            event_fn=None,
            event_source=None,
            compile=True,
            params=tuple(parts.get(id(x), x) for x in p.params),
            reached=frozenset(id(parts[i]) if i in parts else i for i in p.reached),
        )
        if not self.proven:
            try:
                self.first.f(p.time(p.times[0]), y0)
            except Exception as error:  # f itself was called before, for all systems
                raise _not_independent(0, error) from error

    def _of_one(self) -> None:
        """A system that lies in no batch: it is the first, and f is its field."""
        _, source = _program(self.p)
        self.known, self.proven, self.apart = (), True, frozenset()
        self.tensors = source.tensors
        self.held = [x.detach() for x in source.tensors]
        self.varying = [False] * len(self.held)
        self.first = replace(self.p, y0=self.p.y0.detach(), compile=True)

    def _is_apart(self, x: Tensor) -> bool:
        """Whether no system has a part in another's of a tensor, at some points of the solve: the first has none in the
        rest, and the rest none in the first's."""
        near = 64 * torch.finfo(self.p.y0.dtype).eps
        first, rest = slice(0, 1), slice(1, None)
        for t, h in self._points():
            want = self.p.f(t, h).view(self.p.batch, -1)
            for moved, still in ((rest, first), (first, rest)):
                other = x.detach().clone(memory_format=torch.contiguous_format)
                part = other.view(self.p.batch, -1)[moved]
                part += (part.abs() + 1) * torch.randn(part.shape, generator=_random()).to(part)
                got = self._with({id(x): other}, t, h).view(self.p.batch, -1)
                if not torch.allclose(want[still], got[still], rtol=near, atol=0.0, equal_nan=True):
                    return False
        return True

    def _with(self, parts: dict[int, Tensor], t: Tensor, h: Tensor) -> Tensor:
        with _Parts(parts):
            return self.p.f(t, h)

    def _points(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All over the times of the solve, with the states of all systems moved in every direction."""
        p, random = self.p, _random()
        y0 = p.y0.detach()
        scale = y0.abs()
        scale = torch.where(scale > 0, scale, float(scale.max()) or 1.0)
        for part, far in ((0.35, 1.0), (0.9, 0.01), (0.6, 1.0), (0.1, 0.3)):
            move = far * torch.randn(y0.shape, generator=random).to(y0)
            yield p.time(p.times[0] + part * (p.times[-1] - p.times[0])), y0 + scale * move

    def solve(
        self, calls: Calls, compiled: Any, algorithm: Held, request: Request, stats: Stats
    ) -> tuple[Held | None, Outcome]:
        """Solve them all; with their steps where the request has them kept.

        Args:
            compiled: the field of the first.

        Raises:
            NotCompiled: the field of some system differs from f, or steps are to be kept of what is not solved abreast.
        """
        p = self.p
        if not self.proven:
            self._prove(compiled)
            _apart[self.known] = self.apart
        slopes = torch.empty_like(p.y0.detach(), memory_format=torch.contiguous_format)
        lent = {"slopes": slopes, **self._own_numbers(compiled.program)}
        held = None
        if abreast(p) and compiled.program.mode == "scalar":
            held, outcome = self._abreast(calls, compiled, request, lent, stats)
        else:
            more = p.options.on_failure != "raise" or p.own_times is not None or p.event_fn is not None
            if request.keep or more or many_tolerances(p):
                raise NotCompiled(
                    "f is compiled as loops over arrays, and a sweep has gradients, events, dense output, on_failure, "
                    "times of their own and tolerances of each element where f is compiled number by number: where it "
                    "is few operations. Use engine='torch'"
                )
            systems = Systems(count=p.batch)
            systems.lend(**lent)
            outcome = calls.sweep(compiled.field, algorithm, request, systems)
        # Where a system failed others were not begun with; and with times of their own f was asked for at other times.
        if p.f0 is not None and p.own_times is None and p.options.on_failure == "raise" and _succeeded(outcome):
            self._compare(compiled, slopes)
        return held, outcome

    def _own_numbers(self, program: Any) -> dict[str, Tensor]:
        """What each system has of its own: the places among all that the field holds, and the numbers there."""
        p, dtype = self.p, self.p.y0.dtype
        places, values, start = [torch.empty(0, dtype=torch.int64)], [], 1
        for slot in program.trace.slots:
            x = self.held[slot]
            size = x.numel() // p.batch if self.varying[slot] else x.numel()
            if self.varying[slot]:
                places.append(torch.arange(start, start + size))
                values.append(x.reshape(p.batch, size).to("cpu", dtype))
            start += size
        return {"places": torch.cat(places), **({"values": torch.cat(values, dim=1)} if values else {})}

    def _abreast(
        self, calls: Calls, compiled: Any, request: Request, lent: dict[str, Tensor], stats: Stats
    ) -> tuple[Held | None, Outcome]:
        """Eight at a time, by our own loop in Julia."""
        p, tab, program = self.p, self.p.method.tableau, compiled.program
        assert isinstance(tab, (ExplicitTableau, RosenbrockTableau))
        count, whole = p.batch, p.options.on_failure == "nan"
        counts = torch.zeros(3, count, dtype=torch.int64)
        naccept, nreject, codes = counts
        systems = Abreast(
            count=count,
            f=program.packed(calls, "f"),
            stages=tab.stages,
            order=p.method.order,
            own=p.own_times is not None,
            go_on=whole,
        )
        if isinstance(tab, RosenbrockTableau):
            systems.gamma = tab.gamma
            systems.jac, systems.tgrad = (program.packed(calls, name) for name in ("jac", "tgrad"))
            for name, value in controlled(p.method, p.options).items():
                setattr(request, name, value)
        else:
            systems.fsal = tab.fsal
        if p.own_times is not None:
            request.lend(times=torch.from_numpy(np.ascontiguousarray(p.own_times)))
        ends = torch.zeros(count, 2, dtype=torch.float64)
        watched = self._watch(calls, systems) if p.event_fn is not None else None
        systems.lend(**lent, **weights(tab), naccept=naccept, nreject=nreject, codes=codes, ends=ends)
        held, outcome = calls.abreast(compiled.field, request, systems)
        self.compiled = compiled
        names = _of_gradients(p) if self.differentiated else ()
        self.pulling = {name: program.packed(calls, name) for name in names}
        self.places = lent["places"]
        self.naccept, self.failed, self.ends = naccept, codes > 0, ends[:, 0]
        if not whole and outcome.code != b"Success" and int(codes[outcome.system - 1]) == _NAN_EVENT:
            t = float(ends[outcome.system - 1, 0])
            raise NonFiniteState(
                f"system {outcome.system - 1} of the batch: event_fn returned NaN in the step from t={t:.6g}.",
                t=t,
                dt=0.0,
            )
        if watched is not None and (whole or _succeeded(outcome)):
            self.event_times = watched["event_times"].numpy()
            self.event_slopes = watched["event_slopes"]
            self._compare_events(watched["event_margins"], request.tensors["out"])
        if count > 1 and (whole or _succeeded(outcome)):
            self._account(stats, naccept, nreject, codes, ends)
        return held, outcome

    def _watch(self, calls: Calls, systems: Abreast) -> dict[str, Tensor]:
        """Have the systems end at their events: what Julia then writes to."""
        p, dtype = self.p, self.p.y0.dtype
        watching = _of_events(p)
        program = _event_program(watching)
        slots = program.trace.slots
        parts = [
            (x.reshape(p.batch, -1)[0] if watching.varying[i] else x).reshape(-1).to("cpu", dtype)
            for i, x in ((i, watching.held[i]) for i in slots)
        ]
        systems.event, systems.margins = program.packed(calls, "f"), program.outputs
        systems.event_parameters, systems.event_work = program.parameters, program.work
        systems.direction = int(p.direction)
        own = {f"event_{name}": x for name, x in watching._own_numbers(program).items()}
        watched = {
            "event_times": torch.full((p.batch,), math.nan, dtype=torch.float64),
            "event_slopes": torch.zeros(p.batch, p.y0.numel() // p.batch, dtype=dtype),
            "event_margins": torch.full((p.batch, 2, program.outputs), math.nan, dtype=dtype),
        }
        systems.lend(event_numbers=torch.cat([*parts, torch.zeros(1, dtype=dtype)]), **own, **watched)
        return watched

    def _compare_events(self, got: Tensor, out: Tensor) -> None:
        """The event functions at the starts and at the events with PyTorch's.

        Raises:
            NotCompiled: they differ.
        """
        p = self.p
        assert p.event_fn is not None
        assert p.swept is not None
        for i, times in enumerate((p.swept.starts, self.event_times)):
            with torch.no_grad():
                want = p.event_fn(p.moments(times), out[i]).reshape(p.batch, -1)
            known = ~got[:, i].isnan().any(1) & ~torch.from_numpy(np.isnan(times))
            near = math.sqrt(torch.finfo(want.dtype).eps) * (1 + got.abs().nan_to_num().amax(1))
            if want.shape != got[:, i].shape or bool(((got[:, i] - want).abs() > near)[known].any()):
                raise NotCompiled("what was compiled of event_fn differs from PyTorch")

    def _account(self, stats: Stats, naccept: Tensor, nreject: Tensor, codes: Tensor, ends: Tensor) -> None:
        p, tab = self.p, self.p.method.tableau
        assert isinstance(tab, (ExplicitTableau, RosenbrockTableau))
        assert p.layout is not None
        batch = p.layout.shapes[0][: p.options.batch_dims]
        at_end = int(isinstance(tab, ExplicitTableau) and not tab.fsal)
        nfe = 2 + (naccept + nreject) * (tab.stages - at_end) + naccept * at_end
        why: dict[Any, str] = {}
        for i in codes.nonzero().view(-1).tolist():
            place = tuple(int(x) for x in np.unravel_index(i, batch))
            t, dt = ends[i].tolist()
            said = f"{p.method.name}: {_CAUSES[int(codes[i])]} at t={t:.9g} (dt={dt:.3g})."
            why[place if len(place) > 1 else place[0]] = said
        nfe, naccept, nreject, failed = (x.reshape(batch) for x in (nfe, naccept, nreject, codes > 0))
        stats.systems = SystemStats(nfe, naccept, nreject, failed, why)

    def pull(
        self, calls: Calls, held: Held, ys: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None], int]:
        """The gradients of a loss by the starts (without g[0]), by the times and by `p.params`, and the calls of f that
        they took.

        Args:
            ys, g: the states, (T, n), and their cotangents.
        """
        p, trained = self.p, self.compiled.trained
        count, g = p.batch, g.contiguous()
        a = torch.empty_like(p.y0, memory_format=torch.contiguous_format)
        theta = p.y0.new_empty(sum(x.numel() for x in trained))
        own = p.y0.new_empty(count, len(self.places))
        request = PullRequest(**self.pulling)
        request.lend(du0=a, dp=theta, dv=own, g=g)
        by_t = None
        if p.t.requires_grad:
            by_t = torch.empty(count, len(ys), dtype=torch.float64)
            request.lend(dt=by_t, states=ys.contiguous())
        nf = calls.pull(held, request)
        of: list[Tensor] = []
        grads: list[Tensor] = []
        start = at = 0
        for slot, part in zip(self.compiled.program.trace.slots, trained):
            x, size = self.tensors[slot], part.numel()
            if self.varying[slot]:
                grad, at = own[:, at : at + size].reshape(x.shape), at + size
            else:
                grad = theta[start : start + size].reshape(x.shape)
            start += size
            of.append(x)
            grads.append(grad)
        if by_t is not None:
            if p.event_fn is not None:  # the second time says where to go
                by_t[:, 1] = 0.0
            by_t = by_t.sum(0) if p.own_times is None else by_t.view(p.t.shape)
        return a, by_t, by_tensor(of, grads, p.params), nf

    def interpolate(self, calls: Calls, held: Held, times: Tensor) -> Tensor:
        """States (M, n) at times (M,) of all systems, or (B, M), from the dense output of their steps: NaN where a
        system had failed."""
        p, rows = self.p, times.detach().to("cpu", torch.float64).contiguous()
        out = p.y0.detach().repeat(rows.shape[-1], 1)  # where a system makes no steps
        if rows.numel():
            calls.interpolate_all(held, rows, out)
        if bool(self.failed.any()):
            sign = p.direction
            lost = self.failed & (sign * rows.expand(p.batch, -1).T > sign * self.ends)  # (M, B)
            out.view(len(out), p.batch, -1)[lost] = math.nan
        return out

    def _prove(self, compiled: Any) -> None:
        """Compare some of the systems, each by itself, with f for all of them, away from the start."""
        p, own = self.p, compiled.own
        size = p.y0.numel() // p.batch
        some = torch.linspace(0, p.batch - 1, min(p.batch, _PROVEN)).round().long().tolist()
        slots = compiled.program.trace.slots
        address = compiled.addresses["f"]
        for t, h in self._points():
            want = p.f(t, h)
            for i in some:
                for slot, part in zip(slots, own.parts):
                    if self.varying[slot]:
                        part.copy_(self.held[slot].reshape(p.batch, -1)[i].view(part.shape))
                u = h[i * size : (i + 1) * size].contiguous()
                got = compiled.call(address, torch.empty_like(u), float(t), u)
                try:
                    compiled.compare("f", got, want[i * size : (i + 1) * size], u)
                except NotCompiled as error:
                    raise _not_independent(i, error) from error

    def _compare(self, compiled: Any, slopes: Tensor) -> None:
        p, shape = self.p, (self.p.batch, -1)
        assert p.f0 is not None
        try:
            compiled.compare("f", slopes, p.f0.detach(), p.y0.detach())
        except NotCompiled as error:
            differ = (slopes - p.f0.detach()).abs().view(shape).amax(1)
            worst = int(differ.nan_to_num(math.inf).argmax())
            raise _not_independent(worst, error) from error


def _one_of(layout: Layout, dims: int) -> Layout:
    """How the state of one system lies that is one of those in the first `dims` dimensions."""
    leaves = [torch.empty((1,) * dims + x[dims:], dtype=dtype) for x, dtype in zip(layout.shapes, layout.dtypes)]
    return Layout(pytree.tree_unflatten(leaves, layout.spec))


def _flat_of(field: Field) -> Callable[[Tensor, Tensor, Layout], Tensor]:
    """What a field computes of a time, a flat state, and how that lies."""
    assert field.source is not None
    f = field.source[0] if field.shape is None else field.f
    return lambda t, h, layout: layout.flatten_result(t, f(t, layout.unflatten(h)))


def _as_a_field(p: ODEProblem) -> tuple[ODEProblem, Callable[[Tensor, Tensor, Layout], Tensor]]:
    """A problem whose field is the event function, for it to be compiled as a field is: of each system its values, and
    the first of them again as often as the state has more numbers. And what computes that, as `Sweep` takes it."""
    whole, event_fn, size = p.layout, p.event_source, p.y0.numel() // p.batch
    assert whole is not None
    assert event_fn is not None

    def padded(t: Tensor, h: Tensor, layout: Layout) -> Tensor:
        count = h.numel() // size
        value = event_fn(t, layout.unflatten(h)).to(h.dtype).reshape(count, -1)
        if value.shape[1] > size:
            raise NotCompiled("there are more event functions than numbers in the state")
        return torch.cat([value, value[:, :1].expand(count, size - value.shape[1])], 1).reshape(-1)

    field = Field(lambda t, h: padded(t, h, whole), source=(event_fn, whole if p.f.shape is None else p.f.shape))
    return like(p, f=field, f0=None, event_fn=None, params=(), reached=frozenset()), padded


def _of_events(p: ODEProblem) -> Sweep:
    """The event functions of systems, as a sweep has fields."""
    watched, padded = _as_a_field(p)
    return Sweep(watched, of=padded)


def _event_program(watching: Sweep) -> Any:
    program, _ = _program(watching.first)
    if program.mode != "scalar":
        raise NotCompiled("event_fn is more than a few operations")
    return program


def uncompiled(p: ODEProblem, gradient: str | None) -> str:
    """Why the systems of `p` would not be compiled, as far as that is known before they are solved; empty where they
    would be. A field that is met for the first time is not: it may be solved but once.
    """
    from ..capture.held import root_of  # half the cost of importing this package

    try:
        if why := surroundings():
            return why
        root = root_of(p.f, p.y0.dtype)
        assert root is not None
        if not root.met:
            root.met = True
            return "f is solved for the first time; the next solve compiles it"
        known = _known_solve(p, gradient, patient=False)
    except NotCompiled as error:
        return str(error)
    if known not in _refused:
        if len(_refused) >= _KEPT:
            _refused.clear()
        _refused[known] = _refusal(p, gradient)
    return _refused[known]


def _refusal(p: ODEProblem, gradient: str | None) -> str:
    nfe = p.f.nfe
    try:
        first = Sweep(p, differentiated=gradient is not None).first
        program, _ = _program(first)
        if program.mode != "scalar":
            return "f is more than a few operations, which are compiled as loops over arrays"
        for name in (*_of_steps(p), *(_of_gradients(p) if gradient else ())):
            program.text(name)
        if p.event_source is not None:
            _event_program(_of_events(p))
    except NotCompiled as error:
        return str(error)
    finally:
        p.f.nfe = nfe
    return ""


def refuse(p: ODEProblem, gradient: str | None, why: str) -> None:
    """Have systems like those of `p` not be compiled again, unless that is asked for."""
    if p.batch == 1:
        _program(p)[0].refused["pull"] = why
        return
    _refused[_known_solve(p, gradient)] = why


def _known_solve(p: ODEProblem, gradient: str | None, *, patient: bool = True) -> tuple[Any, ...]:
    """What solves of such systems have in common; as `_known`, of their event function too."""
    from ..capture.held import held_by

    watched = [] if p.event_source is None else [_as_a_field(p)[0]]
    fields = [_known(q, held_by(q.f, p.y0.dtype, patient=patient)) for q in (p, *watched)]
    return p.method.name, gradient, *fields


def _known(p: ODEProblem, source: Any) -> tuple[Any, ...]:
    """What systems that do the same have in common."""
    assert p.layout is not None
    return source.key, tuple(p.layout.shapes), p.options.batch_dims, p.y0.dtype


def controlled(method: Method, o: SolverOptions) -> dict[str, float]:
    """The control of steps by Hairer's PI controller, as a request has it."""
    k = method.start_order
    beta1, beta2 = hairer(k)
    gamma = o.safety ** (k * (beta1 - beta2))  # see `next_factor` of the native engine
    return {"beta1": beta1, "beta2": beta2, "gamma": gamma, "qmin": o.dfactor, "qmax": o.ifactor}


def abreast(p: ODEProblem) -> bool:
    """Whether systems may be solved eight at a time: by explicit methods with error control, and small ones by
    Rosenbrock methods."""
    tab = p.method.tableau
    if isinstance(tab, RosenbrockTableau):
        return p.y0.numel() <= _STIFF * p.batch and p.mass is None and p.jac is None
    return isinstance(tab, ExplicitTableau) and tab.E is not None and p.options.step_size is None


def many_tolerances(p: ODEProblem) -> bool:
    """Whether elements have tolerances of their own."""
    return isinstance(p.rtol, Tensor) or isinstance(p.atol, Tensor)


def _of_steps(p: ODEProblem) -> tuple[str, ...]:
    """The functions of a program that the steps of its method take."""
    return ("f", "jac", "tgrad") if isinstance(p.method.tableau, RosenbrockTableau) else ("f",)


def _of_gradients(p: ODEProblem) -> tuple[str, ...]:
    """Those that the gradient of such steps takes."""
    return ("pull", "bend") if isinstance(p.method.tableau, RosenbrockTableau) else ("pull",)


def is_swept(p: ODEProblem, gradient: str | None) -> bool:
    """Whether it is solved as a sweep: a batch of systems, and one stiff system for the exact gradient of its steps."""
    return p.batch > 1 or (gradient == "discrete" and isinstance(p.method.tableau, RosenbrockTableau))


def may_be_alone(p: ODEProblem) -> bool:
    """Whether one system, in no batch, may be solved as a sweep of one by a Rosenbrock method, as far as that is known
    before f is compiled."""
    o = p.options
    if p.batch > 1 or p.compile is False or not isinstance(p.method.tableau, RosenbrockTableau) or not abreast(p):
        return False
    if p.event_fn or o.batch_dims or o.step_t or o.jump_t or isinstance(p.f.f, JuliaFunction):
        return False
    real = p.layout is not None and not any(p.layout.complex)
    return real and p.y0.device.type == "cpu" and p.y0.numel() > 0


def alone(p: ODEProblem, *, at_once: bool = False) -> bool:
    """Whether it is: f is compiled number by number, with its derivatives.

    Args:
        at_once: also where f is met for the first time.
    """
    if not may_be_alone(p) or surroundings():
        return False
    try:
        (program, _), names = _program(p, at_once), (*_of_steps(p), *_of_gradients(p))
        if program.mode != "scalar" or not program.refused.keys().isdisjoint(names):
            return False
        for name in names:
            program.text(name)
    except NotCompiled:
        return False
    return True


def _program(p: ODEProblem, at_once: bool = False) -> Any:
    """The program of the field of one system, and what it holds."""
    from .codegen.program import program_of  # half the cost of importing this package

    return program_of(p.f, p.y0, at_once=at_once or bool(p.compile))


# Numbers in a system whose matrices are factorised in the lanes of vectors.
_STIFF = 20


@functools.cache
def weights(tab: ExplicitTableau | RosenbrockTableau) -> dict[str, Tensor]:
    """As `Abreast` in julia/src/abreast.jl has them."""
    arrays: dict[str, np.ndarray]
    if isinstance(tab, RosenbrockTableau):
        arrays = {"a": tab.A, "b": tab.m, "c": tab.alpha, "d": tab.C, "e": tab.E, "p": tab.P, "gammas": tab.gammas}
    else:
        arrays = dict(zip("acp", tab.whole())) | ({} if tab.E is None else {"e": tab.E})
    return {name: torch.tensor(x, dtype=torch.float64).contiguous() for name, x in arrays.items()}


def _succeeded(outcome: Outcome) -> bool:
    return outcome.code == b"Success" and bool(outcome.finite)


_NAN_EVENT = 5
# Why a system failed, as `CAUSES` in julia/src/abreast.jl.
_CAUSES = {
    1: "it took max_num_steps steps",
    2: "no step succeeds, f or the solution blows up",
    3: "steps are shorter than min_step",
    4: "the state is NaN or infinite",
    _NAN_EVENT: "event_fn is NaN",
}


def _not_independent(system: int, error: Exception) -> NotCompiled:
    return NotCompiled(
        f"the systems are not each f with its own part of what f holds (see system {system}): a tensor counts as one "
        f"part for each system where its shape begins with the batch's, and no system changes with another's part. "
        f"{error}"
    )


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Of fields and batches, which of the tensors that they hold lie in parts, by their places; and, with methods, why they
# are not compiled, or nothing.
_apart: dict[tuple[Any, ...], frozenset[int]] = {}
_refused: dict[tuple[Any, ...], str] = {}
_KEPT = 64
# Systems of a batch that are compared one by one.
_PROVEN = 16
