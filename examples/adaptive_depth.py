"""Depth that adapts: one trained ODE-Net, with the tolerance as a dial and the input's difficulty as another.

    python examples/adaptive_depth.py [--quick] [--resume] [--out adaptive_depth.png]

An ODE-Net is trained on scikit-learn's digits at rtol=atol=1e-3, with bosh3, whose steps of three evaluations make the
dial a fine one. Then nothing is trained any more: the same weights are
solved at other tolerances, which trades evaluations of the field for accuracy; and each test digit is solved alone, so
that its evaluations are its own. Difficulty is the entropy of the predicted classes; the table gives its rank
correlation with the evaluations. "The same network, less compute where the input is simple": whether that is so here,
the number says.

Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, sections 3 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from digits import errors, folds, odenet, train
from scipy.stats import spearmanr
from shared import COLORS, STYLE, arguments, table
from torch import Tensor

from pyjlode import plot
from pyjlode.nn import NeuralODE

EACH = 1e-4  # tolerance of the digits solved alone


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, turn the dial, print and draw; returns the numbers printed."""
    args = arguments(__doc__, "adaptive_depth", argv)
    x, y, x_test, y_test = folds(args.seed)[0]
    torch.manual_seed(args.seed)
    model = odenet(method="bosh3")
    train(model, x, y, "ODE-Net", args, 4 if args.quick else 30)
    assert isinstance(model.block, NeuralODE)
    ode = model.block

    with torch.no_grad():
        ode.solver_options.update(rtol=1e-6, atol=1e-6)
        best = model(x_test)
        dial = []
        for rtol in (10.0 ** -torch.arange(-1, 6)).tolist():
            ode.solver_options.update(rtol=rtol, atol=rtol)
            distance = float((model(x_test) - best).square().mean().sqrt())
            nfe = ode.nfe
            dial.append((rtol, nfe, 100 * errors(model, x_test, y_test) / len(y_test), distance))
    print(
        table(
            ["rtol = atol", "nfe", "test error, %", "logits off by"],
            [[f"{rtol:.0e}", nfe, f"{error:.2f}", far] for rtol, nfe, error, far in dial],
            f"one network, {len(y_test)} test digits as one batch",
        )
    )

    count = 100 if args.quick else len(y_test)
    evaluations, entropy, right = alone(model, ode, x_test[:count], y_test[:count])
    rank = spearmanr(evaluations.numpy(), entropy.numpy())
    order = entropy.argsort().chunk(4)
    names = ("easiest quarter", "second", "third", "hardest quarter")
    print(
        table(
            ["digits, by entropy", "mean nfe", "right, %"],
            [[n, float(evaluations[i].mean()), float(100 * right[i].float().mean())] for n, i in zip(names, order)],
            f"each of {count} digits alone at rtol=atol={EACH:.0e}; rank correlation of nfe and entropy "
            f"{rank.statistic:.3f} (p = {rank.pvalue:.2g})",
        )
    )
    with matplotlib.rc_context(STYLE):
        draw(dial, evaluations, entropy, args.out)
    return {"dial": dial, "nfe": evaluations, "rank": float(rank.statistic), "p": float(rank.pvalue)}


@torch.no_grad()
def alone(model: Any, ode: NeuralODE, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each digit, solved as a batch of one: nfe, entropy of the classes, and whether it is right; shape (n,)."""
    ode.solver_options.update(rtol=EACH, atol=EACH)
    found = []
    for image, label in zip(x, y):
        logits = model(image[None])[0]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        found.append((float(ode.nfe), float(entropy), float(logits.argmax() == label)))
    nfe, entropies, right = torch.tensor(found).unbind(-1)
    return nfe, entropies, right.bool()


def draw(dial: list[tuple[float, int, float, float]], nfe: Tensor, entropy: Tensor, out: Any) -> None:
    rtol, evaluations, error, _ = (torch.tensor(column, dtype=torch.float64) for column in zip(*dial))
    canvas = plot.figure(12, 4)
    left, middle, right = canvas.subplots(1, 3)
    plot.trajectory(left, rtol, evaluations, colors=COLORS, marker="o", lw=2)
    left.set(title="The dial: work", xlabel="rtol = atol", ylabel="evaluations", xscale="log", ylim=(0, None))
    plot.trajectory(middle, evaluations, error, colors=COLORS[1:], marker="o", lw=2)
    middle.set(title="What the work buys", xlabel="evaluations", ylabel="test error (%)", ylim=(0, None))
    values = nfe.unique()
    right.boxplot([entropy[nfe == v].numpy() for v in values], tick_labels=[f"{v:.0f}" for v in values], widths=0.6,
                  medianprops={"color": COLORS[1], "lw": 2}, flierprops={"ms": 3})  # fmt: skip
    right.set(title="One by one", xlabel="evaluations for this digit", ylabel="entropy of its classes", yscale="log")
    canvas.savefig(out, dpi=110)
    print(f"picture     {out}")


if __name__ == "__main__":
    main()
