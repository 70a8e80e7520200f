"""Scalar expressions of one floating-point type: constants folded, common ones shared, printed as Julia."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import NotCompiled

# The text of an operation over the texts of its arguments. Functions are those of `Elementary` in
# julia/src/compiled.jl: outside of its domain a function is NaN there, as in PyTorch.
_TEXT = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "({} / {})",
    "neg": "(-{})",
    "lt": "({} < {})",
    "le": "({} <= {})",
    "eq": "({} == {})",
    "ne": "({} != {})",
    "and": "({} & {})",
    "or": "({} | {})",
    "not": "(!{})",
}
# Functions that have another form for loops, which is faster in many lanes and slower in one.
_IN_LOOPS = {"sin", "cos", "tan", "log", "atan", "atan2", "pow"}
# The value of an operation on constants, in the type T of NumPy.
_FOLD = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "pow": np.power,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
_LINE = 110


class Node(NamedTuple):
    """One scalar.

    Attributes:
        op: "constant", "load" or the name of an operation.
        args: places of its arguments; of a constant its value; of a load the array's name and the index.
        origin: the operation of PyTorch that it is a part of.
    """

    op: str
    args: tuple
    origin: str


class Code:
    """Expressions over loads and constants. An expression is known by its place in `nodes`; place 0 is the number 0.

    Args:
        double: of Float64, else of Float32.
        limit: how many operations there may be.
        loop: they are the body of a loop.
    """

    def __init__(self, double: bool, limit: int = 1 << 30, loop: bool = False) -> None:
        self.loop = loop
        self.real = np.float64 if double else np.float32
        self.julia = "Float64" if double else "Float32"
        self.limit = limit
        self.operations = 0
        self.origin = ""
        self.nodes: list[Node] = []
        self.known: dict[tuple, int] = {}
        self.zero = self.constant(0.0)
        self.one = self.constant(1.0)

    def _place(self, op: str, args: tuple, key: tuple) -> int:
        place = self.known.get(key)
        if place is None:
            place = self.known[key] = len(self.nodes)
            self.nodes.append(Node(op, args, self.origin))
        return place

    def constant(self, value: float | bool) -> int:
        if isinstance(value, (bool, np.bool_)):
            return self._place("constant", (bool(value),), ("constant", bool(value), "bool"))
        number = float(self.real(value))
        return self._place("constant", (number,), ("constant", str(number)))

    def load(self, array: str, index: int | str) -> int:
        """An element of an array of the function, 1-based."""
        return self._place("load", (array, index), ("load", array, index))

    def value(self, place: int) -> float | bool | None:
        """Of a constant."""
        node = self.nodes[place]
        return node.args[0] if node.op == "constant" else None

    def make(self, op: str, *args: int) -> int:
        """An operation on expressions."""
        values = [self.value(a) for a in args]
        if op in _FOLD and None not in values:
            typed = [v if isinstance(v, bool) else self.real(v) for v in values]
            with np.errstate(all="ignore"):
                result = _FOLD[op](*typed)
            return self.constant(bool(result) if isinstance(result, np.bool_) else float(result))
        simple = self._simplified(op, args, values)
        if simple is not None:
            return simple
        swapped = op in ("add", "mul", "eq", "ne", "and", "or", "min", "max") and args[0] > args[1]
        key = (op, *(reversed(args) if swapped else args))
        if key not in self.known:
            self.operations += 1
            if self.operations > self.limit:
                raise NotCompiled(f"it has more than {self.limit} operations on numbers")
        return self._place(op, args, key)

    def _simplified(self, op: str, args: Sequence[int], values: Sequence[float | bool | None]) -> int | None:
        a, b = args[0], args[1] if len(args) > 1 else -1
        x, y = values[0], values[1] if len(values) > 1 else None
        if op == "add":
            if x == 0:
                return b
            if y == 0:
                return a
            if self.nodes[b].op == "neg":
                return self.make("sub", a, self.nodes[b].args[0])
        elif op == "sub":
            if y == 0:
                return a
            if x == 0:
                return self.make("neg", b)
            if self.nodes[b].op == "neg":
                return self.make("add", a, self.nodes[b].args[0])
        elif op == "mul":
            # A zero times anything is a structural zero, where PyTorch would say NaN of 0 times infinity.
            if x == 0 or y == 0:
                return self.zero
            if x == 1:
                return b
            if y == 1:
                return a
            if x == -1:
                return self.make("neg", b)
            if y == -1:
                return self.make("neg", a)
        elif op == "div":
            if x == 0:
                return self.zero
            if y == 1:
                return a
        elif op == "neg" and self.nodes[a].op == "neg":
            return self.nodes[a].args[0]
        elif op == "ifelse":
            if x is not None:
                return b if x else args[2]
            if b == args[2]:
                return b
        elif op in ("and", "or") and None not in (x if x is not None else y,):
            known, other = (x, b) if x is not None else (y, a)
            if op == "and":
                return other if known else self.constant(False)
            return self.constant(True) if known else other
        elif op == "pow" and y is not None:
            return self._power(a, y)
        return None

    def _power(self, a: int, y: float) -> int | None:
        """A small multiple of a half, by products and a square root: a general power takes ten times as long."""
        if not math.isfinite(y) or 2 * y != int(2 * y) or abs(y) > 4:
            return None
        power = self.one
        for _ in range(int(abs(y))):
            power = self.make("mul", power, a)
        if y != int(y):
            power = self.make("mul", power, self.make("sqrt", a))
        return power if y >= 0 else self.make("div", self.one, power)

    def is_truth(self, place: int) -> bool:
        """Whether it is a truth value, not a number."""
        node = self.nodes[place]
        if node.op == "constant":
            return isinstance(node.args[0], bool)
        if node.op == "ifelse":
            return self.is_truth(node.args[1])
        return node.op in ("lt", "le", "eq", "ne", "and", "or", "not", "isnan")

    def number(self, place: int) -> int:
        """A truth value as 1 or 0."""
        return self.make("ifelse", place, self.one, self.zero) if self.is_truth(place) else place

    def truth(self, place: int) -> int:
        """Whether a number is not 0."""
        return place if self.is_truth(place) else self.make("ne", place, self.zero)

    def sum(self, terms: Iterable[int]) -> int:
        total = self.zero
        for term in terms:
            total = self.make("add", total, term)
        return total

    def dot(self, xs: Iterable[int], ys: Iterable[int], start: int | None = None) -> int:
        """start + Σ x y."""
        total = self.zero if start is None else start
        for x, y in zip(xs, ys):
            product = self.make("mul", x, y)
            node = self.nodes[product]
            if node.op == "mul" and self.value(total) is None:
                total = self.make("muladd", *node.args, total)
            else:
                total = self.make("add", total, product)
        return total

    def text(self, place: int, name: dict[int, str]) -> str:
        """A constant or a load, or the name of an expression, as Julia."""
        node = self.nodes[place]
        if node.op == "constant":
            return self.literal(node.args[0])
        return name[place]

    def literal(self, value: float | bool) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if not math.isfinite(value):
            text = "NaN" if math.isnan(value) else "-Inf" if value < 0 else "Inf"
            return text + ("" if self.julia == "Float64" else "32")
        if self.julia == "Float64":
            return repr(value) if value >= 0 and str(value) != "-0.0" else f"({value!r})"
        text = str(np.float32(value))
        text = text.replace("e", "f") if "e" in text else text + "f0"
        return text if value >= 0 and str(value) != "-0.0" else f"({text})"

    def lines(self, outputs: Sequence[int], store: Sequence[str], indent: str = "    ") -> list[str]:
        """Statements that compute `outputs` and store each as the text `store` says, each with its origin as comment.

        What is used once stands where it is used, as long as lines do not grow long.
        """
        uses: dict[int, int] = {}
        todo = list(outputs)
        for place in outputs:
            uses[place] = uses.get(place, 0) + 1
        live: set[int] = set()
        while todo:
            place = todo.pop()
            if place in live:
                continue
            live.add(place)
            node = self.nodes[place]
            if node.op in ("constant", "load"):
                continue
            for a in node.args:
                uses[a] = uses.get(a, 0) + 1
                todo.append(a)
        name: dict[int, str] = {}
        lines: list[str] = []
        ends = set(outputs)
        for place in sorted(live):
            node = self.nodes[place]
            if node.op == "constant":
                continue
            if node.op == "load":
                array, index = node.args
                text = "t" if array == "t" else f"{array}[{index}]"
                if array.startswith("pick:"):
                    text = f"pick({array.removeprefix('pick:')}, {index})"
                # Loads stand where they are used once: after a store nothing is loaded, for stores come last.
                inline = uses[place] == 1 or node.args[0] == "t"
            else:
                parts = [self.text(a, name) for a in node.args]
                form = _TEXT.get(node.op)
                function = f"loop_{node.op}" if self.loop and node.op in _IN_LOOPS else node.op
                text = form.format(*parts) if form else f"{function}({', '.join(parts)})"
                inline = uses[place] == 1 and (len(text) < _LINE // 2 or (place in ends and len(text) < _LINE))
            if inline:
                name[place] = text
                continue
            name[place] = f"x{place}"
            lines.append(f"{indent}x{place} = {_bare(text)}{self._comment(place)}")
        for place, to in zip(outputs, store):
            note = "" if name.get(place) == f"x{place}" else self._comment(place)
            lines.append(f"{indent}{to} = {_bare(self.text(place, name))}{note}")
        return lines

    def _comment(self, place: int) -> str:
        origin = self.nodes[place].origin
        return f"  # {origin}" if origin else ""


def _bare(text: str) -> str:
    """Without the parentheses around the whole of it."""
    if not text.startswith("("):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:-1] if i == len(text) - 1 else text
    return text
