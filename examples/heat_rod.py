"""Learn how well each part of a rod conducts heat, from its temperature at a few moments.

    python examples/heat_rod.py [--quick] [--out heat_rod.png]

Prints the error of the profile and writes heat_rod.png.

u_t = (D(x) u_x)_x on (0, 1) with both ends held at zero, by the method of lines: stiff, the more so the finer the grid.
"""

from __future__ import annotations

import matplotlib
import torch
from shared import COLORS, FAINT, INK, STYLE, arguments, headline
from torch import Tensor

import pyjlode
from pyjlode.plot import figure


def conduct(u: Tensor, D: Tensor) -> Tensor:
    """u (..., n) inside the rod, D (n + 1,) between its points -> du/dt."""
    n = u.shape[-1]
    edge = torch.zeros_like(u[..., :1])
    flux = D * torch.diff(torch.cat([edge, u, edge], -1), dim=-1)
    return (n + 1) ** 2 * torch.diff(flux, dim=-1)


def true_profile(x: Tensor) -> Tensor:
    return 0.3 + 0.7 * torch.exp(-((x - 0.65) ** 2) / 0.02)


def main(n: int = 40, steps: int = 60, out: str = "heat_rod.png", seed: int = 0) -> float:
    torch.manual_seed(seed)
    x = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    between = (torch.arange(n + 1, dtype=torch.float64) + 0.5) / (n + 1)
    t = torch.linspace(0, 0.1, 9, dtype=torch.float64)
    u0 = torch.sin(torch.pi * x) + torch.sin(3 * torch.pi * x) - 0.5 * torch.sin(4 * torch.pi * x)

    def solve(log_D: Tensor) -> Tensor:
        D = torch.exp(log_D)
        return pyjlode.odeint(lambda t, u: conduct(u, D), u0, t, method="radau5", rtol=1e-5, atol=1e-6, adjoint=True)

    data = solve(true_profile(between).log())
    data = data + 0.002 * torch.randn_like(data)
    log_D = torch.full((n + 1,), -0.7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_D], max_iter=1, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # The data do not say how D wiggles from point to point; the second term asks it not to.
        value = (solve(log_D) - data).square().mean() / 0.002**2 + 3 * torch.diff(log_D, n=2).square().sum()
        value.backward()
        return value

    for step in range(steps):
        value = float(optimizer.step(loss).detach())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {value:10.3f}")
    D = log_D.detach().exp()
    error = float((D - true_profile(between)).norm() / true_profile(between).norm())
    print(f"the learned profile is off by {100 * error:.1f} %")

    with matplotlib.rc_context(STYLE):
        fig = figure(10, 4)
        left, right = fig.subplots(1, 2)
        left.plot(x, data[::2].T, "o", color=FAINT, markersize=4)
        for time, u, color in zip(t[::2].tolist(), solve(log_D).detach()[::2], COLORS):
            left.plot(x, u, color=color, lw=2, label=f"t = {time:g}")
        left.set(title="Temperatures, measured and fitted", xlabel="place", ylabel="temperature")
        left.legend(loc="upper center", bbox_to_anchor=(0.555, 1.03), handlelength=1.2, fontsize=11)
        right.plot(between, D, color=COLORS[0], lw=3.4, label="learned")
        right.plot(between, true_profile(between), "--", color=INK, lw=1.2, label="true")
        right.set(title="How well each part conducts", xlabel="place", ylabel="diffusivity")
        right.set_ylim(0, None)
        right.legend(loc="upper left")
        headline(fig, f"How a rod conducts, learned from its temperatures to within {error:.1%}")
        fig.savefig(out, dpi=120)
    return error


if __name__ == "__main__":
    args = arguments(__doc__, "heat_rod", None)
    main(*((12, 8) if args.quick else (40, 60)), str(args.out), args.seed)
