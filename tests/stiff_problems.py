"""Stiff problems, and two orbits, with the solutions that are known of them.

"HW" is Hairer & Wanner, *Solving Ordinary Differential Equations II*; "Test Set" is Mazzia & Magherini, *Test Set for
Initial Value Problem Solvers*, release 2.4, University of Bari (2008), where the reference values stand. Every `f`
works on torch tensors and, with `xp=numpy` or `xp=jax.numpy`, on arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

F64 = torch.float64


def stack(xp: Any, parts: Sequence[Any]) -> Any:
    return torch.stack(list(parts)) if xp is torch else xp.array(parts)


def cat(xp: Any, parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if xp is torch else xp.concatenate(parts)


@dataclass(frozen=True)
class Stiff:
    """`h' = f(t, h)` from 0 to `t1`; `end` is h(t1), and `size` what absolute tolerances are measured in."""

    name: str
    field: Callable[..., Any]
    h0: Sequence[float]
    t1: float
    end: Sequence[float]
    size: float | Sequence[float] = 1.0

    def f(self, t: Tensor, h: Tensor) -> Tensor:
        return self.field(t, h, torch)

    def f_numpy(self, t: float, h: np.ndarray) -> np.ndarray:
        return self.field(t, h, np)

    @property
    def y0(self) -> Tensor:
        return torch.tensor(self.h0, dtype=F64)

    @property
    def times(self) -> Tensor:
        return torch.tensor([0.0, self.t1], dtype=F64)

    def atol(self, tol: float) -> Tensor:
        return tol * torch.as_tensor(self.size, dtype=F64).expand(len(self.h0)).clone()

    def error(self, h: Any, tol: float) -> float:
        """Root mean square of the error at the end in units of the tolerance, as the solvers measure it."""
        end = torch.tensor(self.end, dtype=F64)
        scale = self.atol(tol) + tol * end.abs()
        return float(((torch.as_tensor(h, dtype=F64) - end) / scale).square().mean().sqrt())


def robertson(t: Any, h: Any, xp: Any, k: Sequence[float] = (0.04, 3e7, 1e4)) -> Any:
    """Robertson (1966); HW IV.1 (1.4)."""
    return stack(xp, robertson_terms(h, k))


def robertson_terms(h: Sequence[Any], k: Sequence[Any]) -> list[Any]:
    a, b, c = h
    slow, fast, back = k[0] * a, k[1] * b * b, k[2] * b * c
    return [back - slow, slow - back - fast, fast]


def van_der_pol(mu: float) -> Callable[..., Any]:
    """x'' = mu (1 - x²) x' - x."""
    return lambda t, h, xp: stack(xp, [h[1], mu * (1 - h[0] ** 2) * h[1] - h[0]])


def van_der_pol_scaled(eps: float) -> Callable[..., Any]:
    """HW IV.10, VDPOL: eps y'' = (1 - x²) y - x, in the time of the slow phase."""
    return lambda t, h, xp: stack(xp, [h[1], ((1 - h[0] ** 2) * h[1] - h[0]) / eps])


def oregonator(t: Any, h: Any, xp: Any) -> Any:
    """Field & Noyes (1974); HW IV.10, OREGO."""
    a, b, c = h
    return stack(xp, [77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)])


def hires(t: Any, h: Any, xp: Any) -> Any:
    """Schäfer (1975); HW IV.10, HIRES."""
    a, b, c, d, e, f, g, u = h
    fuse = 280 * f * u - 1.81 * g
    return stack(
        xp,
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -280 * f * u + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            fuse,
            -fuse,
        ],
    )


_POLLUTION = [
    0.35,
    0.266e2,
    0.123e5,
    0.86e-3,
    0.82e-3,
    0.15e5,
    0.13e-3,
    0.24e5,
    0.165e5,
    0.9e4,
    0.22e-1,
    0.12e5,
    0.188e1,
]
_POLLUTION += [
    0.163e5,
    0.48e7,
    0.35e-3,
    0.175e-1,
    0.1e9,
    0.444e12,
    0.124e4,
    0.21e1,
    0.578e1,
    0.474e-1,
    0.178e4,
    0.312e1,
]


