"""The functions of a compiled field: made when first asked for, and kept for fields that are alike."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...capture.held import Held, Root, find, held_by, root_of
from ...capture.trace import Trace
from ...errors import NotCompiled
from ...problem import Field, Layout, is_finite
from ...signals import undisturbed
from .. import calls
from ..calls import Calls
from . import array, scalar

log = logging.getLogger("pyjlode")

_Made = TypeVar("_Made")

FUNCTIONS = ("f", "jac", "tgrad", "jvp", "vjp", "vjp_p", "keep", "pull", "bend")
# A sparse Jacobian wins from about this size, and below this part of non-zeros.
_SPARSE_SIZE, _SPARSE_PART = 24, 0.3
# Products of numbers, in products of matrices, from which on loops are faster than straight-line code, and compiled in
# less time: benchmarks/compiled.py --part size.
_NETWORK = 64
# Programs kept of one capture, with other numbers in its integer tensors.
_KEPT = 64
# Fields of the same functions that are kept while nobody uses them.
_IDLE = 4


class Pattern(NamedTuple):
    """The places of a sparse Jacobian, as of Julia's SparseMatrixCSC: (n + 1,) and (k,), int64, 1-based."""

    columns: Tensor
    rows: Tensor


@dataclass(eq=False)
class JuliaField:
    """A field of Julia's, and the memory that it looks at.

    Attributes:
        memory, parts: whole, and for each of the tensors that f holds.
        filled: stands for the values that are there now; None where nothing does.
    """

    held: calls.Held
    memory: dict[str, Tensor]
    parts: list[Tensor]
    filled: object = None

    def fill(self, tensors: Sequence[Tensor], stands: object = None) -> None:
        """Have it look at the values of tensors as they are now.

        They are copied, whether they changed or not: what is written through `x.data`, or a view that NumPy has of x,
        does not count in `x._version`. One call copies all, in 2 to 4 us for a small network.
        """
        self.filled = None
        if self.parts:
            torch._foreach_copy_(self.parts, list(tensors))
        self.filled = stands


class _Lease(weakref.ref):
    """Says when whoever uses a field is gone, without a line of Python: an exception of a signal handler's that came
    there would be lost."""

    __slots__ = ("field",)
    field: JuliaField


class Fields:
    """Fields of the same functions, each one solve's at a time.

    Attributes:
        leases: of those in use. They are kept here: one that only a solve kept could not serve the next where the
            garbage collector ends both at once.
        ended: leases whose user is gone.
    """

    def __init__(self) -> None:
        self.leases: dict[int, _Lease] = {}
        self.ended: list[_Lease] = []

    def take(self, user: Any) -> JuliaField | None:
        """One that nobody uses, for `user` from now on; None where there is none."""
        while len(self.ended) > _IDLE:
            self.keep(self.ended.pop().field)
        return self.add(self.ended.pop().field, user) if self.ended else None

    def add(self, field: JuliaField, user: Any) -> JuliaField:
        """One that `user` uses from now on, for as long as that lives."""
        lease = _Lease(user, self.ended.append)
        lease.field = field
        self.leases[id(field)] = lease
        return field

    def keep(self, field: JuliaField) -> None:
        """Have it not serve another solve."""
        self.leases.pop(id(field), None)


