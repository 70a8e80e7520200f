"""`LatentODE`: a generative model of irregularly sampled series, whose latent state follows an ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from .. import numbers
from ..errors import BadFunction, BadOption, BadShape, BadTime
from ..methods import find
from ..odeint import solve
from .likelihoods import GaussianLikelihood, PoissonProcess
from .neural_ode import NeuralODE
from .series import check_times, own_times, series, union_of_times
from .vector_distribution import VectorDistribution


class Elbo(NamedTuple):
    """The two parts of the evidence lower bound, one number of each for each series.

    Attributes:
        log_likelihood: shape (B,), the mean over the samples of log p(series | latent path).
        kl: shape (B,), the divergence of the posterior of the latent state from its prior.
    """

    log_likelihood: Tensor
    kl: Tensor

    def value(self, kl_weight: float = 1.0) -> Tensor:
        """Shape (B,): `log_likelihood - kl_weight * kl`; with weight 1 a lower bound of log p(series)."""
        return self.log_likelihood - kl_weight * self.kl


class LatentODE(nn.Module):
    """A variational autoencoder of series: a recognition network reads a series, a latent state z(t0) is drawn, an ODE
    carries it through time, and each observation is decoded from where it then is.

    Series may be observed at irregular times, each at its own, and in part. The batch is solved once: each series by
    itself, on its own times, with an explicit adaptive method on the native engine, if `f` takes a time for each (see
    `docs/batches.md`) and the gradient is `adjoint=True` or `False`; else all together, on the union of all times.

    Args:
        recognition: `recognition(x, t, mask, t0)` gives a distribution of batch shape (B,) and event shape (Z,), e.g.
            `ODERNN` or `GRURecognition`.
        f: `f(t, z) -> dz/dt` for `z` of shape (..., Z).
        likelihood: of values given latent states; None for series of events alone.
        prior: of z(t0): a distribution of event shape (Z,), whose parameters are not the module's; or Z itself, for a
            standard normal that moves with the module.
        events: a point process of the observations' times; None takes the times as given.
        t0: the time of the latent state; no series may begin before.
        solver_options: keyword arguments for `pyjlode.solve`. Here `adjoint` is True, and `rtol` and `atol` are 1e-5,
            if nothing else is said.

    Attributes:
        ode: the `NeuralODE` of the latent path; `ode.nfe` and `ode.nfe_backward` count the work.

    Raises:
        BadOption: neither `likelihood` nor `events` is given.
        BadShape: `prior` is not a distribution of vectors.

    Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, section 5; Rubanova,
    Chen & Duvenaud, Latent ODEs for irregularly-sampled time series, 2019.
    """

    def __init__(
        self,
        recognition: nn.Module,
        f: Callable[[Tensor, Tensor], Tensor],
        likelihood: GaussianLikelihood | None,
        prior: Distribution | int,
        *,
        events: PoissonProcess | None = None,
        t0: float = 0.0,
        **solver_options: Any,
    ) -> None:
        super().__init__()
        if likelihood is None and events is None:
            raise BadOption("a LatentODE needs a likelihood of the values, or of the events, or both.")
        self.recognition, self.likelihood, self.events = recognition, likelihood, events
        self.t0 = float(t0)
        self._prior = VectorDistribution(prior)
        field = f if events is None else _Counting(f, events)
        options = {"rtol": 1e-5, "atol": 1e-5, **solver_options}
        self.ode = NeuralODE(field, return_trajectory=True, **options)
        settings = self.ode.solver_options
        self._own_times = (
            find(settings.get("method")).kind == "adaptive"
            and settings["adjoint"] in (True, False, "discrete")
            and settings.get("engine", "auto") != "julia"
            and not settings.get("compile")
            and not {"norm", "batch_dims", "step_t", "jump_t"} & {*(settings.get("options") or {})}
        )

    @property
    def prior(self) -> Distribution:
        """The distribution of the latent state at `t0`."""
        return self._prior()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        mask: Tensor | None = None,
        *,
        target: tuple[Tensor, Tensor, Tensor | None] | None = None,
        until: float | None = None,
        samples: int = 1,
    ) -> Elbo:
        """The evidence lower bound.

        Args:
            x: shape (B, T, D); what is masked may be anything, NaN too.
            t: shape (T,), the same for all, or (B, T); not decreasing, and not before `t0`. Rows that are shorter than
                others are filled up with their last time, and masked there.
            mask: shape (B, T, D) or (B, T), true where observed; None is everywhere.
            target: another `(x, t, mask)` whose likelihood is taken: what the series is to foretell, say.
            until: the time until which events were watched for; by default the last time of each series.
            samples: latent states drawn for each series.

        Raises:
            BadShape, BadTime: a series is not as it should be; and what `pyjlode.solve` raises.
        """
        if len(x) == 0:
            raise BadShape(f"the batch holds no series: x has shape {tuple(x.shape)}.")
        q = self.recognition(x, t, mask, self.t0)
        z0 = q.rsample(torch.Size((samples,)))
        told = series(*((x, t, mask) if target is None else target), self.t0)
        shared = (t if target is None else target[1]).dim() == 1
        z, integral = self.path(z0, told.t[0] if shared else told.t, until)
        log_likelihood = z.new_zeros(z.shape[:2])
        if self.likelihood is not None:
            log_likelihood = log_likelihood + self.likelihood.log_prob(z, told.x, told.mask)
        if self.events is not None:
            assert integral is not None
            log_likelihood = log_likelihood + self.events.log_prob(z, told.observed, integral)
        return Elbo(log_likelihood.mean(0), kl_divergence(q, self.prior))

    def predict(
        self, x: Tensor, t: Tensor, mask: Tensor | None, t_new: Tensor, *, samples: int | None = None
    ) -> Tensor:
        """Expected values at other times, given a series.

        Args:
            x, t, mask: the series, as in `forward`.
            t_new: shape (T',) or (B, T'), not before `t0`.
            samples: latent states drawn for each series; None takes the posterior's mean instead.

        Returns:
            Shape (B, T', D), or (samples, B, T', D).

        Raises:
            BadOption: the model has no likelihood of values; and what `forward` raises.
        """
        q = self.recognition(x, t, mask, self.t0)
        z0 = q.mean[None] if samples is None else q.rsample(torch.Size((samples,)))
        means = self._decode(self.path(z0, t_new)[0])
        return means[0] if samples is None else means

    @torch.no_grad()
    def sample(self, n: int, t: Tensor) -> Tensor:
        """Expected values of `n` series drawn from the prior, at times `t` of shape (T,): shape (n, T, D)."""
        return self._decode(self.path(self.prior.sample(torch.Size((1, n))), t)[0])[0]

    def path(self, z0: Tensor, t: Tensor, until: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Latent states over time.

        Args:
            z0: shape (S, B, Z), at `t0`.
            t: shape (T,) or (B, T).
            until: the time until which events are expected; by default the last of `t`, in each row.

        Returns:
            Shape (S, B, T, Z); and, with a point process, shape (S, B), the expected number of events, else None.

        Raises:
            BadTime: times decrease or come before `t0`, or `until` comes before one; and what `pyjlode.solve` raises.
        """
        check_times(t, self.t0)
        end = t[..., -1] if until is None else torch.as_tensor(until, device=t.device).to(t)
        if until is not None and float(t.max()) > float(end):
            raise BadTime(f"until={until:g} comes before the last time, {float(t.max()):g}.")
        own = self._each(z0, t, end) if t.dim() == 2 and self._own_times and not numbers.transformed() else None
        if own is not None:
            return own
        union, (_, index, last) = union_of_times(t.new_tensor(self.t0), t, end)
        if self.events is None:
            return _gather(self.ode(z0, union), index), None
        z, integral = self.ode((z0, z0.new_zeros(z0.shape[:-1])), union)
        return _gather(z, index), _gather(integral[..., None], last[..., None]).squeeze(-1).squeeze(-1)

    def _each(self, z0: Tensor, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """As `path`, each series on its own times; None where `f` does not take a time for each."""
        times, index = own_times(torch.cat([t.new_full((len(t), 1), self.t0), t, end.expand(len(t))[:, None]], 1))
        settings = dict(self.ode.solver_options)
        settings["options"] = {**(settings.get("options") or {}), "batch_dims": 2}
        state: Any = z0 if self.events is None else (z0, z0.new_zeros(z0.shape[:-1]))
        try:
            solution = solve(self.ode.f, state, times.expand(len(z0), -1, -1), dense=False, **settings)
        except BadFunction:
            self._own_times = False
            return None
        self.ode.stats = solution.stats
        if self.events is None:
            return _gather(solution.h, index[:, 1:-1]), None
        z, integral = solution.h
        return _gather(z, index[:, 1:-1]), integral[-1]

    def _decode(self, z: Tensor) -> Tensor:
        if self.likelihood is None:
            raise BadOption("this model is of events alone: it has no values to predict.")
        return self.likelihood.mean(z)


class _Counting(nn.Module):
    """The latent field beside the rate of events, for a state `(z, expected number of events)`."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], events: PoissonProcess) -> None:
        super().__init__()
        self.f, self.events = f, events

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        return self.f(t, z), self.events.rate(z)


def _gather(z: Tensor, index: Tensor) -> Tensor:
    """States on the union of times, shape (U, S, B, Z), at the times of each series, (T,) or (B, T) -> (S, B, T, Z)."""
    if index.dim() == 1:
        return z[index].movedim(0, 2)
    rows = torch.arange(z.shape[2], device=z.device)[:, None]
    return z[index, :, rows].movedim(2, 0)
