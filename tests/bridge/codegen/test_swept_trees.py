"""Sweeps of systems whose state is several tensors: each as if alone, with gradients, events and dense output."""

import pytest
import torch

from pyjlode import odeint, odeint_event, solve
from pyjlode.errors import BadOption

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
BATCH = {"batch_dims": 1}
SWEEP = {"engine": "julia", "compile": True, "options": BATCH}
NATIVE = {"engine": "torch", "options": BATCH}
T = torch.tensor([0.0, 0.3, 0.75, 1.5], dtype=F64)
N = 11


def draws(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=F64)


def pendulums(w, shared, structure):
    """A pendulum and two integrals along it, as a tuple or a dictionary."""

    def f(t, state):
        x = state["x"] if structure is dict else state[0]
        time = t.reshape(-1, 1) if t.dim() else t  # (B, 1, 1) or one for all
        force = torch.stack([x[:, 1], -w * torch.sin(x[:, 0]) - shared[0] * x[:, 1]], 1)
        along = torch.stack([x.square().sum(-1), x[:, 0]], -1)[..., None] * torch.cos(shared[1] * time)[..., None]
        return {"x": force, "s": along} if structure is dict else (force, along)

    return f


def start(structure):
    x, s = draws(N, 2) * 2, draws(N, 2, 1)
    return {"x": x, "s": s} if structure is dict else (x, s)


def leaves(h):
    return list(h.values()) if isinstance(h, dict) else list(h)


@pytest.mark.parametrize(("method", "structure"), [("tsit5", dict), ("dopri8", tuple), ("rodas5p", tuple)])
@pytest.mark.parametrize("own", [False, True])
def test_states_and_gradients_are_those_of_the_native_engine(method, structure, own):
    found = []
    for how in (SWEEP, NATIVE):
        w, shared, state = draws(N) + 0.5, torch.tensor([0.2, 3.0], dtype=F64), start(structure)
        inputs = [x.requires_grad_() for x in (w, shared, *leaves(state))]
        t = [0.1 * i + T[: 2 + i % 3] for i in range(N)] if own else T
        kwargs = {"method": method, "rtol": 1e-8, "atol": 1e-9, "adjoint": True, "dense": False, **how}
        solution = solve(pendulums(w, shared, structure), state, t, **kwargs)
        assert type(solution.h) is structure
        loss = sum((h.sin() * torch.linspace(1, 2, h.numel(), dtype=F64).view_as(h)).sum() for h in leaves(solution.h))
        found.append([*(h.detach() for h in leaves(solution.h)), *torch.autograd.grad(loss, inputs)])
        assert solution.stats.compiled == ("scalar" if how is SWEEP else "")
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rosenbrock23"])
def test_the_error_of_a_system_is_the_largest_of_its_tensors(method):
    """Fifteen numbers that are at rest do not hide the error of the one beside them."""
    rate, z = 1 + 30 * draws(N), draws(N, 1)

    def steps(y):
        def f(t, state):
            return -state[0], -rate[:, None] * state[1]

        kwargs = {"method": method, "rtol": 1e-6, "atol": 1e-9, "dense": False, **SWEEP}
        return solve(f, (y, z), T, **kwargs).stats.systems.naccept

    both = steps(torch.zeros(N, 15, dtype=F64))
    assert torch.equal(both, steps(torch.zeros(N, 0, dtype=F64)))
    assert int(both.max()) > 1.2 * int(both.min())


def test_events_and_dense_output():
    w, shared, state = draws(N) + 0.5, torch.tensor([0.2, 3.0], dtype=F64), start(tuple)
    f = pendulums(w, shared, tuple)
    kwargs = {"method": "tsit5", "rtol": 1e-9, "atol": 1e-9}

    def falls(t, h):
        return h[0][:, 0] - 0.25 * h[1][:, 1, 0]

    w.requires_grad_()
    found = []
    for how in (SWEEP, NATIVE):
        times, (x, s) = odeint_event(
            f, state, T[0], event_fn=falls, adjoint=True, odeint_interface=odeint, **kwargs, **how
        )
        (by_w,) = torch.autograd.grad(times.sum() + x[-1].square().sum() + s[-1].sum(), w)
        found.append((times.detach(), x[-1].detach(), s[-1].detach(), by_w))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        swept, native = (solve(f, state, T, dense=True, **kwargs, **how) for how in (SWEEP, NATIVE))
        at = torch.tensor([0.1, 0.9, 1.2], dtype=F64)
        for got, want in zip(swept.interpolate(at), native.interpolate(at)):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_a_state_of_several_tensors_is_solved_again_as_a_sweep(monkeypatch):
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")
    f = pendulums(draws(N) + 0.5, torch.tensor([0.2, 3.0], dtype=F64), tuple)
    solutions = [solve(f, start(tuple), T, options=BATCH, dense=False) for _ in range(3)]
    assert [s.stats.engine for s in solutions] == ["torch", "julia", "julia"]
    # A batch with common steps is of other code: there the numbers of the systems lie in another order.
    common = odeint(f, start(tuple), T, engine="julia", compile=True, rtol=1e-9, atol=1e-9)
    for got, want in zip(solutions[-1].h, common):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_each_tensor_has_tolerances_of_its_own(monkeypatch):
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")
    f = pendulums(draws(N) + 0.5, torch.tensor([0.2, 3.0], dtype=F64), tuple)
    how = {"atol": (1e-9, 1e-6), "options": BATCH, "dense": False}
    _, swept = (solve(f, start(tuple), T, **how) for _ in range(2))
    assert swept.stats.engine == "julia"
    native = solve(f, start(tuple), T, **how, engine="torch")
    for got, want in zip(swept.h, native.h):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    loose = solve(f, start(tuple), T, **{**how, "atol": (1e-6, 1e-6)})
    assert bool((loose.stats.systems.naccept < swept.stats.systems.naccept).any())
    with pytest.raises(BadOption, match="takes one rtol and one atol for all with 'bdf'"):
        solve(f, start(tuple), T, **how, method="bdf", engine="julia", compile=True)
