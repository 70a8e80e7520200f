"""A neural ODE trained by several processes or machines with torch's DistributedDataParallel.

python examples/distributed_training.py                                      one process
torchrun --nproc-per-node 2 examples/distributed_training.py                 two on this machine

Nothing in it is of PyJLODE but the model: the gradient of a solve is an ordinary gradient, and each process has the
whole model and its share of the data. The first process writes checkpoints. Where a process dies, torchrun ends the
others, and the same command with --resume goes on from the last checkpoint.
Writes distributed_training.png.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
from shared import COLORS, STYLE, parsed, parser
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyjlode.nn import NeuralODE
from pyjlode.plot import figure

SIZE = 5  # of the state: in the plane of the points the arms could not be taken apart (Dupont et al. 2019)


def spirals(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two arms that wind about each other: points (n, 2), and which arm each is on (n,)."""
    which = torch.arange(n) % 2
    angle = 0.5 + 5.5 * torch.rand(n, generator=generator)
    at = angle + math.pi * which
    x = angle[:, None] / 4 * torch.stack([at.cos(), at.sin()], 1)
    return x + 0.05 * torch.randn(n, 2, generator=generator), which


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(SIZE, 64), nn.Tanh(), nn.Linear(64, SIZE))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h)


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)  # the same first weights everywhere
    lift = nn.Linear(2, SIZE)
    ode = NeuralODE(Field(), adjoint=True, method="tsit5", rtol=1e-3, atol=1e-3)
    return nn.Sequential(lift, ode, nn.Linear(SIZE, 2))


def train(
    steps: int, batch: int, checkpoint: Path, every: int, seed: int, resume: bool, die_at: int = -1
) -> tuple[nn.Module, list[float]]:
    """Train on batches of which each process takes its share.

    Args:
        resume: go on from the checkpoint, if there is one.
        die_at: a step at which the last process ends itself, to see what happens then.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    net = model(seed)
    shared = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.Adam(shared.parameters(), lr=0.03)
    losses: list[float] = []
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
    for step in range(len(losses), steps):
        if step == die_at and rank == world - 1:
            os._exit(1)
        x, y = spirals(
            batch, torch.Generator().manual_seed(seed * 10**6 + step)
        )  # the same everywhere; each takes its rows
        loss = nn.functional.cross_entropy(shared(x[rank::world]), y[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        if world > 1:
            dist.all_reduce(whole)
        losses.append(float(whole) / world)
        if rank == 0 and ((step + 1) % every == 0 or step + 1 == steps):
            fresh = checkpoint.with_suffix(".new")
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, fresh)
            fresh.replace(checkpoint)
    return net, losses


def picture(net: nn.Module, losses: list[float], out: str) -> float:
    """Draw what was learned; the share of new points that are put on their arm."""
    x, y = spirals(1000, torch.Generator().manual_seed(10**6))
    grid = torch.linspace(-1.8, 1.8, 160)
    a, b = torch.meshgrid(grid, grid, indexing="xy")
    with torch.no_grad():
        right = float((net(x).argmax(1) == y).double().mean())
        chance = net(torch.stack([a.reshape(-1), b.reshape(-1)], 1)).softmax(1)[:, 1].reshape(a.shape)
    with matplotlib.rc_context(STYLE):
        fig = figure(10, 4.4)
        left, middle = fig.subplots(1, 2)
        left.semilogy(losses, color=COLORS[0], linewidth=1.4)
        left.set(
            title="Each process takes its share of a batch", xlabel="step", ylabel="cross entropy of the whole batch"
        )
        middle.contourf(a, b, chance, levels=20, cmap="RdBu", alpha=0.8)
        middle.scatter(*x[:300].T, c=y[:300], cmap="RdBu", s=14, edgecolors="white", linewidths=0.6)
        middle.set(title=f"{100 * right:.1f} % of 1,000 new points told right", aspect="equal")
        fig.savefig(out, dpi=120)
    return right


def main(
    steps: int = 300,
    batch: int = 256,
    checkpoint: Path = Path("checkpoints/distributed_training.pt"),
    every: int = 50,
    die_at: int = -1,
    out: str = "distributed_training.png",
    seed: int = 0,
    resume: bool = False,
) -> list[float]:
    torch.set_num_threads(1)
    several = "WORLD_SIZE" in os.environ  # torchrun says so
    if several:
        dist.init_process_group("gloo")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    net, losses = train(steps, batch, checkpoint, every, seed, resume, die_at)
    if not several or dist.get_rank() == 0:
        right = picture(net, losses, out)
        print(f"{steps} steps: loss {losses[0]:.3f}, then {losses[-1]:.4f}; {right:.1%} of new points told right")
    if several:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    options = parser(__doc__, Path("distributed_training.png"), "the picture")
    options.add_argument("--steps", type=int, help="of training; 300, or 150 with --quick")
    options.add_argument("--every", type=int, default=50, metavar="STEPS", help="between checkpoints")
    options.add_argument("--die-at", type=int, default=-1, metavar="STEP", help="where one process ends itself")
    args = parsed(options, "distributed_training", None)
    kept = args.checkpoints / f"distributed_training-{args.seed}{'-quick' * args.quick}.pt"
    steps = args.steps or (150 if args.quick else 300)
    main(steps, 256, kept, args.every, args.die_at, str(args.out), args.seed, args.resume)
