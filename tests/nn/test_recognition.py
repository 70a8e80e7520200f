"""Laws of the recognition networks: what is masked is not seen, and hidden states follow their ODE between
observations."""

import pytest
import torch

from pyjlode.nn import ODERNN, ConcatSquash, GRURecognition, TimeMLP

B, T, D, H, Z = 4, 6, 2, 5, 3
F64 = torch.float64


def network(kind: str):
    if kind == "gru":
        return GRURecognition(D, H, Z).double()
    return ODERNN(D, H, Z, TimeMLP([H, 8, H], layer=ConcatSquash)).double()


def data():
    x, t = torch.randn(B, T, D, dtype=F64), torch.rand(B, T, dtype=F64).sort(-1).values
    mask = torch.rand(B, T, D) < 0.6
    mask[:, 0] = True
    return x, t, mask


def same(a, b):
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.stddev, b.stddev)


both = pytest.mark.parametrize("kind", ["gru", "ode-rnn"])


@both
def test_what_is_masked_is_not_seen(kind):
    net, (x, t, mask) = network(kind), data()
    same(net(x, t, mask), net(torch.where(mask, x, float("nan")), t, mask))


@both
def test_rows_without_observations_change_nothing(kind):
    """Neither at the end, where short series are filled up, nor in the midst."""
    net, (x, t, mask) = network(kind), data()
    nothing = torch.zeros(B, 1, D, dtype=torch.bool)
    longer = [torch.cat([a, b], 1) for a, b in ((x, x[:, :1]), (t, t[:, -1:] + 2), (mask, nothing))]
    same(net(x, t, mask), net(*longer))
    middle = (t[:, 2:3] + t[:, 3:4]) / 2
    between = [torch.cat([a[:, :3], b, a[:, 3:]], 1) for a, b in ((x, x[:, :1]), (t, middle), (mask, nothing))]
    same(net(x, t, mask), net(*between))


@both
def test_series_do_not_see_each_other(kind):
    net, (x, t, mask) = network(kind), data()
    whole = net(x, t, mask)
    for i in range(B):
        alone = net(x[i : i + 1], t[i], mask[i : i + 1])
        torch.testing.assert_close(alone.mean[0], whole.mean[i])


@both
def test_the_times_matter(kind):
    net, (x, t, mask) = network(kind), data()
    assert not torch.allclose(net(x, t, mask).mean, net(x, t**2, mask).mean)


def test_hidden_state_follows_the_ode_over_the_gap():
    """One observation at t1 and h' = -k h: the hidden state at t0 is exp(-k (t1 - t0)) times the cell's."""
    net = ODERNN(D, H, Z, lambda t, h: -0.8 * h, method="dopri5", rtol=1e-9, atol=1e-9).double()
    x, t = torch.randn(B, 1, D, dtype=F64), torch.rand(B, 1, dtype=F64) + 0.5
    cell = net.cell(torch.cat([x[:, 0], torch.ones_like(x[:, 0])], -1))
    found = net(x, t, None, 0.2).mean
    torch.testing.assert_close(found, net.head(cell * torch.exp(-0.8 * (t - 0.2)))[:, :Z])


def test_ode_rnn_is_moved_in_time_with_its_series():
    net, (x, t, mask) = network("ode-rnn"), data()
    same(net(x, t, mask, 0.0), net(x, t + 3, mask, 3.0))


@pytest.mark.parametrize("adjoint", ["discrete", "backsolve"])
def test_each_gap_is_met_again_in_the_backward_pass(adjoint):
    """A gradient by replay, with a gap of its own in each of the solves, is that of the plain graph."""
    net, (x, t, mask) = network("ode-rnn"), data()
    net.solver_options = {"rtol": 1e-8, "atol": 1e-8}

    def gradient(adjoint):
        net.solver_options["adjoint"] = adjoint
        return torch.autograd.grad(net(x, t, mask).mean.square().sum(), list(net.cell.parameters()))

    for a, b in zip(gradient(False), gradient(adjoint)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
