"""A neural ODE on a graph: Zachary's karate club, split from two members' choices.

    python examples/graph_ode.py [--quick] [--seeds 5] [--out graph_ode.png]

The 34 members of a karate club fell out in 1977, and it is known who went with whom. A model is told the friendships
and where two of them stood, the instructor and the president, and says where the others went. The field is one graph
convolution, `h' = tanh(A h W + b) - h`, with the normalised adjacency A: a graph network of any depth with the weights
of one layer. The same is asked of graph convolutional networks of 2 and of 16 layers: of many layers all nodes come out
alike. The ODE has its depth in the time it runs, and its state never forgets where it began, which `- h + h0` says.

A second graph is made up: 300 nodes in three communities (a stochastic block model), four labels of each community.

Source: Poli, Massaroli, Park, Yamashita, Asama & Park, Graph neural ordinary differential equations, 2019; Xhonneux, Qu
& Tang, Continuous graph neural networks, 2020; Kipf & Welling, Semi-supervised classification with graph convolutional
networks, 2017; Zachary, An information flow model for conflict and fission in small groups, 1977.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import networkx
import torch
from shared import COLORS, FAINT, INK, STYLE, arguments, fit, headline, table
from torch import Tensor, nn

from pyjlode import plot
from pyjlode.nn import NeuralODE

TIME = 4.0


class Graph(NamedTuple):
    """A: shape (N, N), 0 or 1. y: shape (N,), the class of each node. told: indices of those whose class is known."""

    A: Tensor
    y: Tensor
    told: Tensor


def karate() -> Graph:
    club = networkx.karate_club_graph()
    A = torch.zeros(34, 34)
    for i, j in club.edges:
        A[i, j] = A[j, i] = 1
    y = torch.tensor([int(club.nodes[i]["club"] != "Mr. Hi") for i in range(34)])
    return Graph(A, y, torch.tensor([0, 33]))


def blocks(n: int = 300, k: int = 3, inside: float = 0.06, across: float = 0.015, labels: int = 4) -> Graph:
    """A stochastic block model: an edge has one probability inside a community and another one across."""
    y = torch.arange(n) % k
    same = y[:, None] == y
    upper = torch.rand(n, n).triu(1)
    A = ((upper > 0) & (upper < torch.where(same, inside, across))).float()
    told = torch.cat([torch.nonzero(y == c)[:labels, 0] for c in range(k)])
    return Graph(A + A.T, y, told)


def normalised(A: Tensor) -> Tensor:
    """D^-1/2 (A + 1) D^-1/2, as Kipf & Welling have it."""
    A = A + torch.eye(len(A))
    root = A.sum(1).rsqrt()
    return root[:, None] * A * root


class Diffusion(nn.Module):
    """h' = tanh(A h W + b) - h + h0: what the neighbours say, what is forgotten, and where a node began."""

    def __init__(self, A: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.layer = nn.Linear(width, width)

    def forward(self, t: Tensor, h: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, h0 = h
        return torch.tanh(self.layer(self.A @ h)) - h + h0, torch.zeros_like(h0)


class GraphODE(nn.Module):
    """Node embeddings -> the ODE on the graph -> classes."""

    def __init__(self, graph: Graph, width: int) -> None:
        super().__init__()
        self.h0 = nn.Parameter(0.3 * torch.randn(len(graph.y), width))
        self.ode = NeuralODE(Diffusion(normalised(graph.A), width), [0.0, TIME], rtol=1e-3, atol=1e-3)
        self.head = nn.Linear(width, int(graph.y.max()) + 1)

    def states(self) -> Tensor:
        return self.ode((self.h0, self.h0))[0]

    def forward(self) -> Tensor:
        return self.head(self.states())


class GCN(nn.Module):
    """So many layers, each with weights of its own, of the same width."""

    def __init__(self, graph: Graph, width: int, depth: int) -> None:
        super().__init__()
        self.h0 = nn.Parameter(0.3 * torch.randn(len(graph.y), width))
        self.A = normalised(graph.A)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, int(graph.y.max()) + 1)

    def states(self) -> Tensor:
        h = self.h0
        for layer in self.layers:
            h = torch.tanh(layer(self.A @ h))
        return h

    def forward(self) -> Tensor:
        return self.head(self.states())


MODELS = {
    "graph ODE": lambda graph, width: GraphODE(graph, width),
    "GCN, 2 layers": lambda graph, width: GCN(graph, width, 2),
    "GCN, 16 layers": lambda graph, width: GCN(graph, width, 16),
}


def trained(name: str, what: str, graph: Graph, args: argparse.Namespace) -> tuple[nn.Module, float]:
    """The model, and the share of the other nodes that it places right, in %."""
    steps = 100 if args.quick else 200
    torch.manual_seed(args.seed)
    model = MODELS[name](graph, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.05)

    def step(i: int) -> dict[str, float]:
        loss = nn.functional.cross_entropy(model()[graph.told], graph.y[graph.told])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    fit(
        f"{what}-{name}".replace(" ", "-").replace(",", ""), {"model": model, "optimizer": optimizer}, step, steps, args
    )
    others = torch.ones(len(graph.y), dtype=torch.bool)
    others[graph.told] = False
    with torch.no_grad():
        right = (model().argmax(-1) == graph.y)[others]
    return model, 100 * float(right.float().mean())


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Train, print and draw; returns the accuracies in %, by graph and model, (seeds,)."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --seed on; one with --quick")
    mine, rest = parser.parse_known_args(argv)
    args = arguments(__doc__, "graph_ode", rest)
    seeds = range(args.seed, args.seed + (1 if args.quick else mine.seeds))
    found: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in MODELS} for what in ("karate club", "blocks")
    }
    shown = None
    for seed in seeds:
        args.seed = seed
        torch.manual_seed(seed)
        for what, graph in (("karate club", karate()), ("blocks", blocks())):
            for name in MODELS:
                model, right = trained(name, what.replace(" ", "-"), graph, args)
                found[what][name].append(right)
                shown = model if shown is None and name == "graph ODE" else shown
    result = {what: {name: torch.tensor(x) for name, x in rows.items()} for what, rows in found.items()}
    rows = [
        [
            name,
            *(
                f"{float(x.mean()):.1f} ± {float(x.std()) if len(x) > 1 else 0.0:.1f}"
                for x in (r[name] for r in result.values())
            ),
        ]
        for name in MODELS
    ]
    print(
        table(["placed right, %", *result], rows, f"{len(seeds)} seeds; two labels in the club, twelve in the blocks")
    )
    assert isinstance(shown, GraphODE)
    with matplotlib.rc_context(STYLE):
        draw(shown, karate(), result, args)
    return result


