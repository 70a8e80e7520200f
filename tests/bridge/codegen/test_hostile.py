"""Vector fields as no compiler likes them: by default each second solve is right, from rest too, compiled or not.

A kind says how a field is made, whether its value and its gradient are compiled, and what changes between two solves.
"""

import collections
import contextlib
import contextvars
import ctypes
import functools
import itertools
import math
import pathlib
import random
import sys
import tempfile
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import pyjlode
from pyjlode import arguments, odeint, solve
from pyjlode.bridge.codegen import program as programs
from pyjlode.capture import held as capture
from pyjlode.errors import NotCompiled
from pyjlode.problem import flat_field

F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
TOL = {"rtol": 1e-8, "atol": 1e-10}


def number(x):
    return torch.tensor(x, dtype=F64, requires_grad=True)


def plain(x):
    return torch.tensor(x, dtype=F64)


@dataclass
class Kind:
    """A field.

    Attributes:
        f: the field; its state has two numbers unless `h0` says otherwise.
        leaves: what gradients are taken by, beside the first state.
        compiled, derived: whether its value, and its gradient, are to be compiled.
        change: what happens between solves.
        why: of `Stats.not_compiled`.
    """

    f: Callable
    leaves: list = field(default_factory=list)
    compiled: bool = True
    derived: bool = True
    change: Callable[[], None] | None = None
    why: str = ""
    h0: object = None


ZOO = {}


def kind(make):
    ZOO[make.__name__] = make
    return make


def refused(f, why, leaves=(), change=None, h0=None):
    return Kind(f, list(leaves), False, False, change, why, h0)


@kind
def list_of_tensors():
    return refused(lambda t, h: torch.tensor([h[1], torch.sin(t) - h[0]]), "leaves PyTorch")


@kind
def numpy_on_a_clone():
    def f(t, h):
        x = h.detach().clone().numpy()
        return torch.from_numpy(np.array([x[1], np.sin(float(t)) - x[0]]))

    return refused(f, "leaves PyTorch")


@kind
def dosing_rate():
    times, rates = [0.0, 1.2, 1.3, 2.0], [0.0, 0.0, 1.0, 1.0]
    k = number(0.4)
    return refused(lambda t, h: float(np.interp(t.detach().numpy(), times, rates)) - k * h, "leaves PyTorch", [k])


@kind
def measured_current():
    times, values = torch.linspace(0, 2, 21, dtype=F64), torch.sin(torch.linspace(0, 6, 21, dtype=F64))

    def f(t, h):
        i = int(torch.searchsorted(times, t.detach()).clamp(0, 20))
        return values[i] - h

    return refused(f, "Python number or a branch")


@kind
def late_branch():
    k = number(0.4)
    return refused(lambda t, h: (1.0 if t > 1.5 else 0.0) - k * h, "branch", [k])


@kind
def late_where():
    k = number(0.4)
    return Kind(lambda t, h: torch.where(t > 1.5, k, 2 * k) - k * h, [k])


@kind
def annealed_temperature():
    temperature = plain(1.0)
    return refused(
        lambda t, h: torch.cos(t) - h / temperature.item(),
        "of the numbers of a tensor",
        change=lambda: temperature.mul_(0.7),
    )


@kind
def annealed_as_a_tensor():
    temperature = plain(1.0)
    return Kind(lambda t, h: torch.cos(t) - h / temperature, change=lambda: temperature.mul_(0.7))


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 0.5 * g * w, 0.5 * g * x


@kind
def custom_function():
    w = number(-0.6)
    return Kind(lambda t, h: Halved.apply(h + torch.cos(t), w), [w])


class Numpyish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(np.cos(ctx.saved_tensors[0].detach().numpy()))


@kind
def custom_function_that_leaves():
    w = number(0.8)
    return Kind(lambda t, h: Numpyish.apply(w * h + t) - h, [w], derived=False, why="leaves PyTorch")


@kind
def no_grad_block():
    w = number(0.7)

    def f(t, h):
        with torch.no_grad():
            gate = torch.sigmoid(w * h + t)
        return gate * torch.cos(w * t) - h

    return Kind(f, [w])


@kind
def detached_state():
    w = number(0.7)
    return Kind(lambda t, h: torch.cos(w * t) - w * h.detach() - 0.3 * h, [w])


