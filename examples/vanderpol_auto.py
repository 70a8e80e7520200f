"""Van der Pol's oscillator with method="auto": explicit steps through the jumps, implicit ones on the slow branches.

    python examples/vanderpol_auto.py [--quick] [--out vanderpol_auto.png]

Prints where it switches and writes vanderpol_auto.png.
"""

from __future__ import annotations

import matplotlib
import torch
from shared import COLORS, FAINT, STYLE, arguments
from torch import Tensor

import pyjlode
from pyjlode.plot import figure


def main(mu: float = 1000.0, out: str = "vanderpol_auto.png") -> list[tuple[float, str]]:
    def f(t: Tensor, h: Tensor) -> Tensor:
        x, v = h.unbind()
        return torch.stack([v, mu * (1 - x * x) * v - x])

    h0, t = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 3 * mu], dtype=torch.float64)
    solution = pyjlode.solve(f, h0, t, method="auto", rtol=1e-6, atol=1e-6)
    switches = solution.stats.switches
    for when, name in switches:
        print(f"t = {when:10.4f}: {name}")
    print(f"{solution.stats.naccept} steps, {solution.stats.nfe} evaluations of f, {solution.stats.njac} Jacobians")

    times = torch.linspace(0, 3 * mu, 3000, dtype=torch.float64)
    with matplotlib.rc_context(STYLE):
        fig = figure(10, 4)
        ax = fig.subplots()
        ax.plot(times, solution.interpolate(times)[:, 0], color=FAINT, linewidth=2)
        for name, kind, color in (("rodas5p", "implicit", COLORS[4]), ("tsit5", "explicit", COLORS[0])):
            at = torch.tensor([when for when, to in switches if to == name], dtype=torch.float64)
            if len(at):
                ax.plot(at, solution.interpolate(at)[:, 0], "o", color=color, label=f"to {name}, {kind}")
        title = f"Explicit steps for the jumps, implicit ones between: {len(switches)} switches"
        ax.set(title=title, xlabel="t", ylabel="x")
        ax.legend(loc="lower left")
        fig.savefig(out, dpi=120)
    return switches


if __name__ == "__main__":
    args = arguments(__doc__, "vanderpol_auto", None)
    main(200.0 if args.quick else 1000.0, str(args.out))
