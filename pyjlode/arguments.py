"""The reading of what a user says: everything that can be wrong about it is found here, before an engine starts.

What is said of *how* to solve is read once, for a `Solver`; what of that depends on the state, once for each kind of
state; and the state and the times at each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import methods, numbers
from .errors import BadDtype, BadOption, BadShape, BadTime, BadTolerance, NonFiniteState
from .methods import Method
from .notices import warn, warn_once
from .numbers import on_host
from .problem import (
    NO_OPTIONS,
    Callbacks,
    Layout,
    Norm,
    Rows,
    SolverOptions,
    SystemsLayout,
    is_finite,
    max_rms_norm,
    not_negative,
    rms_norm,
)

FLOATS = (torch.float32, torch.float64, torch.complex64, torch.complex128)

_COMMON = {"norm", "max_num_steps", "max_events", "dtype", "specialize", "progress"}
_CONTROLLED = {"first_step", "safety", "ifactor", "dfactor", "min_step", "max_step", "step_t", "jump_t"}
_CONTROLLED |= {"batch_dims", "batch_t", "on_failure"}
_BY_KIND: dict[str, set[str]] = {
    "adaptive": _CONTROLLED | {"estimates"},
    "fixed": {"step_size", "grid_constructor", "interp", "perturb"},
    "implicit": {"step_size", "grid_constructor", "interp", "perturb", "max_iters"},
    "adams": {"step_size", "grid_constructor", "interp", "perturb", "max_iters", "max_order"},
    "second": {"step_size", "grid_constructor", "interp", "perturb"},
    "reversible": {"step_size", "grid_constructor", "interp", "perturb"},
    "stiff": _CONTROLLED | {"max_iters", "max_order", "consistent", "allow_unstable"},
    "scipy": {"solver", "first_step", "min_step", "max_step"},
}
SCIPY = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")
_BY_KIND["auto"] = _BY_KIND["stiff"]
_BY_KIND["julia"] = {"first_step", "min_step", "max_step", "step_t", "jump_t", "step_size", "consistent"}
OPTIONS = frozenset({field.name for field in fields(SolverOptions)} | {"dtype"})
_KNOWN = sorted(OPTIONS)
# Those that may be keywords of a call: `dtype` says nothing, and `solver` is what others call the method.
KEYWORDS = OPTIONS - {"dtype", "solver"}


def state(h0: Any) -> tuple[Layout, Tensor]:
    """Check `h0` and lay it flat: the layout and the flat real vector, shape (n,)."""
    layout = layout_of(h0)
    return layout, flat(layout, h0)


def layout_of(h0: Any) -> Layout:
    """Check what `h0` is made of."""
    leaves = [h0] if isinstance(h0, Tensor) else pytree.tree_leaves(h0)
    if not leaves:
        raise BadShape("h0 holds no tensors.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise BadDtype(
                f"h0 must be a tensor or a pytree of tensors; it holds a {type(leaf).__name__}: {leaf!r:.80}. "
                "Make that a tensor with torch.as_tensor(...)."
            )
        if leaf.dtype not in FLOATS:
            hint = "cast it first: h0.to(torch.float32)"
            raise BadDtype(
                f"h0 has dtype {leaf.dtype}; a state must be float32, float64, complex64 or complex128 ({hint})."
            )
        if leaf.device != leaves[0].device:
            raise BadShape(f"the tensors of h0 lie on different devices, {leaves[0].device} and {leaf.device}.")
    return Layout(h0)


def flat(layout: Layout, h0: Any, *, check: bool = True) -> Tensor:
    """The state as one real vector, shape (n,), and finite, which is checked."""
    # Engines read the memory itself, of which such a view is the negative: `z.conj().imag`.
    y0 = layout.flatten(h0).resolve_neg()
    y0 = finite(y0) if check else y0
    # A view, made while nothing is recorded, of a tensor that requires grad says that it does, and has no graph.
    return y0.detach() if y0.requires_grad and not torch.is_grad_enabled() else y0


def finite(y0: Tensor) -> Tensor:
    """Check that the flat state is."""
    if not is_finite(y0):
        values = numbers.rows(y0) if numbers.transformed() else y0
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteState(f"h0 holds NaN or infinity ({bad} of {values.numel()} numbers).", t=math.nan, dt=0.0)
    return y0


def times(t: Any, *, name: str = "t") -> tuple[Tensor, list[float]]:
    """Check the output times: the tensor of shape (T,), and its values."""
    if not isinstance(t, Tensor):
        try:
            if isinstance(t, (list, tuple)) and any(isinstance(x, Tensor) for x in t):  # with their graphs
                t = torch.stack([on_host(x).reshape(()) for x in t])
            else:
                t = on_host(t)
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadTime(f"{name} must be a 1-D tensor of times; got a {type(t).__name__}.") from error
    if not t.is_floating_point():
        raise BadDtype(f"{name} has dtype {t.dtype}; times must be floating point (t.double()).")
    if t.ndim != 1:
        own = " A row for each system needs options={'batch_dims': 1} and an adaptive method." if t.ndim > 1 else ""
        raise BadTime(f"{name} must be one-dimensional; it has shape {tuple(t.shape)}.{own}")
    values = numbers.listed(t)
    if not values:
        raise BadTime(f"{name} is empty; its first element is the time of h0.")
    if not all(map(math.isfinite, values)):
        raise BadTime(f"{name} holds NaN or infinity.")
    steps = [b - a for a, b in zip(values, values[1:])]
    if 0.0 in steps:
        raise BadTime(f"{name} repeats {values[steps.index(0.0)]:.9g}; it must be strictly increasing or decreasing.")
    if steps and not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        turn = next(i for i, s in enumerate(steps) if (s > 0) != (steps[0] > 0))
        raise BadTime(
            f"{name} must be strictly increasing or strictly decreasing; it turns at index {turn} "
            f"({values[turn]:.6g} then {values[turn + 1]:.6g})."
        )
    return t, values


def rows(t: Any, batch: tuple[int, ...]) -> tuple[Tensor, list[float], Rows]:
    """Check the times of independent systems: the tensor, of shape (T,) or (*batch, T); the first and the last time of
    all, and those between where all have the same; and the rows.

    Args:
        t: as `times` takes it, or with a row for each system: a tensor of shape (*batch, T), or a list of 1-D tensors
            or sequences of floats. Rows of different length are filled up with their last time.
    """
    if isinstance(t, (list, tuple)) and t and all(isinstance(x, (list, tuple)) or _is_row(x) for x in t):
        t = _filled(t)
    if not isinstance(t, Tensor) or t.ndim < 2:
        t, values = times(t)
        host = np.broadcast_to(np.array(values), (math.prod(batch), len(values)))
        return t, values, Rows(batch, host, False)
    if not t.is_floating_point():
        raise BadDtype(f"t has dtype {t.dtype}; times must be floating point (t.double()).")
    if tuple(t.shape[:-1]) != batch:
        raise BadTime(
            f"t has shape {tuple(t.shape)}; for systems in a batch of shape {batch} it must be (T,) or "
            f"({', '.join(map(str, batch))}, T), a row for each."
        )
    if t.shape[-1] == 0:
        raise BadTime("t is empty; its first element is the time of h0.")
    if numbers.hidden(t):
        raise BadTime("t has a row for each system, and torch.func.vmap makes it another for each of its samples.")
    plain = numbers.rows(t)[0]
    with numbers.outside():
        host = plain.cpu().double().numpy().reshape(-1, t.shape[-1])
    found = Rows(batch, host, True)
    if not np.isfinite(host).all():
        raise BadTime("t holds NaN or infinity.")
    steps = np.diff(host, axis=1)
    moving = steps != 0
    # What fills a row up comes last.
    gap = (~moving[:, :-1] & moving[:, 1:]).any(1)
    if gap.any():
        raise BadTime(f"t repeats a time within the row of {found.name(int(gap.argmax()))}; only its end may repeat.")
    ahead, back = (steps > 0).any(), (steps < 0).any()
    if ahead and back:
        raise BadTime("t must be strictly increasing in every row, or strictly decreasing in every row, to its end.")
    sign = -1.0 if back else 1.0
    first, last = sign * (sign * found.starts).min(), sign * (sign * found.ends).max()
    return t, [float(first)] if first == last else [float(first), float(last)], found


def _is_row(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 1


def _filled(given: Any) -> Tensor:
    """Rows of different length as one tensor, with their graphs."""
    try:
        parts = [x if isinstance(x, Tensor) else on_host(x) for x in given]
        longest = max(len(x) for x in parts)
        return torch.stack([torch.cat([x, x[-1:].expand(longest - len(x))]) for x in parts])
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadTime("t must be a tensor of times, or a list with a 1-D tensor of times for each system.") from error


def with_args(args: Any, *functions: Any) -> list[Any]:
    """Functions of (t, h) made of the user's functions of (t, h, *args). None stays None.

    Raises:
        BadOption: `args` is not a tuple.
    """
    if not isinstance(args, (tuple, list)):
        raise BadOption(f"args must be a tuple of what f takes after (t, h), as in (k,); got a {type(args).__name__}.")
    # A list: where f is compiled, a number that is another at a later call gives its place to an input.
    extra = list(args)
    return [f if f is None else _with(extra, f) for f in functions]


def _with(args: list[Any], f: Any) -> Any:
    if not callable(f):
        return f

    def called(t: Tensor, h: Any) -> Any:
        return f(t, h, *args)

    for name in CALLBACKS:
        for suffix in ("", "_adjoint"):
            if (call := getattr(f, name + suffix, None)) is not None:
                setattr(called, name + suffix, call)
    return called


def method_of(method: Any) -> Method:
    if isinstance(method, Method):
        return method
    if method is not None and not isinstance(method, str):
        what = method.__name__ if isinstance(method, type) else type(method).__name__
        meant = methods.elsewhere(what)
        hint = f" Write method={meant!r}." if meant else ""
        raise BadOption(f"method must be a name, as in pyjlode.METHODS, or None; got a {what}.{hint}")
    return methods.find(method)


def tolerance_said(tol: Any, name: str) -> Any:
    """`rtol` or `atol` as far as it can be read without a state: None, a float, or a pytree of numbers and of tensors
    that nobody else changes."""
    if tol is None:
        return None
    if isinstance(tol, (int, float)) or (isinstance(tol, Tensor) and tol.ndim == 0):
        value = float(tol)
        if not (math.isfinite(value) and value >= 0):
            raise BadTolerance(f"{name} must be finite and not negative; got {value!r}.")
        return value
    leaves, spec = ([tol], None) if isinstance(tol, Tensor) else pytree.tree_flatten(tol)
    for part in leaves or [None]:
        if not isinstance(part, (int, float, Tensor)):
            raise BadTolerance(f"{name} must be a number, a tensor, or a pytree of these; got {part!r:.80}.")
    with numbers.lasting():
        leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
    return leaves[0] if spec is None else pytree.tree_unflatten(leaves, spec)


def tolerance(tol: Any, name: str, layout: Layout) -> float | Tensor:
    """`rtol` or `atol` for a state: a number, or one for each element, shape (n,)."""
    if isinstance(tol, float):
        return tol
    parts = [tol] if isinstance(tol, Tensor) else pytree.tree_leaves(tol)
    if len(parts) != len(layout.shapes):
        raise BadTolerance(
            f"{name} has {len(parts)} parts, the state has {len(layout.shapes)}; give one number, or one for each "
            f"tensor."
        )
    numbers_of: list[Tensor] = []
    for part, shape, is_complex in zip(parts, layout.shapes, layout.complex):
        try:
            part = torch.as_tensor(part, device=layout.device).detach().to(layout.dtype).expand(shape)
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadTolerance(f"{name} does not broadcast to the state's shape {tuple(shape)}.") from error
        part = part.reshape(-1)
        numbers_of.append(part.repeat_interleave(2) if is_complex else part)
    flat = layout.join(numbers_of)
    if not bool((torch.isfinite(flat) & (flat >= 0)).all()):
        raise BadTolerance(f"{name} must be finite and not negative in every element.")
    return flat


BOTH_ZERO = "rtol and atol are both zero; no step can meet that. Give at least one of them."
# Where none are given: rtol and atol. In float32 those of float64 are below what a sum of a few terms resolves.
DEFAULTS = {torch.float64: (1e-7, 1e-9), torch.float32: (1e-6, 1e-7)}


def tolerances(rtol: Any, atol: Any, layout: Layout, method: Method) -> tuple[float | Tensor, float | Tensor]:
    """Both as `tolerance_said` leaves them, for a state; None is the default for its dtype. A zero `atol` becomes the
    smallest normal number, so that a state of zero is within tolerance of itself."""
    usual = DEFAULTS[layout.dtype]
    rtol, atol = usual[0] if rtol is None else rtol, usual[1] if atol is None else atol
    if type(rtol) is type(atol) is float:
        return _checked(rtol, atol, layout, method)
    with numbers.lasting():
        return _checked(tolerance(rtol, "rtol", layout), tolerance(atol, "atol", layout), layout, method)


def _checked(
    rel: float | Tensor, absolute: float | Tensor, layout: Layout, method: Method
) -> tuple[float | Tensor, float | Tensor]:
    total = rel + absolute
    if total.numel() and float(total.min()) <= 0 if isinstance(total, Tensor) else total <= 0:
        raise BadTolerance(BOTH_ZERO)
    tiny = torch.finfo(layout.dtype).tiny
    absolute = absolute.clamp_min(tiny) if isinstance(absolute, Tensor) else max(absolute, tiny)
    eps = torch.finfo(layout.dtype).eps
    smallest = float(rel.min()) if isinstance(rel, Tensor) and rel.numel() else rel
    if method.adaptive and not isinstance(smallest, Tensor) and smallest < eps:
        warn_once(
            f"rtol {layout.dtype}",
            f"rtol={smallest:g} is below what {layout.dtype} resolves ({eps:.2g}): steps get small without getting "
            f"better. "
            "Pass rtol=1e-5 or so, or solve in float64. (This warning is shown once.)",
        )
    return rel, absolute


def options_said(given: Any, method: Method) -> tuple[dict[str, Any], str]:
    """The options dictionary as far as it can be read without a state, and a warning, if one is due.

    `dtype` (of time, in torchdiffeq) is accepted and changes nothing: time is float64 on the host always, at no cost.
    """
    if given is not None and not isinstance(given, Mapping):
        raise BadOption(f"options must be a dictionary; got {given!r:.80}.")
    if not given:
        return {}, ""
    given = dict(given)
    for name in given:
        if name not in _KNOWN:
            raise BadOption(methods.unknown(name, "option", _KNOWN))
    unused = set(given) - _COMMON - _BY_KIND[method.kind]
    warning = f"{method.name} makes no use of the options {sorted(unused)}." if unused else ""
    read: dict[str, Any] = {name: given[name] for name in given if name not in unused and name != "dtype"}
    read = {name: value for name, value in read.items() if value is not None}

    # Straight lines between the points of the grid would cost these their order.
    if method.kind in ("second", "reversible"):
        read.setdefault("interp", "cubic")

    for name in ("first_step", "step_size", "max_step", "ifactor", "safety"):
        if name in read:
            read[name] = _number(name, read[name], positive=True)
    for name in ("min_step", "dfactor"):
        if name in read:
            read[name] = _number(name, read[name], positive=False)
    for name in ("max_num_steps", "max_events", "max_order", "max_iters"):
        if name in read:
            read[name] = _count(name, read[name])
    for name in ("step_t", "jump_t"):
        if name in read:
            read[name] = _times(name, read[name])
    twice = set(read.get("step_t", ())) & set(read.get("jump_t", ()))
    if twice:
        raise BadOption(f"step_t and jump_t have the times {sorted(twice)} in common; a jump is a step's end already.")
    if read.get("max_order", 1) > 12:
        raise BadOption(f"options['max_order'] must be at most 12; got {read['max_order']}.")
    if read.get("consistent", "check") not in ("check", "compute"):
        raise BadOption(f"options['consistent'] must be 'check' or 'compute'; got {read['consistent']!r}.")
    if read.get("specialize", "auto") not in ("auto", "full"):
        raise BadOption(f"options['specialize'] must be 'auto' or 'full'; got {read['specialize']!r}.")
    if read.get("batch_t", "auto") not in ("auto", "column", "batch", "vmap"):
        raise BadOption(f"options['batch_t'] must be 'auto', 'column', 'batch' or 'vmap'; got {read['batch_t']!r}.")
    if read.get("on_failure", "raise") not in ("raise", "nan"):
        raise BadOption(f"options['on_failure'] must be 'raise' or 'nan'; got {read['on_failure']!r}.")
    for name in ("batch_t", "on_failure"):
        if name in read and "batch_dims" not in read:
            raise BadOption(f"options[{name!r}] is for systems in a batch, and needs options['batch_dims'].")
    for name in ("progress", "estimates"):
        if not isinstance(read.get(name, False), bool):
            raise BadOption(f"options[{name!r}] must be True or False; got {read[name]!r}.")
    if read.get("interp", "linear") not in ("linear", "cubic"):
        raise BadOption(f"options['interp'] must be 'linear' or 'cubic'; got {read['interp']!r}.")
    if "step_size" in read and "grid_constructor" in read:
        raise BadOption("options['step_size'] and options['grid_constructor'] both make the grid; give one of them.")
    if "grid_constructor" in read:
        make = read["grid_constructor"]
        if not callable(make):
            raise BadOption(f"options['grid_constructor'] must be a function of (f, h0, t); got {make!r:.80}.")
    if isinstance(read.get("solver"), str) and read["solver"] not in SCIPY:
        raise BadOption(methods.unknown(read["solver"], "solver of scipy.integrate.solve_ivp", list(SCIPY)))
    if "norm" in read and not callable(read["norm"]):
        raise BadOption(f"options['norm'] must be a function of the state; got {read['norm']!r}.")
    return read, warning


def options(read: Mapping[str, Any], layout: Layout) -> SolverOptions:
    """The options, as `options_said` has read them, for a state. `grid_constructor` is still the user's own."""
    if not read:
        return NO_OPTIONS
    for_state = dict(read)
    if "batch_dims" in read:
        for_state["batch_dims"] = batch_dims(read["batch_dims"], layout)
    if "norm" in read:
        for_state["norm"] = user_norm(read["norm"], layout)
    return SolverOptions(**for_state)


