"""Laws of continuous normalizing flows: closed forms of linear fields, invertibility, total mass, gradients."""

import copy
import pickle

import pytest
import torch
from problems import GENERAL
from torch import distributions as D

from pyjlode.errors import BadOption, BadShape
from pyjlode.nn import CNF, TimeMLP, trace

F64 = torch.float64
A = torch.tensor([[0.4, -1.0], [0.7, -0.2]], dtype=F64)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def linear(t, h):
    return h @ A.T


def flow(f=None, base=2, **kwargs) -> CNF:
    return CNF(f or TimeMLP([2, 16, 2]), base, **{**TIGHT, **kwargs}).double()


def points(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 2, dtype=F64)


# ----------------------------------------------------------------------------------------------------------------------
# Change of variables
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [(0.0, 1.0), (0.0, 2.5), (1.0, -0.5)])
def test_density_of_a_linear_field(t):
    """x(t1) = exp(A t) x(t0), and the log-density falls by t tr A."""
    span, x = t[1] - t[0], points()
    cnf = flow(linear, t=t)
    z = x @ torch.matrix_exp(-A * span).T
    torch.testing.assert_close(cnf(x)[0], z)
    torch.testing.assert_close(cnf(x)[1], (-span * A.trace()).expand(5))
    torch.testing.assert_close(cnf.log_prob(x), cnf.base.log_prob(z) - span * A.trace())
    torch.testing.assert_close(cnf.inverse(z)[1], (span * A.trace()).expand(5))


def test_samples_of_a_linear_field():
    """Covariance exp(A) exp(A)ᵀ."""
    x = flow(linear).sample(20_000)
    E = torch.matrix_exp(A)
    assert x.shape == (20_000, 2)
    torch.testing.assert_close(torch.cov(x.T), E @ E.T, rtol=0.05, atol=0.05)
    assert flow().sample().shape == (2,)
    assert flow().sample((3, 4)).shape == (3, 4, 2)


@pytest.mark.parametrize("mode", trace.TRACES)
def test_forward_then_inverse_is_the_identity(mode):
    cnf, x = flow(trace=mode), points()
    z, there = cnf(x)
    back, home = cnf.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    if mode == "exact":
        torch.testing.assert_close(there, -home, rtol=0, atol=1e-6)


def test_log_det_is_that_of_the_jacobian():
    cnf, x = flow(), points(3)
    for row, log_det in zip(x, cnf(x)[1]):
        J = torch.autograd.functional.jacobian(lambda y: cnf(y)[0], row)
        torch.testing.assert_close(torch.linalg.slogdet(J).logabsdet, log_det, rtol=0, atol=1e-6)


def test_density_integrates_to_one():
    cnf = flow(TimeMLP([2, 16, 2]), **{"rtol": 1e-6, "atol": 1e-6})
    side = torch.linspace(-8, 8, 121, dtype=F64)
    with torch.no_grad():
        mass = cnf.log_prob(torch.cartesian_prod(side, side)).exp().sum() * (side[1] - side[0]) ** 2
    assert float(mass) == pytest.approx(1, abs=1e-4)


def test_density_on_the_way():
    """At t[0] it is the base's; halfway, that of the flow with half the span."""
    cnf, x = flow(), points()
    torch.testing.assert_close(cnf.log_prob(x, t=0.0), cnf.base.log_prob(x))
    torch.testing.assert_close(cnf.log_prob(x, t=0.5), CNF(cnf.f, 2, t=(0.0, 0.5), **TIGHT).double().log_prob(x))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_points_with_steps_of_their_own_have_the_same_density(trace):
    f, x = TimeMLP([2, 16, 2]).double(), points()
    found = []
    for how in ({}, {"options": {"batch_dims": 1}}):
        torch.manual_seed(1)
        cnf = flow(f, trace=trace, **how)
        found.append((cnf.log_prob(x), *torch.autograd.grad(cnf.log_prob(x).sum(), tuple(f.parameters()))))
        assert (cnf.stats.systems is not None) == bool(how)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# Noise and regularisers
# ----------------------------------------------------------------------------------------------------------------------


