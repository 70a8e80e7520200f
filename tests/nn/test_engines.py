"""The models are the same on both engines: values, gradients, and an engine that is the one asked for."""

import pytest
import torch

from pyjlode.nn import CNF, GaussianLikelihood, GRURecognition, LatentODE, NeuralODE, PoissonProcess, TimeMLP

pytestmark = pytest.mark.usefixtures("julia")

TOL = {"rtol": 1e-9, "atol": 1e-11}


def neural_ode(engine):
    ode = NeuralODE(TimeMLP([3, 8, 3]), augment=1, engine=engine, **TOL).double()
    return ode, lambda: ode.stats, lambda h0: ode(h0)


def flow(engine, **options):
    cnf = CNF(TimeMLP([2, 8, 2]), 2, engine=engine, **options, **TOL).double()
    return cnf, lambda: cnf.stats, cnf.log_prob


def exact(engine):
    return flow(engine)


def hutchinson(engine):
    """With the noise of one seed, which is held for the whole solve and met again by its gradient."""
    cnf, stats, log_prob = flow(engine, trace="hutchinson", noise="gaussian", probes=2)

    def seeded(x):
        torch.manual_seed(1)
        return log_prob(x)

    return cnf, stats, seeded


def regularised(engine):
    cnf, stats, _ = flow(engine, kinetic_energy=0.1, jacobian_norm=0.1)
    return cnf, stats, cnf.loss


def latent_ode(engine, events=None):
    likelihood = GaussianLikelihood(torch.nn.Linear(3, 2), std=0.5)
    model = LatentODE(
        GRURecognition(2, 5, 3), TimeMLP([3, 8, 3]), likelihood, 3, events=events, engine=engine, **TOL
    ).double()

    def bound(x):
        """Series at times of their own, partly masked, from one draw of the latent state."""
        torch.manual_seed(1)
        t = torch.rand(len(x), 5, dtype=x.dtype).sort(-1).values
        values = x[:, None] * torch.stack([torch.cos(3 * t), torch.sin(3 * t)], -1)
        elbo = model(values, t, torch.rand(values.shape) < 0.8)
        return torch.stack([elbo.log_likelihood, elbo.kl])

    return model, lambda: model.ode.stats, bound


def events(engine):
    return latent_ode(engine, PoissonProcess(torch.nn.Linear(3, 1)))


@pytest.mark.parametrize("make", [neural_ode, exact, hutchinson, regularised, latent_ode, events])
def test_both_engines_give_the_same_values_and_gradients(make):
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    found = {}
    weights = None
    for engine in ("torch", "julia"):
        model, stats, value = make(engine)
        weights = model.state_dict() if weights is None else weights
        model.load_state_dict(weights)
        out = value(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *model.parameters()], materialize_grads=True)
        assert stats().engine == engine
        assert all(bool(g.isfinite().all()) for g in grads)
        assert sum(float(g.abs().sum()) for g in grads[1:]) > 0.01
        found[engine] = [out.detach(), *grads]
    for a, b in zip(found["torch"], found["julia"]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