class Program:
    """The functions of vector fields that do the same with their tensors.

    Args:
        trace: of one of them.

    Attributes:
        mode: "array" where that is a network, or has too many operations for "scalar".
        work: numbers that the functions need room for.
        layers: matrices that they want transposed.
        fields: Julia's, by the names of their functions.
        params: how the trained tensors lie in Julia's vector of them, once it was asked for.
        plans: what the front door keeps of calls with such a field.
        refused: functions that came out otherwise than PyTorch's, and how.
        seen: where such a field was asked for its value, before it was compiled.
        covered: the span of times in which functions were compared.

    Raises:
        NotCompiled: f is not to be had as Julia.
    """

    def __init__(self, trace: Trace, seen: Seen | None = None) -> None:
        self.seen = seen or Seen()
        self.trace, self.n, self.dtype = trace, trace.like.numel(), trace.like.dtype
        self.parameters = sum(x.numel() for x in trace.tensors[: trace.trained])
        self.verified: set[str] = set()
        self.refused: dict[str, str] = {}
        self.covered: tuple[float, float] | None = None
        self.fields: dict[tuple[str, ...], Fields] = {}
        self.params: Layout | None = None
        self.plans: dict[tuple[Any, ...], Any] = {}
        self.work = 0
        self.layers = array.Layers(sum(x.numel() for x in trace.tensors[trace.trained :]))
        self._texts: dict[str, str | NotCompiled] = {}
        self._addresses: dict[str, int] = {}
        network = array.products(trace.f) >= _NETWORK
        self.mode = "array" if network or not self._is_short else "scalar"
        _ = self.text("f")

    def read(self, source: Held) -> list[Tensor]:
        """Of the tensors that such a field holds those that its functions read: its parameters, and then constants."""
        return [source.tensors[i] for i in self.trace.slots]

    def text(self, name: str) -> str:
        """Julia source of a function `f(out, v, u, p, c, w, t)`, one of `FUNCTIONS`, or "sensitivities", which is the
        field of the state and its derivatives (`forward.augment`).

        Raises:
            NotCompiled: there is none for this function.
        """
        if name not in self._texts:
            self._texts[name] = self._text(name)
        found = self._texts[name]
        if isinstance(found, NotCompiled):
            raise NotCompiled(*found.args)
        return found

    def _text(self, name: str) -> str | NotCompiled:
        """It, or why there is none: to find that out takes as long as to make it."""
        straight = self.mode == "scalar" or name == "sensitivities"  # of which there are no others
        with undisturbed():
            return _or_why_not(lambda: getattr(self, f"_{name}_text")() if straight else self._array_text(name))

    def address(self, calls: Calls, name: str) -> int:
        """Of the function in machine code.

        Raises:
            NotCompiled: there is none.
        """
        if name in self.refused:
            raise NotCompiled(self.refused[name])
        if name not in self._addresses:
            text, key = self.text(name), (self.dtype, self.text(name))
            if key not in _compiled:
                _compiled[key] = calls.compile(self.dtype, text)
            self._addresses[name] = _compiled[key]
        return self._addresses[name]

    def packed(self, calls: Calls, name: str) -> int:
        """Of the function in machine code for eight systems at once, of a program whose mode is "scalar"."""
        assert self.mode == "scalar"
        key = (self.dtype, self.text(name))
        if key not in _packed:
            _packed[key] = calls.compile_packed(*key)
        return _packed[key]

    @property
    def outputs(self) -> int:
        """How many numbers f gives, where the mode is "scalar": as many as the state has, or an event function's."""
        (out, *_) = self._f.outputs
        return 0 if out is None else len(out)

    @functools.cached_property
    def _is_short(self) -> bool:
        """Whether f is few enough operations to be straight-line code."""
        try:
            _ = self._f
        except NotCompiled:
            return False
        return True

    @functools.cached_property
    def _f(self) -> scalar.Functions:
        graph = self.trace.f
        return scalar.evaluate(graph, self.trace.examples(graph), self.trace.trained, scalar.LIMIT)

    @functools.cached_property
    def _vjp(self) -> scalar.Functions:
        graph = self.trace.vjp
        return scalar.evaluate(graph, self.trace.examples(graph), self.trace.trained, 4 * scalar.LIMIT)

    @functools.cached_property
    def _bend(self) -> scalar.Functions:
        graph = self.trace.bend
        return scalar.evaluate(graph, self.trace.examples(graph), self.trace.trained, 16 * scalar.LIMIT)

    @functools.cached_property
    def _rows_of_columns(self) -> list[dict[int, int]]:
        """For each column of the Jacobian: row -> expression, 1-based rows; structural zeros are not there."""
        code, outputs = self._vjp
        memo: dict[int, dict[int, int]] = {}
        assert outputs[1] is not None
        return [scalar.linear(code, place, memo) for place in outputs[1].tolist()]

    @functools.cached_property
    def pattern(self) -> Pattern | None:
        """Of the Jacobian with its diagonal, where it is to be sparse."""
        if self.mode != "scalar":
            return None
        columns = [sorted({*column, j + 1}) for j, column in enumerate(self._rows_of_columns)]
        count = sum(map(len, columns))
        if self.n < _SPARSE_SIZE or count > _SPARSE_PART * self.n**2:
            return None
        starts = torch.tensor([0, *map(len, columns)]).cumsum(0) + 1
        return Pattern(starts, torch.tensor([i for column in columns for i in column]))

    def _function(
        self, name: str, out: str, places: Sequence[int], at: Sequence[int], code: scalar.Code, zeros: int
    ) -> str:
        """Source of a function that stores expressions at indices of its output, after `zeros` zeros there."""
        v = "v" if name in array.PRODUCTS or name == "bend" else "_"
        lines = [f"function {name}({out}, {v}, u, p, c, w, t)"]
        if zeros:
            lines += [f"    for i in 1:{zeros}", f"        {out}[i] = {code.literal(0.0)}", "    end"]
        lines += code.lines(places, [f"{out}[{i}]" for i in at])
        return "\n".join([*lines, "    return nothing", "end"])

    def _f_text(self) -> str:
        code, (out, *_) = self._f
        assert out is not None
        return self._function("f", "du", out.tolist(), range(1, len(out) + 1), code, 0)

    def _jac_text(self) -> str:
        code, places, at = self._vjp.code, [], []
        if self.pattern is not None:
            starts = self.pattern.columns.tolist()
            for j, column in enumerate(self._rows_of_columns):
                rows = self.pattern.rows[starts[j] - 1 : starts[j + 1] - 1].tolist()
                places += [column.get(i, code.zero) for i in rows]
            at, zeros = list(range(1, len(places) + 1)), 0
        else:
            for j, column in enumerate(self._rows_of_columns):
                places += [column[i] for i in sorted(column)]
                at += [j * self.n + i for i in sorted(column)]
            zeros = self.n**2 if len(at) < self.n**2 else 0
        return self._function("jac", "J", places, at, code, zeros)

    def _tgrad_text(self) -> str:
        code, outputs = self._vjp
        assert outputs[0] is not None
        column = scalar.linear(code, int(outputs[0]), {})
        places = [column.get(i, code.zero) for i in range(1, self.n + 1)]
        return self._function("tgrad", "dT", places, range(1, self.n + 1), code, 0)

    def _jvp_text(self) -> str:
        code = self._vjp.code
        out = [code.zero] * self.n
        for j, column in enumerate(self._rows_of_columns):
            v = code.load("v", j + 1)
            for i, place in column.items():
                out[i - 1] = code.make("add", out[i - 1], code.make("mul", place, v))
        return self._function("jvp", "out", out, range(1, self.n + 1), code, 0)

    def _vjp_text(self) -> str:
        code, outputs = self._vjp
        assert outputs[1] is not None
        return self._function("vjp", "out", outputs[1].tolist(), range(1, self.n + 1), code, 0)

    def _vjp_p_text(self) -> str:
        code, outputs = self._vjp
        places = [i for x in outputs[2:] if x is not None for i in x.reshape(-1).tolist()]
        return self._function("vjp_p", "out", places, range(1, len(places) + 1), code, 0)

    def _pull_text(self) -> str:
        """Both products, that by the state and then that by the parameters."""
        code, outputs = self._vjp
        places = [i for x in outputs[1:] if x is not None for i in x.reshape(-1).tolist()]
        return self._function("pull", "out", places, range(1, len(places) + 1), code, 0)

    def _keep_text(self) -> str:
        raise NotCompiled("the products need nothing of it")

    def _bend_text(self) -> str:
        """The derivatives of a sum of second products, by the state and then by the parameters: see `Trace.bend`."""
        code, outputs = self._bend
        places = [i for x in outputs if x is not None for i in x.reshape(-1).tolist()]
        return self._function("bend", "out", places, range(1, len(places) + 1), code, 0)

    def _sensitivities_text(self) -> str:
        n, width = self.n, self.n + self.parameters
        if n * n * width > 4 * scalar.LIMIT or not self._is_short:
            raise NotCompiled("its sensitivities are those of too many numbers")
        code, outputs = self._vjp
        memo: dict[int, dict[int, int]] = {}
        thetas = [i for x in outputs[2:] if x is not None for i in x.reshape(-1).tolist()]
        by_theta = [scalar.linear(code, place, memo) for place in thetas]
        places = []
        for i in range(1, n + 1):
            row = [(j, column[i]) for j, column in enumerate(self._rows_of_columns) if i in column]
            for k in range(width):
                total = by_theta[k - n].get(i, code.zero) if k >= n else code.zero
                for j, factor in row:
                    total = code.make("add", total, code.make("mul", factor, code.load("u", n + j * width + k + 1)))
                places.append(total)
        parts = [
            self._f_text(),
            self._function("products", "out", places, range(1, n * width + 1), code, 0),
            _SENSITIVITIES.format(n=n),
        ]
        return "\n\n".join(parts)

    @functools.cached_property
    def _apart(self) -> array.Apart:
        """In array mode "pull" finds what "keep" computed for it."""
        trace = self.trace
        apart = array.emit_apart(trace.f, trace.vjp, trace.examples(trace.vjp), trace.trained, self.layers)
        self.work = max(self.work, apart.keep.work, apart.pull.work)
        return apart

    @property
    def kept(self) -> int:
        """How many numbers "keep" has for "pull", 0 where that works by itself."""
        return self._apart.kept if self.mode == "array" else 0

    def _array_text(self, name: str) -> str:
        trace = self.trace
        if name in ("keep", "pull"):
            apart = self._apart
            return (apart.keep if name == "keep" else apart.pull).text(name)
        if name == "bend":
            raise NotCompiled("the products of its second derivatives are those of too many numbers")
        graph = trace.f if name == "f" else trace.jvp if name in ("jvp", "tgrad") else trace.vjp
        thetas = list(range(2, 2 + trace.trained))
        outputs = {"f": [0], "jvp": [0], "vjp_p": thetas}.get(name, [1])
        emitted = array.emit(graph, trace.examples(graph), trace.trained, outputs, self.layers)
        start = emitted.work
        if name == "jac":  # a row for each unit vector
            emitted.work += 2 * self.n
            text = [emitted.text("vjp"), _ROWS.format(n=self.n, start=start, row=start + self.n)]
        else:
            text = [emitted.text(name)]
        self.work = max(self.work, emitted.work)
        return "\n\n".join(text)


