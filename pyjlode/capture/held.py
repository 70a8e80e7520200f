"""What a vector field holds: which capture of its code it is like, and with which tensors.

PyTorch's Dynamo captures a field with guards for exactly what it reads. What else its objects hold (statistics of the
last solve, an optimiser, a history) is no part of it, and a wrapper or a bound method that is made anew in each call is
like the last one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import NotCompiled
from ..problem import Field, Layout
from ..signals import undisturbed

if TYPE_CHECKING:
    from .dynamo import Captures, Entry, Slot

# Pieces of code, with shapes of states, whose captures are kept; captures of each; and how many that served but once
# may follow each other: then something that f reads is another at each solve.
_KEPT, _ENTRIES, _FRUITLESS = 256, 64, 8


class Held(NamedTuple):
    """What a field holds.

    Attributes:
        entry: the capture that it is like.
        key: equal for two fields that do the same with tensors of the same shapes.
        tensors: the floating-point tensors that it reads: those of equal keys correspond.
        order: for each tensor of the graph its place among these.
        integers: integer tensors, whose numbers are a part of the code.
        counters: numbers that it changes when it is called, and that nothing comes of.
        layout: of its state.
    """

    entry: Entry
    key: tuple[Any, ...]
    tensors: list[Tensor]
    order: list[int]
    integers: list[Tensor]
    counters: list[Slot]
    layout: Layout


class Root:
    """Fields of one piece of code, for states of one layout.

    Attributes:
        met: such a field was solved.
        seen: where it was asked for its value then.
        refused: what such fields look like that are not compiled, and why not.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.differentiates = False  # f asks autograd for derivatives by its own h
        self.picks = False  # it indexes by numbers that it computes
        self.met = False
        self.seen: Any = None
        self.refused: dict[Any, str] = {}
        self.captures: list[Captures] = []
        self.counters: tuple[str, ...] = ()
        self.numbers: tuple[str, ...] = ()
        self.fruitless = 0

    def find(self, f: Any) -> Held | None:
        """What f holds, if it is like an earlier capture.

        Raises:
            NotCompiled: that is not to be used.
        """
        for captures in self.captures:
            found = captures.find(f) if captures.entries else None
            if found is not None and (held := self._held(f, captures, *found)) is not None:
                self.fruitless = 0
                return held
        return None

    def capture(self, f: Any, *, patient: bool = True) -> Held:
        """What f holds, of which there is no capture yet.

        Args:
            patient: else not where the last captures served but once.

        Raises:
            NotCompiled: it cannot be captured; why is remembered.
        """
        looks = sketch(f)
        if looks in self.refused:
            raise NotCompiled(self.refused[looks])
        if self.fruitless >= _FRUITLESS and not patient:
            raise NotCompiled(f"something that f reads is another at each solve{self._which(f)}; make it a tensor")
        # What a handler of a signal's raises would leave an import half done, or be remembered as the reason.
        with undisturbed():
            from .dynamo import SwitchedOff

            try:
                return self._capture(f)
            except SwitchedOff:
                raise
            except NotCompiled as error:
                if len(self.refused) >= _ENTRIES:
                    self.refused.clear()
                self.refused[looks] = str(error)
                raise NotCompiled(*error.args) from None  # without its frames, which hold tensors

    def _capture(self, f: Any) -> Held:
        from . import dynamo

        ways = [dynamo.WITH_GRAPH] if self.differentiates else [dynamo.BOTH, dynamo.VALUE]
        if not self.captures or sum(len(x.entries) for x in self.captures) >= _ENTRIES:
            picks = [False, True] if self.picks else [False]  # not all that is captured plainly is captured so
            self.captures = [dynamo.Captures(how, *_example(self.layout), x) for x in picks for how in ways]
        self.fruitless += 1
        varying = self._varying(f)
        reason: NotCompiled | None = None
        for captures in self.captures:
            for numbers in dict.fromkeys([tuple(varying), ()]):
                try:
                    entry, values = self._counted(captures, f, numbers)
                except dynamo.SwitchedOff:
                    raise
                except NotCompiled as error:
                    reason = reason or error if numbers == () else reason
                    continue
                if captures.how is dynamo.VALUE:
                    entry.without_graph = str(reason)
                held = self._held(f, captures, entry, values)
                assert held is not None
                return held
        assert reason is not None
        if isinstance(reason, dynamo.Picks) and not self.picks:
            self.picks, self.captures = True, []
            return self._capture(f)
        if not self.differentiates and "does not require grad" in str(reason):
            self.differentiates, self.captures = True, []
            return self._capture(f)
        raise reason

    def _counted(self, captures: Captures, f: Any, numbers: tuple[str, ...]) -> tuple[Entry, tuple[Any, ...]]:
        """A capture in which tensors stand for what f counts with."""
        from .dynamo import Counts, Slot

        counters = [place for place in self.counters if type(_number(f, place, captures)) in (int, float)]
        for _ in range(4):  # it may count in several places
            try:
                found = captures.capture(f, counters, numbers)
            except Counts as error:
                if set(error.places) <= set(counters):
                    break
                counters = list(dict.fromkeys([*counters, *error.places]))
                continue
            except NotCompiled as error:
                if not counters:
                    raise
                names = ", ".join(Slot(place, {}).name for place in counters)
                with contextlib.suppress(Counts):  # without tensors for these it is captured, that is
                    captures.capture(f)
                    raise
                raise NotCompiled(f"f uses {names}, a number that it changes when it is called ({error})") from None
            self.counters = tuple(dict.fromkeys([*self.counters, *counters]))
            return found
        raise NotCompiled("f changes what it holds when it is called")

    def _varying(self, f: Any) -> list[str]:
        """Floating-point numbers that are others than when f was last captured."""
        for captures in self.captures:
            if captures.entries:
                last = captures.entries[-1]
                # Of a class Dynamo reads a copy of its dictionary, in which nothing can be put.
                places = [place for place in last.floats if not place.startswith("dict(")]
                now = {place: _number(f, place, captures) for place in places}
                return [*last.numbers, *(x for x, y in now.items() if type(y) is float and y != last.floats[x])]
        return []

    def _which(self, f: Any) -> str:
        names = [place.rpartition(".")[2] for place in self._varying(f)]
        return f" ({', '.join(names)})" if names and "cell_contents" not in names else ""

    def _held(self, f: Any, captures: Captures, entry: Entry, values: tuple[Any, ...]) -> Held | None:
        if entry.reason:
            raise NotCompiled(entry.reason)
        zeros = entry.zeros
        if zeros is None:
            zeros = entry.zeros = {place: str(value) for place, value in entry.floats.items() if value == 0.0}
        for place, value in zeros.items():
            if str(_number(f, place, captures)) != value:  # equal, for guards
                raise NotCompiled("f reads a zero of another sign than before")
        held = entry.only_held
        if held is None:
            kinds = {kind for kind, *_ in entry.inputs}
            plain = kinds <= {"t", "h", "held"} and not entry.counters
            held = entry.only_held = [i for i, (kind, *_) in enumerate(entry.inputs) if kind == "held"] if plain else ()
        if held != ():  # by far the most fields
            tensors = [values[i] for i in held]
            return Held(entry, (id(entry), entry, ()), tensors, list(range(len(tensors))), [], [], self.layout)
        from .dynamo import Slot

        tensors, integers = [], []
        numbers: dict[int, Tensor] = {}
        for kind, x in zip(entry.inputs, values):
            if kind[0] == "held":
                tensors.append(x)
            elif kind[0] == "integer":
                integers.append(x)
            elif kind[0] == "number":
                if type(x) is not float and not isinstance(x, Tensor):
                    return None
                numbers[kind[1]] = x if isinstance(x, Tensor) else torch.tensor(x, dtype=self.layout.dtype)
        tensors += [numbers[i] for i in sorted(numbers)]
        counters = [Slot(place, {"L": {"f": f}, "G": captures.scope}) for place in entry.counters]
        content = tuple([x.detach().cpu().contiguous().numpy().tobytes() for x in integers])
        order = list(range(len(tensors)))
        return Held(entry, (id(entry), entry, content), tensors, order, integers, counters, self.layout)


