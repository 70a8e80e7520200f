"""Layers of vector fields that know the time: an ODE's field is one network for all depths, and `t` tells it which."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConcatLinear(nn.Module):
    """A linear layer of `(t, h)`: the time is one more feature.

    Args:
        in_features, out_features: of `h` and of the result.

    Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, section 3.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1 + in_features, out_features)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """`t` 0-d or of shape (..., 1), `h` of shape (..., in_features) -> (..., out_features)."""
        weight, bias = self.linear.weight, self.linear.bias
        if t.dim():
            return F.linear(h, weight[:, 1:], bias) + t * weight[:, 0]
        # The time is the same for the whole batch: it moves the bias, and nothing is copied to stand beside it.
        return F.linear(h, weight[:, 1:], bias + t * weight[:, 0])


class ConcatSquash(nn.Module):
    """A linear layer of `h` with a gate and a shift that depend on time: `(W h + b) * sigmoid(u t + c) + v t`.

    Args:
        in_features, out_features: of `h` and of the result.

    Source: Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, FFJORD, 2018, appendix B.1.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.gate = nn.Linear(1, out_features)
        self.shift = nn.Linear(1, out_features, bias=False)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """`t` 0-d or of shape (..., 1), `h` of shape (..., in_features) -> (..., out_features)."""
        t = t if t.dim() else t.reshape(1)
        return self.linear(h) * torch.sigmoid(self.gate(t)) + self.shift(t)


class TimeMLP(nn.Module):
    """A vector field: a multilayer perceptron whose every layer knows the time.

    Args:
        sizes: features of the input, of each hidden layer, and of the output; for a field the first is the last.
        layer: `layer(in_features, out_features)` makes a module called as `(t, h)`.
        activation: makes the module between two layers. A smooth one: solvers of high order count on it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        layer: Callable[[int, int], nn.Module] = ConcatSquash,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(a, b) for a, b in zip(sizes, sizes[1:]))
        self.activation = activation()

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """`t` 0-d or, a time for each row, of shape (..., 1); `h` of shape (..., sizes[0]) -> (..., sizes[-1])."""
        for i, layer in enumerate(self.layers):
            h = layer(t, self.activation(h) if i else h)
        return h