@kind
def data_attribute():
    w = number(0.7)
    return Kind(lambda t, h: torch.cos(w * t) - w.data * h, [w])


@kind
def written_element_by_element():
    p = number(0.3)

    def f(t, h):
        d = torch.zeros_like(h)
        d[0] = h[1]
        d[1] = torch.sin(t) - h[0] - p * h[1]
        return d

    return Kind(f, [p])


@kind
def softmax_of_one_number():
    p = number(0.3)
    return Kind(lambda t, h: torch.cos(t) * torch.softmax(p, 0) * p.mean() - p.sum() * h, [p])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.nfe = 0
        self.rate = 1.0

    def forward(self, t, h):
        self.nfe += 1
        return self.rate * self.net(h) + torch.cos(t)


@kind
def counts_its_calls():
    f = Model()
    return Kind(f, list(f.parameters()))


@kind
def counts_and_is_set_back():
    f = Model()
    return Kind(f, list(f.parameters()), change=lambda: setattr(f, "nfe", 0))


@kind
def bound_method_with_a_setting():
    f = Model()
    return Kind(f.forward, list(f.parameters()), change=lambda: setattr(f, "rate", f.rate * 0.5))


@kind
def counts_in_a_buffer():
    class Counting(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("evaluations", torch.tensor(0.0))

        def forward(self, t, h):
            self.evaluations += 1
            return super().forward(t, h)

    f = Counting()
    return Kind(f, list(f.parameters()))


@kind
def stops_counting_to_change():
    class Ageing(nn.Module):
        nfe = 0

        def forward(self, t, h):
            self.nfe += 1
            return (torch.cos(t) if self.nfe >= 0 else torch.sin(t)) - h

    return refused(Ageing(), "uses nfe|changes")


@kind
def keeps_its_last_result():
    class Keeping(Model):
        def forward(self, t, h):
            self.last = self.net(h)
            return self.last + torch.cos(t)

    f = Keeping()
    return refused(f, "changes what it holds", list(f.parameters()))


config = types.ModuleType("hostile_config")
config.solver = types.ModuleType("hostile_config.solver")
sys.modules[config.__name__] = config


@kind
def setting_in_a_modules_module():
    config.solver.rate = 1.0
    return Kind(lambda t, h: torch.cos(t) - config.solver.rate * h, change=lambda: setattr(config.solver, "rate", 0.5))


@kind
def setting_in_a_deque():
    rates = collections.deque([1.0], maxlen=1)
    return Kind(lambda t, h: torch.cos(t) - rates[0] * h, change=lambda: rates.append(rates[0] * 0.5))


RATE = contextvars.ContextVar("rate", default=1.0)


@kind
def setting_in_a_context():
    RATE.set(1.0)
    return refused(lambda t, h: torch.cos(t) - RATE.get() * h, "ContextVar", change=lambda: RATE.set(RATE.get() * 0.5))


class Setting:
    rate = 1.0


@kind
def setting_behind_a_weak_reference():
    setting = Setting()
    ref = weakref.ref(setting)

    def change():
        setting.rate *= 0.5

    return Kind(lambda t, h: torch.cos(t) - ref().rate * h, change=change)


GLOBAL = 1.0


@kind
def setting_found_by_globals():
    globals()["GLOBAL"] = 1.0

    def change():
        globals()["GLOBAL"] *= 0.5

    return refused(lambda t, h: torch.cos(t) - globals()["GLOBAL"] * h, "globals", change=change)


@kind
def setting_in_an_iterator():
    class Endless:
        def __init__(self):
            self.inner = iter([1.0] * 10)

    held = Endless()
    return Kind(lambda t, h: torch.cos(t) - (1.0 if held.inner else 0.0) * h)


def setting_in_a_file(write, read):
    path = pathlib.Path(tempfile.mkdtemp()) / "rate"
    write(path, 1.0)
    return refused(
        lambda t, h: torch.cos(t) - float(read(path)) * h,
        "leaves PyTorch|does not capture",
        change=lambda: write(path, 0.5 * float(read(path))),
    )


@kind
def setting_in_a_text_file():
    return setting_in_a_file(lambda path, x: path.write_text(str(x)), lambda path: path.read_text())


@kind
def setting_in_a_file_of_numpys():
    return setting_in_a_file(lambda path, x: np.savetxt(path, [x]), np.loadtxt)


@kind
def setting_in_a_file_of_pytorchs():
    return setting_in_a_file(lambda path, x: torch.save(x, path), torch.load)


@kind
def choice_in_an_integer_tensor():
    which = torch.tensor([0, 1])
    return Kind(lambda t, h: torch.cos(t) - h[which] * plain([1.0, 2.0]), change=lambda: which.copy_(which.flip(0)))


@kind
def memory_by_address():
    def f(t, h):
        x = (ctypes.c_double * 2).from_address(h.contiguous().data_ptr())
        return torch.cos(t) - plain([x[0], x[1]])

    return refused(f, "leaves PyTorch|ctypes")


@kind
def ctypes_object():
    rate = ctypes.c_double(1.0)
    return Kind(lambda t, h: torch.cos(t) - rate.value * h, change=lambda: setattr(rate, "value", rate.value / 2))


@kind
def sparse_matrix():
    A = plain([[-0.3, 1.0], [-1.0, -0.3]]).to_sparse()
    return refused(lambda t, h: torch.sparse.mm(A, h[:, None])[:, 0] + torch.cos(t), "sparse")


@kind
def scripted_module():
    net = torch.jit.trace(nn.Linear(2, 2).double(), torch.zeros(2, dtype=F64))
    return refused(lambda t, h: net(h) - h + torch.cos(t), "leaves PyTorch", list(net.parameters()))


@kind
def clock():
    return refused(lambda t, h: torch.cos(t) - h + 0 * time.time(), "leaves PyTorch")


@kind
def table_in_numpy():
    table = np.array([1.0, 2.0])
    return Kind(lambda t, h: torch.cos(t) - torch.from_numpy(table) * h, change=lambda: table.__imul__(0.5))


@kind
def forward_hook():
    net = nn.Linear(2, 2).double()
    net.register_forward_hook(lambda module, args, out: torch.tanh(out))
    return Kind(lambda t, h: net(h) + torch.cos(t), list(net.parameters()))


def spectral():
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2).double())
    for _ in range(500):  # until the iteration stands still
        net(torch.zeros(2, dtype=F64))
    return net


