"""A vector field seen by PyTorch's Dynamo: its graph, guards for exactly what it reads, and its tensors at each call.

`torch.compile` is given a function that calls the field, with a backend that runs no graph: it says which capture the
guards have found, and with which tensors. So what a field holds is known for 10 to 40 µs, whatever else its objects
hold.

What is not a public part of PyTorch stands in this module alone. Where a version of PyTorch lacks it fields are not
compiled, and the reason says so. It is imported when a field is met for the second time: Dynamo takes a second.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import operator
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..errors import NotCompiled
from ..signals import of_a_signal

# What is said to Dynamo while it captures, as far as it knows the name. A field is captured anew where a number that it
# reads has changed; how often is not for Dynamo to decide, whose warnings speak of things that the user never wrote.
_CONFIG = {
    "trace_autograd_ops": True,
    "specialize_float": True,
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
    "recompile_limit": 1 << 12,
    "cache_size_limit": 1 << 12,
    "accumulated_recompile_limit": 1 << 16,
    "accumulated_cache_size_limit": 1 << 16,
    "verbose": False,
    "suppress_errors": False,
    "record_runtime_overhead": False,
}
_lock = threading.RLock()


class Found(BaseException):
    """The guards of a capture hold.

    Args:
        entry: the capture.
        values: what its graph is called with.
    """

    def __init__(self, entry: Entry, values: tuple[Any, ...]) -> None:
        super().__init__()
        self.entry, self.values = entry, values


class Missed(Exception):
    """No capture's guards hold: the function runs as Python."""


class Slot:
    """Where a value lies, as seen from the field.

    Args:
        where: an expression in `L["f"]`, the field, and `G`, a dictionary of modules.
    """

    def __init__(self, where: str, scope: dict[str, Any]) -> None:
        self.where, self.scope = where, scope

    @property
    def name(self) -> str:
        """The last of its names, for messages."""
        name = self.where.rpartition(".")[2]
        return "a number of a closure" if name == "cell_contents" else name

    def get(self) -> Any:
        return eval(self.where, self.scope)

    def set(self, value: Any) -> None:
        exec(f"{self.where} = value", {**self.scope, "value": value})


