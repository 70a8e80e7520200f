"""Falls of a hopper, seen in part: latent ODEs against recurrent networks, within what is seen and beyond it.

    pip install 'pyjlode[data]' && pyjlode data hopper
    python benchmarks/tables/hopper.py [--quick] [--resume] [--seeds 3] [--seen 50] [--models NAME ...]
                                       [--out hopper.json]

Rubanova, Chen & Duvenaud, Latent ODEs for irregularly-sampled time series, 2019, tables 3 and 4: mean squared errors of
14 numbers of a simulated fall, each scaled to [0, 1]. Interpolation: some of the times are seen, all are to be told.
Extrapolation: of the first half of the times as many are seen, and the second half is to be told. The latent ODE has an
ODE-RNN as recognition network. Beside it are the same with a GRU as recognition network; the RNN-VAE, which has a GRU
at both ends; the same without its noise; and a GRU that tells each time from those before. The paper has 10,000 falls;
what is cut here to fit a CPU stands in `SIZES`. `--seen` says how many per cent of the times are seen, and
`--models` which models.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from common import Numbers, Runs, arguments, fit, pm, table
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from pyjlode.data import sets
from pyjlode.nn import ODERNN, Elbo, GaussianLikelihood, GRURecognition, LatentODE, kl_annealing

TASKS = ("interpolation", "extrapolation")
# Of the latent ODE with an ODE-RNN, times 1e-2, as reported; the paper's other figures are not repeated here.
REPORTED = {("interpolation", "50"): "0.285", ("extrapolation", "50"): "1.258"}
STD = 0.05  # of the observations, given their state


class Sizes(NamedTuple):
    falls: int = 1000
    tested: int = 250
    every: int = 4  # of the 200 times of a fall
    steps: int = 600
    batch: int = 50
    hidden: int = 64
    latent: int = 15


SIZES, QUICK = Sizes(), Sizes(falls=60, tested=20, every=10, steps=3, batch=20)


class Part(NamedTuple):
    """Falls of which some times are seen.

    Attributes:
        x: (B, T, 14). t: (T,). seen: (B, T), bool. told: (T,), bool, the times that are asked for.
    """

    x: Tensor
    t: Tensor
    seen: Tensor
    told: Tensor

    def rows(self, rows: Tensor) -> Part:
        return self._replace(x=self.x[rows], seen=self.seen[rows])


def falls(task: str, fraction: float, sizes: Sizes, seed: int) -> tuple[Part, Part]:
    """To train with, and to test with."""
    x = sets.hopper()[: sizes.falls + sizes.tested, :: sizes.every]
    low, high = x[: sizes.falls].amin((0, 1)), x[: sizes.falls].amax((0, 1))
    x = (x - low) / (high - low)
    n = x.shape[1]
    t = torch.linspace(0, 1, n)
    open_to = n if task == "interpolation" else n // 2
    random = torch.Generator().manual_seed(seed)
    order = torch.rand(len(x), n, generator=random)
    order[:, open_to:] = 2.0  # never seen
    seen = order.argsort(1).argsort(1) < max(2, round(fraction * open_to))
    told = torch.arange(n) >= (0 if task == "interpolation" else open_to)
    whole = Part(x, t, seen, told)
    return whole.rows(torch.arange(sizes.falls)), whole.rows(torch.arange(sizes.falls, len(x)))


class Field(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.last = nn.Linear(width, size)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.last(self.net(z))


class GRUs(nn.Module):
    """A GRU reads what is seen, with the time since the last; another tells every time after the other. With noise
    between the two it is the paper's RNN-VAE, without noise an autoencoder."""

    def __init__(self, sizes: Sizes, noise: bool, channels: int = 14) -> None:
        super().__init__()
        self.noise = noise
        self.reader = GRURecognition(channels, sizes.hidden, sizes.latent)
        self.start = nn.Linear(sizes.latent, sizes.hidden)
        self.cell, self.head = nn.GRUCell(channels + 1, sizes.hidden), nn.Linear(sizes.hidden, channels)

    def elbo(self, part: Part) -> Elbo:
        q = self.reader(part.x, part.t, part.seen)
        error = (self.tell(q.rsample() if self.noise else q.mean, part) - part.x) / STD
        prior = Independent(Normal(torch.zeros_like(q.mean), 1.0), 1)
        kl = kl_divergence(q, prior) if self.noise else q.mean.new_zeros(len(q.mean))
        return Elbo(-error.square().sum((1, 2)) / 2, kl)

    def forward(self, part: Part) -> Tensor:
        return self.tell(self.reader(part.x, part.t, part.seen).mean, part)

    def tell(self, z: Tensor, part: Part) -> Tensor:
        """From the latent state (B, Z), the numbers at each time: (B, T, 14)."""
        h = torch.tanh(self.start(z))
        last, now = part.x.new_zeros(len(part.x), part.x.shape[2]), 0.0
        out = []
        for time_ in part.t.tolist():
            h = self.cell(torch.cat([last, last.new_full((len(last), 1), time_ - now)], 1), h)
            last, now = self.head(h), time_
            out.append(last)
        return torch.stack(out, 1)