@kind
def spectral_norm_in_training():
    net = spectral()
    return refused(lambda t, h: net(h) - h + torch.cos(t), "writes into|changes")


@kind
def spectral_norm():
    net = spectral().eval()
    return Kind(lambda t, h: net(h) - h + torch.cos(t), list(net.parameters()))


@kind
def weight_norm():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2).double())
    return Kind(lambda t, h: net(h) - h + torch.cos(t), list(net.parameters()))


@kind
def functional_call():
    net, w = nn.Linear(2, 2).double(), torch.eye(2, dtype=F64).mul(-0.5).requires_grad_()
    return Kind(lambda t, h: torch.func.functional_call(net, {"weight": w}, (h,)) + torch.cos(t), [w])


@kind
def partial():
    w = number([0.5, 0.8])
    return Kind(functools.partial(lambda w, t, h: torch.cos(w * t) - w * h, w), [w])


@kind
def result_of_an_operation():
    c = number(0.5).exp().detach()
    return Kind(lambda t, h, c=c: torch.cos(c * t) - c * h)


@kind
def dictionary_of_states():
    w = number(0.5)
    h0 = {"q": torch.zeros(1, dtype=F64), "p": torch.zeros(2, dtype=F64)}
    return Kind(
        lambda t, h: {"q": h["p"].sum(0, keepdim=True) - w * h["q"], "p": torch.cos(w * t) - h["p"]}, [w], h0=h0
    )


@kind
def real_and_complex():
    w = number(0.5)
    h0 = (torch.zeros(2, dtype=F64), torch.zeros(1, dtype=torch.complex128))
    return refused(
        lambda t, h: (torch.cos(w * t) - h[0] * h[1].abs().square(), 1j * w * h[1] + h[0].sum()), "complex", [w], h0=h0
    )


@kind
def one_number():
    w = number(0.5)

    def f(t, h):
        assert h.shape == ()
        return torch.cos(w * t) - w * h

    return Kind(f, [w], h0=torch.zeros((), dtype=F64))


