"""Steps of many systems at once, each from a time of its own and of its own length.

States are flat, (n,) for B systems of d numbers, n = B d; what there is one of for each system is (B,).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ... import numbers
from ...arguments import system_norms
from ...problem import ODEProblem, SystemsLayout
from .. import interpolation
from ..step import numpy_dtype


class Spans(NamedTuple):
    """The intervals of time of a step, one for each system: float64 on the host.

    Attributes:
        t0, dt: (B,) starts and signed lengths; a system that rests has dt = 0.
        after, before: (B,) whether f jumps at the start, or at the end; None where it jumps nowhere.
        at, reach: the first two as tensors with a graph back to the user's t; None where that is not wanted.
    """

    t0: np.ndarray
    dt: np.ndarray
    after: np.ndarray | None = None
    before: np.ndarray | None = None
    at: Tensor | None = None
    reach: Tensor | None = None

    def times(
        self, C: np.ndarray, like: Tensor, shape: tuple[int, ...] | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The times t0 + C dt as f sees them, of `shape`, by default (B,), and the lengths, (B, 1), of the state's
        dtype and device."""
        dtype, B = numpy_dtype(like), len(self.t0)
        shape = shape or (B,)
        values: Any = np.multiply.outer(C, self.dt)
        values += self.t0
        if dtype is not np.float64:
            values = values.astype(dtype)
        if self.before is not None:
            self.inside(values, C, dtype)
        if self.at is None or self.reach is None:
            reach = self.dt if dtype is np.float64 else self.dt.astype(dtype)
            times, dt = torch.from_numpy(values.reshape(-1, *shape)), torch.from_numpy(reach[:, None])
            if like.device.type != "cpu":
                times, dt = times.to(like.device), dt.to(like.device)
            return times.unbind(), dt
        exact = (self.at + torch.from_numpy(C).to(self.at)[:, None] * self.reach).to(like)
        shift = torch.from_numpy(values).to(like) - numbers.constant(exact)
        return (exact + shift).view(-1, *shape).unbind(), self.reach.to(like)[:, None]

    def inside(self, values: Any, C: np.ndarray, dtype: Any) -> None:
        """Next to a jump of f times move by one rounding unit into the step, as in `step.stage_times`."""
        first, last = self.t0.astype(dtype), (self.t0 + self.dt).astype(dtype)
        moving = self.dt != 0
        for i, c in enumerate(C):
            if self.after is not None and c == 0:
                values[i] = np.where(self.after & moving, np.nextafter(first, last), values[i])
            if self.before is not None and c >= 1:
                values[i] = np.where(self.before & moving, np.nextafter(last, first), values[i])

    def fraction(self, systems: np.ndarray, times: Tensor) -> Tensor:
        """Where `times` (P,) lie in the steps of `systems` (P,), as float64 fractions."""
        times = times.to(torch.float64)
        if self.at is None or self.reach is None:
            t0, dt = (torch.from_numpy(x[systems]).to(times.device) for x in (self.t0, self.dt))
        else:
            index = torch.from_numpy(systems).to(self.at.device)
            t0, dt = self.at[index].to(times.device), self.reach[index].to(times.device)
        return (times - t0) / dt


class Step(Protocol):
    """One step of all systems.

    Attributes:
        y, y1: (n,) at the starts and the ends.
    """

    spans: Spans
    y: Tensor
    y1: Tensor

    def pieces(self, systems: Tensor) -> Tensor:
        """What the dense output of some systems, (P,), is made of: (P, rows, d)."""
        ...


class Maker(Protocol):
    """Makes steps of one method.

    Attributes:
        P: (rows, q) float64, dense output: y(t0 + θ dt) = y + Σ_i pieces[i] Σ_j P[i, j] θ^(j+1).
        order: of the local error. fsal: whether an attempt gives the slope at its end.
    """

    P: Tensor
    order: int

    def start(self, k0: Tensor) -> None: ...

    def attempt(self, spans: Spans, y: Tensor, *, recorded: bool = False) -> tuple[Step, np.ndarray]: ...

    def accept(self, step: Any, accepted: np.ndarray | None, mask: Tensor | None, t: Spans, y: Tensor) -> None: ...

    def again(self, spans: Spans, y: Tensor) -> Step: ...


