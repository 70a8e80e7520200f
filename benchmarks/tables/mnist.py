"""MNIST by a residual network and by an ODE in its place: test error, parameters, memory against depth.

    pyjlode data mnist
    python benchmarks/tables/mnist.py [--quick] [--resume] [--seeds 3] [--out mnist.json]
                                      [--epochs 160] [--subset 60000] [--batch 128] [--short]

Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, table 1. Both networks halve the
image twice by convolutions, then have six residual blocks of 64 channels or one ODE whose field is such a block that
knows the time, and end in a linear layer. `RK-Net` is trained through the solver's operations (`adjoint=False`). The
ODE-Net is the same network, trained by `"backsolve"`, the paper's O(1) memory; its backward solve is to 1e-2, with the
parameters left out of the error, which takes a tenth of the evaluations. `--epochs`, `--subset` and `--batch` cut the
training for a CPU, and `--short` is a recipe for few epochs: Adam, one cycle of the rate, and images as they are, not
cropped. As many digits are tested as are trained with, 10,000 at the most.
"""

from __future__ import annotations

import argparse
import gc
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from common import Numbers, Runs, arguments, fit, pm, table
from torch import Tensor, nn
from torch.nn import functional as F

from pyjlode.data import sets
from pyjlode.nn import NeuralODE, ResNetBlock

WIDTH, BATCH = 64, 128
# Test error in percent, millions of parameters, memory and time against the depth L, as reported.
REPORTED = {
    "ResNet": ("0.41", "0.60", "O(L)"),
    "RK-Net": ("0.47", "0.22", "O(L)"),
    "ODE-Net": ("0.42", "0.22", "O(1)"),
}


