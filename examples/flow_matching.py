"""Flow matching: continuous normalizing flows that are trained without a solve.

    python examples/flow_matching.py [--quick] [--resume] [--out flow_matching.png]

Two densities in the plane and scikit-learn's digits of 8 by 8 pixels, from the standard normal. The field is trained
by conditional flow matching, with random pairs of noise and data ("independent"), or with those of the smallest sum of
squared distances in each batch ("ot"). With the second the paths hardly cross, so they are nearly straight, and a
sample costs fewer evaluations.

Printed are the evaluations of the field for a batch of samples at rtol=atol=1e-4; the 2-Wasserstein distance of as many
samples as data, by exact assignment, with that of the adaptive solve, that of four Euler steps, and that of two sets of
data, which is as near as samples can come; and the log-likelihood of held-out data, which `CNF.log_prob` has after a
training that never computed one. The densities in the plane are trained by maximum likelihood, too, for comparison.

Source: Lipman, Chen, Ben-Hamu, Nickel & Le, Flow matching for generative modeling, 2023; Tong et al., Improving and
generalizing flow-based generative models with minibatch optimal transport, 2023.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import torch
from cnf_density import eight_gaussians, two_moons
from scipy.optimize import linear_sum_assignment
from shared import COLORS, FAINT, INK, STYLE, arguments, fit, headline, table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyjlode import odeint, plot
from pyjlode.nn import CNF, TimeMLP

TOL = {"rtol": 1e-4, "atol": 1e-4}
SAMPLES = 1000  # of which distances are taken


class Found(NamedTuple):
    """What one training gave.

    Attributes:
        flow: trained. seconds: of training, one core.
        nfe: evaluations for one batch of samples. w2, w2_euler, w2_data: distances from the data of samples, of samples
            by four Euler steps, and of other data. log_prob: nats, mean over held-out data.
    """

    flow: CNF
    seconds: float
    nfe: int
    w2: float
    w2_euler: float
    w2_data: float
    log_prob: float


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The 2-Wasserstein distance of two sets of as many points, (n, D)."""
    cost = torch.cdist(a.double(), b.double()).square().numpy()
    return float(cost[linear_sum_assignment(cost)].mean() ** 0.5)


def digits() -> Callable[[int], Tensor]:
    """Draws digits (n, 64), pixels from -1 to 1, with the noise of a grey level, so that there is a density."""
    pixels = torch.from_numpy(load_digits().data).float() / 8 - 1
    return lambda n: pixels[torch.randint(0, len(pixels), (n,))] + torch.rand(n, 64) / 8 - 1 / 16


