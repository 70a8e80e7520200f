"""Laws of latent ODEs: the bound against a case in closed form, likelihoods, masks, and the union of times."""

import copy
import math
import pickle

import pytest
import torch
from torch import distributions, nn

import pyjlode
from pyjlode.errors import BadOption, BadTime
from pyjlode.nn import (
    ODERNN,
    GaussianLikelihood,
    GRURecognition,
    LatentODE,
    PoissonProcess,
    TimeMLP,
    kl_annealing,
)

F64 = torch.float64
B, T, D, H, Z = 4, 6, 2, 5, 3
RATES = torch.tensor([-0.5, 0.3, -1.2], dtype=F64)


def model(kind: str = "gru", *, events: bool = False, **kwargs) -> LatentODE:
    recognition = GRURecognition(D, H, Z) if kind == "gru" else ODERNN(D, H, Z, TimeMLP([H, 8, H]))
    process = PoissonProcess(nn.Linear(Z, 1)) if events else None
    likelihood = GaussianLikelihood(nn.Linear(Z, D), learn_std=True)
    return LatentODE(recognition, TimeMLP([Z, 8, Z]), likelihood, Z, events=process, **kwargs).double()


def data():
    x, t = torch.randn(B, T, D, dtype=F64), torch.rand(B, T, dtype=F64).sort(-1).values
    mask = torch.rand(B, T, D) < 0.6
    mask[:, 0] = True
    return x, t, mask


class Fixed(nn.Module):
    """A recognition network that always says the same."""

    def __init__(self, mean, std):
        super().__init__()
        self.q = distributions.Independent(distributions.Normal(mean, std), 1)

    def forward(self, x, t, mask, t0):
        return self.q


# ----------------------------------------------------------------------------------------------------------------------
# The bound, where everything is linear and Gaussian
# ----------------------------------------------------------------------------------------------------------------------


class Conjugate:
    """z(0) ~ N(0, 1) in Z dimensions apart, z' = rates z, x_i = z(t_i) + N(0, s²), in part observed: posterior and
    evidence are in closed form, dimension by dimension, with a = exp(rate t_i) as the design."""

    s = 0.4

    def __init__(self):
        self.t = torch.rand(B, T, dtype=F64).sort(-1).values
        self.x = torch.randn(B, T, Z, dtype=F64)
        self.mask = torch.rand(B, T, Z) < 0.7
        a = torch.where(self.mask, torch.exp(RATES * self.t[..., None]), 0)
        self.variance = 1 / (1 + a.square().sum(1) / self.s**2)
        self.mean = self.variance * (a * self.x).sum(1) / self.s**2
        self.evidence = torch.zeros(B, dtype=F64)
        for b in range(B):
            for d in range(Z):
                seen = self.mask[b, :, d]
                design = a[b, seen, d]
                cov = self.s**2 * torch.eye(len(design), dtype=F64) + torch.outer(design, design)
                normal = distributions.MultivariateNormal(torch.zeros(len(design), dtype=F64), cov)
                self.evidence[b] += normal.log_prob(self.x[b, seen, d])

    def elbo(self, mean, std, samples: int = 4000):
        latent = LatentODE(
            Fixed(mean, std), lambda t, z: RATES * z, GaussianLikelihood(nn.Identity(), self.s), Z, rtol=1e-7, atol=1e-7
        ).double()
        return latent(self.x, self.t, self.mask, samples=samples)


def test_bound_is_the_evidence_at_the_posterior():
    """Within the noise of its 4,000 samples."""
    case = Conjugate()
    torch.testing.assert_close(case.elbo(case.mean, case.variance.sqrt()).value(), case.evidence, rtol=0, atol=0.15)


def test_bound_falls_short_by_the_divergence_from_the_posterior():
    case = Conjugate()
    mean, std = case.mean + 0.2, 1.4 * case.variance.sqrt()
    p = distributions.Independent(distributions.Normal(case.mean, case.variance.sqrt()), 1)
    q = distributions.Independent(distributions.Normal(mean, std), 1)
    missing = case.evidence - case.elbo(mean, std).value()
    torch.testing.assert_close(missing, distributions.kl_divergence(q, p), rtol=0, atol=0.3)


def test_weight_of_the_divergence():
    case = Conjugate()
    elbo = case.elbo(case.mean, case.variance.sqrt(), samples=1)
    torch.testing.assert_close(elbo.value(), elbo.log_likelihood - elbo.kl)
    torch.testing.assert_close(elbo.value(0.0), elbo.log_likelihood)


