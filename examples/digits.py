"""Handwritten digits, and the two networks that the examples compare on them: one field, as an ODE or as a stack."""

from __future__ import annotations

import argparse
import time

import torch
from shared import fit
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from pyjlode.nn import NeuralODE, ResNetBlock

WIDTH = 24


def folds(seed: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """scikit-learn's 1,797 digits of 8 by 8 pixels, in five folds: (x, y) to train with and (x, y) to test with, each
    digit in one test set; x (n, 1, 8, 8) from 0 to 1, y (n,)."""
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16
    y = torch.from_numpy(digits.target).long()
    split = StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y)
    return [(x[a], y[a], x[b], y[b]) for a, b in split]


class Field(nn.Module):
    """Two convolutions that know the time: shape (B, WIDTH, 4, 4) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, WIDTH) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH + 1, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        time = t.expand(len(h), 1, *h.shape[2:])
        for norm, conv in zip(self.norms, self.convs):
            h = conv(torch.cat([torch.tanh(norm(h)), time], 1))
        return h


class Classifier(nn.Module):
    """Pixels to features, the block under test, features to classes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
        )  # fmt: skip
        self.block = block
        self.head = nn.Sequential(nn.GroupNorm(4, WIDTH), nn.ReLU(), nn.Flatten(), nn.Linear(16 * WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, 8, 8) -> logits (B, 10)."""
        return self.head(self.block(self.stem(x)))


def resnet(depth: int = 6) -> Classifier:
    """The paper's six residual blocks, each with weights of its own."""
    return Classifier(nn.Sequential(*[ResNetBlock(Field()) for _ in range(depth)]))


def odenet(**solver_options: object) -> Classifier:
    """The same field once, as an ODE."""
    return Classifier(NeuralODE(Field(), **{"rtol": 1e-3, "atol": 1e-3, **solver_options}))


def train(
    model: Classifier, x: Tensor, y: Tensor, name: str, args: argparse.Namespace, epochs: int
) -> list[dict[str, float]]:
    """AdamW on cross entropy, every other batch shifted by up to a pixel; returns of each step the loss, the seconds,
    and for an ODE-Net the evaluations of the field."""
    batch = 64
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)

    def step(i: int) -> dict[str, float]:
        start = time.perf_counter()
        rows = torch.randint(0, len(x), (batch,))
        shift = torch.randint(-1, 2, (2,)).tolist() if i % 2 else [0, 0]
        loss = nn.functional.cross_entropy(model(torch.roll(x[rows], shift, (2, 3))), y[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ode = model.block if isinstance(model.block, NeuralODE) else None
        seen = {"loss": loss.item(), "seconds": time.perf_counter() - start}
        return {**seen, "nfe": ode.nfe, "nfe backward": ode.nfe_backward} if ode else seen

    return fit(name, {"model": model, "optimizer": optimizer, "schedule": schedule}, step, steps, args)


@torch.no_grad()
def errors(model: Classifier, x: Tensor, y: Tensor) -> int:
    """How many are classified wrongly."""
    return int((model(x).argmax(-1) != y).sum())
