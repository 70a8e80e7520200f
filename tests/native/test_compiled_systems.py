"""Compiled steps of systems that each have their own: the same as without a compiler."""

import pytest
import torch
from torch import nn

from pyjlode import odeint, odeint_event, solve
from pyjlode.errors import NotCompiled

F64 = torch.float64
N = 5
OWN = {"engine": "torch", "options": {"batch_dims": 1}}
COMPILED = {**OWN, "compile": True}
T = torch.tensor([0.0, 0.4, 1.1, 2.0], dtype=F64)
ROWS = [0.1 * i + T[: 2 + i % 3] * (1 + i / 5) for i in range(N)]


def draws(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=F64)


class Driven(nn.Module):
    """A parameter of each system, one that all share, and a force in time."""

    def __init__(self):
        super().__init__()
        self.mu, self.shared = nn.Parameter(6 * draws(N)), nn.Parameter(torch.tensor([0.3, 3.0], dtype=F64))

    def forward(self, t, h):
        x, v = h.unbind(-1)
        force = torch.sin(self.shared[1] * t).reshape(-1)
        return torch.stack([v, self.mu * (1 - x * x) * v - x + self.shared[0] * force], -1)


def both(f, h0, t, loss, inputs, **kwargs):
    found = []
    for how in (OWN, COMPILED):
        solution = solve(f, h0, t, adjoint=True, dense=False, **kwargs, **how)
        grads = torch.autograd.grad(loss(solution.h), inputs)
        found.append((solution, grads))
    return found


def same(found):
    (plain, want), (compiled, got) = found
    assert (plain.stats.compiled, compiled.stats.compiled) == ("", "steps")
    torch.testing.assert_close(compiled.h, plain.h, rtol=1e-9, atol=1e-10)
    assert torch.equal(compiled.stats.systems.naccept, plain.stats.systems.naccept)
    assert torch.equal(compiled.stats.systems.nreject, plain.stats.systems.nreject)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "t"), [("dopri5", ROWS), pytest.param("dopri8", T.flip(0), marks=pytest.mark.slow)], ids=["rows", "back"]
)
def test_steps_and_gradients(method, t):
    f, h0 = Driven(), (2 * draws(N, 2)).requires_grad_()
    same(both(f, h0, t, lambda h: h.sin().sum(), (h0, f.mu, f.shared), method=method, rtol=1e-5, atol=1e-7))


def test_moving_times_dense_output_and_failures():
    f, h0 = Driven(), 2 * draws(N, 2)
    t = torch.stack([row[[0, -1]] for row in ROWS]).requires_grad_()
    same(both(f, h0, t, lambda h: h.square().sum(), (t, f.mu), rtol=1e-5, atol=1e-7))
    with torch.no_grad():
        plain, compiled = (solve(f, h0, T, **how) for how in (OWN, COMPILED))
        at = torch.tensor([0.1, 0.8, 1.9], dtype=F64)
        torch.testing.assert_close(compiled.interpolate(at), plain.interpolate(at), rtol=1e-9, atol=1e-10)
        how = {**COMPILED, "options": {"batch_dims": 1, "on_failure": "nan"}}
        k = 2 * draws(N)[:, None]
        found = solve(lambda t, h: k * h**2, torch.ones(N, 1, dtype=F64), [0.0, 0.8], **how)
        fails = draws(N) > 1 / 1.6
        assert torch.equal(found.stats.systems.failed, fails)
        exact = 1 / (1 - 1.6 * draws(N)[~fails])
        torch.testing.assert_close(found.h[-1, ~fails, 0], exact, rtol=1e-5, atol=1e-5)


def test_events():
    f, h0, found = Driven(), 1 + draws(N, 2), []
    for how in (OWN, COMPILED):
        times, h = odeint_event(
            f, h0, T[0], event_fn=lambda t, h: h[:, 0] - 0.2, adjoint=True, odeint_interface=odeint, rtol=1e-7, **how
        )
        found.append((times.detach(), h.detach(), *torch.autograd.grad(times.sum() + h[-1].square().sum(), f.mu)))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
def test_a_network_whose_numbers_change_between_solves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def f(t, h):
        return net(torch.cat([h, t.expand(N, 1)], -1))

    h0 = draws(N, 2)
    for _ in range(2):
        same(both(f, h0, ROWS, lambda h: h.square().mean(), tuple(net.parameters()), rtol=1e-6, atol=1e-8))
        with torch.no_grad():
            for x in net.parameters():
                x.mul_(1.1)


def test_what_is_not_compiled_is_said():
    def reads(t, h):
        return -h * float(h.detach().abs().max())

    with pytest.raises(NotCompiled, match="f "):
        odeint(reads, draws(N, 2), T, **{**COMPILED, "options": {"batch_dims": 1, "batch_t": "column"}})
    with pytest.raises(NotCompiled, match="several tensors"):
        odeint(lambda t, h: (-h[0], -h[1]), (draws(N, 2), draws(N)), T, **COMPILED)
