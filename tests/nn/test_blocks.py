"""Laws of the layers of vector fields, and of the residual block that a neural ODE is the limit of."""

import pytest
import torch

from pyjlode.nn import ConcatLinear, ConcatSquash, NeuralODE, ResNetBlock, TimeMLP

LAYERS = [ConcatLinear, ConcatSquash]


def test_concat_linear_is_a_linear_layer_of_time_and_state():
    layer, t, h = ConcatLinear(3, 5), torch.tensor(0.7), torch.randn(4, 2, 3)
    beside = torch.cat([t.expand(4, 2, 1), h], -1)
    torch.testing.assert_close(layer(t, h), layer.linear(beside))


def test_concat_squash_is_ffjord_s_formula():
    layer, t, h = ConcatSquash(3, 5), 0.7, torch.randn(4, 3)
    W, b = layer.linear.weight, layer.linear.bias
    gate = torch.sigmoid(layer.gate.weight[:, 0] * t + layer.gate.bias)
    wanted = (h @ W.T + b) * gate + layer.shift.weight[:, 0] * t
    torch.testing.assert_close(layer(torch.tensor(t), h), wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_do_not_see_each_other(layer):
    f, t, h = TimeMLP([3, 8, 3], layer=layer), torch.tensor(0.3), torch.randn(6, 3)
    torch.testing.assert_close(f(t, h), torch.stack([f(t, row) for row in h]))


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_may_have_times_of_their_own(layer):
    f, t, h = TimeMLP([3, 8, 3], layer=layer), torch.randn(2, 5, 1), torch.randn(2, 5, 3)
    each = [f(time[0], row) for time, row in zip(t.flatten(0, 1), h.flatten(0, 1))]
    torch.testing.assert_close(f(t, h), torch.stack(each).view(2, 5, 3))


@pytest.mark.parametrize("layer", LAYERS)
def test_field_depends_on_time(layer):
    f, h = TimeMLP([3, 8, 3], layer=layer), torch.randn(6, 3)
    assert not torch.allclose(f(torch.tensor(0.0), h), f(torch.tensor(1.0), h))


def test_resnet_block_is_an_euler_step_of_length_one():
    f, h = TimeMLP([3, 8, 3]), torch.randn(6, 3)
    torch.testing.assert_close(ResNetBlock(f)(h), NeuralODE(f, method="euler")(h))


def test_stack_of_short_resnet_blocks_tends_to_the_neural_ode():
    """At the first order of Euler's method."""
    f, h = TimeMLP([3, 8, 3]).double(), torch.randn(6, 3, dtype=torch.float64)
    limit = NeuralODE(f)(h)

    def distance(n: int) -> float:
        x = h
        for i in range(n):
            x = ResNetBlock(lambda t, h: f(t, h) / n, t=i / n)(x)
        return float((x - limit).detach().abs().max())

    assert distance(40) / distance(80) == pytest.approx(2, rel=0.1)