@kind
def one_number_called_back():
    w = number(0.5)

    def f(t, h):
        assert h.shape == ()
        return math.cos(float(t)) - w * h

    return refused(f, "Python number", [w], h0=torch.zeros((), dtype=F64))


@kind
def hamiltonian():
    w = number(0.9)

    def f(t, h):
        with torch.enable_grad():
            x = h if h.requires_grad else h.detach().requires_grad_()
            H = (w * x[0] ** 4 / 4 + x[1] ** 2 / 2) + x[0] * torch.cos(t)
            g = torch.autograd.grad(H, x, create_graph=True)[0]
        return torch.stack([g[1], -g[0]])

    return Kind(f, [w])


@kind
def trace_of_the_jacobian():
    net = Model().net

    def f(t, h):
        with torch.enable_grad():
            x = h if h.requires_grad else h.detach().requires_grad_()
            k = net(x) + torch.cos(t)
            d = sum(torch.autograd.grad(k[i], x, create_graph=True)[0][i] for i in range(2))
        return k + 0.1 * d

    return Kind(f, list(net.parameters()))


@kind
def vmapped():
    w = number([0.5, 0.8])
    return Kind(lambda t, h: torch.func.vmap(lambda a, b: torch.cos(b * t) - a * b)(h, w), [w])


@kind
def checkpointed():
    w = number(0.5)

    def f(t, h):
        return torch.utils.checkpoint.checkpoint(lambda x: torch.cos(w * t) - torch.sin(w * x), h, use_reentrant=False)

    return Kind(f, [w])


@kind
def catches_its_errors():
    def f(t, h):
        try:
            return math.cos(float(t)) - h
        except (RuntimeError, TypeError):
            return -h

    return refused(f, "Python number")


@kind
def lru_cache():
    @functools.lru_cache
    def table(n):
        return torch.linspace(0.5, 1, n, dtype=F64)

    return refused(lambda t, h: torch.cos(t) - table(2) * h, "lru_cache")


@kind
def prints():
    return refused(lambda t, h: print(end=str(t)[:0]) or torch.cos(t) - h, "leaves PyTorch")


@kind
def advances_an_iterator():
    rates = iter([1.0] * 20_000)
    return refused(lambda t, h: torch.cos(t) - next(rates) * h, "PyTorch|changes")


@kind
def empties_a_list():
    rates = [1.0] * 4_000
    return refused(lambda t, h: torch.cos(t) - rates.pop() * h, "changes what it holds")


@kind
def counts_by_itertools():
    calls = itertools.count()
    return refused(lambda t, h: torch.cos(t) - (1.0 if next(calls) >= 0 else 2.0) * h, "PyTorch|changes")


class Remembering(nn.Module):
    """Answers by what it answered before, up to a part that is too small to be seen."""

    def __init__(self):
        super().__init__()
        self.before = torch.zeros(2, dtype=F64)

    def forward(self, t, h):
        self.before = torch.cos(t) - h + 1e-14 * self.before
        return self.before


@kind
def remembers():
    return refused(Remembering(), "changes what it holds")


@kind
def keeps_in_a_global():
    def f(t, h):
        global LAST
        LAST = torch.cos(t) - h
        return LAST

    return refused(f, "changes what it holds")


@kind
def dropout_in_training():
    drop = nn.Dropout(0.5)
    return refused(lambda t, h: torch.cos(t) - h + 0 * drop(h), "random")


@kind
def dropout_in_evaluation():
    drop = nn.Dropout(0.5).eval()
    return Kind(lambda t, h: torch.cos(t) - drop(h))


@kind
def numbers_that_change():
    class Rate:
        value = 1.0

    rate = Rate()

    def change():
        rate.value *= 0.7

    return Kind(lambda t, h: torch.cos(t) - rate.value * h, change=change)


@kind
def counts_in_a_class():
    class Counting:
        calls = 0

        def __call__(self, t, h):
            Counting.calls += 1
            return torch.cos(t) - h

    return Kind(Counting())


@kind
def buffers_counters_and_hooks():
    class Busy(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.tensor([0.1, -0.2], dtype=F64))
            self.history, self.loss = [], None
            self.net.register_forward_pre_hook(self.count)
            self.hooked = 0

        def count(self, module, args):
            self.hooked += 1

        def forward(self, t, h):
            return super().forward(t, h) + self.shift

    f = Busy()

    def change():
        f.history.append(torch.ones(3))
        f.loss = torch.ones((), requires_grad=True) * 2
        f.optimizer = torch.optim.Adam(f.parameters())

    return Kind(f, list(f.parameters()), change=change)