_ROWS = """function jac(J, _, u, p, c, w, t)
    v, row = w + {start}, w + {row}
    for i in 1:{n}
        for j in 1:{n}
            v[j] = i == j
        end
        vjp(row, v, u, p, c, w, t)
        for j in 1:{n}
            J[i + (j - 1) * {n}] = row[j]
        end
    end
    return nothing
end"""

_SENSITIVITIES = """function sensitivities(out, v, u, p, c, w, t)
    f(out, v, u, p, c, w, t)
    products(out + {n}, v, u, p, c, w, t)
    return nothing
end"""

_compiled: dict[tuple[torch.dtype, str], int] = {}
_packed: dict[tuple[torch.dtype, str], int] = {}


class Seen:
    """Where a field was asked for its value while it was called back: its compiled functions are compared there.

    Args:
        other: whose points are taken over.

    Attributes:
        points: `(t, h)`, h of shape (n,).
        solved: a solve is known.
        taken: some program has it.
    """

    def __init__(self, other: Seen | None = None) -> None:
        self.points: list[tuple[float, Tensor]] = [] if other is None else list(other.points)
        self.solved = self.taken = False

    def note(self, t: float, h: Tensor) -> None:
        if h.numel() * (len(self.points) + 1) <= _NOTED:
            self.points.append((t, h.detach().clone()))


