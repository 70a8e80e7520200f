"""A graph as straight-line code: each number of each tensor is an expression of its own.

A tensor is a tensor of places in the code. An operation that only moves elements is therefore done by PyTorch itself,
on the places; and structural zeros are seen, because place 0 is the number 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...capture.trace import Graph, decomposed
from ...errors import NotCompiled
from .code import Code
from .ops import ELEMENTWISE, is_setting, words

# Beyond this many operations on numbers, code in loops compiles in less time and runs as fast.
LIMIT = 4_000

MOVES = {
    *words(
        "view _unsafe_view reshape _reshape_alias permute transpose t expand select slice unsqueeze squeeze cat stack"
    ),
    *words("split split_with_sizes unsafe_split unbind chunk narrow flip roll rot90 index index_select gather take"),
    *words(
        "diagonal diag_embed tril triu constant_pad_nd slice_scatter select_scatter diagonal_scatter select_backward"
    ),
    *words("slice_backward diagonal_backward clone alias detach lift_fresh_copy lift_fresh contiguous repeat unfold"),
    *words(
        "movedim squeeze_copy expand_copy view_copy permute_copy select_copy slice_copy unsqueeze_copy transpose_copy"
    ),
    *words("reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    *words("t_copy alias_copy detach_copy split_copy unbind_copy diagonal_copy scatter index_copy as_strided"),
}
# Fresh memory counts as zeros: what f reads of it before it writes there is nobody's value.
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
# Keywords of element-wise operations: of their formulas, or of no meaning here.
NAMED_SETTINGS = {"alpha", "rounding_mode", "approximate", "value", "dtype", "device", "layout", "memory_format"}
ZEROS = {"zeros_like", "new_zeros", "zeros", "_efficientzerotensor"}


@dataclass(frozen=True)
class Sym:
    """A tensor of expressions: their places in the code, int64."""

    places: Tensor

    def reshaped(self, shape: Sequence[int]) -> Sym:
        return Sym(self.places.reshape(shape))


class Functions(NamedTuple):
    """The outputs of a graph as expressions of one code."""

    code: Code
    outputs: list[Tensor | None]


def evaluate(graph: Graph, args: Sequence[Tensor], trained: int, limit: int) -> Functions:
    """The outputs of a graph, shape (its own), in expressions over `t`, `u[i]`, `v[i]`, `p[i]` and `c[i]`.

    Args:
        args: examples of its inputs, for shapes and dtypes: those that `graph.inputs` names, then the lifted tensors.
        trained: how many of the lifted tensors lie one after the other in `p`; the rest do in `c`.

    Raises:
        NotCompiled: an operation is not known, or there are more than `limit`.
    """
    real = args[1].dtype
    code = Code(real == torch.float64, limit)
    try:
        return _Evaluation(graph, args, trained, code).run()
    except Unknown as unknown:
        code = Code(real == torch.float64, limit)
        try:
            return _Evaluation(decomposed(graph, args), args, trained, code).run()
        except Unknown:
            raise NotCompiled(f"there is no Julia for {unknown}") from None


class Unknown(Exception):
    """An operation that is not in the tables."""


class _Evaluation:
    def __init__(self, graph: Graph, args: Sequence[Tensor], trained: int, code: Code) -> None:
        self.graph, self.args, self.code = graph, args, code
        self.inputs = list(self._inputs(trained))

    def _inputs(self, trained: int) -> Any:
        c, named = self.code, len(self.graph.inputs)
        for name, x in zip(self.graph.inputs, self.args):
            if name == "t":
                yield Sym(torch.tensor(c.load("t", 1)))
            else:
                array = {"h": "u", "v": "v", "m": "v"}[name]
                yield Sym(torch.tensor([c.load(array, i + 1) for i in range(x.numel())], dtype=torch.int64))
        for start, stop, array in ((named, named + trained, "p"), (named + trained, len(self.args), "c")):
            offset = 1
            for x in self.args[start:stop]:
                if x.dtype != self.args[1].dtype and x.dtype == torch.float64:
                    raise NotCompiled("f holds float64 tensors and the state is float32")
                places = [c.load(array, i) for i in range(offset, offset + x.numel())]
                offset += x.numel()
                yield Sym(torch.tensor(places, dtype=torch.int64).reshape(x.shape))

    def run(self) -> Functions:
        module, values = self.graph.module, {}
        inputs = iter(self.inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = getattr(module, node.target)
            elif node.op == "output":
                out = torch.fx.node.map_arg(node.args[0], lambda n: values[n])
                outputs = list(out) if isinstance(out, (tuple, list)) else [out]
                return Functions(self.code, [None if x is None else self.symbolic(x).places for x in outputs])
            else:
                args = torch.fx.node.map_arg(node.args, lambda n: values[n])
                kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
                values[node] = self.call(node, args, kwargs)
        raise AssertionError

    def symbolic(self, x: Any) -> Sym:
        if isinstance(x, Sym):
            return x
        if not isinstance(x, Tensor):
            return Sym(torch.tensor(self.code.constant(x)))
        if x.is_complex():
            raise NotCompiled("f computes in complex numbers")
        places = [self.code.constant(value) for value in x.detach().reshape(-1).tolist()]
        return Sym(torch.tensor(places, dtype=torch.int64).reshape(x.shape))

    def call(self, node: torch.fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return target(*args, **kwargs)  # operator.getitem
        if not target._schema.name.startswith("aten::"):
            raise Unknown(str(target))
        name = target._schema.name.removeprefix("aten::")
        self.code.origin = node.name
        if name in EMPTY or name in ZEROS:
            return torch.zeros(meta_of(node).shape, dtype=meta_of(node).dtype)
        if not any(isinstance(x, Sym) for x in arguments((args, kwargs))):
            return target(*args, **kwargs)
        if name in ("ones_like", "full_like", "new_full", "new_ones"):
            fill = 1 if "ones" in name else args[1 if name == "full_like" else 2]
            if not isinstance(fill, Sym):
                return torch.full(meta_of(node).shape, fill, dtype=meta_of(node).dtype)
        if name in ELEMENTWISE:
            self._check(node)
            return self.elementwise(name, args, kwargs)
        if name in MOVES:
            return self.move(target, args, kwargs)
        special = getattr(self, name, None) if name in _SPECIAL else None
        if special is None:
            raise Unknown(f"aten.{name}")
        if name != "_to_copy":
            self._check(node)
        return special(*args, **kwargs)

    def _check(self, node: torch.fx.Node) -> None:
        """Numbers of another precision would be computed in this one."""
        dtype = getattr(meta_of(node), "dtype", None)
        if dtype is not None and dtype.is_floating_point and dtype != self.args[1].dtype:
            raise NotCompiled(f"f computes in {str(dtype).removeprefix('torch.')} at {node.name}")
        if dtype is not None and dtype.is_complex:
            raise NotCompiled("f computes in complex numbers")

    def elementwise(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Sym:
        f = ELEMENTWISE[name]
        for key in kwargs:
            if key not in NAMED_SETTINGS:
                raise Unknown(f"aten.{name} with {key}=")
        kwargs = {k: v for k, v in kwargs.items() if k in ("alpha", "rounding_mode", "approximate", "value")}
        slots = [i for i, x in enumerate(args) if not is_setting(name, i, x)]
        tensors = [self.symbolic(args[i]).places for i in slots]
        logical = name in ("logical_not", "logical_and", "logical_or", "logical_xor")
        broadcast = torch.broadcast_tensors(*tensors)
        out = []
        arithmetic = name not in ("where", "masked_fill")
        for places in zip(*(x.reshape(-1).tolist() for x in broadcast)):
            items = list(args)
            for i, place in zip(slots, places):
                if logical:
                    place = self.code.truth(place)
                elif arithmetic and not name.startswith("bitwise"):
                    place = self.code.number(place)
                items[i] = place
            out.append(f(self.code, *items, **kwargs))
        return Sym(torch.tensor(out, dtype=torch.int64).reshape(broadcast[0].shape))

    def move(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Let PyTorch do it to the places."""
        if "scatter" in target._schema.name and "reduce" in kwargs:
            raise Unknown(str(target))
        if any(isinstance(x, Sym) for x in arguments(kwargs)):
            raise Unknown(str(target))
        name = target._schema.name.removeprefix("aten::")
        lists = name in ("cat", "stack")
        head = [self.symbolic(x).places for x in args[0]] if lists else self.symbolic(args[0]).places
        rest = list(args[1:])
        if name.endswith("_scatter"):
            rest[0] = self.symbolic(rest[0]).places
        elif name in ("constant_pad_nd",):
            rest[1:] = [self.code.constant(float(rest[1]))] if len(rest) > 1 else []
        elif name == "scatter":
            source = rest[2]
            rest[2] = self.symbolic(source).places
            if rest[2].dim() == 0 and not isinstance(source, (Sym, Tensor)):
                rest[2] = int(rest[2])
        elif name == "index_copy":
            rest[2] = self.symbolic(rest[2]).places
        if any(isinstance(x, Sym) for x in arguments(rest)):
            if name == "index_select" and isinstance(head, Tensor):
                return self.picked(Sym(head), *rest)
            raise NotCompiled(f"f indexes by numbers that it computes ({name})")
        if name in ("view", "_unsafe_view") and isinstance(head, Tensor):
            return Sym(head.reshape(rest[0]))
        if name == "as_strided" and isinstance(head, Tensor):
            head = head.contiguous()
        kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
        if name.startswith(("reflection", "replication")) and isinstance(head, Tensor):
            return Sym(target(head.double(), *rest).to(torch.int64))  # PyTorch pads no integers
        out = target(head, *rest, **kwargs)
        return Sym(out) if isinstance(out, Tensor) else [Sym(x) for x in out]

    def picked(self, x: Sym, dim: int, index: Sym) -> Sym:
        """`index_select` by numbers that are computed: of all elements, the sum of those at the index; NaN where there
        is none, which is an error of PyTorch's."""
        places = x.places.movedim(dim, 0)
        n, rest = len(places), [1] * (places.ndim - 1)
        index = index.reshaped((-1, *rest))
        hit = self.elementwise("eq", (index.reshaped((-1, 1)), torch.arange(n)), {}).reshaped((-1, n, *rest))
        chosen = self.elementwise("where", (hit, Sym(places[None]), 0.0), {})
        bounds = [self.elementwise(op, (index, bound), {}) for op, bound in (("ge", 0.0), ("lt", float(n)))]
        there = self.elementwise("logical_and", tuple(bounds), {})
        return Sym(self.elementwise("where", (there, self.sum(chosen, [1]), math.nan), {}).places.movedim(0, dim))

    def index_add(self, x: Any, dim: int, index: Any, source: Any, *, alpha: float = 1) -> Sym:
        """What is at each index is added there: for each place, the sum of what has its index."""
        places, added = self.symbolic(x).places, self.symbolic(self.elementwise("mul", (source, alpha), {}))
        if not isinstance(index, Sym):
            before: list[Any] = [None] * (dim % max(places.ndim, 1))
            return self.index_put(x, [*before, index], added, True)
        n, rest = places.shape[dim], [1] * (places.ndim - 1)
        hit = self.elementwise("eq", (index.reshaped((1, -1)), torch.arange(n)[:, None]), {}).reshaped((n, -1, *rest))
        chosen = self.elementwise("where", (hit, Sym(added.places.movedim(dim, 0)[None]), 0.0), {})
        total = Sym(self.sum(chosen, [1]).places.movedim(0, dim))
        return self.elementwise("add", (x, total), {})

    # What is neither element-wise nor a move. Arguments are as in ATen's schema.

    def searchsorted(self, edges: Any, x: Any, *, right: bool = False, side: str | None = None, **kwargs: Any) -> Sym:
        """How many of the edges lie before each x."""
        if self.symbolic(edges).places.ndim > 1 or kwargs.get("sorter") is not None:
            raise NotCompiled("f searches in more than one row of numbers")
        before = "le" if right or side == "right" else "lt"
        x = Sym(self.symbolic(x).places[..., None])
        return self.sum(self.elementwise(before, (edges, x), {}), [-1])

    def bucketize(self, x: Any, edges: Any, *, right: bool = False, **kwargs: Any) -> Sym:
        return self.searchsorted(edges, x, right=right)

    def _to_copy(self, x: Sym, dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
        if dtype is None or dtype == self.args[1].dtype:
            return self._map(self.code.number, x)
        if dtype == torch.bool:
            return self._map(self.code.truth, x)
        places = x.places.reshape(-1).tolist()
        if not dtype.is_floating_point and all(self.code.is_truth(place) for place in places):
            return self._map(self.code.number, x)
        raise NotCompiled(f"f computes in {str(dtype).removeprefix('torch.')}")

    def _map(self, f: Callable[[int], int], x: Sym) -> Sym:
        out = [f(place) for place in x.places.reshape(-1).tolist()]
        return Sym(torch.tensor(out, dtype=torch.int64).reshape(x.places.shape))

    def _reduce(self, x: Any, dims: Any, keepdim: bool, f: Callable[[list[int]], int]) -> Sym:
        places = self.symbolic(x).places
        if places.dim() == 0:  # of one number; PyTorch lets its dimension be named
            return Sym(torch.tensor(f([self.code.number(int(places))])))
        if isinstance(dims, int):
            dims = [dims]
        dims = sorted(d % places.dim() for d in dims) if dims else list(range(places.dim()))
        kept = [d for d in range(places.dim()) if d not in dims]
        rows = places.permute(*kept, *dims).reshape(*(places.shape[d] for d in kept), -1)
        shape = [1 if d in dims else n for d, n in enumerate(places.shape)] if keepdim else [*rows.shape[:-1]]
        count = math.prod(places.shape[d] for d in dims)
        out = [f([self.code.number(i) for i in row]) for row in rows.reshape(-1, count).tolist()]
        return Sym(torch.tensor(out, dtype=torch.int64).reshape(shape))

    def sum(self, x: Sym, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:
        return self._reduce(x, dims, keepdim, self.code.sum)

    def mean(self, x: Sym, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:
        c = self.code
        return self._reduce(x, dims, keepdim, lambda row: c.make("div", c.sum(row), c.constant(float(len(row)))))

    def var(self, x: Sym, dims: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Sym:
        c, less = self.code, 1 if correction is None else correction

        def var(row: list[int]) -> int:
            mean = c.make("div", c.sum(row), c.constant(float(len(row))))
            off = [c.make("sub", i, mean) for i in row]
            return c.make("div", c.dot(off, off), c.constant(float(len(row) - less)))

        return self._reduce(x, dims, keepdim, var)

    def var_mean(self, x: Sym, dims: Any = None, *, keepdim: bool = False, **kwargs: Any) -> list[Sym]:
        return [self.var(x, dims, keepdim=keepdim, **kwargs), self.mean(x, dims, keepdim)]

    def std(self, *args: Any, **kwargs: Any) -> Sym:
        return self._map(lambda place: self.code.make("sqrt", place), self.var(*args, **kwargs))

    def _fold(self, op: str) -> Callable[[list[int]], int]:
        def fold(row: list[int]) -> int:
            total = row[0]
            for place in row[1:]:
                total = self.code.make(op, total, place)
            return total

        return fold

    def prod(self, x: Sym, dim: int | None = None, keepdim: bool = False, dtype: Any = None) -> Sym:
        return self._reduce(x, dim if dim is None else [dim], keepdim, self._fold("mul"))

    def amax(self, x: Sym, dims: Any = (), keepdim: bool = False) -> Sym:
        return self._reduce(x, dims, keepdim, self._fold("max"))

    def amin(self, x: Sym, dims: Any = (), keepdim: bool = False) -> Sym:
        return self._reduce(x, dims, keepdim, self._fold("min"))

    def max(self, x: Sym, *args: Any) -> Sym:
        if args:
            raise Unknown("aten.max.dim")
        return self.amax(x)

    def min(self, x: Sym, *args: Any) -> Sym:
        if args:
            raise Unknown("aten.min.dim")
        return self.amin(x)

    def any(self, x: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
        return self._reduce(self._map(self.code.truth, x), dims, keepdim, lambda row: self._truths("or", row))

    def all(self, x: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
        return self._reduce(self._map(self.code.truth, x), dims, keepdim, lambda row: self._truths("and", row))

    def _truths(self, op: str, row: list[int]) -> int:
        return self._fold(op)([self.code.truth(place) for place in row])

    def linalg_vector_norm(self, x: Sym, ord: float = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Sym:
        c = self.code

        def norm(row: list[int]) -> int:
            sizes = [c.make("abs", place) for place in row]
            if ord == math.inf:
                return self._fold("max")(sizes)
            if ord == -math.inf:
                return self._fold("min")(sizes)
            if ord == 0:
                return c.sum(self.code.number(c.make("ne", place, c.zero)) for place in row)
            if ord == 1:
                return c.sum(sizes)
            if ord == 2:
                return c.make("sqrt", c.dot(row, row))
            powers = c.sum(c.make("pow", size, c.constant(ord)) for size in sizes)
            return c.make("pow", powers, c.constant(1 / ord))

        return self._reduce(x, dims, keepdim, norm)

    def norm(self, x: Sym, p: float | None = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Sym:
        return self.linalg_vector_norm(x, 2 if p is None else p, dims, keepdim)

    def logsumexp(self, x: Sym, dims: Any, keepdim: bool = False) -> Sym:
        c = self.code

        def logsumexp(row: list[int]) -> int:
            top = self._fold("max")(row)
            return c.make("add", top, c.make("log", c.sum(c.make("exp", c.make("sub", i, top)) for i in row)))

        return self._reduce(x, dims, keepdim, logsumexp)

    def _rows(self, x: Sym, dim: int, f: Callable[[list[int]], list[int]]) -> Sym:
        moved = x.places.movedim(dim, -1) if x.places.dim() else x.places.reshape(1)
        rows = [f(row) for row in moved.reshape(-1, moved.shape[-1]).tolist()]
        out = torch.tensor(rows, dtype=torch.int64).reshape(moved.shape)
        return Sym(out.movedim(-1, dim) if x.places.dim() else out.reshape(()))

    def _softmax(self, x: Sym, dim: int, half_to_float: bool = False) -> Sym:
        c = self.code

        def softmax(row: list[int]) -> list[int]:
            top = self._fold("max")(row)
            exps = [c.make("exp", c.make("sub", i, top)) for i in row]
            total = c.sum(exps)
            return [c.make("div", e, total) for e in exps]

        return self._rows(x, dim, softmax)

    def _log_softmax(self, x: Sym, dim: int, half_to_float: bool = False) -> Sym:
        c = self.code

        def log_softmax(row: list[int]) -> list[int]:
            top = self._fold("max")(row)
            shifted = [c.make("sub", i, top) for i in row]
            total = c.make("log", c.sum(c.make("exp", i) for i in shifted))
            return [c.make("sub", i, total) for i in shifted]

        return self._rows(x, dim, log_softmax)

    def cumsum(self, x: Sym, dim: int, dtype: Any = None) -> Sym:
        return self._rows(x, dim, lambda row: list(itertools.accumulate(row, lambda a, b: self.code.make("add", a, b))))

    def cumprod(self, x: Sym, dim: int, dtype: Any = None) -> Sym:
        return self._rows(x, dim, lambda row: list(itertools.accumulate(row, lambda a, b: self.code.make("mul", a, b))))

    def _product(self, a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
        """(m, k), (k, n) -> (m, n), added to `start`."""
        rows, columns = a.tolist(), b.T.tolist()
        starts = None if start is None else start.expand(len(rows), len(columns)).tolist()
        out = [
            [self.code.dot(row, column, None if starts is None else starts[i][j]) for j, column in enumerate(columns)]
            for i, row in enumerate(rows)
        ]
        return torch.tensor(out, dtype=torch.int64).reshape(len(rows), len(columns))

    def mm(self, a: Any, b: Any) -> Sym:
        return Sym(self._product(self.symbolic(a).places, self.symbolic(b).places))

    def bmm(self, a: Any, b: Any) -> Sym:
        return Sym(torch.stack([self._product(x, y) for x, y in zip(self.symbolic(a).places, self.symbolic(b).places)]))

    def mv(self, a: Any, b: Any) -> Sym:
        return Sym(self._product(self.symbolic(a).places, self.symbolic(b).places[:, None])[:, 0])

    def dot(self, a: Any, b: Any) -> Sym:
        return Sym(self._product(self.symbolic(a).places[None], self.symbolic(b).places[:, None])[0, 0])

    def vdot(self, a: Any, b: Any) -> Sym:
        return self.dot(a, b)

    def addmm(self, start: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Sym:
        if beta != 1 or alpha != 1:
            scaled = self.elementwise("mul", (self.mm(a, b), alpha), {})
            return self.elementwise("add", (self.elementwise("mul", (start, beta), {}), scaled), {})
        return Sym(self._product(self.symbolic(a).places, self.symbolic(b).places, self.symbolic(start).places))

    def addmv(self, start: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Sym:
        scaled = self.elementwise("mul", (self.mv(a, b), alpha), {})
        return self.elementwise("add", (self.elementwise("mul", (start, beta), {}), scaled), {})

    def baddbmm(self, start: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Sym:
        scaled = self.elementwise("mul", (self.bmm(a, b), alpha), {})
        return self.elementwise("add", (self.elementwise("mul", (start, beta), {}), scaled), {})

    def index_put(self, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Sym:
        places = self.symbolic(x).places
        if any(isinstance(i, Sym) for i in indices):
            raise NotCompiled("f indexes by numbers that it computes (index_put)")
        where = torch.arange(places.numel()).reshape(places.shape)[
            tuple(slice(None) if i is None else i for i in indices)
        ]
        new = self.symbolic(values).places.expand(where.shape).reshape(-1).tolist()
        flat = places.reshape(-1).tolist()
        for i, place in zip(where.reshape(-1).tolist(), new):
            flat[i] = self.code.make("add", flat[i], place) if accumulate else place
        return Sym(torch.tensor(flat, dtype=torch.int64).reshape(places.shape))

    _unsafe_index_put = index_put

    def _unsafe_index(self, x: Sym, indices: Sequence[Any]) -> Any:
        return self.move(torch.ops.aten.index.Tensor, (x, indices), {})

    def scatter_add(self, x: Any, dim: int, index: Any, source: Any) -> Sym:
        places, source = self.symbolic(x).places, self.symbolic(source).places
        if isinstance(index, Sym):
            raise NotCompiled("f indexes by numbers that it computes (scatter_add)")
        ids = torch.arange(places.numel()).reshape(places.shape)
        where = ids.gather(dim, index) if places.shape == index.shape else positions(ids, dim, index)
        flat = places.reshape(-1).tolist()
        source = source[tuple(slice(n) for n in index.shape)]
        for i, place in zip(where.reshape(-1).tolist(), source.reshape(-1).tolist()):
            flat[i] = self.code.make("add", flat[i], place)
        return Sym(torch.tensor(flat, dtype=torch.int64).reshape(places.shape))

    def _pad_backward(self, pad: Any, g: Any, x: Any, padding: Sequence[int]) -> Sym:
        shape = self.symbolic(x).places.shape
        return self.index_put(torch.zeros(math.prod(shape)), [padded(pad, shape, padding)], g, True).reshaped(shape)

    def reflection_pad1d_backward(self, g: Any, x: Any, padding: Sequence[int]) -> Sym:
        return self._pad_backward(torch.ops.aten.reflection_pad1d, g, x, padding)

    def reflection_pad2d_backward(self, g: Any, x: Any, padding: Sequence[int]) -> Sym:
        return self._pad_backward(torch.ops.aten.reflection_pad2d, g, x, padding)

    def replication_pad1d_backward(self, g: Any, x: Any, padding: Sequence[int]) -> Sym:
        return self._pad_backward(torch.ops.aten.replication_pad1d, g, x, padding)

    def replication_pad2d_backward(self, g: Any, x: Any, padding: Sequence[int]) -> Sym:
        return self._pad_backward(torch.ops.aten.replication_pad2d, g, x, padding)

    def fill(self, x: Sym, value: Any) -> Sym:
        return Sym(self.symbolic(value).places.expand(self.symbolic(x).places.shape))

    def copy(self, to: Any, x: Any) -> Sym:
        return Sym(self.symbolic(x).places.expand(self.symbolic(to).places.shape))

    def trace(self, x: Sym) -> Sym:
        return self.sum(Sym(torch.diagonal(x.places)))


_SPECIAL = {
    *words("_to_copy sum mean var var_mean std prod amax amin max min any all linalg_vector_norm norm logsumexp"),
    *words("_softmax _log_softmax"),
    *words(
        "cumsum cumprod mm bmm mv dot vdot addmm addmv baddbmm index_put _unsafe_index_put _unsafe_index index_add "
        "scatter_add"
    ),
    "searchsorted",
    "bucketize",
    *words("fill copy trace reflection_pad1d_backward reflection_pad2d_backward replication_pad1d_backward"),
    *words("replication_pad2d_backward"),
}


def padded(pad: Any, shape: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The flat places of a tensor of this shape, padded as its numbers are."""
    ids = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    return pad(ids, padding).to(torch.int64)


def positions(ids: Tensor, dim: int, index: Tensor) -> Tensor:
    """Where `scatter(dim, index)` writes, as places among `ids`."""
    grid = list(torch.meshgrid(*(torch.arange(n) for n in index.shape), indexing="ij"))
    grid[dim] = index
    return ids[tuple(grid)]


def arguments(x: Any) -> Any:
    if isinstance(x, dict):
        x = tuple(x.values())
    if isinstance(x, (tuple, list)):
        for y in x:
            yield from arguments(y)
    else:
        yield x


def meta_of(node: torch.fx.Node) -> Any:
    return node.meta.get("tensor_meta", node.meta.get("val"))


def linear(code: Code, place: int, memo: dict[int, dict[int, int]]) -> dict[int, int]:
    """What an expression that is linear in `v` multiplies each element of `v` by: index -> expression.

    Args:
        memo: of earlier calls with the same code.

    Raises:
        NotCompiled: it is not linear in a way that is seen here.
    """
    order, todo = [], [place]
    while todo:  # a loop: expressions are deeper than Python's stack
        i = todo[-1]
        node = code.nodes[i]
        if i in memo:
            todo.pop()
            continue
        waiting = [] if node.op in ("constant", "load") else [a for a in node.args if a not in memo]
        if waiting:
            todo.extend(waiting)
            continue
        todo.pop()
        order.append(i)
        memo[i] = _linear(code, i, memo)
    return memo[place]


def _linear(code: Code, place: int, memo: dict[int, dict[int, int]]) -> dict[int, int]:
    node, make = code.nodes[place], code.make
    if node.op == "load":
        return {int(node.args[1]): code.one} if node.args[0] == "v" else {}
    if node.op == "constant":
        return {}
    parts = [memo[a] for a in node.args]
    if not any(parts):
        return {}
    code.origin = node.origin
    if node.op in ("add", "sub"):
        out = dict(parts[0])
        for i, b in parts[1].items():
            out[i] = make(node.op, out.get(i, code.zero), b)
        return {i: a for i, a in out.items() if a != code.zero}
    if node.op == "neg":
        return {i: make("neg", a) for i, a in parts[0].items()}
    if node.op == "mul" and not (parts[0] and parts[1]):
        factor = node.args[1] if parts[0] else node.args[0]
        return {i: make("mul", a, factor) for i, a in (parts[0] or parts[1]).items()}
    if node.op == "muladd" and not (parts[0] and parts[1]):
        out = dict(parts[2])
        factor = node.args[1] if parts[0] else node.args[0]
        for i, a in (parts[0] or parts[1]).items():
            out[i] = make("add", make("mul", a, factor), out.get(i, code.zero))
        return {i: a for i, a in out.items() if a != code.zero}
    if node.op == "div" and not parts[1]:
        return {i: make("div", a, node.args[1]) for i, a in parts[0].items()}
    if node.op == "ifelse" and not parts[0]:
        keys = parts[1].keys() | parts[2].keys()
        return {
            i: make("ifelse", node.args[0], parts[1].get(i, code.zero), parts[2].get(i, code.zero))
            for i in sorted(keys)
        }
    raise NotCompiled(f"a product of f is not linear in an operation {node.op}")