def _number(f: Any, place: str, captures: Captures) -> Any:
    """What f has at a place now; None where it has no such place."""
    from .dynamo import Slot

    try:
        return Slot(place, {"L": {"f": f}, "G": captures.scope}).get()
    except Exception:  # it is another one
        return None


_CPU = torch.device("cpu")
_roots: collections.OrderedDict[Any, Root] = collections.OrderedDict()
_lock = threading.RLock()


def forget() -> None:
    """Leave nothing of what was captured."""
    _roots.clear()


def root_of(field: Field, dtype: torch.dtype, device: torch.device = _CPU, *, make: bool = True) -> Root | None:
    """Where captures of a field's code are kept; None where it was not met, and is not to be made.

    Raises:
        NotCompiled: a capture of the field would not show what it does.
    """
    if field.source is None:
        raise NotCompiled("it is solved within another (autocast, or its sensitivities), which is not compiled")
    f, of = field.source
    if field.one is not None:
        of = field.one
    # The numbers of systems lie in another order than those of one state of the same tensors.
    shape = (type(of), str(of.spec), *of.shapes, *of.dtypes) if isinstance(of, Layout) else (of, dtype)
    key = (_code(f), shape, device, field.one is not None)
    root = _roots.get(key)
    if root is None and make:
        layout = of if isinstance(of, Layout) else Layout(torch.empty(of, dtype=dtype, device=device))
        if any(layout.complex):
            raise NotCompiled("f computes in complex numbers")
        if not _plain(layout.unflatten(torch.zeros(layout.size, dtype=layout.dtype))):
            raise NotCompiled("the state is a tree of other nodes than tuples, lists and dictionaries")
        with _lock:
            root = _roots[key] = Root(layout)
            while len(_roots) > _KEPT:
                _roots.popitem(last=False)
    if root is not None and field.differentiates and not root.differentiates:
        root.differentiates, root.captures = True, []
        root.refused.clear()
    return root