def some_outputs(times: Sequence[float], states: Tensor) -> list[tuple[float, Tensor]]:
    """Of the states at the output times, shape (T, n), some that are finite, evenly."""
    places = torch.linspace(0, len(states) - 1, min(len(states), _OUTPUTS)).round().long().tolist()
    return [(times[i], states[i]) for i in places if is_finite(states[i])]


# Numbers of states that are kept of a solve, and how many of the outputs.
_NOTED, _OUTPUTS = 200_000, 6


class FirstTime(NotCompiled):
    """A field that is met for the first time is not compiled: it may be solved but once."""


def program_of(field: Field, like: Tensor, *, at_once: bool = True) -> tuple[Program, Held]:
    """The program for a vector field, and what the field holds now.

    Args:
        like: the state, shape (n,).
        at_once: else there is none for a field that is met for the first time, which may be solved but once.

    Raises:
        NotCompiled: there is none; the message says why.
    """
    if isinstance(field.program, NotCompiled):
        raise NotCompiled(*field.program.args)
    if field.program is not None:
        return field.program
    root = root_of(field, like.dtype)
    assert root is not None
    if not at_once and not root.met:
        root.met, root.seen = True, Seen()
        field.seen = root.seen
        field.program = FirstTime("it is solved for the first time; the next solve compiles it")
        raise FirstTime(*field.program.args)  # not that one, which would keep the frames that it passed
    root.met = True
    held = held_by(field, like.dtype, patient=at_once)
    programs = held.entry.programs
    found = programs.get(held.key)
    if found is None:
        found = programs[held.key] = _make(held, root, like)
        while len(programs) > _KEPT:
            programs.pop(next(iter(programs)))
    if isinstance(found, NotCompiled):
        raise NotCompiled(*found.args)
    field.program = found, held
    return field.program


