"""Reversible Runge-Kutta methods: their order, that steps are undone, gradients without a record of the states."""

import math

import pytest
import torch
from torch import nn

from pyjlode import errors, methods, notices, odeint, odeint_event, solve
from pyjlode.native.checkpoints import Reversed
from pyjlode.native.reversible import Other, Reversible
from pyjlode.native.step import Interval
from pyjlode.problem import Field, ODEProblem, SolverOptions, rms_norm

F64 = torch.float64
METHODS = ["reversible_midpoint", "reversible_rk4", "reversible_dopri5"]
T = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
H0 = torch.tensor([1.0, 0.3], dtype=F64)
A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64)
each = pytest.mark.parametrize("method", METHODS)


def field(A):
    return lambda t, y: A @ y + 0.3 * torch.sin(t) * y.square()


def problem(method):
    row = methods.find(method)
    return ODEProblem(
        f=Field(field(A)),
        y0=H0,
        t=T,
        times=T.tolist(),
        method=row,
        rtol=0.1,
        atol=0.1,
        options=SolverOptions(),
        norm=rms_norm,
    )


@each
def test_order(method):
    exact, off = odeint(field(A), H0, T, method="dopri8", rtol=1e-12, atol=1e-12), []
    for size in (0.1, 0.05):
        h = odeint(field(A), H0, T, method=method, options={"step_size": size})
        off.append(float((h - exact).abs().max()))
    assert methods.find(method).order - 0.2 < math.log2(off[0] / off[1]) < methods.find(method).order + 0.8


@each
@pytest.mark.parametrize("backward", [False, True])
def test_a_step_is_undone(method, backward):
    maker, interval = (
        Reversible(problem(method)),
        Interval(0.4, 0.2, 0.4, -0.2) if backward else Interval(0.2, 0.4, 0.2, 0.2),
    )
    y, z = H0, H0 + 0.01
    step = maker.step(interval, y, Other(z))
    again = maker.backward(interval, step.y1, step.left)
    assert all(float((a - b).abs().max()) < 1e-14 for a, b in zip(again, (y, z)))


@each
@pytest.mark.parametrize("adjoint", [True, "reversible"])
def test_gradients(method, adjoint):
    """By h0, t and parameters, with outputs on and between the steps: those of adjoint=False, to rounding."""

    def gradient(adjoint):
        a, h0, t = (x.clone().requires_grad_() for x in (A, H0, T))
        h = odeint(field(a), h0, t, method=method, options={"step_size": 0.07}, adjoint=adjoint, engine="torch")
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad((h * h.cos()).sum(), (a, h0, t))])

    assert torch.allclose(gradient(adjoint), gradient(False), rtol=1e-11, atol=1e-12)


def test_on_the_grid_of_t_and_with_events():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    t = torch.linspace(0, 2, 41, dtype=F64)
    grads = []
    for adjoint in (False, "reversible"):
        h = odeint(lambda t, y: net(y), H0, t, method="reversible_rk4", adjoint=adjoint, engine="torch")
        grads.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(h[-1].sum(), net.parameters())]))
    assert torch.allclose(*grads, rtol=1e-11, atol=1e-13)
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    time, _ = odeint_event(
        lambda t, y: a * torch.ones_like(y),
        torch.zeros(1, dtype=F64),
        0.0,
        event_fn=lambda t, y: y[0] - 1,
        method="reversible_rk4",
        options={"step_size": 0.1},
        adjoint="reversible",
        engine="torch",
    )
    assert time.item() == pytest.approx(0.5, rel=1e-9)
    assert float(torch.autograd.grad(time, a)[0]) == pytest.approx(-0.25, rel=1e-9)


def test_dense_output_and_transforms():
    s = solve(field(A), H0, T, method="reversible_rk4", options={"step_size": 0.02})
    times = torch.linspace(0, 3, 17, dtype=F64)
    exact = odeint(field(A), H0, times, method="dopri8", rtol=1e-12, atol=1e-12)
    assert float((s.interpolate(times) - exact).abs().max()) < 1e-6

    def last(h0):
        return odeint(field(A), h0, T[:2], method="reversible_rk4", options={"step_size": 0.1})[-1]

    starts = torch.stack([H0, 2 * H0])
    assert torch.allclose(torch.func.vmap(last)(starts), torch.stack([last(x) for x in starts]), rtol=1e-12)


def test_no_state_of_a_step_is_kept():
    """After 300 steps: the last two states, and their times."""
    p = problem(METHODS[0])
    maker, kept, y, other = Reversible(p), Reversed(p), H0, Other(None)
    for i in range(300):
        step = maker.step(Interval(i / 100, (i + 1) / 100, i / 100, 1 / 100), y, other)
        kept.add(step)
        y, other = step.y1, Other(step.left)
    assert torch.equal(kept.last[0], y)
    assert len(kept.last) == 2
    assert kept.times.ends.itemsize * len(kept.times.ends) == 8 * 301
    assert [k.interval.t0 for k in kept.last_first(0, again=False)] == [i / 100 for i in reversed(range(300))]


def test_where_it_cannot_be_followed(monkeypatch):
    """A system that forgets fast makes the two states part; roundings grow by 1 % a step on the way back."""
    monkeypatch.setattr(notices, "_warned", set())
    with pytest.warns(UserWarning, match="parted by"):
        odeint(lambda t, y: -8 * y, H0, T, method="reversible_rk4", options={"step_size": 0.1})
    h0 = H0.clone().requires_grad_()
    h = odeint(field(A), h0, T, method="reversible_midpoint", options={"step_size": 3 / 3500}, adjoint="reversible")
    with pytest.raises(errors.GradientUnavailable, match="to rounding"):
        h.sum().backward()
    with pytest.raises(errors.BadOption, match="'reversible_rk4'"):
        odeint(field(A), H0, T, method="dopri5", adjoint="reversible")
    with pytest.raises(errors.BadOption, match="depend on what earlier steps left"):
        odeint(field(A), H0, T, method="reversible_rk4", adjoint="checkpointed")