class Field(nn.Module):
    """Norm, ReLU and convolution, twice, and a norm; the time is a channel more of each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(32, WIDTH) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH + 1, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        time_ = t.expand(len(h), 1, *h.shape[2:])
        for norm, conv in zip(self.norms, self.convs):
            h = conv(torch.cat([F.relu(norm(h)), time_], 1))
        return self.norms[2](h)


class Residual(nn.Module):
    """What a block of the residual network adds: norm, ReLU and convolution, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(32, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.GroupNorm(32, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h)


def block(name: str) -> nn.Module:
    if name == "ResNet":
        return nn.Sequential(*[ResNetBlock(Residual()) for _ in range(6)])
    how: dict[str, Any] = {"adjoint": False}
    if name == "ODE-Net":
        how = {"adjoint": "backsolve", "adjoint_rtol": 1e-2, "adjoint_atol": 1e-2}
        how["adjoint_options"] = {"norm": "seminorm"}
    return NeuralODE(Field(), rtol=1e-3, atol=1e-3, engine="torch", **how)


def network(name: str) -> nn.Sequential:
    """(B, 1, 28, 28) -> logits (B, 10)."""
    halve = [nn.GroupNorm(32, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1)]
    again = [nn.GroupNorm(32, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1)]
    end = [nn.GroupNorm(32, WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10)]
    return nn.Sequential(nn.Conv2d(1, WIDTH, 3), *halve, *again, block(name), *end)


def shifted(x: Tensor) -> Tensor:
    """Each image moved by up to four pixels either way, as the paper's training data are cropped."""
    n, _, side, _ = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    rows, columns = (torch.randint(0, 9, (n, 1)) + torch.arange(side) for _ in range(2))
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def recipe(model: nn.Module, steps: int, short: bool) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer, and its rate over the steps."""
    if short:
        adam = torch.optim.Adam(model.parameters())
        return adam, torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=steps)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    marks = [int(part * steps) for part in (0.375, 0.625, 0.875)]  # 60, 100 and 140 of 160 epochs
    return sgd, torch.optim.lr_scheduler.MultiStepLR(sgd, marks)


def run(name: str, args: argparse.Namespace) -> Numbers:
    digits = sets.mnist()
    subset, epochs, size = (256, 1, 128) if args.quick else (args.subset, args.epochs, args.batch)
    tested = min(subset, 10_000)
    torch.manual_seed(args.seed)
    chosen = torch.randperm(len(digits.x))[:subset]
    x, y = digits.x[chosen, None].float() / 255, digits.y[chosen]
    x_test, y_test = digits.x_test[:tested, None].float() / 255, digits.y_test[:tested]
    model = network(name)
    per_epoch = len(x) // size
    steps = epochs * per_epoch
    optimizer, schedule = recipe(model, steps, args.short)

    def step(i: int) -> Numbers:
        start = time.process_time()
        rows = torch.randint(0, len(x), (size,))
        loss = F.cross_entropy(model(x[rows] if args.short else shifted(x[rows])), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ode = model[7] if isinstance(model[7], NeuralODE) else None
        numbers = {"loss": loss.item(), "seconds": time.process_time() - start}
        return {**numbers, "nfe": ode.nfe, "nfe_backward": ode.nfe_backward} if ode else numbers

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = fit(f"{name}-{subset}-{epochs}-{size}{'-short' * args.short}", parts, step, steps, args, every=20)
    with torch.no_grad():
        wrong = sum(int((model(a).argmax(-1) != b).sum()) for a, b in zip(x_test.split(500), y_test.split(500)))
    found = {
        "error": 100 * wrong / len(x_test),
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "cpu_seconds": sum(x["seconds"] for x in history),
        "epochs": epochs,
        "subset": subset,
    }
    if "nfe" in history[-1]:
        last = history[-max(1, per_epoch) :]
        found |= {key: sum(x[key] for x in last) / len(last) for key in ("nfe", "nfe_backward")}
    return found


def saved(name: str, depth: int) -> float:
    """MB that the forward pass of a batch keeps for the backward pass, within the block, at this depth: blocks of the
    residual network, steps of `rk4` of the ODE."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()  # what the graph has let go of is not kept

    def pack(x: Tensor) -> Kept:
        kept.add(entry := Kept(x.detach()))  # with its graph it would hold itself alive
        return entry

    h = torch.randn(BATCH, WIDTH, 6, 6, requires_grad=True)
    if name == "ResNet":
        net: nn.Module = nn.Sequential(*[ResNetBlock(Residual()) for _ in range(depth)])
    else:
        adjoint = "backsolve" if name == "ODE-Net" else False
        options = {"step_size": 1 / depth}
        net = NeuralODE(Field(), method="rk4", adjoint=adjoint, options=options, engine="torch")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.x):
        out = net(h)
    gc.collect()
    storages = {x.data_ptr(): x.nbytes() for x in (entry.x.untyped_storage() for entry in kept)}
    for p in (*net.parameters(), out):
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / 2**20


class Kept:
    """A tensor that the backward pass will ask for."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, ...], list[Numbers]]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--subset", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--short", action="store_true")
    mine, rest = parser.parse_known_args(argv)
    args = arguments(__doc__, "mnist", rest)
    args.epochs, args.subset, args.batch, args.short = mine.epochs, mine.subset, mine.batch, mine.short
    found = Runs(args).all([(name,) for name in REPORTED], run)
    rows = [
        [
            name,
            pm(found[name,], "error", ".2f"),
            REPORTED[name][0],
            f"{found[name,][0]['parameters']:.2f}",
            *REPORTED[name][1:],
            pm(found[name,], "nfe", ".0f") if name != "ResNet" else "",
            pm(found[name,], "cpu_seconds", ".0f"),
        ]
        for name in REPORTED
    ]
    head = ["network", "error, %", "paper", "1e6 parameters", "paper", "memory, paper", "evaluations", "CPU s"]
    first = found["ResNet",][0]
    print(table(head, rows, f"{first['epochs']:.0f} epochs of {first['subset']:.0f} digits"))
    depths = (2, 4, 8)
    kept = [[name, *(saved(name, depth) for depth in depths)] for name in REPORTED]
    print(table(["MB kept by the block", *(f"depth {depth}" for depth in depths)], kept))
    return found


if __name__ == "__main__":
    main()
