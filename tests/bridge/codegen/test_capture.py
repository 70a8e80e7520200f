"""What a callable holds: equal keys exactly where a trace of the one serves the other."""

import array
import collections
import contextvars
import ctypes
import functools
import itertools
import logging
import math
import random
import re
import sys
import threading
import time
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from pyjlode.bridge.codegen.capture import held
from pyjlode.errors import NotCompiled

FACTOR = 2.0


class Module(nn.Module):
    scale = 1.0

    def __init__(self, width=4, factor=1.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
        self.register_buffer("shift", torch.randn(2))
        self.factor = factor

    def forward(self, t, h):
        return self.net(h) * self.factor + self.shift


def closure(k, a=1.0):
    return lambda t, h: -k * h * a


def of_global(t, h):
    return FACTOR * h


@pytest.mark.parametrize(
    "make",
    [
        lambda: Module(),
        lambda: closure(torch.randn(3)),
        lambda: functools.partial(closure, torch.ones(())),
        lambda: Module().forward,
        lambda: {"f": of_global, "x": [1, (2.0, "a")]},
    ],
)
def test_alike_made_anew(make):
    assert held(make()).key == held(make()).key
    assert hash(held(make()).key) == hash(held(make()).key)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda: Module(4), lambda: Module(5)),
        (lambda: Module(factor=1.0), lambda: Module(factor=2.0)),
        (lambda: Module().train(), lambda: Module().eval()),
        (lambda: Module(), lambda: Module().double()),
        (lambda: Module(), lambda: Module().requires_grad_(False)),
        (lambda: closure(torch.ones(3), 1.0), lambda: closure(torch.ones(3), 2.0)),
        (lambda: closure(torch.ones(3)), lambda: closure(torch.ones(2))),
        (lambda: closure(1), lambda: closure(True)),
        (lambda: closure(0.0), lambda: closure(-0.0)),
        (lambda: closure(torch.tensor([1, 2])), lambda: closure(torch.tensor([1, 3]))),
        (lambda: closure(np.ones(2)), lambda: closure(np.zeros(2))),
        (lambda: closure({"a": 1}), lambda: closure({"a": 2})),
        (lambda: closure([1, 2]), lambda: closure((1, 2))),
    ],
)
def test_not_alike(a, b):
    assert held(a()).key != held(b()).key


def test_globals_and_class_attributes_count(monkeypatch):
    before = held(of_global).key, held(Module()).key
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert held(of_global).key != before[0]
    monkeypatch.setattr(Module, "scale", 2.0)
    assert held(Module()).key != before[1]


def test_values_of_tensors_do_not_count_and_their_order_is_that_of_the_walk():
    f = Module()
    before = held(f)
    with torch.no_grad():
        for x in f.parameters():
            x.add_(1)
    after = held(f)
    assert after.key == before.key
    assert [id(x) for x in after.tensors] == [id(x) for x in [*f.parameters(), f.shift]] or len(after.tensors) == 5


settings = types.ModuleType("settings")
settings.inner = types.ModuleType("settings.inner")
settings.inner.rate = 1.0
sys.modules["settings"] = settings
RATE = contextvars.ContextVar("rate", default=1.0)


class Box:
    rate = 1.0


BOX = Box()
LOCAL = threading.local()
LOCAL.rate = 1.0


def of_module(t, h):
    return -settings.inner.rate * h


def of_import(t, h):
    import settings as other

    return -other.inner.rate * h


def by_name(t, h):
    return -getattr(settings.inner, "rate") * h  # noqa: B009


def of_context(t, h):
    return -RATE.get() * h


def of_thread(t, h):
    return -LOCAL.rate * h


class Holding:
    def __init__(self, x):
        self.x = x

    def __call__(self, t, h):
        return -h


class Rates(dict):
    pass


def changed_box():
    BOX.rate = 2.0


@pytest.mark.parametrize(
    ("f", "change"),
    [
        (of_module, lambda: setattr(settings.inner, "rate", 2.0)),
        (of_import, lambda: setattr(settings.inner, "rate", 3.0)),
        (by_name, lambda: setattr(settings.inner, "rate", 4.0)),
        (of_context, lambda: RATE.set(2.0)),
        (of_thread, lambda: setattr(LOCAL, "rate", 2.0)),
        (f := Holding(collections.deque([1.0])), lambda f=f: f.x.append(2.0)),
        (f := Holding(bytearray(b"a")), lambda f=f: f.x.extend(b"b")),
        (f := Holding(array.array("d", [1.0])), lambda f=f: f.x.append(2.0)),
        (f := Holding(types.MappingProxyType(d := {"a": 1})), lambda d=d: d.update(a=2)),
        (f := Holding(Rates()), lambda f=f: setattr(f.x, "rate", 2.0)),
        (f := Holding(weakref.ref(BOX)), changed_box),
        (f := Holding([].append), lambda f=f: f.x(1)),
        (f := Holding(settings.inner), None),
    ],
)
def test_what_hides_is_seen(f, change):
    if change is None:
        held(f)
        return
    before = held(f).key
    assert held(f).key == before
    change()
    assert held(f).key != before


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (iter([1.0, 2.0]), "list_iterator"),
        (itertools.count(), "count"),
        ((i for i in ()), "generator"),
        (memoryview(b"a"), "memoryview"),
        (ctypes.c_double(1.0), "ctypes"),
        (ctypes.CDLL(None), "ctypes"),
        (np.random.default_rng(0), "random"),
        (random.Random(0), "differs each time"),
        (time.time, "differs each time"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.ones(2).untyped_storage(), "UntypedStorage"),
    ],
)
def test_what_no_walk_shows_is_refused(x, why):
    with pytest.raises(NotCompiled, match=why):
        held(Holding(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_modules_of_torch_jit_are_refused():
    for x in (torch.jit.trace(nn.Linear(2, 2), torch.ones(2)), torch.jit.script(nn.Linear(2, 2))):
        for f in (x, Holding(x)):
            with pytest.raises(NotCompiled, match=r"torch\.jit"):
                held(f)


def test_an_object_that_does_not_let_itself_be_looked_at_is_refused():
    class Shy:
        @property
        def __dict__(self):
            raise ValueError("go away")

    with pytest.raises(NotCompiled, match="go away"):
        held(Holding(Shy()))


@pytest.mark.parametrize(
    "x",
    [
        math.sin,
        torch.sin,
        np.sin,
        np.interp,
        object(),
        threading.Lock(),
        logging.getLogger("a"),
        re.compile("a"),
        slice(2),
    ],
)
def test_what_stays_the_same_is_held_by_identity(x):
    f = Holding(x)
    assert held(f).key == held(f).key


def test_tied_tensors_are_one():
    w = torch.randn(2)
    tied, apart = held([w, w]), held([w, w.clone()])
    assert len(tied.tensors) == 1
    assert len(apart.tensors) == 2
    assert tied.key != apart.key


def test_what_is_too_large_or_has_no_order_is_refused():
    with pytest.raises(NotCompiled, match="too many objects"):
        held([[] for _ in range(10_000)])
    with pytest.raises(NotCompiled, match="set of objects"):
        held({object(), object()})
    with pytest.raises(NotCompiled, match="NumPy array"):
        held(np.zeros(20_000))
