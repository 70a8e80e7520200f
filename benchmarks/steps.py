"""Compiled steps of the native engine (`compile=True`), beside its eager ones, torchdiffeq and diffrax.

    python benchmarks/steps.py [--device cuda] [--rounds N] [--only NAME] [--method NAME]

For each network, and the likelihood of a CNF in the plane: seconds of compilation, then the time of a solve, and of a solve with its gradient (`adjoint=True`,
torchdiffeq's `odeint_adjoint`, diffrax's checkpoints), all with the same method and tolerance. The contenders take
turns, round after round, on one thread: medians in ms, and in brackets medians of the ratios to compiled within a
round, so that more than 1 is slower. What is not installed is left out. On a GPU the waits of the host for it are
counted too, beside the steps that were tried.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import pyjlode
from pyjlode.nn import CNF

torch.set_num_threads(1)
F64, F32 = torch.float64, torch.float32

diffrax = torchdiffeq = None
with contextlib.suppress(ImportError):
    import torchdiffeq
with contextlib.suppress(ImportError):
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)


class Problem(NamedTuple):
    name: str
    sizes: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    span: float
    tol: float


ON_CPU = [
    Problem("2-16-16-2", (2, 16, 16, 2), 1, F64, 20.0, 1e-8),
    Problem("2-50-50-2, batch 20", (2, 50, 50, 2), 20, F32, 20.0, 1e-5),
    Problem("2-64-64-2, batch 128", (2, 64, 64, 2), 128, F32, 20.0, 1e-5),
    Problem("16-64-64-16, batch 256", (16, 64, 64, 16), 256, F32, 20.0, 1e-5),
]
ON_GPU = [
    Problem("2-64-64-2, batch 1024", (2, 64, 64, 2), 1024, F32, 20.0, 1e-5),
    Problem("64-256-256-64, batch 8192", (64, 256, 256, 64), 8192, F32, 2.0, 1e-5),
]


def network(p: Problem, device: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(p.sizes, p.sizes[1:]):
        layers += [nn.Linear(a, b, dtype=p.dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(device)


class Field(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h)


def in_jax(p: Problem, net: nn.Sequential, h0: Tensor, method: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A solve and its gradient by diffrax."""
    weights = [(jnp.asarray(m.weight.detach().cpu().numpy().T), jnp.asarray(m.bias.detach().cpu().numpy()))
               for m in net if hasattr(m, "weight")]  # fmt: skip
    solver = {"dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5, "bosh3": diffrax.Bosh3}[method]()

    def field(t: Any, h: Any, weights: Any) -> Any:
        for w, c in weights[:-1]:
            h = jnp.tanh(h @ w + c)
        return h @ weights[-1][0] + weights[-1][1]

    def solve(h0: Any, weights: Any) -> Any:
        control = diffrax.PIDController(rtol=p.tol, atol=p.tol, norm=lambda x: jnp.sqrt(jnp.mean(jnp.square(x))))
        term = diffrax.ODETerm(field)
        return diffrax.diffeqsolve(
            term, solver, 0.0, p.span, None, h0, weights, stepsize_controller=control, max_steps=4096
        ).ys[-1]

    h = jnp.asarray(h0.cpu().numpy())
    once = jax.jit(solve)
    gradient = jax.jit(jax.grad(lambda h, w: jnp.sum(solve(h, w) ** 2), argnums=(0, 1)))
    return lambda: jax.block_until_ready(once(h, weights)), lambda: jax.block_until_ready(gradient(h, weights))


def contenders(
    p: Problem, method: str, device: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    net = network(p, device)
    f, h0 = Field(net), torch.randn(p.batch, p.sizes[0], dtype=p.dtype, device=device)
    t, tol = torch.tensor([0.0, p.span], dtype=p.dtype, device=device), {"rtol": p.tol, "atol": p.tol, "method": method}

    def forward(solve: Callable[..., Tensor], **how: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return solve(f, h0, t, **tol, **how)

        return run

    def gradient(solve: Callable[..., Tensor], **how: Any) -> Callable[[], Any]:
        def run() -> Any:
            start = h0.clone().requires_grad_()
            return torch.autograd.grad(solve(f, start, t, **tol, **how)[-1].square().sum(), [start, *f.parameters()])

        return run

    ours = {"engine": "torch"}
    solves = {
        "compiled": forward(pyjlode.odeint, compile=True, **ours),
        "eager": forward(pyjlode.odeint, **ours),
    }
    gradients = {
        "compiled": gradient(pyjlode.odeint, compile=True, adjoint=True, **ours),
        "eager": gradient(pyjlode.odeint, adjoint=True, **ours),
    }
    if torchdiffeq is not None and method in ("dopri5", "bosh3"):
        solves["torchdiffeq"] = forward(torchdiffeq.odeint)
        gradients["torchdiffeq"] = gradient(torchdiffeq.odeint_adjoint)
    if diffrax is not None and method in ("dopri5", "tsit5", "bosh3"):
        solves["diffrax"], gradients["diffrax"] = in_jax(p, net, h0, method)
    return solves, gradients


def seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(title: str, runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> None:
    compiling = seconds_of_the_wall(runs["compiled"])
    for run in runs.values():
        run()
    walls: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # after another one's turn
            walls[name].append(seconds(run, device))
    print(f"{title:42s} compilation {compiling:5.1f} s", end="")
    for name, row in walls.items():
        ratio = statistics.median(x / y for x, y in zip(row, walls["compiled"]))
        print(
            f"   {name} {statistics.median(row) * 1e3:.2f} ms" + ("" if name == "compiled" else f" ({ratio:.2f})"),
            end="",
        )
    print(flush=True)


def seconds_of_the_wall(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def waits(p: Problem, method: str) -> None:
    """How often the host waits for the GPU in a compiled solve."""
    f, h0 = Field(network(p, "cuda")), torch.randn(p.batch, p.sizes[0], dtype=p.dtype, device="cuda")
    t = torch.tensor([0.0, p.span], dtype=p.dtype, device="cuda")
    solver = pyjlode.Solver(method, rtol=p.tol, atol=p.tol, engine="torch", compile=True)
    with torch.no_grad():
        stats = solver.solve(f, h0, t, dense=False).stats
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            solver(f, h0, t)
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    count = sum(x.count for x in profile.key_averages() if x.key in names)
    print(f"{p.name:36s} {stats.naccept + stats.nreject} steps, {count} waits of the host")


class TimeField(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(torch.cat([h, t.expand(*h.shape[:-1], 1)], -1))


def flow(width: int, batch: int, trace: str, method: str, rounds: int, device: str) -> None:
    """The likelihood of a continuous normalizing flow in the plane, and its gradient."""
    f, x = TimeField(width).to(device), torch.randn(batch, 2, device=device)
    runs = {}
    for name, compile in (("compiled", True), ("eager", None)):
        model = CNF(f, 2, trace=trace, method=method, engine="torch", compile=compile, rtol=1e-5, atol=1e-5).to(device)

        def run(model: CNF = model) -> Any:
            return torch.autograd.grad(-model.log_prob(x).mean(), list(f.parameters()))

        runs[name] = run
    compare(f"CNF {width}-{width}, batch {batch}, {trace}: gradient", runs, rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--method", default="dopri5")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    for p in ON_GPU if args.device == "cuda" else ON_CPU:
        if args.only in p.name:
            solves, gradients = contenders(p, args.method, args.device)
            compare(p.name, solves, args.rounds, args.device)
            compare(f"{p.name}: gradient", gradients, args.rounds, args.device)
            if args.device == "cuda":
                waits(p, args.method)
    for trace in ("exact", "hutchinson"):
        if args.only in "CNF":
            width, batch = (64, 4096) if args.device == "cuda" else (32, 100)
            flow(width, batch, trace, args.method, args.rounds, args.device)


if __name__ == "__main__":
    main()