def grid(options: SolverOptions, f: Any, h0: Any) -> SolverOptions:
    """The options with `grid_constructor` as a function of the times alone."""
    make: Any = options.grid_constructor
    return options if make is None else replace(options, grid_constructor=lambda t: _grid(make(f, h0, t)))


def batch_dims(value: Any, layout: Layout) -> int:
    if not layout.spec.is_leaf():
        least = min(len(shape) for shape in layout.shapes)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= least:
            raise BadOption(
                f"options['batch_dims'] must be an integer from 0 to {least}, the dimensions of the smallest tensor of "
                f"the state; got {value!r}."
            )
        batches = {tuple(shape[:value]) for shape in layout.shapes}
        if len(batches) > 1:
            raise BadOption(
                f"options['batch_dims']: each tensor of the state must begin with the same batch; theirs begin with "
                f"{', '.join(map(str, sorted(batches)))}."
            )
        return value if layout.size else 0
    dims = len(layout.shapes[0])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < max(dims, 1):
        raise BadOption(
            f"options['batch_dims'] must be an integer from 0 to {max(dims, 1) - 1}, which leaves each system a "
            f"dimension of the state's shape {tuple(layout.shapes[0])}; got {value!r}."
        )
    return value if layout.size else 0  # no systems, or systems of nothing: there is nothing to keep apart


