"""Calls made again and again, of which the front door and Julia keep what does not change between them."""

import gc
import math
import threading
import weakref

import pytest
import torch
from torch import nn

import pyjlode
from pyjlode import odeint, solve
from pyjlode.bridge.codegen import field as fields
from pyjlode.bridge.codegen import program as programs
from pyjlode.errors import BadDtype, BadOption, BadTime, GradientUnavailable, MaxStepsReached, NonFiniteState
from pyjlode.problem import Field

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
JULIA = {"engine": "julia", "compile": True, "method": "tsit5", "rtol": 1e-9, "atol": 1e-11}
CALLS = 11


def lotka(p):
    def f(t, u):
        return torch.stack([p[0] * u[0] - p[1] * u[0] * u[1], -p[2] * u[1] + p[3] * u[0] * u[1]])

    return f


def rates(*numbers, dtype=F64):
    return torch.tensor(numbers or (1.5, 1.0, 3.0, 1.0), dtype=dtype)


class Repeats:
    """Counts the solves by an integrator that was kept."""

    def __init__(self, monkeypatch):
        self.count, inner = 0, fields.Repeated.solve

        def solve(this, *args):
            self.count += 1
            return inner(this, *args)

        monkeypatch.setattr(fields.Repeated, "solve", solve)


@pytest.fixture
def repeats(monkeypatch):
    return Repeats(monkeypatch)


@pytest.mark.parametrize("options", [None, {"first_step": 1e-3}, {"max_step": 0.05}])
@pytest.mark.parametrize("method", ["tsit5", "dopri5", "vern7", "bosh3", "rodas5p"])
def test_each_call_is_as_the_first(method, options, repeats):
    f, kwargs = lotka(rates()), {**JULIA, "method": method, "options": options, "dense": False}
    h0 = torch.tensor([1.0, 1.0], dtype=F64)
    first = solve(f, h0, T, **kwargs)
    for _ in range(2, CALLS):
        again = solve(f, h0, T, **kwargs)
        assert torch.equal(again.h, first.h)
        assert (again.stats.naccept, again.stats.nreject) == (first.stats.naccept, first.stats.nreject)
        assert again.stats.compiled
        # The front door looks at f once, and an integrator that begins again does so three times more than a new one.
        assert abs(first.stats.nfe - again.stats.nfe) <= 3
    # The 6th, 7th, 8th and 10th: others are read anew, and the 4th makes the integrator. If another test has compiled
    # such a field, all is one earlier.
    assert repeats.count in (4, 5)


@pytest.mark.parametrize(
    "how",
    [
        {"options": {"step_t": [0.3, 1.7], "jump_t": torch.tensor([0.9])}},
        {"atol": torch.tensor([1e-6, 1e-9], dtype=F64), "rtol": [torch.tensor([1e-5, 1e-7])]},
        {"method": pyjlode.julia_method("Tsit5()")},
    ],
    ids=["times", "tolerances of each element", "Julia's own"],
)
def test_what_is_said_in_lists_tensors_and_rows_is_kept_too(how, repeats):
    """Each call makes them anew: solvers that say the same are equal."""
    f, h0 = lotka(rates()), torch.tensor([1.0, 1.0], dtype=F64)
    calls = [lambda: solve(f, h0, T, **{**JULIA, **how, "dense": False}) for _ in range(2)]
    solver = pyjlode.Solver(**{**JULIA, **how})
    calls += [lambda: solver.solve(f, h0, T, dense=False)] * 2
    first = calls[0]()
    for _ in range(CALLS):
        for call in calls:
            again = call()
            assert torch.equal(again.h, first.h)
            assert (again.stats.naccept, again.stats.nreject) == (first.stats.naccept, first.stats.nreject)
    assert repeats.count or isinstance(how.get("method"), pyjlode.methods.Method)


@pytest.mark.parametrize("method", ["rosenbrock23", "bdf", "radau5", "kvaerno5", "kencarp4", "trbdf2_adaptive", "auto"])
def test_implicit_methods_begin_anew(method, repeats):
    f, h0, kwargs = lotka(rates()), torch.tensor([1.0, 1.0], dtype=F64), {**JULIA, "method": method, "rtol": 1e-6}
    first = odeint(f, h0, T, **kwargs)
    assert all(torch.equal(odeint(f, h0, T, **kwargs), first) for _ in range(CALLS))
    assert repeats.count == 0