class Residual(nn.Module):
    """A field for digits: a hidden state that each layer adds to, with the time beside the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(64 + 5, width), nn.Linear(width, 64)
        self.layers = nn.ModuleList(nn.Linear(width + 5, width) for _ in range(3))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        t = t.expand(*h.shape[:-1], 1)
        times = torch.cat([t, (torch.pi * t).cos(), (torch.pi * t).sin(), (2 * torch.pi * t).cos(),
                           (2 * torch.pi * t).sin()], -1)  # fmt: skip
        z = self.start(torch.cat([h, times], -1))
        for layer in self.layers:
            z = z + nn.functional.silu(layer(torch.cat([z, times], -1)))
        return self.end(z)


def study(name: str, how: str, draw: Callable[[int], Tensor], args: argparse.Namespace) -> Found:
    plane = name != "digits"
    batch = 256 if plane else 128
    steps = 400 if how == "likelihood" else 2000 if plane else 5000
    if args.quick:
        steps //= 10 if plane else 5
    torch.manual_seed(args.seed)
    flow = CNF(TimeMLP([2, 64, 64, 64, 2]), 2, **TOL) if plane else CNF(Residual(256), 64, **TOL)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3 if plane else 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(i: int) -> dict[str, float]:
        start = time.thread_time()
        x = draw(batch)
        loss = flow.loss(x) if how == "likelihood" else flow.matching_loss(x, coupling=how)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        return {"loss": loss.item(), "seconds": time.thread_time() - start}

    what = f"{name}-{how}".replace(" ", "-")
    history = fit(what, {"flow": flow, "optimizer": optimizer, "schedule": schedule}, step, steps, args, every=500)
    torch.manual_seed(args.seed + 1000)
    n = SAMPLES // 4 if args.quick else SAMPLES
    x, other = draw(n), draw(n)
    z = flow.base.sample((n,))
    with torch.no_grad():
        made = flow.sample(n)
        assert flow.stats is not None
        nfe = flow.stats.nfe
        euler = odeint(flow.f, z, torch.linspace(0, 1, 5), method="euler")[-1]
        log_prob = float(flow.log_prob(other[: 500 if plane else 100]).mean())
    return Found(
        flow,
        sum(entry["seconds"] for entry in history),
        nfe,
        wasserstein(made, x),
        wasserstein(euler, x),
        wasserstein(other, x),
        log_prob,
    )


WAYS = {
    "two moons": ("likelihood", "independent", "ot"),
    "eight Gaussians": ("likelihood", "independent", "ot"),
    "digits": ("independent", "ot"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Found]]:
    """Train, print and draw; returns what was found, by data and coupling."""
    args = arguments(__doc__, "flow_matching", argv)
    data = {"two moons": two_moons, "eight Gaussians": eight_gaussians, "digits": digits()}
    found = {name: {how: study(name, how, data[name], args) for how in ways} for name, ways in WAYS.items()}
    rows = [
        [f"{name}, {how}", f"{r.seconds:.0f}", r.nfe, f"{r.w2:.3f}", f"{r.w2_euler:.3f}", f"{r.w2_data:.3f}",
         f"{r.log_prob:.2f}"]
        for name, ways in found.items()
        for how, r in ways.items()
    ]  # fmt: skip
    head = ["data, training", "s", "evaluations", "W2", "W2, 4 Euler steps", "W2, data", "log p, nats"]
    print(table(head, rows, "samples against data"))
    with matplotlib.rc_context(STYLE):
        draw(found, data, args)
    return found


@torch.no_grad()
def draw(
    found: dict[str, dict[str, Found]], data: dict[str, Callable[[int], Tensor]], args: argparse.Namespace
) -> None:
    canvas = plot.figure(13, 5)
    panels = canvas.subplots(1, 3, width_ratios=(1, 1, 1.05))
    torch.manual_seed(args.seed)
    z = torch.randn(150, 2)
    for ax, how, color in zip(panels, ("independent", "ot"), COLORS[1::-1]):
        r = found["eight Gaussians"][how]
        h = odeint(r.flow.f, z, torch.linspace(0, 1, 41), **TOL)
        ax.plot(*data["eight Gaussians"](1500).T, ".", color=FAINT, ms=2)
        ax.plot(h[..., 0], h[..., 1], color=color, lw=0.8, alpha=0.7)
        ax.plot(*z.T, ".", color=INK, ms=3)
        ax.plot(*h[-1].T, ".", color=color, ms=5)
        pairs = "random pairs" if how == "independent" else "optimal pairs"
        ax.set(title=f"{pairs}: {r.nfe} evaluations", xticks=[], yticks=[], aspect="equal")
        ax.set(xlim=(-4, 4), ylim=(-4, 4))
        ax.spines[:].set_visible(False)
    r = found["digits"]["ot"]
    made = nn.functional.pad(r.flow.sample(64).reshape(64, 8, 8), (1, 1, 1, 1), value=-1.0)
    made = made.reshape(8, 8, 10, 10).permute(0, 2, 1, 3).reshape(80, 80)
    panels[2].imshow(made.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    panels[2].set(title=f"digits made: {r.nfe} evaluations", xticks=[], yticks=[])
    panels[2].spines[:].set_visible(False)
    headline(canvas, "Optimal pairs straighten the paths from noise to data")
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
