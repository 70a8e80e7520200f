"""How fast is a drug absorbed and cleared? Fitted to noisy samples of the blood, through the doses.

    python examples/drug_doses.py [--quick] [--out drug_doses.png]

A tablet of 100 mg is swallowed every twelve hours, but one is forgotten, and one is taken late. Ten patients differ in
their rates of absorption and clearance and in the volume in which the drug is diluted. Each gives a few samples of
blood, with an error of a tenth. Doses are events at given times: at each the amount in the gut jumps. The three numbers
of each patient are fitted by gradient descent through all of that, for all patients at once: one solve of a state of
shape (2, patients).

The time at which the late tablet was taken was not written down. It is fitted too: a dose has a gradient by its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import torch
from shared import COLORS, INK, STYLE, arguments, headline, table
from torch import Tensor

import pyjlode
from pyjlode import At, plot

DOSE = 100.0  # mg
KNOWN = [0.0, 12.0, 36.0, 60.0, 72.0]  # h; that at 24 is forgotten, that at 48 is late
DUE, LATE = 48.0, 52.5
SAMPLES = [0.0, 1, 2.5, 5, 9, 12, 14, 20, 30, 37, 40, 47, 50, 51.5, 53, 54, 56, 59, 62, 66, 73, 76, 84, 96]
TYPICAL = torch.tensor([0.7, 3.0, 30.0], dtype=torch.float64)  # absorption (1/h), clearance (l/h), volume (l)
NAMES = ("absorption (1/h)", "clearance (l/h)", "volume (l)")
NOISE = 0.1


def concentration(parameters: Tensor, late: Tensor, t: Tensor) -> Tensor:
    """The drug in the blood in mg/l, (T, patients), before a dose where there is one.

    Args:
        parameters: (3, patients), as in `NAMES`. late: 0-d, when the late tablet was taken.
        t: (T,), in hours.
    """
    absorption, clearance, volume = parameters

    def body(t: Tensor, h: Tensor) -> Tensor:
        gut, blood = h
        return torch.stack([-absorption * gut, absorption * gut - clearance / volume * blood])

    doses = At(torch.cat([late.new_tensor(KNOWN), late[None]]), swallow)
    h0 = torch.zeros_like(parameters[:2])
    h = pyjlode.solve(body, h0, t, events=[doses], adjoint=True, rtol=1e-4, atol=1e-4, dense=False).h
    return h[:, 1] / volume


def swallow(t: Tensor, h: Tensor) -> Tensor:
    return h + DOSE * torch.tensor([[1.0], [0.0]], dtype=h.dtype)


class Fit(NamedTuple):
    """What was fitted, and to what.

    Attributes:
        parameters, true: (3, patients). late: h. t: (T,). samples: (T, patients) mg/l.
    """

    parameters: Tensor
    true: Tensor
    late: float
    t: Tensor
    samples: Tensor

    @property
    def errors(self) -> Tensor:
        """Mean relative error of each parameter, (3,)."""
        return (self.parameters / self.true - 1).abs().mean(1)


def fit(patients: int, steps: int) -> Fit:
    t = torch.tensor(SAMPLES, dtype=torch.float64)
    true = TYPICAL[:, None] * torch.exp(0.3 * torch.randn(3, patients, dtype=torch.float64))
    exact = concentration(true, torch.tensor(LATE, dtype=torch.float64), t)
    samples = exact * torch.exp(NOISE * torch.randn_like(exact))

    logs = TYPICAL.log()[:, None].repeat(1, patients).requires_grad_()
    delay = torch.zeros((), dtype=torch.float64, requires_grad=True)  # in units of six hours: all are of one size then
    optimizer = torch.optim.LBFGS([logs, delay], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        told = concentration(logs.exp(), DUE + 6 * delay, t)
        value = (torch.log(told[1:] / samples[1:]) / NOISE).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    return Fit(logs.detach().exp(), true, float(DUE + 6 * delay.detach()), t, samples)


def main(argv: Sequence[str] | None = None) -> Fit:
    """Fit, print and draw."""
    args = arguments(__doc__, "drug_doses", argv)
    torch.manual_seed(args.seed)
    found = fit(10, 25 if args.quick else 60)
    rows: list[list[Any]] = [[name, float(e)] for name, e in zip(NAMES, found.errors)]
    print(table(["fitted for 10 patients", "mean relative error"], rows))
    print(f"the late tablet: taken at {LATE} h, found {found.late:.2f} h")
    with matplotlib.rc_context(STYLE):
        draw(found, args)
    return found


def draw(found: Fit, args: argparse.Namespace) -> None:
    canvas = plot.figure(12, 4.4)
    left, right = canvas.subplots(1, 2, width_ratios=[2.1, 1])
    t = torch.linspace(0, 96, 961, dtype=torch.float64)
    with torch.no_grad():
        told = concentration(found.parameters, torch.tensor(found.late, dtype=torch.float64), t)
    for i, color in zip(range(3), COLORS):
        left.plot(t, told[:, i], color=color, lw=1.6, label=f"patient {i + 1}")
        left.plot(found.t[1:], found.samples[1:, i], "o", color=color, ms=4)
    for dose in KNOWN:
        left.axvline(dose, color=INK, lw=0.8, ymax=0.04)
    left.axvline(found.late, color=INK, lw=0.8, ls="--", ymax=0.87)
    left.text(found.late + 0.8, 5.4, f"late tablet:\n{found.late:.1f} h", va="top")
    left.set(xlabel="t (h)", ylabel="drug in the blood (mg/l)", xlim=(-1, 97), ylim=(0, 6.2))
    left.legend(loc="upper left", frameon=False, ncols=3)
    for values, true, name, color in zip(found.parameters, found.true, NAMES, COLORS[3:]):
        right.plot(true / true.mean(), values / true.mean(), "o", color=color, ms=5, label=name)
    ends = [0.3, 2.2]
    right.loglog(ends, ends, color=INK, lw=0.8, zorder=0)
    ticks = [0.5, 1, 2]
    right.set(xlabel="true, of the mean", ylabel="fitted", xticks=ticks, yticks=ticks)
    right.set(xticklabels=ticks, yticklabels=ticks)
    right.minorticks_off()
    right.legend(frameon=False)
    headline(canvas, f"The time of a late tablet, from blood samples: {found.late:.1f} h, and it was {LATE:g} h")
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