class Entry:
    """One capture of a field.

    Attributes:
        module: the graph, of operations of `torch`.
        inputs: for each of its inputs what it is: ("t", graph) or ("h", graph, leaf), where `graph` says whether it
            requires grad; ("held", i), ("integer", i), ("number", i) or ("counter", i).
        value, with_graph: which outputs are f's value, and f's value with a graph; None where there is none.
        counts: which outputs are what counters are after the calls.
        calls: of f in it.
        places: for each tensor ("held", i) where it lies.
        counters, numbers: where the Python numbers lie for which tensors stand in the graph.
        floats: of other floating-point numbers that the guards compare, the places and values.
        reason: why it is not to be used.
        without_graph: why there is no value with a graph.
        programs: made of it, by the numbers of its integer tensors.
        steps: what the native engine made of it.
        zeros: of the floats those that are zero, as text; None before it was asked for.
        only_held: where the tensors are that it holds, if it has no other inputs than these and t and h; else (); None
            before it was asked for.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.inputs: list[tuple[Any, ...]] = []
        self.value: int | None = None
        self.with_graph: int | None = None
        self.counts: list[int] = []
        self.calls = 1
        self.places: list[str] = []
        self.counters: list[str] = []
        self.numbers: list[str] = []
        self.floats: dict[str, float] = {}
        self.reason = self.without_graph = ""
        self.programs: dict[Any, Any] = {}
        self.steps: dict[Any, Any] = {}
        self.zeros: dict[str, str] | None = None
        self.only_held: Sequence[int] | None = None

    def found(self, *values: Any) -> NoReturn:
        raise Found(self, values)


def _both(f, t, h, t_graph, h_graph):  # type: ignore[no-untyped-def]
    if not is_dynamo_compiling():  # type: ignore[name-defined]  # noqa: F821
        raise Missed
    with torch.no_grad():
        value = flat(h, call(f, t, h)).reshape(1, -1)  # type: ignore[name-defined]  # noqa: F821
    with torch.enable_grad():
        with_graph = flat(h_graph, call(f, t_graph, h_graph)).reshape(1, 1, -1)  # type: ignore[name-defined]  # noqa: F821
    return value, with_graph


def _value(f, t, h, t_graph, h_graph):  # type: ignore[no-untyped-def]
    if not is_dynamo_compiling():  # type: ignore[name-defined]  # noqa: F821
        raise Missed
    with torch.no_grad():
        return flat(h, call(f, t, h)).reshape(1, -1)  # type: ignore[name-defined]  # noqa: F821


def _with_graph(f, t, h, t_graph, h_graph):  # type: ignore[no-untyped-def]
    if not is_dynamo_compiling():  # type: ignore[name-defined]  # noqa: F821
        raise Missed
    with torch.enable_grad():
        return flat(h_graph, call(f, t_graph, h_graph)).reshape(1, 1, -1)  # type: ignore[name-defined]  # noqa: F821


def flat(state: Any, out: Any) -> Tensor:
    """What f returned for a state, shape (n,)."""
    if isinstance(state, Tensor):
        return out.reshape(-1)
    leaves = _leaves(state, out)
    dtype = leaves[0].dtype
    for x in leaves:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.cat([x.reshape(-1).to(dtype) for x in leaves])


def _leaves(state: Any, out: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [out]
    if isinstance(state, dict):
        return [x for key in state for x in _leaves(state[key], out[key])]
    return [x for part, result in zip(state, out) for x in _leaves(part, result)]


def _plainly(f: Any, t: Tensor, h: Any) -> Any:
    return f(t, h)


class _Picking(TorchFunctionMode):
    """`x[i]`, where i is an integer tensor without dimensions, as an operation on tensors: PyTorch reads the number."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__ or function is operator.getitem:
            x, at = args
            at = at if isinstance(at, tuple) else (at,)
            if isinstance(x, Tensor) and any(_picks(i) for i in at):
                return _picked(x, at)
        return function(*args, **(kwargs or {}))


def _picked(x: Tensor, at: tuple[Any, ...]) -> Tensor:
    """x[at], where some of the indices are such tensors."""
    dim, rest, free = 0, [], x.dim()
    for i in at:
        free -= i is not None and i is not Ellipsis
    for i in at:
        if _picks(i):
            x = torch.index_select(x, dim, torch.where(i < 0, i + x.shape[dim], i).reshape(1))
        rest.append(0 if _picks(i) else i)
        dim += free if i is Ellipsis else i is not None
    return x[tuple(rest)]


def _picks(i: Any) -> bool:
    return isinstance(i, Tensor) and i.dim() == 0 and i.dtype in (torch.int64, torch.int32)


def _picking(f: Any, t: Tensor, h: Any) -> Any:
    with _Picking():
        return f(t, h)


# How f is called in a capture: without a graph and with one; and where that cannot be, only the one or the other.
BOTH, VALUE, WITH_GRAPH = _both, _value, _with_graph


