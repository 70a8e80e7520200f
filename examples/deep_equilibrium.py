"""A deep equilibrium model: digits read where a network comes to rest, and a gradient that keeps no path there.

    python examples/deep_equilibrium.py [--quick] [--resume] [--seed 0] [--out deep_equilibrium.png]

The hidden state starts at zero and follows h' = tanh(W h + U x + b) - h for a digit x of scikit-learn's 1,797. Its
class is read at the state of rest, by `pyjlode.steady_state`: a network of infinitely many layers with the weights of
one. W = (1 - m) I - A'A + B - B', for which the state of rest is there, and the only one.

After training, the gradient of the loss by the implicit function theorem is compared with the gradient through a solve
to a late time, `odeint(..., adjoint=False)`. The second comes near the first the later it ends, and keeps the more of
the path: memory is the most that tensors take at once in a training step of 128 digits.

Source: Bai, Kolter & Koltun, Deep equilibrium models, 2019; the form of W: Winston & Kolter, Monotone operator
equilibrium networks, 2020.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from digits import folds
from shared import COLORS, STYLE, arguments, fit, headline, table
from torch import Tensor, nn

from pyjlode import odeint, plot, steady_state

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from memory import peak

WIDTH = 24
MARGIN = 0.1  # m: the larger, the sooner at rest
TIMES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Equilibrium(nn.Module):
    """Pixels (B, 64) to classes (B, 10), read at rest, or at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(0.5 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.B = nn.Parameter(0.5 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.U, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, time: float | None = None) -> Tensor:
        W = (1 - MARGIN) * torch.eye(WIDTH) - self.A.T @ self.A + self.B - self.B.T
        Ux, h0 = self.U(x), x.new_zeros(len(x), WIDTH)

        def f(t: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(h @ W.T + Ux) - h

        if time is None:
            h = steady_state(f, h0, batch_dims=1, method="tsit5")
        else:
            h = odeint(f, h0, [0.0, time], adjoint=False, rtol=1e-5, atol=1e-5)[-1]
        return self.head(h)


class Found(NamedTuple):
    """What was found.

    Attributes:
        error: of the test digits, in %.
        off: of the gradient through a solve to each of TIMES, relative to the one at rest.
        megabytes: of such a training step, and of one at rest (10^6 bytes).
    """

    error: float
    off: list[float]
    megabytes: list[float]
    at_rest: float


def train(x: Tensor, y: Tensor, args: argparse.Namespace) -> Equilibrium:
    steps = 60 if args.quick else 300
    torch.manual_seed(args.seed)
    model = Equilibrium()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(i: int) -> dict[str, float]:
        rows = torch.randint(0, len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return {"loss": loss.item()}

    fit("digits", {"model": model, "optimizer": optimizer, "schedule": schedule}, step, steps, args, every=20)
    return model


def gradient(model: Equilibrium, x: Tensor, y: Tensor, time: float | None) -> tuple[Tensor, float]:
    """Of the loss, all parameters in one vector; and the MB of tensors that it takes."""
    found: list[Tensor] = []

    def run() -> None:
        loss = nn.functional.cross_entropy(model(x, time), y)
        found.extend(torch.autograd.grad(loss, list(model.parameters())))

    megabytes = peak(run)[0] / 1e6
    return torch.cat([g.flatten() for g in found]), megabytes


def main(argv: Sequence[str] | None = None) -> Found:
    """Train, compare, print and draw; returns what was found."""
    args = arguments(__doc__, "deep_equilibrium", argv)
    x, y, x_test, y_test = folds(args.seed)[0]
    x, x_test = x.flatten(1), x_test.flatten(1)
    model = train(x, y, args)
    with torch.no_grad():
        error = 100 * float((model(x_test).argmax(-1) != y_test).float().mean())
    exact, at_rest = gradient(model, x[:128], y[:128], None)
    through = [gradient(model, x[:128], y[:128], time) for time in TIMES]
    off = [float((g - exact).norm() / exact.norm()) for g, _ in through]
    found = Found(error, off, [megabytes for _, megabytes in through], at_rest)
    rows = [[f"through a solve to t = {t:g}", f"{e:.1e}", m] for t, e, m in zip(TIMES, off, found.megabytes)]
    head = ["gradient", "off by", "MB"]
    print(table(head, [*rows, ["at rest", "", at_rest]], f"{error:.1f} % of {len(x_test)} test digits are read wrong"))
    with matplotlib.rc_context(STYLE):
        draw(found, args)
    return found


def draw(found: Found, args: argparse.Namespace) -> None:
    canvas = plot.figure(12, 4.8)
    left, right = canvas.subplots(1, 2)
    left.loglog(TIMES, found.off, "o-", color=COLORS[1], lw=2.4)
    left.set(title="How far the gradient through a solve is off", xlabel="the time at which the solve ends")
    left.set_ylabel("relative to the gradient at rest")
    right.loglog(TIMES, found.megabytes, "o-", color=COLORS[1], lw=2.4, label="through the solve")
    right.axhline(found.at_rest, color=COLORS[0], lw=2.4, label="at rest, by the implicit function theorem")
    right.set(title="Memory of a training step", xlabel="the time at which the solve ends", ylabel="MB")
    right.set_ylim(min(found.at_rest, *found.megabytes) / 2, 4 * max(found.megabytes))
    right.legend(loc="upper left")
    for ax in (left, right):
        ax.set_xticks(TIMES, [f"{t:g}" for t in TIMES])
        ax.minorticks_off()
    times = found.megabytes[-1] / found.at_rest
    headline(
        canvas, f"The gradient at rest needs no path: {times:.0f} times less memory than a solve to t = {TIMES[-1]:g}"
    )
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
