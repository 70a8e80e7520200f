"""An ODE-Net against a ResNet of the same width on handwritten digits: errors, parameters, memory, time.

    python examples/odenet_digits.py [--quick] [--resume] [--out odenet_digits.png]

scikit-learn's 1,797 digits in five-fold cross-validation: each digit is tested once. Both networks have the same stem
and head; between them the ResNet has six blocks with weights of their own, and the ODE-Net one field, solved by dopri5
at rtol=atol=1e-3.

Memory is the most that tensors take at once in a training step of 128 digits, beyond what was there before: against the
number of blocks for the ResNet; against the evaluations of the field, in steps of rk4, for the ODE-Net, whose gradient
is by "discrete" (True), which keeps the graph of its first steps up to 32 MiB and then one state a step, and by
"backsolve" (Chen et al. 2018), which keeps none.

Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, section 3.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from digits import Classifier, errors, folds, odenet, resnet, train
from shared import COLORS, FAINT, STYLE, arguments, headline, table
from torch import Tensor, nn

from pyjlode import plot

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from memory import peak

GRADIENTS: tuple[tuple[bool | str, str], ...] = ((True, "ODE-Net, discrete"), ("backsolve", "ODE-Net, backsolve"))


def step_memory(model: Classifier, x: Tensor, y: Tensor) -> float:
    """Peak of a training step, in MB (10^6 bytes)."""

    def run() -> None:
        torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))

    return peak(run)[0] / 1e6


def memory(x: Tensor, y: Tensor, depths: Sequence[int]) -> dict[str, list[float]]:
    """For each number of evaluations of the field: MB of a ResNet of so many blocks, and of ODE-Nets."""
    found = {"ResNet": [step_memory(resnet(n), x, y) for n in depths]}
    for adjoint, name in GRADIENTS:
        solves = [odenet(method="rk4", options={"step_size": 4 / n}, adjoint=adjoint) for n in depths]
        found[name] = [step_memory(model, x, y) for model in solves]
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, print and draw; returns the numbers printed."""
    args = arguments(__doc__, "odenet_digits", argv)
    epochs = 4 if args.quick else 30
    results: dict[str, dict[str, float]] = {}
    nfe: list[float] = []
    cases = folds(args.seed)[: 1 if args.quick else 5]
    for name, build in (("ResNet", resnet), ("ODE-Net", odenet)):
        wrong, tested, wall = 0, 0, 0.0
        for k, (x, y, x_test, y_test) in enumerate(cases):
            torch.manual_seed(args.seed + k)
            model = build()
            history = train(model, x, y, f"{name}-{k}", args, epochs)
            wall += sum(step["seconds"] for step in history)  # not by the clock: a resumed run would be a fast one
            nfe = [step["nfe"] for step in history] if name == "ODE-Net" and k == 0 else nfe
            wrong, tested = wrong + errors(model, x_test, y_test), tested + len(y_test)
        results[name] = {
            "error": 100 * wrong / tested,
            "parameters": sum(p.numel() for p in model.parameters()),
            "wall": wall / len(cases),
        }
    print(
        table(
            ["network", "test error, %", "parameters", "s a training"],
            [[name, f"{r['error']:.2f}", f"{r['parameters']:.0f}", r["wall"]] for name, r in results.items()],
            f"{tested} test digits, {epochs} epochs",
        )
    )
    depths = (4, 16, 64) if args.quick else (4, 8, 16, 32, 64, 128)
    x, y = cases[0][:2]
    used = memory(x[:128], y[:128], depths)
    print(
        table(
            ["MB in training at", *(str(n) for n in depths)],
            [[name, *row] for name, row in used.items()],
            "peak memory against blocks (ResNet) or evaluations of the field (ODE-Net)",
        )
    )
    with matplotlib.rc_context(STYLE):
        canvas = plot.figure(11, 4)
        left, right = canvas.subplots(1, 2)
        plot.trajectory(left, torch.tensor(depths), torch.tensor(list(used.values())).T, labels=list(used),
                        colors=COLORS, marker="o", lw=2)  # fmt: skip
        left.set(title="Memory of a training step", xlabel="blocks, or evaluations of the field", ylabel="MB")
        left.set(xscale="log", yscale="log", xticks=depths, xticklabels=depths)
        left.minorticks_off()
        left.set_yticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
        left.legend()
        step, window = torch.arange(1, len(nfe) + 1), min(25, len(nfe))
        mean = torch.tensor(nfe, dtype=torch.float64).unfold(0, window, 1).mean(-1)
        plot.trajectory(right, step, torch.tensor(nfe), colors=[FAINT], labels=["each step"], lw=0.8)
        plot.trajectory(right, step[window - 1 :], mean, colors=COLORS[1:], labels=[f"mean of {window}"], lw=2)
        right.legend(loc="lower right")
        right.set(title="Evaluations in training", xlabel="step", ylabel="evaluations forward", ylim=(0, None))
        ode, stack = results["ODE-Net"], results["ResNet"]
        part = ode["parameters"] / stack["parameters"]
        wrong = f"{ode['error']:.2f} % of digits, a ResNet {stack['error']:.2f} %"
        headline(canvas, f"With {part:.0%} of the parameters an ODE-Net misreads {wrong}")
        canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")
    return {"networks": results, "depths": depths, "memory": used}


if __name__ == "__main__":
    main()
