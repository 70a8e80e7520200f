"""torchdiffeq's calls, `odeint`, `odeint_adjoint`, `odeint_event`, `odeint_dense`, and `solve`: what they take, in
words. `solver.py` reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from . import arguments, jumps, mistakes
from .errors import BadTime
from .jumps import At, Event
from .methods import Method
from .numbers import on_host
from .problem import Equation
from .solution import Solution, State
from .solver import solved

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .hints import EngineName, GradientName, How, MethodName, Options, Said


@overload
def odeint(f: Callable[..., Any], h0: State, t: Any, *, event_fn: None = None, **said: Unpack[Said]) -> State: ...
@overload
def odeint(
    f: Callable[..., Any], h0: State, t: Any, *, event_fn: Callable[..., Tensor], **said: Unpack[Said]
) -> tuple[Tensor, State]: ...


@mistakes.overloaded
@mistakes.front(arguments.KEYWORDS)
def odeint(
    f: Callable[..., Any],
    h0: Any,
    t: Any,
    *,
    args: tuple[Any, ...] = (),
    adjoint: bool | GradientName = False,
    method: MethodName | Method | None = None,
    rtol: Any = None,
    atol: Any = None,
    engine: EngineName = "auto",
    options: Options | Mapping[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    mass_matrix: Any = None,
    jac: Callable[..., Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: MethodName | Method | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    compile: bool | None = None,
) -> Any:
    """Solve `dh/dt = f(t, h)`, `h(t[0]) = h0`, and give the states at the times `t`.

    A drop-in for torchdiffeq's function of this name, whose names `func` and `y0` are accepted as well. Differentiable
    with respect to `h0`, `t` and every tensor that `f` depends on.

    Args:
        f: `f(t, h) -> dh/dt` with `t` a 0-d tensor of the state's (real) dtype, `h` and the result like `h0`. A
            module, a function, or any callable. With `options["batch_dims"]` `t` is a time for each system, see
            `docs/batches.md`.
        h0: the state at `t[0]`: a tensor of any shape, or a tuple or other pytree of tensors; float32, float64,
            complex64 or complex128.
        t: shape (T,), floating point, strictly increasing or strictly decreasing; a tensor, or a sequence of floats.
            With `options["batch_dims"]` also (*batch, T), times for each system, or a list of a 1-D tensor for each;
            rows of different length are filled up with their last time.
        args: what `f` takes after `(t, h)`, as in SciPy: it is called as `f(t, h, *args)`, and so are `event_fn` and
            `jac`. Tensors among them get gradients like all that `f` uses.
        adjoint: how to differentiate. False: through the solver's own operations (any order of derivative). True: the
            engine's recommended adjoint: "discrete", and on Julia's for stiff methods and events "gauss", or "forward"
            where few sensitivities are compiled. Or one by name:
            "discrete", "checkpointed", "reversible", "backsolve", "interpolating", "quadrature", "gauss", "forward"
            (`pyjlode.GRADIENTS`). Adjoints give first derivatives.
        method: name of the solver, see `pyjlode.METHODS`; "dopri5" by default.
        rtol, atol: the local error is held below `atol + rtol * |h|` in the root mean square over the elements (over
            several tensors: in each of them). A number, a tensor that broadcasts to `h0`, or a pytree with one for
            each tensor. By default 1e-7 and 1e-9; for states in float32 or complex64, which do not resolve that, 1e-6
            and 1e-7.
        engine: "julia" (DifferentialEquations.jl), "torch" (the native engine; "native" is another word for it), or
            "auto": Julia where it is set up and can solve and differentiate this problem, else torch; torch as well for
            explicit methods with large networks, where it is faster. `Solution.stats.reason` says why. The environment
            variable PYJLODE_ENGINE sets what "auto" means.
        options: for the solver; torchdiffeq's names, see `pyjlode.problem.SolverOptions`. `{"batch_dims": 1}` solves
            each sample of a batch as if it were alone, with steps, times and an event of its own. An option may be
            written as a keyword too: `step_size=0.1` is `options={"step_size": 0.1}`; `progress=True` shows a bar.
        event_fn: `event_fn(t, h) -> Tensor`; the solve ends where the first of its elements crosses zero. `t` must
            then have two elements, of which the second gives the direction only. With `options["batch_dims"]` its shape
            begins with the batch's, and each system ends at its own event; one without is NaN.
        mass_matrix: M of `M dh/dt = f(t, h)`, shape (d, d) for the d numbers of `h0` (of one system, with
            `options["batch_dims"]`); it may be singular (a differential-algebraic system of index 1). For the methods
            "rodas5p", "radau5" and "bdf". `adjoint=True` and False differentiate by it, too.
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
            `Stats.not_compiled` says why not; True does it at once, or raises; False never does. With True the native
            engine has PyTorch's compiler make one function of each step of an explicit Runge-Kutta method, and one of
            its product, or raises; that takes it seconds once, and pays for small networks. `adjoint=False` then
            replays these steps, for first derivatives only.

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
    how = {
        "adjoint": adjoint,
        "method": method,
        "rtol": rtol,
        "atol": atol,
        "engine": engine,
        "options": options,
        "adjoint_rtol": adjoint_rtol,
        "adjoint_atol": adjoint_atol,
        "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options,
        "compile": compile,
    }
    if args:
        f, event_fn, jac = arguments.with_args(args, f, event_fn, jac)
    solution = solved(how, Equation(f, h0, t, event_fn, mass_matrix, jac, adjoint_params), dense=False)
    return solution.h if event_fn is None else (solution.event_t, solution.h)


