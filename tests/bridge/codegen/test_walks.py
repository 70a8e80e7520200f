"""What is made of the steps of sweeps: gradients of stiff systems, dense output, events; and when "auto" is a sweep."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import robertson_batch
from torch import nn

from pyjlode import odeint, solve
from pyjlode.errors import BadOption, BadTime, GradientUnavailable, NonFiniteState, NotCompiled

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
BATCH = {"batch_dims": 1}
SWEEP = {"engine": "julia", "compile": True, "options": BATCH}
NATIVE = {"engine": "torch", "options": BATCH}
STIFF = ("rodas5p", "rosenbrock23")


def draws(n, *shape):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(n), dtype=F64)


# --- Gradients of stiff systems ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", STIFF)
def test_gradients_of_robertson(method):
    """By the rate of each system, one that all share, the starts and the times, as by the native engine."""
    shared, t = torch.tensor(1.0, dtype=F64), torch.tensor([0.0, 0.5, 40.0, 1e3], dtype=F64)
    weights = torch.tensor([1.0, 1e4, 2.0], dtype=F64)
    found = []
    for how in (SWEEP, NATIVE):
        inputs = torch.logspace(-3, -0.5, 9, dtype=F64), shared, torch.eye(3, dtype=F64)[:1].repeat(9, 1), t
        k, s, h0, times = (x.clone().requires_grad_() for x in inputs)
        f = robertson_batch(k)
        h = solve(
            lambda t, h, f=f, s=s: s * f(t, h),
            h0,
            times,
            method=method,
            rtol=1e-7,
            atol=1e-11,
            adjoint=True,
            dense=False,
            **how,
        ).h
        found.append((h.detach(), *torch.autograd.grad((h * weights).sum(), (k, s, h0, times))))
    for got, want in zip(*found):
        assert torch.allclose(got, want, rtol=2e-4, atol=2e-4 * float(want.abs().max()))


@pytest.mark.parametrize("method", STIFF)
def test_the_gradient_is_that_of_the_numbers_that_came_out(method):
    """With steps as good as fixed, differences of the loss are the derivative of the steps themselves."""
    a, shared, h0 = 1 + 9 * draws(9), torch.tensor([0.3, 2.0], dtype=F64), draws(9, 3)
    t = torch.tensor([0.2, 0.55, 1.2], dtype=F64)
    options = {**BATCH, "first_step": 0.1, "max_step": 0.1}
    how = {"method": method, "rtol": 10.0, "atol": 10.0, "engine": "julia", "compile": True, "options": options}

    def loss(a, shared, h0, **more):
        def f(t, h):
            x, y, z = h.unbind(-1)
            return torch.stack(
                [y * z - a * x**3, torch.sin(x) - shared[0] * y * t, shared[1] * torch.exp(-z) * x - z], -1
            )

        return odeint(f, h0, t, **how, **more).square().sum()

    values = a, shared, h0
    leaves = [x.clone().requires_grad_() for x in values]
    found = torch.autograd.grad(loss(*leaves, adjoint=True), leaves)
    for i, grad in enumerate(found):
        along = torch.linspace(-1, 1, grad.numel(), dtype=F64).view_as(grad)
        with torch.no_grad():
            up, down = (
                float(loss(*(x + step * along if j == i else x for j, x in enumerate(values))))
                for step in (1e-5, -1e-5)
            )
        assert (up - down) / 2e-5 == pytest.approx(float((grad * along).sum()), rel=1e-6)


@settings(max_examples=6)
@given(data=st.data())
def test_gradients_of_matrices_whose_rows_are_exchanged(data):
    """h' = A h, by each of A: of systems of any size and order of rows, with times of their own, backward too."""
    n, d = data.draw(st.integers(2, 11), label="systems"), data.draw(st.integers(1, 5), label="size")
    sign = data.draw(st.sampled_from((1.0, -1.0)), label="direction")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    A = torch.stack([torch.eye(d, dtype=F64)[torch.randperm(d, generator=random)] for _ in range(n)])
    A = 8 * (A - A.transpose(1, 2)) + torch.randn(n, d, d, generator=random, dtype=F64)
    h0 = torch.randn(n, d, generator=random, dtype=F64)
    t = sign * torch.stack([torch.zeros(n, dtype=F64), 0.1 + 0.2 * torch.rand(n, generator=random, dtype=F64)], 1)

    def by(h, A, h0):
        return torch.autograd.grad(h.sin().sum(), (A, h0))

    A, h0 = A.requires_grad_(), h0.requires_grad_()
    f = lambda t, h: torch.einsum("bij,bj->bi", A, h)  # noqa: E731
    h = solve(f, h0, t, method="rodas5p", rtol=1e-9, atol=1e-10, adjoint=True, dense=False, **SWEEP).h[-1]
    exact = torch.einsum("bij,bj->bi", torch.linalg.matrix_exp(A * (t[:, 1] - t[:, 0])[:, None, None]), h0)
    assert torch.allclose(h, exact, rtol=1e-6, atol=1e-7)
    for got, want in zip(by(h, A, h0), by(exact, A, h0)):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