def held_by(field: Field, dtype: torch.dtype, device: torch.device = _CPU, *, patient: bool = True) -> Held:
    """What a vector field holds; it is captured if it was not yet.

    Args:
        dtype, device: of its state.
        patient: else it is not captured where earlier captures of the same code were of no use.

    Raises:
        NotCompiled: it cannot be.
    """
    root = root_of(field, dtype, device)
    assert root is not None
    assert field.source is not None
    f = field.source[0]
    if field.one is not None:
        return _held_in_parts(field, dtype, root, f)
    return root.find(f) or root.capture(f, patient=patient)


def find(field: Field, dtype: torch.dtype) -> Held | None:
    """What a vector field holds, if it is like an earlier capture.

    Raises:
        NotCompiled: that is not to be used.
    """
    root = root_of(field, dtype, make=False)
    if root is None or not root.captures:
        return None
    assert field.source is not None
    return root.find(field.source[0]) if field.one is None else held_by(field, dtype)


def _held_in_parts(field: Field, dtype: torch.dtype, root: Root, f: Any) -> Held:
    """What the field of one system holds: its parts of the tensors of all stand in their places meanwhile."""
    from .dynamo import Slot

    assert field.source is not None
    of_all = Field(f, source=field.source)
    whole, all_of_it = held_by(of_all, dtype), root_of(of_all, dtype)
    assert all_of_it is not None
    places = [*whole.entry.places, *whole.entry.numbers]
    scope = {"L": {"f": f}, "G": all_of_it.captures[0].scope}
    before: list[tuple[Slot, Tensor]] = []
    now: dict[int, Tensor] = {}
    try:
        for place, x in zip(places, whole.tensors):
            part = field.parts[id(x)]
            if part is x or (part.shape == x.shape and part.data_ptr() == x.data_ptr()):
                continue
            slot = Slot(place, scope)
            try:
                slot.set(nn.Parameter(part, x.requires_grad) if isinstance(x, nn.Parameter) else part)
            except Exception as error:
                raise NotCompiled("f holds tensors where no part of them can stand") from error
            before.append((slot, x))
            now[id(slot.get())] = part
        held = root.find(f) or root.capture(f)
    finally:
        for slot, x in before:
            slot.set(x)
    tensors = [field.parts[id(x)] for x in whole.tensors]
    known = {id(x): i for i, x in enumerate(tensors)} | {id(x): i for i, x in enumerate(whole.tensors)}
    found = [now.get(id(x), x) for x in held.tensors]
    if any(id(x) not in known for x in found):
        raise NotCompiled("f holds other tensors for one system than for all")
    return held._replace(tensors=tensors, order=[known[id(x)] for x in found])


