"""Laws of the divergence: the exact one is the Jacobian's trace, the estimate is right on average."""

import pytest
import torch

from pyjlode.errors import BadOption
from pyjlode.nn import TimeMLP, trace

D = 3
T = torch.tensor(0.3, dtype=torch.float64)


def field() -> TimeMLP:
    return TimeMLP([D, 16, D]).double()


def evaluate(f, B: int = 4):
    h = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    J = torch.stack([torch.autograd.functional.jacobian(lambda x: f(T, x), row) for row in h.detach()])
    return f(T, h), h, J


def test_exact_is_the_trace_of_the_jacobian():
    dh, h, J = evaluate(field())
    found = trace.exact(dh, h, create_graph=False)
    torch.testing.assert_close(found.trace, torch.einsum("bii->b", J))
    torch.testing.assert_close(found.frobenius, J.square().sum((1, 2)))


@pytest.mark.parametrize("noise", trace.NOISES)
def test_hutchinson_is_unbiased(noise):
    """The mean of 4,000 estimates is within four of its standard errors of the exact value."""
    dh, h, _ = evaluate(field())
    wanted = trace.exact(dh, h, create_graph=False)
    # Row by row: each row of the batch has probes of its own.
    many = torch.stack([torch.stack(trace.hutchinson(dh, h, e[None], create_graph=False)) for e in draws(noise, h)])
    error = many.mean(0) - torch.stack(wanted)
    assert bool((error.abs() < 4 * many.std(0) / len(many) ** 0.5).all())


def draws(noise: str, h: torch.Tensor) -> torch.Tensor:
    return trace.draw(noise, 4000, h)


def test_probes_are_averaged():
    dh, h, _ = evaluate(field())
    probes = trace.draw("gaussian", 5, h)
    together = trace.hutchinson(dh, h, probes, create_graph=False)
    single = [trace.hutchinson(dh, h, e[None], create_graph=False) for e in probes]
    torch.testing.assert_close(together.trace, torch.stack([d.trace for d in single]).mean(0))
    torch.testing.assert_close(together.frobenius, torch.stack([d.frobenius for d in single]).mean(0))


def test_rademacher_makes_no_error_on_a_diagonal_jacobian():
    dh, h, J = evaluate(lambda t, h: torch.sin(h) * t)
    found = trace.hutchinson(dh, h, trace.draw("rademacher", 1, h), create_graph=False)
    torch.testing.assert_close(found.trace, torch.einsum("bii->b", J))


@pytest.mark.parametrize("noise", trace.NOISES)
def test_probes_have_mean_zero_and_unit_covariance(noise):
    e = trace.draw(noise, 20_000, torch.zeros(D, dtype=torch.float64))
    assert e.mean(0).abs().max() < 0.03
    torch.testing.assert_close(e.T @ e / len(e), torch.eye(D, dtype=torch.float64), rtol=0, atol=0.05)


@pytest.mark.parametrize("f", [lambda t, h: torch.ones_like(h), lambda t, h: t * torch.ones_like(h)])
def test_divergence_of_a_field_that_does_not_look_at_the_state_is_zero(f):
    h = torch.randn(4, D, requires_grad=True)
    for found in (
        trace.exact(f(T, h), h, create_graph=True),
        trace.hutchinson(f(T, h), h, trace.draw("gaussian", 2, h), create_graph=True),
    ):
        assert torch.equal(found.trace, torch.zeros(4))
        assert torch.equal(found.frobenius, torch.zeros(4))


def test_unknown_noise():
    with pytest.raises(BadOption, match="rademacher"):
        trace.draw("uniform", 1, torch.zeros(3))
