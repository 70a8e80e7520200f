"""Non-stiff problems: pyjlode beside torchdiffeq, torchode and diffrax, in one process, one thread, rounds interleaved.

    python benchmarks/nonstiff.py [--rounds N] [--only NAME] [--quick]

For every problem and library: evaluations of f, wall time (median over the rounds, each after one run that is not
timed), its ratio to pyjlode's (median over the rounds), the error against a solution at rtol 1e-12, and

    overhead = wall / (nfe x cost of one f call).

Every library runs the same problem with its `dopri5` at the same tolerance ("equal tolerance"); then the others'
tolerances are searched for the one at which each reaches pyjlode's error ("equal error"). Gradients are of the sum of
squares of the last state with respect to h0 and all parameters, `adjoint=True` against `odeint_adjoint`, with the
error against a gradient at rtol 1e-12. torchode solves each element of the batch on its own and has no f in common
with the others' step control; diffrax runs under jit, compiled before the clock starts, with its recursive-checkpoint
adjoint.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pyjlode

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


class Problem:
    """A vector field in PyTorch, with its layers' weights for JAX."""

    def __init__(self, name: str, h0: Tensor, span: float, tol: float, net: nn.Sequential | None) -> None:
        self.name, self.h0, self.span, self.tol, self.net = name, h0, span, tol, net

    def field(self, dtype: torch.dtype) -> nn.Module:
        return Counted(self.net, dtype)


