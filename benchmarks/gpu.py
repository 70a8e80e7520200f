"""On one CUDA device, in one process: pyjlode's engines beside torchdiffeq and diffrax, rounds interleaved.

    python benchmarks/gpu.py [--all] [--only NAME] [--rounds N]

Forward solves and gradients of: 2-64-64-2, batch 1,024; a flow as FFJORD's, 64-64-64, batch 4,096, with the exact and
with Hutchinson's trace; 64-256-256-64, batch 8,192; and a reaction-diffusion equation of 4,096 points (stiff; the
systems of its steps are solved without matrices). Printed for each library: the time of a solve and of a solve with its
gradient (median over the rounds, the device waited for), the time over that of pyjlode's native engine (median of the
rounds' ratios), and how often a step waits for the device (of the native engines, counted by PyTorch). "compiled" is
the native engine with `compile=True`, "julia" the Julia engine called back. What is not there, or fails, is said.

`--all` first runs `pyjlode doctor` and the tests marked `cuda`, and prints a summary of everything last.
"""

# Not cuda.py: PyTorch imports a package of that name, and would find this file beside the program that runs.

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import pyjlode
from pyjlode.bridge import runtime

DEVICE = torch.device("cuda")
Solve = Callable[..., Tensor]


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Network(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = mlp(*sizes)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h)


class Flow(nn.Module):
    """(h, log density) by the exact trace, D products, or by one of Hutchinson's."""

    def __init__(self, width: int, batch: int, exact: bool) -> None:
        super().__init__()
        self.net, self.exact = mlp(width, width, width), exact
        self.register_buffer("noise", torch.randint(0, 2, (batch, width)) * 2.0 - 1)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = state[0]
        if self.exact:
            first, last = self.net[0], self.net[2]
            x = torch.tanh(first(h))
            # tr(W2 diag(1 - x²) W1), which is what D products would add up to for this network.
            return last(x), -((1 - x * x) * (last.weight * first.weight.T).sum(0)).sum(-1)
        alone = not torch.is_grad_enabled()  # nobody differentiates what comes out
        with torch.enable_grad():
            h = h.detach().requires_grad_() if alone or not h.requires_grad else h
            k = self.net(h)
            (product,) = torch.autograd.grad(k, h, self.noise, create_graph=True)
        return k, -(product * self.noise).sum(-1)


class Reaction(nn.Module):
    """u' = D u'' + r u (1 - u) on a line, at its inner points (Fisher 1937)."""

    def __init__(self, points: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))
        kernel = torch.tensor([[[1.0, -2.0, 1.0]]], dtype=torch.float64) * 1e-3 * (points + 1) ** 2
        self.register_buffer("kernel", kernel)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        diffusion = torch.conv1d(u[None, None], self.kernel, padding=1)[0, 0]
        return diffusion + self.rate * u * (1 - u)


class Problem:
    """A field, its start, and how it is solved."""

    def __init__(self, name: str, f: nn.Module, h0: Any, span: float, tol: float, method: str = "dopri5") -> None:
        self.name, self.f, self.span, self.tol, self.method = name, f.to(DEVICE), span, tol, method
        self.h0 = tuple(x.to(DEVICE) for x in h0) if isinstance(h0, tuple) else h0.to(DEVICE)


def problems() -> Iterator[Problem]:
    torch.manual_seed(0)
    yield Problem("2-64-64-2, batch 1,024", Network(2, 64, 64, 2), torch.randn(1024, 2), 5.0, 1e-5)
    for exact in (True, False):
        h0 = (torch.randn(4096, 64), torch.zeros(4096))
        name = f"flow 64-64-64, batch 4,096, {'exact' if exact else 'Hutchinson'}"
        yield Problem(name, Flow(64, 4096, exact), h0, 1.0, 1e-5)
    yield Problem("64-256-256-64, batch 8,192", Network(64, 256, 256, 64), torch.randn(8192, 64), 2.0, 1e-5)
    x = torch.linspace(0, 1, 4098, dtype=torch.float64)[1:-1]
    yield Problem("reaction-diffusion, 4,096", Reaction(4096), torch.exp(-200 * (x - 0.5) ** 2), 1.0, 1e-5, "bdf")


def solvers(p: Problem) -> dict[str, Solve]:
    """By library, a solve of the problem to its last state, with a gradient or without."""

    def ours(**how: Any) -> Solve:
        def solve(h0: Any, grad: bool) -> Any:
            adjoint = ("gauss" if p.method == "bdf" and how["engine"] == "julia" else True) if grad else False
            t = torch.tensor([0.0, p.span])
            return pyjlode.odeint(p.f, h0, t, method=p.method, rtol=p.tol, atol=p.tol, adjoint=adjoint, **how)

        return solve

    def theirs(h0: Any, grad: bool) -> Any:
        import torchdiffeq

        solve = torchdiffeq.odeint_adjoint if grad else torchdiffeq.odeint
        t = torch.tensor([0.0, p.span], device=DEVICE)
        return solve(p.f, h0, t, method="dopri5", rtol=p.tol, atol=p.tol)

    found: dict[str, Solve] = {"native": ours(engine="torch")}
    if p.method == "dopri5":
        found["compiled"] = ours(engine="torch", compile=True)
        found["torchdiffeq"] = theirs
    if not isinstance(runtime.find(), str) and not runtime.without("CUDA"):
        found["julia"] = ours(engine="julia")
    return found


