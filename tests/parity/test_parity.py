"""Both engines on the same problems: solutions, gradients and accounts agree, and more so as tolerances shrink."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BERNOULLI, COSINE, FEHLBERG, LINEAR, LOGISTIC, OSCILLATOR, max_error

import pyjlode
from pyjlode import METHODS, odeint, solve
from pyjlode.bridge import engine as julia_engine

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
BOTH = [m for m in METHODS.values() if m.julia is not None]
ADAPTIVE = [m for m in BOTH if m.kind == "adaptive"]
FIXED = [m for m in BOTH if m.kind != "adaptive"]
GRADIENTS = sorted(julia_engine.GRADIENTS)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def each(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda m: m.name)


@each(ADAPTIVE)
@pytest.mark.parametrize("problem", [LINEAR, OSCILLATOR, LOGISTIC, COSINE, FEHLBERG], ids=lambda p: p.name)
@PRECISIONS
@DIRECTIONS
def test_adaptive_solutions(method, problem, dtype, backward):
    """Within 20 tolerances of each other and of the exact solution."""
    t = problem.times(9, backward=backward)
    tol = 1e-4 if dtype == torch.float32 or method.order == 3 else 1e-8
    h0 = problem.exact(t[0]).to(dtype)
    torch_h, julia_h = (
        odeint(problem.f, h0, t, method=method.name, engine=engine, rtol=tol, atol=tol) for engine in ("torch", "julia")
    )
    scale = 20 * tol * max(1.0, float(problem.exact(t).abs().max()))
    assert max_error(torch_h, julia_h) < scale
    assert max_error(julia_h, problem.exact(t)) < scale


@each(FIXED)
@DIRECTIONS
def test_fixed_steps_are_the_same_numbers(method, backward):
    """The same method on the same grid: equal to what the equations of implicit steps are solved to."""
    t = OSCILLATOR.times(40, backward=backward)
    h0 = OSCILLATOR.exact(t[0])
    torch_h, julia_h = (
        odeint(OSCILLATOR.f, h0, t, method=method.name, engine=engine, rtol=1e-10, atol=1e-10)
        for engine in ("torch", "julia")
    )
    assert max_error(torch_h, julia_h) < (1e-11 if method.kind == "fixed" else 1e-6)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "vern7"])
def test_solutions_meet_as_tolerances_shrink(method):
    t = FEHLBERG.times(5)
    gaps = []
    for tol in (1e-5, 1e-7, 1e-9):
        a, b = (
            odeint(FEHLBERG.f, FEHLBERG.h0, t, method=method, engine=e, rtol=tol, atol=tol) for e in ("torch", "julia")
        )
        gaps.append(max_error(a, b))
    assert gaps[2] < 1e-2 * gaps[0]
    assert gaps[2] < 1e-7


class Field(torch.nn.Module):
    def __init__(self, dtype, width=8, dim=3):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(dim, width), torch.nn.Tanh(), torch.nn.Linear(width, dim)).to(
            dtype
        )
        self.rate = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, t, h):
        return self.net(h) - self.rate * torch.cos(t) * h


def gradients(f, h0, t, **kwargs):
    t = t.clone().requires_grad_()
    h0 = h0.clone().requires_grad_()
    h = odeint(f, h0, t, **kwargs)
    weights = torch.linspace(0.5, 1.5, h.numel(), dtype=h.dtype).view_as(h)
    return torch.autograd.grad((weights * h * h).sum(), [h0, t, *f.parameters()])


@pytest.mark.parametrize("name", GRADIENTS)
@PRECISIONS
@DIRECTIONS
def test_gradients(name, dtype, backward):
    f, h0 = Field(dtype), torch.randn(4, 3, dtype=dtype)
    t = torch.linspace(0, 2, 4, dtype=F64)
    t = t.flip(0) if backward else t
    tol = 1e-5 if dtype == torch.float32 else 1e-8
    settings = {"rtol": tol, "atol": tol, "method": "tsit5", "adjoint": name}
    want = gradients(f.double(), h0.double(), t, engine="torch", adjoint=False, rtol=1e-11, atol=1e-12, method="vern9")
    f.to(dtype)
    for engine in ("torch", "julia"):
        for a, b in zip(gradients(f, h0, t, engine=engine, **settings), want):
            assert max_error(a, b) < 100 * tol * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_meet_as_tolerances_shrink(name):
    f, h0, t = Field(F64), torch.randn(2, 3, dtype=F64), torch.tensor([0.0, 0.7, 2.0], dtype=F64)
    gaps = []
    for tol in (1e-5, 1e-8):
        both = [
            gradients(f, h0, t, engine=e, adjoint=name, method="tsit5", rtol=tol, atol=tol) for e in ("torch", "julia")
        ]
        gaps.append(max(max_error(a, b) for a, b in zip(*both)))
    assert gaps[1] < 1e-2 * gaps[0]


@pytest.mark.parametrize("backward", [False, True])
def test_events(backward):
    sign = -1 if backward else 1
    t = torch.tensor([0.0, float(sign)], dtype=F64)

    def event(t, h):
        return torch.stack([h[0] - 0.2, h[1] + 5.0])

    found = []
    for engine in ("torch", "julia"):
        h0 = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
        time, h = odeint(OSCILLATOR.f, h0, t, event_fn=event, engine=engine, adjoint="gauss", rtol=1e-9, atol=1e-10)
        found.append([time.detach(), h.detach(), *torch.autograd.grad(time, h0)])
    for a, b in zip(*found):
        assert max_error(a, b) < 1e-7
    assert abs(float(found[0][0]) - sign * torch.acos(torch.tensor(0.2, dtype=F64))) < 1e-8


def test_accounts_mean_the_same():
    accounts = [
        solve(BERNOULLI.f, BERNOULLI.h0, BERNOULLI.times(2), engine=e, rtol=1e-8, atol=1e-8).stats
        for e in ("torch", "julia")
    ]
    for name in ("nfe", "naccept"):
        a, b = (getattr(stats, name) for stats in accounts)
        assert 0.5 < a / b < 2


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.floats(0.1, 2.0),
    st.booleans(),
    st.sampled_from(["dopri5", "tsit5", "vern7", "bosh3"]),
)
@settings(max_examples=25)
def test_random_smooth_fields(seed, dim, span, backward, method):
    torch.manual_seed(seed)
    f, h0 = Field(F64, dim=dim), torch.randn(2, dim, dtype=F64)
    t = torch.tensor([0.0, -span if backward else span], dtype=F64)
    tol = 1e-5 if method == "bosh3" else 1e-8
    with torch.no_grad():
        a, b = (odeint(f, h0, t, method=method, engine=e, rtol=tol, atol=tol) for e in ("torch", "julia"))
    assert max_error(a, b) < 20 * tol * max(1.0, float(a.abs().max()))


def test_training_runs_lie_on_each_other():
    """Fifty steps of Adam from the same weights: the losses agree to what the solvers' tolerance lets through."""
    t = torch.linspace(0, 2, 8, dtype=F64)
    target = torch.stack([torch.cos(2 * t), torch.sin(2 * t)], -1)
    curves = []
    for engine in ("torch", "julia"):
        torch.manual_seed(0)
        f = Field(F64, dim=2)
        optimizer = torch.optim.Adam(f.parameters(), lr=0.01)
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            h = odeint(f, target[0], t, engine=engine, adjoint=True, method="tsit5", rtol=1e-8, atol=1e-9)
            loss = (h - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(torch.tensor(losses))
    assert torch.allclose(curves[0], curves[1], rtol=1e-4)
    assert curves[1][-1] < 0.5 * curves[1][0]
    assert pyjlode.METHODS["tsit5"].julia
