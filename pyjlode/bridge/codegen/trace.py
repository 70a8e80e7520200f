"""A vector field and its products as functional graphs of ATen operations, by PyTorch's own tracing."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import NotCompiled
from ...problem import Field
from .capture import Held, held_by

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


class Trace:
    """f(t, h) with the tensors that it holds lifted into inputs: θ, those that require grad, and constants.

    Args:
        field: over the flat state; `field.source` says what it is made of.
        like: the state, shape (n,), of which shape and dtype count, and around which f can be evaluated.

    Attributes:
        slots: for each lifted tensor its place in `Held.tensors`: those of θ, then the constants.
        trained: how many of them are θ.

    Raises:
        NotCompiled: PyTorch cannot trace f, or f does something that a trace does not show.
    """

    def __init__(self, field: Field, source: Held, like: Tensor) -> None:
        self.like = like.detach()
        module = _trace(lambda t, h: _flat(field, t, h), (like.new_tensor(0.3), self.like))
        if held_by(field).key != source.key:
            raise NotCompiled("f changes what it holds when it is called")
        self.slots, self.trained = _lift(module, source.tensors)
        self.tensors = [source.tensors[i].detach() for i in self.slots]
        self.module = self._functional(module, (self.like.new_tensor(0.3), self.like))
        for node in self.module.graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise NotCompiled("f draws random numbers")

    @functools.cached_property
    def f(self) -> Graph:
        """(t, h, θ, constants) -> dh/dt, shape (n,)."""
        return Graph(self.module, ("t", "h"))

    @functools.cached_property
    def vjp(self) -> Graph:
        """(t, h, v, θ, constants) -> the products of v with the Jacobians by t, h, and each of θ."""

        def product(t: Tensor, h: Tensor, v: Tensor, *lifted: Tensor) -> tuple[Tensor, ...]:
            constants = lifted[self.trained :]

            def f(t: Tensor, h: Tensor, *theta: Tensor) -> Tensor:
                return self.module(t, h, *theta, *constants)

            return torch.func.vjp(f, t, h, *lifted[: self.trained])[1](v)

        return self._product(product)

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
        """Inputs of a graph, for shapes and dtypes. Each is an object of its own: a trace tells them apart by that."""
        made = {"t": self.like.new_tensor(0.3), "h": self.like, "v": torch.ones_like(self.like)}
        return (*(made[name] for name in graph.inputs), *self.tensors)

    def _product(self, product: Callable[..., Any]) -> Graph:
        args = (self.like.new_tensor(0.3), self.like, torch.ones_like(self.like), *self.tensors)
        try:
            module = _trace(product, args)
        except NotCompiled as error:
            raise NotCompiled(f"a product of f: {error}") from error
        return Graph(self._functional(module, args[:3]), ("t", "h", "v"))

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
    return {**dict(core_aten_decompositions().items()), **get_decompositions(whole)}


def _flat(field: Field, t: Tensor, h: Tensor) -> Tensor:
    return field.f(t, h if field.flat else h.reshape(field.shape)).reshape(-1)  # type: ignore[arg-type]


def _trace(f: Callable[..., Any], args: Sequence[Tensor], table: dict[Any, Any] | None = None) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    rng = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make_fx(f, decomposition_table=table)(*args)
    except Exception as error:  # whatever f or the tracing of it raises: the callback will raise what f itself does
        text = str(error).strip().partition("\n")[0]
        if "aten._local_scalar_dense" in str(error) or "data-dependent" in str(error):
            text = "f makes a Python number or a branch of a tensor's value"
        raise NotCompiled(f"PyTorch does not trace it: {text or type(error).__name__}") from error
    finally:
        torch.set_rng_state(rng)


def _lift(module: fx.GraphModule, tensors: list[Tensor]) -> tuple[list[int], int]:
    """Make inputs of the tensors that f holds; the places of these in `tensors`, and how many require grad."""
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
        elif value.is_floating_point() and (not _literal(node) or value.untyped_storage().data_ptr() in memory):
            raise NotCompiled(f"f uses a tensor of shape {tuple(value.shape)} that was not found among what it holds")
        elif value.is_complex():
            raise NotCompiled("f computes in complex numbers")
    slots = sorted(found, key=lambda i: (not tensors[i].requires_grad, i))
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    last = placeholders[-1]
    for i in slots:
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(f"held_{i}")
        for name in {str(node.target) for node in found[i]}:
            delattr(module, name)  # else the trace keeps the tensor of the user's alive
        for node in found[i]:
            node.replace_all_uses_with(last)
            module.graph.erase_node(node)
    module.recompile()
    return slots, sum(tensors[i].requires_grad for i in slots)


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