def test_hutchinson_estimates_the_log_density():
    """Unbiased: the mean over 2,000 draws is within four standard errors."""
    cnf, x = flow(rtol=1e-6, atol=1e-6), points(1)
    with torch.no_grad():
        exact = cnf.log_prob(x)
        cnf.trace = "hutchinson"
        many = cnf.log_prob(x.expand(2000, 2))
    assert abs(float(many.mean() - exact)) < 4 * float(many.std()) / 2000**0.5


def test_noise_is_drawn_once_for_a_solve(monkeypatch):
    drawn = []
    monkeypatch.setattr(trace, "draw", lambda *args, draw=trace.draw: drawn.append(draw(*args)) or drawn[-1])
    cnf = flow(trace="hutchinson", noise="gaussian", probes=3)
    loss = cnf.log_prob(points()).sum()
    loss.backward()
    assert cnf.stats.naccept > 1
    assert [e.shape for e in drawn] == [(3, 5, 2)]


def test_each_backward_pass_meets_the_noise_of_its_own_solve():
    """Two solves, then one backward pass through both: the sum of the two gradients."""
    cnf, x = flow(trace="hutchinson"), points()

    def gradient(*losses):
        return torch.autograd.grad(sum(losses), list(cnf.parameters()))

    torch.manual_seed(1)
    a = gradient(cnf.log_prob(x).sum())
    b = gradient(cnf.log_prob(x).sum())
    torch.manual_seed(1)
    both = gradient(cnf.log_prob(x).sum(), cnf.log_prob(x).sum())
    for p, q, r in zip(a, b, both):
        torch.testing.assert_close(p + q, r)


@pytest.mark.parametrize("direction", [(0.0, 1.5), (1.5, 0.0)])
def test_regularisers_of_known_fields(direction):
    """Both are lengths of the path, whichever way it is run: |c|² t for a constant field, |A|² t for a linear one."""
    c = torch.tensor([3.0, -1.0], dtype=F64)
    moved = flow(lambda t, h: c.expand_as(h)).integrate(points(), *direction, kinetic_energy=True, jacobian_norm=True)
    torch.testing.assert_close(moved.kinetic_energy, (1.5 * c.square().sum()).expand(5))
    torch.testing.assert_close(moved.jacobian_norm, torch.zeros(5, dtype=F64))
    moved = flow(linear).integrate(points(), *direction, jacobian_norm=True)
    torch.testing.assert_close(moved.jacobian_norm, (1.5 * A.square().sum()).expand(5))


def test_loss_is_the_mean_with_weighted_regularisers():
    cnf, x = flow(kinetic_energy=0.3, jacobian_norm=0.7), points()
    path = cnf.integrate(x, 1.0, 0.0, kinetic_energy=True, jacobian_norm=True)
    wanted = -cnf.log_prob(x).mean() + 0.3 * path.kinetic_energy.mean() + 0.7 * path.jacobian_norm.mean()
    torch.testing.assert_close(cnf.loss(x), wanted)
    torch.testing.assert_close(flow(cnf.f).loss(x), -cnf.log_prob(x).mean())


# ----------------------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", trace.TRACES)
@pytest.mark.parametrize("adjoint", [False, True, *GENERAL])
def test_gradient_of_log_prob_is_the_finite_difference(adjoint, mode):
    """For points and parameters, all in a random direction, with the noise held."""
    cnf, x = flow(TimeMLP([2, 3, 2]), trace=mode, adjoint=adjoint), points(2).requires_grad_()
    leaves = [x, *cnf.parameters()]

    def loss():
        torch.manual_seed(1)
        return cnf.log_prob(x) @ torch.tensor([1.0, -0.6], dtype=F64)

    grads = torch.autograd.grad(loss(), leaves)
    eps, values = 1e-4, []
    directions = [torch.randn_like(leaf) for leaf in leaves]
    with torch.no_grad():
        for step in (eps, -2 * eps):
            for leaf, direction in zip(leaves, directions):
                leaf += step * direction
            values.append(float(loss()))
    along = sum(float((grad * direction).sum()) for grad, direction in zip(grads, directions))
    assert along == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("adjoint", [False, True])
