"""What a neuron is made of, from its spikes alone: four parameters, by the gradient of the times at which it fires.

    python examples/neuron.py [--quick] [--out neuron.png]

A leaky integrate-and-fire neuron with adaptation is driven by a current that is known, a sampled signal. When its
potential v reaches 1 it fires: v falls to 0, and the adaptation w, which works against the current, grows by b. Both
decay. Seen are the times of the spikes, to a quarter of a millisecond; v and w are not. The time of each spike has a
gradient by the parameters, through the resets at all spikes before it.

Long trains have many minima: a spike that is off by a whole interval is near to the wrong one. So the first spikes are
fitted first, and then more and more of them.

Source: Brette & Gerstner, Adaptive exponential integrate-and-fire model as an effective description of neuronal
activity, 2005, without its exponential.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import torch
from shared import COLORS, INK, SHADE, STYLE, arguments, headline, table
from torch import Tensor

import pyjlode
from pyjlode import Event, Interpolation, Solution, plot

NAMES = ("membrane time τ (ms)", "adaptation time τw (ms)", "jump of adaptation b", "gain of the current")
TRUE = torch.tensor([12.0, 80.0, 0.25, 2.5], dtype=torch.float64)
FIRST = torch.tensor([18.0, 50.0, 0.15, 3.0], dtype=torch.float64)
JITTER = 0.25  # ms
SAMPLED = 10.0  # ms
DAMPING = 1.0  # ms², of the steps


def current(duration: float) -> Interpolation:
    """A current of slow noise about 1, sampled."""
    t = torch.arange(0, duration + SAMPLED, SAMPLED, dtype=torch.float64)
    noise = torch.randn(len(t), dtype=torch.float64)
    smooth = noise.clone()
    for i in range(1, len(t)):
        smooth[i] = 0.8 * smooth[i - 1] + 0.6 * noise[i]
    return Interpolation(1 + 0.2 * smooth, t)


def fire(parameters: Tensor, X: Interpolation, spikes: int, end: float, *, dense: bool = False) -> Solution:
    """The neuron up to a spike, or to an end where there are fewer.

    Args:
        parameters: (4,), as in `NAMES`.
    """
    tau, tau_w, jump, gain = parameters

    def f(t: Tensor, h: Tensor) -> Tensor:
        v, w = h
        return torch.stack([(gain * X(t) - v - w) / tau, -w / tau_w])

    def reset(t: Tensor, h: Tensor) -> Tensor:
        return torch.stack([0 * h[0], h[1] + jump])

    spike = Event(lambda t, h: h[0] - 1, reset, direction=1, terminal=spikes)
    h0 = torch.zeros(2, dtype=torch.float64)
    how = {"adjoint": True, "rtol": 1e-5, "atol": 1e-6, "options": X.options}
    return pyjlode.solve(f, h0, [0.0, end], events=[spike], dense=dense, **how)


def times(solution: Solution) -> Tensor:
    return torch.stack([x.t for x in solution.events])


class Fit(NamedTuple):
    """What was fitted, and to what.

    Attributes:
        parameters: (4,). errors: root mean square error of the fitted spikes in ms, first and last. spikes: (N,) seen.
    """

    parameters: Tensor
    errors: tuple[float, float]
    spikes: Tensor
    X: Interpolation


def fit(counts: Sequence[int], steps: int) -> Fit:
    """Fit the first spikes, then more, by Levenberg & Marquardt's method.

    Args:
        counts: how many, one after the other. steps: for each.
    """
    n = counts[-1]
    X = current(20.0 * n)
    with torch.no_grad():
        exact = times(fire(TRUE, X, n, 1000.0))
    seen = exact + JITTER * torch.randn(len(exact), dtype=torch.float64)
    logs = torch.zeros(4, dtype=torch.float64)  # of the parameters over their first guess
    errors: list[float] = []
    for count in counts:
        for _ in range(steps):
            logs.requires_grad_()
            told = times(fire(FIRST * logs.exp(), X, count, 1000.0))
            off = (seen[: len(told)] - told).detach()
            errors.append(float(off.square().mean().sqrt()))
            J = torch.stack([torch.autograd.grad(x, logs, retain_graph=True)[0] for x in told])
            damped = J.T @ J + DAMPING * torch.eye(4, dtype=torch.float64)
            step = torch.linalg.solve(damped, J.T @ off)
            logs = logs.detach() + step * min(1.0, 0.3 / float(step.abs().max()))
    return Fit(FIRST * logs.exp(), (errors[0], errors[-1]), seen, X)


def main(argv: Sequence[str] | None = None) -> Fit:
    """Fit, print and draw."""
    args = arguments(__doc__, "neuron", argv)
    torch.manual_seed(args.seed)
    found = fit([4, 8], 3) if args.quick else fit([4, 8, 16, 24], 5)
    rows = [[name, *values] for name, *values in zip(NAMES, *(x.tolist() for x in (FIRST, found.parameters, TRUE)))]
    print(table(["", "first guess", "found", "true"], rows, f"{len(found.spikes)} spikes, seen to {JITTER} ms"))
    first, last = found.errors
    print(f"off by {last:.2f} ms in the end; the first spikes by {first:.1f} ms at the first guess")
    with matplotlib.rc_context(STYLE):
        draw(found, args)
    return found


def draw(found: Fit, args: argparse.Namespace) -> None:
    canvas = plot.figure(12, 4.6)
    top, middle, bottom = canvas.subplots(3, 1, sharex=True, height_ratios=[0.8, 1.6, 0.8])
    end = float(found.spikes[-1]) + 5
    t = torch.linspace(0, end, 3000, dtype=torch.float64)
    top.plot(t, found.X(t), color=COLORS[5], lw=1.5)
    top.set(ylabel="current")
    trains = {}
    for name, parameters, color in (("first guess", FIRST, COLORS[1]), ("found", found.parameters, COLORS[0])):
        with torch.no_grad():
            solution = fire(parameters, found.X, 10_000, end, dense=True)
            v = solution.interpolate(t)[:, 0]
        trains[name] = times(solution), color
        if name == "found":
            middle.plot(t, v, color=color, lw=1.4)
    middle.axhline(1, color=SHADE, lw=2, zorder=0)
    middle.set(ylabel="potential v, found", ylim=(-0.05, 1.12))
    trains = {"seen": (found.spikes, INK), **trains}
    for i, (moments, color) in enumerate(trains.values()):
        bottom.vlines(moments, -i - 0.4, -i + 0.4, color=color, lw=1.6)
    bottom.set(yticks=[0, -1, -2], yticklabels=list(trains), xlabel="t (ms)", xlim=(0, end), ylim=(-2.6, 0.6))
    first, last = found.errors
    headline(
        canvas, f"A neuron fitted to its spikes: they come {last:.2f} ms off, from {first:.1f} ms at the first guess"
    )
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


if __name__ == "__main__":
    main()