class Captures:
    """Captures of fields of one piece of code, for states of one shape.

    Args:
        how: `BOTH`, `VALUE` or `WITH_GRAPH`.
        state: an example of the state: a tensor, or a tuple, list or dictionary of them.
        picks: f indexes by numbers that it computes.

    Raises:
        NotCompiled: this PyTorch has no such Dynamo.
    """

    def __init__(self, how: Callable[..., Any], state: Any, t: Tensor, picks: bool = False) -> None:
        self.how, self.picks = how, picks
        self.scope: dict[str, Any] = {
            "__builtins__": builtins,
            "__name__": __name__,
            "torch": torch,
            "call": _picking if picks else _plainly,
            "flat": flat,
            "Missed": Missed,
            "is_dynamo_compiling": torch.compiler.is_dynamo_compiling,
        }
        # Code of its own: Dynamo keeps captures by the code.
        function = types.FunctionType(how.__code__.replace(co_filename=how.__code__.co_filename), self.scope)
        with_graph = torch.utils._pytree.tree_map(lambda x: x.clone().requires_grad_(), state)
        self.args = (t, state, t.clone().requires_grad_(), with_graph)
        self.entries: list[Entry] = []
        self.attempt = _Attempt((), (), self.scope)
        try:
            self.capture_or_find = torch.compile(
                function,
                backend=self._backend,
                fullgraph=True,
                dynamic=False,
                options={"guard_filter_fn": lambda guards: self.attempt.look(guards)},
            )
            self.capture_blindly = torch.compile(function, backend=self._backend, fullgraph=True, dynamic=False)
            self.only_find = _only_run(function, torch._dynamo.run(self.capture_or_find))
        except Exception as error:
            raise NotCompiled(f"this PyTorch ({torch.__version__}) does not let f be captured: {error}") from error

    def find(self, f: Any) -> tuple[Entry, tuple[Any, ...]] | None:
        """The capture that f is like, and what its graph is called with; None where there is none."""
        try:
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():  # leaving inference mode turns gradients on
                    self.only_find(f, *self.args)
            elif torch.is_grad_enabled():
                torch._C._set_grad_enabled(False)  # as `torch.no_grad()`, which takes a microsecond
                try:
                    self.only_find(f, *self.args)
                finally:
                    torch._C._set_grad_enabled(True)
            else:
                self.only_find(f, *self.args)
        except Found as found:
            return found.entry, found.values
        except Missed:
            pass
        return None

    def capture(
        self, f: Any, counters: Sequence[str] = (), numbers: Sequence[str] = ()
    ) -> tuple[Entry, tuple[Any, ...]]:
        """Capture f as it is now.

        Args:
            counters: numbers that f changes when it is called: tensors stand for them, so that the graph shows what
                comes of them.
            numbers: floating-point numbers that were others at earlier calls, likewise.

        Raises:
            Counts: f changes other numbers than these.
            NotCompiled: Dynamo does not capture it, or it does what a graph does not show.
        """
        with _lock, _quiet():
            attempt = self.attempt = _Attempt(counters, numbers, {"L": {"f": f}, "G": self.scope})
            dtype = self.args[0].dtype
            try:
                attempt.substitute(dtype)
                with torch.inference_mode(False), torch.no_grad():
                    try:
                        self.capture_or_find(f, *self.args)
                    except torch._dynamo.exc.InternalTorchDynamoError:
                        # Some guards, those of NumPy's arrays among them, do not let themselves be made twice, which
                        # is what looking at them takes.
                        if counters or numbers or attempt.reason or attempt.changed:
                            raise
                        self.capture_blindly(f, *self.args)
            except Found as found:
                if found.entry in self.entries:
                    return found.entry, found.values
                if not attempt.reason:
                    attempt.bind(found.entry, found.values, self.args)
                found.entry.reason = attempt.reason
                if not attempt.reason:
                    self.entries.append(found.entry)
                    return found.entry, found.values
            except Missed:
                raise SwitchedOff from None
            except Exception as error:
                if of_a_signal(error):
                    raise
                if attempt.changed and not attempt.reason:
                    raise Counts(attempt.changed) from None
                if not attempt.reason:
                    log.debug("Dynamo does not capture f", exc_info=True)
                    attempt.reason = _words(error)
                    if not self.picks and _INDEX in str(error):
                        raise Picks(attempt.reason) from None
            finally:
                attempt.restore()
                self.attempt = _Attempt((), (), self.scope)
            raise NotCompiled(attempt.reason)

    def _backend(self, module: fx.GraphModule, inputs: Sequence[Any], **unknown: Any) -> Callable[..., NoReturn]:
        if unknown:  # what was meant for Dynamo
            self.attempt.refuse(f"this PyTorch ({torch.__version__}) does not let the guards of f be looked at")
        entry = Entry(module)
        self.attempt.see(entry, self.how)
        return entry.found


