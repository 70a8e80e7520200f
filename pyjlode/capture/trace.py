"""A vector field and its products as functional graphs of ATen operations, by PyTorch's own tracing."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import NotCompiled
from ..signals import of_a_signal
from .composed import Composed
from .held import Held

aten = torch.ops.aten


@dataclass
class Graph:
    """A functional graph: no operation in it writes to a tensor.

    Attributes:
        module: its placeholders are, in this order, `inputs`, and then the lifted tensors of the trace.
        inputs: "t", "h", and for products "v" (a cotangent, or a tangent of h) or "m" (a matrix and a cotangent).
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]


class Trace:
    """f(t, h) with the tensors that it holds lifted into inputs: θ, those that require grad, and constants.

    Args:
        held: what the field holds, with its capture.
        like: the state, shape (n,), of which shape and dtype count.

    Attributes:
        slots: for each lifted tensor its place in `Held.tensors`: those of θ, then the constants.
        trained: how many of them are θ.
        steps: what a call of f adds to each of `Held.counters`.
        adds: what it adds to tensors that it holds and does not read, by their places in `Held.tensors`.
        unread: shapes and dtypes of tensors that f holds and no graph reads, by their places there.

    Raises:
        NotCompiled: PyTorch cannot trace f, or f does something that a trace does not show.
    """

    def __init__(self, held: Held, like: Tensor) -> None:
        self.entry, self.layout, tensors = held.entry, held.layout, held.tensors
        self.order = held.order
        self.slots = sorted(set(held.order), key=lambda i: (not tensors[i].requires_grad, i))
        self.trained = sum(tensors[i].requires_grad for i in self.slots)
        self.integers = [x.clone() for x in held.integers]
        self.unread: dict[int, tuple[torch.Size, torch.dtype]] = {}
        with torch.inference_mode(False):
            self.like = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            self.tensors = [tensors[i].detach() for i in self.slots]
            self.steps = self._steps(len(held.counters))
            module, self.adds = self._traced(self._value, self._inputs("t", "h"), held)
            back: fx.GraphModule | NotCompiled
            try:
                if self.entry.with_graph is None:
                    raise NotCompiled(self.entry.without_graph)
                back, _ = self._traced(self._product_with, self._inputs("t", "h", "v"), held)
            except NotCompiled as error:  # f itself is compiled nevertheless
                back = NotCompiled(f"a product of f: {error}")
            self._drop_unused(module, 2, back, 3)
            self.module = self._functional(module, self._inputs("t", "h"))
            self._vjp: Graph | NotCompiled
            if isinstance(back, NotCompiled):
                self._vjp = back
            else:
                self._vjp = Graph(self._functional(back, self._inputs("t", "h", "v")), ("t", "h", "v"))
        self.unread = {i: (x.shape, x.dtype) for i, x in enumerate(tensors) if i not in self.slots}

    def _inputs(self, *names: str) -> tuple[Tensor, ...]:
        """Examples, for shapes and dtypes. Each is an object of its own: a trace tells them apart by that."""
        n = self.like.numel()
        made = {"t": self.like.new_tensor(0.3), "h": self.like, "v": torch.ones_like(self.like)}
        made["m"] = self.like.new_ones(n * n + n) if "m" in names else self.like
        return tuple(made[name] for name in names)

    def _outputs(
        self,
        t: Tensor,
        h: Tensor,
        t_graph: Tensor,
        h_graph: Tensor,
        lifted: Sequence[Tensor],
        counters: Sequence[Tensor],
    ) -> Sequence[Any]:
        """What the captured graph gives."""
        by_place = {i: torch.zeros(shape, dtype=dtype) for i, (shape, dtype) in self.unread.items()}
        by_place |= dict(zip(self.slots, lifted))
        states = {False: self._leaves(h), True: self._leaves(h_graph)}
        numbers = len(self.order) - len(self.entry.numbers)
        values: list[Tensor] = []
        for kind, *which in self.entry.inputs:
            if kind == "t":
                values.append(t_graph if which[0] else t)
            elif kind == "h":
                values.append(states[which[0]][which[1]])
            elif kind == "integer":
                values.append(self.integers[which[0]])
            elif kind == "counter":
                values.append(counters[which[0]])
            else:
                values.append(by_place[self.order[which[0] + (numbers if kind == "number" else 0)]])
        with torch.no_grad(), Composed():
            return self.entry.module(*values)

    def _leaves(self, h: Tensor) -> list[Tensor]:
        if self.layout.bare:
            return [h.reshape(self.layout.shapes[0])]
        with torch.enable_grad():
            return self.layout.leaves(h)

    def _value(self, t: Tensor, h: Tensor, *rest: Tensor) -> Tensor:
        lifted, counters = rest[: len(self.slots)], rest[len(self.slots) :]
        lifted = (*(x.detach().requires_grad_() for x in lifted[: self.trained]), *lifted[self.trained :])
        t_graph, h_graph = t.detach().requires_grad_(), h.detach().requires_grad_()
        outputs = self._outputs(t, h, t_graph, h_graph, lifted, counters)
        place = self.entry.with_graph if self.entry.value is None else self.entry.value
        assert place is not None
        return outputs[place].detach().reshape(-1)

    def _product_with(self, t: Tensor, h: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """PyTorch's own backward pass through f: what f detaches, or differentiates by itself, counts."""
        theta = [x.detach().requires_grad_() for x in rest[: self.trained]]
        lifted, counters = (*theta, *rest[self.trained : len(self.slots)]), rest[len(self.slots) :]
        inputs = [t.detach().requires_grad_(), h.detach().requires_grad_(), *theta]
        outputs = self._outputs(t, h, inputs[0], inputs[1], lifted, counters)
        k = outputs[self.entry.with_graph].reshape(-1)  # type: ignore[index]
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if k.requires_grad:
            with torch.enable_grad():
                grads = torch.autograd.grad(k, inputs, v, allow_unused=True, retain_graph=True)
        return tuple(
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) if g is None else g for x, g in zip(inputs, grads)
        )

    def _steps(self, count: int) -> list[float]:
        """What a call adds to counters, wherever they stand.

        Raises:
            NotCompiled: that is not the same everywhere.
        """
        if count == 0:
            return []
        steps = []
        for start in (0.0, 1000.0):
            counters = [torch.tensor(start, dtype=torch.float64) for _ in range(count)]
            tensors = [x.clone().requires_grad_(i < self.trained) for i, x in enumerate(self.tensors)]
            t, h, t_graph, h_graph = (x.clone() for x in 2 * self._inputs("t", "h"))
            outputs = self._outputs(t, h, t_graph.requires_grad_(), h_graph.requires_grad_(), tensors, counters)
            steps.append([(float(outputs[i]) - start) / self.entry.calls for i in self.entry.counts])
        if steps[0] != steps[1]:
            raise NotCompiled("f changes what it holds when it is called")
        return steps[0]

    def _traced(
        self, f: Callable[..., Any], args: Sequence[Tensor], held: Held
    ) -> tuple[fx.GraphModule, dict[int, float]]:
        """The graph of what calls f, with all that f holds as inputs; and what it adds to tensors."""
        counters = [torch.zeros((), dtype=torch.float64) for _ in held.counters]
        module = _trace(f, (*args, *self.tensors, *counters), fake=True)
        module.graph.eliminate_dead_code()
        for node in module.graph.nodes:
            if _is_random(node):
                raise NotCompiled("f draws random numbers")
            shape = getattr(node.meta.get("val"), "shape", ())
            if not all(isinstance(n, int) for n in shape):
                raise NotCompiled("f makes a shape of a tensor's numbers")
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"][len(args) :]
        adds = _drop_counters(module, inputs, self.entry.calls)
        for slot, node in zip(held.counters, inputs[len(self.slots) :]):
            if node.users:
                raise NotCompiled(f"f uses {slot.name}, a number that it changes when it is called")
            module.graph.erase_node(node)
        _keep_constants(module)
        module.recompile()
        return module, {self.slots[i]: step for i, step in adds.items() if i < len(self.slots)}

    def _drop_unused(self, f: fx.GraphModule, args: int, back: fx.GraphModule | NotCompiled, more: int) -> None:
        """Leave out the lifted tensors that no graph uses, or only such as f adds to."""
        modules = [(f, args)] + ([] if isinstance(back, NotCompiled) else [(back, more)])
        inputs = [[n for n in m.graph.nodes if n.op == "placeholder"][start:] for m, start in modules]
        kept = [i for i in range(len(self.slots)) if any(nodes[i].users for nodes in inputs)]
        for (module, _), nodes in zip(modules, inputs):
            for i in set(range(len(self.slots))) - set(kept):
                module.graph.erase_node(nodes[i])
            module.recompile()
        if len(modules) == 2:  # a gradient of each of θ, also of such as were left out
            (output,) = [n for n in modules[1][0].graph.nodes if n.op == "output"]
            given = list(output.args[0])
            left = given[:2] + [x for i, x in enumerate(given[2:]) if i in kept]
            output.args = (tuple(left),)
            modules[1][0].graph.eliminate_dead_code()
            modules[1][0].recompile()
        self.trained = sum(i < self.trained for i in kept)
        self.tensors = [self.tensors[i] for i in kept]
        self.slots = [self.slots[i] for i in kept]

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

    @functools.cached_property
    def bend(self) -> Graph:
        """(t, h, m, θ, constants) -> the derivatives by h and each of θ of Σ M_ij ∂f_i/∂h_j + Σ r_i ∂f_i/∂t, where m is
        the columns of M, one after the other, and then r."""
        if self.steps:
            raise NotCompiled("f counts its calls, and has no second derivatives then")
        inputs = self._inputs("t", "h", "m")
        with torch.inference_mode(False):
            try:
                module = _trace(self._second_product, (*inputs, *self.tensors), fake=True)
                _keep_constants(module)
                return Graph(self._functional(module, inputs), ("t", "h", "m"))
            except NotCompiled as error:
                raise NotCompiled(f"a product of second derivatives of f: {error}") from error

    def _second_product(self, t: Tensor, h: Tensor, m: Tensor, *lifted: Tensor) -> tuple[Tensor, ...]:
        theta = [x.detach().requires_grad_() for x in lifted[: self.trained]]
        s, y = t.detach().requires_grad_(), h.detach().requires_grad_()
        outputs = self._outputs(t, h, s, y, (*theta, *lifted[self.trained :]), [])
        k = outputs[self.entry.with_graph].reshape(-1)  # type: ignore[index]
        return tuple(second_product(k, s, y, m, theta))

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


