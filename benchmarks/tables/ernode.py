"""What it saves to have the solver's own estimates in the loss: evaluations and time of prediction.

    python benchmarks/tables/ernode.py [--quick] [--resume] [--seeds 3] [--out ernode.json]

Pal, Ma, Shah & Rackauckas, Opening the blackbox: accelerating neural differential equations by regularizing internal
solver heuristics, 2021: a classifier whose hidden layers are an ODE, trained with the estimated local error (ERNODE) or
stiffness (SRNODE) of its solves in the loss, by `options={"estimates": True}`. The paper has MNIST, with a field of one
hidden layer of 100 units and `tsit5`; here it is scikit-learn's digits (1,437 to train with, 360 to test with), a field
of the same kind, and tolerances of 1e-6. `kinetic energy` is the regulariser of Finlay et al. 2020 on the same network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from common import Numbers, Runs, arguments, pm, table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from pyjlode import solve
from pyjlode.nn import ConcatLinear, TimeMLP

# Weights of the regularisers: on an untrained network each term is some hundredths of the loss.
WEIGHTS = {"plain": 0.0, "kinetic energy": 0.05, "error (ERNODE)": 1e6, "stiffness (SRNODE)": 0.02}
HOW = {"method": "tsit5", "rtol": 1e-6, "atol": 1e-6, "engine": "torch"}


class Field(nn.Module):
    """The network that moves the pixels; beside them, if asked for, the kinetic energy of the way."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = TimeMLP([size, 100, size], layer=ConcatLinear)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.net(t, h))

    def with_energy(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        dh = self(t, state[0])
        return dh, dh.square().sum(-1)


class Classifier(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.field, self.head = kind, Field(64), nn.Linear(64, 10)
        self.nfe = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 64) -> logits (B, 10), and what is to be small, 0-d."""
        span, energy = (0.0, 1.0), torch.zeros(())
        if self.kind == "kinetic energy" and self.training:
            found = solve(self.field.with_energy, (x, x.new_zeros(len(x))), span, dense=False, **HOW)
            h, energy = found.h[0][-1], found.h[1][-1].mean()
        else:
            options = {"estimates": self.training and self.kind.endswith("NODE)")}
            found = solve(self.field, x, span, dense=False, **HOW, options=options)
            h = found.h[-1]
        self.nfe = found.stats.nfe
        small = {"plain": energy, "kinetic energy": energy, "error (ERNODE)": found.stats.error_estimate}
        small["stiffness (SRNODE)"] = found.stats.stiffness_estimate
        return self.head(h), small[self.kind] if self.training else energy


def run(kind: str, args: argparse.Namespace) -> Numbers:
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=360, stratify=digits.target, random_state=0)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    x, x_test = x.float(), x_test.float()
    torch.manual_seed(args.seed)
    model = Classifier(kind)
    epochs = 1 if args.quick else 40
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            logits, small = model(x[rows])
            optimizer.zero_grad()
            (F.cross_entropy(logits, y[rows]) + WEIGHTS[kind] * small).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
    model.eval()
    times = []
    with torch.no_grad():
        for _ in range(20):
            start = time.process_time()
            logits, _ = model(x_test)
            times.append(time.process_time() - start)
    accuracy = 100 * float((logits.argmax(-1) == y_test).double().mean())
    return {"accuracy": accuracy, "nfe": model.nfe, "milliseconds": 1e3 * min(times)}


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, ...], list[Numbers]]:
    args = arguments(__doc__, "ernode", argv)
    found = Runs(args).all([(kind,) for kind in WEIGHTS], run)
    head = ["in the loss", "accuracy, %", "evaluations", "prediction, ms", "training, CPU s"]
    forms = {"accuracy": ".1f", "nfe": ".0f", "milliseconds": ".1f", "cpu_seconds": ".0f"}
    rows = [[kind, *(pm(found[kind,], key, form) for key, form in forms.items())] for kind in WEIGHTS]
    print(table(head, rows))
    print("\nThe paper: prediction takes half the time, in the best of its cases.")
    return found


if __name__ == "__main__":
    main()
