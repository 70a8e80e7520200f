"""Depth that adapts: one trained network, with the tolerance as a dial and the input's difficulty as another.

    python examples/adaptive_depth.py [--quick] [--resume] [--out adaptive_depth.png]

"The same network, less compute where the input is simple": looked for in two places.

A disc inside a ring (Dupont, Doucet & Teh 2019) is told from it by an ODE in the plane and a linear layer. Paths in the
plane cannot cross, so the flow has to tear the ring open, and is rough where it does and near the border. After
training, at rtol=atol=1e-3, the same weights are solved at other tolerances, which trades evaluations of the field for
accuracy; and each test point is solved alone, so that its evaluations are its own. Difficulty is the entropy of the
predicted classes; the table gives its rank correlation with the evaluations.

The same is asked of an ODE-Net for scikit-learn's digits (real data; bosh3, whose steps of three evaluations make the
dial a fine one). There the field is normalised in each layer and smooth for every digit, hard or easy: a few
evaluations are enough for all of them, and the claim is hardly seen.

Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, sections 3 and 3.2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import torch
from digits import folds, odenet, train
from scipy.stats import spearmanr
from shared import COLORS, INK, STYLE, arguments, fit, headline, table
from torch import Tensor, nn

from pyjlode import plot
from pyjlode.nn import ConcatLinear, NeuralODE, TimeMLP

DISC, RING = 1.0, (1.2, 2.0)  # radii


class Found(NamedTuple):
    """What one network showed.

    Attributes:
        dial: rows of (tolerance, evaluations for the whole test set as one batch, test error in %, RMS distance of the
            logits from those at 1e-6).
        nfe, entropy, right: shape (n,), of the inputs solved one by one.
        rank, p: rank correlation of nfe and entropy, and its p-value.
    """

    dial: list[tuple[float, int, float, float]]
    nfe: Tensor
    entropy: Tensor
    right: Tensor
    rank: float
    p: float

    @property
    def quarters(self) -> list[tuple[float, float]]:
        """Mean nfe, and % right, from the quarter of least entropy to that of most."""
        order = self.entropy.argsort().chunk(4)
        return [(float(self.nfe[i].mean()), float(100 * self.right[i].float().mean())) for i in order]


def disc_and_ring(n: int) -> tuple[Tensor, Tensor]:
    """Points (n, 2), uniform on either, and which of the two (n,)."""
    y, u = torch.randint(0, 2, (n,)), torch.rand(n)
    inner, outer = RING
    radius = torch.where(y == 0, DISC * u.sqrt(), (inner**2 + (outer**2 - inner**2) * u).sqrt())
    angle = 2 * math.pi * torch.rand(n)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1), y


def plane(args: argparse.Namespace) -> nn.Sequential:
    """The network for the disc and the ring, trained on points that never repeat."""
    steps = 120 if args.quick else 600
    torch.manual_seed(args.seed)
    ode = NeuralODE(TimeMLP([2, 32, 32, 2], layer=ConcatLinear), rtol=1e-3, atol=1e-3)
    model = nn.Sequential(ode, nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2 if args.quick else 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(i: int) -> dict[str, float]:
        x, y = disc_and_ring(256)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return {"loss": loss.item(), "nfe": ode.nfe}

    fit("disc-and-ring", {"model": model, "optimizer": optimizer, "schedule": schedule}, step, steps, args)
    return model


@torch.no_grad()
def look(model: Callable[[Tensor], Tensor], ode: NeuralODE, x: Tensor, y: Tensor, tol: float, count: int) -> Found:
    """Turn the dial with all of `x`, then solve the first `count` one by one at `tol`."""

    def at(tolerance: float, inputs: Tensor) -> Tensor:
        ode.solver_options.update(rtol=tolerance, atol=tolerance)
        return model(inputs)

    best, dial = at(1e-6, x), []
    for tolerance in (10.0 ** -torch.arange(-1, 6)).tolist():
        logits = at(tolerance, x)
        error = 100 * float((logits.argmax(-1) != y).float().mean())
        dial.append((tolerance, ode.nfe, error, float((logits - best).square().mean().sqrt())))
    found = []
    for one, label in zip(x[:count], y):
        logits = at(tol, one[None])[0]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        found.append((float(ode.nfe), float(entropy), float(logits.argmax() == label)))
    nfe, entropies, right = torch.tensor(found).unbind(-1)
    rank = spearmanr(nfe.numpy(), entropies.numpy())
    return Found(dial, nfe, entropies, right.bool(), float(rank.statistic), float(rank.pvalue))


def tell(what: str, found: Found, tol: float, tests: int) -> None:
    print(
        table(
            ["rtol = atol", "nfe", "test error, %", "logits off by"],
            [[f"{rtol:.0e}", nfe, f"{error:.2f}", far] for rtol, nfe, error, far in found.dial],
            f"{what}: one network, {tests} test inputs as one batch",
        )
    )
    names = ("easiest quarter", "second", "third", "hardest quarter")
    print(
        table(
            ["by entropy", "mean nfe", "right, %"],
            [[name, *quarter] for name, quarter in zip(names, found.quarters)],
            f"{what}: each of {len(found.nfe)} alone at rtol=atol={tol:.0e}; rank correlation of nfe and entropy "
            f"{found.rank:.3f} (p = {found.p:.2g})",
        )
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Found]:
    """Train, turn the dials, print and draw; returns what was found."""
    args = arguments(__doc__, "adaptive_depth", argv)
    model = plane(args)
    torch.manual_seed(args.seed + 1000)
    x, y = disc_and_ring(1000)
    ode = model[0]
    assert isinstance(ode, NeuralODE)
    points = look(model, ode, x, y, 1e-3, 150 if args.quick else 1000)
    tell("disc and ring", points, 1e-3, len(x))

    images, labels, test_images, test_labels = folds(args.seed)[0]
    torch.manual_seed(args.seed)
    net = odenet(method="bosh3")
    train(net, images, labels, "ODE-Net", args, 2 if args.quick else 30)
    assert isinstance(net.block, NeuralODE)
    count = 40 if args.quick else len(test_labels)
    digits = look(net, net.block, test_images, test_labels, 1e-4, count)
    tell("digits", digits, 1e-4, len(test_labels))

    with matplotlib.rc_context(STYLE):
        draw(points, digits, work(model, ode, 16 if args.quick else 64), (x, y), args)
    return {"disc and ring": points, "digits": digits}


@torch.no_grad()
def work(model: Callable[[Tensor], Tensor], ode: NeuralODE, side: int) -> Tensor:
    """Evaluations for each point of a grid over the plane, solved alone at 1e-3: shape (side, side), y by x."""
    ode.solver_options.update(rtol=1e-3, atol=1e-3)
    line = torch.linspace(-2.2, 2.2, side)
    found = []
    for point in torch.cartesian_prod(line, line).flip(-1):
        model(point[None])
        found.append(float(ode.nfe))
    return torch.tensor(found).reshape(side, side)


def draw(points: Found, digits: Found, nfe: Tensor, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    canvas = plot.figure(13, 4.2)
    left, middle, right = canvas.subplots(1, 3, width_ratios=(1.1, 1.15, 1))

    for i, (name, found) in enumerate((("disc and ring", points), ("digits", digits))):
        _, work, error, _ = (torch.tensor(column, dtype=torch.float64) for column in zip(*found.dial))
        plot.trajectory(left, work, error, labels=[name], colors=[COLORS[1 - i]], marker="o", lw=2)
    for tol, work, error, _ in points.dial:
        if round(math.log10(tol)) % 2:
            left.annotate(f"{tol:.3g}", (work, error), (7, 5), textcoords="offset points", color=COLORS[1])
    left.set(
        title="The dial: tolerance",
        xlabel="evaluations",
        ylabel="test error (%)",
        ylim=(-2, None),
    )
    left.legend()

    image = middle.imshow(nfe.numpy(), extent=(-2.2, 2.2, -2.2, 2.2), origin="lower", cmap="viridis")
    canvas.colorbar(image, ax=middle, label="evaluations")
    x, y = data
    for label, marker in enumerate("ox"):
        middle.plot(*x[y == label][:120].T.numpy(), marker, color="white", ms=3, mew=0.8, alpha=0.7)
    middle.set(title="Evaluations of a point (o disc, x ring)", xticks=[], yticks=[])

    names = ("easiest\nquarter", "second", "third", "hardest\nquarter")
    for i, (name, found) in enumerate((("disc and ring", points), ("digits", digits))):
        heights = [mean for mean, _ in found.quarters]
        where = [k + 0.38 * (i - 0.5) for k in range(4)]
        bars = right.bar(where, heights, 0.36, color=COLORS[1 - i], label=name)
        right.bar_label(bars, fmt="%.0f", color=INK)
    right.set(title="One by one, by entropy", ylabel="mean evaluations", ylim=(0, 1.25 * right.get_ylim()[1]))
    right.set_xticks(range(4), names)
    right.legend(loc="upper left", ncols=2)
    easy, hard = points.quarters[0][0], points.quarters[3][0]
    digit = sum(mean for mean, _ in digits.quarters) / 4
    headline(
        canvas, f"A hard point takes {hard:.0f} evaluations, an easy one {easy:.0f}; a digit {digit:.0f}, hard or easy"
    )
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
