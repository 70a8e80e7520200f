"""Sweeps of eight systems at a time: each as if alone, with gradients, times and failures of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import robertson_batch
from torch import nn

from pyjlode import odeint, solve
from pyjlode.errors import BadOption, NonFiniteState, NotCompiled, StepSizeTooSmall

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
BATCH = {"batch_dims": 1}
SWEEP = {"engine": "julia", "compile": True, "options": BATCH, "dense": False}
NATIVE = {"engine": "torch", "options": BATCH, "dense": False}
EXPLICIT = ("dopri5", "tsit5", "bosh3", "dopri8", "vern7", "vern9")
T = torch.tensor([0.0, 0.3, 0.75, 1.5], dtype=F64)


def driven(a, b, shared):
    """A pendulum with a coefficient of each system twice over, one that all share, and a force in time."""

    def f(t, h):
        x, v = h.unbind(-1)
        return torch.stack([v, -a * torch.sin(x) - shared[0] * v + b * torch.cos(shared[1] * t)], -1)

    return f


def held(n, *, grad=False):
    random = torch.Generator().manual_seed(n)
    a = torch.rand(n, generator=random, dtype=F64) * 9 + 0.5
    b = torch.rand(n, generator=random, dtype=F64)
    h0 = torch.randn(n, 2, generator=random, dtype=F64)
    shared = torch.tensor([0.2, 3.0], dtype=F64)
    return [x.requires_grad_(grad) for x in (a, b, shared, h0)]


@settings(max_examples=15)
@given(data=st.data())
def test_no_system_sees_its_neighbours(data):
    n = data.draw(st.integers(2, 30), label="n")
    method = data.draw(st.sampled_from((*EXPLICIT, "rodas5p", "rosenbrock23")), label="method")
    rows = data.draw(st.booleans(), label="times of their own")
    sign = data.draw(st.sampled_from((1.0, -1.0)), label="direction")
    order = torch.tensor(data.draw(st.permutations(range(n)), label="order"))
    a, b, shared, h0 = held(n)
    t = sign * T
    if rows:
        lengths = data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n), label="lengths")
        t = [sign * (0.1 * i + T[:k] * (1 + i / n)) for i, k in enumerate(lengths)]
    moved = [t[i] for i in order] if rows else t
    kwargs = {"method": method, "rtol": 1e-6, "atol": 1e-8}
    first = solve(driven(a, b, shared), h0, t, **SWEEP, **kwargs)
    second = solve(driven(a[order], b[order], shared), h0[order], moved, **SWEEP, **kwargs)
    assert torch.equal(first.h[:, order], second.h)
    assert torch.equal(first.stats.systems.naccept[order], second.stats.systems.naccept)
    assert torch.equal(first.stats.systems.nreject[order], second.stats.systems.nreject)
    want = solve(driven(a, b, shared), h0, t, **NATIVE, **{**kwargs, "method": "dopri8", "rtol": 1e-9, "atol": 1e-10})
    error = 1e-3 if method in ("bosh3", "rosenbrock23") else 3e-5
    assert torch.allclose(first.h, want.h, rtol=error, atol=error)


@settings(max_examples=10)
@given(data=st.data())
def test_each_is_solved_as_if_alone_and_takes_the_same_steps(data):
    """Explicit methods: as a solve of that system, which is not a sweep. Rosenbrock methods: as beside a copy of it."""
    n = data.draw(st.integers(2, 19), label="n")
    method = data.draw(st.sampled_from((*EXPLICIT, "rodas5p", "rosenbrock23")), label="method")
    sign = data.draw(st.sampled_from((1.0, -1.0)), label="direction")
    some = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3, unique=True), label="systems")
    lengths = data.draw(st.lists(st.integers(2, 4), min_size=n, max_size=n), label="lengths")
    a, b, shared, h0 = held(n)
    rows = [sign * (0.1 * i + T[:k] * (1 + i / n)) for i, k in enumerate(lengths)]
    kwargs = {"method": method, "rtol": 1e-6, "atol": 1e-8}
    together = solve(driven(a, b, shared), h0, rows, **SWEEP, **kwargs)
    steps = together.stats.systems
    for i in some:
        h = together.h[: lengths[i], i]
        if method in EXPLICIT:
            alone = solve(
                driven(a[i], b[i], shared), h0[i], rows[i], engine="julia", compile=True, dense=False, **kwargs
            )
            accepted, rejected, want = alone.stats.naccept, alone.stats.nreject, alone.h
        else:
            two = [i, i]
            alone = solve(driven(a[two], b[two], shared), h0[two], rows[i], **SWEEP, **kwargs)
            accepted, rejected = (int(x[0]) for x in (alone.stats.systems.naccept, alone.stats.systems.nreject))
            want = alone.h[:, 0]
        assert torch.allclose(h, want, rtol=1e-9, atol=1e-10)
        assert (int(steps.naccept[i]), int(steps.nreject[i])) == (accepted, rejected)


@pytest.mark.parametrize("method", ["rodas5p", "rosenbrock23"])
def test_robertson(method):
    k = torch.logspace(-3, 0, 11, dtype=F64)
    h0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64).repeat(11, 1)
    t = torch.tensor([0.0, 1.0, 40.0, 1e4], dtype=F64)
    got = solve(robertson_batch(k), h0, t, method=method, rtol=1e-6, atol=1e-10, **SWEEP)
    want = solve(robertson_batch(k), h0, t, method="radau5", rtol=1e-9, atol=1e-13, engine="torch", dense=False)
    assert torch.allclose(got.h, want.h, rtol=1e-4, atol=1e-8)
    assert torch.allclose(got.h.sum(-1), torch.ones(4, 11, dtype=F64), rtol=1e-12)  # mass is kept by linear methods
    assert got.stats.njac == got.stats.naccept + got.stats.nreject
    assert int(got.stats.systems.naccept.sum()) == got.stats.naccept


def test_pivots_of_each_system():
    """Systems whose matrices need their rows exchanged, each in another order."""
    random = torch.Generator().manual_seed(0)
    A = torch.stack([torch.eye(6, dtype=F64)[torch.randperm(6, generator=random)] for _ in range(20)])
    A = 40 * A + torch.randn(20, 6, 6, generator=random, dtype=F64)
    A = A - A.transpose(1, 2)  # turns, and nothing grows
    h0 = torch.randn(20, 6, generator=random, dtype=F64)

    def f(t, h):
        return torch.einsum("bij,bj->bi", A, h)

    h = odeint(f, h0, T[:2], method="rodas5p", rtol=1e-8, atol=1e-8, engine="julia", compile=True, options=BATCH)
    want = torch.einsum("bij,bj->bi", torch.linalg.matrix_exp(0.3 * A), h0)
    assert torch.allclose(h[-1], want, rtol=1e-5, atol=1e-5)


def gradients(n, method, t, **kwargs):
    a, b, shared, h0 = held(n, grad=True)
    t = [x.clone().requires_grad_() for x in t] if isinstance(t, list) else t.clone().requires_grad_()
    solution = solve(driven(a, b, shared), h0, t, method=method, adjoint=True, rtol=1e-10, atol=1e-10, **kwargs)
    weights = torch.linspace(0.5, 2.0, solution.h.numel(), dtype=F64).view_as(solution.h)
    (weights * solution.h.sin()).sum().backward()
    times = [x.grad for x in t] if isinstance(t, list) else [t.grad]
    return solution, [a.grad, b.grad, shared.grad, h0.grad, *times]


@pytest.mark.parametrize(("method", "n"), [("dopri5", 3), ("tsit5", 21), ("dopri8", 3), ("vern7", 9), ("vern9", 8)])
def test_gradients_are_those_of_the_native_engine(method, n):
    for t in (T, -T[[0, 3]]):
        ours, got = gradients(n, method, t, **SWEEP)
        theirs, want = gradients(n, method, t, **NATIVE)
        assert torch.allclose(ours.h, theirs.h, rtol=1e-7, atol=1e-8)
        for x, y in zip(got, want):
            assert torch.allclose(x, y, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_that_of_the_numbers_that_came_out():
    """With steps as good as fixed, differences of the loss are the derivative of the steps themselves, which at loose
    tolerances is not that of the solution."""
    a, b, shared, h0 = held(9)
    options = {**BATCH, "first_step": 0.1, "max_step": 0.1}
    kwargs = {"method": "bosh3", "rtol": 10.0, "atol": 10.0, "engine": "julia", "compile": True, "options": options}

    def loss(a, shared, h0, **more):
        return odeint(driven(a, b, shared), h0, T, **kwargs, **more).square().sum()

    for x in (a, shared, h0):
        x.requires_grad_()
    found = torch.autograd.grad(loss(a, shared, h0, adjoint=True), (a, shared, h0))
    values = [x.detach() for x in (a, shared, h0)]
    for i, grad in enumerate(found):
        along = torch.linspace(-1, 1, grad.numel(), dtype=F64).view_as(grad)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [x + step * along if j == i else x for j, x in enumerate(values)]
            with torch.no_grad():
                ends.append(float(loss(*moved)))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((grad * along).sum()), rel=1e-7)


def test_gradients_with_times_of_their_own():
    t = [0.1 * i + T[: 2 + i % 3] * (1 + i / 9) for i in range(9)]
    ours, got = gradients(9, "tsit5", t, **SWEEP)
    theirs, want = gradients(9, "tsit5", t, **NATIVE)
    assert ours.h.shape == (4, 9, 2)
    assert torch.allclose(ours.h, theirs.h, rtol=1e-7, atol=1e-8)
    for x, y in zip(got, want):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-7)


def test_a_network_that_all_share_is_trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    drive = torch.randn(11, 2, dtype=F64)
    h0 = torch.randn(11, 2, dtype=F64)
    found = []
    for kwargs in (SWEEP, NATIVE):
        net.zero_grad()
        h = solve(lambda t, h: net(h) + drive * t, h0, T, adjoint=True, rtol=1e-9, atol=1e-9, **kwargs).h
        h.square().mean().backward()
        found.append([x.grad.clone() for x in net.parameters()])
    for x, y in zip(*found):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-9)


def test_float32_and_two_batch_dimensions():
    a, b, shared, h0 = (x.detach().float() for x in held(6))
    a, b, h0 = a.view(2, 3).requires_grad_(), b.view(2, 3), h0.view(2, 3, 2)
    kwargs = {"rtol": 1e-5, "atol": 1e-6, "adjoint": True, "dense": False}
    options = {"batch_dims": 2}
    ours = solve(driven(a, b, shared), h0, T.float(), engine="julia", compile=True, options=options, **kwargs)
    (got,) = torch.autograd.grad(ours.h.square().sum(), a)
    theirs = solve(driven(a, b, shared), h0, T.float(), engine="torch", options=options, **kwargs)
    (want,) = torch.autograd.grad(theirs.h.square().sum(), a)
    assert ours.h.dtype == got.dtype == torch.float32
    assert ours.stats.systems.naccept.shape == (2, 3)
    assert torch.allclose(ours.h, theirs.h, rtol=1e-4, atol=1e-4)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)


def growing(k):
    def f(t, h):
        return k[:, None] * h**2

    return f


def test_systems_that_fail():
    k = torch.tensor([0.1, 5.0, 0.2, 9.0] * 5, dtype=F64, requires_grad=True)  # a pole at 1 / k
    h0, t = torch.ones(20, 1, dtype=F64), torch.tensor([0.0, 0.1, 1.0], dtype=F64)
    with pytest.raises(StepSizeTooSmall, match="system 1 of the batch"):
        odeint(growing(k.detach()), h0, t, engine="julia", compile=True, options=BATCH)
    solution = solve(
        growing(k), h0, t, adjoint=True, rtol=1e-9, atol=1e-9, **{**SWEEP, "options": {**BATCH, "on_failure": "nan"}}
    )
    fails = k.detach() > 1
    systems = solution.stats.systems
    assert torch.equal(systems.failed, fails)
    assert sorted(systems.why) == fails.nonzero().view(-1).tolist()
    want = 1 / (1 - k.detach()[None] * t[:, None])
    assert torch.allclose(solution.h[:2, :, 0], want[:2], rtol=1e-7)
    assert torch.allclose(solution.h[2, ~fails, 0], want[2, ~fails], rtol=1e-7)
    assert bool(solution.h[2, fails].isnan().all())
    # Gradients pass through what came before, and through the other systems.
    (solution.h[1].sum() + solution.h[2, ~fails].sum()).backward()
    by_k = t[1] * want[1] ** 2 + torch.where(fails, 0.0, t[2] * want[2] ** 2)
    assert torch.allclose(k.grad, by_k, rtol=1e-6)


def test_too_many_steps_are_named():
    a, b, shared, h0 = held(9)
    a = a.clone()
    a[5] = 1e6
    options = {**BATCH, "max_num_steps": 60}
    with pytest.raises(Exception, match="system 5 of the batch"):
        odeint(driven(a, b, shared), h0, T, engine="julia", compile=True, options=options)


def test_a_start_that_is_nan():
    a, b, shared, h0 = held(9)
    h0 = h0.clone()
    h0[4] = torch.nan
    with pytest.raises(NonFiniteState):
        odeint(driven(a, b, shared), h0, T, engine="julia", compile=True, options=BATCH)
    solution = solve(driven(a, b, shared), h0, T, **{**SWEEP, "options": {**BATCH, "on_failure": "nan"}})
    assert solution.stats.systems.failed.nonzero().view(-1).tolist() == [4]
    assert bool(solution.h[:, 4].isnan().all())
    assert int(solution.h.isnan().sum()) == 8


def test_what_it_cannot_do_is_said():
    k = torch.tensor([0.01, 0.04], dtype=F64, requires_grad=True)
    h0 = torch.tensor([[1.0, 0.0, 0.0]] * 2, dtype=F64)
    with pytest.raises(BadOption, match="has gradients by adjoint=True for explicit methods"):
        odeint(
            robertson_batch(k), h0, T, method="rodas5p", adjoint="gauss", engine="julia", compile=True, options=BATCH
        )
    large, x = nn.Linear(40, 40).double(), torch.randn(3, 40, dtype=F64)
    with pytest.raises(NotCompiled, match="number by number"):
        odeint(lambda t, h: torch.tanh(large(h)), x, T, adjoint=True, engine="julia", compile=True, options=BATCH)
    with pytest.raises(BadOption, match="a row for each system"):
        odeint(robertson_batch(k.detach()), h0, [T, T[:2]], method="bdf", engine="julia", compile=True, options=BATCH)
