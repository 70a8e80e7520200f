"""`Solver`: what a user says of *how* to solve, read and checked once. A call reads what is to be solved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import arguments, engines, first, gradients, implicit, jumps, methods, mistakes, numbers, progress, transforms
from .errors import BadDtype, BadOption, BadShape, BadTime, BadTolerance, NotCompiled, SolveError
from .methods import Method
from .notices import log_once, warn
from .problem import (
    EVENT_STEPS,
    FEW,
    AdjointSettings,
    Equation,
    Field,
    Layout,
    Norm,
    ODEProblem,
    Prepared,
    Rows,
    SolverOptions,
    SystemsLayout,
    flat_field,
    like,
)
from .solution import Solution, State, Stats, Steps, interpolant
from .systems import Implicit, SecondOrder, Split
from .tracing import untraced

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .hints import EngineName, GradientName, HowElse, MethodName, Options, What

# Kinds of states for which a solver keeps what it says, and solvers that are kept for calls without one.
_STATES, _SOLVERS = 16, 128


class Said(NamedTuple):
    """What is said of one solve, forward or backward, before a state is known.

    Attributes:
        rtol, atol: as `arguments.tolerance_said` reads them; options: as `arguments.options_said` does.
    """

    method: Method
    rtol: Any
    atol: Any
    options: Mapping[str, Any]


@dataclass
class Reading:
    """What a solver says for states of one kind: the same structure, shapes, dtypes and device.

    Attributes:
        batch: number of independent systems in the state.
        backward: settings of the backward solve, once one was asked for.
    """

    layout: Layout
    rtol: float | Tensor
    atol: float | Tensor
    options: SolverOptions
    batch: int
    norm: Norm
    backward: AdjointSettings | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Solver:
    """How to solve: the method, its tolerances and options, the way to differentiate, and the engine.

    All of it is read and checked once, here. `solver(f, h0, t)` then gives what `odeint(f, h0, t, ...)` gives, and
    `solver.solve(f, h0, t)` a `Solution`. A solver never changes: `dataclasses.replace(solver, rtol=1e-3)` is another
    one. Solvers that say the same are equal. They can be keys of dictionaries, copied, and pickled, if the functions in
    their options can be. Tensors are copied, and compared by value; functions are compared by identity.

    Args:
        method, rtol, atol, adjoint, engine, options, adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options,
            compile: as in `odeint`. Single options may be keywords too.

    Attributes:
        method and so on: what was said, as it was read: numbers are floats, times among the options are tuples of
            floats, and options that the method makes no use of are left out.

    Raises:
        BadTolerance, BadOption, UnknownMethod: it is wrong for every state. What is wrong for some states (the shape of
            a tolerance, `batch_dims`) is found in the call, before an engine starts.
    """

    method: MethodName | Method | None = None
    _: KW_ONLY
    rtol: Any = None
    atol: Any = None
    adjoint: bool | GradientName = False
    engine: EngineName = "auto"
    options: Options | Mapping[str, Any] | None = None
    adjoint_rtol: Any = None
    adjoint_atol: Any = None
    adjoint_method: MethodName | Method | None = None
    adjoint_options: Mapping[str, Any] | None = None
    compile: bool | None = None
    _forward: Said = field(init=False)
    _backward: Said = field(init=False)
    _warnings: tuple[str, ...] = field(init=False)
    _readings: dict[Any, Reading] = field(init=False)

    if TYPE_CHECKING:

        def __init__(self, method: MethodName | Method | None = None, **how: Unpack[HowElse]) -> None: ...

    @untraced
    def __post_init__(self) -> None:
        row = arguments.method_of(self.method)
        options, warning = arguments.options_said(self.options, row)
        read: dict[str, Any] = {}
        for name in ("rtol", "atol", "adjoint_rtol", "adjoint_atol"):
            read[name] = arguments.tolerance_said(getattr(self, name), name)
        if all(isinstance(read[name], float) and read[name] == 0 for name in ("rtol", "atol")):
            raise BadTolerance(arguments.BOTH_ZERO)
        gradients.check(self.adjoint, row, bool(options.get("allow_unstable")))
        read["engine"] = engines.choice.named(self.engine)
        if self.compile not in (None, True, False):
            raise BadOption(f"compile must be True, False or None; got {self.compile!r}.")
        if self.adjoint is not True:
            self._has_backward(self.adjoint or None)
        forward = Said(row, read["rtol"], read["atol"], options)
        backward, warning_too = self._said_backward(forward)
        rel, absolute = (read[f"adjoint_{name}"] for name in ("rtol", "atol"))
        backward = backward._replace(
            rtol=forward.rtol if rel is None else rel, atol=forward.atol if absolute is None else absolute
        )
        if self.options is not None:
            read["options"] = MappingProxyType(options)
        if self.adjoint_options is not None:
            read["adjoint_options"] = MappingProxyType(dict(backward.options))
        warnings = tuple(x for x in (warning, warning_too) if x)
        self.__dict__.update(read, _forward=forward, _backward=backward, _warnings=warnings, _readings={})
        self._warn()

    def _warn(self) -> None:
        for message in self._warnings:
            warn(message, depth=2)

    def _said_backward(self, forward: Said) -> tuple[Said, str]:
        """What is said of the backward solve: that of the forward one, where nothing else is said; and a warning."""
        # The adjoint equation is not of the form that a method for systems of second order is for.
        usual = methods.find("rk4") if forward.method.kind == "second" else forward.method
        row = usual if self.adjoint_method is None else arguments.method_of(self.adjoint_method)
        given = self.adjoint_options
        if given is None:
            if row is not usual and forward.options:
                raise BadOption(
                    "adjoint_method differs from method, so options do not carry over: give adjoint_options, {} for "
                    "none."
                )
            # The backward solve goes over the grid that was made for the forward one; it makes none of its own.
            options = {k: v for k, v in forward.options.items() if k not in ("norm", "grid_constructor")}
            return forward._replace(method=row, options=options), ""
        if not isinstance(given, Mapping):
            raise BadOption(f"adjoint_options must be a dictionary; got {given!r:.80}.")
        norm = given.get("norm")
        if norm is not None and norm != "seminorm" and not callable(norm):
            raise BadOption(f"adjoint_options['norm'] must be 'seminorm' or a function; got {norm!r}.")
        options, warning = arguments.options_said({k: v for k, v in given.items() if k != "norm"}, row)
        if norm is not None:
            options["norm"] = norm
        return forward._replace(method=row, options=options), warning

    def _has_backward(self, gradient: str | None) -> bool:
        """Whether a gradient method has a backward solve.

        Raises:
            BadOption: it has not, and settings of one were given.
        """
        if gradient in gradients.CONTINUOUS:
            return True
        if said := [name for name in _BACKWARD if getattr(self, name) is not None]:
            how = f"adjoint={gradient!r}" if gradient else "adjoint=False"
            if self.adjoint is True:
                how = f"adjoint=True (which is {gradient!r})"
            raise BadOption(
                f"{', '.join(said)}: these configure a backward solve, and {how} has none. Use adjoint='backsolve', "
                "'interpolating', 'quadrature' or 'gauss' (odeint_adjoint is 'backsolve')."
            )
        return False

    @overload
    def __call__(
        self, f: Callable[..., Any], h0: State, t: Any, *, event_fn: None = None, **what: Unpack[What]
    ) -> State: ...
    @overload
    def __call__(
        self, f: Callable[..., Any], h0: State, t: Any, *, event_fn: Callable[..., Tensor], **what: Unpack[What]
    ) -> tuple[Tensor, State]: ...
    def __call__(
        self,
        f: Callable[..., Any],
        h0: Any,
        t: Any,
        *,
        args: tuple[Any, ...] = (),
        event_fn: Callable[..., Tensor] | None = None,
        mass_matrix: Any = None,
        jac: Callable[..., Tensor] | None = None,
        adjoint_params: Iterable[Tensor] | None = None,
    ) -> Any:
        """Solve `dh/dt = f(t, h)`, `h(t[0]) = h0`, and give the states at the times `t`.

        Args, returns and raises:
            As `odeint`.
        """
        if args:
            f, event_fn, jac = arguments.with_args(args, f, event_fn, jac)
        solution = solved(self, Equation(f, h0, t, event_fn, mass_matrix, jac, adjoint_params), dense=False)
        return solution.h if event_fn is None else (solution.event_t, solution.h)

    def solve(
        self,
        f: Callable[..., Any],
        h0: State,
        t: Any,
        *,
        args: tuple[Any, ...] = (),
        event_fn: Callable[..., Tensor] | None = None,
        mass_matrix: Any = None,
        jac: Callable[..., Tensor] | None = None,
        adjoint_params: Iterable[Tensor] | None = None,
        events: Iterable[Any] | None = None,
        dense: bool = True,
    ) -> Solution[State]:
        """As a call, but return a `Solution`: states, dense output, and an account of the work.

        Args, returns and raises:
            As `pyjlode.solve`.
        """
        if args:
            f, event_fn, jac = arguments.with_args(args, f, event_fn, jac)
            events = jumps.with_args(args, events)
        return solved(self, Equation(f, h0, t, event_fn, mass_matrix, jac, adjoint_params, events), dense=dense)

    def _prepare(self, e: Equation, engine: str) -> Prepared:
        """Make the problem of an equation, and find its engine and gradient."""
        if not callable(e.f):
            swapped = " The order of arguments is (f, h0, t)." if callable(e.h0) or callable(e.t) else ""
            raise BadShape(f"f must be callable as f(t, h); got a {type(e.f).__name__}.{swapped}")
        try:
            reading = self._reading(e.h0)
            y0 = arguments.flat(reading.layout, e.h0, check=reading.options.on_failure == "raise")
            t, times, rows = _times(e.t, reading)
        except (BadShape, BadDtype, BadTime) as error:
            raise type(error)(mistakes.order(error, e.h0, e.t)) from error
        autocast = torch.is_autocast_enabled(reading.layout.device.type)
        p = self._problem(e, reading, y0, t, times, rows, autocast)
        named = arguments.adjoint_params(e.adjoint_params)
        chosen, reason = found = engines.choice.choose(engine, p, self.adjoint)
        gradient = gradients.find(self.adjoint, chosen, p)
        if p.transformed:  # every adjoint is: through the solver
            gradient = None
        elif gradient is None and self._pulls_back(chosen):
            gradient = chosen.recommended(p)
        f = e.f
        if rows is not None:
            f, common = engines.choice.apart(chosen, p, e.f, e.event_fn, gradient, autocast)
            reason += f"; {common}" if common else ""
            found = chosen, reason
        f0, needed = first.look(p, f, named, gradient, autocast)
        if needed and gradient is None:
            before, found = chosen, engines.choice.confirm(found, engine, p, self.adjoint, recorded=True)
            chosen, reason = found
            if rows is not None and chosen is not before:  # another engine gives each system steps in another way
                made = self._prepare(e, "torch")
                _, common, why = made.stats.reason.partition("; common steps")
                made.stats.reason = reason + common + why
                return made
            if self._pulls_back(chosen) and not p.transformed:
                gradient = chosen.recommended(p)
                f0, needed = first.look(p, f, named, gradient, autocast)
        if gradient and self.adjoint is True and torch.is_grad_enabled() and not self._says_backward:
            gradient = chosen.recommended(p, asked=True)
        first.keep(p, f0, gradient)
        if p.mass is not None:
            given = p.y0
            p.y0 = engines.choice.consistent(p)
            if isinstance(e.f, implicit.Slopes):
                e.f.look_at_start(p, given)
            p.f0 = p.f0 if p.options.consistent == "check" else None
        if not p.transformed and self._has_backward(gradient):
            p.adjoint = self._adjoint(e, p, reading)
            chosen, reason = engines.choice.confirm(found, engine, p, self.adjoint)
        leaf = e.h0 if isinstance(e.h0, Tensor) else pytree.tree_leaves(e.h0)[0]
        copied = not p.transformed and y0.numel() > 0 and y0.data_ptr() != leaf.data_ptr()
        log_once(chosen.NAME, reason, p.method.name, gradient or "through the solver")
        return Prepared(p, Stats(chosen.NAME, reason, p.method.name, copied), chosen, gradient, needed)

    def _pulls_back(self, engine: Any) -> bool:
        """Whether `adjoint=False` is the replay of the steps: autograd does not look into compiled ones."""
        return bool(self.compile) and engine.NAME == "torch" and torch.is_grad_enabled()

    def _problem(
        self,
        e: Equation,
        reading: Reading,
        y0: Tensor,
        t: Tensor,
        times: list[float],
        rows: Rows | None,
        autocast: bool,
    ) -> ODEProblem:
        row, layout, batch, event_fn = self._forward.method, reading.layout, reading.batch, e.event_fn
        if event_fn is not None and t.shape[-1] != 2:
            raise BadTime(f"with event_fn, t must be [t0, t1], t1 giving the direction; got {t.shape[-1]} times.")
        options = arguments.grid(reading.options, e.f, e.h0)
        if event_fn is not None and "max_num_steps" not in self._forward.options:
            options = replace(options, max_num_steps=EVENT_STEPS)
        arguments.pair(row, e.h0, layout)
        return ODEProblem(
            f=flat_field(e.f, layout, autocast),
            y0=y0,
            t=t,
            times=times,
            method=row,
            rtol=reading.rtol,
            atol=reading.atol,
            options=options,
            norm=reading.norm,
            event_source=event_fn,
            event_fn=event_fn and (lambda t, y: arguments.event_value(event_fn(t, layout.unflatten(y)))),
            layout=layout,
            batch=batch,
            rows=rows,
            mass=arguments.mass_matrix(e.mass_matrix, row, layout, batch),
            second_order=isinstance(e.f, SecondOrder),
            split=_parts(e, row, layout, autocast),
            jac=arguments.jacobian(e.jac, row, layout, batch),
            callbacks=arguments.callbacks(e.f, row, layout, y0),
            compile=self.compile,
            transformed=numbers.transformed(),
        )

    def layout_of(self, h0: Any) -> Layout | None:
        """How such a state lies in one flat tensor, if that is known of an earlier call."""
        reading = self._readings.get(_kind(h0))
        return None if reading is None else reading.layout

    def _reading(self, h0: Any) -> Reading:
        """What is said for such states."""
        key = _kind(h0)
        reading = self._readings.get(key)
        if reading is None:
            reading = self._read(arguments.layout_of(h0))
            if key is not None:
                if len(self._readings) >= _STATES:
                    self._readings.clear()
                self._readings[key] = reading
        return reading

    def _read(self, layout: Layout) -> Reading:
        said = self._forward
        options = arguments.options(said.options, layout)
        batch = arguments.systems(options, layout)
        if options.batch_dims and len(layout.sizes) > 1:
            layout = SystemsLayout(layout, options.batch_dims)
            options = arguments.options(said.options, layout)
        rtol, atol = arguments.tolerances(said.rtol, said.atol, layout, said.method)
        norm = options.norm or arguments.default_norm(layout, batch)
        return Reading(layout, rtol, atol, options, batch, norm)

    def _adjoint(self, e: Equation, p: ODEProblem, reading: Reading) -> AdjointSettings:
        """Settings of the backward solve."""
        said, layout = self._backward, reading.layout
        if p.mass is not None and not said.method.mass:
            raise BadOption(
                f"adjoint_method={said.method.name!r} does not take the mass_matrix that the adjoint has too."
            )
        if reading.backward is None:
            options = dict(said.options)
            norm = options.pop("norm", None)
            reading.backward = AdjointSettings(
                said.method,
                *arguments.tolerances(said.rtol, said.atol, layout, said.method),
                arguments.options(options, layout),
                absolute=self.adjoint_atol is not None,
                seminorm=norm == "seminorm",
                norm=norm if callable(norm) else None,
            )
        settings = reading.backward
        callbacks = arguments.callbacks(e.f, said.method, layout, p.y0, "_adjoint")
        return like(settings, options=arguments.grid(settings.options, e.f, e.h0), callbacks=callbacks)

    @cached_property
    def _says_backward(self) -> bool:
        return any(getattr(self, name) is not None for name in _BACKWARD)

    @cached_property
    def _said(self) -> dict[str, Any]:
        """What differs from the defaults, in the order of the arguments."""
        given = {x.name: getattr(self, x.name) for x in fields(self) if x.init}
        usual = {"adjoint": False, "engine": "auto"}
        given = {k: x for k, x in given.items() if x is not usual.get(k) and not (type(x) is str and x == usual.get(k))}
        return {k: dict(x) if isinstance(x, Mapping) else x for k, x in given.items()}

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        said = [_plain(x) for x in self._said.items() if x[0] not in ("method", "options")]
        row, options = self._forward.method, self._forward.options
        return row.name, row.julia, _plain(options), *said

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __hash__(self) -> int:
        # Dynamo asks a solver that is not made yet, where one is made in what it compiles.
        return self._hash if "_forward" in self.__dict__ else id(self)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Solver) and self._key == other._key)

    def __reduce__(self) -> Any:
        return _again, (self._said,)

    def __repr__(self) -> str:
        said = [repr(x) if name == "method" else f"{name}={x!r}" for name, x in self._said.items()]
        return f"Solver({', '.join(said)})"


_BACKWARD = ("adjoint_rtol", "adjoint_atol", "adjoint_method", "adjoint_options")
Solver.__init__ = mistakes.front(arguments.KEYWORDS)(Solver.__init__)  # type: ignore[method-assign]


def _parts(e: Equation, row: Method, layout: Layout, autocast: bool) -> tuple[Field, Field] | None:
    """The parts of a field that is split, for a method that solves each in its own way."""
    if not isinstance(e.f, Split) or not row.imex:
        return None
    if e.jac is not None:
        raise BadOption(
            f"jac is df/dh of the whole field, and {row.name} solves the stiff part of a Split alone. It finds the "
            "Jacobian of that itself. Leave jac out."
        )
    return flat_field(e.f.stiff, layout, autocast), flat_field(e.f.nonstiff, layout, autocast)


def _times(t: Any, reading: Reading) -> tuple[Tensor, list[float], Rows | None]:
    """The times of a call, with a row for each system where the state is a batch of them."""
    dims, shape = reading.options.batch_dims, reading.layout.shapes[0]
    if dims:
        return arguments.rows(t, tuple(shape[:dims]))
    if reading.layout.size == 0 and isinstance(t, Tensor) and t.ndim > 1:  # of no systems, or of systems of nothing
        t = t.sum(tuple(range(t.ndim - 1))) * 0 + torch.arange(t.shape[-1]).to(t)
    return *arguments.times(t), None


def _again(said: dict[str, Any]) -> Solver:
    return Solver(**said)


class _Same:
    """An object of the user's, equal to itself alone."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.x is other.x


