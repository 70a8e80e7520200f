"""Training aids: where a fit of the whole series settles for a flat line, and what mends it.

    python examples/training_aids.py [--quick] [--seed 0] [--out training_aids.png]

Four periods of a predator and its prey, with noise, and a small network for the field. Fitted to all of the series at
once, the network finds the mean first, and takes long to leave it: a curve that is out of phase is worse than a flat
one. With the same network, the same optimizer and as many steps, 150, three aids get through:

* growing horizon: the fit begins with a tenth of the series and takes in the rest over half of the steps;
* multiple shooting: short pieces from starts of their own, which are trained, and pulled together;
* collocation: the field is first fitted to the slopes of a smoothed series, without a solve, and then as before.

The fourth, STEER, mends something else. A neural ODE that carries two classes to two points is trained at t = 1. It
passes near them at that time and goes on; with random end times in training it stays there longer.

Source: Bock & Plitt 1984; Roesch, Rackauckas & Stumpf 2021; Ghosh, Behl, Dupont, Torr & Namboodiri, STEER: simple
temporal regularization for neural ODEs, 2020.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import torch
from shared import COLORS, FAINT, INK, STYLE, arguments, fit, headline, table
from torch import Tensor, nn

from pyjlode import odeint, plot
from pyjlode.nn import NeuralODE, TimeMLP, collocate, gradient_matching, multiple_shooting

PERIODS, POINTS, NOISE = 4, 81, 0.1
LENGTH = 5  # intervals in a piece of multiple shooting
SOLVER = {"rtol": 1e-3, "atol": 1e-3}
ENDS = torch.linspace(0.5, 1.5, 21)
STEER = 0.5  # the end time is 1, give or take so much


def truth(t: Tensor, h: Tensor) -> Tensor:
    """Lotka and Volterra's equations for the logarithms of prey and predator, period about 6.5."""
    prey, predator = h.exp().unbind(-1)
    return torch.stack([1 - predator, prey - 1], -1)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h)


def series() -> tuple[Tensor, Tensor, Tensor]:
    """Times (T,), the true states (T, 2), and what is seen of them."""
    t = torch.linspace(0, 6.6 * PERIODS, POINTS)
    h = odeint(truth, torch.tensor([1.0, 0.0]), t, rtol=1e-6, atol=1e-8)
    return t, h, h + NOISE * torch.randn_like(h)


