"""Hints for the mistakes that people make who come from other libraries. Looked at only where a call has failed."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import BadFunction, PyJLODEError
from .methods import unknown
from .signals import of_a_signal

Front = TypeVar("Front", bound=Callable[..., Any])

# torchdiffeq's names of the first arguments.
THEIRS = {"func": "f", "y0": "h0"}
_SCIPY = {
    "fun": "the first argument is f(t, h)",
    "t_span": "the third argument is t, all times to solve at, the first and last of which are the span",
    "t_eval": "the third argument is t, all times to solve at",
    "events": "one event that ends the solve is event_fn=; events that go on are pyjlode.solve(..., events=[...])",
    "dense_output": "pyjlode.solve(...).interpolate(t) is the dense output",
    "Dfun": "df/dh is jac=, a function of (t, h)",
    "tfirst": "f is always f(t, h)",
    "dt": "fixed steps are step_size=, the first step is first_step=",
    "dt0": "fixed steps are step_size=, the first step is first_step=",
    "solver": 'the solver is method=; one of SciPy\'s is method="scipy_solver", options={"solver": ...}',
}


def front(options: frozenset[str], like: Callable[..., Any] | None = None) -> Callable[[Front], Front]:
    """Make a function of the front door take torchdiffeq's names of its arguments and single options as well, and
    explain unknown ones.

    Args:
        options: names that are read as if they stood in `options`.
        like: a function whose keywords this one takes beside its own.
    """

    def wrap(call: Front) -> Front:
        name = call.__qualname__.removesuffix(".__init__")
        parameters = [*inspect.signature(call).parameters.values(), *_parameters(like)]
        # What else takes any keyword hands it on to one that does not.
        known: frozenset[str] | None = frozenset(p.name for p in parameters if p.name != "self")
        if like is None and any(p.kind is p.VAR_KEYWORD for p in parameters):
            known = None

        @functools.wraps(call)
        def front_door(*args: Any, **kwargs: Any) -> Any:
            if not known.issuperset(kwargs) if known else not THEIRS.keys().isdisjoint(kwargs):
                kwargs = renamed(name, args, with_options(kwargs, options) if known else kwargs, known)
            return call(*args, **kwargs)

        return cast(Front, front_door)

    return wrap


def _parameters(call: Callable[..., Any] | None) -> list[inspect.Parameter]:
    return [] if call is None else list(inspect.signature(call).parameters.values())


def overloaded(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, for type checkers: what it takes and returns stands in the overloads before it."""
    return call


def with_options(keywords: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Keywords with the options among them in `options`: `step_size=0.1` is `options={"step_size": 0.1}`.

    Raises:
        TypeError: an option is given twice.
    """
    found = names.intersection(keywords)
    if not found:
        return dict(keywords)
    rest = {name: value for name, value in keywords.items() if name not in found}
    given = rest.get("options")
    if given is not None and not isinstance(given, Mapping):  # which is refused where options are read
        return rest
    if twice := sorted(found.intersection(given or {})):
        raise TypeError(f"the option {twice[0]!r} is given twice, by itself and in options. Give one of them.")
    rest["options"] = {**(given or {}), **{name: keywords[name] for name in keywords if name in found}}
    return rest


def renamed(
    call: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: frozenset[str] | None
) -> dict[str, Any]:
    """The keyword arguments under our names.

    Raises:
        TypeError: one is given twice, or is unknown (where `known` says what is not).
    """
    given = dict(kwargs)
    for place, (theirs, ours) in enumerate(THEIRS.items()):
        if theirs in given:
            if ours in given or place < len(args):
                raise TypeError(f"{call}() got {ours} twice: {theirs} is torchdiffeq's name for it. Give one of them.")
            given[ours] = given.pop(theirs)
    for name in given:
        if known is not None and name not in known:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{keyword(name, known)}")
    return given


def keyword(name: str, known: frozenset[str]) -> str:
    if name in _SCIPY:
        return f": {_SCIPY[name]}."
    message = unknown(name, "argument", sorted(known))
    return f"; {message.split('; ')[1]}" if "did you mean" in message else "."


def order(error: PyJLODEError, h0: Any, t: Any) -> str:
    """A hint where h0 or t is refused, and they may have been given in the other order."""
    if _like_times(h0) and (_like_state(t) or not isinstance(h0, Tensor)):
        return f"{error} If h0 is meant to be the times: the order of arguments is (f, h0, t)."
    return str(error)


def _like_times(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.ndim == 1 and len(x) > 1 and bool((x.diff() > 0).all() or (x.diff() < 0).all())
    return isinstance(x, (tuple, list)) and len(x) > 1 and all(isinstance(v, (int, float)) for v in x)


def _like_state(x: Any) -> bool:
    leaves = pytree.tree_leaves(x)
    return bool(leaves) and all(isinstance(leaf, (Tensor, int, float)) for leaf in leaves)


def call_of_f(f: Any, t: Tensor, h: Any, fits: Callable[[Any], None], error: Exception) -> None:
    """Explain why f(t, h) failed, or was refused, at the start of a solve, if that is a known mistake.

    Args:
        fits: raises where a result is not like h.

    Raises:
        BadFunction: f takes h alone, or takes (h, t).
    """
    if isinstance(error, TypeError) and not _takes(f, 2) and _takes(f, 1):
        name = type(f).__name__ if isinstance(f, torch.nn.Module) else getattr(f, "__name__", type(f).__name__)
        raise BadFunction(
            f"f is called as f(t, h), and {name} takes one argument. If that is h, write lambda t, h: net(h), or use "
            "pyjlode.nn.TimeMLP, a network of t and h; pyjlode.nn.NeuralODE makes a layer of it."
        ) from error
    if isinstance(error, OSError) or of_a_signal(error):  # a file, a time limit: other arguments would mend nothing
        return
    if isinstance(h, Tensor) and h.ndim == 0:  # which of the two is the time does not show
        return
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fits(f(h, t))
    except Exception:
        return
    raise BadFunction(
        f"f is called as f(t, h), and this one takes (h, t): called as f(h, t) it returns what h' must be like, and as "
        f"f(t, h) not ({type(error).__name__}: {error}). Swap its arguments, or write lambda t, h: f(h, t)."
    ) from error


def _takes(f: Any, n: int) -> bool:
    try:
        inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f).bind(*[None] * n)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return n == 2
    return True
