"""What the Julia engine costs: its start, a first and a second field, each call of f, and each adjoint.

    python benchmarks/julia.py [--rounds N] [--part start|call|adjoint|size]

Four tables, in one process and one thread:

start: seconds to load juliacall, the solvers and SciMLSensitivity, and for the first solve and gradient after that, of
    one field and of another.
call: wall / (nfe x cost of f) for a 2-16-2 network in float64, batch 5, rounds interleaved: both engines, torchdiffeq.
adjoint: seconds of a gradient by each adjoint, warm, and its error against a gradient at rtol 1e-12.
size: "interpolating" against "gauss" (and their native namesakes) over the number of parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pyjlode
from pyjlode.bridge import runtime

torch.set_num_threads(1)
F64 = torch.float64


def mlp(width: int, dim: int = 2) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim)).double()
    return Field(net)


class Field(nn.Module):
    """f, counting its calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        self.calls += 1
        return self.net(h)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gradient(f: nn.Module, h0: Tensor, t: Tensor, **kwargs: Any) -> list[Tensor]:
    h0 = h0.clone().requires_grad_()
    loss = pyjlode.odeint(f, h0, t, **kwargs)[-1].square().sum()
    return list(torch.autograd.grad(loss, [h0, *f.parameters()]))


def start() -> None:
    t, h0 = torch.linspace(0, 1, 5, dtype=F64), torch.randn(5, 2, dtype=F64)
    kwargs: dict[str, Any] = {"engine": "julia", "compile": False, "rtol": 1e-6, "atol": 1e-8, "method": "tsit5"}

    def solve(f: nn.Module) -> None:
        with torch.no_grad():
            pyjlode.odeint(f, h0, t, **kwargs)

    whole = seconds(lambda: solve(mlp(16)))
    loading = runtime.seconds()
    print(f"load juliacall     {loading['juliacall']:8.2f} s")
    print(f"load the solvers   {loading['solvers']:8.2f} s")
    print(f"first solve        {whole - sum(loading.values()):8.2f} s   (tsit5, after loading)")
    print(f"second field       {seconds(lambda: solve(mlp(17))):8.2f} s")
    whole = seconds(lambda: gradient(mlp(16), h0, t, adjoint=True, **kwargs))
    print(f"load sensitivity   {runtime.seconds()['sensitivity']:8.2f} s")
    print(f"first gradient     {whole - runtime.seconds()['sensitivity']:8.2f} s   (adjoint=True, after loading)")
    print(f"second field       {seconds(lambda: gradient(mlp(17), h0, t, adjoint=True, **kwargs)):8.2f} s")
    for method in ("dopri5", "vern7", "rodas5p", "bdf", "kencarp4"):
        kwargs["method"] = method
        print(f"first {method:12s} {seconds(lambda: solve(mlp(16))):8.2f} s")


def call(rounds: int) -> None:
    f, h0, t = mlp(16), torch.randn(5, 2, dtype=F64), torch.tensor([0.0, 20.0], dtype=F64)
    options: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}
    runs: dict[str, Callable[[], Any]] = {
        "julia": lambda: pyjlode.odeint(f, h0, t, engine="julia", compile=False, method="tsit5", **options),
        "torch": lambda: pyjlode.odeint(f, h0, t, engine="torch", method="tsit5", **options),
    }
    try:
        import torchdiffeq

        runs["torchdiffeq"] = lambda: torchdiffeq.odeint(f, h0, t, method="dopri5", **options)
    except ImportError:
        pass
    walls: dict[str, list[float]] = {name: [] for name in runs}
    cost: list[float] = []
    zero = torch.zeros((), dtype=F64)
    with torch.no_grad():
        for i in range(rounds + 1):
            for name, run in runs.items():
                run()
                wall = seconds(run)
                if i:
                    walls[name].append(wall)
            cost += [seconds(lambda: f(zero, h0)) for _ in range(50)]
        once = statistics.median(cost)
        print(f"{'':12s} {'nfe':>5s} {'wall/ms':>9s} {'overhead':>9s}   (f alone: {once * 1e6:.1f} us)")
        for name, run in runs.items():
            f.calls = 0
            run()
            wall = statistics.median(walls[name])
            print(f"{name:12s} {f.calls:5d} {wall * 1e3:9.2f} {wall / (f.calls * once):9.2f}")


def adjoint(rounds: int) -> None:
    f, h0, t = mlp(16), torch.randn(5, 2, dtype=F64), torch.linspace(0, 5, 11, dtype=F64)
    want = gradient(f, h0, t, engine="torch", adjoint=True, method="vern9", rtol=1e-12, atol=1e-13)
    print(f"{'adjoint':14s} {'engine':6s} {'wall/ms':>9s} {'error':>9s}")
    for name in ("interpolating", "gauss", "quadrature", "backsolve"):
        for engine in ("julia", "torch"):

            def run(name: str = name, engine: str = engine) -> list[Tensor]:
                return gradient(
                    f, h0, t, engine=engine, compile=False, adjoint=name, method="tsit5", rtol=1e-8, atol=1e-8
                )

            got = run()
            wall = statistics.median(seconds(run) for _ in range(rounds))
            error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want))
            print(f"{name:14s} {engine:6s} {wall * 1e3:9.1f} {error:9.1e}")


def size(rounds: int) -> None:
    h0, t = torch.randn(5, 2, dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)
    print(f"{'parameters':>10s} {'interpolating/ms':>17s} {'gauss/ms':>9s} {'ratio':>7s}")
    for width in (1, 4, 16, 64, 256, 1024, 4096):
        f = mlp(width)
        walls: dict[str, list[float]] = {"interpolating": [], "gauss": []}
        for i in range(rounds + 1):
            for name, row in walls.items():
                wall = seconds(
                    lambda name=name, f=f: gradient(  # type: ignore[misc]
                        f, h0, t, engine="julia", compile=False, adjoint=name, method="tsit5", rtol=1e-6, atol=1e-8
                    )
                )
                if i:
                    row.append(wall)
        a, b = (statistics.median(row) for row in walls.values())
        ratio = statistics.median(x / y for x, y in zip(*walls.values()))
        count = sum(p.numel() for p in f.parameters())
        print(f"{count:10d} {a * 1e3:17.1f} {b * 1e3:9.1f} {ratio:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--part", choices=("start", "call", "adjoint", "size"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch was imported")
    parts: dict[str, Callable[[], None]] = {
        "start": start,
        "call": lambda: call(args.rounds),
        "adjoint": lambda: adjoint(args.rounds),
        "size": lambda: size(args.rounds),
    }
    for name, run in parts.items():
        if args.part in (None, name):
            print(f"\n{name}")
            run()


if __name__ == "__main__":
    main()
