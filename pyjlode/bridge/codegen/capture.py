"""What a callable holds besides its arguments: the tensors that its code reads, and all else that may decide what it
does. A trace of the callable is good for as long as the latter is the same."""

from __future__ import annotations

import array
import collections
import contextvars
import datetime
import decimal
import dis
import enum
import functools
import logging
import re
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import NotCompiled
from ...parameters import HOOKS
from ...problem import Field
from ..runtime import of_a_signal

# A callable that holds more is not walked at every solve.
_LIMIT = 5_000
# Numbers of an integer tensor or an array that are a part of the code, not of its parameters.
_CONTENT = 10_000
_LIBRARIES = (
    "torch",
    "numpy",
    "builtins",
    "math",
    "cmath",
    "functools",
    "operator",
    "typing",
    "collections",
    "pyjlode",
    "_pytest",  # whose `assert` names it
)
_MODULE = frozenset(vars(nn.Module()))
_SIMPLE = (
    bool,
    int,
    complex,
    str,
    bytes,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.Size,
    range,
    enum.Enum,
)


# Modules whose functions answer something else each time.
_OUTSIDE = {"time", "datetime", "random", "_random", "secrets", "uuid"}
# Builtins whose answer no walk through objects shows.
_HIDING = {"globals", "eval", "exec", "open", "input", "__import__", "compile"}
# What is the same for as long as it is the same object.
_FIXED: tuple[type, ...] = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.CodeType,
    types.NotImplementedType,
    slice,
    re.Pattern,
    decimal.Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    uuid.UUID,
    logging.Logger,
    np.dtype,
    type(threading.Lock()),
    type(threading.RLock()),
)
# Of PyTorch's own, those that hold more than their name says.
_SCRIPTED = (torch.jit.ScriptFunction, torch.ScriptObject, torch.UntypedStorage, torch.storage.TypedStorage)
_TENSORS, _STRIDED = (Tensor, nn.Parameter), torch.strided


class Slot(NamedTuple):
    """Where a Python number lies: in a dictionary (of an object's attributes, or of globals), or in a closure."""

    owner: Any
    name: str

    def get(self) -> Any:
        return self.owner.cell_contents if isinstance(self.owner, types.CellType) else self.owner.get(self.name)

    def set(self, value: Any) -> None:
        if isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        else:
            self.owner[self.name] = value


class Held(NamedTuple):
    """What a callable holds.

    Attributes:
        key: equal for two callables that do the same with tensors of the same shapes. Functions count by their code.
        tensors: the floating-point tensors, in the order of the walk: those of equal keys correspond.
        counters: numbers that calls were seen to change, in the same order. Their values are not in the key: a trace
            has to show that nothing depends on them.
    """

    key: tuple[Any, ...]
    tensors: list[Tensor]
    counters: tuple[Slot, ...] = ()


# Names of such numbers, each with what has it: the type of an object, the code of a function, the name of a module.
_counted: set[tuple[Any, str]] = set()
_counted_names: set[str] = set()


def held(f: Any) -> Held:
    """Walk the objects that `f` can reach by its attributes, closures, default arguments and globals.

    Raises:
        NotCompiled: it holds too much to look through at every solve, or what cannot be compared.
    """
    return _walked(_Walk(), f)


def _walked(walk: _Walk, f: Any) -> Held:
    try:
        walk.visit(f)
        if walk.modules:
            walk.look_into_modules()
        return Held(tuple(walk.key), walk.tensors, tuple(walk.counters))
    except NotCompiled:
        raise
    except Exception as error:  # an object that does not let itself be looked at
        if of_a_signal(error):
            raise
        raise NotCompiled(f"what f holds cannot be looked through: {type(error).__name__}: {error}") from error


