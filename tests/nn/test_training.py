"""Training aids: pieces are solved as they would be one by one, and slopes are those of the curve."""

import pytest
import torch

from pyjlode import errors, odeint
from pyjlode.nn import collocate, gradient_matching, multiple_shooting

F64 = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


class Field(torch.nn.Module):
    """Not autonomous, so that a piece at a wrong time is another one."""

    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(torch.tensor([[-0.3, 1.2], [-0.9, 0.1]], dtype=F64))

    def forward(self, t, h):
        return torch.tanh(h @ self.A) + torch.cos(2 * t)


def one_by_one(f, starts, t, length):
    """(states, gaps), by a loop."""
    states, ends = [], []
    for i, start in enumerate(starts):
        h = odeint(f, start, t[i * length : (i + 1) * length + 1], **TIGHT)
        states.append(h[:-1] if i + 1 < len(starts) else h)
        ends.append(h[-1])
    return torch.cat(states), torch.stack(ends)[:-1] - starts[1:]


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 20])
@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=str)
def test_pieces_are_those_of_a_loop(length, shape, adjoint):
    torch.manual_seed(0)
    t = torch.rand(13, dtype=F64).cumsum(0).flip(0) * (-1 if length == 4 else 1)
    f = Field()
    starts = torch.randn(-(-12 // length), *shape, dtype=F64, requires_grad=True)
    w = torch.randn(13, *shape, dtype=F64)
    found = multiple_shooting(f, starts, t, length, adjoint=adjoint, **TIGHT)
    right = one_by_one(f, starts, t, length)
    by = []
    for h, gaps in (found, right):
        assert (h.shape, gaps.shape) == ((13, *shape), (len(starts) - 1, *shape))
        by.append(torch.autograd.grad((w * h).sum() + gaps.square().sum(), [starts, f.A]))
    torch.testing.assert_close(found.h, right[0], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.gaps, right[1], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(by[0], by[1], rtol=1e-6, atol=1e-7)


def test_pieces_of_one_solution_have_no_gaps():
    t = torch.linspace(0, 5, 21, dtype=F64)
    f = Field()
    h = odeint(f, torch.tensor([1.0, 0.0], dtype=F64), t, **TIGHT).detach()
    found = multiple_shooting(f, h[:-1:6], t, 6, **TIGHT)
    torch.testing.assert_close(found.h, h, rtol=1e-7, atol=1e-8)
    assert float(found.gaps.detach().abs().max()) < 1e-7


def test_a_parabola_is_exact():
    t = torch.tensor([0.0, 0.1, 0.5, 0.6, 1.1, 1.2, 1.6], dtype=F64)
    a, b, c = torch.randn(3, 4, 2, dtype=F64)
    s = t[:, None, None]
    h, dh = collocate(a + b * s + c * s**2, t, 1.2)
    torch.testing.assert_close(h, a + b * s + c * s**2)
    torch.testing.assert_close(dh, b + 2 * c * s)


def test_slopes_are_of_second_order_in_the_width():
    t = torch.linspace(0, 6, 601, dtype=F64)
    worst = [float((collocate(t.sin()[:, None], t, w)[1][:, 0] - t.cos())[150:450].abs().max()) for w in (0.4, 0.2)]
    assert worst[0] / worst[1] == pytest.approx(4, rel=0.05)


def test_noise_is_averaged():
    torch.manual_seed(0)
    t = torch.linspace(0, 6, 601, dtype=F64)
    x = t.sin() + 0.1 * torch.randn_like(t)
    h, dh = collocate(x, t, 0.6)
    assert float((h - t.sin()).square().mean().sqrt()) < 0.02
    assert float((dh - t.cos()).square().mean().sqrt()) < 0.1  # finite differences: 7


@pytest.mark.parametrize("one_time", [False, True], ids=["broadcasts", "0-d t"])
@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=str)
def test_matching_is_that_of_a_loop(one_time, shape):
    torch.manual_seed(0)
    field = Field()

    def f(t, h):
        return field(t if not one_time or t.dim() == 0 else t[(0,) * t.dim()], h)

    t, h, dh = torch.rand(7, dtype=F64), torch.randn(7, *shape, dtype=F64), torch.randn(7, *shape, dtype=F64)
    right = torch.stack([field(s, x) - dx for s, x, dx in zip(t, h, dh)]).square().mean()
    found = gradient_matching(f, t, h, dh)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, field.A), torch.autograd.grad(right, field.A))


def test_bad_input_is_told():
    f, t, x = Field(), torch.linspace(0, 1, 6), torch.zeros(6, 2)
    with pytest.raises(errors.BadShape, match=r"need 3 starts, x\[:-1:2\]"):
        multiple_shooting(f, x[:-1:3], t, 2)
    with pytest.raises(errors.BadOption, match="at least one interval"):
        multiple_shooting(f, x, t, 0)
    with pytest.raises(errors.BadShape, match=r"t of shape \(T,\)"):
        multiple_shooting(f, x[:-1], t[:, None], 1)
    with pytest.raises(errors.BadOption, match="take a larger one"):
        collocate(x, t, 0.1)
    with pytest.raises(errors.BadOption, match="must be positive"):
        collocate(x, t, 0.0)
    with pytest.raises(errors.BadShape, match="collocate takes x"):
        collocate(x, t[1:], 1.0)
    with pytest.raises(errors.BadShape, match="h and dh of one shape"):
        gradient_matching(f, t, x, x[:, :1])
