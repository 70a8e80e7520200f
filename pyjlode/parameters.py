"""Which tensors a vector field depends on, besides its arguments: no gradient may be lost in silence."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Walking an arbitrary object graph ends here; what lies deeper is still found if f uses it at the start of the solve.
_LIMIT = 10_000
_LIBRARIES = ("torch", "numpy", "builtins", "math", "functools", "pyjlode")


class Dependencies(NamedTuple):
    """Tensors requiring grad that f depends on.

    Attributes:
        params: leaves, and results of earlier operations that f holds (an encoder's output, say).
        retain_graph: f also runs through a graph from outside that none of `params` cuts off.
    """

    params: tuple[Tensor, ...]
    retain_graph: bool


def held(func: Any) -> list[Tensor]:
    """Tensors requiring grad that a callable holds: parameters and buffers of modules, attributes, closures, partials,
    default arguments, and the globals that its code names."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    todo = [func]
    while todo and len(seen) < _LIMIT:
        x = todo.pop()
        if id(x) in seen or x is None or isinstance(x, (str, bytes, int, float, complex, type, types.ModuleType)):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            if x.requires_grad:
                found[id(x)] = x
        elif isinstance(x, nn.Module):
            for module in x.modules():
                todo.extend(vars(module).values())
        elif isinstance(x, functools.partial):
            todo.extend([x.func, x.args, x.keywords])
        elif isinstance(x, types.MethodType):
            todo.extend([x.__self__, x.__func__])
        elif isinstance(x, types.FunctionType):
            todo.extend(_of_function(x))
        elif isinstance(x, dict):
            todo.extend(x.values())
        elif isinstance(x, (list, tuple, set, frozenset)):
            todo.extend(x)
        elif hasattr(x, "__dict__") and type(x).__module__.split(".")[0] not in _LIBRARIES:
            todo.extend(vars(x).values())
            if callable(x):
                todo.append(type(x).__call__)
    return list(found.values())


def _of_function(f: types.FunctionType) -> Iterable[Any]:
    if (f.__module__ or "").split(".")[0] in _LIBRARIES:
        return
    for cell in f.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            yield cell.cell_contents
    yield from f.__defaults__ or ()
    yield from (f.__kwdefaults__ or {}).values()
    yield getattr(f, "__wrapped__", None)
    codes = [f.__code__]
    while codes:
        code = codes.pop()
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        for name in code.co_names:
            yield f.__globals__.get(name)


def graph_mark() -> int:
    """A number that autograd nodes made from now on (in this thread) are not below."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(()).grad_fn
    assert node is not None
    return node._sequence_nr()


def dependencies(func: Any, output: Tensor, probe: Tensor, mark: int) -> Dependencies:
    """What f depends on: what it holds, checked against the graph of one of its results.

    Args:
        func: the user's callable.
        output: its result at one point, with graph.
        probe: the leaf that stood for the state there.
        mark: `graph_mark()` from before that evaluation.
    """
    candidates = held(func)
    # An intermediate tensor counts only if f was seen to use it: one that merely lies near (the loss of the last
    # iteration, kept in an attribute) must not tie this solve to its graph.
    nodes = {x.grad_fn: x for x in candidates if not x.is_leaf}
    used, leaves, outside = _walk([output.grad_fn], nodes, mark)
    upstream = _walk([x.grad_fn for x in used], {}, mark)[1]
    leaves.pop(id(probe), None)
    if leaves.keys() & upstream.keys():
        # A leaf reached both directly and through an intermediate: differentiate by leaves alone, or it counts twice.
        return Dependencies(tuple({**leaves, **upstream}.values()), True)
    for x in candidates:
        if x.is_leaf and id(x) not in upstream:
            leaves[id(x)] = x
    leaves.pop(id(probe), None)
    return Dependencies((*used, *leaves.values()), outside)


def _walk(roots: list[Any], cuts: dict[Any, Tensor], mark: int) -> tuple[list[Tensor], dict[int, Tensor], bool]:
    """Walk back through a graph, not past `cuts`: the cuts met, the leaves met, and whether nodes older than `mark`
    are."""
    used: list[Tensor] = []
    leaves: dict[int, Tensor] = {}
    outside = False
    todo, seen = [node for node in roots if node is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in cuts:
            used.append(cuts[node])
            continue
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
            continue
        outside = outside or node._sequence_nr() < mark
        todo.extend(parent for parent, _ in node.next_functions if parent is not None)
    return used, leaves, outside
