"""One stiff system, compiled, by Rosenbrock methods: its gradient is that of the numbers that came out."""

import pytest
import torch
from torch import nn

from pyjlode import odeint, solve

pytestmark = pytest.mark.usefixtures("julia")
F64 = torch.float64
T = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=F64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).to(F64)
        self.rates = nn.Parameter(torch.tensor([-1.0, -300.0], dtype=F64))

    def forward(self, t, h):
        return h * self.rates + self.net(h) + torch.sin(3 * t)


def gradients(f, t, method, engine, **how):
    h0, t = torch.ones(2, dtype=F64, requires_grad=True), t.clone().requires_grad_()
    how = {"rtol": 1e-7, "atol": 1e-9, "adjoint": True, "dense": False, **how}
    solution = solve(f, h0, t, method=method, engine=engine, compile=True if engine == "julia" else None, **how)
    wrt = (h0, t, *f.parameters())
    return solution, list(torch.autograd.grad((solution.h * torch.tensor([1.0, -2.0])).square().sum(), wrt))


@pytest.mark.parametrize("method", ["rodas5p", "rosenbrock23"])
@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
def test_steps_of_one_size_have_one_gradient(method, backward):
    """With the same steps the engines' gradients differ by rounding alone."""
    f = Net()
    if backward:
        f.rates.data.mul_(-1)
    how = {"rtol": 1.0, "atol": 1e3, "options": {"first_step": 0.02, "max_step": 0.02}}
    t = -T if backward else T
    (ours, got), (theirs, want) = (gradients(f, t, method, engine, **how) for engine in ("julia", "torch"))
    assert ours.stats.naccept == theirs.stats.naccept
    assert ours.stats.compiled == "scalar"
    torch.testing.assert_close(ours.h, theirs.h, rtol=1e-10, atol=1e-12)
    del got[1], want[1]  # by the times: Julia's is the slope there, the native engine's that of the steps
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", ["rodas5p", "rosenbrock23"])
def test_gradients_are_the_native_engines(method):
    f, tight = Net(), {"rtol": 1e-8, "atol": 1e-10} if method == "rodas5p" else {"rtol": 1e-6, "atol": 1e-8}
    (ours, got), (theirs, want) = (gradients(f, T, method, engine, **tight) for engine in ("julia", "torch"))
    torch.testing.assert_close(ours.h, theirs.h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_training_steps(monkeypatch):
    """The first solve is the native engine's; those after it are compiled, see new parameters, and need no other
    package for their gradients."""
    monkeypatch.delenv("PYJLODE_ENGINE", raising=False)

    class Unmet(Net):
        def forward(self, t, h):
            return h * self.rates + self.net(h) + torch.cos(3 * t)

    f, losses, reasons = Unmet(), [], []
    optimiser = torch.optim.Adam(f.parameters(), 1e-3)
    for _ in range(6):
        optimiser.zero_grad()
        solution = solve(f, torch.ones(2, dtype=F64), T, method="rodas5p", adjoint=True, dense=False)
        loss = solution.h[-1].square().sum()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        reasons.append((solution.stats.engine, solution.stats.compiled))
    assert reasons == [("torch", "")] + 5 * [("julia", "scalar")]
    assert all(b < a for a, b in zip(losses, losses[1:]))
    assert solution.stats.nfe_backward > 0


def test_asked_for_by_name_it_is_there_at_once():
    rate = torch.tensor(-40.0, dtype=F64, requires_grad=True)
    f = lambda t, h: rate * (h - torch.sin(t))  # noqa: E731
    how = {"method": "rodas5p", "adjoint": "discrete", "rtol": 1e-8, "atol": 1e-10}
    got, want = (
        torch.autograd.grad(odeint(f, torch.ones(2, dtype=F64), T, engine=engine, **how).sum(), rate)
        for engine in ("julia", "torch")
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_dense_output():
    f, h0 = Net(), torch.ones(2, dtype=F64)
    solution = solve(f, h0, T[[0, -1]], method="rodas5p", engine="julia", compile=True, adjoint=True, rtol=1e-8)
    times = torch.tensor([0.11, 0.52, 0.98], dtype=F64)
    want = odeint(f, h0, torch.cat([T[:1], times]), method="dopri8", rtol=1e-10, atol=1e-12, engine="torch")[1:]
    with torch.no_grad():
        torch.testing.assert_close(solution.interpolate(times), want, rtol=1e-5, atol=1e-6)


def test_what_is_changed_in_between_is_noticed():
    f, h0 = Net(), torch.ones(2, dtype=F64)
    solution = solve(f, h0, T, method="rodas5p", engine="julia", compile=True, adjoint=True, dense=False)
    with torch.no_grad():
        f.rates.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.h.sum().backward()
