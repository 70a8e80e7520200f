"""The loop of our own for one compiled system takes the steps of SciML's solvers: a solve that is to keep dense output
is theirs, and so is the reference."""

import math

import pytest
import torch
from torch import nn

from pyjlode import odeint, solve
from pyjlode.errors import GradientUnavailable, MaxStepsReached, PyJLODEError
from pyjlode.methods import METHODS

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
JULIA = {"engine": "julia", "compile": True, "rtol": 1e-7, "atol": 1e-9}
EXPLICIT = [row.name for row in METHODS.values() if row.kind == "adaptive" and row.julia]
TOLERANCES = {"bosh3": 1e-5}


def both(f, h0, t, **how):
    """The solution by our own loop, and by SciML's."""
    with torch.no_grad():
        return [solve(f, h0, t, **{**JULIA, **how}, dense=dense) for dense in (False, True)]


def agree(ours, theirs, apart):
    """They took the same steps, and came to the same states but for rounding.

    Both know powers to a millionth: a step whose error is that near to the tolerance may be rejected by one alone. Then
    their states are apart by a part of the tolerance.
    """
    assert ours.stats.compiled
    counts = [(x.stats.naccept, x.stats.nreject) for x in (ours, theirs)]
    if counts[0] != counts[1]:
        assert all(abs(a - b) <= 1 for a, b in zip(*counts))
        apart *= 100
    scale = theirs.h.abs().amax()
    assert float((ours.h - theirs.h).abs().amax() / scale) < apart


def van_der_pol(t, h):
    x, y = h
    return torch.stack([y, 3 * (1 - x * x) * y - x])


def driven(t, h):
    return torch.sin(t) - h * torch.arange(1, 12, dtype=h.dtype)


def three_bodies(t, h):
    q, v = h.view(2, 3, 2)
    d = q[None] - q[:, None]
    r = (d.square().sum(-1) + 0.1) ** -1.5
    return torch.stack([v, (r[..., None] * d).sum(1)]).view(-1)


torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()
STARTS = {
    van_der_pol: torch.tensor([2.0, 0.0], dtype=F64),
    driven: torch.ones(11, dtype=F64),
    three_bodies: torch.tensor([1.0, 0, -0.5, 0.9, -0.5, -0.9, 0, 0.3, -0.3, -0.1, 0.3, -0.2], dtype=F64),
    NET: torch.tensor([[0.5, -0.2, 0.1], [1.0, 0.3, -0.4]], dtype=F64),
}
FIELDS = {NET: lambda t, h: NET(h)}


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("system", STARTS, ids=lambda f: getattr(f, "__name__", "network"))
def test_the_steps_are_those_of_scimls_solver(system, method):
    f, h0 = FIELDS.get(system, system), STARTS[system]
    tol = TOLERANCES.get(method, 1e-7)
    for t in (torch.tensor([0.0, 3.0], dtype=F64), torch.linspace(2.0, -1.0, 14, dtype=F64)):
        agree(*both(f, h0, t, method=method, rtol=tol, atol=tol * 1e-2), 0.1 * tol)


@pytest.mark.parametrize(
    "how",
    [
        {"options": {"first_step": 1e-3}},
        {"options": {"max_step": 0.05}},
        {"options": {"min_step": 0.02}, "rtol": 1e-9},
        {"options": {"safety": 0.8, "ifactor": 3.0, "dfactor": 0.4}},
        {"rtol": torch.tensor([1e-4, 1e-8], dtype=F64), "atol": torch.tensor([1e-6, 1e-10], dtype=F64)},
        {"atol": 0.0},
        {"options": {"specialize": "full"}},
    ],
    ids=["first step", "longest", "shortest", "control", "of each number", "no atol", "full"],
)
def test_so_they_are_with_all_that_is_said_of_steps(how):
    t = torch.linspace(0.0, 5.0, 8, dtype=F64)
    agree(*both(van_der_pol, STARTS[van_der_pol], t, method="tsit5", **how), 1e-9)