class SwitchedOff(NotCompiled):
    """Dynamo captures nothing now."""

    def __init__(self) -> None:
        super().__init__("Dynamo is switched off (TORCHDYNAMO_DISABLE, or torch.compiler.set_stance)")


class Picks(NotCompiled):
    """f indexes by a number that it computes, perhaps."""


# In what PyTorch says of it.
_INDEX = "extract specialized integer from data-dependent"


class Counts(NotCompiled):
    """f changes numbers that it holds.

    Args:
        places: of them.
    """

    def __init__(self, places: Sequence[str]) -> None:
        super().__init__("f changes a number that it holds")
        self.places = tuple(places)


def _only_run(function: Callable[..., Any], public: Callable[..., Any]) -> Callable[..., Any]:
    """A function that finds captures and makes none: as `torch._dynamo.run` makes it, `public`, but for what that does
    around a call, which takes as long as the guards.
    """
    frames = torch._dynamo.eval_frame
    if not all(hasattr(frames, name) for name in ("set_eval_frame", "_callback_from_stance")):
        return public
    set_eval_frame, from_stance = frames.set_eval_frame, frames._callback_from_stance

    def run(*args: Any) -> Any:
        if from_stance(False) is not False:
            return public(*args)
        before = set_eval_frame(False)
        try:
            return function(*args)
        finally:
            set_eval_frame(before)

    return run


log = logging.getLogger("pyjlode")


class _Stop(Exception):
    """The capture is of no use."""


_ON_VALUES = ("EQUALS_MATCH", "CONSTANT_MATCH")