class Snapshot:
    """What lies in the containers that a callable can reach: to find out what a call changes, and to undo it.

    Raises:
        NotCompiled: as `held`.
    """

    def __init__(self, f: Any) -> None:
        walk = _Noting()
        _walked(walk, f)
        self.numbers, self.contents, self.slots = walk.numbers, walk.contents, walk.slots

    def count_changed(self) -> bool:
        """Have numbers that are others now be counters from now on; whether there is a new one."""
        new = set()
        for entry, (slot, value) in self.numbers.items():
            now = slot.get()
            if type(now) is type(value) and now != value and entry not in _counted:
                new.add(entry)
        _counted.update(new)
        _counted_names.update(name for _, name in new)
        return bool(new)

    def restore(self) -> bool:
        """Put back what lay there; whether something else did."""
        changed = False
        for x, before in self.contents:
            now = list(x.items()) if isinstance(x, dict) else list(x)
            flat = [y for pair in now for y in pair] if isinstance(x, dict) else now
            was = [y for pair in before for y in pair] if isinstance(x, dict) else before
            if len(flat) == len(was) and all(map(_same, flat, was)):
                continue
            changed = True
            x.clear()
            x.update(before) if isinstance(x, dict) else x.extend(before)
        for slot, value in self.slots:
            if not _same(slot.get(), value):
                changed = True
                slot.set(value)
        return changed


def _same(x: Any, y: Any) -> bool:
    return x is y or (type(x) is type(y) and type(x) in (bool, int, float, str) and x == y)


def held_by(field: Field) -> Held:
    """What a vector field holds: the parts of tensors where it has parts of them.

    Raises:
        NotCompiled: as `held`; or a trace of the field would not show what it does.
    """
    if field.source is None:
        raise NotCompiled("it is solved within another (autocast, or its sensitivities), which is not compiled")
    whole = held(field.source)
    if not field.parts:
        return whole
    tensors = [field.parts[id(x)] for x in whole.tensors]
    return Held((*whole.key, "parts", field.shape), tensors)


@functools.lru_cache(maxsize=10_000)
def _library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES


class _Names(NamedTuple):
    """What a function's code, and the code of the functions that it defines, names.

    Attributes:
        loaded: global names. imported: modules. all: both, attributes, and words that may name an attribute.
    """

    loaded: tuple[str, ...]
    imported: tuple[str, ...]
    all: frozenset[str]


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> _Names:
    loaded: dict[str, None] = {}
    imported: dict[str, None] = {}
    words = {x for x in code.co_consts if isinstance(x, str) and x.isidentifier()} | set(code.co_names)
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            loaded[step.argval] = None
        elif step.opname == "IMPORT_NAME":
            imported[step.argval] = None
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            loaded |= dict.fromkeys(inner.loaded)
            imported |= dict.fromkeys(inner.imported)
            words |= inner.all
    return _Names(tuple(loaded), tuple(imported), frozenset(words))


@functools.lru_cache(maxsize=1_000)
def _kind(x: Any) -> str:
    """The method of the walk for objects of type `x`."""
    for kind, types_of_it in _KINDS.items():
        if issubclass(x, types_of_it):
            return kind
    if x.__module__ == "numpy":
        return "array"
    if any(base.__module__ in ("_ctypes", "ctypes") for base in x.__mro__):
        return "foreign"
    return "opaque" if _library(x.__module__) else "object"


_KINDS: dict[str, Any] = {
    "simple": _SIMPLE,
    "number": float,
    "tensor": Tensor,
    "scripted": torch.jit.ScriptModule,
    "module": nn.Module,
    "function": types.FunctionType,
    "method": types.MethodType,
    "partial": functools.partial,
    "mapping": (dict, types.MappingProxyType),
    "sequence": (list, tuple, collections.deque),
    "set": (set, frozenset),
    "content": (bytearray, array.array),
    "variable": contextvars.ContextVar,
    "reference": weakref.ReferenceType,
    "fixed": _FIXED,
    "builtin": types.BuiltinFunctionType,
    "type": type,
    "accessor": property,
    "wrapper": (staticmethod, classmethod),
    "library": types.ModuleType,
}


