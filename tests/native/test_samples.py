"""Independent systems in a batch, each with steps, times and events of its own: as if each were solved alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyjlode
from pyjlode import errors, odeint, odeint_event, solve
from pyjlode.native.samples import OWN_STEPS

F64 = torch.float64
OWN = {"batch_dims": 1}
T = torch.tensor([0.0, 0.4, 1.1, 2.0], dtype=F64)
MU = torch.tensor([0.5, 3.0, 12.0], dtype=F64)
H0 = torch.tensor([[2.0, 0.0], [1.0, -0.5], [0.3, 1.0]], dtype=F64)
ROWS = torch.tensor([[0.0, 0.3, 1.0, 2.0], [0.5, 0.7, 0.9, 0.9], [-0.2, 0.1, 1.4, 1.5]], dtype=F64)


def van_der_pol(t, h, mu):
    """Forced, so that it depends on t; t and h[..., 0] of the same shape, or t 0-d."""
    return torch.stack([h[..., 1], mu * (1 - h[..., 0] ** 2) * h[..., 1] - h[..., 0] + torch.sin(3 * t)], -1)


class Field(nn.Module):
    """Holds a tensor with a part for each system."""

    def __init__(self, mu=MU):
        super().__init__()
        self.mu = nn.Parameter(mu.clone())

    def forward(self, t, h):
        return van_der_pol(t, h, self.mu)


def alone(mu, h0, rows, **kwargs):
    """The states of each system solved by itself, (T, B, ...), as a list of solutions, rows cut off where they end."""
    found = []
    for i in range(len(h0)):
        row = rows[i] if rows.ndim > 1 else rows
        n = int((row == row[-1]).nonzero()[0, 0]) + 1
        found.append(solve(lambda t, h, m=mu[i]: van_der_pol(t, h, m), h0[i], row[:n], dense=False, **kwargs))
    return found


def padded(solutions, n):
    return torch.stack([torch.cat([s.h, s.h[-1:].expand(n - len(s.h), *s.h.shape[1:])]) for s in solutions], 1)


# --- Steps and states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [T, ROWS, T.flip(0), -ROWS], ids=["shared", "rows", "backward", "rows backward"])
@pytest.mark.parametrize("method", OWN_STEPS)
def test_each_is_solved_as_if_alone(method, t):
    kwargs = {"method": method, "rtol": 1e-5, "atol": 1e-7}
    with torch.no_grad():
        together = solve(Field(), H0, t, options=OWN, dense=False, **kwargs)
    each = alone(MU, H0, t, **kwargs)
    torch.testing.assert_close(together.h, padded(each, 4), rtol=1e-7, atol=1e-9)
    counts = together.stats.systems
    assert counts.naccept.tolist() == [s.stats.naccept for s in each]
    assert counts.nreject.tolist() == [s.stats.nreject for s in each]
    assert not counts.failed.any()
    assert together.stats.naccept == sum(s.stats.naccept for s in each)
    # One call for all of them: as many as the hardest needs.
    assert together.stats.nfe < 1.3 * max(s.stats.nfe for s in each) + 40


# --- Gradients --------------------------------------------------------------------------------------------------------


def gradients(f, h0, t, weights, inputs, **kwargs):
    h = odeint(f, h0, t, rtol=1e-7, atol=1e-9, **kwargs)
    return torch.autograd.grad((h * weights).sum(), inputs)


@pytest.mark.parametrize("t", [T, ROWS, -ROWS], ids=["shared", "rows", "rows backward"])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "vern7"])
def test_gradients_are_those_of_each_alone(method, adjoint, t):
    torch.manual_seed(0)
    weights = torch.randn(4, 3, 2, dtype=F64)
    field, h0, t = Field(), H0.clone().requires_grad_(), t.clone().requires_grad_()
    got = gradients(field, h0, t, weights, (h0, field.mu, t), adjoint=adjoint, method=method, options=OWN)
    want = [torch.zeros_like(h0), torch.zeros_like(field.mu), torch.zeros_like(t)]
    for i in range(3):
        row = (t[i] if t.ndim > 1 else t).detach()
        n = int((row == row[-1]).nonzero()[0, 0]) + 1
        row, start, mu = row[:n].clone().requires_grad_(), H0[i].clone().requires_grad_(), MU[i].clone().requires_grad_()
        w = torch.cat([weights[: n - 1, i], weights[n - 1 :, i].sum(0, keepdim=True)])
        each = gradients(lambda t, h, m=mu: van_der_pol(t, h, m), start, row, w, (start, mu, row), adjoint=adjoint, method=method)
        want[0][i], want[1][i] = each[0], each[1]
        if t.ndim > 1:
            want[2][i, :n] = each[2]
        else:
            want[2] += each[2]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