@torch.no_grad()
def draw(model: GraphODE, graph: Graph, result: dict[str, dict[str, Tensor]], args: argparse.Namespace) -> None:
    """Left: the club, each node where the model puts it in the plane of the classes, over time. Right: accuracies."""
    canvas = plot.figure(12, 5.2)
    left, right = canvas.subplots(1, 2, width_ratios=(1.7, 1))
    times = torch.linspace(0, TIME, 60)
    model.ode.return_trajectory = True
    h = model.ode((model.h0, model.h0), times)[0]
    margin = model.head(h)[..., 1] - model.head(h)[..., 0]  # (T, N)
    for c, color in enumerate(COLORS[:2]):
        lines = left.plot(times, margin[:, graph.y == c], color=color, lw=1.4, alpha=0.75)
        lines[0].set_label("went with the president" if c else "went with the instructor")
    for i, name in zip(graph.told.tolist(), ("instructor", "president")):
        left.plot(times, margin[:, i], color=INK, lw=2.6)
        left.annotate(name, (TIME, float(margin[-1, i])), (6, 0), textcoords="offset points", va="center")
    left.axhline(0, color=FAINT, lw=1.2, zorder=0)
    left.set(title="34 members take sides", xlabel="time", ylabel="for the instructor    |    for the president")
    left.set(xlim=(0, TIME * 1.16))
    left.set_ylim(None, 1.3 * left.get_ylim()[1])  # room for the legend
    left.legend(loc="upper left", ncols=2)
    names = list(MODELS)
    for k, (what, rows) in enumerate(result.items()):
        at = [i + 0.38 * (k - 0.5) for i in range(len(names))]
        bars = right.bar(at, [float(rows[n].mean()) for n in names], 0.36, color=COLORS[3 - k], label=what)
        right.bar_label(bars, fmt="%.0f", color=INK)
    right.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names])
    right.set(title="Placed right", ylabel="%", ylim=(0, 119))
    right.legend(loc="upper right", ncols=2)
    accuracy = float(result["karate club"]["graph ODE"].mean())
    headline(canvas, f"Told two members' choices, a graph ODE places {accuracy:.0f} % of the club")
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