def test_so_they_are_for_a_state_of_several_tensors():
    """The norm is the largest of those of the tensors, of which no one need fill a vector."""

    def f(t, h):
        x, y = h["x"], h["y"]
        return {"x": y[:3] * torch.cos(t), "y": -torch.cat([x, x, x, x[:2]]) - 0.1 * y}

    h0 = {"x": torch.ones(3, dtype=F64), "y": torch.linspace(0, 5, 11, dtype=F64)}
    t = torch.linspace(0, 4, 5, dtype=F64)
    ours, theirs = both(f, h0, t, method="dopri5")
    assert (ours.stats.naccept, ours.stats.nreject) == (theirs.stats.naccept, theirs.stats.nreject)
    for key in h0:
        torch.testing.assert_close(ours.h[key], theirs.h[key], rtol=1e-9, atol=1e-11)


def test_float32():
    """Our loop rounds to the state's type what SciML's computes in float64: the steps are as many but for a few."""
    t = torch.linspace(0.0, 3.0, 5)
    ours, theirs = both(van_der_pol, torch.tensor([2.0, 0.0]), t, method="tsit5", rtol=1e-4, atol=1e-5)
    assert ours.stats.compiled
    assert ours.h.dtype == torch.float32
    assert abs(ours.stats.naccept - theirs.stats.naccept) <= 3
    torch.testing.assert_close(ours.h, theirs.h, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("system", [van_der_pol, three_bodies], ids=["numbers", "packs"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_gradients_are_those_of_the_numbers_that_came_out(method, system):
    """By stages that were kept, and by the native engine; outputs lie within steps and at their ends."""
    h0, t = STARTS[system], torch.linspace(0.0, 2.0, 9, dtype=F64)
    weights = torch.randn(9, len(h0), dtype=F64, generator=torch.Generator().manual_seed(0))
    scale = torch.ones(len(h0), dtype=F64)
    grads = []
    for engine in ("julia", "torch"):
        start, p = (x.clone().requires_grad_() for x in (h0, scale))
        kwargs = {**JULIA, "compile": engine == "julia", "engine": engine, "method": method, "adjoint": "discrete"}
        tol = TOLERANCES.get(method, 1e-7)
        h = odeint(lambda t, h, p=p: p * system(t, h), start, t, **{**kwargs, "rtol": tol, "atol": tol * 1e-2})
        grads.append(torch.autograd.grad((h * weights).sum(), (start, p)))
    for a, b in zip(*grads):
        # The engines choose steps that are not the same to the last place: the gradients differ as the states do.
        torch.testing.assert_close(a, b, rtol=0.0, atol=100 * tol * float(b.abs().max()))


def test_a_field_that_became_another_is_seen_by_the_gradient():
    p = torch.tensor(1.0, dtype=F64, requires_grad=True)
    h0, t = torch.tensor([1.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    kwargs, raised = {**JULIA, "adjoint": "discrete", "method": "tsit5"}, 0
    for _ in range(8):
        h = odeint(lambda t, h: -p * h, h0, t, **kwargs)
        p.data = torch.tensor(1.01, dtype=F64)  # which autograd does not see
        odeint(lambda t, h: -p * h, h0, t, **kwargs)
        p.grad, seen = None, False
        try:
            h[-1].sum().backward()
        except GradientUnavailable:
            seen = True
        else:  # Julia still held what f was: the gradient is that of the numbers that came out
            assert math.isclose(float(p.grad), -math.exp(-1), rel_tol=1e-6)
        p.data = torch.tensor(1.0, dtype=F64)
        raised += seen
    assert raised


def test_failures_say_why():
    h0 = torch.tensor([1.0], dtype=F64)
    t = torch.tensor([0.0, 2.0], dtype=F64)
    for _ in range(6):
        with pytest.raises(PyJLODEError, match="step"):
            solve(lambda t, h: h * h, h0, t, **JULIA, method="tsit5", dense=False)
        with pytest.raises(MaxStepsReached):
            solve(
                lambda t, h: torch.cos(50 * t) + h,
                h0,
                t,
                **JULIA,
                method="tsit5",
                options={"max_num_steps": 5},
                dense=False,
            )
    # A step into where f is NaN is not accepted, and the next is shorter.
    ours = solve(lambda t, h: -torch.sqrt(h) - 1e-3, torch.tensor([1.0], dtype=F64), t * 0.9, **JULIA, dense=False)
    assert math.isfinite(float(ours.h[-1, 0]))
