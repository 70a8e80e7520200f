"""Flow matching: the field that it learns carries the base to the data, with the density of the data."""

import math

import pytest
import torch
from torch import nn

from pyjlode import errors
from pyjlode.nn import CNF, TimeMLP


class Gaussian(nn.Module):
    """The straight flow from a standard normal to N(m, s²): h = (1 - t) z + t (m + s z), for t of any shape."""

    def __init__(self, m, s):
        super().__init__()
        self.m, self.s = nn.Parameter(torch.tensor(m)), nn.Parameter(torch.tensor(s))

    def forward(self, t, h):
        return self.m + (self.s - 1) * (h - t * self.m) / (1 - t + t * self.s)


@pytest.mark.parametrize("coupling", ["ot", "independent"])
def test_a_gaussian_is_learned(coupling):
    torch.manual_seed(0)
    flow = CNF(TimeMLP([2, 32, 32, 2]), 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in range(300):
        x = torch.tensor([1.0, -2.0]) + 0.5 * torch.randn(256, 2)
        optimizer.zero_grad()
        flow.matching_loss(x, coupling=coupling).backward()
        optimizer.step()
    made = flow.sample(2000)
    assert float((made.mean(0) - torch.tensor([1.0, -2.0])).abs().max()) < 0.15
    assert float((made.std(0) - 0.5).abs().max()) < 0.1
    x = torch.tensor([1.0, -2.0]) + 0.5 * torch.randn(500, 2)
    entropy = 1 + math.log(2 * math.pi) + 2 * math.log(0.5)
    assert -flow.log_prob(x).mean().item() == pytest.approx(entropy, abs=0.15)


def test_optimal_pairs_have_the_field_of_the_optimal_map():
    """Of Gaussians it is h = (1 - t) z + t (m + s z): the loss of that field is nearly zero with optimal pairs, and not
    with random ones."""
    torch.manual_seed(0)
    flow = CNF(Gaussian(3.0, 0.5), 1)
    x = 3 + 0.5 * torch.randn(600, 1)
    assert flow.matching_loss(x).item() < 0.03
    assert flow.matching_loss(x, coupling="independent").item() > 0.2


@pytest.mark.parametrize("of_rows", [True, False], ids=["broadcasts", "0-d t"])
def test_every_row_has_its_own_time(of_rows):
    """A field that needs a 0-d t gives the loss that one of broadcasting times does."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()

    def f(t, h):
        t = t.expand(*h.shape[:-1], 1) if t.dim() == 0 or of_rows else t[0, 0, 0]  # else IndexError
        return net(torch.cat([h, t], -1))

    x = torch.randn(50, 2, dtype=torch.float64)
    flow = CNF(f, torch.distributions.Normal(torch.zeros(2).double(), 1.0))
    torch.manual_seed(1)
    loss = flow.matching_loss(x, coupling="independent")
    torch.manual_seed(1)
    z = flow.base.sample((50,))
    s = torch.rand(50, 1, dtype=torch.float64)
    h = z + s * (x - z)
    right = (net(torch.cat([h, s], -1)) - (x - z)).square().mean()
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(
        torch.autograd.grad(loss, net.weight, retain_graph=True)[0], torch.autograd.grad(right, net.weight)[0]
    )


def test_times_other_than_one():
    torch.manual_seed(0)
    flow = CNF(TimeMLP([1, 16, 1]), 1, t=(0.0, 4.0))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        flow.matching_loss(2 + 0.3 * torch.randn(128, 1)).backward()
        optimizer.step()
    assert float(flow.sample(1000).mean()) == pytest.approx(2, abs=0.1)


def test_bad_input_is_told():
    flow = CNF(TimeMLP([2, 8, 2]), 2)
    with pytest.raises(errors.BadShape, match=r"shape \(B, 2\)"):
        flow.matching_loss(torch.ones(3))
    with pytest.raises(errors.BadOption, match="coupling must be"):
        flow.matching_loss(torch.ones(3, 2), coupling="best")
