"""`ResNetBlock`: what a neural ODE is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ResNetBlock(nn.Module):
    """A residual block `h + f(t, h)`: one Euler step, of length one, of the ODE that `f` is the field of.

    A stack of them, each with a field of its own, is the residual network that `NeuralODE(f)` is the limit of.

    Args:
        f: `f(t, h) -> dh/dt` as in `pyjlode.odeint`.
        t: the time that `f` is called with.

    Source: He, Zhang, Ren & Sun, Deep residual learning for image recognition, 2015; as an Euler step, Chen, Rubanova,
    Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, equation 1.
    """

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], t: float = 0.0) -> None:
        super().__init__()
        self.f = f
        self.t = float(t)

    def forward(self, h: Tensor) -> Tensor:
        """`h` of any shape that `f` takes -> the same shape."""
        return h + self.f(torch.tensor(self.t, dtype=h.dtype, device=h.device), h)
