"""A flow as a `torch.distributions.Transform`, so that it composes with the distributions and transforms of torch."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torch.distributions import Transform, constraints


class Invertible(Protocol):
    """What `FlowTransform` asks of a flow; `CNF` is one."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]: ...


class FlowTransform(Transform):
    """The map from base to data of a flow.

    Args:
        flow: for points of shape (..., D), `flow.inverse(z)` gives `(x, log |det dx/dz|)` and `flow(x)` the way back.
        cache_size: 1, or 0. One solve gives the point and its determinant; with a cache the second is not solved for
            again. The cache holds the graph of the last call.
    """

    bijective = True
    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, flow: Invertible, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.flow = flow
        self._last: tuple[Any, Any, Any] = (None, None, None)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same map, with or without a cache."""
        return self if cache_size == self._cache_size else FlowTransform(self.flow, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.flow.inverse(x)
        self._keep(x, y, log_det)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self.flow(y)
        self._keep(x, y, -log_det)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det dy/dx|, shape (...) for `x` and `y` of shape (..., D)."""
        last_x, last_y, log_det = self._last
        if x is last_x and y is last_y:
            return log_det
        return self.flow.inverse(x)[1]

    def _keep(self, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        if self._cache_size:
            self._last = (x, y, log_det)
