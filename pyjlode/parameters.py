"""Which tensors a vector field depends on, besides its arguments: no gradient may be lost in silence."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .tracing import untraced

# Walking an arbitrary object graph ends here; what lies deeper is still found where f uses it.
_LIMIT = 10_000
# What every module has, besides its parameters, buffers and submodules: none of it holds tensors, unless hooks do.
_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}
HOOKS = tuple(name for name in _MODULE if name.endswith("hooks"))
_LIBRARIES = ("torch", "numpy", "builtins", "math", "functools", "pyjlode", "_pytest")
_ATOMS = (str, bytes, int, float, complex)


class Binding(NamedTuple):
    """Where a tensor is held: `owner[key]`, or a closure's cell (`key` is None)."""

    owner: Any
    key: Any
    tensor: Tensor

    def now(self) -> Any:
        """What is held there now."""
        try:
            return self.owner.cell_contents if self.key is None else self.owner[self.key]
        except (KeyError, IndexError, ValueError):
            return None

    def put(self, x: Any) -> None:
        if self.key is None:
            self.owner.cell_contents = x
        else:
            self.owner[self.key] = x


class Held:
    """The tensors that a callable holds: parameters and buffers of modules, attributes, closures, partials, default
    arguments, and the globals that its code names.

    Attributes:
        wanted: those that require grad.
        bindings: where each tensor is held.
        versions: of each tensor in `bindings`, how often it had been changed in place.
    """

    def __init__(self, func: Any) -> None:
        self.bindings: list[Binding] = []
        self._seen: set[int] = set()
        self._classes: set[type] = set()
        self._todo = [func]
        while self._todo and len(self._seen) < _LIMIT:
            x = self._todo.pop()
            if id(x) in self._seen or x is None or isinstance(x, _ATOMS):
                continue
            self._seen.add(id(x))
            self._open(x)
        self.wanted = list({id(b.tensor): b.tensor for b in self.bindings if b.tensor.requires_grad}.values())
        self.versions = [_version(b.tensor) for b in self.bindings]

    def changed(self) -> list[Tensor]:
        """Those that were changed in place since."""
        return [b.tensor for b, version in zip(self.bindings, self.versions) if _version(b.tensor) != version]

    def _open(self, x: Any) -> None:
        if isinstance(x, nn.Module):
            for module in x.modules():
                self._seen.add(id(module))
                state = vars(module)
                if "_parameters" in state:
                    for name in ("_parameters", "_buffers"):
                        self._mapping(state[name])
                else:  # a module of torch.jit, which keeps them in C++
                    self._mapping(dict(module.named_parameters(recurse=False)))
                    self._mapping(dict(module.named_buffers(recurse=False)))
                for name in state.keys() - _MODULE - {"_parameters", "_buffers"}:
                    self._meet(state, name, state[name])
                for name in HOOKS:
                    if state.get(name):
                        self._todo.append(state[name])
                self._class(type(module))
        elif isinstance(x, functools.partial):
            self._todo.extend([x.func, x.args, x.keywords])
        elif isinstance(x, types.MethodType):
            self._todo.extend([x.__self__, x.__func__])
        elif isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, dict):
            self._mapping(x)
        elif isinstance(x, (list, collections.deque)):
            for i, value in enumerate(x):
                self._meet(x, i, value)
        elif isinstance(x, (tuple, set, frozenset)):
            for value in x:
                self._meet(_NOWHERE, 0, value)
        elif isinstance(x, type):
            self._class(x)
        elif isinstance(x, types.ModuleType):
            pass  # what a function's code names of it is looked at there
        elif hasattr(x, "__dict__") and not _library(type(x).__module__):
            self._mapping(vars(x))
            self._class(type(x))
            if callable(x):
                self._todo.append(type(x).__call__)
        elif isinstance(x, functools._lru_cache_wrapper):
            self._todo.append(x.__wrapped__)

    def _meet(self, owner: Any, key: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            self.bindings.append(Binding(owner, key, value))
        elif value is not None and not isinstance(value, _ATOMS):
            self._todo.append(value)

    def _mapping(self, x: dict[Any, Any]) -> None:
        for key, value in x.items():
            self._meet(x, key, value)

    def _class(self, cls: type) -> None:
        """The tensors among a class's own attributes."""
        if cls in self._classes:
            return
        self._classes.add(cls)
        for base in cls.__mro__:
            if _library(base.__module__):
                break
            for value in vars(base).values():
                if isinstance(value, Tensor):
                    self.bindings.append(Binding(_NOWHERE, 0, value))

    def _function(self, f: types.FunctionType) -> None:
        if _library(f.__module__):
            return
        for cell in f.__closure__ or ():
            with contextlib.suppress(ValueError):  # a name that is not bound yet
                self._meet(cell, None, cell.cell_contents)
        for value in (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()):
            self._meet(_NOWHERE, 0, value)
        self._todo.append(getattr(f, "__wrapped__", None))
        names = _names(f.__code__)
        for name in names:
            value = f.__globals__.get(name)
            if isinstance(value, types.ModuleType) and not _library(value.__name__):
                for attribute in names:
                    if attribute in vars(value):
                        self._meet(vars(value), attribute, vars(value)[attribute])
            elif value is not None:
                self._meet(f.__globals__, name, value)


# Of tensors that stand where nothing can be put in their place: a tuple, a class.
_NOWHERE: Any = types.MappingProxyType({})


@functools.lru_cache(maxsize=10_000)
def _library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals and attributes in a function's code and in the functions that it defines."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_names(constant))
    return tuple(names)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def settled(f: Callable[[Tensor, Any], Any], state: Sequence[Tensor]) -> Callable[[Tensor, Any], Any]:
    """f with the tensors `state`, which it changes in its calls, set back after each of them.

    The power iteration of `torch.nn.utils.spectral_norm` is such a change. An equation whose right-hand side moves with
    each look at it has no solution, and its backward pass would differentiate another one.
    """
    saved = [x.detach().clone() for x in state]

    def at_rest(t: Tensor, h: Any) -> Any:
        out = f(t, h)
        with torch.no_grad():
            torch._foreach_copy_(list(state), saved)
        return out

    return at_rest


_UNKNOWN = -1


class GraphMeter:
    """Within this context: what autograd keeps for its backward pass."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}  # address -> bytes; views share theirs
        storages = self.storages  # the hook must not hold `self`, which holds the hook

        def pack(x: Tensor) -> Tensor:
            if x.layout == torch.strided:
                try:
                    storage = x.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
                except RuntimeError:  # within a transform of f's own, where tensors have no memory to look at
                    storages[-1] = _UNKNOWN
            else:  # sparse: values and indices
                storages[id(x)] = 3 * x._nnz() * x.element_size()
            return x.detach()  # x itself would hold the node that holds it

        # A compiled f would have `pack` compiled, too.
        self.hooks = torch.autograd.graph.saved_tensors_hooks(untraced(pack), lambda x: x)

    def __enter__(self) -> GraphMeter:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def bytes_beside(self, tensors: Sequence[Tensor]) -> int | None:
        """Bytes kept that are not those of `tensors`; None where that cannot be known."""
        if self.storages.get(-1) == _UNKNOWN:
            return None
        for x in tensors:
            self.storages.pop(x.untyped_storage().data_ptr(), None)
        return sum(self.storages.values())


# Places in a graph, and the tensors that stand there.
Cuts = Mapping[tuple[Any, int], Tensor]


def graph_mark() -> int:
    """A number that autograd nodes made from now on (in this thread) are not below."""
    return torch.autograd._get_sequence_nr()


class Dependencies(NamedTuple):
    """Tensors requiring grad that f depends on.

    Attributes:
        params: leaves, and results of earlier operations that f holds (an encoder's output, say).
        retain_graph: f also runs through a graph from outside that none of `params` cuts off.
        suspects: results of earlier operations that f holds but did not use here. Weakly: a solve must not keep the
            graph of the last iteration's loss alive because f happens to hold it.
        makes_leaves: f makes leaves of its own in each call (`h.detach().requires_grad_()`), which nobody asks for.
        bindings: where f holds what it may use in its next call.
        reached: `id` of each leaf that f used.
    """

    params: tuple[Tensor, ...] = ()
    retain_graph: bool = False
    suspects: tuple[weakref.ref[Tensor], ...] = ()
    makes_leaves: bool = False
    bindings: tuple[Binding, ...] = ()
    reached: frozenset[int] = frozenset()


def dependencies(
    held: Held,
    output: Tensor,
    probe: Tensor,
    mark: int,
    again: Callable[[], Tensor],
    named: tuple[Tensor, ...] | None = None,
) -> Dependencies:
    """What f depends on: what it holds, checked against the graph of one of its results.

    Args:
        held: what f held before that evaluation.
        output: f's result at one point, with graph.
        probe: the leaf that stood for the state there.
        mark: `graph_mark()` from before that evaluation.
        again: makes another such result.
        named: the tensors that the user wants to differentiate by; None for all.
    """
    if named is not None:
        outside = _walk([_edge(output)], cut(named), mark)[2]
        return Dependencies(named, outside, bindings=_rebindable(held, named))
    # An intermediate tensor counts only if f was seen to use it: one that merely lies near (the loss of the last
    # iteration, kept in an attribute) must not tie this solve to its graph.
    cuts = cut(held.wanted)
    used, leaves, outside = _walk([_edge(output)], cuts, mark)
    suspects = tuple(weakref.ref(x) for x in held.wanted if not x.is_leaf and all(x is not y for y in used))
    leaves.pop(id(probe), None)
    known = {id(x) for x in held.wanted}
    makes_leaves = False
    if not leaves.keys() <= known:
        # What a second call reaches too was there before it; the rest is made in each call.
        other = _walk([_edge(again())], cuts, mark)[1]
        makes_leaves = not leaves.keys() <= other.keys()
        leaves = {i: x for i, x in leaves.items() if i in other or i in known}
    reached = frozenset(leaves)
    behind = [edge for x in used if x.grad_fn for edge in x.grad_fn.next_functions]
    nested, upstream, _ = _walk(behind, cut(used), mark)
    if nested or leaves.keys() & upstream.keys():
        # Something is reached both directly and through an intermediate: by leaves alone, or it counts twice.
        upstream = _walk(behind, {}, mark)[1]
        params, outside = tuple({**leaves, **upstream}.values()), True
    else:
        if output.requires_grad:  # else nothing of f can be differentiated, at the start at least
            for x in held.wanted:
                if x.is_leaf and id(x) not in upstream:
                    leaves[id(x)] = x
        leaves.pop(id(probe), None)
        params = (*used, *leaves.values())
    return Dependencies(params, outside, suspects, makes_leaves, _rebindable(held, params), reached)


def _rebindable(held: Held, params: tuple[Tensor, ...]) -> tuple[Binding, ...]:
    """The bindings of what f may use again: not those of results that it did not use."""
    used = {id(x) for x in params}
    return tuple(
        b for b in held.bindings if b.owner is not _NOWHERE and (b.tensor.grad_fn is None or id(b.tensor) in used)
    )


def bound(bindings: Sequence[Binding], params: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Within this context f holds the tensors that it held when the bindings were made, and its parameters want grad.

    Between a solve and its backward pass they may have been exchanged: by `torch.func.functional_call`, or by setting
    the attribute that the next solve is to use. And programs that train two networks in turn freeze the other one.
    """
    frozen = [x for x in params if not x.requires_grad]
    moved = [(b, b.now()) for b in bindings if b.now() is not b.tensor]
    return _bound(frozen, moved) if frozen or moved else _NOTHING


@contextlib.contextmanager
def _bound(frozen: Sequence[Tensor], moved: Sequence[tuple[Binding, Any]]) -> Iterator[None]:
    for b, _ in moved:
        b.put(b.tensor)
    for x in frozen:
        x.requires_grad_()
    try:
        yield
    finally:
        for x in frozen:
            x.requires_grad_(False)
        for b, now in moved:
            if now is None and isinstance(b.owner, dict):
                b.owner.pop(b.key, None)
            else:
                b.put(now)


def unheard(params: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Within this context gradients by the parameters are parts of what will be one, and nothing hears of them: not the
    hooks on these tensors (which clip, scale or log), nor `grad` where `retain_grad()` fills it.

    Both hear of the whole when autograd hands it on.
    """
    hooks = [(own, dict(own)) for x in params if (own := x._backward_hooks)]
    retained = [(x, x.grad) for x in params if x.retains_grad and not x.is_leaf]
    return _unheard(hooks, retained) if hooks or retained else _NOTHING


@contextlib.contextmanager
def _unheard(
    hooks: Sequence[tuple[Any, dict[Any, Any]]], retained: Sequence[tuple[Tensor, Tensor | None]]
) -> Iterator[None]:
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, kept in hooks:
            own.update(kept)
        for x, before in retained:
            x.grad = before


_NOTHING = contextlib.nullcontext()


@functools.cache
def _leaf_node() -> type:
    """The type of the nodes at which graphs end."""
    with torch.enable_grad(), torch.inference_mode(False):
        return type(torch.zeros((), device="cpu", requires_grad=True).view(()).grad_fn.next_functions[0][0])  # type: ignore[union-attr]


def strangers(outputs: Iterable[Tensor], known: Set[int], cuts: Cuts, mark: int) -> tuple[list[Tensor], bool]:
    """Leaves that a graph reaches and that are not known; and whether it goes through nodes from before `mark`.

    Args:
        known: the `id` of each leaf that is.
        cuts: where the walk ends.
    """
    _, leaves, outside = _walk(map(_edge, outputs), cuts, mark)
    return [x for i, x in leaves.items() if i not in known], outside


def cut(tensors: Iterable[Tensor]) -> Cuts:
    """Those among the tensors that are results, by where they stand in the graph."""
    return {_edge(x): x for x in tensors if x.grad_fn is not None}


def _edge(x: Tensor) -> tuple[Any, int]:
    """Where a tensor stands in the graph: its node, and which of the node's outputs it is."""
    return x.grad_fn, x.output_nr


def _walk(roots: Iterable[tuple[Any, int]], cuts: Cuts, mark: int) -> tuple[list[Tensor], dict[int, Tensor], bool]:
    """Walk back through a graph, not past `cuts`: the cuts met, the leaves met, and whether nodes older than `mark`
    are."""
    # Every call of f in a backward pass is looked at in this way, and the whole graph of a short solve: nothing may
    # cost much. Each node that is looked at becomes a Python object, and thousands of those would set off the garbage
    # collector, which has nothing to find here, again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _walked(roots, cuts, mark)
    finally:
        if collecting:
            gc.enable()


def _walked(roots: Iterable[tuple[Any, int]], cuts: Cuts, mark: int) -> tuple[list[Tensor], dict[int, Tensor], bool]:
    # Nodes are known by their numbers, and let go at once; but those from before `mark` may have been made in another
    # thread, with numbers of its own.
    leaf: Any = _leaf_node()
    used: dict[tuple[Any, int], Tensor] = {}
    leaves: dict[int, Tensor] = {}
    walked: set[int] = set()
    before: set[Any] = set()
    todo: list[Any] = []
    edges: Iterable[tuple[Any, int]] = roots
    while True:
        for edge in edges:
            node = edge[0]
            if node is None:
                continue
            if cuts and edge in cuts:
                used[edge] = cuts[edge]
            elif type(node) is leaf:
                x = node.variable
                leaves[id(x)] = x
            elif (number := node._sequence_nr()) >= mark:
                if number not in walked:
                    walked.add(number)
                    todo.append(node)
            elif node not in before:
                before.add(node)
                todo.append(node)
        if not todo:
            return list(used.values()), leaves, bool(before)
        edges = todo.pop().next_functions


def by_tensor(
    tensors: Iterable[Tensor], grads: Iterable[Tensor | None], wanted: Iterable[Tensor]
) -> list[Tensor | None]:
    """Gradients by `wanted`, of those by `tensors`; None for what is not among these.

    A tensor may be in several places: weights that were tied after f was captured. Its gradients are summed, and it has
    the sum once, if it is wanted several times.
    """
    found: dict[int, Tensor] = {}
    for x, grad in zip(tensors, grads):
        if grad is not None:
            found[id(x)] = found[id(x)] + grad if id(x) in found else grad
    return [None if (g := found.pop(id(x), None)) is None else g.to(x.device, x.dtype) for x in wanted]
