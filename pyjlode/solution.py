"""What a solve returns: the states, the dense output, and an account of the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Stats:
    """An account of one solve.

    Attributes:
        engine: "torch" or "julia".
        reason: why this engine.
        method: name of the solver.
        nfe: evaluations of f in the forward solve.
        naccept, nreject: accepted and rejected steps.
        njac: Jacobians of f (implicit methods).
        nlu: LU factorisations; one of a batch of systems counts once (adaptive implicit methods).
        nnewton: Newton iterations, of all stages together (adaptive implicit methods with iterations).
        switches: `(t, name)` where `method="auto"` went over to another method.
        wall: seconds for the forward solve.
        nfe_backward: evaluations of f in backward passes through this solve so far (each with its product).
        wall_backward: seconds for these backward passes.
    """

    engine: str
    reason: str
    method: str
    nfe: int = 0
    naccept: int = 0
    nreject: int = 0
    njac: int = 0
    nlu: int = 0
    nnewton: int = 0
    switches: list[tuple[float, str]] = field(default_factory=list)
    wall: float = 0.0
    nfe_backward: int = 0
    wall_backward: float = 0.0


@dataclass
class Solution:
    """The solution of an initial value problem.

    Attributes:
        t: shape (T,): the times asked for; with an event, `[t0, event_t]`.
        h: the states there: the pytree of `h0` with (T, ...) in front of each leaf's shape.
        stats: the account of the work.
        event_t: 0-d time of the event, differentiable; None without one.
    """

    t: Tensor
    h: Any
    stats: Stats
    event_t: Tensor | None = None
    _interpolant: Callable[[Tensor], Any] | None = None

    def interpolate(self, t: Tensor | float) -> Any:
        """The state at other times within the span, from the solver's dense output.

        Args:
            t: a float, or a tensor of shape () or (M,), between the first and the last time of the solve.

        Returns:
            The pytree of `h0`; with (M, ...) in front of each leaf's shape where `t` has shape (M,).

        Raises:
            BadTime: `t` lies outside the span.
            BadOption: the solve was asked not to keep its dense output.
            GradientUnavailable: the solve has an adjoint, which knows nothing of these times, and gradients are on.
        """
        from .errors import BadOption

        if self._interpolant is None:
            raise BadOption("this solve kept no dense output; call solve(..., dense=True).")
        return self._interpolant(torch.as_tensor(t))
