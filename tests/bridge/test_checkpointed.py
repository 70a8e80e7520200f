"""`adjoint="checkpointed"` on the Julia engine: the gradient of "discrete" to rounding, from few states."""

import pytest
import torch
from torch import nn

from pyjlode import METHODS, errors, odeint, solve
from pyjlode.native.checkpoints import slots

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
EXPLICIT = [m.name for m in METHODS.values() if m.kind in ("adaptive", "fixed") and m.julia]
each_mode = pytest.mark.parametrize("compile", [False, True], ids=["called_back", "compiled"])


class Net(nn.Module):
    def __init__(self, n=2, hidden=5, dtype=F64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, n)).to(dtype)

    def forward(self, t, h):
        return self.layers(h) * torch.cos(t) - 0.1 * h**3


def same_steps(method, steps, engine="julia"):
    size = 3 / steps
    if METHODS[method].kind == "fixed":
        return {"step_size": size, **({"interp": "cubic"} if engine == "torch" else {})}
    return {"first_step": size, "max_step": size}


def gradient(f, h0, t, **how):
    h0 = h0.clone().requires_grad_()
    s = solve(f, h0, t, dense=how.pop("dense", False), **how)
    return torch.cat([x.reshape(-1) for x in torch.autograd.grad(s.h.square().sum(), [h0, *f.parameters()])]), s.stats


def apart(found, right):
    return float((found - right).abs().max() / right.abs().max())


@each_mode
@pytest.mark.parametrize("t", [[0.0, 3.0], [0.0, 0.31, 1.0, 1.7, 3.0], [3.0, 1.2, 0.0]], ids=str)
@pytest.mark.parametrize("method", EXPLICIT)
def test_it_is_discrete(method, t, compile):
    f, h0 = Net(), torch.tensor([1.0, 0.5], dtype=F64)
    how = {"method": method, "rtol": 1e6, "atol": 1e6}
    there = {"engine": "julia", "compile": compile, "options": same_steps(method, 60), **how}
    right, stats = gradient(f, h0, t, adjoint="discrete", **there)
    found, _ = gradient(f, h0, t, adjoint="checkpointed", **there)
    assert stats.naccept >= 60 > slots(60)
    assert apart(found, right) < 1e-12
    native, _ = gradient(
        f, h0, t, adjoint="checkpointed", engine="torch", options=same_steps(method, 60, "torch"), **how
    )
    assert apart(found, native) < 1e-11


@each_mode
@pytest.mark.parametrize("shape", [(2,), (3, 11)], ids=str)  # number by number, and in packs
def test_of_steps_that_adapt(shape, compile):
    f, h0 = Net(shape[-1], 40), torch.linspace(-1, 1, shape[-1], dtype=F64).expand(shape).contiguous()
    how = {"method": "tsit5", "rtol": 1e-11, "atol": 1e-11, "engine": "julia", "compile": compile}
    for _ in range(3):  # the later ones use again what the first made
        right, stats = gradient(f, h0, [0.0, 0.5, 3.0], adjoint="discrete", **how)
        found, others = gradient(f, h0, [0.0, 0.5, 3.0], adjoint="checkpointed", **how)
        assert others.naccept == stats.naccept > slots(stats.naccept)
        assert apart(found, right) < 1e-12


@each_mode
def test_a_second_backward_pass_and_another_solve_between(compile):
    f, how = Net(), {"engine": "julia", "compile": compile, "adjoint": "checkpointed", "rtol": 1e-10, "atol": 1e-10}
    starts = [torch.tensor([1.0, 0.5], dtype=F64).mul(s).requires_grad_() for s in (1.0, -1.0, 0.3)]
    wants = [gradient(f, h0.detach(), [0.0, 3.0], **{**how, "adjoint": "discrete"})[0] for h0 in starts]
    states = [odeint(f, h0, [0.0, 3.0], **how) for h0 in starts]
    for i in (1, 0, 2):
        for again in (True, False):
            found = torch.autograd.grad(states[i].square().sum(), [starts[i], *f.parameters()], retain_graph=again)
            assert apart(torch.cat([x.reshape(-1) for x in found]), wants[i]) < 1e-12


@each_mode
def test_with_dense_output_and_in_single_precision(compile):
    f, h0 = Net(dtype=torch.float32), torch.tensor([1.0, 0.5])
    how = {"engine": "julia", "compile": compile, "rtol": 1e-5, "atol": 1e-6, "options": {"max_step": 0.05}}
    right, _ = gradient(f, h0, [0.0, 0.5, 3.0], adjoint="discrete", **how)
    for dense in (False, True):
        found, _ = gradient(f, h0, [0.0, 0.5, 3.0], adjoint="checkpointed", dense=dense, **how)
        assert apart(found, right) < 1e-4


@each_mode
def test_a_buffer_that_changed_in_between_is_noticed(compile):
    rate = torch.tensor(0.3, dtype=F64)
    h0 = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    how = {"engine": "julia", "compile": compile, "adjoint": "checkpointed", "options": {"max_step": 0.05}}
    h = odeint(lambda t, h: -rate * h, h0, [0.0, 3.0], **how)
    rate.mul_(2)
    with pytest.raises(errors.GradientUnavailable, match="other values"):
        h.sum().backward()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"method": "rodas5p"}, "explicit"),
        ({"method": "dopri5", "options": {"jump_t": [0.5]}}, "jump_t"),
        ({"method": "dopri5", "options": {"batch_dims": 1}}, "batch_dims"),
    ],
)
def test_where_it_cannot_be_had_that_is_said(given, why):
    f, h0 = Net(), torch.ones(4, 2, dtype=F64)
    with pytest.raises(errors.BadOption, match=why):
        gradient(f, h0, [0.0, 1.0], engine="julia", adjoint="checkpointed", **given)
    found, _ = gradient(f, h0, [0.0, 1.0], engine="auto", adjoint="checkpointed", rtol=1e-9, atol=1e-9, **given)
    right, _ = gradient(f, h0, [0.0, 1.0], engine="torch", adjoint="discrete", rtol=1e-9, atol=1e-9, **given)
    assert apart(found, right) < 1e-6
