"""The front door: `odeint`, `odeint_adjoint`, `odeint_event`, `odeint_dense` and `solve`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import arguments, gradients, mistakes, numbers, parameters, progress, transforms
from .bridge import engine as julia
from .bridge import plans
from .bridge import runtime as julia_runtime
from .bridge.function import JuliaFunction
from .bridge.plans import Made
from .errors import (
    BadDtype,
    BadOption,
    BadShape,
    BadTime,
    EngineUnavailable,
    EventNotFound,
    GradientUnavailable,
    MaxStepsReached,
    NotCompiled,
    SolveError,
)
from .native import engine as native
from .notices import log_once, warn
from .numbers import on_host
from .problem import EVENT_STEPS, AdjointSettings, Callback, Field, Layout, ODEProblem
from .solution import Solution, Stats, Steps
from .tracing import untraced

_SETTINGS = ("adjoint_rtol", "adjoint_atol", "adjoint_method", "adjoint_options")


@mistakes.front(arguments.OPTIONS)
def odeint(
    f: Callable[[Tensor, Any], Any],
    h0: Any,
    t: Any,
    *,
    adjoint: bool | str = False,
    method: str | None = None,
    rtol: Any = None,
    atol: Any = None,
    engine: str = "auto",
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    mass_matrix: Any = None,
    jac: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    compile: bool | None = None,
) -> Any:
    """Solve `dh/dt = f(t, h)`, `h(t[0]) = h0`, and give the states at the times `t`.

    A drop-in for torchdiffeq's function of this name, whose names `func` and `y0` are accepted as well. Differentiable
    with respect to `h0`, `t` and every tensor that `f` depends on.

    Args:
        f: `f(t, h) -> dh/dt` with `t` a 0-d tensor of the state's (real) dtype, `h` and the result like `h0`. A
            module, a function, or any callable.
        h0: the state at `t[0]`: a tensor of any shape, or a tuple or other pytree of tensors; float32, float64,
            complex64 or complex128.
        t: shape (T,), floating point, strictly increasing or strictly decreasing; a tensor, or a sequence of floats.
        adjoint: how to differentiate. False: through the solver's own operations (any order of derivative). True: the
            engine's recommended adjoint ("discrete" on the native engine; on Julia's "gauss", or "forward" where few
            sensitivities are compiled). Or one by name:
            "discrete", "backsolve", "interpolating", "quadrature", "gauss", "forward" (`pyjlode.GRADIENTS`). Adjoints
            give first derivatives.
        method: name of the solver, see `pyjlode.METHODS`; "dopri5" by default.
        rtol, atol: the local error is held below `atol + rtol * |h|` in the root mean square over the elements (over
            several tensors: in each of them). A number, a tensor that broadcasts to `h0`, or a pytree with one for
            each tensor. By default 1e-7 and 1e-9; for states in float32 or complex64, which do not resolve that, 1e-6
            and 1e-7.
        engine: "julia" (DifferentialEquations.jl), "torch" (native), or "auto": Julia where it is set up and can solve
            and differentiate this problem, else torch; torch as well for explicit methods with large networks, where it
            is faster. `Solution.stats.reason` says why. The environment variable PYJLODE_ENGINE sets what "auto" means.
        options: for the solver; torchdiffeq's names, see `pyjlode.problem.SolverOptions`.
        event_fn: `event_fn(t, h) -> Tensor`; the solve ends where the first of its elements crosses zero. `t` must
            then have two elements, of which the second gives the direction only.
        mass_matrix: M of `M dh/dt = f(t, h)`, shape (d, d) for the d numbers of `h0` (of one system, with
            `options["batch_dims"]`); it may be singular (a differential-algebraic system of index 1). For the methods
            "rodas5p", "radau5" and "bdf".
        jac: `jac(t, h) -> df/dh`, shape (*h.shape, *h.shape), or (*batch, d, d) with `options["batch_dims"]`, for the
            adaptive stiff methods. By default it is computed by autograd, else by finite differences.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: for the backward solve of the continuous adjoints;
            by default those of the forward one, of which the native engine takes `atol` in proportion to the cotangent:
            the gradient of a scaled loss is the scaled gradient. `adjoint_atol` is absolute, in the units of dL/dh and
            dL/dtheta. A backward solve over fixed steps takes the grid of the forward one.
            `adjoint_options={"norm": "seminorm"}` leaves the parameters out of the error norm (Kidger, Chen & Lyons
            2021).
        adjoint_params: the tensors besides `h0` and `t` to differentiate by; by default all that `f` is found to use.
        compile: for the Julia engine, which can translate `f` to Julia, so that no Python runs in the solve (nor what
            else `f` does in Python). None does so from the second solve of the same `f` on, where it can be done, and
            `Stats.not_compiled` says why not; True does it at once, or raises; False never does.

    Returns:
        The states: the pytree of `h0` with (T, ...) in front of each leaf's shape. With `event_fn`: `(event_t,
        states)`, with the states at `t[0]` and at the event, both differentiable by the implicit function theorem.

    Raises:
        BadShape, BadDtype, BadTime, BadTolerance, BadOption, UnknownMethod: an argument is wrong; all are ValueError or
            TypeError.
        StepSizeTooSmall, NonFiniteState, MaxStepsReached, NotConverged, EventNotFound: the solve failed; RuntimeError.
        EngineUnavailable: the engine asked for is not there; RuntimeError.
        GradientUnavailable: in the backward pass, where this `adjoint` has no such derivative; RuntimeError.
        NotCompiled: `compile=True`, and `f` cannot be compiled; RuntimeError.

    Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018.
    """
    given = (adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options)
    system = (mass_matrix, jac, compile)
    solution = _solve(
        f, h0, t, adjoint, method, rtol, atol, engine, options, event_fn, given, adjoint_params, system, dense=False
    )
    return solution.h if event_fn is None else (solution.event_t, solution.h)


@mistakes.front(arguments.OPTIONS)
def solve(
    f: Callable[[Tensor, Any], Any],
    h0: Any,
    t: Any,
    *,
    adjoint: bool | str = False,
    method: str | None = None,
    rtol: Any = None,
    atol: Any = None,
    engine: str = "auto",
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    mass_matrix: Any = None,
    jac: Callable[[Tensor, Any], Tensor] | None = None,
    dense: bool = True,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    compile: bool | None = None,
) -> Solution:
    """As `odeint`, but return a `Solution`: states, dense output, and an account of the work.

    Args:
        dense: keep the dense output for `Solution.interpolate`: the stages of every step. The rest is as in `odeint`.

    Returns:
        A `Solution` with `t`, `h`, `stats`, `event_t` and `interpolate(t)`.

    Raises:
        What `odeint` raises.
    """
    given = (adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options)
    system = (mass_matrix, jac, compile)
    return _solve(
        f, h0, t, adjoint, method, rtol, atol, engine, options, event_fn, given, adjoint_params, system, dense=dense
    )


@mistakes.front(arguments.OPTIONS)
def odeint_adjoint(
    f: Callable[[Tensor, Any], Any], h0: Any, t: Any, *, adjoint: bool | str = "backsolve", **kwargs: Any
) -> Any:
    """torchdiffeq's function of this name: `odeint` with the O(1)-memory adjoint of Chen et al. 2018.

    `odeint(..., adjoint=True)` is faster, and exact for the numbers that came out.

    Args:
        f, h0, t, kwargs: as in `odeint`. `f` need not be a module: its tensors are found.
        adjoint: another gradient method.

    Returns and raises:
        What `odeint` does.
    """
    return odeint(f, h0, t, adjoint=adjoint, **kwargs)


@mistakes.front(arguments.OPTIONS)
def odeint_event(
    f: Callable[[Tensor, Any], Any],
    h0: Any,
    t0: Tensor | float,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve until an event: where the first element of `event_fn(t, h)` crosses zero.

    Args:
        f, h0: as in `odeint`.
        t0: 0-d, the initial time.
        event_fn: `event_fn(t, h) -> Tensor` of any shape. An element that is zero at `t0` counts from when it leaves
            zero.
        reverse_time: solve towards smaller t.
        odeint_interface: `odeint` or `odeint_adjoint`.
        kwargs: for it.

    Returns:
        `(event_t, states)`: the 0-d time of the event, and the states at `t0` and there, shape (2, ...). Gradients flow
        through both, and into the parameters of `f` and of `event_fn` (Chen, Amos & Nickel, Learning neural event
        functions for ordinary differential equations, 2021, theorem 1).

    Raises:
        EventNotFound: no element crosses zero; and what `odeint` raises.
    """
    t0 = t0 if isinstance(t0, Tensor) else on_host(float(t0))
    if t0.numel() != 1:
        raise BadTime(f"t0 must be one time; it has shape {tuple(t0.shape)}.")
    t0 = t0.reshape(-1)
    t = torch.cat([t0, t0.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(f, h0, t, event_fn=event_fn, **kwargs)


@mistakes.front(arguments.OPTIONS)
def odeint_dense(
    f: Callable[[Tensor, Any], Any], h0: Any, t0: Tensor | float, t1: Tensor | float, **kwargs: Any
) -> Callable[[Tensor | float], Any]:
    """Solve from `t0` to `t1` and return the solution as a function of time.

    Args:
        f, h0, kwargs: as in `odeint`.
        t0, t1: 0-d, the span.

    Returns:
        `h(t)` for a time or a tensor of times of shape (M,) within the span; differentiable with `adjoint=False`.

    Raises:
        What `odeint` raises; `h(t)` raises BadTime outside the span.
    """
    ends = [x if isinstance(x, Tensor) else on_host(float(x)) for x in (t0, t1)]
    return solve(f, h0, torch.stack([x.reshape(()).to(ends[0]) for x in ends]), **kwargs).interpolate


@untraced
def _solve(
    f: Any,
    h0: Any,
    t: Any,
    adjoint: bool | str,
    method: str | None,
    rtol: Any,
    atol: Any,
    engine: str,
    options: dict[str, Any] | None,
    event_fn: Any,
    adjoint_given: tuple[Any, Any, Any, Any],
    adjoint_params: Iterable[Tensor] | None,
    system: tuple[Any, Any, bool | None],
    *,
    dense: bool,
) -> Solution:
    start = time.perf_counter()
    call, unusual = None, (event_fn, adjoint_params, *adjoint_given, *system[:2])
    transformed, own_t = numbers.transformed(), t
    meant = os.environ.get(ENGINE_VARIABLE)
    on_julia = engine != "torch" and (engine != "auto" or meant != "torch") and julia_runtime.started()
    if on_julia and not transformed and all(x is None for x in unusual):
        said = (adjoint, method, rtol, atol, engine, system[2], meant)
        call = plans.call(f, h0, t, said, options)
    if transformed and isinstance(t, Tensor) and numbers.hidden(t):
        f, t, options = transforms.shared_times(f, t, arguments.method_of(method), options, event_fn)
    made = call.made(h0, t) if call else None
    known = made is not None

    def read(engine: str) -> Made:
        return _read(
            f, h0, t, adjoint, method, rtol, atol, engine, options, event_fn, adjoint_given, adjoint_params, system
        )

    made = made or read(engine)
    p, stats, layout = made.problem, made.stats, made.problem.layout
    assert layout is not None
    dense = dense and t is own_t
    steps = _watch(p) if dense and made.engine is native else None
    # Autocast is for f alone: in half precision the solver's own sums would lose the state.
    bar = progress.shown(p) if p.options.progress else contextlib.nullcontext()
    autocast = torch.is_autocast_enabled(p.y0.device.type)
    with torch.autocast(p.y0.device.type, enabled=False) if autocast else contextlib.nullcontext(), bar:
        try:
            record = gradients.solve(made.engine, p, stats, made.gradient, made.needed, dense)
        except SolveError as error:
            if engine != "auto" or meant == "julia" or not _may_go_natively(made, error):
                raise
            made = read("torch")
            p, stats = made.problem, made.stats
            stats.reason = f"Julia's solver failed: {error}"
            log_once(native.NAME, stats.reason, p.method.name, made.gradient or "through the solver")
            steps = _watch(p) if dense else None
            record = gradients.solve(made.engine, p, stats, made.gradient, made.needed, dense)
        event_t, ys, ts = None, record.ys, p.t if t is own_t else own_t
        if event_fn is not None:
            event_t, y_event = (record.event, ys[1]) if transformed else _through_event(p, record, made)
    if event_t is not None:
        ys = torch.stack([ys[0], y_event])
        ts = torch.stack([p.t[0], event_t])
    stats.nfe = p.f.nfe
    stats.wall = time.perf_counter() - start
    blind = ys.requires_grad and made.gradient is not None
    if call and stats.compiled and not known:
        call.keep(made)
    interpolant = _interpolant(record, p, layout, event_t, blind) if dense else None
    return Solution(ts, layout.unflatten(ys), stats, event_t, interpolant, steps)


def _may_go_natively(made: Made, error: SolveError) -> bool:
    """Whether the native engine may get past where Julia's solver failed: with a method for stiff systems, of which
    each engine has its own, that did not just need more steps."""
    p = made.problem
    if made.engine is not julia or not p.method.controlled or p.compile or isinstance(p.f.f, JuliaFunction):
        return False
    if isinstance(error, MaxStepsReached):
        return abs(error.t - p.times[0]) < 1e-3 * abs(p.times[-1] - p.times[0])
    return not isinstance(error, EventNotFound)


def _watch(p: ODEProblem) -> Steps | None:
    """Have the steps of a solve noted as they are tried; the user's callbacks are called as before."""
    if p.method.kind == "scipy":
        return None
    steps, own = Steps(), p.callbacks

    def note(into: list[tuple[float, float]], then: Callback | None) -> Callback:
        def noted(t0: float, y0: Any, dt: float) -> None:
            into.append((t0, dt))
            if then:
                then(t0, y0, dt)

        return noted

    if p.method.adaptive:
        p.callbacks = replace(own, accept=note(steps.accepted, own.accept), reject=note(steps.rejected, own.reject))
    else:  # there every step is accepted
        p.callbacks = replace(own, step=note(steps.accepted, own.step))
    return steps


ENGINE_VARIABLE = "PYJLODE_ENGINE"  # what "auto" means, where the user has set it: "torch" or "julia"


def _engine(name: str, p: ODEProblem, adjoint: bool | str, *, recorded: bool = False) -> tuple[gradients.Engine, str]:
    """The engine for a problem, and why it is that one.

    Args:
        recorded: autograd must follow the solver's own operations.
    """
    if name not in ("auto", "torch", "julia"):
        raise BadOption(f"engine must be 'auto', 'julia' or 'torch'; got {name!r}.")
    reason = f"asked for by engine={name!r}"
    only_julia = p.method.kind == "julia" or isinstance(p.f.f, JuliaFunction)
    if name == "auto" and not only_julia and os.environ.get(ENGINE_VARIABLE, "auto") != "auto":
        name, reason = os.environ[ENGINE_VARIABLE], f"asked for by {ENGINE_VARIABLE}"
        if name not in ("torch", "julia"):
            raise BadOption(f"{ENGINE_VARIABLE} must be 'torch', 'julia' or 'auto'; it is {name!r}.")
    if name == "torch" and not only_julia:
        return native, reason
    if p.transformed:
        if name == "auto" and not only_julia:
            return native, transforms.REASON
        raise BadOption(f"the Julia engine cannot do this: {transforms.REASON}. Use engine='torch'.")
    if only_julia:
        what = f"method={p.method.name!r}" if p.method.kind == "julia" else "a julia_function"
        if name == "torch":
            raise BadOption(f"{what} needs Julia; use engine='julia'.")
        name, reason = "julia", f"{what} needs it"
    found = julia_runtime.find()
    if isinstance(found, str):
        if name == "julia":
            raise EngineUnavailable(f"engine='julia': {found}")
        return native, found
    gradient = gradients.find(adjoint, julia, p)
    obstacle = julia.cannot(p, gradient if torch.is_grad_enabled() else None)
    if recorded:
        obstacle = "adjoint=False differentiates through the solver's own operations, which are not PyTorch's there"
    if obstacle is None and name == "auto" and p.compile is None and _large(p):
        return native, "f is large, its own time is what counts, and the native engine asks it less often"
    if obstacle is None:
        return julia, reason if name == "julia" else f"Julia is set up by {found.source}"
    if name == "julia":
        raise BadOption(f"the Julia engine cannot do this: {obstacle}. Change that, or use engine='torch'.")
    return native, f"the Julia engine cannot do this: {obstacle}"


# Products of numbers in a call of f from which on nothing is gained by Julia: benchmarks/compiled.py --part size.
_LARGE = 10_000_000


def _large(p: ODEProblem) -> bool:
    """Whether an explicit method solves a large network: one whose parameters, times the rows of the state that it is
    given, are many."""
    if p.method.kind != "adaptive" or p.layout is None or not p.layout.bare:
        return False
    rows = p.layout.shapes[0][:-1].numel()
    return rows * sum(x.numel() for x in parameters.Held(p.f.source or p.f.f).wanted) > _LARGE


def _read(
    f: Any,
    h0: Any,
    t: Any,
    adjoint: bool | str,
    method: str | None,
    rtol: Any,
    atol: Any,
    engine: str,
    options: dict[str, Any] | None,
    event_fn: Any,
    adjoint_given: tuple[Any, Any, Any, Any],
    adjoint_params: Iterable[Tensor] | None,
    system: tuple[Any, Any, bool | None],
) -> Made:
    """Check every argument and make the problem of them."""
    if not callable(f):
        swapped = " The order of arguments is (f, h0, t)." if callable(h0) or callable(t) else ""
        raise BadShape(f"f must be callable as f(t, h); got a {type(f).__name__}.{swapped}")
    row = arguments.method_of(method)
    try:
        layout, y0 = arguments.state(h0)
        t, times = arguments.times(t)
    except (BadShape, BadDtype, BadTime) as error:
        raise type(error)(mistakes.order(error, h0, t)) from error
    if event_fn is not None and len(times) != 2:
        raise BadTime(f"with event_fn, t must be [t0, t1], t1 giving the direction; got {len(times)} times.")
    rel, absolute = arguments.tolerances(rtol, atol, layout, row)
    opts = arguments.options(options, row, h0, f, layout)
    if event_fn is not None and "max_num_steps" not in (options or {}):
        opts = replace(opts, max_num_steps=EVENT_STEPS)
    batch = arguments.systems(opts, layout)
    autocast = torch.is_autocast_enabled(layout.device.type)
    mass_matrix, jac, compile = system
    p = ODEProblem(
        f=flat_field(f, layout, autocast),
        y0=y0,
        t=t,
        times=times,
        method=row,
        rtol=rel,
        atol=absolute,
        options=opts,
        norm=opts.norm or arguments.default_norm(layout, batch),
        event_fn=event_fn and (lambda t, y: arguments.event_value(event_fn(t, layout.unflatten(y)))),
        layout=layout,
        batch=batch,
        mass=arguments.mass_matrix(mass_matrix, row, layout, batch),
        jac=arguments.jacobian(jac, row, layout, batch),
        callbacks=arguments.callbacks(f, row, layout, y0),
        compile=compile,
        transformed=numbers.transformed(),
    )
    if compile not in (None, True, False):
        raise BadOption(f"compile must be True, False or None; got {compile!r}.")
    explicit = arguments.adjoint_params(adjoint_params)
    grad = torch.is_grad_enabled() and not p.transformed
    chosen, reason = _engine(engine, p, adjoint)
    gradient = gradients.find(adjoint, chosen, p)
    if p.transformed:  # every adjoint is: through the solver
        gradient = None

    # One call of f at the start checks what it returns, shows what it depends on, and is the first slope of the solve.
    held = parameters.Held(f) if grad else None
    mark = parameters.graph_mark() if grad else 0
    probe = y0.detach().requires_grad_(grad) if gradient else y0
    meter = parameters.GraphMeter() if grad and gradient == "discrete" else None
    first = partial(_first, p=p, probe=probe, autocast=autocast)
    with contextlib.nullcontext() if p.transformed else torch.set_grad_enabled(grad):
        try:
            with meter or contextlib.nullcontext():
                f0 = first(f)
        except RuntimeError as error:
            if meter is None or "saved tensor" not in str(error):
                raise
            meter = None  # f differentiates by torch.func, which does not let what autograd keeps be looked at
            f0 = first(f)
        if held and (changed := held.changed()) and not torch.equal(f0.detach().clone(), first(f)):
            f = parameters.settled(f, changed)
            p.f = flat_field(f, layout, autocast)
            p.f.source = None  # a trace of f would not show this
            mark = parameters.graph_mark()
            f0 = first(f)
    needed = grad and (y0.requires_grad or t.requires_grad)
    if held:
        p.named = explicit is not None
        if gradient:
            with torch.enable_grad():
                found = parameters.dependencies(held, f0, probe, mark, partial(first, f), explicit)
            p.params, p.retain_graph, p.suspects, p.makes_leaves, p.bindings, p.reached = found
            p.cuts = parameters.cut(p.params)
            if held.wanted and not f0.requires_grad and explicit is None:
                warn(
                    "autograd sees no way from what f returns at t[0] to h or to the tensors that f holds: it is a "
                    "constant there, or f leaves PyTorch or detaches. What f holds is not trained through this solve, "
                    "unless f uses it at other times."
                )
        else:
            p.params = explicit if explicit is not None else tuple(held.wanted)
        if adjoint is True and chosen is julia and all(x is None for x in adjoint_given) and julia.prefers_forward(p):
            gradient = "forward"
        if meter and gradient == "discrete":
            p.graph_bytes = meter.bytes_beside(p.params)
        needed = needed or bool(p.params) or (f0.requires_grad and gradient is None)
        if needed and gradient is None and chosen is julia:
            chosen, reason = _engine(engine, p, adjoint, recorded=True)
    p.f0 = f0 if gradient is None else f0.detach()
    if layout.bare:  # f may return one buffer of its own, again and again
        p.f0, p.f.probed = p.f0.clone(), f0.detach()
    if p.mass is not None:
        p.y0 = native.consistent(p)
        p.f0 = p.f0 if p.options.consistent == "check" else None
    p.adjoint = (
        None if p.transformed else _adjoint(f, p, gradient, adjoint, rtol, atol, options, adjoint_given, h0, layout)
    )
    if chosen is julia and p.adjoint:
        chosen, reason = _engine(engine, p, adjoint)

    if compile and chosen is not julia:
        raise NotCompiled(f"compile=True is for the Julia engine, and this is the native one: {reason}.")
    leaf = h0 if isinstance(h0, Tensor) else pytree.tree_leaves(h0)[0]
    copied = not p.transformed and y0.numel() > 0 and y0.data_ptr() != leaf.data_ptr()
    stats = Stats(chosen.NAME, reason, row.name, copied)
    log_once(chosen.NAME, reason, row.name, gradient or "through the solver")
    return Made(p, stats, chosen, gradient, needed)


def _first(f: Any, p: ODEProblem, probe: Tensor, autocast: bool) -> Tensor:
    """f(t, y0) at the time that a solver first asks for, checked: shape (n,).

    Args:
        probe: stands for y0.
    """
    t, layout = p.asked(p.times[0], p.times[-1]), p.layout
    version = None if p.transformed or probe.is_inference() else probe._version
    assert layout is not None
    p.f.nfe += 1
    try:
        try:
            out = f(t, layout.unflatten(probe))
        except RuntimeError as error:
            if not p.f.wants_graph(error, probe):
                raise
            with torch.enable_grad():
                out = f(t, layout.unflatten(probe.detach().requires_grad_()))
            if not torch.is_grad_enabled():
                out = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out)
        arguments.check_output(out, layout, autocast)
    except Exception as error:
        fits = partial(arguments.check_output, layout=layout, autocast=autocast)
        mistakes.call_of_f(f, t, layout.unflatten(probe), fits, error)
        raise
    if version is not None and probe._version != version:
        raise BadShape("f changed h in place; it must leave h as it is and return dh/dt in a tensor of its own.")
    return layout.flatten_result(t, out).to(layout.dtype)


def flat_field(f: Any, layout: Layout, autocast: bool) -> Field:
    """f on the flat vector."""
    if autocast:  # f answers in a lower precision than the state's, and in the same one when a backward pass asks again
        dtype = torch.get_autocast_dtype(layout.device.type)

        def cast(t: Tensor, y: Tensor) -> Tensor:
            # Without its cache: weights that autocast has cast without a graph would have none when one is wanted.
            with torch.autocast(layout.device.type, dtype=dtype, cache_enabled=False):
                return layout.flatten_result(t, f(t, layout.unflatten(y))).to(layout.dtype)

        return Field(cast)
    if layout.bare:
        return Field(f, layout.shapes[0], (f, layout.shapes[0]))
    source = (f, str(layout.spec), *layout.shapes, *layout.dtypes)
    return Field(lambda t, y: layout.flatten_result(t, f(t, layout.unflatten(y))), source=source)


def _adjoint(
    f: Any,
    p: ODEProblem,
    gradient: str | None,
    adjoint: bool | str,
    rtol: Any,
    atol: Any,
    options: dict[str, Any] | None,
    given: tuple[Any, Any, Any, Any],
    h0: Any,
    layout: Layout,
) -> AdjointSettings | None:
    """Settings of the backward solve: the forward solve's, where nothing else is said."""
    continuous = gradient in ("backsolve", "interpolating", "quadrature", "gauss")
    said = [name for name, value in zip(_SETTINGS, given) if value is not None]
    if said and not continuous:
        how = f"adjoint={gradient!r}" if gradient else "adjoint=False"
        if adjoint is True:
            how = f"adjoint=True (which is {gradient!r})"
        raise BadOption(
            f"{', '.join(said)}: these configure a backward solve, and {how} has none. Use adjoint='backsolve', "
            "'interpolating', 'quadrature' or 'gauss' (odeint_adjoint is 'backsolve')."
        )
    if not continuous:
        return None
    adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options = given
    row = p.method if adjoint_method is None else arguments.method_of(adjoint_method)
    if row is not p.method and options and adjoint_options is None:
        raise BadOption(
            "adjoint_method differs from method, so options do not carry over: give adjoint_options, {} for none."
        )
    if p.mass is not None and not row.mass:
        raise BadOption(f"adjoint_method={row.name!r} does not take the mass_matrix that the adjoint has too.")
    if adjoint_options is None:
        # The backward solve goes over the grid that was made for the forward one; it makes none of its own.
        adjoint_options = {k: v for k, v in (options or {}).items() if k not in ("norm", "grid_constructor")}
    adjoint_options = dict(adjoint_options)
    norm = adjoint_options.pop("norm", None)
    if norm is not None and norm != "seminorm" and not callable(norm):
        raise BadOption(f"adjoint_options['norm'] must be 'seminorm' or a function; got {norm!r}.")
    rel, absolute = arguments.tolerances(
        rtol if adjoint_rtol is None else adjoint_rtol, atol if adjoint_atol is None else adjoint_atol, layout, row
    )
    return AdjointSettings(
        method=row,
        rtol=rel,
        atol=absolute,
        options=arguments.options(adjoint_options, row, h0, f, layout),
        absolute=adjoint_atol is not None,
        seminorm=norm == "seminorm",
        norm=norm if callable(norm) else None,
        callbacks=arguments.callbacks(f, row, layout, p.y0, "_adjoint"),
    )


def _through_event(p: ODEProblem, record: Any, made: Made) -> tuple[Tensor, Tensor]:
    """Event time (0-d) and state (n,), with gradients by the implicit function theorem.

    The event moves with everything that moves `event_fn(t, y(t))`. Newton's iteration on it, from the event itself and
    with its slope held, changes no value and makes one more order of derivative exact each time (Chen, Amos & Nickel
    2021, theorem 1, is the first).
    """
    y = record.ys[-1]
    t = p.t.detach().new_tensor(record.event_t)
    assert p.event_fn is not None
    if not torch.is_grad_enabled():
        return t, y
    recorded = made.gradient is None and p.method.kind != "scipy"
    step = record.last if recorded or made.gradient == "discrete" else None
    with torch.no_grad():
        slope = native.slope(p, t.to(y), y) if step is None else native.output_slope(p, step, record.event_t)
    at, state = t.to(torch.float64).clone(), y
    for _ in range(2 if recorded else 1):
        value = p.event_fn(at.to(y), state).reshape(-1)
        with torch.enable_grad():
            point, moment = y.detach().requires_grad_(), t.to(y).clone().requires_grad_()
            c = p.event_fn(moment, point).reshape(-1)
            which = int(c.detach().abs().argmin())
            dt, dy = (
                torch.autograd.grad(c[which], (moment, point), allow_unused=True) if c.requires_grad else (None, None)
            )
        rate = (0.0 if dt is None else float(dt)) + (0.0 if dy is None else float(dy @ slope))
        if not value.requires_grad and not (y.requires_grad and rate == 0.0):
            return t, y
        if rate == 0.0:
            at, state = gradients.undifferentiable(
                f"event_fn does not change along the solution at the event (t={float(t):.6g}): the event's time has no "
                "derivative there (it grazes zero, or event_fn is not differentiable).",
                at,
                y,
                of=(value,),
            )
            break
        residual = value[which].to(torch.float64)
        at = at - (residual - residual.detach()) / rate
        if recorded and step is not None:
            state = native.output_at(p, step, at)
        else:
            state = y + slope * (at - at.detach()).to(y)
    return at.to(t), state


def _interpolant(
    record: Any, p: ODEProblem, layout: Layout, event_t: Tensor | None, blind: bool
) -> Callable[[Tensor], Any]:
    t0 = p.times[0]
    t1 = p.times[-1] if event_t is None else numbers.read(event_t)
    low, high = min(t0, t1), max(t0, t1)

    def interpolate(t: Tensor) -> Any:
        if not t.is_floating_point():
            t = t.to(torch.float64)
        values = numbers.listed(t.detach().to(torch.float64).reshape(-1))
        slack = 1e-12 * max(abs(low), abs(high))
        outside = [x for x in values if not low - slack <= x <= high + slack]
        if outside:
            raise BadTime(f"t={outside[0]:.9g} is outside the span of the solve, [{low:.9g}, {high:.9g}].")
        if blind and torch.is_grad_enabled():
            raise GradientUnavailable(
                "the dense output of a solve with an adjoint carries no gradient: ask for these times in t, solve with "
                "adjoint=False, or interpolate under torch.no_grad()."
            )
        times = t.reshape(-1)
        ys = record.ys[:1].expand(len(values), -1) if record.dense is None else record.dense(times)
        return pytree.tree_map(lambda x: x.reshape(t.shape + x.shape[1:]), layout.unflatten(ys))

    return interpolate
