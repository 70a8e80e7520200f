"""Peak memory of a gradient against the number of steps, for every gradient method of the native engine.

    python benchmarks/memory.py [--quick] [--out docs/memory.png]
    python benchmarks/memory.py --julia      what the Julia engine keeps of a solve for its gradient

A network 2-128-2 on a batch of 64 is solved by `rk4` in N equal steps over the same span, and the sum of squares of the
last state is differentiated with respect to h0 and all parameters. For `reversible` the steps are `reversible_rk4`,
which carries a second state beside the first. All is in float64: in float32 a thousand steps of that method cannot be
undone, since roundings grow by 1% a step, and it says so. The table gives the peak in MB (10^6 bytes), and the slope
between the two largest N in states per step: one state is what h0 takes, 1024 bytes. Parameters and h0 are there before
and do not count; gradients do.

What is measured: PyTorch's CPU allocator reports each allocation and each release, with its size, to the profiler, and
the peak of their running sum is the most that was alive at once. Nothing less sees everything: the tensors that
autograd saves live in C++ nodes, where no Python reference shows them; a TorchDispatchMode sees the results of
operations, but not what kernels take for themselves; the resident size of the process is in pages, keeps what was
freed, and has torch itself in it. The running sum must end where it began: if it does not, the method leaks, and a line
says so.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: the profiler's own messages

import matplotlib
import torch
from torch import nn
from torch._C import _autograd
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig

import pyjlode
from pyjlode import plot
from pyjlode.bridge import runtime
from pyjlode.tools.demo import FAINT, INK, STYLE

torch.set_num_threads(1)

BATCH, SIZE, HIDDEN = 64, 2, 128
STEPS = (10, 20, 50, 100, 200, 500, 1000)
QUICK = (10, 20, 50, 100)
METHODS: tuple[bool | str, ...] = (
    False,
    "discrete",
    "checkpointed",
    "reversible",
    "forward",
    "interpolating",
    "quadrature",
    "gauss",
    "backsolve",
)
COLORS = ("#22262e", "#d9730d", "#b58900", "#8a8f99", "#2e8b57", "#1b6ca8", "#6b4c9a", "#3aa6b9", "#c2334d")


def peak(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of tensor memory beyond those alive before: the most at once in `run()`, and what is left after it."""
    gc.collect()
    # `torch.profiler.profile(profile_memory=True)` without its record of every operation, which takes many times as
    # long as the solve and has no public switch. The allocator's reports are the same, byte for byte.
    activities = {ProfilerActivity.CPU}
    config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    _autograd._prepare_profiler(config, activities)
    _autograd._enable_profiler(config, activities, {RecordScope.USER_SCOPE})
    try:
        run()
        gc.collect()
    finally:
        events = _autograd._disable_profiler().events()
    # Stable: events of one moment stay in their order.
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda e: e[0])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most, now


def check() -> None:
    """The measure itself: two tensors of a million floats at once, and a third that replaces the first."""

    def run() -> None:
        x = torch.empty(1_000_000)
        y = torch.empty(1_000_000)
        del x
        x = torch.empty(1_000_000)
        del x, y

    found, rest = peak(run)
    if found != 8_000_000 or rest != 0:
        raise RuntimeError(f"the profiler of this torch does not report memory as it should: {found}, {rest} bytes.")


def problem() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(SIZE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, SIZE)).double()
    return net, torch.randn(BATCH, SIZE, dtype=torch.float64, requires_grad=True)


def measure(net: nn.Module, h0: torch.Tensor, adjoint: bool | str, steps: int) -> tuple[int, int]:
    """Bytes of a solve in `steps` steps of rk4 and its gradient: at its peak, and left over."""
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"step_size": 1 / steps}

    def run() -> None:
        method = "reversible_rk4" if adjoint == "reversible" else "rk4"
        h = pyjlode.odeint(lambda t, h: net(h), h0, t, method=method, options=options, adjoint=adjoint)[-1]
        torch.autograd.grad(h.square().sum(), [h0, *net.parameters()])

    return peak(run)


def julia(counts: Sequence[int]) -> None:
    """What Julia keeps of a compiled solve by tsit5 for its backward pass, and the time of both."""
    net, h0 = problem()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    print(f"kept by Julia in MB: {SIZE}-{HIDDEN}-{SIZE}, batch {BATCH}, tsit5; one state is {h0.nbytes} bytes")
    head = f"{'adjoint':14s}" + "".join(f"{f'{n} steps':>12s}" for n in counts)
    head += f"{'states/step':>14s}{'seconds':>10s}"
    print(head + "\n" + "-" * len(head))
    sizes = "sum(x -> x isa PyJLODE.Solve ? Base.summarysize(x.steps) : 0, values(PyJLODE.HELD); init = 0)"
    for adjoint in ("discrete", "checkpointed"):
        kept: list[int] = []
        for n in counts:
            options = {"first_step": 1 / n, "max_step": 1 / n}
            how: Any = {"method": "tsit5", "rtol": 1e-3, "atol": 1e-3, "engine": "julia", "compile": True}
            for _ in range(3):  # the first compiles
                start = time.perf_counter()
                h = pyjlode.odeint(lambda t, h: net(h), h0, t, options=options, adjoint=adjoint, **how)[-1]
                solved = time.perf_counter() - start
                held = int(runtime.evaluate(sizes))
                start = time.perf_counter()
                torch.autograd.grad(h.square().sum(), [h0, *net.parameters()])
                seconds = solved + time.perf_counter() - start
                del h
            kept.append(held)
        cells = "".join(f"{p / 1e6:12.3f}" for p in kept)
        print(f"{adjoint:14s}{cells}{slope(counts, kept, h0.nbytes):14.1f}{seconds:10.3f}", flush=True)


