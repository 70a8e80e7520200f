"""Events that go on, and driven systems, on both engines: the same happens at the same times, gradients too."""

import math

import pytest
import torch
from problems import thrown_ball

import pyjlode
from pyjlode import CDE, Event, Interpolation, solve
from pyjlode.errors import TooManyEvents

pytestmark = pytest.mark.usefixtures("julia")
F64 = torch.float64
G = 9.81
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def fall(t, h):
    return torch.stack([h[1], -G * torch.ones_like(h[1])])


def gradient(engine, adjoint=True, method="dopri5"):
    theta = torch.tensor([9.81, 0.8, 1.0, 1.3, 0.7, 1.5], dtype=F64, requires_grad=True)
    f, h0, t, events = thrown_ball(theta)
    got = solve(f, h0, t, events=events, adjoint=adjoint, method=method, dense=False, engine=engine, **TIGHT)
    assert got.stats.engine == engine
    assert [x.index for x in got.events] == [0, 1, 0, 0]
    loss = (got.h[:, 0] * torch.arange(4)).sum() + sum((k + 1) * x.t for k, x in enumerate(got.events))
    return loss.detach(), *torch.autograd.grad(loss + got.events[2].before[1], theta)


@pytest.mark.parametrize(
    ("method", "adjoint"),
    [("dopri5", True), ("dopri5", "discrete"), ("dopri5", "gauss"), ("vern7", "forward"), ("rodas5p", "gauss")],
)
def test_bounces_and_pushes(method, adjoint):
    for one, other in zip(gradient("julia", adjoint, method), gradient("torch")):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["tsit5", "bdf"])
def test_methods_and_dense_output(method):
    event = Event(lambda t, h: h[0], lambda t, h: torch.stack([h[0], -0.8 * h[1]]), direction=-1)
    h0, t = torch.tensor([1.0, 0.0], dtype=F64), torch.linspace(0, 2, 9, dtype=F64)
    found = []
    for engine in ("torch", "julia"):
        got = solve(fall, h0, t, events=[event], method=method, engine=engine)
        found.append((torch.stack([x.t for x in got.events]), got.h, got.interpolate(t + 0.001 * (1 - t))))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("direction", [-1, 0, 1])
def test_directions(direction, sign):
    def turn(t, h):
        return torch.stack([h[1], -h[0]])

    h0 = torch.tensor([0.0, 1.0], dtype=F64)
    events = [Event(lambda t, h: h[0], None, direction)]
    ours, theirs = (solve(turn, h0, [0.0, sign * 20.0], events=events, engine=e, **TIGHT) for e in ("torch", "julia"))
    assert [float(x.t) for x in theirs.events] == pytest.approx([float(x.t) for x in ours.events], rel=1e-8)
    assert len(ours.events) == (6 if direction == 0 else 3)


def test_terminal_and_endless():
    bounce = Event(lambda t, h: h[0], lambda t, h: torch.stack([h[0], -0.5 * h[1]]), direction=-1, terminal=3)
    h0 = torch.tensor([1.0, 0.0], dtype=F64)
    got = solve(fall, h0, [0.0, 50.0], events=[bounce], engine="julia", dense=False, **TIGHT)
    assert float(got.event_t) == pytest.approx(math.sqrt(2 / G) * 2.5, rel=1e-8)
    endless = Event(bounce.condition, bounce.affect, direction=-1)
    how = {"dense": False, "options": {"max_events": 200}}
    with pytest.raises(TooManyEvents):
        solve(fall, h0, [0.0, 50.0], events=[endless], engine="julia", **how, **TIGHT)


@pytest.mark.parametrize(("channels", "batch"), [(1, ()), (3, (4,))], ids=["few numbers", "arrays"])
@pytest.mark.parametrize("kind", ["linear", "hermite"])
def test_a_searched_grid_is_compiled(kind, channels, batch):
    torch.manual_seed(0)
    x = 0.3 * torch.randn(*batch, 9, channels, dtype=F64).cumsum(-2)
    net = torch.nn.Linear(2, 2 * channels).double()

    def g(t, h):
        return torch.tanh(net(h)).reshape(*h.shape[:-1], 2, channels)

    cde = CDE(g, Interpolation(x, torch.linspace(0, 4, 9, dtype=F64), kind))
    h0 = torch.ones(*batch, 2, dtype=F64)
    found = []
    for engine, compiled in (("torch", None), ("julia", True)):
        got = pyjlode.solve(
            cde, h0, [0.0, 1.3, 4.0], options=cde.options, engine=engine, compile=compiled, adjoint="forward", **TIGHT
        )
        assert bool(got.stats.compiled) == bool(compiled)
        grads = torch.autograd.grad(got.h[1:].square().sum(), net.parameters())
        found.append((got.h.detach(), *grads))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
