"""The solver's own estimates in `Stats`: what they are, and their gradients against finite differences."""

import copy
import math
import pickle

import pytest
import torch

from pyjlode import odeint, solve
from pyjlode.errors import BadOption
from pyjlode.nn import NeuralODE

F64 = torch.float64
METHODS = ["dopri5", "tsit5", "bosh3", "dopri8", "fehlberg2", "adaptive_heun"]
# Steps of one size, whatever their error: what the estimates are as a function of the field alone.
EVEN = {"first_step": 0.5, "min_step": 0.5, "max_step": 0.5, "estimates": True}


def field(w):
    return lambda t, h: torch.tanh(w @ h) + torch.sin(t)


def weights():
    torch.manual_seed(0)
    return torch.randn(3, 3, dtype=F64)


def estimates(w, h0, method="dopri5", **more):
    how = {"method": method, "rtol": 1e-3, "atol": 1e-3, "engine": "torch", "options": EVEN, **more}
    stats = solve(field(w), h0, (0.0, 1.0), **how).stats
    return torch.stack([stats.error_estimate, stats.stiffness_estimate])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_finite_differences(method):
    w, h0 = weights(), torch.tensor([1.0, -0.5, 0.3], dtype=F64)
    assert torch.autograd.gradcheck(
        lambda w, h0: estimates(w, h0, method) * torch.tensor([1e3, 1.0], dtype=F64),
        (w.requires_grad_(), h0.requires_grad_()),
        atol=1e-6,
    )


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_through_the_states_and_through_the_estimates_at_once(method):
    w = weights().requires_grad_()
    h0 = torch.ones(3, dtype=F64)

    def loss(w):
        s = solve(field(w), h0, (0.0, 1.0), method=method, engine="torch", options=EVEN)
        return s.h[-1].sum() + 10 * s.stats.error_estimate + 0.1 * s.stats.stiffness_estimate

    (found,) = torch.autograd.grad(loss(w), w)
    d = torch.randn_like(found)
    eps = 1e-6
    with torch.no_grad():
        numeric = (loss(w + eps * d) - loss(w - eps * d)) / (2 * eps)
    # The last two slopes of dopri8 differ so little that rounding is seen in their ratio's difference.
    assert float((found * d).sum()) == pytest.approx(float(numeric), rel=1e-3 if method == "dopri8" else 1e-6)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
def test_stiffness_is_the_eigenvalue(method):
    """Of h' = λ h every step estimates |λ|: the sum over the steps is |λ| times their number."""
    for rate in (-3.0, 0.5, -40.0):
        options = {"estimates": True, "max_step": 0.05}
        how = {"method": method, "rtol": 1e-4, "atol": 1e-6, "engine": "torch", "options": options}
        stats = solve(lambda t, h, rate=rate: rate * h, torch.ones(2, dtype=F64), (0.0, 0.2), **how).stats
        assert float(stats.stiffness_estimate) == pytest.approx(abs(rate) * stats.naccept, rel=1e-6)


@pytest.mark.parametrize(("method", "order"), [("dopri5", 5), ("bosh3", 3), ("fehlberg2", 2)])
def test_the_error_estimate_goes_with_the_step_size(method, order):
    """The local error of one step goes with dt**order (of the lower solution, and one more), and so does their mean."""

    def mean(dt):
        options = {"first_step": dt, "min_step": dt, "max_step": dt, "estimates": True}
        how = {"method": method, "rtol": 1e-3, "atol": 1e-3, "engine": "torch", "options": options}
        return float(solve(field(weights()), torch.ones(3, dtype=F64), (0.0, 1.0), **how).stats.error_estimate)

    assert math.log2(mean(0.05) / mean(0.025)) == pytest.approx(order, abs=0.35)


def test_the_error_estimate_is_what_the_control_saw():
    """With next to no rtol, a step is accepted where its error over atol is at most one: so the sum is at most atol
    times the time; and no rejected step is in it."""
    for atol in (1e-3, 1e-6, 1e-9):
        how = {"rtol": 1e-12, "atol": atol, "engine": "torch", "options": {"estimates": True, "first_step": 2.0}}
        stats = solve(field(3 * weights()), torch.ones(3, dtype=F64), (0.0, 2.0), **how).stats
        assert stats.nreject > 0
        assert 0 < float(stats.error_estimate) <= 2.01 * atol