# --- Dense output -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tsit5", "dopri8", "vern7", *STIFF])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_dense_output(method, sign):
    w, h0 = 1 + 3 * draws(11), draws(11, 2) - 0.5
    start, end = 0.3 * draws(11), 1 + draws(11)
    t = sign * torch.stack([start, end], 1)
    f = lambda t, h: torch.stack([h[:, 1], -(w**2) * h[:, 0]], 1)  # noqa: E731
    solution = solve(f, h0, t, method=method, rtol=1e-8, atol=1e-9, **SWEEP)

    def exact(times):  # (B, M) -> (M, B)
        s = times - sign * start[:, None]
        return (h0[:, :1] * torch.cos(w[:, None] * s) + (h0[:, 1] / w)[:, None] * torch.sin(w[:, None] * s)).T

    own = t[:, :1] + (t[:, 1:] - t[:, :1]) * draws(11, 6)
    common = sign * torch.tensor([0.99, 0.5, 0.31], dtype=F64)  # in any order
    near = 2e-4 if method == "rosenbrock23" else 1e-5
    assert torch.allclose(solution.interpolate(own)[..., 0], exact(own), atol=near)
    assert torch.allclose(solution.interpolate(common)[..., 0], exact(common.expand(11, -1)), atol=near)
    assert torch.allclose(solution.interpolate(t)[1], solution.h[1], rtol=1e-9, atol=1e-12)
    assert solution.interpolate(float(common[0])).shape == (11, 2)
    with pytest.raises(BadTime, match="outside the span of system"):
        solution.interpolate(sign * 3.0)


def test_dense_output_where_nothing_happens_and_where_it_fails():
    k = torch.tensor([0.1, 5.0, 0.2], dtype=F64)
    t = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]], dtype=F64)
    f = lambda t, h: k[:, None] * h**2  # noqa: E731
    how = {**SWEEP, "options": {**BATCH, "on_failure": "nan"}}
    solution = solve(f, torch.ones(3, 1, dtype=F64), t, rtol=1e-8, atol=1e-8, **how)
    inside = solution.interpolate(torch.tensor([[0.1, 0.9], [0.1, 0.9], [0.5, 0.5]], dtype=F64))[..., 0]
    want = torch.tensor([[1 / (1 - 0.01), 2.0, 1.0], [1 / (1 - 0.09), math.nan, 1.0]], dtype=F64)
    assert torch.allclose(inside, want, rtol=1e-6, equal_nan=True)


def test_dense_output_of_a_gradient_says_that_it_has_none():
    k = draws(5).requires_grad_()
    solution = solve(lambda t, h: -k[:, None] * h, torch.ones(5, 1, dtype=F64), [0.0, 1.0], adjoint=True, **SWEEP)
    with pytest.raises(GradientUnavailable, match="ask for these times in t"):
        solution.interpolate(0.5)
    with torch.no_grad():
        assert torch.allclose(solution.interpolate(0.5)[:, 0], torch.exp(-k / 2), rtol=1e-6)
    solution.h[-1].sum().backward()
    assert torch.allclose(k.grad, -torch.exp(-k.detach()), rtol=1e-6)


# --- Events -----------------------------------------------------------------------------------------------------------


def fall(h0, v0, g, floor):
    """When (h0, v0) falls to the floor."""
    return (v0 + torch.sqrt(v0**2 + 2 * g * (h0 - floor))) / g