def runs(p: Problem, solve: Solve) -> dict[str, Callable[[], Any]]:
    def forward() -> None:
        with torch.no_grad():
            solve(p.h0, False)

    def gradient() -> None:
        leaves = [x.clone().requires_grad_() for x in (p.h0 if isinstance(p.h0, tuple) else (p.h0,))]
        h = solve(tuple(leaves) if isinstance(p.h0, tuple) else leaves[0], True)
        last = [x[-1] for x in (h if isinstance(h, tuple) else (h,))]
        loss = sum((x.square().mean() for x in last), torch.zeros((), device=DEVICE))
        torch.autograd.grad(loss, [*leaves, *p.f.parameters()], allow_unused=True)

    return {"forward": forward, "gradient": gradient}


class Diffrax:
    """The same networks in JAX, under jit; the flows and the stiff problem are left out."""

    def __init__(self, p: Problem) -> None:
        import diffrax
        import jax
        import jax.numpy as jnp

        params = [(jnp.asarray(m.weight.detach().cpu().numpy().T), jnp.asarray(m.bias.detach().cpu().numpy()))
                  for m in p.f.net if hasattr(m, "weight")]  # fmt: skip

        def field(t: Any, h: Any, params: Any) -> Any:
            for w, c in params[:-1]:
                h = jnp.tanh(h @ w + c)
            return h @ params[-1][0] + params[-1][1]

        def solve(h0: Any, params: Any) -> Any:
            norm = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))  # noqa: E731
            control = diffrax.PIDController(rtol=p.tol, atol=p.tol, norm=norm)
            term, method = diffrax.ODETerm(field), diffrax.Dopri5()
            return diffrax.diffeqsolve(term, method, 0.0, p.span, None, h0, params, stepsize_controller=control).ys[-1]

        h0 = jnp.asarray(p.h0.cpu().numpy())
        forward = jax.jit(solve)
        gradient = jax.jit(jax.grad(lambda h0, params: jnp.mean(solve(h0, params) ** 2), argnums=(0, 1)))
        self.runs = {
            "forward": lambda: jax.block_until_ready(forward(h0, params)),
            "gradient": lambda: jax.block_until_ready(gradient(h0, params)),
        }


def seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def waits(p: Problem, **how: Any) -> float:
    """How often a step of a forward solve waits for the device."""
    solver = pyjlode.Solver(p.method, rtol=p.tol, atol=p.tol, engine="torch", **how)
    t = torch.tensor([0.0, p.span])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stats = solver.solve(p.f, p.h0, t, dense=False).stats
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught) / (stats.naccept + stats.nreject)


def compare(p: Problem, rounds: int) -> list[str]:
    lines = []
    libraries: dict[str, dict[str, Callable[[], Any]]] = {name: runs(p, s) for name, s in solvers(p).items()}
    try:
        if isinstance(p.f, Network):
            libraries["diffrax"] = Diffrax(p).runs
    except Exception as error:
        lines.append(f"{p.name:44s} diffrax      not timed: {type(error).__name__}: {str(error)[:100]}")
    for what in ("forward", "gradient"):
        walls: dict[str, list[float]] = {}
        for name, library in libraries.items():
            try:
                for _ in range(2):  # compiles, fills the pools
                    seconds(library[what])
                walls[name] = []
            except Exception as error:
                lines.append(f"{p.name:44s} {what:9s} {name:12s} failed: {type(error).__name__}: {str(error)[:160]}")
        for _ in range(rounds):
            for name, row in walls.items():
                row.append(seconds(libraries[name][what]))
        for name, row in walls.items():
            ratio = statistics.median(x / y for x, y in zip(row, walls.get("native", row)))
            line = f"{p.name:44s} {what:9s} {name:12s} {1e3 * statistics.median(row):10.2f} ms {ratio:7.2f}"
            if what == "forward" and name in ("native", "compiled"):
                line += f" {waits(p, **({'compile': True} if name == 'compiled' else {})):7.2f}"
            lines.append(line)
    return lines


def everything() -> list[str]:
    """Doctor and the tests marked `cuda`: a line on each."""
    lines = []
    for name, command in (
        ("pyjlode doctor", [sys.executable, "-m", "pyjlode", "doctor"]),
        ("tests", [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests", "-p", "no:cacheprovider"]),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
        said = [line for line in done.stdout.splitlines() if line.strip()]
        lines.append(f"{name}: status {done.returncode}; {said[-1] if said else 'nothing said'}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="doctor and the tests marked cuda first")
    parser.add_argument("--only", default="", help="only problems whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device: nothing to measure.")
    warnings.filterwarnings("ignore")
    lines = everything() if args.all else []
    head = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    lines += [head, f"{'problem':44s} {'':9s} {'library':12s} {'time':>13s} {'ratio':>7s} {'waits':>7s}"]
    for p in problems():
        if args.only in p.name:
            found = compare(p, args.rounds)
            print("\n".join(found), flush=True)
            lines += found
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