def test_annealing_rises_in_a_straight_line_to_one():
    weights = [kl_annealing(i, 10, start=0.1) for i in range(20)]
    assert weights[0] == 0.1
    assert all(b - a == pytest.approx(0.09) for a, b in zip(weights[:10], weights[1:11]))
    assert weights[10:] == [1.0] * 10
    assert kl_annealing(0, 0) == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Likelihoods
# ----------------------------------------------------------------------------------------------------------------------


def test_gaussian_likelihood_is_the_sum_over_what_was_observed():
    likelihood, z = GaussianLikelihood(nn.Linear(Z, D), 0.3).double(), torch.randn(2, B, T, Z, dtype=F64)
    x, _, mask = data()
    each = distributions.Normal(likelihood.mean(z), torch.tensor(0.3, dtype=F64)).log_prob(x)
    torch.testing.assert_close(likelihood.log_prob(z, x, mask), (each * mask).sum((-2, -1)), rtol=1e-6, atol=1e-6)


def log_density_of_events(f, net, t, until):
    """Of the times (T,), for z(0) = 0 known."""
    zero = torch.zeros(1, 1, dtype=F64)
    latent = LatentODE(Fixed(zero, zero + 1e-12), f, None, 1, events=PoissonProcess(net).double(), rtol=1e-9, atol=1e-9)
    return latent(torch.ones(1, len(t), 1, dtype=F64), t, until=until).log_likelihood


def test_poisson_process_of_constant_rate():
    """n log r - r t, for r = softplus(0.7)."""
    t = torch.tensor([0.3, 0.9, 1.1], dtype=F64)
    r = math.log1p(math.exp(0.7))
    for until in (None, 2.5):
        found = log_density_of_events(lambda t, z: 0 * z, lambda z: z + 0.7, t, until)
        assert float(found.detach()) == pytest.approx(3 * math.log(r) - r * (until or 1.1))


class Affine(nn.Module):
    def forward(self, z):
        return 2 * z - 1


def test_poisson_process_of_changing_rate():
    """With z = t the rate is softplus(2 t - 1), whose integral is a quadrature."""
    t = torch.tensor([0.3, 0.9, 1.1], dtype=F64)
    found = log_density_of_events(lambda t, z: torch.ones_like(z), Affine(), t, 1.5)
    fine = torch.linspace(0, 1.5, 4001, dtype=F64)
    rate = nn.functional.softplus(2 * fine - 1)
    wanted = nn.functional.softplus(2 * t - 1).log().sum() - torch.trapezoid(rate, fine)
    torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=1e-6)


def test_log_rate_survives_where_the_rate_does_not():
    process = PoissonProcess(nn.Identity())
    z = torch.tensor([[[-200.0], [-3.0], [200.0]]], requires_grad=True)
    found = process.log_prob(z, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1))
    found.sum().backward()
    torch.testing.assert_close(found, torch.tensor([-200 + math.log(math.log1p(math.exp(-3))) + math.log(200)]))
    assert bool(z.grad.isfinite().all())


