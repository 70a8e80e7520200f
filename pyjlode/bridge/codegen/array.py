"""A graph as loops and matrix products over buffers that are allocated once.

A tensor that has been computed lies in an array of the function: in its arguments or in its work space `w`. How it lies
there is a tensor on PyTorch's meta device, so that PyTorch itself works out what a view of it is; views cost nothing.
Element-wise operations wait until something needs their numbers in memory, and are then one loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...capture.trace import Graph, decomposed
from ...errors import NotCompiled
from .code import Code
from .ops import ELEMENTWISE, is_setting, words
from .scalar import EMPTY, MOVES, NAMED_SETTINGS, ZEROS, Unknown, arguments, meta_of, padded, positions

aten = torch.ops.aten

# Operations on numbers in one loop; what is longer is cut.
_FUSED = 48
# Entries of a table of indices.
_TABLE = 1 << 20
# Products of numbers beyond which BLAS multiplies matrices, and up to which code is made for the very sizes: `FEW` and
# `SMALL` in julia/src/products.jl.
_FEW, _SMALL = 1 << 20, 1 << 12
_VIEWS = {
    *words("view permute transpose t expand select slice unsqueeze squeeze split split_with_sizes unsafe_split unbind"),
    *words("chunk narrow diagonal alias detach unfold movedim"),
}
_SAME = {"clone", "contiguous", "lift_fresh", "lift_fresh_copy", "alias", "detach", "alias_copy", "detach_copy"}
_RESHAPES = {"_unsafe_view", "reshape", "_reshape_alias", "view_copy"}

Build = Callable[[Code, Sequence[int]], int]


# Functions that are given a vector besides the state.
PRODUCTS = ("jvp", "vjp", "vjp_p", "pull")
# Bytes that a line of a cache has.
_LINE = 64


@dataclass(frozen=True)
class Leaf:
    """Numbers in memory.

    Attributes:
        array: the name of the array.
        view: on the meta device, how the tensor lies in the array, or in `table`.
        table: the name of a table of indices to the array, counted from 1; 0 in it stands for a zero.
        truth: the numbers are truth values, 1 and 0.
    """

    array: str
    view: Tensor
    table: str | None = None
    truth: bool = False

    def at(self, op: Callable[[Tensor], Tensor]) -> Leaf:
        return replace(self, view=op(self.view))


@dataclass(frozen=True)
class Value:
    """A tensor, not necessarily in memory: an expression of each of its elements.

    Attributes:
        leaves: in memory, each with a view of this shape.
        build: the expression, from the places of the leaves' elements.
        operations: how many there are in it.
    """

    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    build: Build
    operations: int = 0

    def expand(self, shape: Sequence[int]) -> Value:
        leaves = tuple(leaf.at(lambda x: x.expand(*shape)) for leaf in self.leaves)
        return replace(self, shape=tuple(shape), leaves=leaves)

    @property
    def leaf(self) -> Leaf | None:
        """Where it lies, if it lies in memory."""
        return self.leaves[0] if self.operations == 0 and len(self.leaves) == 1 else None


def _at_leaf(leaf: Leaf) -> Value:
    def build(code: Code, places: Sequence[int]) -> int:
        return code.make("ne", places[0], code.zero) if leaf.truth else places[0]

    return Value(tuple(leaf.view.shape), (leaf,), build)


@dataclass
class Emitted:
    """A Julia function.

    Attributes:
        constants: statements in front of it.
        body: its statements.
        work: numbers of work space.
    """

    constants: list[str]
    body: list[str]
    work: int

    def text(self, name: str) -> str:
        v = "v" if name in PRODUCTS else "_"
        return "\n".join(
            [*self.constants, f"function {name}(out, {v}, u, p, c, w, t)", *self.body, "    return nothing", "end"]
        )


def products(graph: Graph) -> int:
    """How many products of numbers there are in the products of matrices of a graph."""
    total = 0
    for node in graph.module.graph.nodes:
        factor = _FACTORS.get(getattr(node.target, "overloadpacket", None))
        if factor is not None:
            out, (*_, n) = meta_of(node).shape, meta_of(node.args[factor]).shape
            total += math.prod(out) * n
        elif node.target is aten.convolution.default:
            total += math.prod(meta_of(node).shape) * math.prod(meta_of(node.args[1]).shape[1:])
    return total


# Which argument of a product of matrices is the left one.
_FACTORS: dict[Any, int] = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}


class Layers:
    """Matrices among the tensors of a field that its functions want transposed: the transposes lie behind the
    constants, where Julia puts them before each solve. `Layer` in julia/src/products.jl says what the numbers of each
    are.

    Args:
        constants: numbers in front of them.
    """

    def __init__(self, constants: int) -> None:
        self.start = self.stop = constants
        self.known: dict[tuple[int, ...], int] = {}

    def place(self, leaf: Leaf, rows: int, columns: int, step: int) -> Leaf:
        """Where the transpose lies, (columns, rows), of a matrix in rows."""
        key = int(leaf.array == "p"), int(leaf.view.storage_offset()), rows, columns, step
        if key not in self.known:
            self.known[key] = self.stop
            self.stop += rows * columns
        start = self.known[key]
        whole = torch.empty(start + rows * columns, device="meta")
        return Leaf("c", whole[start:].view(columns, rows))

    @property
    def table(self) -> Tensor:
        """Of all of them, shape (6 layers,)."""
        return torch.tensor([[*key, to] for key, to in self.known.items()], dtype=torch.int64).reshape(-1)


def emit(graph: Graph, args: Sequence[Tensor], trained: int, outputs: Sequence[int], layers: Layers) -> Emitted:
    """The statements that compute some of the outputs of a graph and store them one after the other in `out`.

    Args:
        args: examples of its inputs, for shapes and dtypes: those that `graph.inputs` names, then the lifted tensors.
        trained: how many of the lifted tensors lie one after the other in `p`; the rest do in `c`.
        outputs: which.
        layers: of the field.

    Raises:
        NotCompiled: an operation is not known.
    """
    try:
        return _Emission(graph, args, trained, layers).run(outputs)
    except Unknown:
        try:
            return _Emission(decomposed(graph, args), args, trained, layers).run(outputs)
        except Unknown as unknown:
            raise NotCompiled(f"there is no Julia for {unknown}") from None


@dataclass
class Apart:
    """A field's value and its products by two functions, of which the second finds what the first computed.

    Attributes:
        keep: the value, if it is given an address for that; and at the start of its work space, what `pull` is to find.
        pull: the products by the state, and then by the trained tensors; its work space lies behind these.
        kept: how many numbers the first keeps for the second.
    """

    keep: Emitted
    pull: Emitted
    kept: int


def emit_apart(f: Graph, vjp: Graph, args: Sequence[Tensor], trained: int, layers: Layers) -> Apart:
    """Args:
        args, trained, layers: as in `emit`, the first of them of `vjp`.

    Raises:
        NotCompiled: an operation is not known.
    """
    try:
        return _Emission(_joined(f, vjp), args, trained, layers).run_apart()
    except Unknown:
        named = len(f.inputs)
        try:
            f = decomposed(f, (*args[:named], *args[len(vjp.inputs) :]))
            return _Emission(_joined(f, decomposed(vjp, args)), args, trained, layers).run_apart()
        except Unknown as unknown:
            raise NotCompiled(f"there is no Julia for {unknown}") from None


def _joined(f: Graph, vjp: Graph) -> Graph:
    """One graph of the outputs of `vjp`, and then that of `f`, in which what both compute is computed once."""
    joined, seen = fx.Graph(), {}
    attributes: dict[str, Any] = {}

    def key(node: fx.Node, args: Any, kwargs: Any) -> Any:
        return node.target, repr(args), repr(kwargs)

    def added(graph: Graph, inputs: Sequence[fx.Node], to: dict[fx.Node, fx.Node]) -> Any:
        given = iter(inputs)
        for node in graph.module.graph.nodes:
            if node.op == "placeholder":
                to[node] = next(given)
            elif node.op == "get_attr":
                value = getattr(graph.module, node.target)
                same = (x for x in joined.nodes if x.op == "get_attr" and _equal(attributes[x.target], value))
                to[node] = found = next(same, None) or joined.create_node("get_attr", f"constant_{len(attributes)}")
                attributes[str(found.target)] = value
            elif node.target in (aten.detach.default, aten.alias.default):
                to[node] = to[node.args[0]]
            elif node.op == "call_function":
                args, kwargs = (fx.node.map_arg(x, lambda n: to[n]) for x in (node.args, node.kwargs))
                place = key(node, args, kwargs)
                if place not in seen:
                    seen[place] = joined.create_node("call_function", node.target, args, kwargs, node.name)
                    seen[place].meta = node.meta
                to[node] = seen[place]
        (output,) = (n for n in graph.module.graph.nodes if n.op == "output")
        return fx.node.map_arg(output.args[0], lambda n: to[n])

    inputs = []
    for node in vjp.module.graph.nodes:
        if node.op == "placeholder":
            inputs.append(joined.placeholder(node.name))
            inputs[-1].meta = node.meta
    products = added(vjp, inputs, {})
    named = len(f.inputs)
    value = added(f, [*inputs[:named], *inputs[len(vjp.inputs) :]], {})
    value = value[0] if isinstance(value, (tuple, list)) else value
    joined.output((*products, value))
    return Graph(cast(Any, SimpleNamespace(graph=joined, **attributes)), vjp.inputs)


def _equal(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x is y
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)


class _Emission:
    def __init__(self, graph: Graph, args: Sequence[Tensor], trained: int, layers: Layers) -> None:
        self.graph, self.args, self.trained, self.layers = graph, args, trained, layers
        self.dtype = args[1].dtype
        self.lanes = 32 // self.dtype.itemsize
        self.constants: list[str] = []
        self.lines: list[str] = []
        self.work = 0
        self.rooms: dict[str, int] | None = None  # buffers with names of their own, and how many numbers each has
        self.tables: dict[tuple, str] = {}
        self.entries: dict[str, Tensor] = {}
        self.aims: dict[fx.Node, Tensor] = {}
        self.node: fx.Node | None = None
        self.origin = ""

    # The graph.

    def _inputs(self) -> Any:
        named = len(self.graph.inputs)
        for name, x in zip(self.graph.inputs, self.args):
            if name == "t":
                yield Value((), (), lambda code, places: code.load("t", 1))
            else:
                yield _at_leaf(Leaf({"h": "u", "v": "v"}[name], torch.empty(x.shape, device="meta")))
        for start, stop, array in ((named, named + self.trained, "p"), (named + self.trained, len(self.args), "c")):
            offset, whole = 0, torch.empty(sum(x.numel() for x in self.args[start:stop]), device="meta")
            for x in self.args[start:stop]:
                if x.dtype != self.dtype and x.dtype == torch.float64:
                    raise NotCompiled("f holds float64 tensors and the state is float32")
                yield _at_leaf(Leaf(array, whole[offset : offset + x.numel()].view(x.shape)))
                offset += x.numel()

    def run(self, which: Sequence[int]) -> Emitted:
        nodes = [self.outputs[i] for i in which]
        self.needed = _ancestors(nodes)
        values: dict[fx.Node, Any] = {}
        outs = self.aim_all(nodes)
        self.evaluate(self.needed, values)
        self.finish(nodes, outs, values)
        return Emitted(self.constants, self.lines, self.work)

    @functools.cached_property
    def outputs(self) -> list[Any]:
        output = next(n for n in self.graph.module.graph.nodes if n.op == "output").args[0]
        return list(output) if isinstance(output, (tuple, list)) else [output]

    def aim_all(self, nodes: Sequence[Any]) -> list[Tensor]:
        """Where outputs go, one after the other."""
        sizes = [self.args[0].numel() if n is None else math.prod(meta_of(n).shape) for n in nodes]
        whole, offset, outs = torch.empty(sum(sizes), device="meta"), 0, []
        for node, size in zip(nodes, sizes):
            outs.append(whole[offset : offset + size].view(meta_of(node).shape))
            offset += size
            self.aim(node, outs[-1])
        return outs

    def evaluate(self, which: set[fx.Node], values: dict[fx.Node, Any]) -> None:
        """Add the values of some nodes to `values`, where those that they need are."""
        module, inputs = self.graph.module, self._inputs()
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node not in which:
                continue
            elif node.op == "get_attr":
                values[node] = getattr(module, node.target)
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, lambda n: values[n])
                kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
                value = self.call(node, args, kwargs)
                users = sum(user in self.needed for user in node.users)
                if isinstance(value, Value) and value.operations and (users > 1 or value.operations > _FUSED):
                    value = self.stored(value)
                values[node] = value

    def finish(self, nodes: Sequence[Any], outs: Sequence[Tensor], values: dict[fx.Node, Any]) -> None:
        for node, out in zip(nodes, outs):
            value = self.value(values[node])
            leaf = value.leaf
            if leaf is None or leaf.array != "out" or leaf.view.storage_offset() != out.storage_offset():
                self.store(Leaf("out", out), value, "the result")

    def run_apart(self) -> Apart:
        """Of a graph of products, and last a value."""
        rooms: dict[str, int] = {}
        self.rooms = rooms
        products, value, nodes = self.outputs[1:-1], self.outputs[-1:], list(self.graph.module.graph.nodes)
        later = {n for n, name in zip(nodes, self.graph.inputs) if name == "v"}  # what depends on the cotangent
        for node in nodes:
            if any(x in later for x in node.all_input_nodes):
                later.add(node)
        of_products, of_value = _ancestors(products), _ancestors(value)
        self.needed = of_products | of_value
        first = of_products - later
        after = {x for node in self.needed - first for x in node.all_input_nodes} | {n for n in products if n in first}
        values: dict[fx.Node, Any] = {}
        self.evaluate(first, values)
        crossing = [n for n in nodes if n in first and n in after]
        for node in crossing:
            values[node] = fx.node.map_aggregate(values[node], self.in_memory)
        found = {x.array for v in arguments([values[n] for n in crossing]) if isinstance(v, Value) for x in v.leaves}
        common, self.lines = self.lines, []
        before = len(rooms)
        outs = self.aim_all(value)
        self.evaluate(of_value - first, values)
        self.finish(value, outs, values)
        of_f, self.lines = self.lines, []
        between = len(rooms)
        outs = self.aim_all(products)
        self.evaluate(of_products - first, values)
        self.finish(products, outs, values)

        names, line = list(rooms), _LINE // self.dtype.itemsize
        kept = [name for name in names[:before] if name in found]
        at, end = _places(rooms, kept, "w", 0)
        end = -(-end // line) * line  # what is kept of the next call begins with a line, too
        mine, work = _places(rooms, [name for name in names[:between] if name not in found], "w", end)
        size = sum(x.numel() for x in outs)
        theirs, room = _places(rooms, names[between:], "out", size)
        of_f = ["    out.address == C_NULL && return nothing", *of_f]
        keep = Emitted(self.constants, [*at, *mine, *common, *of_f], work)
        return Apart(keep, Emitted(self.constants, [*at, *theirs, *self.lines], room - size), end)

    def in_memory(self, x: Any) -> Any:
        return self.stored(x) if isinstance(x, Value) and x.operations else x

    def aim(self, node: Any, out: Tensor) -> None:
        """Have what an output is a view of be computed where the output lies, if nothing else is made of it."""
        while sum(user in self.needed or user.op == "output" for user in node.users) == 1:
            target: Any = node.target
            if target in (aten.view.default, aten._unsafe_view.default) and out.is_contiguous():
                out = out.view(meta_of(node.args[0]).shape)
            elif target is aten.permute.default:
                dims = [d % out.dim() for d in node.args[1]]
                out = out.permute([dims.index(d) for d in range(out.dim())])
            elif target is aten.t.default:
                out = out.t()
            elif target in (aten.squeeze.dim, aten.unsqueeze.default) and out.is_contiguous():
                out = out.view(meta_of(node.args[0]).shape)
            elif target not in (aten.detach.default, aten.alias.default):
                if out.is_contiguous():
                    self.aims[node] = out
                return
            node = node.args[0]

    def call(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return target(*args, **kwargs)  # operator.getitem
        if not target._schema.name.startswith("aten::"):
            raise Unknown(str(target))
        name = target._schema.name.removeprefix("aten::")
        self.origin, self.node = node.name, node
        if name in EMPTY or name in ZEROS:
            return torch.zeros(meta_of(node).shape, dtype=meta_of(node).dtype)
        if not any(isinstance(x, Value) for x in arguments((args, kwargs))):
            return target(*args, **kwargs)
        if name in ("ones_like", "full_like", "new_full", "new_ones"):
            fill = 1 if "ones" in name else args[1 if name == "full_like" else 2]
            if not isinstance(fill, Value):
                return torch.full(meta_of(node).shape, fill, dtype=meta_of(node).dtype)
        dtype = getattr(meta_of(node), "dtype", None)
        if dtype is not None and name != "_to_copy":
            if dtype.is_complex:
                raise NotCompiled("f computes in complex numbers")
            if dtype.is_floating_point and dtype != self.dtype:
                raise NotCompiled(f"f computes in {str(dtype).removeprefix('torch.')} at {node.name}")
        if name in ELEMENTWISE:
            return self.elementwise(name, args, kwargs)
        if name in _SAME:
            return args[0]
        if name in ("fill", "copy"):
            return self.viewed(aten.expand.default, self.value(args[1]), [list(meta_of(node).shape)])
        if name in _RESHAPES:
            return self.viewed(aten.view.default, self.value(args[0]), args[1:])
        short = name.removesuffix("_copy")
        if short in _VIEWS:
            view = target if short == name else getattr(getattr(aten, short), target._overloadname)
            return self.viewed(view, self.value(args[0]), args[1:])
        special = getattr(self, f"do_{name}", None)
        if special is not None:
            return special(*args, **kwargs)
        if name == "convolution_backward":
            return self.convolution_backward(node, *args)
        if name in MOVES:
            return self.moved(target, args, kwargs)
        raise Unknown(f"aten.{name}")

    def value(self, x: Any) -> Value:
        if isinstance(x, Value):
            return x
        if not isinstance(x, Tensor):
            return Value((), (), lambda code, places: code.constant(x))
        if x.is_complex():
            raise NotCompiled("f computes in complex numbers")
        x = x.detach()
        numbers = x.reshape(-1)
        if x.numel() and bool((numbers == numbers[0]).all()):
            number = numbers[0].item()
            return Value(tuple(x.shape), (), lambda code, places: code.constant(number))
        if x.numel() > _TABLE:
            raise NotCompiled("f makes a large tensor that depends on nothing")
        code = Code(self.dtype == torch.float64)
        text = ", ".join(code.literal(float(i)) for i in numbers.tolist())
        name = f"k{len(self.constants) + 1}"
        self.constants.append(f"const {name} = {code.julia}[{text}]")
        return _at_leaf(Leaf(name, torch.empty(x.shape, device="meta"), None, x.dtype == torch.bool))

    # Loops.

    def room(self, shape: Sequence[int]) -> Leaf:
        """A new buffer."""
        if self.rooms is not None:
            name = f"r{len(self.rooms) + 1}"
            self.rooms[name] = math.prod(shape)
            return Leaf(name, torch.empty(tuple(shape), device="meta"))
        start, self.work = self.work, self.work + math.prod(shape)
        whole = torch.empty(self.work, device="meta")
        return Leaf("w", whole[start:].view(tuple(shape)))

    def aimed(self, shape: Sequence[int]) -> Leaf:
        """Where the result of the operation at hand goes: to its output, or to a buffer."""
        out = None if self.node is None else self.aims.pop(self.node, None)
        if out is not None and tuple(out.shape) == tuple(shape):
            return Leaf("out", out)
        return self.room(shape)

    def stored(self, value: Value) -> Value:
        """The same in memory."""
        if value.leaf is not None:
            return value
        code = Code(True)
        places = [code.load("x", i) for i in range(len(value.leaves))]
        leaf = replace(self.room(value.shape), truth=code.is_truth(value.build(code, places)))
        self.store(leaf, value)
        return _at_leaf(leaf)

    def store(self, to: Leaf, value: Value, note: str = "") -> None:
        self.loop(to.view.shape, [to, *value.leaves], value.build, note)

    def loop(self, shape: Sequence[int], leaves: Sequence[Leaf], build: Build, note: str = "") -> None:
        """A loop that stores an expression of leaves [1:] to leaf [0]."""
        if math.prod(shape) == 0:
            return
        views = [leaf.view.expand(shape) for leaf in leaves]
        dims = _merged(shape, [v.stride() for v in views])
        self.lines.append(f"    # {note or self.origin}")
        self.nest(dims, lambda names: self.body(leaves, views, dims, names, build), True)

    def nest(self, dims: Sequence[_Dim], body: Callable[[list[str]], list[str]], parallel: bool) -> None:
        names = [f"i{d + 1}" for d in range(len(dims))]
        lines = []
        for d, (dim, name) in enumerate(zip(dims, names)):
            macro = "@simd ivdep " if parallel and d == len(dims) - 1 else ""
            lines.append(
                "    " + "    " * d + ("@inbounds " if d == 0 else "") + f"{macro}for {name} in 0:{dim.size - 1}"
            )
        inner = "    " * (len(dims) + 1)
        lines += [inner + line for line in body(names)]
        lines += ["    " * d + "end" for d in range(len(dims), 0, -1)]
        self.lines += lines

    def body(
        self,
        leaves: Sequence[Leaf],
        views: Sequence[Tensor],
        dims: Sequence[_Dim],
        names: Sequence[str],
        build: Build,
        form: str = "{to} = {value}",
    ) -> list[str]:
        code = Code(self.dtype == torch.float64, loop=True)
        texts = [
            _index(leaf, view, [dim.strides[j] for dim in dims], names)
            for j, (leaf, view) in enumerate(zip(leaves, views))
        ]
        places = [code.load(*text) for text in texts[1:]]
        result = code.number(build(code, places))
        to = f"{leaves[0].array}[{texts[0][1]}]"
        *lines, last = code.lines([result], [to], "")
        value = last.removeprefix(f"{to} = ")
        return [*lines, form.format(to=to, value=value)]

    # Element-wise operations and views.

    def elementwise(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Value:
        formula = ELEMENTWISE[name]
        for key in kwargs:
            if key not in NAMED_SETTINGS:
                raise Unknown(f"aten.{name} with {key}=")
        kwargs = {k: v for k, v in kwargs.items() if k in ("alpha", "rounding_mode", "approximate", "value")}
        slots = [i for i, x in enumerate(args) if not is_setting(name, i, x)]
        values = [self.value(args[i]) for i in slots]
        values = [self.stored(v) if v.operations > _FUSED // 2 and len(values) > 1 else v for v in values]
        shape = tuple(torch.broadcast_shapes(*(v.shape for v in values)))
        counts = [len(v.leaves) for v in values]
        leaves = tuple(leaf.at(lambda x: x.expand(shape)) for v in values for leaf in v.leaves)
        logical, selects = name.startswith(("logical", "bitwise")), name in ("where", "masked_fill")

        def build(code: Code, places: Sequence[int]) -> int:
            items, start = list(args), 0
            for i, v, count in zip(slots, values, counts):
                place = v.build(code, places[start : start + count])
                start += count
                items[i] = code.truth(place) if logical else place if selects else code.number(place)
            return formula(code, *items, **kwargs)

        return Value(shape, leaves, build, 1 + sum(v.operations for v in values))

    def viewed(self, op: Any, value: Value, rest: Sequence[Any]) -> Any:
        if any(isinstance(x, Value) for x in arguments(rest)):
            raise NotCompiled("f indexes by numbers that it computes")
        try:
            outs = [op(leaf.view, *rest) for leaf in value.leaves]
        except RuntimeError:  # it is no view of how one of them lies
            value = self.copied(value)
            outs = [op(leaf.view, *rest) for leaf in value.leaves]
        if not outs:
            example = op(torch.empty(value.shape, device="meta"), *rest)
            if isinstance(example, Tensor):
                return replace(value, shape=tuple(example.shape))
            return [replace(value, shape=tuple(x.shape)) for x in example]
        if isinstance(outs[0], Tensor):
            return self._with(value, outs)
        return [self._with(value, parts) for parts in zip(*outs)]

    def _with(self, value: Value, views: Sequence[Tensor]) -> Value:
        leaves = tuple(replace(leaf, view=view) for leaf, view in zip(value.leaves, views))
        return replace(value, shape=tuple(views[0].shape), leaves=leaves)

    def copied(self, value: Value) -> Value:
        """The same in memory, row by row."""
        if value.leaf is not None and value.leaf.table is None and value.leaf.view.is_contiguous():
            return value
        leaf = replace(self.room(value.shape), truth=value.leaf is not None and value.leaf.truth)
        if value.leaf is None:
            return self.stored(value)
        self.store(leaf, value)
        return _at_leaf(leaf)

    def moved(self, op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What PyTorch makes of the indices of the elements, as a table of indices."""
        if any(isinstance(x, Value) for x in arguments((args[1:], kwargs))):
            raise NotCompiled("f indexes by numbers that it computes")
        leaf = self.stored(self.value(args[0])).leaf
        if leaf is None:
            raise Unknown(str(op))
        if op is aten.constant_pad_nd.default and len(args) > 2 and args[2] != 0:
            raise Unknown("aten.constant_pad_nd with a value")
        view = leaf.view
        if leaf.table is None:
            first, span = int(view.storage_offset()), 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride()))
            base = torch.arange(first + 1, first + 1 + max(span, 0))
        else:
            first, base = 0, self.entries[leaf.table]
        places = base.as_strided(view.shape, view.stride(), view.storage_offset() - first).contiguous()
        if "_pad" in op._schema.name:
            places = places.double()  # PyTorch pads no integers
        kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "memory_format")}
        out = op(places, *args[1:], **kwargs)
        if isinstance(out, Tensor):
            return _at_leaf(self.table(leaf, out.to(torch.int64)))
        return [_at_leaf(self.table(leaf, x)) for x in out]

    def table(self, leaf: Leaf, positions: Tensor) -> Leaf:
        if positions.numel() > _TABLE:
            raise NotCompiled("f moves too many elements by index")
        positions = positions.contiguous()
        key = tuple(positions.reshape(-1).tolist())
        if key not in self.tables:
            name = f"k{len(self.constants) + 1}"
            self.tables[key] = name
            self.entries[name] = positions.reshape(-1)
            self.constants.append(f"const {name} = Int[{', '.join(map(str, key))}]")
        return Leaf(leaf.array, torch.empty(positions.shape, device="meta"), self.tables[key], leaf.truth)

    def do__to_copy(self, x: Value, dtype: torch.dtype | None = None, **kwargs: Any) -> Value:
        if dtype is None or dtype == self.dtype:
            return replace(x, build=lambda c, places: c.number(x.build(c, places)), operations=x.operations + 1)
        if dtype == torch.bool:
            return replace(x, build=lambda c, places: c.truth(x.build(c, places)), operations=x.operations + 1)
        raise NotCompiled(f"f computes in {str(dtype).removeprefix('torch.')}")

    # Into parts of a tensor.

    def do_cat(self, parts: Sequence[Any], dim: int = 0) -> Value:
        values = [v for v in map(self.value, parts) if v.shape != (0,)]
        dim %= len(values[0].shape)
        shape = list(values[0].shape)
        shape[dim] = sum(v.shape[dim] for v in values)
        leaf, start = self.room(shape), 0
        for v in values:
            self.store(replace(leaf, view=leaf.view.narrow(dim, start, v.shape[dim])), v)
            start += v.shape[dim]
        return _at_leaf(leaf)

    def do_stack(self, parts: Sequence[Any], dim: int = 0) -> Value:
        return self.do_cat([self.viewed(aten.unsqueeze.default, self.value(x), (dim,)) for x in parts], dim)

    def into(self, start: Any, shape: Sequence[int], op: Any, part: Any, *rest: Any) -> Value:
        """A tensor that is `start` everywhere but in `op(..., *rest)`, where it is `part`."""
        leaf = self.room(shape)
        self.store(leaf, self.value(start))
        self.store(leaf.at(lambda x: op(x, *rest)), self.value(part))
        return _at_leaf(leaf)

    def do_slice_scatter(self, x: Any, part: Any, *rest: Any, **kwargs: Any) -> Value:
        return self.into(x, self.value(x).shape, lambda v, *r: aten.slice.Tensor(v, *r, **kwargs), part, *rest)

    def do_select_scatter(self, x: Any, part: Any, *rest: Any) -> Value:
        return self.into(x, self.value(x).shape, aten.select.int, part, *rest)

    def do_diagonal_scatter(self, x: Any, part: Any, *rest: Any) -> Value:
        return self.into(x, self.value(x).shape, aten.diagonal.default, part, *rest)

    def do_slice_backward(self, g: Any, shape: Sequence[int], *rest: Any) -> Value:
        return self.into(0.0, shape, aten.slice.Tensor, g, *rest)

    def do_select_backward(self, g: Any, shape: Sequence[int], *rest: Any) -> Value:
        return self.into(0.0, shape, aten.select.int, g, *rest)

    def do_diagonal_backward(self, g: Any, shape: Sequence[int], *rest: Any) -> Value:
        return self.into(0.0, shape, aten.diagonal.default, g, *rest)

    def do_constant_pad_nd(self, x: Any, pad: Sequence[int], value: float = 0.0) -> Value:
        v = self.value(x)
        before = [0] * len(v.shape)
        after = list(before)
        for i in range(len(pad) // 2):
            before[-1 - i], after[-1 - i] = pad[2 * i], pad[2 * i + 1]
        if min(pad) < 0:
            return self.moved(aten.constant_pad_nd.default, (x, pad), {})

        def inner(y: Tensor) -> Tensor:
            for d, (start, n) in enumerate(zip(before, v.shape)):
                y = y.narrow(d, start, n)
            return y

        return self.into(float(value), [n + a + b for n, a, b in zip(v.shape, before, after)], inner, v)

    def do_index_put(self, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Value:
        v = self.value(x)
        if any(isinstance(i, Value) for i in indices):
            raise NotCompiled("f indexes by numbers that it computes")
        leaf = self.room(v.shape)
        self.store(leaf, v)
        first = int(leaf.view.storage_offset()) + 1
        places = torch.arange(first, first + leaf.view.numel()).reshape(v.shape)
        places = places[tuple(slice(None) if i is None else i for i in indices)]
        self.scatter(leaf, places, self.value(values), accumulate)
        return _at_leaf(leaf)

    do__unsafe_index_put = do_index_put

    def do_index_add(self, x: Any, dim: int, index: Any, source: Any, *, alpha: float = 1) -> Value:
        v, added = self.value(x), self.elementwise("mul", (source, alpha), {})
        dim %= max(len(v.shape), 1)
        if not isinstance(index, Value):
            return self.do_index_put(x, [*[None] * dim, index], added, True)
        added, back = self.led(added, dim)
        n, rest = v.shape[dim], [1] * (len(v.shape) - 1)
        columns = self.viewed(aten.view.default, self.stored(index), ([1, -1, *rest],))
        hit = self.elementwise("eq", (columns, torch.arange(n).reshape(n, 1, *rest)), {})
        whole = self.viewed(aten.unsqueeze.default, added, (0,))
        total = self.do_sum(self.elementwise("where", (hit, whole, 0.0), {}), [1])
        return self.elementwise("add", (x, self.viewed(aten.permute.default, total, (back,))), {})

    def do_scatter_add(self, x: Any, dim: int, index: Any, source: Any) -> Value:
        v = self.value(x)
        if isinstance(index, Value):
            raise NotCompiled("f indexes by numbers that it computes")
        part = self.stored(self.value(source))
        inner = self._with(part, [leaf.view[tuple(slice(n) for n in index.shape)] for leaf in part.leaves])
        return self.added(v, positions(torch.arange(math.prod(v.shape)).reshape(v.shape), dim, index), inner)

    def added(self, start: Value, places: Tensor, part: Value) -> Value:
        """`start` with `part` added at flat places, of which some may be the same."""
        leaf = self.room(start.shape)
        self.store(leaf, start)
        self.scatter(leaf, places + int(leaf.view.storage_offset()) + 1, part, True)
        return _at_leaf(leaf)

    def pad_backward(self, pad: Any, g: Any, x: Any, padding: Sequence[int]) -> Value:
        shape = self.value(x).shape
        return self.added(self.value(0.0).expand(shape), padded(pad, shape, padding), self.value(g))

    def do_reflection_pad1d_backward(self, g: Any, x: Any, padding: Sequence[int]) -> Value:
        return self.pad_backward(aten.reflection_pad1d, g, x, padding)

    def do_reflection_pad2d_backward(self, g: Any, x: Any, padding: Sequence[int]) -> Value:
        return self.pad_backward(aten.reflection_pad2d, g, x, padding)

    def do_replication_pad1d_backward(self, g: Any, x: Any, padding: Sequence[int]) -> Value:
        return self.pad_backward(aten.replication_pad1d, g, x, padding)

    def do_replication_pad2d_backward(self, g: Any, x: Any, padding: Sequence[int]) -> Value:
        return self.pad_backward(aten.replication_pad2d, g, x, padding)

    def do_searchsorted(
        self, edges: Any, x: Any, *, right: bool = False, side: str | None = None, **kwargs: Any
    ) -> Value:
        """How many of the edges lie before each x."""
        if len(self.value(edges).shape) > 1 or kwargs.get("sorter") is not None:
            raise NotCompiled("f searches in more than one row of numbers")
        before = "le" if right or side == "right" else "lt"
        x = self.viewed(aten.unsqueeze.default, self.value(x), (-1,))
        return self.do_sum(self.elementwise(before, (edges, x), {}), [-1])

    def do_bucketize(self, x: Any, edges: Any, *, right: bool = False, **kwargs: Any) -> Value:
        return self.do_searchsorted(edges, x, right=right)

    def led(self, x: Value, dim: int) -> tuple[Value, list[int]]:
        """x with one of its dimensions first, and how `permute` puts it back."""
        order = [dim, *(d for d in range(len(x.shape)) if d != dim)]
        return self.viewed(aten.permute.default, x, (order,)), [order.index(d) for d in range(len(order))]

    def do_index_select(self, x: Any, dim: int, index: Any) -> Any:
        """By numbers that are computed: of all elements, the sum of those at the index; NaN where there is none."""
        if not isinstance(index, Value):
            return self.moved(aten.index_select.default, (x, dim, index), {})
        value, back = self.led(self.value(x), dim)
        n, rest = value.shape[0], [1] * (len(value.shape) - 1)
        rows = self.viewed(aten.view.default, self.stored(index), ([-1, 1, *rest],))
        hit = self.elementwise("eq", (rows, torch.arange(n).reshape(1, n, *rest)), {})
        whole = self.viewed(aten.unsqueeze.default, value, (0,))
        picked = self.do_sum(self.elementwise("where", (hit, whole, 0.0), {}), [1])
        each = self.viewed(aten.select.int, rows, (1, 0))
        bounds = [self.elementwise(op, (each, bound), {}) for op, bound in (("ge", 0.0), ("lt", float(n)))]
        there = self.elementwise("logical_and", tuple(bounds), {})
        picked = self.elementwise("where", (there, picked, math.nan), {})
        return self.viewed(aten.permute.default, picked, (back,))

    def do__unsafe_index(self, x: Any, indices: Sequence[Any]) -> Any:
        return self.moved(aten.index.Tensor, (x, indices), {})

    def scatter(self, leaf: Leaf, places: Tensor, part: Value, accumulate: bool) -> None:
        """Store or add `part` at indices of an array, one after the other."""
        table = self.table(leaf, places)
        leaves = [table, *(x.at(lambda y: y.expand(places.shape)) for x in part.leaves)]
        views = [x.view for x in leaves]
        dims = _merged(places.shape, [v.stride() for v in views])
        form = "{to} += {value}" if accumulate else "{to} = {value}"
        self.lines.append(f"    # {self.origin}")
        self.nest(dims, lambda names: self.body(leaves, views, dims, names, part.build, form), False)

    # Reductions.

    def reduce(self, x: Any, dims: Any, keepdim: bool, op: str, start: str) -> Value:
        """`op` is of "{to}" and "{value}", and `start` what it starts from."""
        value = self.value(x)
        if not value.shape:  # one number; PyTorch lets its dimension be named
            value, dims, keepdim = self.viewed(aten.unsqueeze.default, value, (0,)), None, False
        rank = len(value.shape)
        dims = [dims] if isinstance(dims, int) else dims
        over = sorted(d % rank for d in dims) if dims else list(range(rank))
        kept = [d for d in range(rank) if d not in over]
        whole = self.aimed(
            [1 if d in over else n for d, n in enumerate(value.shape)] if keepdim else [value.shape[d] for d in kept]
        )
        leaf = whole.at(lambda x: x.view([value.shape[d] for d in kept]))
        views = [leaf.view, *(x.view.permute(*kept, *over) for x in value.leaves)]
        outer = _merged([value.shape[d] for d in kept], [v.stride()[: len(kept)] for v in views])
        zero_strides = [(0,) * len(over), *(v.stride()[len(kept) :] for v in views[1:])]
        inner = _merged([value.shape[d] for d in over], zero_strides)
        leaves = [leaf, *value.leaves]
        self.lines.append(f"    # {self.origin}")
        if math.prod(value.shape) == 0:
            self.nest(outer, lambda names: [f"{_text(leaf, views[0], outer, 0, names)} = {start}"], True)
        elif kept and over and max(over) < max(kept) and outer and outer[-1].size > 4:
            # The rows of what is reduced, one after the other, into a row.
            self.nest(outer, lambda names: [f"{_text(leaf, views[0], outer, 0, names)} = {start}"], True)
            every = [*inner, *outer]
            self.nest(every, lambda names: self.body(leaves, views, every, names, value.build, "{to} = " + op), True)
        else:
            names = [f"i{d + 1}" for d in range(len(outer) + len(inner))]
            form = "total = " + op.replace("{to}", "total")
            every = [*outer, *inner]
            body = self.body(leaves, views, every, names, value.build, form)
            to = _text(leaf, views[0], every, 0, names)
            lines = []
            for d, (dim, name) in enumerate(zip(every, names)):
                if d == len(outer):
                    lines.append("    " + "    " * d + f"total = {start}")
                macro = "@simd ivdep " if d == len(every) - 1 and d >= len(outer) else ""
                inbounds = "@inbounds " if d == 0 else ""
                lines.append("    " + "    " * d + f"{inbounds}{macro}for {name} in 0:{dim.size - 1}")
            if not inner:
                lines.append("    " * (len(every) + 1) + f"total = {start}")
            lines += ["    " * (len(every) + 1) + line for line in body]
            for d in range(len(every), 0, -1):
                if d == len(outer):
                    lines.append("    " * (d + 1) + f"{to} = total")
                lines.append("    " * d + "end")
            if not outer:
                lines.append(f"    {to} = total")
            self.lines += lines
        return _at_leaf(whole)

    def do_sum(self, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        value = self.value(x)
        over = range(len(value.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
        if value.shape and over and all(value.shape[d] == 1 for d in over):  # a batch of one
            some = {d % len(value.shape) for d in over}
            shape = [n for d, n in enumerate(value.shape) if keepdim or d not in some]
            return self.viewed(aten.view.default, value, (shape,))
        return self.reduce(x, dims, keepdim, "{to} + {value}", self.literal(0.0))

    def do_mean(self, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        total = self.do_sum(x, dims, keepdim)
        count = math.prod(self.value(x).shape) / max(math.prod(total.shape), 1)
        return self.elementwise("div", (total, float(count)), {})

    def do_var(self, x: Any, dims: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Value:
        off = self.stored(self.elementwise("sub", (x, self.do_mean(x, dims, True)), {}))
        total = self.do_sum(self.elementwise("mul", (off, off), {}), dims, keepdim)
        count = math.prod(off.shape) / max(math.prod(total.shape), 1)
        return self.elementwise("div", (total, count - (1 if correction is None else correction)), {})

    def do_var_mean(self, x: Any, dims: Any = None, *, keepdim: bool = False, **kwargs: Any) -> list[Value]:
        return [self.do_var(x, dims, keepdim=keepdim, **kwargs), self.stored(self.do_mean(x, dims, keepdim))]

    def do_std(self, *args: Any, **kwargs: Any) -> Value:
        return self.elementwise("sqrt", (self.do_var(*args, **kwargs),), {})

    def do_prod(self, x: Any, dim: int | None = None, keepdim: bool = False, dtype: Any = None) -> Value:
        return self.reduce(x, dim, keepdim, "{to} * ({value})", self.literal(1.0))

    def do_amax(self, x: Any, dims: Any = (), keepdim: bool = False) -> Value:
        return self.reduce(x, dims, keepdim, "max({to}, {value})", self.literal(-math.inf))

    def do_amin(self, x: Any, dims: Any = (), keepdim: bool = False) -> Value:
        return self.reduce(x, dims, keepdim, "min({to}, {value})", self.literal(math.inf))

    def do_max(self, x: Any, *rest: Any) -> Value:
        if rest:
            raise Unknown("aten.max.dim")
        return self.do_amax(x)

    def do_min(self, x: Any, *rest: Any) -> Value:
        if rest:
            raise Unknown("aten.min.dim")
        return self.do_amin(x)

    def do_any(self, x: Any, dims: Any = None, keepdim: bool = False) -> Value:
        nonzero = self.elementwise("logical_or", (x, False), {})
        return self.elementwise("ne", (self.do_sum(nonzero, dims, keepdim), 0.0), {})

    def do_all(self, x: Any, dims: Any = None, keepdim: bool = False) -> Value:
        zero = self.elementwise("logical_not", (x,), {})
        return self.elementwise("eq", (self.do_sum(zero, dims, keepdim), 0.0), {})

    def do_linalg_vector_norm(
        self, x: Any, ord: float = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> Value:
        size = self.elementwise("abs", (x,), {})
        if ord == math.inf:
            return self.do_amax(size, dims or (), keepdim)
        if ord == -math.inf:
            return self.do_amin(size, dims or (), keepdim)
        if ord == 0:
            return self.do_sum(self.elementwise("ne", (x, 0.0), {}), dims, keepdim)
        total = self.do_sum(self.elementwise("pow", (size, float(ord)), {}), dims, keepdim)
        return total if ord == 1 else self.elementwise("pow", (total, 1 / ord), {})

    def do_norm(self, x: Any, p: float | None = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
        return self.do_linalg_vector_norm(x, 2 if p is None else p, dims, keepdim)

    def do__softmax(self, x: Any, dim: int, half_to_float: bool = False) -> Value:
        value = self.stored(self.value(x))
        shifted = self.elementwise("sub", (value, self.do_amax(value, dim, True)), {})
        exps = self.stored(self.elementwise("exp", (shifted,), {}))
        return self.elementwise("div", (exps, self.do_sum(exps, dim, True)), {})

    def do__log_softmax(self, x: Any, dim: int, half_to_float: bool = False) -> Value:
        value = self.stored(self.value(x))
        shifted = self.stored(self.elementwise("sub", (value, self.do_amax(value, dim, True)), {}))
        total = self.do_sum(self.elementwise("exp", (shifted,), {}), dim, True)
        return self.elementwise("sub", (shifted, self.elementwise("log", (total,), {})), {})

    def do_logsumexp(self, x: Any, dims: Any, keepdim: bool = False) -> Value:
        value = self.stored(self.value(x))
        top = self.do_amax(value, dims, True)
        exps = self.elementwise("exp", (self.elementwise("sub", (value, top), {}),), {})
        out = self.elementwise("add", (self.elementwise("log", (self.do_sum(exps, dims, True),), {}), top), {})
        if keepdim:
            return out
        return self.viewed(aten.squeeze.dims, self.stored(out), ([dims] if isinstance(dims, int) else list(dims),))

    def do_cumsum(self, x: Any, dim: int, dtype: Any = None) -> Value:
        return self.cumulate(x, dim, "+")

    def do_cumprod(self, x: Any, dim: int, dtype: Any = None) -> Value:
        return self.cumulate(x, dim, "*")

    def cumulate(self, x: Any, dim: int, op: str) -> Value:
        value = self.value(x)
        leaf = self.room(value.shape)
        self.store(leaf, value)
        if not value.shape or value.shape[dim] < 2:
            return _at_leaf(leaf)
        step = leaf.view.stride()[dim]
        rest = leaf.view.narrow(dim, 1, value.shape[dim] - 1).movedim(dim, 0)
        dims = [_Dim(n, (s,)) for n, s in zip(rest.shape, rest.stride())]
        self.lines.append(f"    # {self.origin}")

        def body(names: list[str]) -> list[str]:
            array, index = _index(leaf, rest, [dim.strides[0] for dim in dims], names)
            return [f"{array}[{index}] = {array}[{index} - {step}] {op} {array}[{index}]"]

        self.nest(dims, body, False)
        return _at_leaf(leaf)

    # Products of matrices.

    def matrix(self, x: Any) -> tuple[Leaf, int, int]:
        """Where a matrix (or a batch of them) lies, and its steps from row to row and column to column; one is 1."""
        value = self.stored(self.value(x))
        for _ in range(2):
            leaf = value.leaf
            if leaf is not None and leaf.table is None and not leaf.truth:
                (rows, columns), (s, r) = leaf.view.shape[-2:], leaf.view.stride()[-2:]
                if (r == 1 or columns == 1) and (rows == 1 or s >= columns):
                    return leaf, (s if rows > 1 else max(columns, 1)), 1
                if (s == 1 or rows == 1) and (columns == 1 or r >= rows):
                    return leaf, 1, (r if columns > 1 else max(rows, 1))
            leaf = self.room(value.shape)
            self.store(leaf, value)  # as numbers, if they are truth values
            value = _at_leaf(leaf)
        raise AssertionError

    def product(self, a: Any, b: Any, start: Any = None) -> Value:
        """(m, k), (k, n) -> (m, n), or a batch of these, added to `start`."""
        x, y = self.value(a), self.value(b)
        *batch, m, k = x.shape
        n = y.shape[-1]
        if _zero(x) or _zero(y):
            return self.value(0.0 if start is None else start).expand((*batch, m, n))
        leaf = self.aimed((*batch, m, n))
        begins = None if start is None else self.begins(start, (*batch, m, n))
        if k == 0:
            self.store(leaf, self.value(0.0) if begins is None else _at_leaf(begins))
        elif m and n:
            self.multiply(leaf, self.matrix(x), self.matrix(y), m, n, k, begins, batch)
        return _at_leaf(leaf)

    def begins(self, start: Any, shape: Sequence[int]) -> Leaf | None:
        """Where what a product is added to lies, of its shape; None where that is zero."""
        value = self.value(start)
        if _zero(value):
            return None
        if value.leaf is None or value.leaf.table is not None or value.leaf.truth:
            to = self.room(value.shape)
            self.store(to, value)
            value = _at_leaf(to)
        assert value.leaf is not None
        return value.leaf.at(lambda x: x.expand(*shape))

    def in_layers(
        self, x: tuple[Leaf, int, int], y: tuple[Leaf, int, int], m: int, n: int, k: int
    ) -> tuple[tuple[Leaf, int, int], tuple[Leaf, int, int]]:
        """The matrices of a product as it runs through memory best, as far as they are the field's own; `multiply!` in
        julia/src/products.jl chooses how it does."""
        (a, a1, a2), (b, b1, b2) = x, y
        if m * n * k > _FEW:  # it is BLAS's to do
            return x, y
        if b.array in "pc" and n >= self.lanes and b2 != 1:
            return x, (self.layers.place(b, n, k, b2), n, 1)
        if a.array in "pc" and n < self.lanes <= m and a1 != 1:
            return (self.layers.place(a, m, k, a1), 1, m), y
        thin = n < self.lanes <= k and a2 == 1 and (m < self.lanes or a1 != 1)
        if b.array in "pc" and thin and b1 != 1:
            return x, (self.layers.place(b, k, n, b1), 1, k)
        return x, y

    def multiply(
        self,
        leaf: Leaf,
        x: tuple[Leaf, int, int],
        y: tuple[Leaf, int, int],
        m: int,
        n: int,
        k: int,
        begins: Leaf | None,
        batch: Sequence[int] = (),
    ) -> None:
        """Args:
        begins: what it is added to, of its shape; None for zeros.
        """
        (a, a1, a2), (b, b1, b2) = (x, y) if batch else self.in_layers(x, y, m, n, k)

        def at(one: Leaf) -> str:
            offset = one.view.storage_offset()
            array = f"Numbers(pointer({one.array}))" if one.array.startswith("k") else one.array  # a constant
            if not batch:
                return f"{array} + {offset}"
            return f"{array} + ({offset} + {one.view.stride()[0]}i1)"

        self.lines.append(f"    # {self.origin}")
        start = "nothing"
        if begins is not None:
            down, across = begins.view.stride()[-2:]
            start = f"Start({at(begins)}, {down}, {'One()' if across == 1 else across})"
        sizes, rows, columns = f"{m}, {n}, {k}", f"{a1}, {a2}", f"{b1}, {b2}"
        if m * n * k <= _SMALL:
            sizes, rows, columns = f"Val(({sizes}))", f"Val(({rows}))", f"Val(({columns}))"
            text = f"small!({at(leaf)}, {sizes}, {at(a)}, {rows}, {at(b)}, {columns}, {start})"
        else:
            text = f"multiply!({at(leaf)}, {sizes}, {at(a)}, {rows}, {at(b)}, {columns}, {start})"
        if batch:
            self.lines += [f"    for i1 in 0:{batch[0] - 1}", f"        {text}", "    end"]
        else:
            self.lines.append(f"    {text}")

    def do_mm(self, a: Any, b: Any) -> Value:
        return self.product(a, b)

    do_bmm = do_mm

    def _column(self, b: Any) -> Value:
        return self.viewed(aten.unsqueeze.default, self.value(b), (1,))

    def do_mv(self, a: Any, b: Any) -> Value:
        return self.viewed(aten.squeeze.dim, self.product(a, self._column(b)), (1,))

    def do_dot(self, a: Any, b: Any) -> Value:
        return self.do_sum(self.elementwise("mul", (a, b), {}))

    do_vdot = do_dot

    def do_addmm(self, start: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Value:
        if beta == 1 and alpha == 1:
            return self.product(a, b, start)
        scaled = self.elementwise("mul", (self.product(a, b), alpha), {})
        return self.elementwise("add", (self.elementwise("mul", (start, beta), {}), scaled), {})

    do_baddbmm = do_addmm

    def do_addmv(self, start: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Value:
        scaled = self.elementwise("mul", (self.do_mv(a, b), alpha), {})
        return self.elementwise("add", (self.elementwise("mul", (start, beta), {}), scaled), {})

    # Convolutions: products with a matrix of patches.

    def patches(
        self, x: Value, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> tuple[Leaf, Callable[[Leaf], Tensor], Leaf]:
        """(B, C, *S) -> where (B, C * K, positions) lies, what views a padded tensor as patches, and the padded one."""
        pad = [p for d in reversed(padding) for p in (d, d)]
        padded = self.copied(self.do_constant_pad_nd(x, pad) if any(pad) else x).leaf
        assert padded is not None
        outs = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded.view.shape[2:], kernel, stride, dilation)]

        def view(leaf: Leaf) -> Tensor:
            b, c, *steps = leaf.view.stride()
            sizes = (*leaf.view.shape[:2], *kernel, *outs)
            strides = (b, c, *(d * s for d, s in zip(dilation, steps)), *(q * s for q, s in zip(stride, steps)))
            return leaf.view.as_strided(sizes, strides, leaf.view.storage_offset())

        columns = self.room(view(padded).shape)
        self.store(columns, _at_leaf(replace(padded, view=view(padded))))
        b, c = x.shape[:2]
        return columns.at(lambda v: v.view(b, c * math.prod(kernel), math.prod(outs))), view, padded

    def do_convolution(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> Value:
        if transposed or groups != 1:
            raise NotCompiled("f convolves in groups, or transposed")
        x, weight = self.value(x), self.value(weight)
        o, _, *kernel = weight.shape
        rank = len(kernel)
        stride, padding, dilation = ([*s] * rank if len(s) == 1 else list(s) for s in (stride, padding, dilation))
        columns, view, padded = self.patches(x, kernel, stride, padding, dilation)
        b, k, n = columns.view.shape
        out = self.room((b, o, n))
        begins = None
        if bias is not None:
            begins = self.begins(self.viewed(aten.view.default, self.value(bias), ((1, o, 1),)), (b, o, n))
        rows = self.matrix(self.viewed(aten.view.default, weight, ((o, k),)))
        rows = (rows[0].at(lambda v: v.expand(b, *v.shape)), *rows[1:])
        self.multiply(out, rows, (columns, n, 1), o, n, k, begins, (b,))
        outs = view(padded).shape[2 + rank :]
        return self.viewed(aten.view.default, _at_leaf(out), ((b, o, *outs),))

    def convolution_backward(
        self,
        node: fx.Node,
        g: Any,
        x: Any,
        weight: Any,
        bias_sizes: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        mask: Sequence[bool],
    ) -> list[Value | None]:
        if transposed or groups != 1:
            raise NotCompiled("f convolves in groups, or transposed")
        wanted = {user.args[1] for user in node.users if user in self.needed}
        g, x, weight = self.value(g), self.value(x), self.value(weight)
        o, c, *kernel = weight.shape
        rank = len(kernel)
        stride, padding, dilation = ([*s] * rank if len(s) == 1 else list(s) for s in (stride, padding, dilation))
        columns, view, padded = self.patches(x, kernel, stride, padding, dilation)
        b, k, n = columns.view.shape
        leaf = self.copied(g).leaf
        assert leaf is not None
        slopes = leaf.at(lambda v: v.view(b, o, n))
        by_x = by_weight = by_bias = None
        if 0 in wanted:
            rows = self.matrix(self.viewed(aten.view.default, weight, ((o, k),)))
            transposed_rows = (rows[0].at(lambda v: v.T.expand(b, k, o)), rows[2], rows[1])
            spread = self.room((b, k, n))
            self.multiply(spread, transposed_rows, (slopes, n, 1), k, n, o, None, (b,))
            total = self.room(padded.view.shape)
            self.store(total, self.value(0.0))
            parts, target = spread.view.view(b, c, *kernel, *view(padded).shape[2 + rank :]), view(total)
            for index in torch.cartesian_prod(*(torch.arange(q) for q in kernel)).reshape(-1, rank).tolist():
                at = (slice(None), slice(None), *index)
                to, part = replace(total, view=target[at]), replace(spread, view=parts[at])
                self.loop(to.view.shape, [to, to, part], lambda code, places: code.make("add", *places))
            inner = total.view
            for d, (p, size) in enumerate(zip(padding, x.shape[2:])):
                inner = inner.narrow(d + 2, p, size)
            by_x = _at_leaf(replace(total, view=inner))
        if 1 in wanted:
            out = self.room((o, k))
            self.store(out, self.value(0.0))
            everywhere = out.at(lambda v: v.expand(b, o, k))
            self.multiply(everywhere, (slopes, n, 1), (columns.at(lambda v: v.mT), 1, n), o, k, n, everywhere, (b,))
            by_weight = self.viewed(aten.view.default, _at_leaf(out), (weight.shape,))
        if 2 in wanted:
            by_bias = self.do_sum(g, [0, *range(2, 2 + rank)])
        return [by_x, by_weight, by_bias]

    def literal(self, value: float) -> str:
        return Code(self.dtype == torch.float64).literal(value)


@dataclass(frozen=True)
class _Dim:
    """One loop: how often, and the step of each leaf."""

    size: int
    strides: tuple[int, ...]


def _merged(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[_Dim]:
    """The loops over a shape, with those that run on as one made one."""
    dims: list[_Dim] = []
    for d, n in enumerate(shape):
        if n == 1:
            continue
        steps = tuple(s[d] for s in strides)
        if dims and all(before == n * step for before, step in zip(dims[-1].strides, steps)):
            dims[-1] = _Dim(dims[-1].size * n, steps)
        else:
            dims.append(_Dim(n, steps))
    return dims


def _ancestors(nodes: Sequence[Any]) -> set[fx.Node]:
    """Nodes, and all that is computed for them."""
    found: set[fx.Node] = set()
    todo = [n for n in nodes if isinstance(n, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _places(sizes: dict[str, int], names: Sequence[str], array: str, start: int) -> tuple[list[str], int]:
    """Statements that give buffers their places in an array, one after the other; and where they end."""
    lines = []
    for name in names:
        lines.append(f"    {name} = {array} + {start}")
        start += sizes[name]
    return lines, start


def _zero(value: Value) -> bool:
    """Whether it is known to be zero everywhere."""
    code = Code(True)
    return not value.leaves and value.build(code, ()) == code.zero


def _index(leaf: Leaf, view: Tensor, strides: Sequence[int], names: Sequence[str]) -> tuple[str, str]:
    """The array and the index, counted from 1, of an element."""
    terms = [f"{'' if step == 1 else step}{name}" for step, name in zip(strides, names) if step]
    index = " + ".join([str(view.storage_offset() + 1), *terms])
    if leaf.table is None:
        return leaf.array, index
    return f"pick:{leaf.array}", f"{leaf.table}[{index}]"


def _text(leaf: Leaf, view: Tensor, dims: Sequence[_Dim], which: int, names: Sequence[str]) -> str:
    array, index = _index(leaf, view, [dim.strides[which] for dim in dims], names)
    return f"{array}[{index}]"