def _example(layout: Layout) -> tuple[Any, Tensor]:
    """A state, and a time."""
    with torch.inference_mode(False):
        flat = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
        state = torch.utils._pytree.tree_map(torch.clone, layout.unflatten(flat))
        return state, torch.zeros((), dtype=layout.dtype, device=layout.device)


def _plain(state: Any) -> bool:
    if isinstance(state, Tensor):
        return True
    if type(state) not in (tuple, list, dict, collections.OrderedDict) and not hasattr(state, "_fields"):
        return False
    return all(map(_plain, state.values() if isinstance(state, dict) else state))


def _code(f: Any) -> Any:
    """What a callable has in common with others that are made in the same place."""
    while True:
        if isinstance(f, types.MethodType):
            f = f.__func__
        elif isinstance(f, functools.partial):
            f = f.func
        elif isinstance(f, types.FunctionType):
            return f.__code__
        else:
            return type(f)


# How deep, and how many objects, a sketch goes.
_DEPTH, _WIDTH = 6, 200


def sketch(f: Any) -> Any:
    """How a callable looks that could not be captured: another that looks so is not tried again."""
    room = [_WIDTH]

    def draw(x: Any, depth: int) -> Any:
        room[0] -= 1
        if isinstance(x, (bool, str, type(None))):
            return x
        if depth > _DEPTH or room[0] < 0:
            return type(x)
        if isinstance(x, types.MethodType):
            return x.__func__.__code__ if hasattr(x.__func__, "__code__") else x.__func__, draw(x.__self__, depth + 1)
        if isinstance(x, functools.partial):
            return draw(x.func, depth + 1), draw(x.args, depth + 1), draw(tuple(x.keywords.values()), depth + 1)
        if isinstance(x, types.FunctionType):
            cells = []
            for cell in x.__closure__ or ():
                try:
                    cells.append(draw(cell.cell_contents, depth + 1))
                except ValueError:  # a name that is not bound yet
                    cells.append(None)
            return x.__code__, *cells
        if isinstance(x, nn.Module):
            children = [draw(y, depth + 1) for y in x._modules.values()]
            flags = [y for y in vars(x).values() if isinstance(y, (bool, str))]
            return type(x), *flags, *children
        if type(x) in (tuple, list):
            return type(x), *[draw(y, depth + 1) for y in x]
        if isinstance(x, Tensor):
            return x.dtype, x.ndim, x.requires_grad, type(x), x.layout
        if hasattr(x, "__dict__") and not isinstance(x, (type, types.ModuleType)):
            return type(x), *[y for y in vars(x).values() if isinstance(y, (bool, str))]
        return type(x)

    return draw(f, 0)