@kind
def property_that_changes():
    class Scaled:
        scale = 1.0

        @property
        def rate(self):
            return 2 * self.scale

        def __call__(self, t, h):
            return torch.cos(t) - self.rate * h

    f = Scaled()
    return Kind(f, change=lambda: setattr(f, "scale", f.scale * 0.5))


@kind
def environment():
    import os

    os.environ["HOSTILE"] = "1.0"
    return Kind(
        lambda t, h: torch.cos(t) - float(os.environ["HOSTILE"]) * h,
        change=lambda: os.environ.update(HOSTILE=str(float(os.environ["HOSTILE"]) / 2)),
    )


def states(x):
    leaves = torch.utils._pytree.tree_leaves(x)
    return torch.cat([torch.view_as_real(y).reshape(-1) if y.is_complex() else y.reshape(-1) for y in leaves])


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*[Ss]parse")
@pytest.mark.parametrize(("name", "rest"), [*zip(ZOO, itertools.cycle([True, False]))])
def test_a_trace_is_the_field_or_none(name, rest):
    """Without Julia: what a trace says at other points, and its reason where there is none."""
    made = ZOO[name]()
    layout, y0 = arguments.state(begin(made, rest))
    field = flat_field(made.f, layout, False)
    y0 = y0.detach()
    field(plain(0.0), y0)
    for _ in range(2):
        if not made.compiled:
            with pytest.raises(NotCompiled, match=made.why):
                programs.program_of(field, y0)
            return
        program, source = programs.program_of(field, y0)
        lifted = program.read(source)
        for t in (0.0, 0.9, 1.9):
            h, t = y0 + torch.randn_like(y0), plain(t)
            with torch.no_grad():
                assert torch.allclose(program.trace.module(t, h, *lifted), field(t, h))
            if not made.derived:
                with pytest.raises(NotCompiled, match=made.why):
                    program.text("vjp")
                continue
            v, t, h = torch.randn_like(h), t.requires_grad_(), h.requires_grad_()
            inputs = [t, h, *lifted[: program.trace.trained]]
            k = field(t, h)
            want = torch.autograd.grad(k, inputs, v, allow_unused=True) if k.requires_grad else [None] * len(inputs)
            got = program.trace.vjp.module(t.detach(), h.detach(), v, *[x.detach() for x in lifted])
            for a, b in zip(got, want):
                assert torch.allclose(a, torch.zeros_like(a) if b is None else b)
        if made.change:
            made.change()
            field = flat_field(made.f, layout, False)


def begin(made, rest):
    """The first state: at rest, or not; with gradients."""
    h0 = torch.zeros(2, dtype=F64) if made.h0 is None else made.h0

    def at(x):
        numbers = torch.linspace(0.4, -0.3, max(x.numel(), 2), dtype=F64)[: x.numel()].reshape(x.shape).to(x.dtype)
        return (0 * x if rest else numbers).requires_grad_()

    return torch.utils._pytree.tree_map(at, h0)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(capture, "_roots", type(capture._roots)())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*[Ss]parse")