def test_nothing_else_changes():
    how = {"rtol": 1e-6, "atol": 1e-8, "engine": "torch"}
    plain = solve(field(weights()), torch.ones(3, dtype=F64), (0.0, 1.0), **how)
    told = solve(field(weights()), torch.ones(3, dtype=F64), (0.0, 1.0), **how, options={"estimates": True})
    assert torch.equal(plain.h, told.h)
    assert plain.stats.nfe == told.stats.nfe
    assert plain.stats.error_estimate is plain.stats.stiffness_estimate is None


def test_a_field_at_rest_has_none_and_a_gradient_of_zero():
    w = torch.zeros((), dtype=F64, requires_grad=True)
    stats = solve(lambda t, h: w * h, torch.ones(2, dtype=F64), (0.0, 1.0), options={"estimates": True}).stats
    total = stats.error_estimate + stats.stiffness_estimate
    (grad,) = torch.autograd.grad(total, w)
    assert float(total.detach()) == 0
    assert torch.isfinite(grad)


def test_under_transforms():
    w, h0 = weights(), torch.ones(3, dtype=F64)
    found = torch.func.grad(lambda w: estimates(w, h0).sum())(w)
    w.requires_grad_()
    (right,) = torch.autograd.grad(estimates(w, h0).sum(), w)
    assert torch.allclose(found, right)
    many = torch.stack([h0, 2 * h0])
    each = torch.func.vmap(lambda h0: estimates(w, h0))(many)
    assert torch.allclose(each, torch.stack([estimates(w, h) for h in many]))


def test_a_model_with_them_is_copied_and_pickled():
    model = NeuralODE(Linear(), adjoint=False, engine="torch", options={"estimates": True})
    model(torch.ones(2)).sum().backward()
    assert model.stats.error_estimate.requires_grad
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert float(other.stats.error_estimate) == float(model.stats.error_estimate.detach())
        assert not other.stats.error_estimate.requires_grad


class Linear(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def forward(self, t, h):
        return super().forward(h)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"adjoint": True}, "adjoint=False"),
        ({"adjoint": "backsolve"}, "adjoint=False"),
        ({"compile": True}, "compile"),
        ({"options": {"estimates": True, "batch_dims": 1}, "h0": torch.ones(4, 2)}, "batch_dims"),
        ({"options": {"estimates": 1}}, "True or False"),
        ({"events": []}, "events"),
    ],
)
def test_what_cannot_give_them_says_so(how, says):
    w = torch.tensor(-1.0, requires_grad=True)
    how = {"options": {"estimates": True}, "engine": "torch", **how}
    h0 = how.pop("h0", torch.ones(2))
    with pytest.raises(BadOption, match=says):
        solve(lambda t, h: w * h, h0, (0.0, 1.0), **how)


def test_without_gradients_any_adjoint_has_their_numbers():
    w = torch.tensor(-1.0, requires_grad=True)
    with torch.no_grad():
        s = solve(lambda t, h: w * h, torch.ones(2), (0.0, 1.0), adjoint=True, options={"estimates": True})
    assert float(s.stats.stiffness_estimate) > 0


def test_methods_without_an_estimate_make_no_use_of_it():
    with pytest.warns(UserWarning, match="no use of the options"):
        odeint(lambda t, h: -h, torch.ones(2), (0.0, 1.0), method="rk4", options={"estimates": True})


def test_julias_solvers_are_not_asked_for_them():
    """`engine="auto"` takes the native engine, and `engine="julia"` is an error, wherever Julia is."""
    from pyjlode.bridge import engine
    from pyjlode.problem import Equation
    from pyjlode.solver import Solver

    solver = Solver(engine="torch", options={"estimates": True})
    made = solver._prepare(Equation(lambda t, h: -h, torch.ones(2), (0.0, 1.0)), "torch")
    assert "estimates" in engine.cannot(made.problem, None)
