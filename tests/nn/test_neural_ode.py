"""`NeuralODE` is `odeint` as a layer: the same numbers, the same gradients, and a good module."""

import copy
import pickle

import pytest
import torch
from problems import GENERAL
from torch import nn

import pyjlode
from pyjlode.errors import BadTime
from pyjlode.nn import NeuralODE

F64 = torch.float64
TIMES = (0.0, 0.4, 1.0)
TOL = {"rtol": 1e-6, "atol": 1e-8}


class Net(nn.Module):
    """h' = tanh(W h + b), of a class that pickle can find."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=dtype)

    def forward(self, t, h):
        return torch.tanh(self.linear(h))


def growth(t, h):
    return h


def state(dtype=F64):
    return torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.0, 1.0]], dtype=dtype)


def reference(net, h0, t=TIMES, **options):
    return pyjlode.odeint(net, h0, torch.tensor(t, dtype=F64), **{"adjoint": True, **TOL, **options})


# Results


@pytest.mark.parametrize("trajectory", [False, True])
def test_output_is_the_last_state_or_the_trajectory(trajectory):
    net, h0 = Net(), state()
    h = NeuralODE(net, TIMES, return_trajectory=trajectory, **TOL)(h0)
    expected = reference(net, h0)
    assert torch.equal(h, expected if trajectory else expected[-1])


def test_without_times_the_span_is_0_to_1():
    h = NeuralODE(growth, **TOL)(torch.ones(1, dtype=F64))
    assert float(h) == pytest.approx(torch.e, rel=1e-6)


def test_times_of_one_call_go_before_those_of_the_layer():
    layer = NeuralODE(growth, TIMES, **TOL)
    one = torch.ones(1, dtype=F64)
    assert float(layer(one, [0.0, -2.0])) == pytest.approx(torch.e**-2, rel=1e-6)
    assert float(layer(one)) == pytest.approx(torch.e, rel=1e-6)


def test_there_and_back_is_the_identity():
    net, h0 = Net(), state()
    there = NeuralODE(net, (0.0, 1.0), rtol=1e-10, atol=1e-12)
    assert torch.allclose(there(there(h0), [1.0, 0.0]), h0, rtol=1e-8, atol=1e-9)


def test_tuple_and_dict_states_come_back_in_their_structure():
    def f(t, h):
        return {"a": h["b"][0], "b": (-h["a"], torch.zeros_like(h["b"][1]))}

    h0 = {"a": torch.zeros(2, dtype=F64), "b": (torch.ones(2, dtype=F64), torch.ones(1, 3, dtype=F64))}
    last = NeuralODE(f, (0.0, 1.5), **TOL)(h0)
    assert torch.allclose(last["a"], torch.full((2,), 1.5, dtype=F64).sin(), atol=1e-5)
    assert torch.allclose(last["b"][0], torch.full((2,), 1.5, dtype=F64).cos(), atol=1e-5)
    assert torch.equal(last["b"][1], h0["b"][1])
    whole = NeuralODE(f, TIMES, return_trajectory=True, **TOL)(h0)
    assert whole["a"].shape == (3, 2)
    assert whole["b"][1].shape == (3, 1, 3)


# Gradients


@pytest.mark.parametrize("adjoint", [None, False, *GENERAL], ids=str)
def test_gradients_are_those_of_odeint(adjoint):
    net = Net()
    chosen = {} if adjoint is None else {"adjoint": adjoint}
    h0 = state().requires_grad_()
    wanted = [h0, *net.parameters()]
    grads = torch.autograd.grad(NeuralODE(net, TIMES, **chosen, **TOL)(h0).square().sum(), wanted)
    expected = torch.autograd.grad(reference(net, h0, **chosen)[-1].square().sum(), wanted)
    for grad, e in zip(grads, expected):
        assert torch.equal(grad, e)


def test_gradient_of_the_times_given_to_forward_is_the_slope():
    net = Net()
    t = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    h = NeuralODE(net, rtol=1e-10, atol=1e-12)(state(), t)
    (grad,) = torch.autograd.grad(h.sum(), t)
    assert float(grad[1]) == pytest.approx(float(net(t[1], h).sum().detach()), rel=1e-6)


def test_training_brings_the_loss_down():
    net = Net()
    layer = NeuralODE(net, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = (layer(state()) - 0.5 * state()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# A good module


def test_parameters_and_state_dict_are_those_of_f():
    net = Net()
    layer = NeuralODE(net)
    assert list(layer.state_dict()) == ["f.linear.weight", "f.linear.bias"]
    assert {id(p) for p in layer.parameters()} == {id(p) for p in net.parameters()}
    assert list(NeuralODE(growth).state_dict()) == []


COPIES = {
    "state_dict": lambda layer: _loaded(layer),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


def _loaded(layer):
    other = NeuralODE(Net(), TIMES, **TOL)
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a backward pass"])
def test_a_copy_gives_the_same_and_is_its_own(way, used):
    layer, h0 = NeuralODE(Net(), TIMES, **TOL), state()
    if used:
        layer(h0).sum().backward()
    before = layer(h0)
    other = COPIES[way](layer)
    assert torch.equal(other(h0), before)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(layer(h0), before)
    assert torch.equal(other(h0), h0)


def test_double_and_to_change_the_precision_and_not_the_times():
    layer = NeuralODE(Net(torch.float32), (0.0, 0.1), rtol=1e-5, atol=1e-6)
    assert layer(state(torch.float32)).dtype == torch.float32
    assert layer.double()(state()).dtype == F64
    assert layer.to(torch.float32)(state(torch.float32)).dtype == torch.float32
    assert layer.t == (0.0, 0.1)


def test_train_and_eval_reach_f():
    layer = NeuralODE(nn.Dropout(0.5))
    assert not layer.eval().f.training
    assert layer.train().f.training


def test_repr_names_the_span_and_the_options():
    text = repr(NeuralODE(Net(), method="tsit5", rtol=1e-3))
    assert "t=(0.0, 1.0)" in text
    assert "method='tsit5'" in text
    assert "(linear): Linear" in text
    assert "of length 9" in repr(NeuralODE(growth, range(9)))


# Its account


def test_counters_are_the_calls_of_f():
    calls = 0

    def f(t, h):
        nonlocal calls
        calls += 1
        return -weight * h

    weight = nn.Parameter(torch.ones(2, dtype=F64))
    layer = NeuralODE(f, TIMES, adjoint="backsolve", **TOL)
    assert (layer.nfe, layer.nfe_backward, layer.stats) == (0, 0, None)
    h = layer(torch.ones(2, dtype=F64))
    assert layer.nfe == calls > 0
    assert layer.nfe_backward == 0
    h.sum().backward()
    assert layer.nfe_backward == calls - layer.nfe > 0
    assert layer.stats.wall_backward > 0


def test_counters_are_of_the_last_call_only():
    layer = NeuralODE(Net(), **TOL)
    layer(state())
    first = layer.nfe
    layer(state())
    assert layer.nfe == first


# What it refuses, and when


def test_a_misspelt_option_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match="rtoll"):
        NeuralODE(Net(), rtoll=1e-3)
    with pytest.raises(TypeError, match="dense"):
        NeuralODE(Net(), dense=True)


def test_times_that_require_grad_belong_to_forward():
    with pytest.raises(BadTime, match="forward"):
        NeuralODE(Net(), torch.tensor([0.0, 1.0], requires_grad=True))


def test_adjoint_params_may_be_an_iterator():
    net = Net()
    layer = NeuralODE(net, adjoint_params=net.parameters(), **TOL)
    for _ in range(2):  # an iterator that was used up would leave the second call without parameters
        net.zero_grad()
        layer(state()).sum().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())
