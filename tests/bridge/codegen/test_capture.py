"""What a field holds: it is like an earlier capture exactly where that serves it."""

import collections
import functools
import logging
import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from pyjlode.capture import held as capture
from pyjlode.capture.held import find, held_by
from pyjlode.capture.trace import Trace
from pyjlode.errors import NotCompiled
from pyjlode.problem import Field, Layout

FACTOR = 2.0
H = torch.zeros(2)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(capture, "_roots", type(capture._roots)())


def field(f, h=H):
    return Field(f, h.shape, (f, h.shape))


def held(f, h=H):
    return held_by(field(f, h), h.dtype)


def is_known(f, h=H):
    return find(field(f, h), h.dtype) is not None


class Module(nn.Module):
    scale = 1.0

    def __init__(self, width=4, factor=1.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
        self.register_buffer("shift", torch.randn(2))
        self.factor = factor

    def forward(self, t, h):
        return self.net(h) * self.factor * self.scale + self.shift


def closure(k, a=1.0):
    return lambda t, h: -k * h * a


def of_global(t, h):
    return FACTOR * h


MODULE = Module()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Module(),
        lambda: Module().forward,
        lambda: closure(torch.randn(2)),
        lambda: closure(1.5, 0.5),
        lambda: functools.partial(lambda w, t, h: w * h, torch.randn(())),
        lambda: lambda t, h: MODULE(t, h),
        lambda: of_global,
    ],
)
def test_alike_made_anew(make):
    first = held(make())
    assert is_known(make())
    assert held(make()).key == first.key


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda: Module(4), lambda: Module(5)),
        (lambda: Module(factor=1.0), lambda: Module(factor=2.0)),
        (lambda: Module(), lambda: Module().double()),
        (lambda: Module(), lambda: Module().requires_grad_(False)),
        (lambda: closure(torch.ones(2), 1.0), lambda: closure(torch.ones(2), 2.0)),
        (lambda: closure(torch.ones(2)), lambda: closure(torch.ones(1))),
        (lambda: closure(1), lambda: closure(True)),
        (lambda: closure(torch.tensor([1, 2])), lambda: closure(torch.tensor([1, 3]))),
        (lambda: closure({"a": 1}["a"]), lambda: closure({"a": 2}["a"])),
    ],
)
def test_not_alike(a, b):
    assert held(a()).key != held(b()).key


def test_a_zero_of_another_sign_is_refused():
    held(closure(1.0, 0.0))
    assert is_known(closure(1.0, 0.0))
    with pytest.raises(NotCompiled, match="another sign"):
        held(closure(1.0, -0.0))


@pytest.mark.parametrize("make", [lambda f: f, lambda f: f.forward, lambda f: lambda t, h: f(t, h)])
def test_what_f_does_not_read_counts_for_nothing(make):
    f = Module()
    held(make(f))
    f.history = [torch.ones(2)]
    f.statistics = object()
    f.loss = (f.net[0].weight * 2).sum()
    f.optimizer = torch.optim.Adam(f.parameters())
    f.nfe = 3
    f.other = nn.Linear(2, 2)
    f.register_buffer("count", torch.zeros(()))
    assert is_known(make(f))
    f.history.append(3)
    f.nfe, f.statistics, f.loss = 4, [1.0], None
    assert is_known(make(f))


def test_globals_class_attributes_and_modes_count(monkeypatch):
    f, drop = Module(), nn.Dropout(0.5).eval()
    for x in (of_global, f, drop_of(drop)):
        held(x)
        assert is_known(x)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert not is_known(of_global)
    monkeypatch.setattr(Module, "scale", 2.0)
    assert not is_known(f)
    drop.train()
    assert not is_known(drop_of(drop))


def drop_of(drop):
    return lambda t, h: drop(h)


def test_values_of_tensors_do_not_count():
    f = Module()
    before = held(f)
    with torch.no_grad():
        for x in f.parameters():
            x.add_(1)
    after = held(f)
    assert after.key == before.key
    assert {id(x) for x in after.tensors} == {id(x) for x in [*f.parameters(), f.shift]}


def test_other_tensors_are_found_in_the_same_order():
    one, other = Module(), Module()
    names = {id(x): name for name, x in [*one.named_parameters(), *one.named_buffers()]}
    others = {id(x): name for name, x in [*other.named_parameters(), *other.named_buffers()]}
    assert [names[id(x)] for x in held(one).tensors] == [others[id(x)] for x in held(other).tensors]


settings = types.ModuleType("settings")
settings.inner = types.ModuleType("settings.inner")
settings.inner.rate = 1.0
sys.modules["settings"] = settings


class Box:
    rate = 1.0


BOX = Box()


def of_module(t, h):
    return -settings.inner.rate * h


def of_import(t, h):
    import settings as other

    return -other.inner.rate * h


def by_name(t, h):
    return -getattr(settings.inner, "rate") * h  # noqa: B009


def of_attribute(t, h):
    return -of_attribute.rate * h


of_attribute.rate = 1.0


@pytest.mark.parametrize(
    ("f", "change"),
    [
        (of_module, lambda: setattr(settings.inner, "rate", 2.0)),
        (of_import, lambda: setattr(settings.inner, "rate", 3.0)),
        (by_name, lambda: setattr(settings.inner, "rate", 4.0)),
        (of_attribute, lambda: setattr(of_attribute, "rate", 2.0)),
        (lambda t, h, x=collections.deque([1.0]): -x[0] * h, lambda f: f.__defaults__[0].appendleft(2.0)),
        (lambda t, h, x=[1.0]: -x[0] * len(x) * h, lambda f: f.__defaults__[0].append(2.0)),
        (lambda t, h, x={"a": 1.0}: -x["a"] * h, lambda f: f.__defaults__[0].update(a=2.0)),
        (lambda t, h, x=BOX: -x.rate * h, lambda: setattr(BOX, "rate", 2.0)),
        (lambda t, h, x={1.0}: -h if 1.0 in x else h, lambda f: f.__defaults__[0].clear()),
    ],
)
def test_what_hides_is_seen(f, change):
    before = held(f).key
    assert is_known(f)
    change(f) if change.__code__.co_argcount else change()
    assert not is_known(f)
    assert held(f).key != before