@torch.enable_grad()
def second_product(k: Tensor, t: Tensor, h: Tensor, m: Tensor, theta: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives by h and each of θ of Σ M_ij ∂k_i/∂h_j + Σ r_i ∂k_i/∂t.

    Args:
        k: (n,), with its graph from the leaves t, 0-d, and h, (n,). m: the columns of M, and then r, (n n + n,).
    """
    n, total = h.numel(), torch.zeros_like(t)
    for j in range(n + 1 if k.requires_grad else 0):
        (x,) = torch.autograd.grad(k, h if j < n else t, m[j * n : (j + 1) * n], create_graph=True, allow_unused=True)
        if x is not None:
            total = total + (x[j] if j < n else x)
    wanted = [h, *theta]
    grads = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
    return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) if g is None else g for x, g in zip(wanted, grads)]


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


def _trace(
    f: Callable[..., Any], args: Sequence[Tensor], table: dict[Any, Any] | None = None, *, fake: bool = False
) -> fx.GraphModule:
    """Args:
    fake: with tensors that have no numbers, so that nothing can come of these.
    """
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rng = torch.get_rng_state()
    try:
        # Attention as products of matrices and a softmax: fused, it is one operation, of which there are only kernels.
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            if not fake:
                return make_fx(f, decomposition_table=table)(*args)
            return make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    except Exception as error:  # whatever f or the tracing of it raises: the callback will raise what f itself does
        if of_a_signal(error):
            raise
        text = str(error).strip().partition("\n")[0]
        if any(word in str(error) for word in _READING):
            text = "f leaves PyTorch: it reads the numbers of t or h, or of what it computes"
        raise NotCompiled(f"PyTorch does not trace it: {text or type(error).__name__}") from error
    finally:
        torch.set_rng_state(rng)


def _is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers: attention does so for its dropout, if it has any."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


# In what PyTorch says when the numbers of a tensor without any are asked for.
_READING = ("data-dependent", "data is not allocated", "access data pointer", "_local_scalar_dense", ".numpy()")


def _keep_constants(module: fx.GraphModule) -> None:
    """The tensors of a trace that f makes of Python's numbers, or that have integers: as tensors with numbers."""
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target)
        if isinstance(value, FakeTensor):
            if value.constant is None:
                raise NotCompiled("f makes a tensor whose numbers a trace does not show")
            setattr(module, node.target, value := value.constant)
        if value.is_complex():
            raise NotCompiled("f computes in complex numbers")