class _Attempt:
    """One try to capture a field.

    Attributes:
        changed: places of numbers that f changes.
        reason: why the capture is of no use.
        where: of tensors that the guards name, the places, by `id`.
    """

    def __init__(self, counters: Sequence[str], numbers: Sequence[str], scope: dict[str, Any]) -> None:
        self.scope, self.counters, self.numbers = scope, list(counters), list(numbers)
        self.changed: list[str] = []
        self.reason = ""
        self.where: dict[int, str] = {}
        self.floats: dict[str, float] = {}
        self.before: list[tuple[Slot, Any]] = []
        self.stands: list[Tensor] = []

    def substitute(self, dtype: torch.dtype) -> None:
        """Have tensors stand for counters and numbers."""
        for place, of in [*((x, torch.float64) for x in self.counters), *((x, dtype) for x in self.numbers)]:
            slot = Slot(place, self.scope)
            value = slot.get()
            stands = torch.tensor(float(value), dtype=of)
            slot.set(stands)
            self.before.append((slot, value))
            self.stands.append(stands)
            if slot.get() is not stands:
                self.refuse("f reads a number in a place where no tensor can stand for it")

    def restore(self) -> None:
        for slot, value in self.before:
            slot.set(value)
        self.before.clear()

    def refuse(self, reason: str) -> NoReturn:
        self.reason = self.reason or reason
        raise _Stop(reason)

    def see(self, entry: Entry, how: Callable[..., Any]) -> None:
        """Look at what Dynamo has captured, and at what f does beside its graph.

        Raises:
            _Stop: it is of no use.
        """
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        if output.random_calls:
            self.refuse("f draws random numbers")
        for guard in output.guards:
            self.refuse_values(_name(guard.originating_source), guard.create_fn_name())
        _refuse_escapes(entry.module, self)
        _refuse_writes_into_picked(entry.module, self)
        if output.shape_env.guards:  # shapes are static: it is a number of a tensor that something depends on
            self.refuse("f makes a Python number or a branch of the numbers of a tensor")
        counters = self._changes(output.side_effects)
        if self.changed:
            raise _Stop
        (results,) = [n for n in entry.module.graph.nodes if n.op == "output"]
        outputs = list(results.args[0])
        for i, node in enumerate(outputs):
            dims = getattr(node.meta.get("example_value"), "ndim", None)
            marks = node.target == "reshape" and node.op == "call_method"
            if marks and dims == 2 and entry.value is None:
                entry.value = i
            elif marks and dims == 3 and entry.with_graph is None:
                entry.with_graph = i
        if (entry.value is None) != (how is WITH_GRAPH) or (entry.with_graph is None) != (how is VALUE):
            self.refuse("what f returns was not found in its graph")
        names = [getattr(node, "name", None) for node in outputs]
        for place in self.counters:
            if counters.get(place) not in names:
                self.refuse("f changes what it holds when it is called")
            entry.counts.append(names.index(counters[place]))
        entry.calls = 2 if how is BOTH else 1
        entry.counters, entry.numbers = self.counters, self.numbers

    def _changes(self, effects: Any) -> dict[str, str]:
        """What f changes when it is called: of counters the nodes of what comes out."""
        from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
        from torch._dynamo.variables.constant import ConstantVariable
        from torch._dynamo.variables.dicts import ConstDictVariable
        from torch._dynamo.variables.tensor import TensorVariable

        counters: dict[str, str] = {}
        for x in effects._get_modified_vars():
            if isinstance(x.mutation_type, (AttributeMutationNew, ValueMutationNew)):
                continue
            if type(x).__name__ == "TorchFunctionModeStackVariable":
                continue  # `_Picking`, which is left again
            stored = effects.store_attr_mutations.get(x)
            if isinstance(x, ConstDictVariable) and x.source is not None and _is_same(x):
                continue  # a module's buffers, one of which was written to in place
            if not stored or x.source is None:
                self.refuse("f changes what it holds when it is called")
            for name, value in stored.items():
                place = f"{_name(x.source)}.{name}"
                if place in self.counters and isinstance(value, TensorVariable):
                    counters[place] = value.as_proxy().node.name
                elif isinstance(value, TensorVariable) and _is_itself(value.as_proxy().node, _name(x.source), name):
                    pass  # `self.count += 1` of a tensor
                elif isinstance(value, ConstantVariable) and type(value.value) in (int, float):
                    self.changed.append(place)
                else:
                    self.refuse("f changes what it holds when it is called")
        if effects.tensor_hooks:
            self.refuse("f changes what it holds when it is called")
        return counters

    def look(self, guards: Sequence[Any]) -> list[bool]:
        """Which guards are to be kept: all but those of numbers for which tensors stand, and of what autograd does with
        what it saves, which no capture depends on: that one is a function in Python."""
        stands, dropped = {id(x) for x in self.stands}, set()
        for guard in guards:
            if guard.has_value and id(guard.value) in stands:
                dropped.add(_name(guard.orig_guard.originating_source))
        keep = []
        for guard in guards:
            place = _name(guard.orig_guard.originating_source)
            of_shapes = guard.guard_type == "SHAPE_ENV"
            unused = guard.guard_type == "AUTOGRAD_SAVED_TENSORS_HOOKS"
            keep.append(place not in dropped and not (of_shapes and dropped) and not unused)
            if of_shapes and any(".item()" in x and "isnan" not in x for x in guard.orig_guard.code_list or ()):
                self.reason = "f makes a Python number or a branch of the numbers of a tensor"
            if ".__wrapped__" in place and self._is_cache(place.partition(".__wrapped__")[0]):
                self.reason = "f calls a function with an lru_cache, which keeps what it answered"
            if guard.guard_type == "TENSOR_MATCH":
                if isinstance(guard.value, Tensor):
                    self.where[id(guard.value)] = place
                continue
            with contextlib.suppress(_Stop):
                self.refuse_values(place, guard.guard_type)
            if type(guard.value) is float and guard.guard_type in _ON_VALUES:
                self.floats[place] = guard.value
        return keep

    def _is_cache(self, place: str) -> bool:
        try:
            f = Slot(place, self.scope).get()
        except Exception:  # a place that Dynamo alone can name
            return True
        own = str(getattr(f, "__module__", "")).startswith("torch.")  # PyTorch keeps what never changes
        return isinstance(f, functools._lru_cache_wrapper) and not own

    def refuse_values(self, place: str, kind: str) -> None:
        """Have no guard stand on the numbers of t or h: a solver's other times would break it.

        Raises:
            _Stop: it does.
        """
        if kind in _ON_VALUES and any(place.startswith(f"L['{x}']") for x in ("t", "h", "t_graph", "h_graph")):
            self.refuse("f makes a Python number or a branch of the numbers of t or h")

    def bind(self, entry: Entry, values: Sequence[Any], args: tuple[Any, ...]) -> None:
        """Find out what each input of a graph is."""
        t, h, t_graph, h_graph = args
        known: dict[int, tuple[Any, ...]] = {id(t): ("t", False), id(t_graph): ("t", True)}
        for graph, state in ((False, h), (True, h_graph)):
            known |= {id(x): ("h", graph, i) for i, x in enumerate(_leaves(state, state))}
        count = len(self.counters)
        for i, x in enumerate(self.stands):
            known[id(x)] = ("counter", i) if i < count else ("number", i - count)
        held = integers = 0
        for x in values:
            if id(x) in known:
                kind = known[id(x)]
            elif reason := _unfit(x):
                self.reason = reason
                return
            elif x.is_floating_point():
                kind, held = ("held", held), held + 1
                entry.places.append(self.where.get(id(x), ""))
            else:
                kind, integers = ("integer", integers), integers + 1
            entry.inputs.append(kind)
        entry.floats = self.floats
        for node in entry.module.graph.nodes:  # examples keep the user's tensors alive
            node.meta.clear()


