"""What a callable holds besides its arguments: the tensors that its code reads, and all else that may decide what it
does. A trace of the callable is good for as long as the latter is the same."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import NotCompiled
from ...parameters import HOOKS
from ...problem import Field

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


class Held(NamedTuple):
    """What a callable holds.

    Attributes:
        key: equal for two callables that do the same with tensors of the same shapes. Functions count by their code.
        tensors: the floating-point tensors, in the order of the walk: those of equal keys correspond.
    """

    key: tuple[Any, ...]
    tensors: list[Tensor]


def held(f: Any) -> Held:
    """Walk the objects that `f` can reach by its attributes, closures, default arguments and globals.

    Raises:
        NotCompiled: it holds too much to look through at every solve, or what cannot be compared.
    """
    walk = _Walk()
    walk.visit(f)
    return Held(tuple(walk.key), walk.tensors)


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


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals and attributes in a function's code and in the functions that it defines."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_names(constant))
    return tuple(names)


@functools.lru_cache(maxsize=1_000)
def _kind(x: Any) -> str:
    """The method of the walk for objects of type `x`."""
    for kind, types_of_it in _KINDS.items():
        if issubclass(x, types_of_it):
            return kind
    if x.__module__ == "numpy":
        return "array"
    return "opaque" if _library(x.__module__) else "object"


_KINDS: dict[str, Any] = {
    "simple": _SIMPLE,
    "number": float,
    "tensor": Tensor,
    "module": nn.Module,
    "function": types.FunctionType,
    "method": types.MethodType,
    "partial": functools.partial,
    "mapping": dict,
    "sequence": (list, tuple),
    "set": (set, frozenset),
    "type": type,
    "accessor": property,
    "wrapper": (staticmethod, classmethod),
    "library": types.ModuleType,
}


class _Walk:
    def __init__(self) -> None:
        self.key: list[Any] = []
        self.tensors: list[Tensor] = []
        self.seen: dict[int, int] = {}

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

    def method(self, x: types.MethodType) -> None:
        self.visit(x.__func__)
        self.visit(x.__self__)

    def partial(self, x: functools.partial) -> None:
        self.key.append(functools.partial)
        for part in (x.func, x.args, x.keywords, x.__dict__):
            self.visit(part)

    def mapping(self, x: dict) -> None:
        self.key.append((type(x), len(x)))
        for name, value in x.items():
            self.visit(name)
            self.visit(value)

    def sequence(self, x: Sequence[Any]) -> None:
        self.key.append((type(x), len(x)))
        for value in x:
            self.visit(value)

    def set(self, x: set | frozenset) -> None:
        if not all(isinstance(value, (*_SIMPLE, float)) for value in x):
            raise NotCompiled("f holds a set of objects, which has no order to compare by")
        self.key.append((type(x), frozenset(x)))

    def accessor(self, x: property) -> None:
        for function in (x.fget, x.fset):
            self.visit(function)

    def wrapper(self, x: staticmethod | classmethod) -> None:
        self.visit(x.__func__)

    def library(self, x: types.ModuleType) -> None:
        self.key.append((types.ModuleType, x.__name__))

    def opaque(self, x: Any) -> None:
        if hasattr(x, "__dict__"):
            self.object(x)
        else:
            self.identity(x)

    def identity(self, x: Any) -> None:
        self.key.append(("id", id(x), x if x.__hash__ is not None else None))  # held by the key: no other gets its id

    def tensor(self, x: Tensor) -> None:
        if x.is_floating_point():
            self.key.append((Tensor, x.shape, x.dtype, x.requires_grad, x.device.type))
            self.tensors.append(x)
        elif x.is_complex():
            self.key.append((Tensor, x.shape, x.dtype, id(x)))
        elif x.numel() > _CONTENT or x.device.type != "cpu":
            raise NotCompiled(
                f"f holds an integer tensor of shape {tuple(x.shape)}, too large to be a part of the code"
            )
        else:
            self.key.append((Tensor, x.shape, x.dtype, x.detach().contiguous().numpy().tobytes()))

    def array(self, x: Any) -> None:
        if not hasattr(x, "tobytes") or x.dtype == object:
            self.identity(x)
            return
        if x.size > _CONTENT:
            raise NotCompiled(f"f holds a NumPy array of {x.size} numbers; make it a tensor")
        self.key.append((type(x), x.shape, str(x.dtype), x.tobytes()))

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
            self.visit(state[name])

    def object(self, x: Any) -> None:
        self.visit(type(x))
        slots = [name for cls in type(x).__mro__ for name in getattr(cls, "__slots__", ())]
        values = {**{name: getattr(x, name) for name in slots if hasattr(x, name)}, **getattr(x, "__dict__", {})}
        if not values and not isinstance(x, types.BuiltinFunctionType):
            self.identity(x)
        for name, value in values.items():
            self.key.append(name)
            self.visit(value)

    def type(self, x: type) -> None:
        """A class counts as itself, with what its functions name and the values of its attributes."""
        self.key.append(x)
        if _library(x.__module__):
            return
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
        self.key.append(f.__code__)
        for cell in f.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:  # a name that is not bound yet
                self.key.append(None)
        self.visit(f.__defaults__)
        self.visit(f.__kwdefaults__)
        self.visit(f.__dict__)
        if _library(f.__module__):
            return
        names = _names(f.__code__)
        for name in names:
            if name not in f.__globals__:
                continue
            value = f.__globals__[name]
            self.visit(value)
            if isinstance(value, types.ModuleType) and not _library(value.__name__):
                for attribute in names:
                    if attribute in vars(value):
                        self.visit(vars(value)[attribute])
