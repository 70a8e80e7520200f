"""Weeks that are missing, and the year that follows: carbon dioxide on Mauna Loa.

    python examples/co2_irregular.py [--quick] [--resume] [--out co2_irregular.png]

The weekly record of 1958 to 2001 that statsmodels ships, with the gaps that it has. Models learn from the weeks before
1988; they are tested on windows of the years after. In a window, half of the weeks of two years are seen, picked at
random; asked for are the other half (interpolation) and the 52 weeks that follow (forecast). Errors are in parts per
million by volume.

The latent ODE reads a window with an ODE-RNN. Its rival is a GRU with time deltas at both ends: the same posterior from
a GRU, decoded by a GRU cell that is given the time to the next week. Two baselines know more of the matter than either:

* seasonal: the year's shape (four harmonics, fitted to the training weeks with a cubic trend) plus a straight line
  through the weeks seen in the window;
* Gaussian process: the covariance that Rasmussen & Williams fitted to this very record, a slow trend, a period of a
  year that may drift, and short irregularities; conditioned on the weeks seen in the window.

Source: Rubanova, Chen & Duvenaud, Latent ODEs for irregularly-sampled time series, 2019; the record is Keeling &
Whorf, Scripps Institution of Oceanography, 2004; the covariance, Rasmussen & Williams, Gaussian processes for machine
learning, 2006, section 5.4.3.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from shared import COLORS, INK, SHADE, STYLE, arguments, fit, headline, table
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, ExpSineSquared, RationalQuadratic, WhiteKernel
from statsmodels.datasets import co2
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyjlode import plot
from pyjlode.nn import (
    ODERNN,
    ConcatLinear,
    GaussianLikelihood,
    GRURecognition,
    LatentODE,
    TimeMLP,
    kl_annealing,
)

WEEKS, AHEAD = 104, 52  # of a window: seen in part, and to forecast
SPLIT = 1988.0
UNIT = 3.0  # ppm; the models see a window less the mean of what is seen of it, in this unit
NOISE = 0.3  # ppm, of a weekly value
TIMES = torch.arange(WEEKS + AHEAD) / 52  # years


class Windows(NamedTuple):
    """A batch: ppm (B, WEEKS + AHEAD), NaN where the record has a gap; year (B,) of the first week; seen
    (B, WEEKS + AHEAD), bool."""

    ppm: Tensor
    year: Tensor
    seen: Tensor

    @property
    def level(self) -> Tensor:
        """(B, 1), the mean of what is seen."""
        return torch.where(self.seen, self.ppm, 0).sum(1, keepdim=True) / self.seen.sum(1, keepdim=True)

    @property
    def scaled(self) -> Tensor:
        """(B, WEEKS + AHEAD, 1), what the models see."""
        return ((self.ppm - self.level) / UNIT)[..., None]


def record() -> tuple[Tensor, Tensor]:
    """Years (T,) and weekly ppm (T,), NaN in the gaps."""
    data = co2.load_pandas().data["co2"]
    years = data.index.year + (data.index.day_of_year - 1) / 365.25
    return torch.tensor(years.to_numpy(), dtype=torch.float64), torch.tensor(data.to_numpy(), dtype=torch.float64)


def windows(years: Tensor, ppm: Tensor, starts: Tensor) -> Windows:
    """Windows that start at these weeks, each with a random half of its first two years seen."""
    index = starts[:, None] + torch.arange(WEEKS + AHEAD)
    cut = ppm[index].float()
    seen = (torch.rand(len(starts), WEEKS + AHEAD) < 0.5) & ~cut.isnan()
    seen[:, WEEKS:] = False
    return Windows(cut, years[starts], seen)


class GRUDecoder(nn.Module):
    """The rival: latent state from a GRU, and a GRU cell that is told the time to the next week."""

    def __init__(self, hidden: int, latent: int) -> None:
        super().__init__()
        self.recognition = GRURecognition(1, hidden, latent)
        self.start, self.cell, self.head = nn.Linear(latent, hidden), nn.GRUCell(1, hidden), nn.Linear(hidden, 1)
        self.likelihood = GaussianLikelihood(nn.Identity(), NOISE / UNIT, learn_std=True)

    def decode(self, z: Tensor, t: Tensor) -> Tensor:
        """z (B, Z), t (T,) -> (B, T, 1)."""
        h, told = torch.tanh(self.start(z)), []
        for gap in t.diff(prepend=t[:1]):
            h = self.cell(gap.expand(len(z), 1), h)
            told.append(self.head(h))
        return torch.stack(told, 1)

    def loss(self, x: Tensor, seen: Tensor, known: Tensor, weight: float) -> Tensor:
        q = self.recognition(x, TIMES, seen)
        log_likelihood = self.likelihood.log_prob(self.decode(q.rsample(), TIMES), x.nan_to_num(), known[..., None])
        prior = torch.distributions.Independent(torch.distributions.Normal(0 * q.mean, 1.0), 1)
        return -(log_likelihood - weight * kl_divergence(q, prior)).mean()

    def predict(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.decode(self.recognition(x, TIMES, seen).mean, TIMES)


class Latent(nn.Module):
    """The latent ODE, with the rival's interface."""

    def __init__(self, hidden: int, latent: int) -> None:
        super().__init__()
        field = TimeMLP([latent, 48, 48, latent], layer=ConcatLinear)
        self.ode = LatentODE(
            ODERNN(1, hidden, latent, TimeMLP([hidden, 32, hidden], layer=ConcatLinear)),
            field,
            GaussianLikelihood(nn.Linear(latent, 1), NOISE / UNIT, learn_std=True),
            latent,
            rtol=1e-3,
            atol=1e-3,
        )

    def loss(self, x: Tensor, seen: Tensor, known: Tensor, weight: float) -> Tensor:
        elbo = self.ode(x[:, :WEEKS], TIMES[:WEEKS], seen[:, :WEEKS], target=(x, TIMES, known))
        return -elbo.value(weight).mean()

    def predict(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.ode.predict(x[:, :WEEKS], TIMES[:WEEKS], seen[:, :WEEKS], TIMES)


def train(model: Any, name: str, years: Tensor, ppm: Tensor, args: argparse.Namespace) -> Any:
    """On windows from before `SPLIT`, each week known being asked for."""
    steps, batch = (60, 32) if args.quick else (1500, 48)
    last = int((years < SPLIT).sum()) - WEEKS - AHEAD
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)

    def step(i: int) -> dict[str, float]:
        w = windows(years, ppm, torch.randint(0, last + 1, (batch,)))
        known = ~w.ppm.isnan()
        loss = model.loss(w.scaled, w.seen, known, kl_annealing(i, steps // 2)) / known[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return {"loss": loss.item()}

    fit(name, {"model": model, "optimizer": optimizer, "schedule": schedule}, step, steps, args)
    return model


def harmonics(years: Tensor) -> np.ndarray:
    angle = 2 * math.pi * years.double().numpy()[..., None] * np.arange(1, 5)
    return np.concatenate([np.sin(angle), np.cos(angle)], -1)


def seasonal(w: Windows, years: Tensor, ppm: Tensor) -> Tensor:
    """The year's shape from the training weeks, plus a line through what is seen: (B, WEEKS + AHEAD)."""
    old = (years < SPLIT) & ~ppm.isnan()
    t = years[old].numpy() - 1970
    design = np.concatenate([harmonics(years[old]), (t[:, None] / 10) ** np.arange(4)], -1)
    shape = np.linalg.lstsq(design, ppm[old].numpy(), rcond=None)[0][:8]
    told = []
    for values, year, seen in zip(w.ppm, w.year, w.seen):
        season = harmonics(year + TIMES.double()) @ shape
        line = np.stack([np.ones(len(TIMES)), TIMES.numpy()], -1)
        known = seen.numpy()
        fitted = np.linalg.lstsq(line[known], values.numpy()[known] - season[known], rcond=None)[0]
        told.append(torch.from_numpy(season + line @ fitted))
    return torch.stack(told).float()


def gaussian_process(w: Windows) -> Tensor:
    """Rasmussen & Williams's covariance, conditioned on what is seen: (B, WEEKS + AHEAD)."""
    kernel = (
        ConstantKernel(66.0**2) * RBF(67.0)
        + ConstantKernel(2.4**2) * RBF(90.0) * ExpSineSquared(1.3, 1.0)
        + ConstantKernel(0.66**2) * RationalQuadratic(1.2, 0.78)
        + ConstantKernel(0.18**2) * RBF(1.6 / 12)
        + WhiteKernel(0.19**2)
    )
    told = []
    for values, level, seen in zip(w.ppm, w.level, w.seen):
        process = GaussianProcessRegressor(kernel, optimizer=None)
        process.fit(TIMES[seen, None].double().numpy(), (values[seen] - level).double().numpy())
        told.append(torch.from_numpy(process.predict(TIMES[:, None].double().numpy())).float() + level)
    return torch.stack(told)


def scores(told: Tensor, w: Windows) -> dict[str, float]:
    """Root mean square errors in ppm, over the weeks that the record has."""
    wrong, known = (told - w.ppm).square(), ~w.ppm.isnan() & ~w.seen
    return {
        "interpolation": float(wrong[:, :WEEKS][known[:, :WEEKS]].mean().sqrt()),
        "forecast": float(wrong[:, WEEKS:][known[:, WEEKS:]].mean().sqrt()),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, print and draw; returns the errors."""
    args = arguments(__doc__, "co2_irregular", argv)
    years, ppm = record()
    torch.manual_seed(args.seed)
    first = int((years < SPLIT).sum())
    test = windows(years, ppm, torch.arange(first, len(years) - WEEKS - AHEAD, 26))
    models = {}
    for name, build in (("latent ODE", Latent), ("GRU with time deltas", GRUDecoder)):
        torch.manual_seed(args.seed)
        models[name] = train(build(32, 8), name.replace(" ", "-"), years, ppm, args)
    with torch.no_grad():
        told = {n: m.predict(test.scaled, test.seen)[..., 0] * UNIT + test.level for n, m in models.items()}
    told["seasonal"] = seasonal(test, years, ppm)
    told["Gaussian process"] = gaussian_process(test)
    told["mean of what is seen"] = test.level.expand_as(test.ppm)
    errors = {name: scores(values, test) for name, values in told.items()}
    print(
        table(
            ["RMSE, ppm", "interpolation", "forecast"],
            [[name, *e.values()] for name, e in errors.items()],
            f"{len(test.year)} windows of {SPLIT:.0f}-{float(years[-1]):.0f}: two years half seen, then one year ahead",
        )
    )
    with matplotlib.rc_context(STYLE):
        draw(test, told, errors, args)
    return errors


def draw(test: Windows, told: dict[str, Tensor], errors: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Two windows and what each model makes of them; beside them the errors of the year ahead over all windows."""
    canvas = plot.figure(14, 6.4)
    grid = canvas.add_gridspec(2, 2, width_ratios=(3, 1))
    for row, i in enumerate((0, len(test.year) // 2)):
        ax = canvas.add_subplot(grid[row, 0])
        t, seen = TIMES + float(test.year[i]), test.seen[i]
        ax.axvspan(float(t[WEEKS]), float(t[-1]) + 0.02, color=SHADE, lw=0)
        ax.text(float(t[WEEKS]) + 0.02, 0.96, "forecast", va="top", transform=ax.get_xaxis_transform())
        for (name, values), color in zip(list(told.items())[:4], COLORS):
            plot.trajectory(ax, t, values[i], labels=[name], colors=[color], lw=1.8)
        dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "ms": 3.5, "colors": [INK]}
        plot.trajectory(ax, t[seen], test.ppm[i][seen], labels=["seen"], **dots)
        plot.trajectory(ax, t[~seen], test.ppm[i][~seen], labels=["held out"], mfc="white", **dots)
        ax.set(ylabel="CO₂ (ppm)", xlim=(float(t[0]) - 0.02, float(t[-1]) + 0.02))
    ax.set_xlabel("year")
    canvas.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    right = canvas.add_subplot(grid[:, 1])
    names = list(told)[:4]
    bars = right.barh(range(4), [errors[n]["forecast"] for n in names], color=COLORS[:4])
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.set_yticks(range(4), [n.replace(" with ", "\nwith ").replace(" process", "\nprocess") for n in names])
    right.set(title="Error of the year ahead", xlabel="ppm", xlim=(0, 1.2 * max(errors[n]["forecast"] for n in names)))
    right.invert_yaxis()
    less = 1 - errors["latent ODE"]["forecast"] / errors["GRU with time deltas"]["forecast"]
    words = (
        f"a latent ODE errs {less:.0%} less than a GRU" if less > 0.02 else "four models, from half of the weeks before"
    )
    headline(canvas, f"Carbon dioxide a year ahead: {words}")
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