def _is_same(x: Any) -> bool:
    """Whether a dictionary that was written to has the same in it, perhaps tensors that were written to in place."""
    from torch._dynamo.variables.tensor import TensorVariable

    if len(x.items) != len(x.original_items):
        return False
    for key, value in x.items.items():
        if isinstance(value, TensorVariable):
            if not _is_itself(value.as_proxy().node, _name(x.source), str(key.vt.as_python_constant())):
                return False
        elif value.source is None:
            return False
    return True


def _is_itself(node: fx.Node, owner: str, name: str) -> bool:
    """Whether a tensor is the one that lay there, written to in place."""
    while node.target in _IN_PLACE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    source = getattr(node.meta.get("grapharg"), "source", None)
    place = "" if source is None else _name(source)
    return place.startswith(owner) and (place.endswith((f".{name}", f"['{name}']")))


_IN_PLACE = {operator.iadd, operator.isub, "add_", "sub_"}


def _name(source: Any) -> str:
    name = source.name
    return name() if callable(name) else name  # a method before PyTorch 2.10


# Numbers of an integer tensor that are a part of the code, not of its parameters.
_CONTENT = 10_000


def _unfit(x: Any) -> str:
    """Why a program cannot look at a tensor that f holds; empty where it can."""
    if type(x) not in (Tensor, nn.Parameter) and type(x) is not getattr(nn, "Buffer", Tensor):
        return f"f holds a {type(x).__name__}"
    if x.layout != torch.strided:
        return f"f holds a tensor of layout {x.layout}"
    if x.is_complex():
        return "f computes in complex numbers"
    if x.is_quantized:
        return "f holds a quantized tensor"
    if not x.is_floating_point() and x.numel() > _CONTENT:
        return f"f holds an integer tensor of shape {tuple(x.shape)}, too large to be a part of the code"
    return ""