def pollution(t: Any, h: Any, xp: Any) -> Any:
    """Verwer (1994): 25 reactions of 20 substances; Test Set, POLLU."""
    y = [0.0, *h]  # both are counted from 1
    products = [y[1], y[2] * y[4], y[5] * y[2], y[7], y[7], y[7] * y[6], y[9], y[9] * y[6], y[11] * y[2], y[11] * y[1]]
    products += [y[13], y[10] * y[2], y[14], y[1] * y[6], y[3], y[4], y[4], y[16], y[16], y[17] * y[6], y[19], y[19]]
    products += [y[1] * y[4], y[19] * y[1], y[20]]
    r = [0.0, *(k * x for k, x in zip(_POLLUTION, products))]
    return stack(
        xp,
        [
            r[2] + r[3] + r[9] + r[11] + r[12] + r[22] + r[25] - r[1] - r[10] - r[14] - r[23] - r[24],
            r[1] + r[21] - r[2] - r[3] - r[9] - r[12],
            r[1] + r[17] + r[19] + r[22] - r[15],
            r[15] - r[2] - r[16] - r[17] - r[23],
            2 * r[4] + r[6] + r[7] + r[13] + r[20] - r[3],
            r[3] + 2 * r[18] - r[6] - r[8] - r[14] - r[20],
            r[13] - r[4] - r[5] - r[6],
            r[4] + r[5] + r[6] + r[7],
            -r[7] - r[8],
            r[7] + r[9] - r[12],
            r[8] + r[11] - r[9] - r[10],
            r[9],
            r[10] - r[11],
            r[12] - r[13],
            r[14],
            r[16] - r[18] - r[19],
            -r[20],
            r[20],
            r[23] + r[25] - r[21] - r[22] - r[24],
            r[24] - r[25],
        ],
    )


def stiff_oscillation(t: Any, h: Any, xp: Any) -> Any:
    """The smooth solution that two components with eigenvalues -10 ± 10000i follow."""
    a, b = h[0] - xp.cos(t), h[1]
    return stack(xp, [-10 * a - 1e4 * b, 1e4 * a - 10 * b])


def akzo_nobel(t: Any, h: Any, xp: Any) -> Any:
    """Test Set, CHEMAKZO: five differential equations and an algebraic one for the last component."""
    a, b, c, d, e, g = h
    root = abs(b) ** 0.5
    r = [18.7 * a**4 * root, 0.58 * c * d, 0.58 / 34.4 * a * e, 0.09 * a * d**2, 0.42 * g**2 * root]
    inflow = 3.3 * (0.9 / 737 - b)
    return stack(
        xp,
        [
            r[1] - 2 * r[0] - r[2] - r[3],
            inflow - 0.5 * r[0] - r[3] - 0.5 * r[4],
            r[0] - r[1] + r[2],
            r[2] - r[1] - 2 * r[3],
            r[1] - r[2] + r[4],
            115.83 * a * d - g,
        ],
    )


def arenstorf(t: Any, h: Any, xp: Any) -> Any:
    """The restricted problem of three bodies in the frame of earth and moon; Hairer, Nørsett & Wanner II.0 (0.1)."""
    x, y, u, v = h
    mu = 0.012277471
    earth, moon = ((x + mu) ** 2 + y * y) ** 1.5, ((x - 1 + mu) ** 2 + y * y) ** 1.5
    ax = x + 2 * v - (1 - mu) * (x + mu) / earth - mu * (x - 1 + mu) / moon
    return stack(xp, [u, v, ax, y - 2 * u - (1 - mu) * y / earth - mu * y / moon])


def two_body(t: Any, h: Any, xp: Any) -> Any:
    x, y, u, v = h
    cubed = (x * x + y * y) ** 1.5
    return stack(xp, [u, v, -x / cubed, -y / cubed])


def brusselator(t: Any, h: Any, xp: Any) -> Any:
    """One-dimensional, with diffusion 1/50; HW IV.1 (1.6')."""
    n = len(h) // 2
    u, v = h[:n], h[n:]
    one, three = cat(xp, [u[:1] * 0 + 1]), cat(xp, [u[:1] * 0 + 3])
    alpha = (n + 1) ** 2 / 50
    reaction = u * u * v
    spread_u = cat(xp, [u[1:], one]) - 2 * u + cat(xp, [one, u[:-1]])
    spread_v = cat(xp, [v[1:], three]) - 2 * v + cat(xp, [three, v[:-1]])
    return cat(xp, [1 + reaction - 4 * u + alpha * spread_u, 3 * u - reaction + alpha * spread_v])


def brusselator_start(n: int) -> list[float]:
    x = np.arange(1, n + 1) / (n + 1)
    return [*(1 + np.sin(2 * np.pi * x)).tolist(), *[3.0] * n]


def heat(t: Any, h: Any, xp: Any) -> Any:
    """u_t = u_xx on (0, 1), u = 0 at both ends, by the method of lines."""
    zero = h[:1] * 0
    return (len(h) + 1) ** 2 * (cat(xp, [h[1:], zero]) - 2 * h + cat(xp, [zero, h[:-1]]))