def name_of(adjoint: bool | str) -> str:
    return adjoint if isinstance(adjoint, str) else str(adjoint)


def slope(counts: Sequence[int], peaks: Sequence[int], state: int) -> float:
    """States per step between the two largest numbers of steps."""
    return (peaks[-1] - peaks[-2]) / (counts[-1] - counts[-2]) / state


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights of labels: as near to those asked for as `gap` between them allows, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    groups: list[list[int]] = []

    def middle(group: list[int]) -> float:
        return sum(heights[i] for i in group) / len(group)

    for i in order:
        groups.append([i])
        while len(groups) > 1:
            a, b = groups[-2:]
            if middle(b) - middle(a) >= gap * (len(a) + len(b)) / 2:
                break
            groups[-2:] = [a + b]
    placed = list(heights)
    for group in groups:
        low = middle(group) - gap * (len(group) - 1) / 2
        for k, i in enumerate(group):
            placed[i] = low + k * gap
    return placed


def draw(out: Path, counts: Sequence[int], peaks: dict[bool | str, Sequence[int]], state: int) -> None:
    """The log-log picture, each line with its name and slope at its end."""

    with matplotlib.rc_context(STYLE):
        canvas = plot.figure(11, 6.2)
        ax = canvas.add_subplot()
        x = torch.tensor(counts)
        bottom = min(min(p) for p in peaks.values()) / 1e6 / 2
        top = max(max(p) for p in peaks.values()) / 1e6 * 2
        ax.set(xscale="log", yscale="log", ylim=(bottom, top), xlim=(counts[0] * 0.93, counts[-1] * 1.05))
        ends = [math.log10(p[-1] / 1e6) for p in peaks.values()]
        labels = spread(ends, gap=math.log10(top / bottom) * 0.062)
        for i, ((adjoint, bytes_), color) in enumerate(zip(peaks.items(), COLORS)):
            y = torch.tensor(bytes_) / 1e6
            plot.trajectory(ax, x, y, colors=[color], lw=2.6, marker="o", ms=6, mec="white", mew=0.9)
            states = slope(counts, bytes_, state)
            text = f"{name_of(adjoint)}:  {states:.0f} state{'' if round(states) == 1 else 's'} a step"
            ax.annotate(
                text,
                xy=(counts[-1], 10 ** ends[i]),
                xytext=(counts[-1] * 1.25, 10 ** labels[i]),
                va="center",
                color=color,
                fontweight="bold",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8, "alpha": 0.6, "shrinkA": 2, "shrinkB": 5},
            )
        ax.grid(True, which="major", color=FAINT, lw=0.6, alpha=0.6)
        ax.set_axisbelow(True)
        ax.set_xticks(list(counts), [f"{n:,}" for n in counts])
        ax.minorticks_off()
        decades = range(math.ceil(math.log10(bottom)), math.floor(math.log10(top)) + 1)
        ax.set_yticks([10.0**k for k in decades], [f"{10.0**k:g}" for k in decades])
        ax.set(xlabel="steps (rk4)", ylabel="peak memory of a gradient (MB)")
        ax.set_title(
            f"A network {SIZE}-{HIDDEN}-{SIZE}, batch {BATCH}; one state is {state} bytes", fontweight="normal"
        )
        canvas.suptitle(
            "What each gradient method keeps in memory",
            fontsize=18,
            fontweight="bold",
            x=0.012,
            ha="left",
            color=INK,
        )
        canvas.savefig(out, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"up to {QUICK[-1]} steps, and no picture")
    parser.add_argument("--julia", action="store_true", help="what the Julia engine keeps of a solve for its gradient")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "memory.png")
    args = parser.parse_args()
    counts = QUICK if args.quick else STEPS
    if args.julia:
        julia(counts)
        return
    check()
    net, h0 = problem()
    state = h0.nbytes
    print(f"peak memory of a gradient in MB: {SIZE}-{HIDDEN}-{SIZE}, batch {BATCH}, rk4; one state is {state} bytes")
    head = f"{'adjoint':14s}" + "".join(f"{f'{n} steps':>12s}" for n in counts) + f"{'states/step':>14s}"
    print(head + "\n" + "-" * len(head))
    peaks: dict[bool | str, Sequence[int]] = {}
    for adjoint in METHODS:
        measure(net, h0, adjoint, 2)  # what is made once in a process is made here
        peaks[adjoint], rests = zip(*(measure(net, h0, adjoint, n) for n in counts))
        cells = "".join(f"{p / 1e6:12.3f}" for p in peaks[adjoint])
        print(f"{name_of(adjoint):14s}{cells}{slope(counts, peaks[adjoint], state):14.1f}", flush=True)
        if max(rests) > state:
            print(f"{'':14s}leak: {max(rests)} bytes stay after the gradient is gone")
    if not args.quick:
        draw(args.out, counts, peaks, state)
        print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