def test_steps_of_one_size(repeats):
    kwargs = {**JULIA, "method": "heun2", "options": {"step_size": 0.01}}
    f, h0 = lotka(rates()), torch.tensor([1.0, 1.0], dtype=F64)
    first = odeint(f, h0, T, **kwargs)
    for _ in range(CALLS):
        assert torch.equal(odeint(f, h0, T, **kwargs), first)
    assert repeats.count


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_other_states_shapes_and_tensors(dtype, repeats):
    kwargs = {**JULIA, "rtol": 1e-6, "atol": 1e-6}
    for i in range(CALLS):
        p = rates(1.5 + 0.1 * i, 1.0, 3.0, 1.0, dtype=dtype)
        h0 = torch.tensor([[1.0, 1.2], [1.0 + 0.1 * i, 1.0]], dtype=dtype)
        h = odeint(lotka(p), h0, T, **kwargs)
        want = odeint(lotka(p.double()), h0.double(), T, engine="torch", rtol=1e-9, atol=1e-9)
        assert h.dtype == dtype
        assert torch.allclose(h.double(), want, rtol=1e-4, atol=1e-4)
    assert repeats.count


def test_other_times(repeats):
    f, h0 = lotka(rates()), torch.tensor([1.0, 1.0], dtype=F64)
    for times in (T, T, T, T, T, T / 2, T / 2, T / 2, -T / 4, T[:3], T[:3], T[:3].tolist(), T.float(), T):
        h = odeint(f, h0, times, **JULIA)
        assert torch.allclose(h, odeint(f, h0, times, engine="torch", rtol=1e-10, atol=1e-12), rtol=1e-7, atol=1e-7)
    assert repeats.count


def test_what_f_holds_is_read_at_each_call(repeats):
    class Net(nn.Module):
        shift = 0.0

        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(2, 2).double(), 1.0

        def forward(self, t, h):
            return self.scale * torch.tanh(self.layer(h)) + self.shift

    def check():
        ours, native = (odeint(f, h0, T, **kwargs) for kwargs in (JULIA, {"engine": "torch", "rtol": 1e-9}))
        assert torch.allclose(ours, native, rtol=1e-6, atol=1e-7)

    f, h0 = Net(), torch.tensor([0.3, -0.4], dtype=F64)
    with torch.no_grad():
        for _ in range(CALLS):
            check()
        f.layer.weight.mul_(1.5)
        check()
        f.layer.bias.data = torch.ones(2, dtype=F64)
        check()
        f.scale = 2.0
        check()
        Net.shift = 0.5
        check()
        f.layer = nn.Linear(2, 2).double()
        for _ in range(CALLS):
            check()
    assert repeats.count


def test_gradients(repeats):
    ours, native = (rates().requires_grad_() for _ in range(2))
    h0 = torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
    for i in range(CALLS):
        grads = []
        for p, kwargs in ((ours, JULIA), (native, {"engine": "torch", "rtol": 1e-10, "atol": 1e-12})):
            h = odeint(lotka(p), h0, T, adjoint=True, **kwargs)
            grads.append(torch.autograd.grad((h**2).sum(), [h0, p]))
            with torch.no_grad():
                p -= 0.01 * i
        for a, b in zip(*grads):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert repeats.count