class Autoregression(nn.Module):
    """A GRU that goes forward, tells each time from those before it and the time since the last, and feeds on what is
    seen, or on what it has told where nothing is: the paper's RNN with time deltas."""

    def __init__(self, sizes: Sizes, channels: int = 14) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2 * channels + 1, sizes.hidden), nn.Linear(sizes.hidden, channels)

    def elbo(self, part: Part) -> Elbo:
        error = (self(part) - part.x) / STD
        return Elbo(-error.square().sum((1, 2)) / 2, error.new_zeros(len(error)))

    def forward(self, part: Part) -> Tensor:
        h = part.x.new_zeros(len(part.x), self.cell.hidden_size)
        last, now, out = part.x.new_zeros(len(part.x), 2 * part.x.shape[2]), 0.0, []
        for x, seen, time_ in zip(part.x.unbind(1), part.seen.T[:, :, None], part.t.tolist()):
            h = self.cell(torch.cat([last, last.new_full((len(last), 1), time_ - now)], 1), h)
            told, now = self.head(h), time_
            last = torch.cat([torch.where(seen, x, told), seen.expand_as(x)], 1)
            out.append(told)
        return torch.stack(out, 1)


def latent(encoder: str, sizes: Sizes) -> LatentODE:
    reader: nn.Module = GRURecognition(14, sizes.hidden, sizes.latent)
    if encoder == "ODE-RNN":
        reader = ODERNN(14, sizes.hidden, sizes.latent, Field(sizes.hidden, sizes.hidden))
    decoder = nn.Sequential(nn.Linear(sizes.latent, sizes.hidden), nn.Tanh(), nn.Linear(sizes.hidden, 14))
    likelihood = GaussianLikelihood(decoder, std=STD)
    how = {"rtol": 1e-3, "atol": 1e-4, "engine": "torch"}
    return LatentODE(reader, Field(sizes.latent, 100), likelihood, sizes.latent, **how)


MODELS = {
    "RNN with time deltas": Autoregression,
    "RNN-VAE": lambda sizes: GRUs(sizes, True),
    "RNN autoencoder": lambda sizes: GRUs(sizes, False),
    "latent ODE, GRU": lambda sizes: latent("GRU", sizes),
    "latent ODE, ODE-RNN": lambda sizes: latent("ODE-RNN", sizes),
}


def predicted(model: nn.Module, part: Part) -> Tensor:
    if isinstance(model, LatentODE):
        return model.predict(part.x, part.t, part.seen, part.t)
    return model(part)


def loss(model: nn.Module, part: Part, i: int, steps: int) -> Tensor:
    """Of all times, as in the paper: those that are seen, and those that are to be told."""
    if isinstance(model, LatentODE):
        elbo = model(part.x, part.t, part.seen, target=(part.x, part.t, None))
    else:
        elbo = model.elbo(part)
    return -elbo.value(kl_annealing(i, steps // 2)).mean() / part.x[0].numel()


def run(name: str, task: str, seen: str, args: argparse.Namespace) -> Numbers:
    sizes = QUICK if args.quick else SIZES
    trained, tested = falls(task, int(seen) / 100, sizes, args.seed)
    torch.manual_seed(args.seed)
    model = MODELS[name](sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sizes.steps)

    def step(i: int) -> Numbers:
        start = time.process_time()
        value = loss(model, trained.rows(torch.randint(0, len(trained.x), (sizes.batch,))), i, sizes.steps)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        return {"loss": value.item(), "seconds": time.process_time() - start}

    what = f"{name}-{task}-{seen}".replace(" ", "_").replace(",", "")
    history = fit(what, {"model": model, "optimizer": optimizer, "schedule": schedule}, step, sizes.steps, args)
    with torch.no_grad():
        error = (predicted(model, tested) - tested.x)[:, tested.told].square().mean()
        still = (tested.x.mean((0, 1)) - tested.x)[:, tested.told].square().mean()
    seconds = sum(x["seconds"] for x in history)
    return {"error": 100 * float(error), "of the mean": 100 * float(still), "cpu_seconds": seconds}


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, ...], list[Numbers]]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seen", default="50", help="per cent of the times, several by commas: 10,20,30,50")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    mine, rest = parser.parse_known_args(argv)
    args = arguments(__doc__, "hopper", rest)
    runs, found = Runs(args), {}
    shown = mine.seen.split(",")
    for seen in shown:
        found |= runs.all([(name, task, seen) for task in TASKS for name in mine.models], run)
    cells = [(task, seen) for task in TASKS for seen in shown]
    reported = [REPORTED[task, "50"] for task in TASKS]
    rows = [
        [
            name,
            *(pm(found[name, task, seen], "error", ".3f") for task, seen in cells),
            *(reported if name == "latent ODE, ODE-RNN" else ["", ""]),
        ]
        for name in mine.models
    ]
    head = ["mean squared error, 1e-2", *(f"{task}, {seen} %" for task, seen in cells)]
    print(table([*head, *(f"{task}, 50 %, paper" for task in TASKS)], rows))
    return found


if __name__ == "__main__":
    main()