@settings(max_examples=8)
@given(data=st.data())
def test_each_falls_to_its_own_floor(data):
    n = data.draw(st.integers(2, 20), label="systems")
    method = data.draw(st.sampled_from(("dopri5", "tsit5", "dopri8", "vern9", *STIFF)), label="method")
    own = data.draw(st.booleans(), label="starts of their own")
    u = draws(n, 4)
    values = 1 + u[:, 0], 4 * u[:, 1] - 2, 1 + 9 * u[:, 2], 0.9 * u[:, 3]
    starts = 0.5 + (torch.arange(n, dtype=F64) / n if own else torch.zeros(n, dtype=F64))
    t = torch.stack([starts, starts + 1], 1) if own else torch.tensor([0.5, 1.0], dtype=F64)
    t.requires_grad_()
    h0, v0, g, floor = (x.clone().requires_grad_() for x in values)
    f = lambda t, h: torch.stack([h[:, 1], -g + 0 * h[:, 0]], 1)  # noqa: E731
    event_fn = lambda t, h: h[:, 0] - floor  # noqa: E731
    solution = solve(
        f, torch.stack([h0, v0], 1), t, event_fn=event_fn, method=method, rtol=1e-8, atol=1e-8, adjoint=True, **SWEEP
    )  # fmt: skip
    lasts = fall(h0, v0, g, floor)
    begin = t[:, 0] if own else t[0]
    weights = torch.linspace(1, 2, n, dtype=F64)
    assert torch.allclose(solution.event_t, starts + lasts, rtol=1e-9, atol=1e-9)
    assert torch.allclose(solution.h[1], torch.stack([floor, v0 - g * lasts], 1), rtol=1e-7, atol=1e-8)
    assert solution.t.shape == (n, 2)
    inputs = h0, v0, g, floor, t
    got = torch.autograd.grad((weights * solution.event_t).sum() + solution.h[1, :, 1].sum(), inputs)
    want = torch.autograd.grad((weights * (begin + lasts)).sum() + (v0 - g * lasts).sum(), inputs)
    for x, y in zip(got, want):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_the_first_of_several_and_both_ways_in_a_step():
    """A ball that is thrown comes to a height on its way up, or leaves the field; steps are far longer than that."""
    v, wall = torch.tensor([1.0, 2.0, 5.0], dtype=F64), torch.tensor([2.0, 0.5, 9.0], dtype=F64)
    h0 = torch.stack([torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64), v], 1)
    f = lambda t, h: torch.stack([torch.ones_like(v), h[:, 2], -torch.ones_like(v)], 1)  # noqa: E731
    event_fn = lambda t, h: torch.stack([h[:, 0] - wall, 1.9 - h[:, 1]], 1)  # noqa: E731
    for how in (SWEEP, NATIVE):
        solution = solve(f, h0, [0.0, 1.0], event_fn=event_fn, dense=False, **how)
        want = torch.tensor([2.0, 0.5, 5 - math.sqrt(25 - 3.8)], dtype=F64)
        assert torch.allclose(solution.event_t, want, rtol=1e-10)


def test_zero_at_the_start_is_no_event():
    v = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    f = lambda t, h: torch.stack([h[:, 1], -2 + 0 * h[:, 0]], 1)  # noqa: E731
    h0 = torch.stack([torch.zeros(3, dtype=F64), v], 1)
    event_t, h = odeint(f, h0, [0.0, 1.0], event_fn=lambda t, h: h[:, 0], **SWEEP)
    assert torch.allclose(event_t, v, rtol=1e-9)
    assert torch.allclose(h[1, :, 1], -v, rtol=1e-9)


def test_backward_in_time():
    v = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    event_t, _ = odeint(
        lambda t, h: v[:, None] + 0 * h, v[:, None], [0.0, -1.0], event_fn=lambda t, h: h[:, 0], **SWEEP
    )
    assert torch.allclose(event_t, -torch.ones(3, dtype=F64), rtol=1e-10)


def test_those_without_an_event_and_those_that_fail():
    k = torch.tensor([1.0, -1.0, 1.0, -2.0, 0.5], dtype=F64).requires_grad_()
    how = {"event_fn": lambda t, h: h[:, 0] - 2, "method": "tsit5", "rtol": 1e-9, "atol": 1e-9, "adjoint": True}
    options = {**BATCH, "max_num_steps": 300}
    solution = solve(
        lambda t, h: -k[:, None] * h, torch.ones(5, 1, dtype=F64), [0.0, 1.0], **how, **{**SWEEP, "options": options}
    )
    grows = k.detach() < 0
    assert torch.equal(solution.event_t.isnan(), ~grows)
    assert torch.equal(solution.h[1, :, 0].isnan(), ~grows)
    assert not solution.stats.systems.failed.any()
    assert torch.allclose(solution.event_t[grows], -math.log(2) / k.detach()[grows], rtol=1e-8)
    solution.event_t[grows].sum().backward()
    assert torch.allclose(k.grad, torch.where(grows, math.log(2) / k.detach() ** 2, 0.0), rtol=1e-6)
    # A pole before the event; and an event function that is NaN from somewhere on.
    pole = lambda t, h: -k.detach()[:, None] * h**2  # noqa: E731
    how |= {"adjoint": False, "event_fn": lambda t, h: h[:, 0] - 1e9}
    options |= {"on_failure": "nan", "max_num_steps": 100}
    for event_fn in (how["event_fn"], lambda t, h: torch.log(1.9 - h[:, 0]) - 5):
        how["event_fn"] = event_fn
        with torch.no_grad():
            got = solve(pole, torch.ones(5, 1, dtype=F64), [0.0, 1.0], **how, **{**SWEEP, "options": options})
        assert got.event_t.isnan()[~grows].all()
    assert torch.equal(got.stats.systems.failed, grows)
    with torch.no_grad(), pytest.raises(NonFiniteState, match="system 1 of the batch: event_fn"):
        solve(pole, torch.ones(5, 1, dtype=F64), [0.0, 1.0], **how, **SWEEP)