class Counted(nn.Module):
    """f, counting its calls; a network or Lorenz's equations."""

    def __init__(self, net: nn.Sequential | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = None
        if net is not None:
            self.net = nn.Sequential(
                *(nn.Linear(m.in_features, m.out_features) if hasattr(m, "weight") else m for m in net)
            )
            self.net.load_state_dict(net.state_dict())
            self.net.to(dtype)
        else:
            self.rates = nn.Parameter(torch.tensor([10.0, 28.0, 8 / 3], dtype=dtype))
        self.calls = 0

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        self.calls += 1
        if self.net is not None:
            return self.net(h)
        x, y, z = h.unbind(-1)
        s, r, b = self.rates.unbind()
        return torch.stack([s * (y - x), x * (r - z) - y, x * y - b * z], -1)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def problems() -> list[Problem]:
    torch.manual_seed(0)
    f64 = torch.float64
    return [
        Problem("2-50-2, batch 20", torch.randn(20, 2), 20.0, 1e-5, mlp(2, 50, 2)),
        Problem("16-64-64-16, batch 256", torch.randn(256, 16), 20.0, 1e-5, mlp(16, 64, 64, 16)),
        Problem("2-16-16-2, batch 1, float64", torch.randn(1, 2, dtype=f64), 20.0, 1e-8, mlp(2, 16, 16, 2)),
        Problem("64-256-256-64, batch 512", torch.randn(512, 64), 2.0, 1e-5, mlp(64, 256, 256, 64)),
        Problem("Lorenz, float64", torch.ones(3, dtype=f64), 5.0, 1e-8, None),
    ]


class Library:
    """One solver of a problem: forward to the last state, and the gradient of the sum of its squares."""

    name: str

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.f = p.field(p.h0.dtype)
        self.t = torch.tensor([0.0, p.span], dtype=p.h0.dtype)

    def nfe(self, run: Callable[[], Any]) -> int:
        self.f.calls = 0
        run()
        return self.f.calls

    def solve(self, h0: Tensor, tol: float, grad: bool) -> Tensor:
        raise NotImplementedError

    def forward(self, tol: float) -> Tensor:
        with torch.no_grad():
            return self.solve(self.p.h0, tol, False)

    def gradient(self, tol: float) -> list[Tensor]:
        h0 = self.p.h0.clone().requires_grad_()
        loss = self.solve(h0, tol, True).square().sum()
        return list(torch.autograd.grad(loss, [h0, *self.f.parameters()]))


class Ours(Library):
    name = "pyjlode"

    def solve(self, h0: Tensor, tol: float, grad: bool) -> Tensor:
        return pyjlode.odeint(self.f, h0, self.t, rtol=tol, atol=tol, method="dopri5", adjoint=grad)[-1]


class TorchDiffEq(Library):
    name = "torchdiffeq"

    def solve(self, h0: Tensor, tol: float, grad: bool) -> Tensor:
        import torchdiffeq

        solve = torchdiffeq.odeint_adjoint if grad else torchdiffeq.odeint
        return solve(self.f, h0, self.t, rtol=tol, atol=tol, method="dopri5")[-1]


class TorchOde(Library):
    name = "torchode"

    def solve(self, h0: Tensor, tol: float, grad: bool) -> Tensor:
        import torchode

        batch = h0 if h0.ndim == 2 else h0[None]
        term = torchode.ODETerm(self.f if h0.ndim == 2 else lambda t, h: self.f(t, h))
        method = torchode.Dopri5(term=term)
        control = torchode.IntegralController(atol=tol, rtol=tol, term=term)
        span = torch.tensor([0.0, self.p.span], dtype=h0.dtype).expand(len(batch), 2)
        solver = torchode.AutoDiffAdjoint(method, control)
        return solver.solve(torchode.InitialValueProblem(y0=batch, t_eval=span)).ys[:, -1].reshape(h0.shape)


class Diffrax(Library):
    name = "diffrax"

    def __init__(self, p: Problem) -> None:
        super().__init__(p)
        import jax

        jax.config.update("jax_enable_x64", True)
        import diffrax
        import jax.numpy as jnp

        layers = [] if p.net is None else [m for m in self.f.net if hasattr(m, "weight")]
        params = [(jnp.asarray(m.weight.detach().numpy().T), jnp.asarray(m.bias.detach().numpy())) for m in layers]
        if p.net is None:
            params = jnp.asarray(self.f.rates.detach().numpy())

        def field(t: Any, h: Any, params: Any) -> Any:
            if p.net is None:
                x, y, z = h
                s, r, b = params
                return jnp.stack([s * (y - x), x * (r - z) - y, x * y - b * z])
            for w, c in params[:-1]:
                h = jnp.tanh(h @ w + c)
            return h @ params[-1][0] + params[-1][1]

        def solve(h0: Any, params: Any, tol: Any) -> Any:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Dopri5(),
                0.0,
                p.span,
                None,
                h0,
                params,
                stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol, norm=diffrax_rms),
                max_steps=4096,
            )
            return solution.ys[-1], solution.stats["num_steps"]

        def diffrax_rms(x: Any) -> Any:
            return jnp.sqrt(jnp.mean(jnp.square(x)))

        def loss(h0: Any, params: Any, tol: Any) -> Any:
            return jnp.sum(solve(h0, params, tol)[0] ** 2)

        self.h0, self.params = jnp.asarray(p.h0.numpy()), params
        self.jit = jax.jit(solve)
        self.jit_grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        self.block = jax.block_until_ready
        self.tree = jax.tree_util.tree_leaves

    def nfe(self, run: Callable[[], Any]) -> int:
        return 0  # inside the compiled loop nobody counts

    def forward(self, tol: float) -> Tensor:
        return torch.tensor(self.block(self.jit(self.h0, self.params, tol))[0].__array__())

    def gradient(self, tol: float) -> list[Tensor]:
        leaves = self.tree(self.block(self.jit_grad(self.h0, self.params, tol)))
        grads = [torch.tensor(x.__array__()) for x in leaves]
        return [g.T if i and g.ndim == 2 else g for i, g in enumerate(grads)]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference, relative to the largest entry of each tensor."""
    return max(float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want))


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def tolerance_for(library: Library, run: str, want: list[Tensor], target: float, tol: float) -> float | None:
    """The loosest tolerance, in half decades from a hundred times looser to tighter, that meets the target error."""
    for half in range(-4, 8):
        trial = tol * 10 ** (-half / 2)
        try:
            got = getattr(library, run)(trial)
        except Exception:
            return None
        if error(got if isinstance(got, list) else [got], want) <= target:
            return trial
    return None


def compare(p: Problem, run: str, rounds: int, libraries: list[type[Library]]) -> list[str]:
    exact = p.field(torch.float64)
    h0 = p.h0.double().clone().requires_grad_()
    t = torch.tensor([0.0, p.span], dtype=torch.float64)
    last = pyjlode.odeint(exact, h0, t, method="vern9", rtol=1e-12, atol=1e-13, adjoint=True)[-1]
    want = [last.detach()]
    if run == "gradient":
        want = list(torch.autograd.grad(last.square().sum(), [h0, *exact.parameters()]))

    made: list[tuple[Library, float, str]] = []
    ours = Ours(p)
    got = getattr(ours, run)(p.tol)
    target = error(got if isinstance(got, list) else [got], want)
    made.append((ours, p.tol, "tolerance"))
    for kind in libraries:
        library = kind(p)
        made.append((library, p.tol, "tolerance"))
        tol = tolerance_for(library, run, want, target, p.tol)
        if tol is not None:
            made.append((library, tol, "error"))

    walls: list[list[float]] = [[] for _ in made]
    f, z = ours.f, torch.zeros((), dtype=p.h0.dtype)
    cost: list[float] = []
    for i in range(rounds + 1):  # the first round warms up
        for row, (library, tol, _) in zip(walls, made):
            once = lambda library=library, tol=tol: getattr(library, run)(tol)  # noqa: E731
            once()  # after another library's turn: a program that solves in a loop has its own code in the caches
            wall = seconds(once)
            if i:
                row.append(wall)
        with torch.no_grad():
            cost += [seconds(lambda: f(z, p.h0)) for _ in range(20)]
    f_cost = statistics.median(cost)

    lines = []
    mine = statistics.median(walls[0])
    for row, (library, tol, equal) in zip(walls, made):
        got = getattr(library, run)(tol)
        err = error(got if isinstance(got, list) else [got], want)
        nfe = library.nfe(lambda library=library, tol=tol: getattr(library, run)(tol))
        wall = statistics.median(row)
        # The ratio of each round, so that a machine busy in one round does not tilt it.
        ratio = statistics.median(theirs / our for theirs, our in zip(row, walls[0]))
        overhead = f"{wall / (nfe * f_cost):8.2f}" if nfe else "       -"
        first = f"{p.name:28s}" if library is ours else " " * 28
        lines.append(
            f"{first} {library.name:12s} {equal:10s} {tol:8.0e} {nfe or '-':>6} {wall * 1e3:10.2f} {ratio:8.2f} "
            f"{err:9.1e} {overhead}"
        )
    assert math.isfinite(mine)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="only problems whose name contains this")
    parser.add_argument("--quick", action="store_true", help="three rounds, pyjlode and torchdiffeq only")
    args = parser.parse_args()
    libraries: list[type[Library]] = [TorchDiffEq] if args.quick else [TorchDiffEq, TorchOde, Diffrax]
    rounds = 3 if args.quick else args.rounds
    for run in ("forward", "gradient"):
        print(f"\n{run}: dopri5; ratio > 1 means pyjlode is faster")
        print(
            f"{'problem':28s} {'library':12s} {'equal':10s} {'rtol':>8s} {'nfe':>6s} {'wall/ms':>10s} {'ratio':>8s} "
            f"{'error':>9s} {'overhead':>8s}"
        )
        for p in problems():
            if args.only in p.name:
                print(
                    "\n".join(compare(p, run, rounds if p.h0.numel() < 10_000 else min(rounds, 5), libraries)),
                    flush=True,
                )


if __name__ == "__main__":
    main()