def _plain(x: Any) -> Any:
    """What stands for x in a key."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device, tuple(x.reshape(-1).tolist())
    if isinstance(x, Mapping):
        return tuple(sorted((name, _plain(value)) for name, value in x.items()))
    if isinstance(x, (tuple, list)):
        return type(x).__name__, *map(_plain, x)
    return _Same(x)


def _kind(h0: Any) -> Any:
    """What states of one kind have in common; None where that cannot be a key."""
    if isinstance(h0, Tensor):
        return h0.shape, h0.dtype, h0.device
    leaves, spec = pytree.tree_flatten(h0)
    try:
        key = spec, *[(x.shape, x.dtype, x.device) for x in leaves]
        hash(key)
    except (AttributeError, TypeError):  # no tensor; what a node of the user's says of itself cannot be hashed
        return None
    return key


_kept: dict[tuple[Any, ...], Solver] = {}
_SIMPLE = frozenset((bool, int, float, str, type(None), torch.Size, torch.dtype))


def kept(how: Mapping[str, Any]) -> Solver:
    """The solver for keyword arguments of `Solver`.

    Of numbers and words it is kept for the next call that says the same. Lists count as their elements, and small
    tensors as their numbers; functions and large tensors are read at each call. Nothing of the user's is kept alive.
    """
    values: Any = how.values()
    types = tuple(map(type, values))
    if not _SIMPLE.issuperset(types):
        values = _elements(values)
        types = tuple(map(type, values))
        if not _SIMPLE.issuperset(types):
            return Solver(**how)
    key = (*how, *values, types)
    solver = _kept.get(key)
    if solver is None:
        solver = Solver(**how)
        if len(_kept) >= _SOLVERS:
            _kept.clear()
        _kept[key] = solver
    elif solver._warnings:
        solver._warn()
    return solver


def check(settings: Mapping[str, Any]) -> None:
    """Check keyword arguments of `solve` where they are written, and not in the first solve.

    Raises:
        What `Solver` raises.
    """
    kept({x.name: settings[x.name] for x in fields(Solver) if x.name in settings})


def _elements(settings: Iterable[Any]) -> list[Any]:
    """What settings are made of, one after the other."""
    values: list[Any] = []
    for x in settings:
        if type(x) is dict:
            for name, option in x.items():
                values.append(name)
                _append(values, option)
            values.append("}")
        else:
            _append(values, x)
    return values


def _append(values: list[Any], x: Any) -> None:
    kind = type(x)
    if kind in _SIMPLE:
        values.append(x)
    elif kind in (list, tuple):
        values += ["[", *x, "]"]
    elif kind is Tensor and x.numel() <= FEW and x.device.type == "cpu" and not numbers.transformed():
        values += [x.shape, x.dtype, *x.reshape(-1).tolist()]
    else:
        values.append(x)


@untraced
def solved(how: Solver | Mapping[str, Any], e: Equation, *, dense: bool) -> Solution:
    """Solve an equation.

    Args:
        how: a solver, or keyword arguments of `Solver`.
        dense: keep the dense output.
    """
    start = time.perf_counter()
    solver = how if isinstance(how, Solver) else kept(how)
    if isinstance(e.f, Implicit):
        return implicit.solved(solver, e, lambda solver, e: _solved(solver, e, dense, start))
    return _solved(solver, e, dense, start)


def _solved(solver: Solver, e: Equation, dense: bool, start: float) -> Solution:
    """Solve an equation; `start` is when that was asked for."""
    if e.events is not None:
        from . import segments  # few solves have events

        return segments.solved(solver, e, dense=dense)
    transformed, own_t = numbers.transformed(), e.t
    if transformed and isinstance(own_t, Tensor) and numbers.hidden(own_t):
        solver, e = _in_shared_time(solver, e)
    call = None if transformed else engines.choice.planned(solver, solver.engine, e)
    if call and not dense and (solution := call.solved(e.t, start)):
        return solution
    made = call.made(e.t) if call else None
    known = made is not None
    made = made or solver._prepare(e, solver.engine)
    dense = dense and e.t is own_t
    device, progressing = made.problem.y0.device.type, made.problem.options.progress
    if progressing or torch.is_autocast_enabled(device):
        # Autocast is for f alone: in half precision the solver's own sums would lose the state.
        bar = progress.shown(made.problem) if progressing else contextlib.nullcontext()
        with torch.autocast(device, enabled=False), bar:
            ran = _run(solver, e, made, dense)
    else:
        ran = _run(solver, e, made, dense)
    p, stats, record, event_t = ran.made.problem, ran.made.stats, ran.record, ran.event_t
    assert p.layout is not None
    ys, ts = record.ys, p.t if e.t is own_t else own_t
    if event_t is not None:
        starts = p.t[..., 0].expand(event_t.shape)
        ys, ts = torch.stack([ys[0], ran.event_y]), torch.stack([starts, event_t], -1)
    stats.nfe = p.nfe
    stats.wall = time.perf_counter() - start
    if call and stats.compiled and not known and stats.engine == "julia":
        call.keep(ran.made)
    output = None
    if dense:
        output = interpolant(record, p, p.layout, event_t, ys.requires_grad and ran.made.gradient is not None)
    return Solution(ts, p.layout.unflatten(ys), stats, event_t, output, ran.steps)


class _Ran(NamedTuple):
    """A solve that was made.

    Attributes:
        record: the engine's.
        event_t, event_y: time (0-d) and state (n,) of the event.
    """

    made: Prepared
    record: Any
    steps: Steps | None
    event_t: Tensor | None = None
    event_y: Any = None


def _run(solver: Solver, e: Equation, made: Prepared, dense: bool) -> _Ran:
    def run(made: Prepared) -> tuple[Any, Steps | None]:
        steps = made.engine.watch(made.problem) if dense else None
        return gradients.solve(made.engine, made.problem, made.stats, made.gradient, made.needed, dense), steps

    try:
        record, steps = run(made)
    except (SolveError, NotCompiled) as error:
        reason = engines.choice.second(solver.engine, made, error)
        if reason is None:
            raise
        made = solver._prepare(e, "torch")
        made.stats.reason = reason
        log_once(made.stats.engine, reason, made.stats.method, made.gradient or "through the solver")
        record, steps = run(made)
    if e.event_fn is None:
        return _Ran(made, record, steps)
    if made.problem.transformed:
        return _Ran(made, record, steps, record.event, record.ys[1])
    return _Ran(made, record, steps, *engines.crossing.crossing(made.problem, record, made.gradient))


def _in_shared_time(solver: Solver, e: Equation) -> tuple[Solver, Equation]:
    """The same for times that `vmap` makes others for each sample."""
    said = solver._forward
    e, jumps = transforms.shared_times(e, said.method, said.options)
    if not jumps:
        return solver, e
    # Under a transform every adjoint is through the solver, and nothing that is said of another one counts.
    nothing: dict[str, Any] = {"adjoint": False, **dict.fromkeys(_BACKWARD)}
    return Solver(**{**solver._said, **nothing, "options": {**said.options, **jumps}}), e
