"""The outer planets over ten thousand orbits of Jupiter: the energy with symplectic methods and with dopri5.

python examples/solar_system.py     prints the error of the energy for the work of each; writes solar_system.png

Some eight minutes of solving; `--quick` follows a hundred orbits in seconds. Hairer, Lubich & Wanner, Geometric
Numerical Integration, I.2.4, whose initial data are those of 5 September 1994: astronomical units, days, and the sun's
mass, with the inner planets in the sun.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from shared import COLORS, FAINT, INK, STYLE, arguments, headline, table
from torch import Tensor

import pyjlode
from pyjlode.plot import figure

G = 2.95912208286e-4
NAMES = ("sun", "Jupiter", "Saturn", "Uranus", "Neptune", "Pluto")
MASS = torch.tensor(
    [1.00000597682, 0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 1 / 1.3e8],
    dtype=torch.float64,
)
Q0 = torch.tensor(
    [
        [0, 0, 0],
        [-3.5023653, -3.8169847, -1.5507963],
        [9.0755314, -3.0458353, -1.6483708],
        [8.3101420, -16.2901086, -7.2521278],
        [11.4707666, -25.7294829, -10.8169456],
        [-15.5387357, -25.2225594, -3.1902382],
    ],
    dtype=torch.float64,
)
V0 = torch.tensor(
    [
        [0, 0, 0],
        [0.00565429, -0.00412490, -0.00190589],
        [0.00168318, 0.00483525, 0.00192462],
        [0.00354178, 0.00137102, 0.00055029],
        [0.00288930, 0.00114527, 0.00039677],
        [0.00276725, -0.00170702, -0.00136504],
    ],
    dtype=torch.float64,
)
ORBIT = 4332.59  # days, of Jupiter
YEAR = 365.25
# Days of a step, or tolerances.
RUNS: dict[str, dict[str, Any]] = {
    "velocity_verlet": {"options": {"step_size": 200.0}},
    "mcate4": {"options": {"step_size": 500.0}},
    "kahan_li6": {"options": {"step_size": 1000.0}},
    "dopri5": {"rtol": 1e-8, "atol": 1e-11},  # with 1e-6 the error is 3 % after 1000 orbits
}


def acceleration(t: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Newton's law of gravitation: q (6, 3) -> (6, 3)."""
    apart = q - q[:, None]
    distance = torch.linalg.vector_norm(apart, dim=-1) + EYE  # a body is at no distance from itself
    return G * torch.einsum("ij,ijk->ik", MASS / distance**3, apart)


EYE = torch.eye(len(MASS), dtype=torch.float64)


def energy(q: Tensor, v: Tensor) -> Tensor:
    """Kinetic and potential: (T, 6, 3) each -> (T,)."""
    i, j = torch.triu_indices(len(MASS), len(MASS), 1)
    potential = G * (MASS[i] * MASS[j] / (q[:, i] - q[:, j]).norm(dim=-1)).sum(-1)
    return 0.5 * (MASS[:, None] * v.square()).sum((-1, -2)) - potential


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """For each method the largest error of the energy in the first tenth of the time and in the last."""
    args = arguments(__doc__, "solar_system", argv)
    orbits = 100 if args.quick else 10_000
    every = 1000.0 * max(1, orbits // 500)  # days between outputs, a whole number of steps of each method
    t = torch.arange(0, orbits * ORBIT, every, dtype=torch.float64)
    field = pyjlode.SecondOrder(acceleration)
    errors, rows, found = {}, [], {}
    for method, how in RUNS.items():
        s = pyjlode.solve(field, (Q0, V0), t, method=method, dense=False, engine="torch", **limitless(how))
        of_energy = energy(*s.h)
        errors[method] = (of_energy / of_energy[0] - 1).abs()
        tenth = len(t) // 10
        first, last = float(errors[method][:tenth].max()), float(errors[method][-tenth:].max())
        found[method] = first, last
        rows.append([method, s.stats.naccept, s.stats.nfe, f"{first:.1e}", f"{last:.1e}", f"{s.stats.wall:.0f} s"])
    head = ["method", "steps", "calls of a", "first tenth", "last tenth", "time"]
    print(table(head, rows, f"error of the energy over {orbits} orbits of Jupiter"))
    with torch.no_grad():
        paths = pyjlode.odeint(field, (Q0, V0), torch.linspace(0, 248 * YEAR, 1000), method="dopri8")[0]
    draw(paths, t, errors, orbits, args.out)
    return found


def limitless(how: dict[str, Any]) -> dict[str, Any]:
    """Millions of steps are meant here, and no sign of an error."""
    return {**how, "options": {**how.get("options", {}), "max_num_steps": 10_000_000}}


def draw(paths: Tensor, t: Tensor, errors: dict[str, Tensor], orbits: int, out: Any) -> None:
    with matplotlib.rc_context(STYLE):
        canvas = figure(11, 5)
        left, right = canvas.subplots(1, 2, width_ratios=[1, 1.35])
        for i, color in enumerate(COLORS[:5], 1):
            x, y = (paths[:, i, k] - paths[:, 0, k] for k in (0, 1))
            left.plot(x, y, color=color, lw=1.6)
            left.annotate(NAMES[i], (float(x[0]), float(y[0])), xytext=(4, 4), textcoords="offset points", color=color)
            left.plot(float(x[0]), float(y[0]), "o", color=color, ms=4)
        left.plot(0, 0, "o", color=INK, ms=5)
        left.set_aspect("equal", adjustable="datalim")
        left.set(title="248 years, one orbit of Pluto", xlabel="astronomical units")
        for (method, error), color in zip(errors.items(), COLORS):
            # The error swings with each orbit; its largest value in windows of a hundredth is what grows, or does not.
            size = max(1, len(t) // 100)
            n = len(error) // size * size
            highest = error[:n].reshape(-1, size).amax(1)
            middle = t[:n].reshape(-1, size).mean(1) / ORBIT
            right.semilogy(middle, highest, color=color, lw=2.2, label=method)
        right.grid(True, color=FAINT, lw=0.6, alpha=0.6)
        right.set(title="relative error of the energy", xlabel="orbits of Jupiter", xlim=(0, orbits))
        right.legend(frameon=False)
        right.set_ylim(10 ** math.floor(math.log10(min(float(e[1:].max()) for e in errors.values())) - 1), None)
        headline(canvas, f"Symplectic methods keep the energy for {orbits:,} orbits; the error of dopri5 grows")
        canvas.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
