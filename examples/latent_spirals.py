"""A latent ODE against a recurrent network: spirals seen at 30, 50 or 100 irregular times, and where they go.

    python examples/latent_spirals.py [--quick] [--resume] [--out latent_spirals.png]

After Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, section 5.1: 1,000 spirals
in the plane, half of them clockwise, each from a starting point of its own; of 100 regular times n are seen, picked at
random without replacement, with noise. Both models are trained on what is seen of 800 spirals. The table gives the root
mean square error on the 100 times that follow, of the 200 other spirals, against the curve without noise.

The paper does not say how strong its noise is and whether its errors are against noisy or clean curves: its figures
stand beside ours for the order of magnitude, not as the same experiment.

The latent ODE is the paper's: 4 latent states, 20 hidden units, a recurrent network of 25 units that reads the
observations backward (here a GRU that is given time gaps). The rival is the paper's second baseline: a recurrent
network of 25 units (a GRU, too) that is given the time to the next observation, and trained to foretell it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import torch
from shared import COLORS, FAINT, INK, STYLE, arguments, fit, table
from torch import Tensor, nn

from pyjlode import plot
from pyjlode.nn import ConcatLinear, GaussianLikelihood, GRURecognition, LatentODE, TimeMLP, kl_annealing

SEEN, AHEAD = 100, 100  # times that observations are drawn from, and times to foretell
NOISE = 0.1
SCALE = 3.0  # the models see the plane in this unit, and a time of 1 for the 100 times
PAPER = {30: (0.3937, 0.1642), 50: (0.3202, 0.1502), 100: (0.1813, 0.1346)}  # table 2: RNN, latent ODE


class Spirals(NamedTuple):
    """Curves, in units of SCALE: shape (B, SEEN + AHEAD, 2); and of each the n times that are seen: x (B, n, 2) with
    noise, t (B, n) from 0 to 1."""

    curve: Tensor
    x: Tensor
    t: Tensor


def spirals(count: int, n: int) -> Spirals:
    """Windows of an Archimedean spiral r = 0.3 angle of three turns at 1,000 points, or of its mirror image."""
    angle = torch.linspace(0, 6 * math.pi, 1000)
    whole = 0.3 * angle[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    start = torch.randint(0, len(angle) - SEEN - AHEAD + 1, (count, 1))
    curve = whole[start + torch.arange(SEEN + AHEAD)] / SCALE
    curve[::2, :, 0] *= -1
    index = torch.rand(count, SEEN).argsort(-1)[:, :n].sort(-1).values
    x = curve.gather(1, index[..., None].expand(-1, -1, 2))
    return Spirals(curve, x + NOISE / SCALE * torch.randn_like(x), index / SEEN)


TIMES = torch.arange(SEEN + AHEAD) / SEEN


class RNN(nn.Module):
    """Foretells each observation from those before it and the time to it."""

    def __init__(self, hidden: int = 25) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, n, 2), t (B, n) -> what is expected of x[:, 1:]: (B, n - 1, 2)."""
        h, told = x.new_zeros(len(x), self.cell.hidden_size), []
        for i, gap in enumerate(t.diff(dim=1).unbind(1)):
            h = self.cell(torch.cat([x[:, i], gap[:, None]], -1), h)
            told.append(self.head(h))
        return torch.stack(told, 1)

    def go_on(self, x: Tensor, t: Tensor, times: Tensor) -> Tensor:
        """Read the observations, then feed on its own predictions at `times` (M,): (B, M, 2)."""
        h, now, told = x.new_zeros(len(x), self.cell.hidden_size), t[:, 0], []
        point = x[:, 0]
        stops = torch.cat([t[:, 1:], times.expand(len(x), -1)], 1).unbind(1)
        for i, stop in enumerate(stops, 1):
            h = self.cell(torch.cat([point, (stop - now)[:, None]], -1), h)
            told.append(self.head(h))
            point, now = x[:, i] if i < t.shape[1] else told[-1], stop
        return torch.stack(told[t.shape[1] - 1 :], 1)


def latent_ode(quick: bool) -> LatentODE:
    decoder = nn.Sequential(nn.Linear(4, 20), nn.ELU(), nn.Linear(20, 2))
    return LatentODE(
        GRURecognition(2, 25, 4),
        TimeMLP([4, 20, 20, 4], layer=ConcatLinear, activation=nn.ELU),
        GaussianLikelihood(decoder, std=NOISE / SCALE),
        4,
        rtol=1e-2 if quick else 1e-3,
        atol=1e-2 if quick else 1e-3,
    )