def trained(how: str, t: Tensor, x: Tensor, args: argparse.Namespace) -> tuple[Field, Tensor]:
    """The field and its curve (T, 2), after training in one of four ways."""
    steps = 150
    torch.manual_seed(args.seed)
    f = Field()
    starts = nn.Parameter((x[:-1:LENGTH] if how == "multiple shooting" else x[:1]).clone())
    parts = {"f": f, "starts": nn.ParameterList([starts])}
    optimizer = torch.optim.Adam([*f.parameters(), starts], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=2e-4)
    h, dh = collocate(x, t, 1.0)

    def loss(i: int) -> Tensor:
        if how == "multiple shooting":
            shots = multiple_shooting(f, starts, t, LENGTH, **SOLVER)
            return (shots.h - x).square().mean() + shots.gaps.square().mean()
        if how == "collocation" and i < steps // 2:
            return gradient_matching(f, t, h, dh)
        n = min(POINTS, POINTS // 10 + 2 * POINTS * i // steps) if how == "growing horizon" else POINTS
        return (odeint(f, starts[0], t[:n], adjoint=True, **SOLVER) - x[:n]).square().mean()

    def step(i: int) -> dict[str, float]:
        value = loss(i)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_([*f.parameters(), starts], 1.0)
        optimizer.step()
        schedule.step()
        return {"loss": value.item()}

    fit(how.replace(" ", "-"), {**parts, "optimizer": optimizer, "schedule": schedule}, step, steps, args)
    with torch.no_grad():
        return f, odeint(f, starts[0], t, **SOLVER)


def two_moons(n: int) -> tuple[Tensor, Tensor]:
    """Points (n, 2) of two half circles that reach into one another, and which of them (n,)."""
    y, angle = torch.randint(0, 2, (n,)), torch.pi * torch.rand(n)
    side = 1 - 2 * y
    x = torch.stack([side * angle.cos() + y - 0.5, side * angle.sin() + 0.5 * y - 0.25], -1)
    return x + 0.1 * torch.randn(n, 2), y


def carrier(width: float, args: argparse.Namespace) -> Tensor:
    """How far (root mean square) test points are from where they belong at `ENDS`, if trained at t = 1 ± width."""
    steps = 100 if args.quick else 200
    torch.manual_seed(args.seed)
    ode = NeuralODE(TimeMLP([2, 32, 2]), **SOLVER)
    optimizer = torch.optim.Adam(ode.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    places = torch.tensor([[1.5, 0.0], [-1.5, 0.0]])

    def step(i: int) -> dict[str, float]:
        x, y = two_moons(128)
        end = 1 + width * (2 * float(torch.rand(())) - 1)
        loss = (ode(x, [0.0, end]) - places[y]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return {"loss": loss.item(), "nfe": ode.nfe}

    fit(f"steer-{width}", {"ode": ode, "optimizer": optimizer, "schedule": schedule}, step, steps, args)
    torch.manual_seed(args.seed + 1000)
    x, y = two_moons(2000)
    with torch.no_grad():
        h = odeint(ode.f, x, torch.cat([torch.zeros(1), ENDS]), **SOLVER)[1:]
        return (h - places[y]).square().sum(-1).mean(1).sqrt()


class Found(NamedTuple):
    """Root mean square errors against the true curve, by aid, (seeds,); distances at `ENDS`, plain and STEER's, (seeds,
    21)."""

    errors: dict[str, Tensor]
    ends: dict[str, Tensor]


WAYS = ("all at once", "growing horizon", "multiple shooting", "collocation")


def main(argv: Sequence[str] | None = None) -> Found:
    """Train, print and draw; returns the errors."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on; one with --quick")
    mine, rest = parser.parse_known_args(argv)
    args = arguments(__doc__, "training_aids", rest)
    first = args.seed
    errors: dict[str, list[float]] = {way: [] for way in WAYS}
    ends: dict[str, list[Tensor]] = {"trained at t = 1": [], f"STEER, t = 1 ± {STEER}": []}
    curves: dict[str, Tensor] = {}
    seen: tuple[Tensor, ...] = ()
    for seed in range(first, first + (1 if args.quick else mine.seeds)):
        args.seed = seed
        torch.manual_seed(seed)
        t, h, x = series()
        for way in WAYS:
            curve = trained(way, t, x, args)[1]
            errors[way].append(float((curve - h).square().mean().sqrt()))
            if seed == first:
                curves[way], seen = curve, (t, h, x)
        for name, width in zip(ends, (0.0, STEER)):
            ends[name].append(carrier(width, args))
    found = Found({way: torch.tensor(e) for way, e in errors.items()}, {n: torch.stack(e) for n, e in ends.items()})
    amplitude = float((seen[1] - seen[1].mean(0)).square().mean().sqrt())
    seeds = range(first, first + len(errors[WAYS[0]]))
    rows = [[way, *(f"{float(e):.3f}" for e in found.errors[way])] for way in WAYS]
    title = f"root mean square error against the true curve; a flat line has {amplitude:.3f}"
    print(table(["trained", *(f"seed {s}" for s in seeds)], rows, title))
    at = [0, 5, 10, 15, 20]
    rows = [[name, *(f"{float(e.mean(0)[i]):.2f}" for i in at)] for name, e in found.ends.items()]
    print(
        table(
            ["off at t =", *(f"{float(ENDS[i]):.2f}" for i in at)],
            rows,
            "root mean square distance from where points belong, mean of the seeds; the places are 3 apart",
        )
    )
    with matplotlib.rc_context(STYLE):
        draw(found, seen, curves, args)
    return found


def draw(found: Found, seen: tuple[Tensor, ...], curves: dict[str, Tensor], args: argparse.Namespace) -> None:
    canvas = plot.figure(12, 7)
    grid = canvas.add_gridspec(4, 2, width_ratios=(1.7, 1))
    t, h, x = seen
    for row, (way, color) in enumerate(zip(WAYS, (COLORS[4], *COLORS[:3]))):
        ax = canvas.add_subplot(grid[row, 0])
        ax.plot(t, x[:, 0], "o", color=FAINT, ms=3.5)
        ax.plot(t, h[:, 0], color=INK, lw=0.8)
        ax.plot(t, curves[way][:, 0], color=color, lw=2.6)
        ax.set(title=f"{way}: error {float(found.errors[way][0]):.2f}", ylim=(-2.2, 1.6), xlim=(0, float(t[-1])))
        ax.tick_params(labelbottom=row == len(WAYS) - 1)
    ax.set_xlabel("time")
    right = canvas.add_subplot(grid[:, 1])
    for (name, e), color in zip(found.ends.items(), (COLORS[4], COLORS[0])):
        right.plot(ENDS, e.mean(0), color=color, lw=2.6, label=name)
    right.axvline(1, color=FAINT, lw=1.2, zorder=0)
    right.set(
        title="Random end times: points stay",
        xlabel="end time",
        ylabel="distance",
        ylim=(0, None),
    )
    right.legend(loc="upper center")
    headline(canvas, "The same network, as many steps: what gets it off the flat line")
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
