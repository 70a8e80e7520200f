"""Laws of the layer: what every `torch.nn.Module` can do, and what its augmentation is for."""

import copy
import pickle
import sys

import pytest
import torch
from problems import GENERAL
from torch import nn

import pyjlode
from pyjlode.errors import BadOption, BadShape
from pyjlode.nn import NeuralODE, TimeMLP

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def layer(**kwargs) -> NeuralODE:
    return NeuralODE(TimeMLP([2, 8, 2]), rtol=1e-5, atol=1e-6, **kwargs)


def test_is_the_solve():
    ode, h0, t = layer(), torch.randn(5, 2), torch.tensor([0.0, 0.3, 1.0])
    h = pyjlode.odeint(ode.f, h0, t, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ode(h0), h[-1])
    ode.return_trajectory = True
    torch.testing.assert_close(ode(h0, t), h)


@pytest.mark.parametrize("adjoint", [False, *GENERAL])
def test_counts_its_evaluations(adjoint):
    calls = 0
    net = TimeMLP([2, 8, 2])

    def f(t, h):
        nonlocal calls
        calls += 1
        return net(t, h)

    ode = NeuralODE(f, rtol=1e-4, atol=1e-4, adjoint=adjoint)
    assert (ode.nfe, ode.nfe_backward) == (0, 0)
    loss = ode(torch.randn(5, 2)).sum()
    assert ode.nfe == calls > 0
    loss.backward()
    assert ode.nfe_backward == calls - ode.nfe


def test_state_dict_carries_the_layer_over():
    a, b, h0 = layer(), layer(), torch.randn(5, 2)
    assert not torch.equal(a(h0), b(h0))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(h0), b(h0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copy_is_equal_and_apart(copied):
    ode, h0 = layer(augment=0), torch.randn(5, 2)
    ode(h0).sum().backward()  # the copy is taken in the midst of training
    other = copied(ode)
    assert torch.equal(ode(h0), other(h0))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(ode(h0), other(h0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adjoint", [False, *GENERAL])
def test_autocast_trains_in_low_precision(adjoint, device):
    """The field's layers run in bfloat16, in a backward pass that is begun outside of autocast, too; state and
    gradients stay in the precision of theirs."""
    ode, h0 = layer(adjoint=adjoint).to(device), torch.randn(64, 2, device=device)
    exact = torch.autograd.grad(ode(h0).square().mean(), list(ode.parameters()))
    seen = []
    ode.f.layers[0].linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast(device, dtype=torch.bfloat16):
        ode.solver_options.update(rtol=1e-2, atol=1e-2)
        out = ode(h0)
        loss = out.square().mean()
    assert out.dtype == h0.dtype
    rough = torch.autograd.grad(loss, list(ode.parameters()))
    assert set(seen) == {torch.bfloat16}
    assert len(seen) >= ode.nfe + ode.nfe_backward > 0
    assert all(g.dtype == p.dtype for g, p in zip(rough, ode.parameters()))
    a, b = (torch.cat([g.reshape(-1) for g in grads]) for grads in (exact, rough))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


@pytest.mark.parametrize("device", DEVICES)
def test_moves_with_its_device_and_dtype(device):
    ode = layer().to(device, torch.float64)
    out = ode(torch.randn(5, 2, dtype=torch.float64, device=device))
    out.sum().backward()
    assert (out.device.type, out.dtype) == (device, torch.float64)
    assert all(p.grad is not None for p in ode.parameters())


# Fixed steps are the same for any rows; adaptive ones are chosen for those of one process, within the tolerance.
DISTRIBUTED = {
    "rk4": ({"method": "rk4", "options": {"step_size": 0.1}}, {"rtol": 1e-12, "atol": 1e-14}),
    "dopri5": ({"rtol": 1e-9, "atol": 1e-11}, {"rtol": 1e-6, "atol": 1e-8}),
}


def for_two(method):
    """A layer and a batch, the same in every process."""
    torch.manual_seed(3)
    return NeuralODE(TimeMLP([2, 8, 2]).double(), adjoint=True, **DISTRIBUTED[method][0]), torch.randn(6, 2).double()


def process_of_two(rank, folder, method):
    """Half of the batch through DDP, twice: what was kept of the first backward pass must not stand in the second's
    way. Leaves the gradients behind."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ode, h0 = for_two(method)
    shared = nn.parallel.DistributedDataParallel(ode)
    for _ in range(2):
        shared.zero_grad()
        shared(h0[3 * rank : 3 * rank + 3]).square().mean().backward()
    torch.save([p.grad for p in ode.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", DISTRIBUTED)
def test_two_processes_have_the_gradient_of_the_whole_batch(method, tmp_path, monkeypatch):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    if sys.platform == "linux":  # whatever the name of this host resolves to
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(process_of_two, (str(tmp_path), method), nprocs=2)
    ode, h0 = for_two(method)
    wanted = torch.autograd.grad(ode(h0).square().mean(), list(ode.parameters()))
    half = torch.autograd.grad(ode(h0[:3]).square().mean(), list(ode.parameters()))
    for rank in range(2):
        for found, g, h in zip(torch.load(tmp_path / f"{rank}.pt"), wanted, half):
            torch.testing.assert_close(found, g, **DISTRIBUTED[method][1])
            assert not torch.allclose(found, h, rtol=1e-3)


def test_augmented_state_is_the_padded_one():
    f, h0 = TimeMLP([5, 8, 5]), torch.randn(4, 2)
    options = {"rtol": 1e-5, "atol": 1e-6}
    augmented = NeuralODE(f, augment=3, **options)(h0)
    assert augmented.shape == (4, 5)
    torch.testing.assert_close(augmented, NeuralODE(f, **options)(torch.cat([h0, torch.zeros(4, 3)], -1)))


def test_only_an_augmented_ode_swaps_two_points_of_the_line():
    """Dupont, Doucet & Teh 2019, proposition 1: paths on a line cannot cross, so that -1 -> 1, 1 -> -1 is beyond any
    field on it; in the plane half a turn does it."""
    h0 = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    turn = torch.tensor([[0.0, -torch.pi], [torch.pi, 0.0]], dtype=torch.float64)
    swapped = NeuralODE(lambda t, h: h @ turn.T, augment=1)(h0)[:, :1]
    torch.testing.assert_close(swapped, -h0, rtol=1e-5, atol=1e-5)
    for seed in range(5):
        torch.manual_seed(seed)
        low, high = NeuralODE(TimeMLP([1, 16, 1]).double())(h0)
        assert low < high


def test_what_cannot_be_augmented_is_named():
    with pytest.raises(BadOption, match="augment"):
        NeuralODE(TimeMLP([2, 2]), augment=-1)
    with pytest.raises(BadShape, match="tuple"):
        NeuralODE(TimeMLP([2, 2]), augment=1)((torch.zeros(2), torch.zeros(2)))
    with pytest.raises(BadShape, match="scalar"):
        NeuralODE(TimeMLP([2, 2]), augment=1)(torch.zeros(()))