def train_latent(data: Spirals, name: str, args: argparse.Namespace) -> LatentODE:
    torch.manual_seed(args.seed)
    model = latent_ode(args.quick)
    steps, batch = (250, 100) if args.quick else (2000, 100)
    warmup = steps // 4

    def loss(i: int) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(0, len(data.x), (batch,))
        elbo = model(data.x[rows], data.t[rows])
        # For each number seen, so that one rate of learning serves 30 and 100 of them.
        value = -elbo.value(kl_annealing(i, warmup)).mean() / data.x[0].numel()
        return value, {"kl": elbo.kl.mean().item(), "nfe": model.ode.nfe}

    return train(model, loss, steps, f"latent-ode-{name}", args)


def train_rnn(data: Spirals, name: str, args: argparse.Namespace) -> RNN:
    torch.manual_seed(args.seed)
    model = RNN()
    steps, batch = (250, 100) if args.quick else (2000, 100)

    def loss(i: int) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(0, len(data.x), (batch,))
        x = data.x[rows]
        # The Gaussian log-likelihood up to its constants; the noise is told, as it is to the latent ODE.
        return ((model(x, data.t[rows]) - x[:, 1:]) * SCALE / NOISE).square().mean() / 2, {}

    return train(model, loss, steps, f"rnn-{name}", args)


def train(model: Any, loss: Any, steps: int, name: str, args: argparse.Namespace) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-4)

    def step(i: int) -> dict[str, float]:
        value, shown = loss(i)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        return {"loss": value.item(), **shown}

    fit(name, {"model": model, "optimizer": optimizer, "schedule": schedule}, step, steps, args)
    return model


def rmse(told: Tensor, curve: Tensor) -> float:
    """In the units of the plane, over both coordinates."""
    return float((told - curve).square().mean().sqrt()) * SCALE


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, print and draw; returns the errors by number of observations."""
    args = arguments(__doc__, "latent_spirals", argv)
    numbers = (30,) if args.quick else (30, 50, 100)
    errors, shown = {}, []
    for n in numbers:
        torch.manual_seed(args.seed + n)
        data, test = spirals(800, n), spirals(200, n)
        latent, rnn = train_latent(data, str(n), args), train_rnn(data, str(n), args)
        with torch.no_grad():
            path = latent.predict(test.x, test.t, None, TIMES)
            ahead = rnn.go_on(test.x, test.t, TIMES[SEEN:])
        still = test.x[:, -1:].expand(-1, AHEAD, -1)
        errors[n] = {
            "rnn": rmse(ahead, test.curve[:, SEEN:]),
            "latent_ode": rmse(path[:, SEEN:], test.curve[:, SEEN:]),
            "within": rmse(path[:, :SEEN], test.curve[:, :SEEN]),
            "still": rmse(still, test.curve[:, SEEN:]),
        }
        shown.append((n, test, path, ahead))
    print(
        table(
            ["seen of 100", "RNN", "latent ODE", "last point", "latent ODE, within", "RNN, paper", "latent ODE, paper"],
            [[str(n), e["rnn"], e["latent_ode"], e["still"], e["within"], *PAPER[n]] for n, e in errors.items()],
            f"RMSE on the {AHEAD} times that follow, 200 test spirals, noise {NOISE} in what is seen",
        )
    )
    with matplotlib.rc_context(STYLE):
        draw(shown, args)
    return errors


def draw(shown: list[tuple[int, Spirals, Tensor, Tensor]], args: argparse.Namespace) -> None:
    """For each number of observations, four test spirals: seen, truth, and what either model makes of the rest."""
    canvas = plot.figure(12, 3.3 * len(shown) + 0.6)
    for row, (n, test, path, ahead) in zip(canvas.subplots(len(shown), 4, squeeze=False), shown):
        for i, ax in enumerate(row):
            curve = test.curve[i] * SCALE
            plot.phase_portrait(ax, curve, color=FAINT, lw=5, label="truth")
            plot.phase_portrait(ax, path[i, :SEEN] * SCALE, color=COLORS[0], lw=2, label="latent ODE")
            plot.phase_portrait(
                ax, path[i, SEEN - 1 :] * SCALE, color=COLORS[0], lw=2, ls=(0, (2, 1)), label="latent ODE, ahead"
            )
            plot.phase_portrait(ax, ahead[i] * SCALE, color=COLORS[1], lw=2, ls=(0, (2, 1)), label="RNN, ahead")
            plot.phase_portrait(ax, test.x[i] * SCALE, color=INK, marker="o", ms=3, mew=0, ls="none", label="seen")
            ax.set(aspect="equal", title=f"{n} of {SEEN} seen" if i == 0 else None)
            ax.set_box_aspect(1)
            ax.margins(0.1)
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=5)
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
