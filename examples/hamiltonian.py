"""What a network gains by being an energy: the drift of the energy of its motions, against a plain network's.

    python examples/hamiltonian.py [--quick] [--seeds 3] [--out hamiltonian.png]

Greydanus, Dzamba & Yosinski, Hamiltonian neural networks, 2019, section 3 and table 1: networks of 200 units are shown
points and their velocities, a spring's and a pendulum's (25 motions of 30 and 45 points, with noise) and those of two
bodies in near-circular orbits (40,000 points), and then solved from new starts. Printed is the mean squared error of
the true energy along what they make of it, over 15 starts, as mean and spread over seeds, beside the paper's figures.
The energies, the starts and the numbers of points are those of the authors' public program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import matplotlib
import torch
from shared import COLORS, INK, STYLE, arguments, headline, table
from torch import Tensor, nn
from tqdm import tqdm

from pyjlode import odeint, plot
from pyjlode.nn import HamiltonianNN

END = 20.0


def spring(h: Tensor) -> Tensor:
    """The energy of a mass at a spring, in the paper's units, (..., 2) -> (...)."""
    return h.square().sum(-1)


def pendulum(h: Tensor) -> Tensor:
    """The energy of a pendulum without friction, in the paper's units: angle and momentum (..., 2) -> (...)."""
    return 3 * (1 - h[..., 0].cos()) + h[..., 1].square()


def two_bodies(h: Tensor) -> Tensor:
    """The energy of two unit masses in the plane, (..., 8) -> (...): x of both, y of both, then the momenta."""
    x, y, px, py = h.unflatten(-1, (4, 2)).unbind(-2)
    distance = torch.hypot(x[..., 0] - x[..., 1], y[..., 0] - y[..., 1])
    return (px.square() + py.square()).sum(-1) / 2 - 1 / distance


def ring_starts(n: int, least: float, most: float) -> Tensor:
    """At distances between these from the state of rest."""
    h = torch.rand(n, 2) * 2 - 1
    return h / h.norm(dim=1, keepdim=True) * (least + (most - least) * torch.rand(n, 1))


def orbit_starts(n: int) -> Tensor:
    """Orbits about the middle, the speed within some five percent of what makes them circles."""
    at = 0.5 + torch.rand(n, 2)
    speed = (1 + 0.05 * torch.randn(n, 1)) / (2 * at.norm(dim=1, keepdim=True) ** 1.5)
    v = torch.stack([-at[:, 1], at[:, 0]], 1) * speed
    q, p = (torch.stack([z, -z], 2).flatten(1) for z in (at, v))  # x of both, y of both
    return torch.cat([q, p], 1)


@dataclass
class Task:
    """One system of the table.

    Attributes:
        starts: makes n of them. motions, points, span: of the data. noise: its standard deviation.
        steps, batch: of training; 0 is all data. reported: the paper's figures, plain and Hamiltonian.
    """

    name: str
    energy: Callable[[Tensor], Tensor]
    starts: Callable[[int], Tensor]
    motions: int
    points: int
    span: float
    noise: float
    steps: int
    batch: int
    reported: tuple[str, str]


TASKS = [
    Task("spring", spring, partial(ring_starts, least=0.1, most=1.0), 25, 30, 3.0, 0.1, 2_000, 0, ("1.7e-1", "3.8e-4")),
    Task(
        "pendulum",
        pendulum,
        partial(ring_starts, least=1.3, most=2.3),
        25,
        45,
        3.0,
        0.1,
        2_000,
        0,
        ("4.2e-2", "2.5e-2"),
    ),
    Task("two bodies", two_bodies, orbit_starts, 800, 50, 20.0, 0.0, 10_000, 200, ("6.3e-2", "3.9e-5")),
]


def network(inputs: int, outputs: int) -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(inputs, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, outputs, bias=False)
    )
    for layer in net[::2]:
        nn.init.orthogonal_(layer.weight)
    return net


class Plain(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = network(size, size)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h)


def solved(field: Callable[[Tensor, Tensor], Tensor], h0: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return odeint(field, h0, t, method="tsit5", rtol=1e-6, atol=1e-8, options={"batch_dims": 1})


def train(field: nn.Module, task: Task, x: Tensor, dx: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-3)
    for _ in tqdm(range(steps), desc=f"{task.name}, {type(field).__name__}", dynamic_ncols=True):
        rows = torch.randint(len(x), (task.batch,)) if task.batch else slice(None)
        optimizer.zero_grad()
        (field(torch.zeros(()), x[rows]) - dx[rows]).square().mean().backward()
        optimizer.step()


class Found(NamedTuple):
    """The energy's errors (seeds, [plain, Hamiltonian]), and its course from one start, of the last seed."""

    errors: Tensor
    t: Tensor
    courses: list[Tensor]


def study(task: Task, args: argparse.Namespace) -> Found:
    errors, courses = [], []
    t = torch.linspace(0, END, 201)
    for seed in range(args.seed, args.seed + args.seeds):
        torch.manual_seed(seed)
        truth = HamiltonianNN(task.energy)
        x = solved(truth, task.starts(task.motions), torch.linspace(0, task.span, task.points)).flatten(0, 1)
        dx = truth(torch.zeros(()), x)
        x = x + task.noise * torch.randn_like(x)
        h0 = task.starts(15)
        right = task.energy(h0)
        row, courses = [], []
        for field in (Plain(x.shape[1]), HamiltonianNN(network(x.shape[1], 1))):
            train(field, task, x, dx, task.steps // 10 if args.quick else task.steps)
            energy = task.energy(solved(field, h0, t))
            row.append(float((energy - right).square().mean()))
            courses.append(energy[:, 0] - right[0])
        errors.append(row)
    return Found(torch.tensor(errors), t, courses)


def draw(found: dict[str, Found], out: str) -> None:
    less = [float((f.errors[:, 0] / f.errors[:, 1]).log().mean().exp()) for f in found.values()]
    with matplotlib.rc_context(STYLE):
        fig = plot.figure(12, 4)
        panels = fig.subplots(1, len(found), squeeze=False)[0]
        for axes, (name, f), ratio in zip(panels, found.items(), less):
            for label, course, color in zip(("plain network", "Hamiltonian network"), f.courses, COLORS[1::-1]):
                axes.plot(f.t, course, color=color, lw=2, label=label)
            axes.axhline(0, color=INK, linewidth=0.6)
            axes.set_title(f"{name}: {ratio:,.0f} times less error")
            axes.set_xlabel("time")
        panels[0].set_ylabel("error of the energy")
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        headline(fig, "A network that is an energy keeps the energy of what it foretells")
        fig.savefig(out, dpi=110)


def spread(x: Tensor) -> str:
    mean = float(x.mean())
    return f"{mean:.1e} ± {float(x.std()) if len(x) > 1 else 0.0:.0e}"


def main(argv: Sequence[str] | None = None) -> dict[str, Found]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on; one with --quick")
    mine, rest = parser.parse_known_args(argv)
    args = arguments(__doc__, "hamiltonian", rest)
    args.seeds = 1 if args.quick else mine.seeds
    found = {task.name: study(task, args) for task in TASKS}
    rows = [[task.name, *(spread(found[task.name].errors[:, i]) for i in range(2)), *task.reported] for task in TASKS]
    print(table(["energy error", "plain", "Hamiltonian", "plain, paper", "Ham., paper"], rows))
    draw(found, str(args.out))
    return found


if __name__ == "__main__":
    main()