def _drop_counters(module: fx.GraphModule, inputs: Sequence[fx.Node], calls: int) -> dict[int, float]:
    """Leave out where f adds a number to a tensor that it holds, and makes nothing else of it: what is added in one of
    the `calls` of f, by the place of the tensor."""
    adds = {}
    for i, node in enumerate(inputs):
        nodes = list(_uses(node))
        if not nodes:
            continue
        if all(n.target is aten.add_.Tensor and isinstance(n.args[1], (int, float)) for n in nodes):
            steps: list[Any] = [(n.args[1], n.kwargs.get("alpha", 1)) for n in nodes]
            adds[i] = sum(float(x * alpha) for x, alpha in steps) / calls
            for x in reversed(nodes):
                module.graph.erase_node(x)
    if adds:
        module.graph.eliminate_dead_code()
        module.recompile()
    return adds


def _uses(node: fx.Node) -> Iterator[fx.Node]:
    """What uses a tensor, and what uses what adding to it in place gives, which is the same tensor."""
    for user in node.users:
        yield user
        if user.target is aten.add_.Tensor and user.args[0] is node:
            yield from _uses(user)


def _replace_copy(graph: fx.Graph, node: fx.Node) -> None:
    """`copy(to, x)` is x in the shape and dtype of `to`; PyTorch has no derivative of it."""
    x = node.args[1]
    like = node.meta["tensor_meta"]
    with graph.inserting_before(node):
        x = graph.call_function(aten._to_copy.default, (x,), {"dtype": like.dtype})
        x = graph.call_function(aten.expand.default, (x, list(like.shape)))
    node.replace_all_uses_with(x)
    graph.erase_node(node)
