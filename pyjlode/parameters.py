"""Which tensors a vector field depends on, besides its arguments: no gradient may be lost in silence."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Walking an arbitrary object graph ends here; what lies deeper is still found if f uses it at the start of the solve.
_LIMIT = 10_000
# What every module has, besides its parameters, buffers and submodules: none of it holds tensors, unless hooks do.
_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}
HOOKS = tuple(name for name in _MODULE if name.endswith("hooks"))
_LIBRARIES = ("torch", "numpy", "builtins", "math", "functools", "pyjlode")


class Dependencies(NamedTuple):
    """Tensors requiring grad that f depends on.

    Attributes:
        params: leaves, and results of earlier operations that f holds (an encoder's output, say).
        retain_graph: f also runs through a graph from outside that none of `params` cuts off.
        suspects: results of earlier operations that f holds but did not use here.
    """

    params: tuple[Tensor, ...]
    retain_graph: bool
    suspects: tuple[weakref.ref[Tensor], ...] = ()


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
                state = vars(module)
                todo.extend([state[name] for name in state.keys() - _MODULE])
                todo.extend([state[name] for name in HOOKS if state.get(name)])
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


class GraphMeter:
    """Within this context: what autograd keeps for its backward pass."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}  # address -> bytes; views share theirs
        storages = self.storages  # the hook must not hold `self`, which holds the hook

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return x.detach()  # x itself would hold the node that holds it

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def __enter__(self) -> GraphMeter:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def bytes_beside(self, tensors: Sequence[Tensor]) -> int:
        """Bytes kept that are not those of `tensors`."""
        for x in tensors:
            self.storages.pop(x.untyped_storage().data_ptr(), None)
        return sum(self.storages.values())


def graph_mark() -> int:
    """A number that autograd nodes made from now on (in this thread) are not below."""
    return torch.autograd._get_sequence_nr()


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
    cuts = {_edge(x): x for x in candidates if not x.is_leaf}
    used, leaves, outside = _walk([_edge(output)], cuts, mark)
    suspects = tuple(weakref.ref(x) for x in candidates if not x.is_leaf and all(x is not y for y in used))
    behind = [edge for x in used if x.grad_fn for edge in x.grad_fn.next_functions]
    nested, upstream, _ = _walk(behind, {_edge(x): x for x in used}, mark)
    leaves.pop(id(probe), None)
    if nested or leaves.keys() & upstream.keys():
        # Something is reached both directly and through an intermediate: by leaves alone, or it counts twice.
        upstream = _walk(behind, {}, mark)[1]
        return Dependencies(tuple({**leaves, **upstream}.values()), True, suspects)
    for x in candidates:
        if x.is_leaf and id(x) not in upstream:
            leaves[id(x)] = x
    leaves.pop(id(probe), None)
    return Dependencies((*used, *leaves.values()), outside, suspects)


def _edge(x: Tensor) -> tuple[Any, int]:
    """Where a tensor stands in the graph: its node, and which of the node's outputs it is."""
    return x.grad_fn, x.output_nr


def _walk(
    roots: Sequence[tuple[Any, int]], cuts: dict[Any, Tensor], mark: int
) -> tuple[list[Tensor], dict[int, Tensor], bool]:
    """Walk back through a graph, not past `cuts`: the cuts met, the leaves met, and whether nodes older than `mark`
    are."""
    used: list[Tensor] = []
    leaves: dict[int, Tensor] = {}
    outside = False
    todo, seen = list(roots), set()
    while todo:
        edge = todo.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if edge in cuts:
            used.append(cuts[edge])
            continue
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
            continue
        outside = outside or node._sequence_nr() < mark
        todo.extend(node.next_functions)
    return used, leaves, outside
