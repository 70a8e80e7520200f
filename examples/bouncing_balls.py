"""Throw three balls so that each lands in a cup, by way of the floor and a wall: gradients through the bounces.

    python examples/bouncing_balls.py [--quick] [--out bouncing_balls.png]

A ball flies with air drag. Floor and wall are events: each takes part of the speed away and turns it round. The throw,
two numbers, is found by Newton's method from where the ball comes down for the second time. That point moves with the
throw through every bounce before it, and with the times at which they happen. A rubber ball, a tennis ball and a clay
ball keep different parts of their speed, and need different throws.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import torch
from shared import COLORS, INK, SHADE, STYLE, arguments, headline, table
from torch import Tensor

import pyjlode
from pyjlode import Event, Solution, plot

G, DRAG = 9.81, 0.02  # m/s², 1/m
WALL, CUP, HAND = 4.0, 2.0, 1.5  # m
KEPT = {"rubber": 0.9, "tennis": 0.75, "clay": 0.55}  # of the speed, at a bounce
RADIUS = 0.1  # of the cup


def flight(t: Tensor, h: Tensor) -> Tensor:
    """h = (x, y, x', y')."""
    v = h[2:]
    return torch.cat([v, -DRAG * v.norm() * v - G * torch.tensor([0.0, 1.0], dtype=h.dtype)])


def throw(v: Tensor, kept: float, *, dense: bool = False) -> Solution:
    """A throw with the velocity v, (2,), up to its second meeting with the floor."""
    along = torch.tensor([1, 1, 0.9, -kept], dtype=v.dtype)  # the floor: some of the speed along it is lost, too
    across = torch.tensor([1, 1, -kept, 0.9], dtype=v.dtype)
    floor = Event(lambda t, h: h[1], lambda t, h: h * along, direction=-1, terminal=2)
    wall = Event(lambda t, h: h[0] - WALL, lambda t, h: h * across, direction=1)
    h0 = torch.cat([v.new_tensor([0.0, HAND]), v])
    how = {"adjoint": True, "rtol": 1e-8, "atol": 1e-8}
    return pyjlode.solve(flight, h0, [0.0, 10.0], events=[floor, wall], dense=dense, **how)


class Found(NamedTuple):
    """A throw that was found.

    Attributes:
        v: (2,), in m/s. misses: distance from the cup by iteration, in m. tried: the throws on the way.
    """

    v: Tensor
    misses: list[float]
    tried: list[Tensor]


def find(kept: float, steps: int) -> Found:
    v = torch.tensor([5.0, 1.0], dtype=torch.float64)
    misses, tried = [], []
    for _ in range(steps):
        v.requires_grad_()
        miss = throw(v, kept).h[-1, 0] - CUP
        (slope,) = torch.autograd.grad(miss, v)
        misses.append(abs(float(miss.detach())))
        tried.append(v.detach())
        v = tried[-1] - float(miss.detach()) * slope / slope.dot(slope)  # of all that hit, to first order, the nearest
    return Found(tried[-1], misses, tried)


def main(argv: Sequence[str] | None = None) -> dict[str, Found]:
    """Find the throws, print and draw them."""
    args = arguments(__doc__, "bouncing_balls", argv)
    found = {name: find(kept, 4 if args.quick else 8) for name, kept in KEPT.items()}
    rows = [[n, KEPT[n], *f.v.tolist(), f.misses[0], f.misses[-1]] for n, f in found.items()]
    print(table(["ball", "keeps", "vx (m/s)", "vy", "first miss (m)", "last miss"], rows))
    with matplotlib.rc_context(STYLE):
        draw(found, args)
    return found


def path(v: Tensor, kept: float) -> Tensor:
    """The way of the ball to its second bounce, (M, 2)."""
    with torch.no_grad():
        solution = throw(v, kept, dense=True)
        return solution.interpolate(torch.linspace(0, float(solution.t[-1]), 600, dtype=torch.float64))[:, :2]


def draw(found: dict[str, Found], args: argparse.Namespace) -> None:
    canvas = plot.figure(12, 4.2)
    left, right = canvas.subplots(1, 2, width_ratios=[2.1, 1])
    left.axvspan(WALL, WALL + 0.12, color=INK, lw=0)
    left.axhspan(-0.08, 0, color=INK, lw=0)
    left.axvspan(CUP - RADIUS, CUP + RADIUS, ymax=0.16, color=SHADE, lw=0)
    left.text(CUP, 0.44, "cup", ha="center", color=INK)
    for (name, f), color in zip(found.items(), COLORS):
        for v in f.tried[:3]:
            left.plot(*path(v, KEPT[name]).T, color=color, lw=0.8, alpha=0.35)
        left.plot(*path(f.v, KEPT[name]).T, color=color, lw=1.8, label=f"{name}, keeps {KEPT[name]:.0%}")
        right.semilogy(f.misses, color=color, marker="o", ms=4)
    left.plot(0, HAND, "o", color=INK, ms=6)
    left.set(xlabel="x (m)", ylabel="y (m)", xlim=(-0.15, WALL + 0.12), ylim=(-0.08, 2.4))
    left.legend(loc="upper left", ncols=3, frameon=False)
    right.axhline(RADIUS, color=SHADE, lw=2, zorder=0)
    right.set(xlabel="iteration", ylabel="distance from the cup (m)")
    right.text(len(f.misses) - 1, 1.3 * RADIUS, "the cup's radius", ha="right", va="bottom", color=INK, fontsize=10)
    far = max(f.misses[-1] for f in found.values())
    headline(canvas, f"Gradients through bounces: three throws come down in the cup, to within {far:.0e} m")
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
