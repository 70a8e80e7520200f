"""Initial value problems with closed forms.

Each is a frozen dataclass with `f(t, h)`, `h0`, the span `t0`, `t1`, and the exact solution `exact(t)`; the states are
float64 tensors of shape (n,), and `f` and `exact` work in whatever precision they are called with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyjlode import GRADIENTS, At, Event

# The gradient methods that are not for systems of one kind alone.
GENERAL = [name for name in GRADIENTS if name != "reversible"]


@dataclass(frozen=True)
class Problem:
    """`h' = f(t, h)`, `h(t0) = h0`; `exact` takes times of any shape (*m,) to states (*m, n)."""

    name: str
    f: Callable[[Tensor, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    t0: float
    t1: float

    @property
    def h0(self) -> Tensor:
        return self.exact(torch.tensor(self.t0, dtype=torch.float64))

    def times(self, n: int, *, backward: bool = False) -> Tensor:
        """n times over the span, in either direction."""
        t = torch.linspace(self.t0, self.t1, n, dtype=torch.float64)
        return t.flip(0) if backward else t


# x' = A x with A of eigenvalues -0.3 ± 2i, -0.5.
A = torch.tensor([[-0.3, 2.0, 0.2], [-2.0, -0.3, 0.1], [0.0, 0.0, -0.5]], dtype=torch.float64)
_X0 = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)

LINEAR = Problem(
    "linear",
    lambda t, x: A.to(x) @ x,
    lambda t: torch.matrix_exp(A * t[..., None, None]) @ _X0,
    0.0,
    2.0,
)

OSCILLATOR = Problem(
    "oscillator",
    lambda t, x: torch.stack([x[1], -x[0]]),
    lambda t: torch.stack([torch.cos(t), -torch.sin(t)], -1),
    0.0,
    3.0,
)

# x' = x (1 - x).
LOGISTIC = Problem(
    "logistic",
    lambda t, x: x * (1 - x),
    lambda t: torch.stack([torch.sigmoid(t - 2), torch.sigmoid(t + 1)], -1),
    0.0,
    3.0,
)

# Bernoulli's x' = x - x³: x⁻² = 1 + c exp(-2t), with c = 3 and c = -3/4.
BERNOULLI = Problem(
    "bernoulli",
    lambda t, x: x - x**3,
    lambda t: torch.stack([(1 + 3 * torch.exp(-2 * t)) ** -0.5, (1 - 0.75 * torch.exp(-2 * t)) ** -0.5], -1),
    0.0,
    2.0,
)

# x' = cos(t) x, linear and not autonomous.
COSINE = Problem(
    "cosine",
    lambda t, x: torch.cos(t) * x,
    lambda t: torch.stack([torch.exp(torch.sin(t)), -torch.exp(torch.sin(t))], -1),
    0.0,
    3.0,
)

# Fehlberg (NASA TR R-287, 1968): nonlinear, coupled and not autonomous. Several phases at once, so that an error over
# all of them does not pass through zero by chance as the step changes. The span is of a length that powers of two, and
# three times them, divide into steps without rounding.
_PHASES = torch.tensor([0.0, 1.5, 3.0, 4.5], dtype=torch.float64)


def _fehlberg(t: Tensor, x: Tensor) -> Tensor:
    u, v = x.chunk(2)
    return 2 * t * torch.cat([u * torch.log(v), -v * torch.log(u)])


def _fehlberg_exact(t: Tensor) -> Tensor:
    phase = t[..., None] ** 2 + _PHASES
    return torch.exp(0.5 * torch.cat([torch.sin(phase), torch.cos(phase)], -1))


FEHLBERG = Problem("fehlberg", _fehlberg, _fehlberg_exact, 0.125, 1.625)

PROBLEMS = [LINEAR, OSCILLATOR, LOGISTIC, BERNOULLI, COSINE, FEHLBERG]


def max_error(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, as float64."""
    return float((a.double() - b.double()).abs().max())


def slope(xs: list[float], ys: list[float]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    x, y = [math.log(v) for v in xs], [math.log(v) for v in ys]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def rms_error(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference of two tensors."""
    return float((a.double() - b.double()).square().mean().sqrt())


def thrown_ball(theta: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, list[Event | At]]:
    """A ball with drag that bounces off a level and is pushed at a given time: f, h0, t and events for `solve`. The
    events, and one of the outputs, move with theta (6,)."""
    gravity, kept, height, output, push, strength = theta

    def f(t: Tensor, h: Tensor) -> Tensor:
        return torch.stack([h[1], -gravity - 0.1 * h[1]])

    t = torch.stack([0 * height, 0.3 + 0 * height, output, 2 + 0 * height])
    events: list[Event | At] = [
        Event(lambda t, h: h[0] - 0.01 * gravity, lambda t, h: torch.stack([h[0], -kept * h[1]]), direction=-1),
        At(push, lambda t, h: h + torch.stack([0 * strength, strength * t])),
    ]
    return f, torch.stack([height, torch.zeros_like(height)]), t, events


def robertson_batch(k: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Robertson's reaction for a batch of systems, (B, 3), with a rate constant for each, (B,)."""

    def f(t: Tensor, h: Tensor) -> Tensor:
        a, b, c = h.unbind(-1)
        first, second, third = k * a, 3e7 * b * b, 1e4 * b * c
        return torch.stack([third - first, first - second - third, second], -1)

    return f
