"""`julia_function`: a vector field that is Julia code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BadOption, GradientUnavailable

if TYPE_CHECKING:
    from .calls import Held


class _Value(torch.autograd.Function):
    """One value of a Julia function, of which PyTorch knows no derivative: said when it is asked for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        raise GradientUnavailable(
            "a julia_function is differentiated by Julia's solvers, not by PyTorch: give it to odeint as f itself, "
            "with engine='julia' and adjoint=True."
        )


class JuliaFunction(nn.Module):
    """A vector field written in Julia; see `julia_function`.

    Attributes:
        source: the text.
        params: shape (m,), the parameters `p`; trained like any.
    """

    def __init__(self, source: str, params: Tensor) -> None:
        super().__init__()
        self.source = source
        self.params = nn.Parameter(params.detach().clone())

    @property
    def handle(self) -> Held:
        """The function in Julia."""
        from . import runtime  # not needed where the package is imported

        if self.source not in _compiled:
            with runtime.julia() as calls:
                try:
                    _compiled[self.source] = calls.source_function(self.source)
                except Exception as error:
                    raise BadOption(f"julia_function: Julia does not take this source: {error}") from error
        return _compiled[self.source]

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """dh/dt at one point, shape of `h`: for a look; a solve does not come this way."""
        from . import runtime

        u = h.detach().reshape(-1).contiguous()
        out = torch.zeros_like(u)
        p = self.params.detach().to(u).contiguous()
        with runtime.julia() as calls:
            calls.evaluate(self.handle, out, u, p, float(t))
        return _Value.apply(out.view_as(h), h, self.params)


_compiled: dict[str, Held] = {}


def julia_function(source: str, params: Tensor | int) -> JuliaFunction:
    """A vector field written in Julia, for `odeint(f, ..., engine="julia")`: no Python runs during the solve.

    Args:
        source: Julia code whose last expression is a function `f(du, u, p, t)` that writes dh/dt into `du`. `u` and
            `du` are vectors of the state's numbers in row-major order, `p` the parameters, `t` a Float64.
        params: shape (m,), the first values of the parameters; or m, for zeros in float64.

    Returns:
        A module with the parameter `params`. Gradients with respect to it, the state and the times are made by
        SciMLSensitivity, which differentiates the code by ReverseDiff.

    Raises:
        BadOption: Julia cannot parse or evaluate the source.
        EngineUnavailable: there is no Julia.
    """
    if isinstance(params, int):
        params = torch.zeros(params, dtype=torch.float64)
    f = JuliaFunction(source, params)
    _ = f.handle  # a mistake in the source is an error here, where it is written
    return f
