"""`NeuralODE`: a layer that is the solution of a differential equation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .. import arguments, mistakes
from ..errors import BadOption, BadShape, BadTime
from ..odeint import odeint, solve
from ..solution import Stats
from ..solver import check


class NeuralODE(nn.Module):
    """A layer: the state at `t[0]` goes in, and the state at `t[-1]`, or the trajectory, comes out.

    Trained like any other layer; gradients flow to the parameters of `f`, to `h0`, and to times given to `forward`.

    Args:
        f: `f(t, h) -> dh/dt` as in `pyjlode.odeint`. If it is a module, its parameters are the layer's.
        t: at least two times, strictly increasing or decreasing, at which `forward` solves if it is given none; kept as
            Python floats, so that `.to(...)` does not round them.
        return_trajectory: give the states at all of `t`, not only at the last.
        augment: zeros appended to the last dimension of `h0`, a single tensor. In the plane the paths of an ODE cannot
            cross; with room beside it they need not. `f` and the result have the wider last dimension.
        solver_options: keyword arguments for `pyjlode.solve`: `method`, `rtol`, `atol`, `adjoint`, `options` ... .
            `adjoint` is True here if nothing else is said.

    Attributes:
        stats: the account of the last call, a `pyjlode.Stats`; None before the first. Backward passes through that call
            add to it.

    Raises:
        BadOption: `augment` is negative.
        BadTime: `t` requires grad. Give such times to `forward`.
        TypeError: `solver_options` has a name that `pyjlode.solve` does not know.
        What `pyjlode.Solver` raises: they say something that is wrong for every state.

    Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018; augmentation is
    Dupont, Doucet & Teh, Augmented neural ODEs, 2019.
    """

    def __init__(
        self,
        f: Callable[[Tensor, Any], Any],
        t: Tensor | Sequence[float] = (0.0, 1.0),
        *,
        return_trajectory: bool = False,
        augment: int = 0,
        **solver_options: Any,
    ) -> None:
        super().__init__()
        if isinstance(t, Tensor) and t.requires_grad:
            raise BadTime("NeuralODE keeps t as numbers, and this t requires grad: give it to forward(h0, t) instead.")
        if augment < 0:
            raise BadOption(f"augment is how many zeros to append; got {augment}.")
        # A misspelt option is an error here, where it is written, not in the first training step.
        solver_options = mistakes.with_options(solver_options, arguments.KEYWORDS)
        inspect.signature(odeint).bind(f, None, None, **solver_options)
        check({"adjoint": True, **solver_options})
        if solver_options.get("adjoint_params") is not None:
            solver_options["adjoint_params"] = list(solver_options["adjoint_params"])
        self.f = f
        self.t = tuple(float(x) for x in t)
        self.return_trajectory = return_trajectory
        self.augment = augment
        self.solver_options: dict[str, Any] = {"adjoint": True, **solver_options}
        self.stats: Stats | None = None

    def forward(self, h0: Any, t: Tensor | Sequence[float] | None = None) -> Any:
        """Solve from `h0`.

        Args:
            h0: the state at `t[0]`: a tensor, e.g. of shape (batch, features), or a pytree of tensors.
            t: shape (T,), other times for this call; a tensor or a sequence of floats. With
                `options={"batch_dims": 1}` among the `solver_options` also (batch, T), times for each sample.

        Returns:
            Like `h0`: the state at `t[-1]`. With `return_trajectory`, (T, ...) in front of each leaf's shape. With
            `augment`, the last dimension is that much longer.

        Raises:
            BadShape: `augment` was asked for and `h0` is not a tensor with a last dimension.
            What `pyjlode.solve` raises.
        """
        if self.augment:
            if not isinstance(h0, Tensor) or h0.dim() == 0:
                what = "a scalar" if isinstance(h0, Tensor) else f"a {type(h0).__name__}"
                raise BadShape(f"augment appends to the last dimension of a tensor; h0 is {what}.")
            h0 = F.pad(h0, (0, self.augment))
        solution = solve(self.f, h0, self.t if t is None else t, dense=False, **self.solver_options)
        self.stats = solution.stats
        return solution.h if self.return_trajectory else pytree.tree_map(lambda x: x[-1], solution.h)

    @property
    def nfe(self) -> int:
        """Evaluations of `f` in the last call; 0 before the first."""
        return 0 if self.stats is None else self.stats.nfe

    @property
    def nfe_backward(self) -> int:
        """Evaluations of `f` in backward passes through the last call so far."""
        return 0 if self.stats is None else self.stats.nfe_backward

    def extra_repr(self) -> str:
        span = f"t={self.t}" if len(self.t) < 5 else f"t=({self.t[0]}, ..., {self.t[-1]}) of length {len(self.t)}"
        options = "".join(f", {name}={value!r}" for name, value in self.solver_options.items())
        augment = f", augment={self.augment}" if self.augment else ""
        return f"{span}, return_trajectory={self.return_trajectory}{augment}{options}"