def heat_modes(n: int, t: float) -> list[float]:
    """The exact solution of the semi-discrete system from sin(πx) + sin(3πx): each mode decays with its eigenvalue."""
    x = np.arange(1, n + 1) / (n + 1)
    rate = [4 * (n + 1) ** 2 * math.sin(k * math.pi / (2 * (n + 1))) ** 2 for k in (1, 3)]
    return sum(math.exp(-r * t) * np.sin(k * np.pi * x) for k, r in zip((1, 3), rate)).tolist()


_HIRES = [0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4, 0.1175651343283149e-2]
_HIRES += [0.2386356198831331e-2, 0.6238968252742796e-2, 0.2849998395185769e-2, 0.2850001604814231e-2]
_ORBIT = [0.994, 0.0, 0.0, -2.00158510637908252240537862224]
_ELLIPSE = [0.1, 0.0, 0.0, math.sqrt(19.0)]  # e = 0.9, period 2π

ROBERTSON_40 = Stiff(
    "Robertson, t = 40",
    robertson,
    [1.0, 0.0, 0.0],
    40.0,
    [0.7158270687193941, 0.9185534764558135e-5, 0.2841637457458413],
    [1.0, 1e-4, 1.0],
)
ROBERTSON = Stiff(
    "Robertson, t = 1e11",
    robertson,
    [1.0, 0.0, 0.0],
    1e11,
    [0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050],
    [1e-8, 1e-14, 1e-6],
)
VAN_DER_POL = Stiff(
    "van der Pol, mu = 1e3", van_der_pol(1e3), [2.0, 0.0], 2e3, [1.706167732170483, -0.8928097010247975e-3], [1.0, 1e-3]
)
VAN_DER_POL_SCALED = Stiff(
    "van der Pol, eps = 1e-6", van_der_pol_scaled(1e-6), [2.0, 0.0], 2.0, [1.706167732170469, -0.8928097010248125]
)
OREGONATOR = Stiff(
    "Oregonator",
    oregonator,
    [1.0, 2.0, 3.0],
    360.0,
    [1.000814870318523, 1228.178521549917, 132.0554942846706],
)
HIRES = Stiff("HIRES", hires, [1.0, 0, 0, 0, 0, 0, 0, 0.0057], 321.8122, _HIRES, 1e-3)
ARENSTORF = Stiff("Arenstorf orbit", arenstorf, _ORBIT, 17.0652165601579625588917206249, _ORBIT)
TWO_BODY = Stiff("two bodies, e = 0.9", two_body, _ELLIPSE, 20 * math.pi, _ELLIPSE)
HEAT = Stiff("heat equation, N = 100", heat, heat_modes(100, 0.0), 0.2, heat_modes(100, 0.2))
_POLLUTED = [0.0, 0.2, 0.0, 0.04, 0.0, 0.0, 0.1, 0.3, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.007, 0.0, 0.0, 0.0]
_POLLUTED_END = [
    0.056462554800228,
    0.13424841304223403,
    4.13973433109945e-09,
    0.005523140207484385,
    2.0189772623022063e-07,
    1.4645418634939668e-07,
    0.07784249118998017,
    0.3245075353396029,
    0.007494013383880408,
    1.622293157301561e-08,
    1.1358638332570753e-08,
    0.002230505975721273,
    0.00020871628827986513,
    1.3969210168401543e-05,
    0.008964884856898345,
    4.352846369330124e-18,
    0.006899219696263414,
    0.00010078030373659356,
    1.7721465139699952e-06,
    5.682943292316458e-05,
]
POLLUTION = Stiff("pollution", pollution, _POLLUTED, 60.0, _POLLUTED_END, 1e-3)
_AKZO_END = [0.1150794920661702, 0.1203831471567715e-2, 0.1611562887407974, 0.3656156421249283e-3]
_AKZO_END += [0.1708010885264404e-1, 0.4873531310307455e-2]
AKZO_NOBEL = Stiff(
    "Akzo Nobel", akzo_nobel, [0.444, 0.00123, 0.0, 0.007, 0.0, 115.83 * 0.444 * 0.007], 180.0, _AKZO_END, 1e-2
)  # with the mass matrix diag(1, 1, 1, 1, 1, 0)
# What is known of the end is SciPy's Radau at rtol 1e-12.
VAN_DER_POL_STIFFER = Stiff(
    "van der Pol, mu = 1e5",
    van_der_pol(1e5),
    [2.0, 0.0],
    1e5,
    [-1.8633844657157572, 7.537348147930202e-06],
    [1.0, 1e-5],
)
STIFF = [ROBERTSON_40, ROBERTSON, VAN_DER_POL, VAN_DER_POL_SCALED, OREGONATOR, HIRES, HEAT, POLLUTION]