def test_gradients_of_a_network_in_training():
    nets = [nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    losses = []
    for net, engine in zip(nets, ("julia", "torch")):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        kwargs = {"engine": engine, "method": "tsit5", "rtol": 1e-8, "atol": 1e-10}
        for _ in range(CALLS):
            optimizer.zero_grad()
            h = odeint(lambda t, h, net=net: net(h), torch.ones(3, 2, dtype=F64), T, adjoint=True, **kwargs)
            loss = (h**2).mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[:CALLS] == pytest.approx(losses[CALLS:], rel=1e-6)


def test_grad_mode_and_what_requires_grad_are_told_apart():
    p, h0 = rates(), torch.tensor([1.0, 1.0], dtype=F64)
    for i in range(2 * CALLS):
        p.requires_grad_(i % 2 == 0)
        h = odeint(lotka(p), h0, T, adjoint=True, **JULIA)
        assert h.requires_grad == (i % 2 == 0)
        with torch.no_grad():
            assert not odeint(lotka(p), h0, T, adjoint=True, **JULIA).requires_grad
    h0.requires_grad_()
    assert odeint(lotka(p), h0, T, adjoint=True, **JULIA).requires_grad


@pytest.mark.filterwarnings("ignore:f is not compiled")
def test_what_no_walk_sees_is_found_before_long(monkeypatch):
    # A module of the standard library: what it holds is not compared.
    monkeypatch.setattr(math, "rate", 1.0, raising=False)

    def f(t, h):
        return -math.rate * h

    h0, kwargs = torch.ones(1, dtype=F64), {**JULIA, "compile": None}
    for _ in range(5):
        odeint(f, h0, T, **kwargs)
    monkeypatch.setattr(math, "rate", 2.0)
    for _ in range(3):  # until the eighth
        h = odeint(f, h0, T, **kwargs)
    assert torch.allclose(h, torch.exp(-2 * T)[:, None], rtol=1e-7, atol=1e-8)


def test_nothing_of_the_user_is_kept_alive():
    def train():
        net, h0 = nn.Linear(2, 2).double(), torch.ones(2, dtype=F64)
        for _ in range(CALLS):
            h = odeint(lambda t, h: net(h), h0, T, adjoint=True, **JULIA)
            h.sum().backward()
        return [weakref.ref(x) for x in (net, net.weight, h0, h)]

    gone = train()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_bad_arguments_and_failures_in_between():
    p, h0 = rates(), torch.tensor([1.0, 1.0], dtype=F64)
    f = lotka(p)
    want, once = odeint(f, h0, T, **JULIA), torch.tensor([0.0, 1.0], dtype=F64)
    blow_up = torch.tensor([1e300, 1e300], dtype=F64)
    for _ in range(CALLS):
        assert torch.equal(odeint(f, h0, T, **JULIA), want)
        assert odeint(f, h0, once, **JULIA).shape == (2, 2)
        with pytest.raises(BadDtype, match="floating point"):
            odeint(f, h0, torch.tensor([0, 1]), **JULIA)
        with pytest.raises(NonFiniteState, match="h0 holds NaN"):
            odeint(f, h0 * math.nan, T, **JULIA)
        with pytest.raises(BadTime, match="strictly increasing"):
            odeint(f, h0, T[[0, 2, 1]], **JULIA)
        with pytest.raises(BadTime, match="one-dimensional"):
            odeint(f, h0, T[None], **JULIA)
        with pytest.raises(BadOption):
            odeint(f, h0, T, **JULIA, options={"first_stp": 1.0})
        with pytest.raises(MaxStepsReached):
            odeint(f, h0, T, **JULIA, options={"max_num_steps": 3})
        with pytest.raises(pyjlode.errors.SolveError):
            odeint(f, blow_up, T, **JULIA)


def test_a_large_state_keeps_no_integrator(repeats):
    f, h0 = lambda t, h: -h, torch.ones(fields._REPEATED + 1, dtype=F64)
    for _ in range(CALLS):
        h = odeint(f, h0, T, **JULIA)
    assert torch.allclose(h[-1], torch.exp(-T[-1]), rtol=1e-7)
    assert repeats.count == 0


def test_plans_for_a_field_are_not_many():
    f, h0 = lotka(rates()), torch.tensor([1.0, 1.0], dtype=F64)
    for i in range(300):
        odeint(f, h0, T[:2] / 100, **{**JULIA, "rtol": 1e-3 + 1e-6 * i})
    field = Field(f, h0.shape, (f, h0.shape))
    assert 0 < len(programs.known(field, h0).plans) <= 64


def test_threads():
    p = [rates(1.5 + 0.2 * i, 1.0, 3.0, 1.0) for i in range(3)]
    times = [T, T, T / 2]
    h0 = torch.tensor([1.0, 1.0], dtype=F64)
    want = [odeint(lotka(q), h0, t, **JULIA) for q, t in zip(p, times)]
    wrong = []

    def run(i):
        for _ in range(30):
            h = odeint(lotka(p[i]), h0, times[i], **JULIA)
            if not torch.allclose(h, want[i], rtol=1e-10, atol=1e-12):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_f_carries_for_the_solver_to_call_is_looked_for_in_each_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2).double()

        def forward(self, t, h):
            return self.layer(h)

    f, other, h0, seen = Net(), Net(), torch.ones(2, dtype=F64), []
    with torch.no_grad():
        for _ in range(CALLS):
            odeint(f, h0, T, method="tsit5")
        other.callback_step = lambda t, h, dt: seen.append(t)
        odeint(other, h0, T, method="tsit5")
        assert seen
        Net.callback_accept_step = lambda self, t, h, dt: seen.clear()
        odeint(f, h0, T, method="tsit5")
        assert not seen


