"""What a callable holds: equal keys exactly where a trace of the one serves the other."""

import functools

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