def test_gradient_of_what_a_closure_holds(adjoint):
    """A field that is a function, and not a module, loses no gradient."""
    W = A.clone().requires_grad_()
    cnf = flow(lambda t, h: h @ W.T, adjoint=adjoint)
    (grad,) = torch.autograd.grad(cnf(points())[1].sum(), [W])
    torch.testing.assert_close(grad, -5 * torch.eye(2, dtype=F64))  # log det = -tr W, for five points


# ----------------------------------------------------------------------------------------------------------------------
# In torch.distributions
# ----------------------------------------------------------------------------------------------------------------------

BASES = [
    D.MultivariateNormal(torch.ones(2, dtype=F64), 2 * torch.eye(2, dtype=F64)),
    D.Laplace(torch.zeros(2, dtype=F64), 1.0),
    D.MixtureSameFamily(
        D.Categorical(torch.ones(3, dtype=F64)), D.Independent(D.Normal(torch.randn(3, 2, dtype=F64), 0.3), 1)
    ),
]


@pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)
def test_any_base(base):
    cnf = flow(base=base)
    x = cnf.sample(4)
    z, log_det = cnf(x)
    wanted = base.log_prob(z) if base.event_shape else base.log_prob(z).sum(-1)
    torch.testing.assert_close(cnf.log_prob(x), wanted + log_det)


def test_transformed_distribution_is_the_flow():
    cnf = flow()
    p = D.TransformedDistribution(cnf.base, [cnf.transform])
    x = p.sample((6,))
    torch.testing.assert_close(p.log_prob(x), cnf.log_prob(x))
    p.rsample((6,)).sum().backward()
    assert all(q.grad is not None for q in cnf.parameters())


def test_transform_composes():
    """With a scaling before and after, the densities of both are added."""
    cnf = flow(linear)
    scale = D.AffineTransform(torch.zeros(2, dtype=F64), torch.tensor([2.0, 0.5], dtype=F64), event_dim=1)
    p = D.TransformedDistribution(cnf.base, [scale, cnf.transform, scale.inv])
    x = points()
    y = cnf(scale(x))[0]
    wanted = cnf.base.log_prob(scale.inv(y)) - A.trace()  # the determinants of both scalings are one
    torch.testing.assert_close(p.log_prob(x), wanted)


@pytest.mark.parametrize("cache", [0, 1])
def test_cache_saves_a_solve_and_changes_no_number(cache):
    cnf, x = flow(), points()
    transform = cnf.transform.with_cache(cache)
    y = transform(x)
    before = cnf.stats
    log_det = transform.log_abs_det_jacobian(x, y)
    assert (cnf.stats is before) == (cache == 1)
    torch.testing.assert_close(log_det, cnf.inverse(x)[1])
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x), -log_det)


# ----------------------------------------------------------------------------------------------------------------------
# As a module
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    cnf, x = flow(), points()
    cnf.loss(x).backward()
    torch.testing.assert_close(copied(cnf).log_prob(x), cnf.log_prob(x))


def test_state_dict_is_that_of_the_field():
    cnf = flow()
    assert list(cnf.state_dict()) == [f"f.{name}" for name in cnf.f.state_dict()]


def test_base_moves_with_the_module():
    assert flow(rtol=1e-3, atol=1e-3).float().sample(3).dtype == torch.float32
    assert flow().sample(3).dtype == F64


def test_autocast():
    cnf, x = flow(rtol=1e-2, atol=1e-2).float(), points().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = cnf.log_prob(x)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, cnf.log_prob(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kwargs", "match"), [({"trace": "skilling"}, "hutchinson"), ({"noise": "u"}, "gaussian"), ({"probes": 0}, "least")]
)
def test_bad_options(kwargs, match):
    with pytest.raises(BadOption, match=match):
        flow(**kwargs)


def test_bad_shapes():
    with pytest.raises(BadShape, match="vectors of 2"):
        flow().log_prob(torch.zeros(5, 3, dtype=F64))
    with pytest.raises(BadShape, match="of vectors is needed"):
        flow(base=D.Normal(0.0, 1.0))
