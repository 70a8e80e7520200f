"""States of rest: found where closed forms have them, and differentiated as finite differences say."""

import pytest
import torch

from pyjlode import errors, steady_state

F64 = torch.float64


def test_a_linear_system_and_its_gradients():
    torch.manual_seed(1)
    A = (torch.randn(4, 4, dtype=F64) - 4 * torch.eye(4, dtype=F64)).requires_grad_()
    b = torch.randn(4, dtype=F64, requires_grad=True)
    h = steady_state(lambda t, h: A @ h + b, torch.zeros(4, dtype=F64))
    torch.testing.assert_close(h, -torch.linalg.solve(A, b), rtol=1e-11, atol=1e-12)
    weight = torch.arange(1.0, 5.0, dtype=F64)
    found = torch.autograd.grad((weight * h).sum(), (A, b))
    right = torch.autograd.grad((weight * -torch.linalg.solve(A, b)).sum(), (A, b))
    for x, y in zip(found, right):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def test_it_goes_where_the_solution_goes():
    """h' = h - h³ rests at 0 and at ±1; from either side of 0 the solution goes to the stable one of that side."""
    h0 = torch.tensor([[-3.0], [-0.01], [0.02], [5.0]], dtype=F64)
    h = steady_state(lambda t, h: h - h**3, h0, batch_dims=1)
    torch.testing.assert_close(h, h0.sign(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_stiff_reaction(dtype):
    """Feed and drain of a tank with A + B -> 2 B: the closed form of the steady state, over decades of rates."""
    k = torch.logspace(0, 9 if dtype == F64 else 4, 10, dtype=dtype)

    def f(t, h):
        a, b = h.unbind(-1)
        return torch.stack([1 - a - k * a * b, 0.1 - b + k * a * b], -1)

    h = steady_state(f, torch.ones(10, 2, dtype=dtype), batch_dims=1)
    # a + b = 1.1, and 1 - a = k a (1.1 - a).
    K = k.double()
    p = 1.1 + 1 / K
    a = 2 / K / (p + (p**2 - 4 / K).sqrt())
    torch.testing.assert_close(h[:, 0].double(), a, rtol=1e-9 if dtype == F64 else 2e-4, atol=0)


def test_gradient_of_a_deep_equilibrium_model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5)).double()
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)

    def rest(x):
        return steady_state(lambda t, h: 0.5 * torch.tanh(net(h)) + x - h, torch.zeros(3, 5, dtype=F64), batch_dims=1)

    assert torch.autograd.gradcheck(rest, (x,))
    weights = list(net.parameters())
    loss = rest(x).square().sum()
    grads = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        e = 1e-6
        for w, g in zip(weights, grads):
            w.view(-1)[0] += e
            up = rest(x).square().sum()
            w.view(-1)[0] -= 2 * e
            down = rest(x).square().sum()
            w.view(-1)[0] += e
            assert float(g.view(-1)[0]) == pytest.approx(float((up - down) / (2 * e)), rel=1e-6, abs=1e-9)


def test_what_cannot_be_had_is_refused():
    h0 = torch.tensor([1.0, 0.5], dtype=F64)
    with pytest.raises(errors.NotConverged, match="keeps a quantity"):
        steady_state(lambda t, h: torch.stack([h[1] - h[0], h[0] - h[1]]), h0)
    with pytest.raises(errors.NotConverged, match="does not come to rest"):
        steady_state(lambda t, h: 1 + h**2, h0)
    with pytest.raises(errors.NotConverged, match="not finite at h0"):
        steady_state(lambda t, h: h.log(), -h0)
    with pytest.raises(errors.BadShape, match="returned shape"):
        steady_state(lambda t, h: h.sum(), h0)
    with pytest.raises(errors.BadShape, match="one tensor"):
        steady_state(lambda t, h: h, (h0,))
    with pytest.raises(errors.BadTolerance, match="negative"):
        steady_state(lambda t, h: -h, h0, rtol=-1)


def test_second_derivatives():
    """h = k^(1/3) is where k - h³ = 0."""
    k = torch.tensor(2.0, dtype=F64, requires_grad=True)
    h = steady_state(lambda t, h: k - h**3, torch.ones(1, dtype=F64))
    (first,) = torch.autograd.grad(h.sum(), k, create_graph=True)
    (second,) = torch.autograd.grad(first, k)
    assert first.item() == pytest.approx(2 ** (-2 / 3) / 3)
    assert second.item() == pytest.approx(-2 * 2 ** (-5 / 3) / 9)