def systems(o: SolverOptions, layout: Layout) -> int:
    """Number of independent systems in the state."""
    return math.prod(layout.shapes[0][: o.batch_dims]) if o.batch_dims else 1


def mass_matrix(given: Any, method: Method, layout: Layout, batch: int) -> Tensor | None:
    """M of `M h' = f`: shape (d, d) for the d numbers of one system."""
    if given is None:
        return None
    if not method.mass:
        names = " or ".join(repr(m.name) for m in methods.METHODS.values() if m.mass)
        raise BadOption(f"{method.name} does not take a mass_matrix; use method={names}.")
    try:
        M = torch.as_tensor(given, device=layout.device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadShape(f"mass_matrix must be a matrix; got a {type(given).__name__}.") from error
    d = layout.size // max(batch, 1)
    if any(layout.complex):
        raise BadDtype("mass_matrix needs a real state.")
    if tuple(M.shape) != (d, d):
        raise BadShape(f"mass_matrix has shape {tuple(M.shape)}; for this state it must be ({d}, {d}).")
    if M.is_complex():
        raise BadDtype("mass_matrix is complex; it must be real.")
    M = M.to(layout.device, layout.dtype)
    if not is_finite(M):
        raise NonFiniteState("mass_matrix holds NaN or infinity.", t=math.nan, dt=0.0)
    return M


def pair(method: Method, h0: Any, layout: Layout) -> None:
    """Check that the state is the pair (q, v), for a method that is for systems of second order."""
    if method.kind != "second":
        return
    halves = h0 if isinstance(h0, (tuple, list)) and len(h0) == 2 else None
    if halves is None:
        raise BadShape(
            f"{method.name} is for systems of second order, whose state is the pair (q, v); h0 is a "
            f"{type(h0).__name__}. Pass f=pyjlode.SecondOrder(a) and h0=(q0, v0)."
        )
    m = len(layout.shapes) // 2
    same = pytree.tree_structure(halves[0]) == pytree.tree_structure(halves[1])
    if not same or layout.shapes[:m] != layout.shapes[m:] or layout.complex[:m] != layout.complex[m:]:
        raise BadShape(f"{method.name}: q and v, the two parts of h0, must have the same structure and shapes.")


def jacobian(given: Any, method: Method, layout: Layout, batch: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The user's df/dh on the flat state."""
    if given is None:
        return None
    if not callable(given):
        raise BadOption(f"jac must be a function jac(t, h); got a {type(given).__name__}.")
    if not method.controlled:
        raise BadOption(f"{method.name} makes no use of jac.")
    if not layout.bare:
        raise BadOption("jac needs a state that is one real tensor.")
    shape, d = layout.shapes[0], layout.size // max(batch, 1)

    def flat(t: Tensor, y: Tensor) -> Tensor:
        J = given(t, y.reshape(shape))
        if not isinstance(J, Tensor) or J.numel() != batch * d * d:
            got = f"shape {tuple(J.shape)}" if isinstance(J, Tensor) else f"a {type(J).__name__}"
            raise BadShape(f"jac must return a tensor of {batch * d * d} numbers, ({d}, {d}) a system; got {got}.")
        return J.to(y).reshape(batch, d, d)

    return flat


def _number(name: str, value: Any, *, positive: bool) -> float:
    try:
        number = float(value)
    except (RuntimeError, TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or number < 0 or (positive and number == 0):
        raise BadOption(
            f"options[{name!r}] must be a {'positive' if positive else 'non-negative'} number; got {value!r}."
        )
    return number


def _count(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        number = 0
    if number < 1:
        raise BadOption(f"options[{name!r}] must be a positive integer; got {value!r}.")
    return number


def _times(name: str, value: Any) -> tuple[float, ...]:
    try:
        return tuple(on_host(value).reshape(-1).tolist())
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadOption(f"options[{name!r}] must be a tensor or a sequence of times; got {value!r:.80}.") from error


def _grid(made: Any) -> Tensor:
    if not isinstance(made, Tensor) or made.ndim != 1:
        what = f"a tensor of shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise BadOption(f"options['grid_constructor'] must return a 1-D tensor of times; it returned {what}.")
    return made


def event_value(value: Any) -> Tensor:
    """Check what event_fn returned: a real tensor of any shape."""
    if not isinstance(value, Tensor):
        raise BadShape(f"event_fn must return a tensor; got a {type(value).__name__}.")
    if not value.is_floating_point():
        raise BadDtype(
            f"event_fn must return floating-point numbers, of which a crossing of zero is the event; got {value.dtype}."
        )
    return value


def adjoint_params(given: Any) -> tuple[Tensor, ...] | None:
    """The tensors requiring grad among those of the user; None where nothing was said."""
    if given is None:
        return None
    # A tensor is an iterable, too: of its rows, which f does not use.
    params = None if isinstance(given, (Tensor, str)) or not isinstance(given, Iterable) else tuple(given)
    if params is None or not all(isinstance(q, Tensor) for q in params):
        raise BadOption(f"adjoint_params must be an iterable of tensors, e.g. f.parameters(); got {given!r:.80}.")
    return tuple(q for q in params if q.requires_grad)


def user_norm(norm: Callable[[Any], Any], layout: Layout) -> Norm:
    return lambda flat: not_negative(norm(layout.unflatten(flat)))


def default_norm(layout: Layout, batch: int = 1) -> Norm:
    """Root mean square; over several tensors the largest of theirs, as in torchdiffeq, and so over several systems."""
    if batch > 1 and isinstance(layout, SystemsLayout):
        norms = system_norms(layout, batch)
        return lambda flat: numbers.read(norms(flat.reshape(batch, -1)).amax())
    if batch > 1:
        size = (layout.size // batch) ** 0.5
        return lambda flat: numbers.read(torch.linalg.vector_norm(flat.reshape(batch, -1), dim=1).amax()) / size
    if len(layout.sizes) == 1:
        return rms_norm
    return lambda flat: max_rms_norm(flat.split(layout.sizes))


def system_norms(layout: Layout | None, batch: int) -> Callable[[Tensor], Tensor]:
    """The default norm of each system: (batch, numbers of one) -> (batch,)."""
    if not isinstance(layout, SystemsLayout) or len(layout.widths) == 1:
        return lambda rows: torch.linalg.vector_norm(rows, dim=1) / rows.shape[1] ** 0.5
    widths = layout.widths

    def norms(rows: Tensor) -> Tensor:
        parts = [part for part in rows.split(widths, 1) if part.shape[1]]
        return torch.stack([torch.linalg.vector_norm(x, dim=1) / x.shape[1] ** 0.5 for x in parts]).amax(0)

    return norms


_NO_CALLBACKS = Callbacks()
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def callbacks(f: Any, method: Method, layout: Layout, like: Tensor, suffix: str = "") -> Callbacks:
    """The callbacks that `f` carries as attributes, taking `(t0, y0, dt)` as tensors in the user's own structure."""
    supported = {"adaptive": 3, "stiff": 3, "auto": 3, "scipy": 0}.get(method.kind, 1)
    found: list[Callable[..., None] | None] = []
    for i, name in enumerate(CALLBACKS):
        call = getattr(f, name + suffix, None)
        if call is not None and i >= supported:
            warn(f"{method.name} does not call {name + suffix}.")
            call = None
        found.append(call and _as_tensors(call, like))
    if not any(found):
        return _NO_CALLBACKS
    made = Callbacks(*found)
    return made if suffix else made.on(layout.unflatten)


def _as_tensors(call: Callable[..., None], like: Tensor) -> Callable[[float, Any, float], None]:
    def wrapped(t0: float, y0: Any, dt: float) -> None:
        call(torch.tensor(t0, dtype=like.dtype, device=like.device), y0, like.new_tensor(dt))

    return wrapped


def check_output(out: Any, layout: Layout, autocast: bool) -> None:
    """What f returned for h0: structure, shape, dtype and device must be those of h0."""
    if layout.spec.is_leaf() and not isinstance(out, Tensor):
        raise BadShape(
            f"f must return a tensor of shape {tuple(layout.shapes[0])} like h0; got a {type(out).__name__}."
        )
    leaves = layout.result_leaves(out)
    for i, (leaf, shape, dtype) in enumerate(zip(leaves, layout.shapes, layout.dtypes)):
        which = "f" if len(leaves) == 1 else f"tensor {i} of what f returned"
        if not isinstance(leaf, Tensor):
            raise BadShape(f"{which} is a {type(leaf).__name__}, not a tensor.")
        if leaf.shape != shape:
            raise BadShape(
                f"{which} has shape {tuple(leaf.shape)}; dh/dt must have the shape {tuple(shape)} that h0 has there."
            )
        if leaf.device != layout.device:
            raise BadShape(f"{which} lies on {leaf.device}; h0 lies on {layout.device}.")
        if leaf.dtype != dtype and not autocast:
            raise BadDtype(f"{which} has dtype {leaf.dtype}; h0 has {dtype} there. Cast one to the other.")