# Of types that were made at run time, as those written in Python are.
_HEAP = 1 << 9


def _outside(x: Any) -> bool:
    """Whether it answers something else each time it is asked."""
    return (getattr(x, "__module__", None) or type(x).__module__) in _OUTSIDE and not isinstance(
        x, (datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, uuid.UUID)
    )


class _Walk:
    def __init__(self) -> None:
        self.key: list[Any] = []
        self.tensors: list[Tensor] = []
        self.counters: list[Slot] = []
        self.seen: dict[int, int] = {}
        self.modules: list[types.ModuleType] = []
        self.names: set[frozenset[str]] = set()

    def visit(self, x: Any) -> None:
        of: Any = type(x)
        kind = _kind(of)
        if kind == "simple":
            self.key.append((type(x), x))
            return
        if kind == "number":
            self.key.append((float, x if x else str(x)))  # 0.0 == -0.0
            return
        seen = self.seen
        before = seen.get(id(x))
        if before is not None:
            self.key.append(before)
            return
        if len(seen) > _LIMIT:
            raise NotCompiled("f holds too many objects to compare at every solve")
        seen[id(x)] = len(seen)
        getattr(self, kind)(x)

    def named(self, of: Any, owner: Any, name: str, value: Any) -> None:
        """What `owner` has by a name, which says what it is unless it is a counter."""
        if name in _counted_names and (of, name) in _counted and type(value) in (int, float):
            self.counters.append(Slot(owner, name))
            self.key.append(Slot)
        else:
            self.visit(value)

    # Whether each name counts, or only those of counters: what is held is looked through at every solve.
    notes = False

    def method(self, x: types.MethodType) -> None:
        self.visit(x.__func__)
        self.visit(x.__self__)

    def partial(self, x: functools.partial) -> None:
        self.key.append(functools.partial)
        for part in (x.func, x.args, x.keywords, x.__dict__):
            self.visit(part)

    def mapping(self, x: Any) -> None:
        self.key.append((type(x), len(x)))
        for name, value in x.items():
            self.visit(name)
            self.visit(value)
        if type(x) is not dict:
            self.rest(x)

    def sequence(self, x: Sequence[Any]) -> None:
        self.key.append((type(x), len(x)))
        for value in x:
            self.visit(value)
        if type(x) is not list and type(x) is not tuple:
            self.rest(x)

    def rest(self, x: Any) -> None:
        """Attributes of what is a list or a dictionary of a kind of its own."""
        self.visit(type(x))
        if attributes := getattr(x, "__dict__", None):
            self.visit(attributes)

    def set(self, x: set | frozenset) -> None:
        if not all(isinstance(value, (*_SIMPLE, float)) for value in x):
            raise NotCompiled("f holds a set of objects, which has no order to compare by")
        self.key.append((type(x), frozenset(x)))

    def accessor(self, x: property) -> None:
        for function in (x.fget, x.fset):
            self.visit(function)

    def wrapper(self, x: staticmethod | classmethod) -> None:
        self.visit(x.__func__)

    def content(self, x: bytearray | array.array) -> None:
        if len(x) > _CONTENT:
            raise NotCompiled(f"f holds a {type(x).__name__} of {len(x)} numbers; make it a tensor")
        self.key.append((type(x), bytes(x)))

    def variable(self, x: contextvars.ContextVar) -> None:
        self.key.append(x)
        self.visit(x.get(None))

    def reference(self, x: weakref.ReferenceType) -> None:
        self.key.append(weakref.ReferenceType)
        self.visit(x())

    def library(self, x: types.ModuleType) -> None:
        self.key.append((types.ModuleType, x.__name__))
        if not _library(x.__name__):
            self.modules.append(x)

    def look_into_modules(self) -> None:
        """Of modules that are no libraries, what has a name that stands in some function that was met."""
        done: set[tuple[str, str]] = set()
        count = -1
        while count != len(done):
            count = len(done)
            for module in list(self.modules):
                here, words = vars(module), frozenset[str]().union(*self.names)
                for name in sorted(words & here.keys()):
                    if (module.__name__, name) not in done:
                        done.add((module.__name__, name))
                        self.key.append((module.__name__, name))
                        self.named(module.__name__, here, name, here[name])

    def foreign(self, x: Any) -> None:
        raise NotCompiled(f"f holds an object of ctypes ({type(x).__name__}), whose code and memory are not PyTorch's")

    def fixed(self, x: Any) -> None:
        self.identity(x)

    def builtin(self, x: types.BuiltinFunctionType) -> None:
        """A function written in C, perhaps bound to an object."""
        owner = x.__self__
        if _outside(x) or _outside(owner):
            whose = x.__module__ or type(owner).__module__
            raise NotCompiled(f"f calls {x.__name__}() of {whose}, which differs each time")
        if owner is None or isinstance(owner, (type, types.ModuleType)):
            self.identity(x)
        else:
            self.key.append((types.BuiltinFunctionType, x.__name__))
            self.visit(owner)

    def opaque(self, x: Any) -> None:
        if hasattr(x, "__dict__"):
            self.object(x)
        elif type(x).__module__.partition(".")[0] == "torch" and not isinstance(x, _SCRIPTED):
            self.identity(x)
        else:
            self.hidden(x)

    def hidden(self, x: Any) -> None:
        """What has no attributes: nothing is in it, if it is an object of Python's."""
        of = type(x)
        library, _, inner = of.__module__.partition(".")
        pure = library in ("typing", "operator") or (library == "numpy" and callable(x) and "random" not in inner)
        if not pure and not all(base is object or base.__flags__ & _HEAP for base in of.__mro__):
            raise NotCompiled(f"f holds a {of.__module__}.{of.__qualname__}, of which no walk shows what is in it")
        self.identity(x)

    def identity(self, x: Any) -> None:
        self.key.append(("id", id(x), x if x.__hash__ is not None else None))  # held by the key: no other gets its id

    def tensor(self, x: Tensor) -> None:
        if type(x) not in _TENSORS or x.layout != _STRIDED:
            what = type(x).__name__ if type(x) not in _TENSORS else f"tensor of layout {x.layout}"
            raise NotCompiled(f"f holds a {what}")
        if x.is_floating_point():
            self.key.append((Tensor, x.shape, x.dtype, x.requires_grad, x.device.type))
            self.tensors.append(x)
        elif x.is_complex():
            self.key.append((Tensor, x.shape, x.dtype, id(x)))
        elif x.is_quantized:
            raise NotCompiled("f holds a quantized tensor")
        elif x.numel() > _CONTENT or x.device.type != "cpu":
            raise NotCompiled(
                f"f holds an integer tensor of shape {tuple(x.shape)}, too large to be a part of the code"
            )
        else:
            self.key.append((Tensor, x.shape, x.dtype, x.detach().contiguous().numpy().tobytes()))

    def array(self, x: Any) -> None:
        if not hasattr(x, "tobytes") or x.dtype == object:
            self.opaque(x)
        elif x.size > _CONTENT:
            raise NotCompiled(f"f holds a NumPy array of {x.size} numbers; make it a tensor")
        else:
            self.key.append((type(x), x.shape, str(x.dtype), x.tobytes()))

    def scripted(self, x: torch.jit.ScriptModule) -> None:
        raise NotCompiled("f is or holds a module of torch.jit, whose code is not Python's")

    def module(self, x: nn.Module) -> None:
        state = vars(x)
        groups = state["_parameters"], state["_buffers"], state["_modules"]
        self.key.append((x.training, *map(len, groups)))
        self.visit(type(x))
        for group in groups:
            for key, value in group.items():
                self.key.append(key)
                self.visit(value)
        names = sorted(state.keys() - _MODULE)
        if any(map(state.get, HOOKS)):
            names += [name for name in HOOKS if state.get(name)]
        for name in names:
            self.key.append(name)
            if self.notes or name in _counted_names:
                self.named(type(x), state, name, state[name])
            else:
                self.visit(state[name])

    def object(self, x: Any) -> None:
        of = type(x)
        if _outside(x):
            raise NotCompiled(f"f holds a {of.__module__}.{of.__qualname__}, which differs each time")
        self.visit(of)
        slots = [name for cls in of.__mro__ for name in getattr(cls, "__slots__", ())]
        attributes = getattr(x, "__dict__", {})
        values = {**{name: getattr(x, name) for name in slots if hasattr(x, name)}, **attributes}
        if not values:
            self.hidden(x)
        for name, value in values.items():
            self.key.append(name)
            self.named(of, attributes, name, value)

    def type(self, x: type) -> None:
        """A class counts as itself, with what its functions name and the values of its attributes."""
        self.key.append(x)
        if _library(x.__module__):
            return
        if x.__module__ in _OUTSIDE and not issubclass(x, _FIXED):
            raise NotCompiled(f"f holds {x.__module__}.{x.__qualname__}, which differs each time")
        for cls in x.__mro__:
            if _library(cls.__module__) or cls is object:
                continue
            for name, value in vars(cls).items():
                if isinstance(value, (types.FunctionType, property, staticmethod, classmethod)) or not name.startswith(
                    "__"
                ):
                    self.key.append(name)
                    self.visit(value)

    def function(self, f: types.FunctionType) -> None:
        code = f.__code__
        self.key.append(code)
        for name, cell in zip(code.co_freevars, f.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:  # a name that is not bound yet
                self.key.append(None)
                continue
            if self.notes or name in _counted_names:
                self.named(code, cell, name, value)
            else:
                self.visit(value)
        self.visit(f.__defaults__)
        self.visit(f.__kwdefaults__)
        self.visit(f.__dict__)
        if _library(f.__module__):
            return
        names, here = _names(code), f.__globals__
        self.names.add(names.all)
        for name in names.loaded:
            if name in here:
                if self.notes or name in _counted_names:
                    self.named(f.__module__, here, name, here[name])
                else:
                    self.visit(here[name])
            elif name in _HIDING:
                raise NotCompiled(f"f calls {name}(), and no walk shows what it finds")
        for name in names.imported:
            if name in sys.modules:
                self.visit(sys.modules[name])


class _Noting(_Walk):
    """Notes the numbers that it meets by a name, and what lies in each container.

    Attributes:
        slots: of closures and globals, with what lies in them.
        contents: dictionaries, lists and deques, with their items.
    """

    notes = True

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[tuple[Any, str], tuple[Slot, int | float]] = {}
        self.slots: list[tuple[Slot, Any]] = []
        self.contents: list[tuple[Any, list[Any]]] = []

    def named(self, of: Any, owner: Any, name: str, value: Any) -> None:
        slot = Slot(owner, name)
        if isinstance(owner, types.CellType) or owner.get(name) is value:  # else it lies in a slot of an object
            if type(value) in (int, float):
                self.numbers[of, name] = slot, value
            if isinstance(owner, types.CellType) or "__builtins__" in owner:
                self.slots.append((slot, value))
        super().named(of, owner, name, value)

    def note(self, x: Any) -> None:
        if isinstance(x, dict):
            self.contents.append((x, list(x.items())))
        elif isinstance(x, (list, collections.deque)):
            self.contents.append((x, list(x)))

    def mapping(self, x: Any) -> None:
        self.note(x)
        super().mapping(x)

    def sequence(self, x: Sequence[Any]) -> None:
        self.note(x)
        super().sequence(x)

    def module(self, x: nn.Module) -> None:
        self.note(vars(x))
        for name in ("_parameters", "_buffers", "_modules"):
            self.note(vars(x).get(name))
        super().module(x)

    def object(self, x: Any) -> None:
        self.note(getattr(x, "__dict__", None))
        super().object(x)
