"""Fields of mechanics: the motion that follows from an energy, or from a Lagrangian, that a network may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import BadShape
from ..systems import SecondOrder


class HamiltonianNN(nn.Module):
    """The field of Hamilton's equations, `q' = dH/dp`, `p' = -dH/dq`: along its solutions H does not change.

    `odeint(HamiltonianNN(H), h0, t)`, for a state of shape (..., 2 D), the D coordinates first and then the D momenta.

    Args:
        H: `H(h)`, (..., 2 D) -> (...) or (..., 1), the energy of each row by itself; a module, or any function of
            PyTorch's that is smooth (`nn.Tanh`, `nn.Softplus`, not `nn.ReLU`).

    Raises:
        BadShape: in the solve, where the last dimension of the state is odd, or H gives another shape.

    Source: Greydanus, Dzamba & Yosinski, Hamiltonian neural networks, 2019.
    """

    def __init__(self, H: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.H = H

    def energy(self, h: Tensor) -> Tensor:
        """(..., 2 D) -> (...).

        Raises:
            BadShape: H gives another shape.
        """
        return _scalar(self.H(h), h.shape[:-1], "H")

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """(t, (..., 2 D)) -> (..., 2 D)."""
        if h.dim() == 0 or h.shape[-1] % 2:
            raise BadShape(
                "the state of HamiltonianNN has the shape (..., 2 D), coordinates and then momenta; got "
                f"{tuple(h.shape)}."
            )
        by_q, by_p = torch.func.grad(lambda h: self.energy(h).sum())(h).chunk(2, -1)
        return torch.cat([by_p, -by_q], -1)


class LagrangianNN(SecondOrder):
    """The field of the Euler-Lagrange equations, for a state that is the pair `(q, v)` of coordinates and velocities.

    `odeint(LagrangianNN(L), (q0, v0), t)`. It solves `(d²L/dv²) v' = dL/dq - (d²L/dv dq) v` for the acceleration, so
    that the coordinates may be any (angles, for example), and no momenta have to be known.

    Args:
        L: `L(q, v)`, two tensors (..., D) -> (...) or (..., 1): kinetic less potential energy of each row by itself; a
            module or any function of PyTorch's that is smooth and that `torch.func.vmap` takes. Its second derivative
            by v must be regular.

    Raises:
        BadShape: in the solve, where the state is no such pair, or L gives another shape.

    Source: Cranmer, Greydanus, Hoyer, Battaglia, Spergel & Ho, Lagrangian neural networks, 2020, equation 6.
    """

    def __init__(self, L: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(self._acceleration)
        self.L = L

    def energy(self, q: Tensor, v: Tensor) -> Tensor:
        """`v · dL/dv - L`, (...): what does not change along a solution."""

        def lagrangian(v: Tensor) -> tuple[Tensor, Tensor]:
            value = _scalar(self.L(q, v), q.shape[:-1], "L")
            return value.sum(), value

        momentum, value = torch.func.grad(lagrangian, has_aux=True)(v)
        return (v * momentum).sum(-1) - value

    def _acceleration(self, t: Tensor, q: Tensor, v: Tensor) -> Tensor:
        if not isinstance(q, Tensor) or q.dim() == 0:
            raise BadShape("the state of LagrangianNN is a pair of tensors (q, v) of shape (..., D).")

        def one(q: Tensor, v: Tensor) -> Tensor:
            def value(q: Tensor, v: Tensor) -> Tensor:
                return _scalar(self.L(q, v), (), "L")

            momentum = torch.func.grad(value, argnums=1)
            by_q, by_v = torch.func.jacrev(momentum, argnums=(0, 1))(q, v)
            return torch.linalg.solve(by_v, torch.func.grad(value)(q, v) - by_q @ v)

        D = q.shape[-1]
        return torch.func.vmap(one)(q.reshape(-1, D), v.reshape(-1, D)).reshape(q.shape)


def _scalar(value: Tensor, rows: tuple[int, ...], name: str) -> Tensor:
    """What H or L gave, one number for each row."""
    if value.shape == (*rows, 1):
        return value[..., 0]
    if value.shape != rows:
        raise BadShape(f"{name} must give one number for each row, shape {tuple(rows)}; it gave {tuple(value.shape)}.")
    return value
