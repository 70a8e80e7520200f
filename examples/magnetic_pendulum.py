"""A pendulum above three magnets: where it comes to rest, for each of thousands of starts, shared out over processes.

python examples/magnetic_pendulum.py               on two processes of this machine; writes magnetic_pendulum.png
python examples/magnetic_pendulum.py --quick       fewer starts
python examples/magnetic_pendulum.py --dask HOST:PORT       on the workers of a Dask cluster
python examples/magnetic_pendulum.py --resume      keep what is done, and go on from there next time
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from shared import COLORS, STYLE, headline, parsed, parser
from torch import Tensor

import pyjlode
from pyjlode.plot import figure

ANGLES = torch.tensor([90.0, 210.0, 330.0], dtype=torch.float64) * math.pi / 180
MAGNETS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # at a distance of 1 from the point below the pivot
HEIGHT, FRICTION, RESTORING = 0.3, 0.2, 0.5
END = 40.0


def f(t: Tensor, h: Tensor) -> Tensor:
    """Position and velocity of many pendulums, (B, 4): each magnet pulls as 1/d², the rod back to the middle."""
    x, v = h[:, :2], h[:, 2:]
    to = MAGNETS - x[:, None]  # (B, 3, 2)
    d = (to.square().sum(-1) + HEIGHT**2).sqrt()
    pull = (to / d[..., None] ** 3).sum(1)
    return torch.cat([v, pull - FRICTION * v - RESTORING * x], 1)


def starts(n: int, width: float) -> Tensor:
    """n × n pendulums at rest, (n², 4), row by row from below."""
    x = torch.linspace(-width, width, n, dtype=torch.float64)
    y, x = torch.meshgrid(x, x, indexing="ij")
    return torch.stack([x.reshape(-1), y.reshape(-1), *torch.zeros(2, n * n, dtype=torch.float64)], 1)


def main(n: int = 200, executor: Any = 2, keep: str | Path | None = None, out: str = "magnetic_pendulum.png") -> Tensor:
    start = time.perf_counter()
    made = pyjlode.ensemble(
        f,
        starts(n, 2.0),
        [0.0, END],
        executor=executor,
        directory=keep,
        progress=True,
        method="tsit5",
        rtol=1e-5,
        atol=1e-5,
    )
    wall = time.perf_counter() - start
    distances = torch.cdist(made.h[-1, :, :2], MAGNETS)
    nearest = distances.argmin(1)
    steps = made.naccept.double()
    print(
        f"{n * n} pendulums in {wall:.1f} s, {n * n / wall:.0f} a second; {made.naccept.min()} to {made.naccept.max()} "
        f"steps; {100 * float((distances.amin(1) < 0.1).double().mean()):.1f} % at rest at a magnet"
    )
    # Darker where the way was harder: more steps.
    low, high = steps.quantile(0.2), steps.quantile(0.98)
    shade = 1 - 0.6 * ((steps - low) / (high - low)).clamp(0, 1)
    colors = torch.tensor([matplotlib.colors.to_rgb(color) for color in COLORS[:3]], dtype=torch.float64)
    image = colors[nearest] * shade[:, None]
    with matplotlib.rc_context(STYLE):
        fig = figure(6.4, 6.6)
        axes = fig.subplots()
        axes.imshow(image.reshape(n, n, 3).numpy(), origin="lower", extent=(-2, 2, -2, 2), interpolation="nearest")
        axes.plot(*MAGNETS.T.numpy(), "o", color="white", markersize=6, markeredgecolor="0.2")
        axes.set(xlabel="start, x", ylabel="start, y")
        headline(fig, f"Three magnets, {n * n:,} pendulums, one call:\nthe magnet that holds each in the end")
        fig.savefig(out, dpi=130)
    return nearest.reshape(n, n)


if __name__ == "__main__":
    options = parser(__doc__, Path("magnetic_pendulum.png"), "the picture")
    options.add_argument("--processes", type=int, default=2, help="on this machine")
    options.add_argument("--dask", metavar="HOST:PORT", help="the scheduler of a Dask cluster")
    args = parsed(options, "magnetic_pendulum", None)
    workers: Any = args.processes
    if args.dask:
        from distributed import Client

        workers = Client(args.dask).get_executor()
    keep = args.checkpoints / f"magnetic_pendulum{'-quick' * args.quick}" if args.resume else None
    main(60 if args.quick else 200, workers, keep, str(args.out))