def _make(held: Held, root: Root, like: Tensor) -> Program | NotCompiled:
    """A new program, or why there is none, which is remembered."""
    seen = Seen(root.seen)  # points of another field, perhaps: that is compared there too
    if root.seen is not None and not root.seen.taken:
        seen, root.seen.taken = root.seen, True
    with undisturbed():  # else what a handler of a signal's raises would be remembered as the reason
        return _or_why_not(lambda: Program(Trace(held, like), seen))


def _or_why_not(make: Callable[[], _Made]) -> _Made | NotCompiled:
    """What is made, or why it cannot be made."""
    try:
        return make()
    except NotCompiled as error:
        return NotCompiled(*error.args)  # without the frames of the trace, which hold tensors
    except Exception as error:
        log.debug("the compiler failed", exc_info=True)
        return NotCompiled(f"the compiler does not know what to do with it: {type(error).__name__}: {error}")


def look_again(field: Field, times: Sequence[float], states: Tensor) -> None:
    """After the first solve of a field, which was called back: note where it was.

    Args:
        times, states: the output times, and the states there, shape (T, n).
    """
    if field.seen is None:
        return
    seen, field.seen = field.seen, None
    for t, h in some_outputs(times, states) if states.shape[1] <= _NOTED else ():
        seen.note(t, h)
    seen.solved = True


def known(field: Field, like: Tensor) -> Program | None:
    """The program for a vector field, which then knows it, if it was made already."""
    try:
        held = find(field, like.dtype)
    except NotCompiled:
        return None
    found = held and held.entry.programs.get(held.key)
    if not isinstance(found, Program):
        return None
    field.program = found, held
    return found


def refuse(field: Field, name: str, reason: str) -> None:
    """Have a function of the program for such a field not be used again; without its value there is no program."""
    program, held = field.program
    if name == "f":
        field.program = None
        held.entry.programs[held.key] = NotCompiled(reason)
    else:
        program.refused[name] = reason
        program.plans.clear()


def text_of(program: Program) -> str:
    """All functions that the program has, as text."""
    parts = []
    for name in FUNCTIONS:
        try:
            parts.append(program.text(name))
        except NotCompiled as error:
            parts.append(f"# {name}: {error}")
    return "\n\n".join(parts)