@pytest.mark.parametrize("rest", [True, False], ids=["from_rest", "moving"])
@pytest.mark.parametrize("name", ZOO)
def test_values(name, rest, julia, recwarn):
    made = ZOO[name]()
    for i in range(6):
        with torch.no_grad():
            h0 = begin(made, rest)
            want = odeint(made.f, h0, T, engine="torch", method="dopri8", rtol=1e-10, atol=1e-12)
            got = solve(made.f, h0, T, engine="julia", method="tsit5", dense=False, **TOL)
            assert torch.allclose(states(got.h), states(want), rtol=1e-5, atol=1e-6), got.stats
            if made.change and i % 2:
                made.change()
    assert bool(got.stats.compiled) == made.compiled, got.stats.not_compiled
    if not made.compiled:
        assert pytest.importorskip("re").search(made.why, got.stats.not_compiled), got.stats.not_compiled
    assert not [w for w in recwarn if "report this" in str(w.message)]


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*[Ss]parse")
@pytest.mark.parametrize("adjoint", ["gauss", "forward", True])
@pytest.mark.parametrize("rest", [True, False], ids=["from_rest", "moving"])
@pytest.mark.parametrize("name", [name for name in ZOO if name != "spectral_norm_in_training"])
def test_gradients(name, rest, adjoint, julia, recwarn):
    made = ZOO[name]()

    def gradient(**kwargs):
        h0 = begin(made, rest)
        solution = solve(made.f, h0, T, dense=False, **kwargs)
        loss = states(solution.h).square().sum()
        if not loss.requires_grad:
            return solution.stats, None
        inputs = [*torch.utils._pytree.tree_leaves(h0), *made.leaves]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        return solution.stats, states([torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)])

    def attempt(**kwargs):
        try:
            return gradient(**kwargs)
        except pyjlode.errors.GradientUnavailable as error:
            return error, None

    for i in range(4):
        _, want = attempt(engine="torch", method="dopri8", adjoint=False, rtol=1e-10, atol=1e-12)
        stats, got = attempt(engine="julia", method="tsit5", adjoint=adjoint, **TOL)
        if got is not None and want is not None:
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * (1 + float(want.abs().max()))), stats
        else:
            assert got is None or not got.any() or made.why
        if made.change and i % 2:
            made.change()
    if made.leaves and got is not None and not isinstance(stats, Exception):
        assert bool(stats.compiled) == (made.compiled and made.derived), stats.not_compiled
    assert not [w for w in recwarn if "report this" in str(w.message)]


def test_there_are_many():
    assert len(ZOO) >= 40


@pytest.mark.parametrize("name", ["counts_its_calls", "counts_in_a_buffer"])
def test_a_counter_counts_on(name, julia):
    f = ZOO[name]().f
    h0 = torch.zeros(2, dtype=F64)
    with torch.no_grad():
        for _ in range(4):
            before = f.nfe, float(getattr(f, "evaluations", 0))
            solution = solve(f, h0, T, engine="julia", method="tsit5", dense=False, **TOL)
            after = f.nfe, float(getattr(f, "evaluations", 0))
            counted = after[0] - before[0]
            assert counted >= solution.stats.nfe - 1
            if solution.stats.compiled:
                assert counted <= solution.stats.nfe + 60  # the comparisons call f too
    assert solution.stats.compiled


def test_random_numbers_are_not_frozen(julia):
    f = lambda t, h: -h * (1 + 0 * random.random())  # noqa: E731
    h0 = torch.ones(2, dtype=F64)
    stats = [solve(f, h0, T, engine="julia", method="tsit5", **TOL).stats for _ in range(3)]
    assert "leaves PyTorch" in stats[-1].not_compiled


def test_engine_torch_is_left_alone(julia, monkeypatch):
    odeint(lambda t, h: -h, torch.ones(2, dtype=F64), T, engine="julia")

    def never(*args):
        raise AssertionError("looked through")

    monkeypatch.setattr(capture, "root_of", never)
    monkeypatch.setattr(programs, "root_of", never)
    odeint(lambda t, h: -h, torch.ones(2, dtype=F64), T, engine="torch")
    odeint(lambda t, h: -h, torch.ones(2, dtype=F64), T)  # which "auto" is, in these tests


class Doubled(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.Tensor.sin else out


@contextlib.contextmanager
def hook_of_all_modules():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 0.5 * out if isinstance(module, nn.Linear) else None
    )
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("around", "compiled"), [(hook_of_all_modules, False), (Doubled, False), (lambda: torch.device("cpu"), True)]
)
def test_what_lies_around_a_solve_counts(around, compiled, julia):
    net = Model().net
    f, h0 = lambda t, h: net(h) + h.sin() * torch.cos(t), torch.ones(2, dtype=F64)
    for _ in range(4):
        odeint(f, h0, T, engine="julia", method="tsit5", adjoint=True, **TOL)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), around():
            for _ in range(3):
                got = solve(f, h0, T, engine="julia", method="tsit5", adjoint=True, **TOL)
                want = odeint(f, h0, T, engine="torch", method="dopri8", rtol=1e-10, atol=1e-12)
                assert torch.allclose(got.h, want, rtol=1e-6)
        assert bool(got.stats.compiled) == compiled
