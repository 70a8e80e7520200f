"""A distribution of vectors that a module holds: the base of a flow, the prior of a latent state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ..errors import BadShape


class VectorDistribution(nn.Module):
    """A distribution, or a standard normal that moves with its module.

    Args:
        given: a distribution of vectors, or of scalars with batch shape (D,), which is meant as one of vectors; or D
            itself, for a standard normal.

    Raises:
        BadShape: it is not a distribution of vectors.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, given: Distribution | int) -> None:
        super().__init__()
        self.given = given if isinstance(given, Distribution) else None
        if isinstance(given, int):
            # Not persistent: a checkpoint has no use for zeros and ones.
            self.register_buffer("loc", torch.zeros(given), persistent=False)
            self.register_buffer("scale", torch.ones(given), persistent=False)
        elif len(given.event_shape) != 1 and not (not given.event_shape and len(given.batch_shape) == 1):
            raise BadShape(
                f"a distribution of vectors is needed; this one has event shape {tuple(given.event_shape)} and batch "
                f"shape {tuple(given.batch_shape)}."
            )

    def forward(self) -> Distribution:
        """The distribution, of event shape (D,)."""
        if self.given is None:
            return Independent(Normal(self.loc, self.scale), 1)
        return self.given if self.given.event_shape else Independent(self.given, 1)
