"""Recover the three rate constants of Robertson's reaction from noisy data, by gradient descent on their logarithms.

    python examples/robertson_fit.py [--quick] [--out robertson_fit.png]

Prints the constants and writes robertson_fit.png.
"""

from __future__ import annotations

import matplotlib
import torch
from shared import COLORS, INK, STYLE, arguments, headline
from torch import Tensor

import pyjlode
from pyjlode.plot import figure

TRUE = torch.tensor([0.04, 3e7, 1e4], dtype=torch.float64)
H0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
SCALE = torch.tensor([1.0, 4e-5, 1.0], dtype=torch.float64)  # the size of each species


def robertson(t: Tensor, h: Tensor, k: Tensor) -> Tensor:
    """HW IV.1 (1.4): A -> B slowly, 2 B -> B + C fast, B + C -> A + C between them."""
    a, b, c = h.unbind()
    slow, fast, back = k[0] * a, k[1] * b * b, k[2] * b * c
    return torch.stack([back - slow, slow - back - fast, fast])


def solve(log_k: Tensor, t: Tensor) -> Tensor:
    k = torch.exp(log_k)
    atol = 1e-6 * SCALE
    return pyjlode.odeint(lambda t, h: robertson(t, h, k), H0, t, method="rodas5p", rtol=1e-5, atol=atol, adjoint=True)


def fit(steps: int = 60, noise: float = 0.01, points: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """The fitted constants (3,), the times and the data."""
    t = torch.cat([torch.zeros(1), torch.logspace(-4, 4, points)]).double()
    data = solve(TRUE.log(), t) + noise * SCALE * torch.randn(len(t), 3, dtype=torch.float64)
    log_k = (TRUE * torch.tensor([3.0, 0.3, 2.0])).log().requires_grad_()
    optimizer = torch.optim.LBFGS([log_k], lr=0.5, max_iter=1, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = ((solve(log_k, t) - data) / SCALE).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        before = log_k.detach().clone()
        optimizer.step(loss)
        if torch.equal(before, log_k.detach()):
            break
    return log_k.detach().exp(), t, data


def main(steps: int = 60, out: str = "robertson_fit.png", seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    k, t, data = fit(steps)
    for name, found, true in zip(("A -> B", "2 B -> B + C", "B + C -> A + C"), k.tolist(), TRUE.tolist()):
        print(f"{name:15} {found:10.4g}   true {true:8.4g}")
    fine = torch.cat([torch.zeros(1), torch.logspace(-4, 4, 300)]).double()
    with torch.no_grad():
        h = solve(k.log(), fine)
    off = float((k / TRUE).log().abs().max())
    with matplotlib.rc_context(STYLE):
        fig = figure(10, 4.6)
        ax = fig.subplots()
        for i, name in enumerate(("A", "B, in units of 4e-5", "C")):
            ax.semilogx(t[1:], data[1:, i] / SCALE[i], "o", ms=5, mfc="white", color=COLORS[i])
            ax.semilogx(fine[1:], h[1:, i] / SCALE[i], color=COLORS[i], lw=2, label=name)
        ax.semilogx([], [], "o", ms=5, mfc="white", color=INK, label="measured, with noise")
        ax.set(xlabel="time", ylabel="concentration")
        ax.legend(loc="center", bbox_to_anchor=(0.36, 0.42))
        headline(fig, f"Three rate constants over nine orders of magnitude, each to within {off:.1%}")
        fig.savefig(out, dpi=120)
    return k


if __name__ == "__main__":
    args = arguments(__doc__, "robertson_fit", None)
    main(12 if args.quick else 60, str(args.out), args.seed)