# What makes a number of a tensor; and what makes a tensor of numbers, for which `torch.tensor([h[0], ...])` reads them.
_READS = {"item", "tolist", "__bool__", "__int__", "__float__", "is_nonzero"}
# With how many arguments in front are not read.
_MAKES = {
    **dict.fromkeys(("tensor", "as_tensor", "asarray", "scalar_tensor", "full", "arange", "linspace", "logspace"), 0),
    **dict.fromkeys(("new_tensor", "new_full", "full_like"), 1),
}


def _refuse_escapes(module: fx.GraphModule, attempt: _Attempt) -> None:
    """Look for where the numbers of tensors leave PyTorch.

    Dynamo follows some of these ways. But what comes of a number that was read has no gradient in PyTorch, and may have
    one in the graph, and NumPy's functions are not all the same as those that stand for them there.
    """
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        depend: set[fx.Node] = set()  # on what may be another at the next call
        for node in part.graph.nodes:
            if node.op == "placeholder" or not depend.isdisjoint(node.all_input_nodes):
                depend.add(node)
            if node.op not in ("call_method", "call_function") or node not in depend:
                continue
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if name in _READS:
                attempt.refuse(f"f makes a Python number or a branch of the numbers of a tensor ({name.strip('_')})")
            if (name == "view_as" and node.args[0] is node.args[1]) or "numpy" in type(node.target).__name__:
                attempt.refuse("f leaves PyTorch: numpy reads the numbers of a tensor")
            if name == "fill_" and getattr(node.args[0], "target", None) is torch.empty:
                attempt.refuse("f leaves PyTorch: full reads the numbers of a tensor")
            if name in _MAKES:
                made_of = [*node.args, *node.kwargs.values()][_MAKES[name] :]
                same = name in ("as_tensor", "asarray") and isinstance(made_of[0], fx.Node)
                if not same and _nodes(made_of):
                    attempt.refuse(f"f leaves PyTorch: {name} reads the numbers of a tensor")


def _nodes(x: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(x, found.append)
    return found


# What Dynamo says, in other words.
_WORDS = {
    "f makes a Python number or a branch of the numbers of a tensor": (
        "Data-dependent",
        "data-dependent",
        "Data dependent",
        "Tensor.tolist",
        "repr() on tensor",
    ),
    "f leaves PyTorch: it reads the numbers of a tensor": ("fake tensor call", "numpy"),
    "f leaves PyTorch": ("Unsupported method call", "marked as skipped", "builtin operator", "Observed exception"),
}


def _refuse_writes_into_picked(module: fx.GraphModule, attempt: _Attempt) -> None:
    """What `_Picking` makes is no view of x, as `x[i]` is: nothing may be written into it."""
    picked: set[fx.Node] = set()
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and node.target is torch.index_select:
            picked.add(node)
        elif node.args and node.args[0] in picked:
            if name in ("setitem", "iadd", "isub", "imul", "itruediv") or (name[-1] == "_" and name[-2] != "_"):
                attempt.refuse("f writes into what it indexes by a number that it computes")
            if node.op == "call_method" or node.target is operator.getitem:
                picked.add(node)


def _words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    explained = [line.partition("Explanation:")[2].strip() for line in lines if line.startswith("Explanation:")]
    text = (explained or lines)[0].partition(" This function is")[0].rstrip(".")
    for said, words in _WORDS.items():
        if any(word in lines[0] for word in words):
            return f"{said}: {text}"
    return f"PyTorch does not capture it: {text}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Dynamo's settings for a capture, without its messages: what it cannot do is said in our own words."""
    from torch._dynamo import config

    settings = {name: value for name, value in _CONFIG.items() if hasattr(config, name)}
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._guards", "torch.fx")]
    levels = [x.level for x in loggers]
    rng = torch.get_rng_state()
    try:
        for x in loggers:
            x.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), config.patch(settings):
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(loggers, levels):
            x.setLevel(level)
        torch.set_rng_state(rng)
