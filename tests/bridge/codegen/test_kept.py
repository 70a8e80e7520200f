"""Compiled networks keep what their products need: the gradient is that of a field that computes it again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyjlode import solve

pytestmark = pytest.mark.usefixtures("julia")
F64 = torch.float64


def network(*sizes, activation=nn.Tanh):
    torch.manual_seed(0)
    layers = [x for a, b in zip(sizes, sizes[1:]) for x in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


class Time(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network(4, 30, 3, activation=nn.Softplus)

    def forward(self, t, h):
        return self.net(torch.cat([h, t.expand(len(h), 1)], 1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = network(3, 40), nn.LayerNorm(40), network(40, 3)

    def forward(self, t, h):
        z = self.first(h)
        return self.last(F.silu(self.norm(z)) * torch.sigmoid(z)) - h**3 * torch.cos(t)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, t, h):
        return self.inner(h[None], h[None], h[None], need_weights=False)[0][0] - h


FIELDS = {
    "wide": lambda: network(3, 50, 50, 3),
    "relu": lambda: network(3, 33, 3, activation=nn.ReLU),
    "time": Time,
    "residual": Residual,
    "attention": Attention,
    "cells": lambda: nn.GRUCell(3, 3),
}


def run(f, h0, t, **how):
    field = f
    if isinstance(f, nn.Sequential):
        field = lambda t, h: f(h)  # noqa: E731
    if isinstance(f, nn.GRUCell):
        field = lambda t, h: f(torch.ones_like(h), h) - h  # noqa: E731
    return solve(field, h0, t, adjoint=True, dense=False, **how)


def gradients(solution, wrt, **how):
    weight = torch.linspace(1.0, 2.0, solution.h.numel(), dtype=solution.h.dtype).reshape(solution.h.shape)
    return torch.autograd.grad((solution.h * weight).sum(), wrt, **how)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("points", [2, 9], ids=["ends", "inside"])
@pytest.mark.parametrize("name", FIELDS)
def test_gradients_are_the_native_engines(name, points, dtype):
    f = FIELDS[name]().to(dtype)
    torch.manual_seed(1)
    h0, t = torch.randn(7, 3, dtype=dtype, requires_grad=True), torch.linspace(0, 1, points, dtype=dtype)
    wrt, near = (h0, *f.parameters()), 1e-10 if dtype == F64 else 1e-5
    # The same steps, of which the gradients are the same.
    how = {"method": "dopri5", "rtol": 1e6, "atol": 1e6, "options": {"first_step": 0.05, "max_step": 0.05}}
    ours = run(f, h0, t, engine="julia", compile=True, **how)
    assert ours.stats.compiled == "array"
    want = gradients(run(f, h0, t, engine="torch", **how), wrt)
    for _ in range(2):  # the second pass finds what the first left
        got = gradients(ours, wrt, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=10 * near, atol=100 * near)


@pytest.mark.parametrize("method", ["tsit5", "vern7", "bosh3"])
def test_more_steps_than_are_kept(method):
    """Of the last steps everything is computed again: nothing that is kept may have more than 64 MB."""
    f = network(3, 60, 60, 3).to(F64)
    torch.manual_seed(1)
    h0, t = torch.randn(20, 3, dtype=F64, requires_grad=True), torch.tensor([0.0, 1.0], dtype=F64)
    wrt, how = (h0, *f.parameters()), {"method": method, "rtol": 1e-3, "engine": "julia", "compile": True}
    few, many = (run(f, h0, t, options={"max_step": step, "first_step": step}, **how) for step in (1 / 20, 1 / 1500))
    assert many.stats.naccept >= 1500
    torch.testing.assert_close(gradients(many, wrt), gradients(few, wrt), rtol=1e-4, atol=1e-4)


def test_solves_at_once():
    """Each keeps its own, in whichever order they are pulled back, and whatever was solved in between."""
    f = network(3, 40, 3).to(F64)
    h0, t = torch.ones(5, 3, dtype=F64, requires_grad=True), torch.tensor([0.0, 1.0], dtype=F64)
    wrt, how = (h0, *f.parameters()), {"engine": "julia", "compile": True, "rtol": 1e-8}
    spans = [1.0, 0.3, 2.0, 1.5]
    want = [gradients(run(f, h0, t * span, **how), wrt) for span in spans]
    alive = [run(f, h0, t * span, **how) for span in spans]
    got = [gradients(alive[i], wrt) for i in (2, 0, 3)]
    del alive[2:]
    between = run(f, h0, t * 0.7, **how)
    got.append(gradients(alive[1], wrt))
    gradients(between, wrt)
    torch.testing.assert_close(got, [want[i] for i in (2, 0, 3, 1)], rtol=0, atol=0)


def test_loops_of_training_use_the_memory_again():
    f = network(3, 40, 3).to(F64)
    h0, t = torch.ones(5, 3, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    optimiser, losses = torch.optim.Adam(f.parameters(), 1e-2), []
    for _ in range(30):
        optimiser.zero_grad()
        loss = run(f, h0, t, engine="julia", compile=True).h[-1].square().sum()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
