"""Arenstorf's orbit: a closed path about earth and moon, and what each tolerance makes of it.

    python examples/three_body.py [--quick] [--out three_body.png]

Prints the gap after one period and the drift of the energy; writes three_body.png.
"""

from __future__ import annotations

import matplotlib
import torch
from shared import COLORS, INK, STYLE, arguments
from torch import Tensor

import pyjlode
from pyjlode.plot import figure, phase_portrait

MOON = 0.012277471  # of the mass of both
PERIOD = 17.0652165601579625588917206249
H0 = torch.tensor([0.994, 0.0, 0.0, -2.00158510637908252240537862224], dtype=torch.float64)


def distances(h: Tensor) -> tuple[Tensor, Tensor]:
    x, y = h[..., 0], h[..., 1]
    return torch.hypot(x + MOON, y), torch.hypot(x - 1 + MOON, y)


def f(t: Tensor, h: Tensor) -> Tensor:
    """Hairer, Nørsett & Wanner II.0 (0.1), in the frame that turns with earth and moon."""
    x, y, u, v = h.unbind()
    earth, moon = distances(h)
    ax = x + 2 * v - (1 - MOON) * (x + MOON) / earth**3 - MOON * (x - 1 + MOON) / moon**3
    ay = y - 2 * u - (1 - MOON) * y / earth**3 - MOON * y / moon**3
    return torch.stack([u, v, ax, ay])


def energy(h: Tensor) -> Tensor:
    """Jacobi's integral, (..., 4) -> (...)."""
    x, y, u, v = h.unbind(-1)
    earth, moon = distances(h)
    return (u * u + v * v - x * x - y * y) / 2 - (1 - MOON) / earth - MOON / moon


def main(tolerances: tuple[float, ...] = (1e-5, 1e-7, 1e-9, 1e-11), out: str = "three_body.png") -> list[float]:
    with matplotlib.rc_context(STYLE):
        return study(tolerances, out)


def study(tolerances: tuple[float, ...], out: str) -> list[float]:
    t = torch.linspace(0, PERIOD, 2001, dtype=torch.float64)
    fig = figure(11, 4.6)
    left, right = fig.subplots(1, 2)
    gaps = []
    for tol, color in zip(tolerances, (COLORS[4], *COLORS[1:3], COLORS[0])):
        solution = pyjlode.solve(f, H0, t, method="dopri8", rtol=tol, atol=tol, dense=False)
        gap = float((solution.h[-1] - H0)[:2].norm())
        drift = (energy(solution.h) - energy(H0)).abs()
        print(f"rtol {tol:.0e}: {solution.stats.naccept:4} steps, gap {gap:.1e}, energy drift {float(drift.max()):.1e}")
        phase_portrait(left, solution.h, label=f"rtol {tol:.0e}", color=color, linewidth=1.6)
        right.semilogy(t[1:], drift[1:].clamp_min(1e-17), color=color, linewidth=1.6)
        gaps.append(gap)
    left.plot([-MOON, 1 - MOON], [0, 0], "o", color=INK, markersize=5)
    left.set_aspect("equal")
    left.legend(fontsize=10, loc="upper right")
    left.set(title="One period of Arenstorf's orbit", xlabel="x", ylabel="y")
    right.set_title(f"At rtol {tolerances[-1]:.0e} it closes to {gaps[-1]:.0e}")
    right.set_xlabel("t")
    right.set_ylabel("drift of the energy")
    fig.savefig(out, dpi=120)
    return gaps


if __name__ == "__main__":
    args = arguments(__doc__, "three_body", None)
    main((1e-5, 1e-7) if args.quick else (1e-5, 1e-7, 1e-9, 1e-11), str(args.out))
