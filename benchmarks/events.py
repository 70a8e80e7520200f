"""A ball that bounces 1,000 times: one call, against torchdiffeq's Python loop with a solve for each bounce.

    python benchmarks/events.py [--bounces 1000]

CPU milliseconds a bounce on one thread, the best of three, for the solve and for the gradient of the last height by the
start; and the error of the time of the last bounce, which is known. Both at rtol=1e-7, atol=1e-9, `dopri5`, float64.
After a bounce torchdiffeq's loop lifts the ball by 1e-12, without which it finds the same bounce again. Where Julia is
set up its engine is there as well.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

import pyjlode
from pyjlode.bridge import runtime

torch.set_num_threads(1)
G = 9.81
H0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
PERIOD = 2 * math.sqrt(2 / G)


def fall(t: Tensor, h: Tensor) -> Tensor:
    return torch.stack([h[1], -G * torch.ones_like(h[1])])


def height(t: Tensor, h: Tensor) -> Tensor:
    return h[0]


def turned(t: Tensor, h: Tensor) -> Tensor:
    return torch.stack([h[0], -h[1]])


def ours(bounces: int, h0: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """The time of the last bounce, and the state a quarter of a period after it."""
    event = pyjlode.Event(height, turned, direction=-1)
    t = [0.0, (bounces - 0.25) * PERIOD]
    solution = pyjlode.solve(fall, h0, t, events=[event], rtol=1e-7, atol=1e-9, dense=False, **how)
    assert len(solution.events) == bounces
    return solution.events[-1].t, solution.h[-1]


def loop(bounces: int, h0: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torchdiffeq."""
    t, h = torch.zeros((), dtype=torch.float64), h0
    lift = torch.tensor([1e-12, 0.0], dtype=torch.float64)
    for _ in range(bounces):
        t, states = torchdiffeq.odeint_event(
            fall, h, t, event_fn=height, odeint_interface=torchdiffeq.odeint, rtol=1e-7, atol=1e-9
        )
        h = turned(t, states[-1]).abs() + lift
    times = torch.stack([t, torch.full_like(t, (bounces - 0.25) * PERIOD)])
    return t, torchdiffeq.odeint(fall, h, times, rtol=1e-7, atol=1e-9)[-1]


def timed(solve: Callable[[int, Tensor], tuple[Tensor, Tensor]], bounces: int, grad: bool) -> list[float]:
    """Milliseconds a bounce of the solve and of its gradient, and the error of the last bounce's time."""
    best = [math.inf, math.inf]
    for _ in range(3):
        h0 = H0.clone().requires_grad_(grad)
        start = time.process_time()
        t, h = solve(bounces, h0)
        middle = time.process_time()
        if grad:
            h[0].backward()
        spent = middle - start, time.process_time() - middle
        best = [min(a, 1e3 * b / bounces) for a, b in zip(best, spent)]
    return [*best, abs(float(t.detach()) - (bounces - 0.5) * PERIOD)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bounces", type=int, default=1000)
    n = parser.parse_args().bounces
    torch_engine = {"engine": "torch"}
    rows: list[tuple[str, Callable[[int, Tensor], tuple[Tensor, Tensor]], bool]] = [
        ("events, no gradient", lambda n, h: ours(n, h, **torch_engine), False),
        ("events, adjoint=True", lambda n, h: ours(n, h, adjoint=True, **torch_engine), True),
        ("events, adjoint=False", lambda n, h: ours(n, h, **torch_engine), True),
        ("torchdiffeq's loop, no gradient", loop, False),
        ("torchdiffeq's loop, gradient", loop, True),
    ]
    if not isinstance(runtime.find(), str):
        rows.insert(3, ("events on Julia, no gradient", lambda n, h: ours(n, h, engine="julia"), False))
        rows.insert(4, ("events on Julia, adjoint=True", lambda n, h: ours(n, h, engine="julia", adjoint=True), True))
    print(f"| {n} bounces | solve, ms a bounce | gradient | error of the last time |\n| --- | --- | --- | --- |")
    for name, solve, grad in rows:
        a, b, error = timed(solve, n, grad)
        print(f"| {name} | {a:.2f} | {f'{b:.2f}' if grad else '-'} | {error:.0e} |", flush=True)


if __name__ == "__main__":
    main()
