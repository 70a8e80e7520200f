"""A vector field and its products as functional graphs of ATen operations, by PyTorch's own tracing."""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ...errors import NotCompiled
from ...parameters import unheard
from ...problem import Field
from ..runtime import of_a_signal
from .capture import Held, Snapshot

aten = torch.ops.aten


@dataclass
class Graph:
    """A functional graph: no operation in it writes to a tensor.

    Attributes:
        module: its placeholders are, in this order, `inputs`, and then the lifted tensors of the trace.
        inputs: "t", "h", and for products "v" (a cotangent, or a tangent of h).
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]


# What reads a tensor's numbers, or shows its memory.
_READS = {
    *("item", "tolist", "numpy", "data_ptr", "untyped_storage", "storage", "is_nonzero", "__array__", "__dlpack__"),
    *("__float__", "__int__", "__bool__", "__index__", "__complex__", "__contains__"),
    *("__repr__", "__str__", "__format__", "__reduce_ex__"),
}
# What makes a tensor of Python's numbers: of tensors among these it reads the numbers.
_MAKES = {"tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor", "new", "sparse_coo_tensor", "Tensor"}


class Escaped(RuntimeError):
    """f makes something of the numbers in a tensor that a trace does not show."""


class Watch(TorchFunctionMode):
    """Within this context: where the numbers of a tensor leave PyTorch.

    A trace takes what comes of them for constant. Tensors that do not depend on the arguments, nor on floating-point
    tensors that f holds, may be read: they are a part of the code.

    Args:
        parts: by the `id` of a tensor, what stands for it.

    Attributes:
        reason: of the first escape, which f itself might catch.
    """

    def __init__(self, parts: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        self.parts, self.reason, self.numbers = parts or {}, "", _Numbers(self)

    def __enter__(self) -> Watch:
        self.numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.numbers.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _READS and args and isinstance(args[0], Tensor):
            x = self.look(args[0], name)
            if x is not None:
                with _disable_current_modes():
                    return func(x, *args[1:], **kwargs)
        elif name in _MAKES:
            # `as_tensor(x)` is x; in a list, or by `tensor(x)`, it is its numbers.
            made_of = args[1:] if name.startswith("new") else args
            same = name in ("as_tensor", "asarray") and made_of and isinstance(made_of[0], Tensor)
            for x in () if same else pytree.tree_leaves((made_of, kwargs)):
                if isinstance(x, Tensor):
                    self.look(x, name)
        if self.parts:
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: self.parts.get(id(x), x), (args, kwargs))
        return func(*args, **kwargs)

    def look(self, x: Tensor, name: str) -> Tensor | None:
        """A tensor is read by a function of that name: the numbers that it may read."""
        if isinstance(x, FakeTensor) and x.constant is not None:
            return x.constant
        if not (isinstance(x, FakeTensor) or x.is_floating_point() or x.is_complex()):
            return x
        whose = "of t or h, or of what it computes" if isinstance(x, FakeTensor) else "of a tensor that it holds"
        if name in ("numpy", "tolist", "data_ptr", "__array__", "__dlpack__") or name in _MAKES:
            self.escape(f"f leaves PyTorch: {name.strip('_')} reads the numbers {whose}")
        return self.escape(f"f makes a Python number or a branch {whose} ({name.strip('_')})")

    def escape(self, reason: str) -> NoReturn:
        self.reason = self.reason or reason
        raise Escaped(reason)


class _Numbers(TorchDispatchMode):
    """Sees operations whose answer is a number, or that make a shape of numbers; others ask for these within."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, x: Tensor) -> None:
        """A tensor that f holds is about to be written to."""
        if id(x) not in self.written:
            with _disable_current_modes(), torch.no_grad():
                self.written[id(x)] = x, x.detach().clone()

    def restore(self) -> None:
        with torch.no_grad():
            for x, before in self.written.values():
                x.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shaped = torch.Tag.dynamic_output_shape in func.tags and func.overloadpacket is not aten.index
        if shaped or torch.Tag.data_dependent_output in func.tags:
            for x in pytree.tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    self.watch.look(x, func._schema.name.rpartition("::")[2])
        if func._schema.is_mutable:
            for argument, x in zip(func._schema.arguments, args):
                if (
                    argument.alias_info is not None
                    and argument.alias_info.is_write
                    and type(x) in (Tensor, nn.Parameter)
                ):
                    self.keep(x)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _no_files(watch: Watch) -> Iterator[None]:
    """Within this context nothing opens a file; `pathlib`, `torch.load` and NumPy do so by these functions, too."""

    here = threading.get_ident()

    def guarded(before: Callable[..., Any]) -> Callable[..., Any]:
        def opens(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here and not _asked_by_torch(sys._getframe(1)):
                watch.escape("f opens a file, whose content can change")
            return before(*args, **kwargs)

        return opens

    owners: tuple[Any, ...] = (builtins, io, np.lib.npyio.DataSource)
    functions = [owner.open for owner in owners]
    for owner, function in zip(owners, functions):
        owner.open = guarded(function)
    try:
        yield
    finally:
        for owner, function in zip(owners, functions):
            owner.open = function


def _asked_by_torch(frame: types.FrameType | None) -> bool:
    """Whether what the standard library or NumPy does in a frame is for PyTorch or an import, and not for f."""
    asked = False
    while frame is not None and (name := frame.f_globals.get("__name__", "")) != __name__:
        if name == "importlib._bootstrap":
            return True
        room = name.partition(".")[0]
        if not asked and room not in sys.stdlib_module_names and room != "numpy" and name != "torch.serialization":
            asked = True
            if room == "torch":
                return True
        frame = frame.f_back
    return False


def constant(x: Any) -> Tensor | None:
    """The numbers of a tensor of a trace that depends on nothing."""
    return x.constant if isinstance(x, FakeTensor) else None


class Counts(NotCompiled):
    """f changes a number that was not known to be a counter."""


class Counter:
    """Stands for a number that f counts with. All that can be done with it is to add to it.

    Args:
        counted: what was added.
    """

    def __init__(self, name: str, watch: Watch, counted: float = 0) -> None:
        self.name, self.watch, self.counted = name, watch, counted

    def __add__(self, x: Any) -> Counter:
        if type(x) not in (int, float):
            self.use()
        return Counter(self.name, self.watch, self.counted + x)

    __radd__ = __add__

    def __sub__(self, x: Any) -> Counter:
        if type(x) not in (int, float):
            self.use()
        return Counter(self.name, self.watch, self.counted - x)

    def use(self, *args: Any) -> Any:
        self.watch.escape(f"f uses {self.name}, a number that it changes when it is called")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __index__ = __int__ = __float__ = use
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __rsub__ = __mod__ = __rmod__ = __floordiv__ = __pow__ = use
    __str__ = __repr__ = __format__ = __reduce_ex__ = __neg__ = __abs__ = __round__ = __divmod__ = use


class Trace:
    """f(t, h) with the tensors that it holds lifted into inputs: θ, those that require grad, and constants.

    Args:
        field: over the flat state; `field.source` says what it is made of.
        like: the state, shape (n,), of which shape and dtype count.

    Attributes:
        slots: for each lifted tensor its place in `Held.tensors`: those of θ, then the constants.
        trained: how many of them are θ.
        steps: what a call of f adds to each of `Held.counters`.
        adds: what it adds to tensors that it holds and does not read, by their places in `Held.tensors`.

    Raises:
        NotCompiled: PyTorch cannot trace f, or f does something that a trace does not show.
    """

    def __init__(self, field: Field, source: Held, like: Tensor) -> None:
        with torch.inference_mode(False):
            self.like = torch.zeros(like.shape, dtype=like.dtype)
            with torch.no_grad():
                module, self.steps = self._traced(
                    field, source, lambda t, h: _flat(field, t, h), self._inputs("t", "h")
                )
            self.adds = _drop_counters(module, source.tensors)
            self.slots, self.trained = _lift(module, source.tensors)
            self.tensors = [source.tensors[i].detach() for i in self.slots]
            self.module = self._functional(module, self._inputs("t", "h"))
            self._vjp: Graph | NotCompiled
            try:
                self._vjp = self._pulled_back(field, source)
            except NotCompiled as error:  # f itself is compiled nevertheless
                self._vjp = NotCompiled(f"a product of f: {error}")

    def _inputs(self, *names: str) -> tuple[Tensor, ...]:
        """Examples, for shapes and dtypes. Each is an object of its own: a trace tells them apart by that."""
        made = {"t": self.like.new_tensor(0.3), "h": self.like, "v": torch.ones_like(self.like)}
        return tuple(made[name] for name in names)

    def _traced(
        self, field: Field, source: Held, f: Callable[..., Any], args: Sequence[Tensor], parts: Any = None
    ) -> tuple[fx.GraphModule, list[float]]:
        """The graph of what calls the user's function, and what that counts."""
        watch = Watch(parts)

        def watched(*args: Tensor) -> Any:
            random_before = _random_states()
            with watch, _no_files(watch):
                out = f(*args)
            if _random_states() != random_before:
                watch.escape("f draws random numbers")
            return out

        before = Snapshot(field.source)
        values = [slot.get() for slot in source.counters]
        try:
            for slot in source.counters:
                slot.set(Counter(slot.name, watch))
            module = _trace(watched, args, fake=True)
        finally:
            after = [slot.get() for slot in source.counters]
            for slot, value in zip(source.counters, values):
                slot.set(value)
            watch.numbers.restore()
            counts = before.count_changed()
            changed = before.restore()  # no tensor without numbers may stay where f has put it
        if counts:
            raise Counts("f changes a number that it holds")
        if watch.reason:  # it was caught on its way
            raise NotCompiled(watch.reason)
        if changed or not all(isinstance(x, Counter) for x in after):
            raise NotCompiled("f changes what it holds when it is called")
        module.graph.eliminate_dead_code()
        for node in module.graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise NotCompiled("f draws random numbers")
            shape = getattr(node.meta.get("val"), "shape", ())
            if not all(isinstance(n, int) for n in shape):
                raise NotCompiled("f makes a shape of a tensor's numbers")
        return module, [x.counted for x in after]

    @functools.cached_property
    def f(self) -> Graph:
        """(t, h, θ, constants) -> dh/dt, shape (n,)."""
        return Graph(self.module, ("t", "h"))

    @property
    def vjp(self) -> Graph:
        """(t, h, v, θ, constants) -> the products of v with the Jacobians by t, h, and each of θ."""
        if isinstance(self._vjp, NotCompiled):
            raise NotCompiled(*self._vjp.args)
        return self._vjp

    def _pulled_back(self, field: Field, source: Held) -> Graph:
        """PyTorch's own backward pass through f, traced: what f detaches, or differentiates by itself, counts."""
        theta = [source.tensors[i] for i in self.slots[: self.trained]]
        # The graph of an earlier operation is no part of f: in its place stands a tensor without one.
        parts = {id(x): x.detach().requires_grad_() for x in theta if not x.is_leaf}

        def product(t: Tensor, h: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            inputs = [t.detach().requires_grad_(), h.detach().requires_grad_()]
            inputs += [parts.get(id(x), x) for x in theta]
            with torch.enable_grad():
                k = _flat(field, *inputs[:2])
            grads: Sequence[Tensor | None] = [None] * len(inputs)
            if k.requires_grad:
                with unheard(theta):
                    grads = torch.autograd.grad(k, inputs, v, allow_unused=True, retain_graph=True)
            return tuple(torch.zeros(x.shape, dtype=x.dtype) if g is None else g for x, g in zip(inputs, grads))

        module, _ = self._traced(field, source, product, self._inputs("t", "h", "v"), parts)
        _drop_counters(module, source.tensors)
        _lift(module, [parts.get(id(x), x) for x in source.tensors], self.slots)
        return Graph(self._functional(module, self._inputs("t", "h", "v")), ("t", "h", "v"))

    @functools.cached_property
    def jvp(self) -> Graph:
        """(t, h, v, θ, constants) -> the product of the Jacobian by h with v, and the derivative by t."""
        # The reverse mode twice: what it gives is linear in its cotangent, and the derivative by that is the answer.
        # (PyTorch's forward mode crashes in a trace where the result does not depend on the input.)
        try:
            return self._twice(self.vjp)
        except NotCompiled:  # not every operation of a backward pass has a derivative; their parts have
            return self._twice(decomposed(self.vjp, self.examples(self.vjp)))

    def _twice(self, vjp: Graph) -> Graph:
        back = vjp.module

        def product(t: Tensor, h: Tensor, v: Tensor, *lifted: Tensor) -> tuple[Tensor, ...]:
            _, forward, *_ = torch.func.vjp(lambda w: tuple(back(t, h, w, *lifted)[:2]), torch.zeros_like(v))
            zero_t, zero_h = torch.zeros_like(t), torch.zeros_like(h)
            return forward((zero_t, v))[0], forward((torch.ones_like(t), zero_h))[0]

        return self._product(product)

    def examples(self, graph: Graph) -> tuple[Tensor, ...]:
        """Inputs of a graph, for shapes and dtypes."""
        return (*self._inputs(*graph.inputs), *self.tensors)

    def _product(self, product: Callable[..., Any]) -> Graph:
        inputs = self._inputs("t", "h", "v")
        with torch.inference_mode(False):
            try:
                module = _trace(product, (*inputs, *self.tensors))
            except NotCompiled as error:
                raise NotCompiled(f"a product of f: {error}") from error
            return Graph(self._functional(module, inputs), ("t", "h", "v"))

    def _functional(self, module: fx.GraphModule, args: Sequence[Tensor]) -> fx.GraphModule:
        """The same without operations in place, and without what nothing comes of."""
        nodes = [
            n for n in module.graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)
        ]
        if any(n.target._schema.is_mutable for n in nodes):
            module = _trace(torch.func.functionalize(module, remove="mutations"), (*args, *self.tensors))
            for node in module.graph.nodes:
                if node.target is aten.copy_.default:
                    raise NotCompiled("f writes into a tensor that it holds")
                if node.target is aten.copy.default:
                    _replace_copy(module.graph, node)
            module.recompile()
        module.graph.eliminate_dead_code()
        return module


def decomposed(graph: Graph, args: Sequence[Tensor]) -> Graph:
    """The same graph in PyTorch's core operations."""
    return Graph(_trace(graph.module, args, decompositions()), graph.inputs)


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import core_aten_decompositions, get_decompositions

    whole = [aten.native_layer_norm, aten.native_group_norm, aten.replication_pad1d, aten.replication_pad2d]
    whole += [aten._weight_norm_interface]
    return {
        **dict(core_aten_decompositions().items()),
        **get_decompositions(whole),
        aten._weight_norm_interface_backward.default: _weight_norm_backward,
    }


def _weight_norm_backward(g: Tensor, v: Tensor, scale: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of w = scale v / |v|, with the norms over all dimensions but one; PyTorch has no decomposition of it."""
    others = [d for d in range(v.dim()) if d != dim]
    unit = v / norms
    along = (g * unit).sum(others, keepdim=True)
    return scale / norms * (g - unit * along), along


def _flat(field: Field, t: Tensor, h: Tensor) -> Tensor:
    if field.differentiates and not h.requires_grad:
        with torch.enable_grad():
            return _flat(field, t, h.detach().requires_grad_())
    return field.f(t, h if field.flat else h.reshape(field.shape)).reshape(-1)  # type: ignore[arg-type]


def _trace(
    f: Callable[..., Any], args: Sequence[Tensor], table: dict[Any, Any] | None = None, *, fake: bool = False
) -> fx.GraphModule:
    """Args:
    fake: with tensors that have no numbers, so that nothing can come of these.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    rng = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not fake:
                return make_fx(f, decomposition_table=table)(*args)
            return make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    except Escaped as error:
        raise NotCompiled(str(error)) from error
    except Exception as error:  # whatever f or the tracing of it raises: the callback will raise what f itself does
        if of_a_signal(error):
            raise
        text = str(error).strip().partition("\n")[0]
        if any(word in str(error) for word in _READING):
            text = "f leaves PyTorch: it reads the numbers of t or h, or of what it computes"
        elif Counter.__name__ in text:
            text = "f uses a number that it changes when it is called"
        raise NotCompiled(f"PyTorch does not trace it: {text or type(error).__name__}") from error
    finally:
        torch.set_rng_state(rng)


# In what PyTorch says when the numbers of a tensor without any are asked for.
_READING = ("data-dependent", "data is not allocated", "access data pointer", "_local_scalar_dense", ".numpy()")


def _random_states() -> tuple[Any, ...]:
    """Of the generators of random numbers that are not PyTorch's."""
    numpy = sys.modules.get("numpy.random")
    state = () if numpy is None else numpy.get_state()
    return random.getstate(), *(x.tobytes() if hasattr(x, "tobytes") else x for x in state)


def _lift(module: fx.GraphModule, tensors: list[Tensor], slots: list[int] | None = None) -> tuple[list[int], int]:
    """Make inputs of the tensors that f holds; the places of these in `tensors`, and how many require grad.

    Args:
        slots: these places, where they are known.
    """
    known = {id(x): i for i, x in enumerate(tensors)}
    memory = {x.untyped_storage().data_ptr() for x in tensors}
    found: dict[int, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target)
        i = known.get(id(value))
        if i is not None:
            found.setdefault(i, []).append(node)
            continue
        numbers = constant(value)
        if numbers is not None:
            setattr(module, node.target, value := numbers)
        if value.is_complex():
            raise NotCompiled("f computes in complex numbers")
        literal = isinstance(value, FakeTensor) or (
            _literal(node) and (numbers is not None or value.untyped_storage().data_ptr() not in memory)
        )
        if value.is_floating_point() and not literal:
            raise NotCompiled(f"f uses a tensor of shape {tuple(value.shape)} that was not found among what it holds")
    if slots is None:
        slots = sorted(found, key=lambda i: (not tensors[i].requires_grad, i))
    elif found.keys() - set(slots):
        raise NotCompiled("f is differentiated with a tensor that f itself does not use")
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    last = placeholders[-1]
    for i in slots:
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(f"held_{i}")
        nodes = found.get(i, ())
        for name in {str(node.target) for node in nodes}:
            delattr(module, name)  # else the trace keeps the tensor of the user's alive
        for node in nodes:
            node.replace_all_uses_with(last)
            module.graph.erase_node(node)
    module.recompile()
    return slots, sum(tensors[i].requires_grad for i in slots)


def _drop_counters(module: fx.GraphModule, tensors: list[Tensor]) -> dict[int, float]:
    """Leave out where f adds a number to a tensor that it holds, and makes nothing else of it: what is added, by the
    place of the tensor."""
    known, adds = {id(x): i for i, x in enumerate(tensors)}, {}
    uses: dict[int, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and id(getattr(module, node.target)) in known:
            uses.setdefault(known[id(getattr(module, node.target))], []).extend(node.users)
    for i, nodes in uses.items():
        if all(n.target is aten.add_.Tensor and not n.users and isinstance(n.args[1], (int, float)) for n in nodes):
            steps: list[Any] = [(n.args[1], n.kwargs.get("alpha", 1)) for n in nodes]
            adds[i] = sum(float(x * alpha) for x, alpha in steps)
            for node in nodes:
                module.graph.erase_node(node)
    if adds:
        module.graph.eliminate_dead_code()
        module.recompile()
    return adds


def _replace_copy(graph: fx.Graph, node: fx.Node) -> None:
    """`copy(to, x)` is x in the shape and dtype of `to`; PyTorch has no derivative of it."""
    x = node.args[1]
    like = node.meta["tensor_meta"]
    with graph.inserting_before(node):
        x = graph.call_function(aten._to_copy.default, (x,), {"dtype": like.dtype})
        x = graph.call_function(aten.expand.default, (x, list(like.shape)))
    node.replace_all_uses_with(x)
    graph.erase_node(node)


def _literal(node: fx.Node) -> bool:
    """Whether it is a tensor that f makes of Python numbers."""
    return all(user.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default) for user in node.users)
