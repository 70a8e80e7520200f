"""Independent systems in a batch: steps of their own against common steps, and against torchode where it is installed.

    python benchmarks/batch.py [--part NAME] [--rounds N] [--quick]

Everything runs in turns, in one process on one thread. Printed are the processor's time (the best of the rounds) and
its ratio to that of steps of their own, batched calls of f, the steps of the system with most of them, and the error at
the end against a tight solve: of each system the largest relative one, and of these the median. torchode 1.0.1 is used
if it can be imported.

Parts: "phases", 256 van der Pol oscillators, mu = 25, that start all over the plane; "spread", mu from 1 to 100, each
over its period; "gradient", those of "phases" with a loss and its backward pass; "stiff", 256 Robertson systems with
rate constants over a factor of 100; "latent", a training step of a latent ODE with 64 series of 50 irregular times, on
times of their own and on the union of all.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyjlode import solve

try:
    import torchode
except ImportError:
    torchode = None

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

F64 = torch.float64
OWN = {"batch_dims": 1}
Run = Callable[[], tuple[Any, ...]]


def measured(runs: dict[str, Run], rounds: int) -> dict[str, tuple[float, tuple[Any, ...]]]:
    """The best processor's time of each, in milliseconds, and what it returned last."""
    best = dict.fromkeys(runs, (math.inf, ()))
    for _ in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            start = time.process_time()
            result = run()
            spent = 1e3 * (time.process_time() - start)
            best[name] = (min(best[name][0], spent) if _ else math.inf, result)
    return best


def table(title: str, found: dict[str, tuple[float, tuple[Any, ...]]], want: Tensor | None = None) -> None:
    print(f"\n{title}")
    first = next(iter(found.values()))[0]
    for name, (spent, (h, calls, steps)) in found.items():
        error = ""
        if want is not None:
            apart = (h - want).abs() / (want.abs().amax(1, keepdim=True))
            error = f"  error {float(apart.amax(1).median()):.1e}"
        print(f"  {name:34s} {spent:9.1f} ms  {spent / first:5.2f}  calls {calls:6d}  steps {steps:5d}{error}")


def van_der_pol(mu: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, h: Tensor) -> Tensor:
        x, v = h[:, 0], h[:, 1]
        return torch.stack([v, mu * (1 - x * x) * v - x], 1)

    return f


def of(solution: Any) -> tuple[Any, ...]:
    stats = solution.stats
    most = stats.naccept if stats.systems is None else int(stats.systems.naccept.max())
    return solution.h[-1], stats.nfe, most


def by_torchode(f: Any, h0: Tensor, t: Tensor, tol: float) -> Any:
    term = torchode.ODETerm(f)
    control = torchode.IntegralController(atol=tol, rtol=tol, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
    return solver.solve(torchode.InitialValueProblem(y0=h0, t_eval=t.expand(len(h0), -1)))


def steps_of(solution: Any) -> int:
    return int(solution.stats["n_accepted"].max())


def oscillators(title: str, mu: Tensor, h0: Tensor, t: Tensor, tol: float, rounds: int) -> None:
    f = van_der_pol(mu)
    kwargs: dict[str, Any] = {"rtol": tol, "atol": tol, "dense": False, "engine": "torch"}
    union = t if t.ndim == 1 else torch.stack([t.min(), t.max()])

    def own() -> tuple[Any, ...]:
        return of(solve(f, h0, t, options=OWN, **kwargs))

    def common() -> tuple[Any, ...]:
        # Of different spans by a scale of time for each: h' = span f over the unit of time.
        span = (t[..., -1] - t[..., 0]).expand(len(h0))[:, None]
        g = f if t.ndim == 1 else lambda s, h: span * f(s, h)
        return of(solve(g, h0, union if t.ndim == 1 else (0.0, 1.0), **kwargs))

    runs: dict[str, Run] = {"steps of their own": own, "common steps": common}
    if torchode:

        def theirs() -> tuple[Any, ...]:
            s = by_torchode(f, h0, t, tol)
            return s.ys[:, -1], int(s.stats["n_f_evals"].max()), steps_of(s)

        runs["torchode"] = theirs
    tight = {**kwargs, "rtol": 1e-11, "atol": 1e-11, "method": "dopri8", "options": OWN}
    table(title, measured(runs, rounds), solve(f, h0, t, **tight).h[-1])


def phases(rounds: int, quick: bool) -> None:
    count = 32 if quick else 256
    random = torch.Generator().manual_seed(0)
    h0 = torch.rand(count, 2, generator=random, dtype=F64) * 4 - 2
    t = torch.tensor([0.0, 10.0 if quick else 50.0], dtype=F64)
    mu = torch.full((count,), 25.0, dtype=F64)
    oscillators(f"{count} van der Pol, mu = 25, t = {float(t[1]):g}, rtol 1e-5", mu, h0, t, 1e-5, rounds)


def spread(rounds: int, quick: bool) -> None:
    count = 32 if quick else 256
    mu = torch.logspace(0, 1 if quick else 2, count, dtype=F64)
    h0 = torch.tensor([[2.0, 0.0]], dtype=F64).repeat(count, 1)
    # The period is near 1.61 mu for large mu, and 6.7 for mu = 1.
    end = (1.61 * mu + 5) * (0.3 if quick else 1.0)
    t = torch.stack([torch.zeros_like(end), end], 1)
    oscillators(f"{count} van der Pol, mu to {float(mu[-1]):g}, a period of each, rtol 1e-5", mu, h0, t, 1e-5, rounds)


def gradient(rounds: int, quick: bool) -> None:
    count, end = 32 if quick else 256, 2.0 if quick else 10.0
    random = torch.Generator().manual_seed(0)
    start = torch.rand(count, 2, generator=random, dtype=F64) * 4 - 2
    t = torch.linspace(0, end, 6, dtype=F64)
    mu = torch.full((count,), 25.0, dtype=F64, requires_grad=True)
    f = van_der_pol(mu)
    kwargs: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "dense": False, "engine": "torch"}

    def run(make: Callable[[Tensor], tuple[Tensor, int, int]]) -> Run:
        def step() -> tuple[Any, ...]:
            h0 = start.clone().requires_grad_()
            h, calls, steps = make(h0)
            return torch.autograd.grad(h.square().mean(), (h0, mu))[0], calls, steps

        return step

    def ours(adjoint: bool, options: dict[str, Any]) -> Run:
        def make(h0: Tensor) -> tuple[Tensor, int, int]:
            solution = solve(f, h0, t, adjoint=adjoint, options=options, **kwargs)
            return solution.h, *of(solution)[1:]

        return run(make)

    runs = {
        "their own, adjoint=True": ours(True, OWN),
        "their own, adjoint=False": ours(False, OWN),
        "common, adjoint=True": ours(True, {}),
    }
    if torchode:

        def theirs(h0: Tensor) -> tuple[Tensor, int, int]:
            s = by_torchode(f, h0, t, 1e-5)
            return s.ys.transpose(0, 1), int(s.stats["n_f_evals"].max()), steps_of(s)

        runs["torchode, AutoDiffAdjoint"] = run(theirs)
    table(f"{count} van der Pol, mu = 25, t = {end:g}: a loss of 6 times and its gradient", measured(runs, rounds))


