"""Fields given as a stiff and another part: kencarp4 is of its order, gradients are those of the sum, and Newton's
iteration sees the stiff part alone."""

import math

import pytest
import torch
from torch import nn

from pyjlode import Split, errors, odeint, odeint_event, solve

F64 = torch.float64
T = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
H0 = torch.tensor([1.0, 0.5], dtype=F64)


def stiff(t, h):
    x, y = h.unbind()
    return torch.stack([-2 * x * y + torch.cos(t), -y + 0.3 * x])


def other(t, h):
    x, y = h.unbind()
    return torch.stack([torch.sin(y * t) + x, x * x * torch.cos(t)])


@pytest.mark.parametrize(("method", "order"), [("kencarp4", 4), ("kencarp5", 5)])
def test_order(method, order):
    """Of the pair of methods, whose conditions are coupled: a field that is neither autonomous nor linear."""
    exact, off = odeint(lambda t, h: stiff(t, h) + other(t, h), H0, T, method="dopri8", rtol=1e-13, atol=1e-13), []
    for n in (16, 32, 64):
        steps = {"first_step": 2 / n, "min_step": 2 / n, "max_step": 2 / n, "max_iters": 50, "max_num_steps": 200}
        h = odeint(Split(stiff, other), H0, T, method=method, rtol=1e-11, atol=1e-11, options=steps)
        off.append(float((h - exact).abs().max()))
    assert all(order - 0.3 < math.log2(a / b) < order + 0.5 for a, b in zip(off, off[1:]))


def test_dense_output_is_of_the_order_of_a_cubic():
    s = solve(Split(stiff, other), H0, T, method="kencarp4", rtol=1e-8, atol=1e-8)
    times = torch.linspace(0, 2, 33, dtype=F64)
    exact = odeint(lambda t, h: stiff(t, h) + other(t, h), H0, times, method="dopri8", rtol=1e-12, atol=1e-12)
    assert float((s.interpolate(times) - exact).abs().max()) < 1e-6


def reaction_diffusion(n):
    """Fisher's equation with fast diffusion: the Laplacian is stiff, the reaction is not."""
    D = torch.diag(torch.full((n,), -2.0)) + torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    D[0, 0] = D[-1, -1] = -1.0
    D = (2.0 * n * n * D).to(F64)
    x = torch.linspace(0, 1, n, dtype=F64)
    return lambda t, h: D @ h, lambda t, h: 5 * h * (1 - h), torch.exp(-50 * (x - 0.3) ** 2)


def test_a_stiff_reaction_with_diffusion():
    """As right as the tolerance asks, with steps that the stiffness does not hold: explicit ones would be thousands.
    The Jacobian is that of the diffusion, a constant: it is made once."""
    diffusion, reaction, h0 = reaction_diffusion(40)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    s = solve(Split(diffusion, reaction), h0, t, method="kencarp4", rtol=1e-6, atol=1e-8, dense=False)
    exact = odeint(lambda t, h: diffusion(t, h) + reaction(t, h), h0, t, method="radau5", rtol=1e-9, atol=1e-11)
    assert float((s.h[-1] - exact[-1]).abs().max()) < 1e-5
    assert s.stats.naccept < 100
    assert s.stats.njac <= 10


@pytest.mark.parametrize("method", ["dopri5", "rodas5p", "kvaerno5", "gl4"])
def test_to_other_methods_it_is_the_sum(method):
    t = torch.linspace(0, 2, 21, dtype=F64)
    a = odeint(Split(stiff, other), H0, t, method=method)
    b = odeint(lambda t, h: stiff(t, h) + other(t, h), H0, t, method=method)
    assert torch.equal(a, b)


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, t, h):
        return self.layers(h) * torch.cos(t)


@pytest.mark.parametrize("adjoint", [True, "interpolating", "forward"])
def test_gradients(adjoint):
    """By the parameters of both parts, h0 and t."""
    fast, slow = Net(0), Net(1)
    f = Split(lambda t, h: -30 * h + fast(t, h), slow)
    params = [*fast.parameters(), *slow.parameters()]

    def gradient(adjoint):
        h0, t = H0.clone().requires_grad_(), torch.tensor([0.0, 0.1, 0.3], dtype=F64).requires_grad_()
        h = odeint(f, h0, t, method="kencarp4", adjoint=adjoint, rtol=1e-6, atol=1e-7)
        return torch.cat([x.reshape(-1) for x in torch.autograd.grad(h.square().sum(), [h0, t, *params])])

    right, found = gradient(False), gradient(adjoint)
    size = float(right.abs().max())
    assert float((found - right).abs().max()) < (1e-8 if adjoint is True else 1e-4) * size


def test_a_gradient_is_a_finite_difference():
    k = torch.tensor([0.7, 1.3], dtype=F64)

    def loss(k):
        f = Split(lambda t, h: -40 * k[0] * h, lambda t, h: torch.sin(k[1] * h) + t)
        return odeint(f, H0, 0.1 * T[:2], method="kencarp4", adjoint=True, rtol=1e-8, atol=1e-9)[-1].square().sum()

    leaf = k.clone().requires_grad_()
    found = torch.autograd.grad(loss(leaf), leaf)[0]
    for i in range(2):
        e = torch.zeros(2, dtype=F64)
        e[i] = 1e-4
        assert float(found[i]) == pytest.approx(float(loss(k + e) - loss(k - e)) / 2e-4, rel=1e-4)


def test_structures_events_and_transforms():
    f = Split(lambda t, h: {"a": -50 * (h["a"] - h["b"]), "b": 0 * h["b"]},
              lambda t, h: {"b": torch.ones_like(h["b"]), "a": 0 * h["a"]})  # fmt: skip
    h0 = {"a": torch.zeros(1, dtype=F64), "b": torch.zeros(1, dtype=F64)}
    event_t, h = odeint_event(f, h0, 0.0, event_fn=lambda t, h: h["b"] - 0.7, method="kencarp4", rtol=1e-8, atol=1e-9)
    assert float(event_t) == pytest.approx(0.7, rel=1e-7)
    assert float(h["a"][-1]) == pytest.approx(0.7 - 0.02, rel=1e-4)

    def last(c):
        f = Split(lambda t, h: -20 * c * h, lambda t, h: torch.cos(h))
        return odeint(f, H0, T[:2], method="kencarp4", rtol=1e-8, atol=1e-9)[-1]

    cs = torch.tensor([0.5, 2.0], dtype=F64)
    assert torch.allclose(torch.func.vmap(last)(cs), torch.stack([last(c) for c in cs]), rtol=1e-6)


def test_what_is_refused():
    with pytest.raises(errors.BadShape, match="nonstiff is a float"):
        Split(stiff, 1.0)
    norm = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)).double()
    with pytest.raises(errors.BadOption, match="changes its own buffers"):
        odeint(Split(lambda t, h: -h, lambda t, h: norm(h)), H0, T, method="kencarp4", adjoint=True)
    # That of the sum would be taken for that of the stiff part, and the gradient by the steps be wrong.
    with pytest.raises(errors.BadOption, match="Leave jac out"):
        odeint(Split(lambda t, h: -h, lambda t, h: h), H0, T, method="kencarp4", jac=lambda t, h: torch.zeros(2, 2))