@mistakes.front(arguments.KEYWORDS, like=odeint)
def solve(
    f: Callable[..., Any],
    h0: State,
    t: Any,
    *,
    args: tuple[Any, ...] = (),
    dense: bool = True,
    event_fn: Callable[..., Tensor] | None = None,
    mass_matrix: Any = None,
    jac: Callable[..., Tensor] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    events: Iterable[Event | At] | None = None,
    **how: Unpack[How],
) -> Solution[State]:
    """As `odeint`, but return a `Solution`: states, dense output, and an account of the work.

    Args:
        dense: keep the dense output for `Solution.interpolate`: the stages of every step. The rest is as in `odeint`.
        events: a list of `Event`, which happen where a condition crosses zero, and `At`, which happen at given times.
            They change the state, and the solve goes on from there. An output at the time of an event is the state
            before it. See `docs/events.md`.
        how: keyword arguments of `Solver`: `method`, `rtol`, `atol`, `adjoint`, `engine`, `options`, `compile` ... ,
            and single options.

    Returns:
        A `Solution` with `t`, `h`, `stats`, `event_t`, `events` and `interpolate(t)`.

    Raises:
        What `odeint` raises; TooManyEvents, a RuntimeError.
    """
    if args:
        f, event_fn, jac = arguments.with_args(args, f, event_fn, jac)
        events = jumps.with_args(args, events)
    return solved(how, Equation(f, h0, t, event_fn, mass_matrix, jac, adjoint_params, events), dense=dense)


@overload
def odeint_adjoint(
    f: Callable[..., Any], h0: State, t: Any, *, event_fn: None = None, **said: Unpack[Said]
) -> State: ...
@overload
def odeint_adjoint(
    f: Callable[..., Any], h0: State, t: Any, *, event_fn: Callable[..., Tensor], **said: Unpack[Said]
) -> tuple[Tensor, State]: ...


@mistakes.overloaded
@mistakes.front(arguments.KEYWORDS)
def odeint_adjoint(
    f: Callable[..., Any], h0: Any, t: Any, *, adjoint: bool | GradientName = "backsolve", **kwargs: Any
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


@mistakes.front(arguments.KEYWORDS)
def odeint_event(
    f: Callable[..., Any],
    h0: State,
    t0: Tensor | float,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, State]:
    """Solve until an event: where the first element of `event_fn(t, h)` crosses zero.

    Args:
        f, h0: as in `odeint`.
        t0: 0-d, the initial time; or one for each system, of the batch's shape, with `options["batch_dims"]`.
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
    kwargs = mistakes.with_options(kwargs, arguments.KEYWORDS)
    each = bool((kwargs.get("options") or {}).get("batch_dims"))
    if t0.numel() != 1 and not each:
        raise BadTime(f"t0 must be one time; it has shape {tuple(t0.shape)}.")
    t0 = t0.reshape(()) if t0.numel() == 1 else t0
    t = torch.stack([t0, t0.detach() + (-1.0 if reverse_time else 1.0)], -1)
    return odeint_interface(f, h0, t, event_fn=event_fn, **kwargs)


@mistakes.front(arguments.KEYWORDS)
def odeint_dense(
    f: Callable[..., Any], h0: State, t0: Tensor | float, t1: Tensor | float, **kwargs: Any
) -> Callable[[Tensor | float], State]:
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
