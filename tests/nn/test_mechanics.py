"""Motion from an energy: closed forms, what is conserved, and the gradient to the network."""

import pytest
import torch

from pyjlode import errors, odeint
from pyjlode.nn import HamiltonianNN, LagrangianNN

F64 = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def test_an_oscillator_from_its_energy():
    field = HamiltonianNN(lambda h: h.square().sum(-1) / 2)
    t = torch.linspace(0, 3, 7, dtype=F64)
    h = odeint(field, torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=F64), t, **TIGHT)
    torch.testing.assert_close(h[:, 0], torch.stack([t.cos(), -t.sin()], 1), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(h[:, 1], 2 * torch.stack([t.sin(), t.cos()], 1), rtol=1e-7, atol=1e-8)


def test_a_network_conserves_its_energy():
    torch.manual_seed(0)
    field = HamiltonianNN(torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double())
    h = odeint(field, torch.randn(3, 4, dtype=F64), torch.linspace(0, 10, 5, dtype=F64), **TIGHT)
    energy = field.energy(h)
    torch.testing.assert_close(energy, energy[:1].expand_as(energy), rtol=1e-7, atol=1e-8)


def double_pendulum(q, v):
    """Of unit masses and lengths."""
    kinetic = v[..., 0] ** 2 + v[..., 1] ** 2 / 2 + v[..., 0] * v[..., 1] * (q[..., 0] - q[..., 1]).cos()
    return kinetic + 9.81 * (2 * q[..., 0].cos() + q[..., 1].cos())


def test_a_double_pendulum_from_its_lagrangian():
    field = LagrangianNN(double_pendulum)
    q, v = torch.tensor([[1.0, 0.4], [-0.3, 2.0]], dtype=F64), torch.tensor([[0.0, 0.7], [1.0, -1.0]], dtype=F64)
    found = field(torch.zeros((), dtype=F64), (q, v))[1]
    d, g = q[:, 0] - q[:, 1], 9.81
    M = torch.stack([torch.stack([2 + 0 * d, d.cos()], -1), torch.stack([d.cos(), 1 + 0 * d], -1)], -2)
    force = torch.stack(
        [-d.sin() * v[:, 1] ** 2 - 2 * g * q[:, 0].sin(), d.sin() * v[:, 0] ** 2 - g * q[:, 1].sin()], -1
    )
    torch.testing.assert_close(found, torch.linalg.solve(M, force), rtol=1e-10, atol=1e-11)
    qs, vs = odeint(field, (q, v), torch.linspace(0, 2, 5, dtype=F64), **TIGHT)
    energy = field.energy(qs, vs)
    torch.testing.assert_close(energy, energy[:1].expand_as(energy), rtol=1e-7, atol=1e-7)


class QuadraticLagrangian(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Softplus(), torch.nn.Linear(8, 1)).double()

    def forward(self, q, v):
        return 2 * v.square().sum(-1, keepdim=True) + self.net(torch.cat([q, v], -1))


@pytest.mark.parametrize("adjoint", [False, True, "gauss"], ids=str)
@pytest.mark.parametrize("kind", ["hamiltonian", "lagrangian"])
def test_gradients(kind, adjoint):
    torch.manual_seed(0)
    t = [0.0, 1.0]
    if kind == "hamiltonian":
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        field, h0 = HamiltonianNN(net), torch.randn(2, 4, dtype=F64)
    else:
        field, h0 = LagrangianNN(QuadraticLagrangian()), tuple(torch.randn(2, 2, 2, dtype=F64))

    def loss(adjoint=False):
        h = odeint(field, h0, t, adjoint=adjoint, rtol=1e-10, atol=1e-11)
        return sum((x[-1] ** 2).sum() for x in (h if isinstance(h, tuple) else (h,)))

    parameters = list(field.parameters())[:-1]  # a constant in the energy moves nothing
    grads = torch.autograd.grad(loss(adjoint), parameters)
    for w, g in zip(parameters, grads):
        with torch.no_grad():
            e = 1e-5
            w.view(-1)[0] += e
            up = loss()
            w.view(-1)[0] -= 2 * e
            down = loss()
            w.view(-1)[0] += e
        assert float(g.view(-1)[0]) == pytest.approx(float((up - down) / (2 * e)), rel=1e-5, abs=1e-8)


def test_bad_shapes_are_told():
    with pytest.raises(errors.BadShape, match="coordinates and then momenta"):
        odeint(HamiltonianNN(lambda h: h.sum(-1)), torch.ones(2, 3), [0.0, 1.0])
    with pytest.raises(errors.BadShape, match="H must give one number for each row"):
        odeint(HamiltonianNN(lambda h: h), torch.ones(2, 4), [0.0, 1.0])
    with pytest.raises(errors.BadShape, match="pair"):
        odeint(LagrangianNN(double_pendulum), torch.ones(2, 4), [0.0, 1.0])