def test_times_and_values_are_added():
    """The bound of both is that of the values and that of the events, for the same latent states."""
    latent, (x, t, mask) = model(events=True), data()
    parts = (latent.recognition, latent.ode.f.f)
    values = LatentODE(*parts, latent.likelihood, Z).double()
    events = LatentODE(*parts, None, Z, events=latent.events).double()

    def elbo(m):
        torch.manual_seed(3)
        return m(x, t, mask).log_likelihood

    torch.testing.assert_close(elbo(latent), elbo(values) + elbo(events), rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Times and masks
# ----------------------------------------------------------------------------------------------------------------------


def test_path_on_the_union_is_that_of_each_series_alone():
    latent, (_, t, _) = model(rtol=1e-8, atol=1e-8), data()
    z0 = torch.randn(2, B, Z, dtype=F64)
    together = latent.path(z0, t)[0]
    assert together.shape == (2, B, T, Z)
    for b in range(B):
        times = torch.cat([torch.zeros(1, dtype=F64), t[b]])
        alone = pyjlode.odeint(latent.ode.f, z0[:, b], times)[1:].movedim(0, 1)
        torch.testing.assert_close(together[:, b], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("events", [False, True])
def test_times_of_each_give_what_the_union_gives(events):
    latent, (_, t, _) = model(rtol=1e-9, atol=1e-9, events=events), data()
    z0 = torch.randn(2, B, Z, dtype=F64, requires_grad=True)
    found = []
    for own in (True, False):
        latent._own_times = own
        z, integral = latent.path(z0, t)
        value = z.square().sum() + (0.0 if integral is None else integral.sum())
        found.append([z, *([integral] if events else []), *torch.autograd.grad(value, (z0, *latent.ode.parameters()))])
        assert (latent.ode.stats.systems is not None) == own
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_field_that_mixes_series_is_solved_on_the_union():
    class Mixing(nn.Module):
        def forward(self, t, z):
            return z.mean(1, keepdim=True) - z

    latent, (_, t, _) = model(), data()
    latent.ode.f = Mixing()
    z = latent.path(torch.randn(2, B, Z, dtype=F64), t)[0]
    assert z.shape == (2, B, T, Z)
    assert latent.ode.stats.systems is None


def test_one_row_of_times_serves_all():
    latent, z0 = model(rtol=1e-9, atol=1e-9), torch.randn(2, B, Z, dtype=F64)
    t = torch.tensor([0.0, 0.4, 0.4, 1.0], dtype=F64)
    shared = latent.path(z0, t)[0]
    torch.testing.assert_close(shared, latent.path(z0, t.expand(B, 4))[0])
    torch.testing.assert_close(shared[:, :, 0], z0)
    torch.testing.assert_close(shared[:, :, 1], shared[:, :, 2])


def test_a_series_that_is_all_at_the_start():
    latent, z0 = model(events=True), torch.randn(2, B, Z, dtype=F64)
    z, integral = latent.path(z0, torch.zeros(1, dtype=F64))
    torch.testing.assert_close(z[:, :, 0], z0)
    assert torch.equal(integral, torch.zeros(2, B, dtype=F64))


@pytest.mark.parametrize("kind", ["gru", "ode-rnn"])
def test_what_is_masked_is_not_seen(kind):
    latent, (x, t, mask) = model(kind, events=True), data()

    def elbo(x):
        torch.manual_seed(3)
        return latent(x, t, mask).value()

    torch.testing.assert_close(elbo(x), elbo(torch.where(mask, x, float("nan"))))


def test_short_series_are_filled_up():
    """A series of four observations among longer ones has the bound that it has alone."""
    latent, (x, t, mask) = model(events=True, rtol=1e-9, atol=1e-9), data()
    t[1, 4:], mask[1, 4:] = t[1, 3], False
    latent.recognition.head.bias.data[Z:] = -50  # the posterior is its mean: no noise to compare
    together = latent(x, t, mask).value()[1]
    alone = latent(x[1:2, :4], t[1:2, :4], mask[1:2, :4]).value()[0]
    torch.testing.assert_close(together, alone, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("kind", ["gru", "ode-rnn"])
@pytest.mark.parametrize("adjoint", [False, True, "backsolve"])
def test_gradient_reaches_every_parameter(kind, adjoint):
    latent, (x, t, mask) = model(kind, events=True, adjoint=adjoint), data()
    (-latent(x, t, mask, samples=3).value(0.5).mean()).backward()
    assert [name for name, p in latent.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())] == []


def test_target_is_what_is_foretold():
    """The likelihood of a series is the sum of those of its two halves, for the same latent state."""
    latent, (x, t, mask) = model(), data()

    def elbo(part):
        torch.manual_seed(3)
        return latent(x, t, mask, target=(x[:, part], t[:, part], mask[:, part]))

    first, second, whole = elbo(slice(0, 3)), elbo(slice(3, 6)), elbo(slice(0, 6))
    summed = first.log_likelihood + second.log_likelihood
    torch.testing.assert_close(summed, whole.log_likelihood, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.kl, whole.kl)


def test_shapes_of_predictions():
    latent, (x, t, mask) = model(), data()
    new = torch.linspace(0, 2, 9, dtype=F64)
    assert latent.predict(x, t, mask, new).shape == (B, 9, D)
    assert latent.predict(x, t, mask, new, samples=3).shape == (3, B, 9, D)
    assert latent.sample(7, new).shape == (7, 9, D)
    assert latent.ode.nfe > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    latent, (x, t, mask) = model("ode-rnn", events=True), data()
    latent(x, t, mask).value().sum().backward()
    new = torch.linspace(0, 2, 9, dtype=F64)
    assert torch.equal(copied(latent).predict(x, t, mask, new), latent.predict(x, t, mask, new))


def test_what_is_wrong_is_said():
    with pytest.raises(BadOption, match="likelihood"):
        LatentODE(GRURecognition(D, H, Z), TimeMLP([Z, Z]), None, Z)
    with pytest.raises(BadTime, match="until"):
        model(events=True).path(torch.zeros(1, B, Z, dtype=F64), torch.tensor([0.0, 2.0], dtype=F64), 1.0)
    only = LatentODE(GRURecognition(D, H, Z), TimeMLP([Z, Z]), None, Z, events=PoissonProcess(nn.Linear(Z, 1))).double()
    with pytest.raises(BadOption, match="events alone"):
        only.predict(*data(), torch.zeros(1, dtype=F64))