def between(maker: Maker, step: Step, systems: np.ndarray, times: Tensor) -> Tensor:
    """Dense output of a step: (P,) systems at (P,) times, a graph included -> (P, d)."""
    index = torch.from_numpy(systems).to(step.y.device)
    y = step.y.view(len(step.spans.t0), -1)[index]
    return polynomial(maker.P, y, step.pieces(index), step.spans.fraction(systems, times))


def polynomial(P: Tensor, y: Tensor, pieces: Tensor, theta: Tensor) -> Tensor:
    """y (P, d), pieces (P, rows, d), theta (P,) -> (P, d)."""
    weights = (interpolation.powers(theta.to(P.device), P.shape[1]) @ P.T).to(y)
    return y + torch.bmm(weights[:, None], pieces)[:, 0]


def slopes(P: Tensor, pieces: Tensor, theta: Tensor, dt: Tensor) -> Tensor:
    """dy/dt of the same: (P, d)."""
    degree = P.shape[1]
    theta = theta.to(P.device)
    powers = torch.cat([torch.ones_like(theta)[:, None], interpolation.powers(theta, degree)[:, :-1]], 1)
    rates = powers * torch.arange(1, degree + 1, dtype=theta.dtype, device=theta.device)
    weights = (rates @ P.T / dt.to(P.device)[:, None]).to(pieces)
    return torch.bmm(weights[:, None], pieces)[:, 0]


# Numbers of a state up to which NumPy has the norms sooner than PyTorch, whose calls take longer.
_SMALL = 4096


class Errors:
    """The norm of an error over the tolerance, for each system."""

    def __init__(self, p: ODEProblem) -> None:
        self.p, self.B = p, p.batch
        self.norms = system_norms(p.layout, p.batch)
        small = 0 < p.y0.numel() <= _SMALL and p.y0.device.type == "cpu" and not p.transformed
        self.plain = small and not (isinstance(p.layout, SystemsLayout) and len(p.layout.widths) > 1)
        if self.plain:
            self.rtol, self.atol = (x.numpy() if isinstance(x, Tensor) else x for x in (p.rtol, p.atol))

    def of_step(self, errors: list[Tensor], y: Tensor, y1: Tensor) -> list[np.ndarray]:
        """The norms of estimates of the error of a step from y to y1, (n,) each: (B,) float64 on the host."""
        if not self.plain:
            scale = self.scale(y, y1)
            return [self(error, scale) for error in errors]
        scale = np.maximum(np.abs(y.detach().numpy()), np.abs(y1.detach().numpy()))
        scale *= self.rtol
        scale += self.atol
        norms = []
        for error in errors:
            x = (error.detach().numpy() / scale).reshape(self.B, -1)
            norms.append(np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1]).astype(np.float64, copy=False))
        return norms

    def scale(self, y: Tensor, y1: Tensor) -> Tensor:
        scale = torch.maximum(y.abs(), y1.abs())
        if self.p.transformed:
            return scale * self.p.rtol + self.p.atol
        return scale.mul_(self.p.rtol).add_(self.p.atol)

    def __call__(self, error: Tensor, scale: Tensor) -> np.ndarray:
        """(n,), (n,) -> (B,) float64 on the host."""
        return host(self.norms((error / scale).view(self.B, -1)))


def host(x: Tensor) -> np.ndarray:
    """(B,) as float64 on the host; where `vmap` hides several of them, the largest."""
    if numbers.transformed():
        x = numbers.rows(x)
        with numbers.outside():
            return x.amax(0).cpu().double().numpy()
    return x.detach().to("cpu", torch.float64).numpy()