def test_numbers_that_change_become_inputs():
    keys = [held(closure(torch.ones(2), 1.0 + 0.1 * i)).key for i in range(3)]
    assert len(set(keys)) == 2
    assert is_known(closure(torch.ones(2), 5.0))
    numbers = held(closure(torch.ones(2), 7.0)).tensors[-1]
    assert torch.equal(numbers, torch.tensor(7.0))


def test_several_numbers_that_change_are_told_apart():
    def make(a, b):
        return lambda t, h: (h * b + t) * a - b

    for a, b in ((1.0, 2.0), (3.0, 2.0), (4.0, 5.0), (6.0, 7.0)):
        made = held(make(a, b))
        trace = Trace(made, H)
        got = trace.module(torch.tensor(0.3), H + 1, *[made.tensors[i] for i in trace.slots])
        assert torch.allclose(got, make(a, b)(torch.tensor(0.3), H + 1))


def test_numbers_of_objects_and_classes_that_change():
    class Scaled:
        shift = 0.0

        def __init__(self):
            self.scale = 1.0

        def __call__(self, t, h):
            return self.scale * torch.cos(h) + self.shift

    f = Scaled()
    for change in (None, "scale", "shift", "scale", "shift", "scale"):
        if change:
            setattr(f if change == "scale" else Scaled, change, getattr(f, change) + 1.5)
        made = held(f)
        trace = Trace(made, H)
        got = trace.module(torch.tensor(0.3), H, *[made.tensors[i] for i in trace.slots])
        assert torch.allclose(got, f(None, H))


def test_what_changes_again_and_again_is_given_up():
    def make(n):
        return lambda t, h: h * len(range(n))

    for i in range(capture._FRUITLESS):
        held_by(field(make(i)), H.dtype, patient=False)
    for i in range(20, 24):
        with pytest.raises(NotCompiled, match="another at each solve"):
            held_by(field(make(i)), H.dtype, patient=False)
    held(make(100))  # but not where it is asked for


def test_what_could_not_be_captured_is_not_tried_again(monkeypatch):
    from pyjlode.capture import dynamo

    calls, inner = [], dynamo.Captures.capture

    def counted(*args):
        calls.append(args)
        return inner(*args)

    monkeypatch.setattr(dynamo.Captures, "capture", counted)

    def make(net):
        return lambda t, h: net(h) * float(t)

    nets = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Tanh()]
    counts = []
    for net in nets:
        with pytest.raises(NotCompiled, match="Python number or a branch"):
            held(make(net))
        counts.append(len(calls))
    assert counts[0] == counts[1] < counts[2]  # with and without a graph, of either kind


def test_refusals_and_captures_say_nothing_else(capfd, caplog):
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(12):
            held(closure(i))
        for f in (lambda t, h: h * float(t), lambda t, h: print(h), lambda t, h: h * np.interp(0.3, [0, 1], [0, 2])):
            with pytest.raises(NotCompiled):
                held(f)
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_tied_tensors_are_one():
    w = torch.randn(2)
    tied, apart = ([w, w], [w, w.clone()])
    f = [lambda t, h, a=a, b=b: a * h + b for a, b in (tied, apart)]
    assert [len(held(x).tensors) for x in f] == [1, 2]
    assert held(f[0]).key != held(f[1]).key


@pytest.mark.parametrize("state", [(torch.zeros(2), torch.zeros(1)), {"q": torch.zeros(2), "p": torch.zeros(1)}])
def test_trees_are_captured(state):
    layout = Layout(state)

    def f(t, h):
        q, p = h.values() if isinstance(h, dict) else h
        if isinstance(h, dict):
            return {"p": q.sum(0, keepdim=True), "q": -p * q}  # in another order
        return -p * q, q.sum(0, keepdim=True)

    made = Field(lambda t, y: layout.flatten_result(t, f(t, layout.unflatten(y))), source=(f, layout))
    assert held_by(made, torch.float32).tensors == []


def test_a_thread_finds_what_another_has_captured():
    import threading

    f, found = Module(), []
    held(f)
    threads = [threading.Thread(target=lambda: found.append(is_known(f))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


def test_modes_of_gradients_and_inference_change_nothing():
    f = Module()
    held(f)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert is_known(f)


def test_the_module_of_a_library_is_looked_at_too(monkeypatch):
    monkeypatch.setattr(math, "rate", 1.0, raising=False)
    f = lambda t, h: -math.rate * h  # noqa: E731
    held(f)
    monkeypatch.setattr(math, "rate", 2.0)
    assert not is_known(f)


def test_where_dynamo_is_switched_off_nothing_is_captured():
    f = lambda t, h: -h  # noqa: E731
    with torch.compiler.set_stance("force_eager"), pytest.raises(NotCompiled, match="switched off"):
        held(f)
    held(f)


def test_what_is_compiled_already_is_captured():
    net = nn.Linear(2, 2)
    f = torch.compile(lambda t, h: net(h), backend="eager")
    assert len(held(f).tensors) == 2
    assert is_known(f)
