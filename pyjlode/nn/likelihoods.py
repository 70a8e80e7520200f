"""Likelihoods of series given their latent path: of the values, and of the times at which they were observed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GaussianLikelihood(nn.Module):
    """Values are the decoded latent state with independent Gaussian noise.

    Args:
        decoder: from latent states (..., Z) to means (..., D).
        std: of the noise.
        learn_std: make it a parameter.
    """

    log_std: Tensor

    def __init__(self, decoder: nn.Module, std: float = 0.1, *, learn_std: bool = False) -> None:
        super().__init__()
        self.decoder = decoder
        log_std = torch.tensor(math.log(std))
        if learn_std:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)

    @property
    def std(self) -> Tensor:
        """0-d, of the noise."""
        return self.log_std.exp()

    def mean(self, z: Tensor) -> Tensor:
        """Latent states (..., Z) -> expected values (..., D)."""
        return self.decoder(z)

    def log_prob(self, z: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Log-likelihood of what was observed of each series.

        Args:
            z: shape (..., B, T, Z).
            x, mask: shape (B, T, D).

        Returns:
            Shape (..., B).
        """
        residual = (x - self.mean(z)) / self.std
        each = -0.5 * residual.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return torch.where(mask, each, 0).sum((-2, -1))


class PoissonProcess(nn.Module):
    """Events come at a rate that the latent state decides: the times of observations speak, too.

    Args:
        net: from latent states (..., Z) to (..., 1); its softplus is the rate.

    Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, section 5.1.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def rate(self, z: Tensor) -> Tensor:
        """Latent states (..., Z) -> events per unit of time, shape (...)."""
        return F.softplus(self.net(z)).squeeze(-1)

    def log_prob(self, z: Tensor, observed: Tensor, integral: Tensor) -> Tensor:
        """Log-density of the times of events: the sum of log rate(z(t_i)), less the integral of the rate.

        Args:
            z: shape (..., B, T, Z), at the events.
            observed: shape (B, T), bool: which of them are events.
            integral: shape (..., B), of the rate over the time in which events were watched for.

        Returns:
            Shape (..., B).
        """
        # The logarithm of softplus, which vanishes in float32 long before its logarithm does.
        u = self.net(z).squeeze(-1)
        log_rate = torch.where(u < -15, u, F.softplus(u.clamp_min(-15)).log())
        return torch.where(observed, log_rate, 0).sum(-1) - integral