def stiff(rounds: int, quick: bool) -> None:
    count = 32 if quick else 256
    k1, k2, k3 = (torch.tensor([0.04, 3e7, 1e4], dtype=F64)[:, None] * torch.logspace(-1, 1, count, dtype=F64)).unbind()

    def f(t: Tensor, h: Tensor) -> Tensor:
        a, b, c = h.unbind(-1)
        r1, r2, r3 = k1 * a, k2 * b * b, k3 * b * c
        return torch.stack([r3 - r1, r1 - r2 - r3, r2], -1)

    h0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64).repeat(count, 1)
    atol = 1e-6 * torch.tensor([1.0, 1e-4, 1.0], dtype=F64)
    for end in (40.0, 1e4):
        t = torch.tensor([0.0, end], dtype=F64)
        kwargs: dict[str, Any] = {"dense": False, "engine": "torch", "options": OWN}

        def by(method: str, t: Tensor = t, kwargs: dict[str, Any] = kwargs) -> Run:
            return lambda: of(solve(f, h0, t, method=method, rtol=1e-6, atol=atol, **kwargs))

        runs = {"rodas5p, steps of their own": by("rodas5p"), "radau5, common steps": by("radau5")}
        want = solve(f, h0, t, method="radau5", rtol=1e-10, atol=1e-4 * atol, **kwargs).h[-1]
        table(f"{count} Robertson, t = {end:g}, rtol 1e-6", measured(runs, rounds), want)


def latent(rounds: int, quick: bool) -> None:
    count, times, width, samples = (8, 10, 8, 1) if quick else (64, 50, 16, 3)
    torch.manual_seed(0)

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, width))

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return 2 * self.net(z)

    f = Field()
    z0 = torch.randn(samples, count, width)
    t = 0.01 + torch.rand(count, times).sort(1).values * 4
    whole = torch.cat([torch.zeros(count, 1), t], 1)
    union, index = torch.unique(whole, return_inverse=True)
    index = index[:, 1:]
    kwargs: dict[str, Any] = {"adjoint": True, "rtol": 1e-5, "atol": 1e-5, "dense": False, "engine": "torch"}

    def own() -> tuple[Any, ...]:
        solution = solve(f, z0, whole.expand(samples, -1, -1), options={"batch_dims": 2}, **kwargs)
        solution.h[1:].square().mean().backward()
        return of(solution)

    def all_times() -> tuple[Any, ...]:
        solution = solve(f, z0, union, **kwargs)
        rows = torch.arange(count)[:, None]
        solution.h[index, :, rows].square().mean().backward()
        return of(solution)

    runs = {"times of their own": own, "the union of all times": all_times}
    table(f"{samples} samples of {count} latent paths, {times} times of each: a training step", measured(runs, rounds))


PARTS = {"phases": phases, "spread": spread, "gradient": gradient, "stiff": stiff, "latent": latent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    args = parser.parse_args()
    for name in [args.part] if args.part else PARTS:
        PARTS[name](args.rounds, args.quick)


if __name__ == "__main__":
    main()