class TestProductsOfRepeatedSolves:
    """Against those of a solve that is made anew."""

    @staticmethod
    def grads(p, h0, times=T, **kwargs):
        h = odeint(lotka(p), h0, times, adjoint=True, **JULIA)
        return h, (h**2).sum()

    def repeated(self, p, h0):
        for _ in range(CALLS):
            h, loss = self.grads(p, h0)
        return h, loss

    def test_they_are_the_same_whatever_was_solved_in_between(self, repeats):
        p, h0 = rates().requires_grad_(), torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
        first = torch.autograd.grad(self.grads(p, h0)[1], [h0, p])
        self.repeated(p, h0)
        assert repeats.count
        solves = [self.grads(p, h0), self.grads(rates(2.0, 1.0, 3.0, 0.5).requires_grad_(), h0), self.grads(p, h0)]
        with torch.no_grad():
            odeint(lotka(rates(0.5, 0.5, 0.5, 0.5)), h0, T, adjoint=True, **JULIA)
        for i in (2, 0):
            for a, b in zip(torch.autograd.grad(solves[i][1], [h0, p], retain_graph=True), first):
                assert torch.equal(a, b)
        again = torch.autograd.grad(solves[0][1], [h0, p])
        assert all(torch.equal(a, b) for a, b in zip(again, first))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(solves[0][1], [h0, p])

    def test_many_cotangents_at_once(self):
        p, h0 = rates().requires_grad_(), torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
        h, _ = self.repeated(p, h0)
        bars = torch.eye(h.numel(), dtype=F64).reshape(-1, *h.shape)
        by_h0, by_p = torch.autograd.grad(h, [h0, p], bars, is_grads_batched=True, retain_graph=True)
        for i in (0, 1, 7):
            a, b = torch.autograd.grad(h, [h0, p], bars[i], retain_graph=True)
            assert torch.allclose(by_h0[i], a, rtol=1e-14)
            assert torch.allclose(by_p[i], b, rtol=1e-14, atol=1e-300)

    def test_what_cannot_be_had_is_refused(self):
        p, h0 = rates().requires_grad_(), torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
        _, loss = self.repeated(p, h0)
        with pytest.raises(GradientUnavailable, match="first derivatives only"):
            torch.autograd.grad(loss, p, create_graph=True)
        _, loss = self.grads(p, h0)
        with torch.no_grad():
            p.mul_(1.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_the_account_of_the_work_goes_on(self):
        p = rates().requires_grad_()
        for _ in range(CALLS):
            solution = solve(lotka(p), torch.ones(2, dtype=F64), T, adjoint=True, dense=False, **JULIA)
            assert solution.stats.naccept > 0
            assert solution.stats.compiled
            solution.h.sum().backward()
            assert solution.stats.nfe_backward >= solution.stats.naccept
            assert solution.stats.wall_backward > 0


@pytest.mark.parametrize("adjoint", [True, "gauss", "forward", "backsolve"])
def test_weights_that_are_tied_after_f_was_compiled(adjoint):
    """The compiled function reads one tensor in two places then: its gradient is the sum of both, once."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    h0, t = torch.randn(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)

    def gradients(engine):
        how = {"adjoint": adjoint, "method": "tsit5", "rtol": 1e-9, "atol": 1e-9, "engine": engine}
        h = odeint(lambda t, h: net(h), h0, t, compile=True if engine == "julia" else None, **how)
        return torch.autograd.grad(h[-1].square().sum(), list(net.parameters()))

    def compare():
        for _ in range(4):
            for found, right in zip(gradients("julia"), gradients("torch")):
                torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)

    compare()
    apart = net[2].weight
    net[2].weight = net[0].weight
    compare()
    net[2].weight = apart
    compare()


@pytest.mark.parametrize("kind", ["tuple", "dictionary"])
def test_states_of_several_tensors(kind, repeats):
    p = rates(0.5).requires_grad_()

    def f(t, h):
        x, v = h.values() if kind == "dictionary" else h
        slopes = v * p, -x[:2] - 0.1 * v
        slopes = torch.cat([slopes[0], slopes[0][:1]]), slopes[1]
        return dict(zip("xv", slopes)) if kind == "dictionary" else slopes

    def grads(**how):
        x = torch.ones(3, dtype=F64, requires_grad=True)
        v = torch.zeros(2, dtype=F64)
        solution = solve(f, {"x": x, "v": v} if kind == "dictionary" else (x, v), T, adjoint=True, dense=False, **how)
        leaves = list(solution.h.values()) if kind == "dictionary" else solution.h
        assert [y.shape for y in leaves] == [(5, 3), (5, 2)]
        return torch.autograd.grad(sum(y.square().sum() for y in leaves), (x, p))

    want = grads(engine="torch", method="tsit5", rtol=1e-9, atol=1e-11)
    for _ in range(CALLS):
        torch.testing.assert_close(grads(**JULIA), want, rtol=1e-7, atol=1e-9)
    assert repeats.count >= 4