def test_what_events_cannot_do_is_said():
    how = {**SWEEP, "event_fn": lambda t, h: torch.stack([h[:, 0], h[:, 0] - 1, h[:, 0] - 2], 1)}
    with pytest.raises(NotCompiled, match="more event functions than numbers"):
        odeint(lambda t, h: -h, torch.ones(3, 2, dtype=F64), [0.0, 1.0], **how)
    with pytest.raises(BadOption, match="takes no event_fn with 'bdf'"):
        odeint(lambda t, h: -h, torch.ones(3, 2, dtype=F64), [0.0, 1.0], method="bdf", **how)


# --- What "auto" means ------------------------------------------------------------------------------------------------


@pytest.fixture
def auto(monkeypatch):
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")


def engines(f, h0, t, times=3, **how):
    how = {"options": BATCH, "rtol": 1e-8, "atol": 1e-8, **how}
    solutions = [solve(f, h0, t, **how) for _ in range(times)]
    for solution in solutions[1:]:
        assert torch.allclose(solution.h, solutions[0].h, rtol=1e-5, atol=1e-6, equal_nan=True)
        systems = solution.stats.systems
        assert systems is None or systems.naccept.shape == h0.shape[:1]
    return [s.stats.engine for s in solutions], solutions[-1].stats.reason


@pytest.mark.usefixtures("auto")
def test_a_batch_that_is_solved_again_is_a_sweep():
    w, h0, t = draws(9), draws(9, 2), torch.linspace(0, 3, 5, dtype=F64)

    def f(t, h):
        return torch.stack([h[:, 1], -w * h[:, 0]], 1)

    found, reason = engines(f, h0, t)
    assert found == ["torch", "julia", "julia"]
    assert "abreast" in reason
    with torch.no_grad():
        assert engines(f, h0, t, method="rodas5p")[0][-1] == "julia"
        assert engines(f, h0, t[[0, -1]], event_fn=lambda t, h: h[:, 0] + 0.1)[0][-1] == "julia"
        assert engines(f, h0, t, method="radau5")[0] == ["torch"] * 3
    w.requires_grad_()
    assert engines(f, h0, t, adjoint=True)[0][-1] == "julia"
    assert engines(f, h0, t)[0] == ["torch"] * 3  # autograd follows the steps
    assert engines(f, h0, t, compile=False, adjoint=True)[0] == ["torch"] * 3


@pytest.mark.usefixtures("auto")
def test_a_batch_that_cannot_be_a_sweep_is_none():
    h0, t = draws(6, 3), torch.linspace(0, 1, 3, dtype=F64)
    net, own, calls = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3)).double(), draws(6), []

    def reads_time(t, h):
        return -h * t[:, :1]

    def leaves_torch(t, h):
        calls.append(1)
        return -h * torch.from_numpy(np.cos(own.numpy()))[:, None]

    with torch.no_grad():
        for f in (lambda t, h: net(h), reads_time, leaves_torch):
            assert engines(f, h0, t)[0] == ["torch"] * 3


@pytest.mark.usefixtures("auto")
def test_a_batch_that_shares_what_looks_like_parts():
    """Found out only where systems are compared one by one: the native engine takes over, and stays."""
    b = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    found, reason = engines(
        lambda t, h: torch.sin(t) - b * h * b[:, None], draws(3, 3), torch.linspace(0, 1, 3, dtype=F64)
    )
    assert found == ["torch"] * 3
    assert "not each f with its own part" in reason
