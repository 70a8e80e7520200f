"""What vector fields compiled from PyTorch to Julia cost, beside hand-written Julia, diffrax and torchdiffeq.

    python benchmarks/compiled.py [--part peers|first|small|call|stiff|neural|gradient|wide|size|sweep|allocations]
        [--rounds N] [--alone]

Every table is of one run: its contenders take turns, round after round, on one thread, and what is printed of them are
medians of CPU time (which on one thread is the time, and which other programs on the machine change least), and medians
of the ratios within a round. Contenders that are not installed are left out, and by --alone diffrax and torchdiffeq:
where JAX was imported first, each call from one compiled Julia function to another takes 8 ns longer.

peers: how many times as fast as diffrax under jit, of forward solves and gradients, with the ratios that are the goal; how
    many times as long as hand-written Julia; and what a call and a gradient of next to no work cost. With a
    `pyjlode.Solver`.
first: seconds of tracing, generating and compiling, and of the first solve, for a 2-64-64-2 network.
small: Lorenz, Lotka-Volterra, Hénon-Heiles and seven bodies (Pleiades), against a Julia function written in place by
    hand and solved from Julia by the same algorithm and step control: behind a pointer, as SciML does by default and PyJLODE does
    ("by hand"), and with the solver compiled for it, which takes seconds once ("by hand, full").
call: a trivial problem: what one call from Python costs.
stiff: Robertson, van der Pol, Brusselator (Jacobian found by itself), against Julia with an analytic Jacobian,
    diffrax's Kvaerno5 and SciPy.
neural: forward solves of small networks. gradient: gradients of these, and of Lotka-Volterra with 101 outputs.
wide: 64-256-256-64 at batch 512, against the native engine and diffrax.
size: networks from d = 2 to 4096: compiled, called back, native, and what "auto" makes of it; docs/size.png.
sweep: 10,000 Lorenz systems with different parameters in one call.
allocations: bytes that Julia allocates in a solve, and for each step of it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import pyjlode
from pyjlode.bridge import runtime

torch.set_num_threads(1)
F64, F32 = torch.float64, torch.float32

diffrax = torchdiffeq = None
if "--alone" not in sys.argv:
    with contextlib.suppress(ImportError):
        import diffrax
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
    with contextlib.suppress(ImportError):
        import torchdiffeq

# Fewest seconds that one contender is timed for in a round.
LEAST = 0.05


def seconds(run: Callable[[], Any], count: int) -> float:
    if isinstance(run, ByHand):
        return run.seconds(count)
    start = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - start) / count


def compare(
    title: str, runs: dict[str, Callable[[], Any]], rounds: int, slow: tuple[str, ...] = ()
) -> dict[str, float]:
    """Time contenders in turns; print medians in ms and medians of the ratios to the first. Those that are `slow` run
    twice in all."""
    counts = {}
    for name, run in runs.items():
        run()
        once = seconds(run, 1)
        counts[name] = 1 if name in slow else max(1, int(LEAST / once))
    walls: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            if name not in slow or i == 0:
                walls[name].append(seconds(run, counts[name]))
    first = next(iter(runs))
    print(f"{title:28s}", end="")
    for name, row in walls.items():
        ratio = statistics.median(x / y for x, y in zip(row, walls[first]))
        print(f"  {name} {statistics.median(row) * 1e3:.3f} ms" + ("" if name == first else f" ({ratio:.2f})"), end="")
    print(flush=True)
    return {name: statistics.median(row) for name, row in walls.items()}


def julia(text: str) -> Any:
    """Julia code in a module with SciML's names."""
    with runtime.julia():
        return runtime.evaluate(text)


HAND = """
module Hand
using PyJLODE: PyJLODE, ODEFunction, ODEProblem, FullSpecialize, SparseMatrixCSC, init, nonzeros, solve!
using PyJLODE.OrdinaryDiffEqCore: PIController, alg_order, default_controller, isimplicit
const SparseArrays = parentmodule(SparseMatrixCSC)
function problem(f!, u0, p, span, full; kwargs...)
    f = full ? ODEFunction{true, FullSpecialize}(f!; kwargs...) : ODEFunction{true}(f!; kwargs...)
    return ODEProblem(f, u0, span, p)
end
# The step control of PyJLODE: `_stepping` in pyjlode/bridge/engine.py.
function controller(alg)
    isimplicit(alg) && return default_controller(Float64, alg)
    k = alg_order(alg)
    return PIController(Float64, alg; beta1 = 0.85 / k, beta2 = 0.2 / k, gamma = 0.9^0.65, qmax_first_step = 10.0)
end
function run(prob, alg, tol, atol = tol)
    return solve!(
        init(
            prob, alg; reltol = tol, abstol = atol, save_everystep = false, verbose = PyJLODE.SILENT,
            controller = controller(alg)
        )
    )
end
function time(prob, alg, tol, atol, count)
    run(prob, alg, tol, atol)
    clock() = ccall(:clock, Clong, ()) / 1.0e6  # CPU time of this process
    start = clock()
    for _ in 1:count
        run(prob, alg, tol, atol)
    end
    return clock() - start
end
ends(prob, alg, tol, atol) = run(prob, alg, tol, atol).u[end]

function lorenz(du, u, p, t)
    @inbounds begin
        du[1] = p[1] * (u[2] - u[1])
        du[2] = u[1] * (p[2] - u[3]) - u[2]
        du[3] = u[1] * u[2] - p[3] * u[3]
    end
    return nothing
end
function lotka(du, u, p, t)
    @inbounds begin
        du[1] = p[1] * u[1] - p[2] * u[1] * u[2]
        du[2] = -p[3] * u[2] + p[4] * u[1] * u[2]
    end
    return nothing
end
function henon(du, u, p, t)
    @inbounds begin
        x, y, vx, vy = u[1], u[2], u[3], u[4]
        du[1] = vx
        du[2] = vy
        du[3] = -x - 2 * x * y
        du[4] = -y - x^2 + y^2
    end
    return nothing
end
function pleiades(du, u, p, t)
    @inbounds for i in 1:7
        du[i] = u[14 + i]
        du[7 + i] = u[21 + i]
        ax = ay = 0.0
        for j in 1:7
            i == j && continue
            dx, dy = u[j] - u[i], u[7 + j] - u[7 + i]
            r2 = dx * dx + dy * dy
            w = j / (r2 * sqrt(r2))
            ax += w * dx
            ay += w * dy
        end
        du[14 + i] = ax
        du[21 + i] = ay
    end
    return nothing
end
function robertson(du, u, p, t)
    @inbounds begin
        a, b, c = p[1] * u[1], p[2] * u[2] * u[2], p[3] * u[2] * u[3]
        du[1] = -a + c
        du[2] = a - b - c
        du[3] = b
    end
    return nothing
end
function robertson_jac(J, u, p, t)
    @inbounds begin
        J[1, 1] = -p[1]; J[1, 2] = p[3] * u[3]; J[1, 3] = p[3] * u[2]
        J[2, 1] = p[1]; J[2, 2] = -2 * p[2] * u[2] - p[3] * u[3]; J[2, 3] = -p[3] * u[2]
        J[3, 1] = 0; J[3, 2] = 2 * p[2] * u[2]; J[3, 3] = 0
    end
    return nothing
end
function vdp(du, u, p, t)
    @inbounds begin
        du[1] = u[2]
        du[2] = p[1] * (1 - u[1]^2) * u[2] - u[1]
    end
    return nothing
end
function vdp_jac(J, u, p, t)
    @inbounds begin
        J[1, 1] = 0; J[1, 2] = 1
        J[2, 1] = -2 * p[1] * u[1] * u[2] - 1; J[2, 2] = p[1] * (1 - u[1]^2)
    end
    return nothing
end
no_tgrad(dT, u, p, t) = fill!(dT, 0)
# u and v of a cell side by side: the Jacobian is a band of two on either side of the diagonal.
function brusselator(du, u, p, t)
    n = length(u) ÷ 2
    a = p[1] * (n + 1)^2
    @inbounds for i in 1:n
        x, y = u[2i - 1], u[2i]
        x0, y0 = i == 1 ? (1.0, 3.0) : (u[2i - 3], u[2i - 2])
        x1, y1 = i == n ? (1.0, 3.0) : (u[2i + 1], u[2i + 2])
        du[2i - 1] = 1 + x * x * y - 4x + a * (x0 - 2x + x1)
        du[2i] = 3x - x * x * y + a * (y0 - 2y + y1)
    end
    return nothing
end
function brusselator_pattern(n)
    J = SparseArrays.spzeros(2n, 2n)
    for i in 1:n, (r, c) in ((2i - 1, 2i - 1), (2i - 1, 2i), (2i, 2i - 1), (2i, 2i))
        J[r, c] = 1
    end
    for i in 1:(2n - 2)
        J[i, i + 2] = J[i + 2, i] = 1
    end
    return J
end
function brusselator_jac(J, u, p, t)
    n = length(u) ÷ 2
    a = p[1] * (n + 1)^2
    nz, ptr = nonzeros(J), SparseArrays.getcolptr(J)
    @inbounds for i in 1:n
        x, y = u[2i - 1], u[2i]
        k = ptr[2i - 1]
        if i > 1
            nz[k] = a
            k += 1
        end
        nz[k] = 2x * y - 4 - 2a
        nz[k + 1] = 3 - 2x * y
        i < n && (nz[k + 2] = a)
        k = ptr[2i]
        if i > 1
            nz[k] = a
            k += 1
        end
        nz[k] = x * x
        nz[k + 1] = -x * x - 2a
        i < n && (nz[k + 2] = a)
    end
    return nothing
end
end
"""


class ByHand:
    """A problem in hand-written Julia, timed by a loop in Julia.

    Args:
        full: compile the solver for this f (FullSpecialize), and not for all f behind a pointer (SciML's default).
    """

    def __init__(
        self,
        f: str,
        u0: Tensor,
        p: list[float],
        span: tuple[float, float],
        alg: str,
        tol: tuple[float, float],
        extra: str = "",
        full: bool = False,
    ) -> None:
        numbers = lambda xs: "Float64[" + ", ".join(map(repr, xs)) + "]"
        name = f"prob_{ByHand.count}"
        ByHand.count += 1
        julia(
            f"Hand.eval(:({name} = problem({f}, {numbers(u0.reshape(-1).tolist())}, {numbers(p)}, {span}, {str(full).lower()}; {extra})))"
        )
        self.args = f'Hand.{name}, PyJLODE.algorithm("{alg}"), {tol[0]!r}, {tol[1]!r}'

    count = 0

    def seconds(self, count: int) -> float:
        return float(julia(f"Hand.time({self.args}, {count})")) / count

    def __call__(self) -> None:
        julia(f"Hand.run({self.args})")

    def ends(self) -> list[float]:
        return list(julia(f"Hand.ends({self.args})"))


# Small systems, in PyTorch and JAX.

LORENZ, LOTKA = [10.0, 28.0, 8 / 3], [1.5, 1.0, 3.0, 1.0]


def lorenz(p: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, u: Tensor) -> Tensor:
        x, y, z = u
        return torch.stack([p[0] * (y - x), x * (p[1] - z) - y, x * y - p[2] * z])

    return f


def lotka(p: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, u: Tensor) -> Tensor:
        x, y = u
        return torch.stack([p[0] * x - p[1] * x * y, -p[2] * y + p[3] * x * y])

    return f


def henon(t: Tensor, u: Tensor) -> Tensor:
    x, y, vx, vy = u
    return torch.stack([vx, vy, -x - 2 * x * y, -y - x**2 + y**2])


MASSES = torch.arange(1.0, 8.0, dtype=F64)


def pleiades(t: Tensor, u: Tensor) -> Tensor:
    x, y, v = u[:7], u[7:14], u[14:]
    dx, dy = x - x[:, None], y - y[:, None]
    r2 = dx * dx + dy * dy + torch.eye(7, dtype=u.dtype)
    w = MASSES * r2**-1.5
    return torch.cat([v, (w * dx).sum(1), (w * dy).sum(1)])


PLEIADES = torch.tensor(
    [3, 3, -1, -3, 2, -2, 2, 3, -3, 2, 0, 0, -4, 4, 0, 0, 0, 0, 0, 1.75, -1.5, 0, 0, 0, -1.25, 1, 0, 0], dtype=F64
)

if diffrax is not None:

    def jax_lorenz(t: Any, u: Any, p: Any) -> Any:
        x, y, z = u
        return jnp.stack([p[0] * (y - x), x * (p[1] - z) - y, x * y - p[2] * z])

    def jax_lotka(t: Any, u: Any, p: Any) -> Any:
        x, y = u
        return jnp.stack([p[0] * x - p[1] * x * y, -p[2] * y + p[3] * x * y])

    def jax_henon(t: Any, u: Any, p: Any) -> Any:
        x, y, vx, vy = u
        return jnp.stack([vx, vy, -x - 2 * x * y, -y - x**2 + y**2])

    def jax_pleiades(t: Any, u: Any, p: Any) -> Any:
        x, y, v = u[:7], u[7:14], u[14:]
        dx, dy = x - x[:, None], y - y[:, None]
        r2 = dx * dx + dy * dy + jnp.eye(7)
        w = jnp.arange(1.0, 8.0) * r2**-1.5
        return jnp.concatenate([v, (w * dx).sum(1), (w * dy).sum(1)])

    def jax_solver(
        f: Any, u0: Any, times: Any, solver: Any, rtol: float, atol: float, adjoint: Any = None, dtype: Any = None
    ) -> Any:
        """(u0, p) -> states at times, traced once."""
        adjoint = adjoint or diffrax.RecursiveCheckpointAdjoint()
        term = diffrax.ODETerm(f)

        def run(u0: Any, p: Any) -> Any:
            return diffrax.diffeqsolve(
                term, solver, times[0], times[-1], None, u0, p, saveat=diffrax.SaveAt(ts=times[1:]), max_steps=100_000,
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol), adjoint=adjoint,
            ).ys  # fmt: skip

        return run


def small(rounds: int) -> None:
    problems = [
        ("Lorenz", "lorenz", lorenz, jax_lorenz if diffrax else None, torch.tensor([1.0, 0.0, 0.0], dtype=F64), LORENZ, 20.0),
        ("Lotka-Volterra", "lotka", lotka, jax_lotka if diffrax else None, torch.ones(2, dtype=F64), LOTKA, 20.0),
        ("Henon-Heiles", "henon", lambda p: henon, jax_henon if diffrax else None, torch.tensor([0.1, 0.2, 0.3, -0.2], dtype=F64), [], 100.0),
        ("Pleiades", "pleiades", lambda p: pleiades, jax_pleiades if diffrax else None, PLEIADES, [], 3.0),
    ]  # fmt: skip
    for method, alg, solver in (("tsit5", "Tsit5()", "Tsit5"), ("vern7", "Vern7()", None)):
        print(f"{method}, rtol = atol = 1e-8; in brackets the ratio to what is written by hand")
        for title, name, make, jax_f, u0, p, end in problems:
            f, t = make(torch.tensor(p, dtype=F64)), torch.tensor([0.0, end], dtype=F64)
            tol = {"rtol": 1e-8, "atol": 1e-8}
            run = lambda: pyjlode.odeint(f, u0, t, engine="julia", method=method, compile=True, **tol)
            whole = lambda: pyjlode.odeint(
                f, u0, t, engine="julia", method=method, compile=True, options={"specialize": "full"}, **tol
            )
            runs: dict[str, Any] = {"compiled": run, "compiled, full": whole}
            if diffrax is not None and solver is not None:
                once = jax.jit(jax_solver(jax_f, None, jnp.array([0.0, end]), getattr(diffrax, solver)(), 1e-8, 1e-8))
                j0, jp = jnp.array(u0.numpy()), jnp.array(p)
                runs["diffrax"] = lambda: once(j0, jp).block_until_ready()
            if torchdiffeq is not None and method == "tsit5":
                runs["torchdiffeq"] = lambda: torchdiffeq.odeint(f, u0, t, method="dopri5", **tol)
            hand, full = (ByHand(name, u0, p, (0.0, end), alg, (1e-8, 1e-8), full=x) for x in (False, True))
            compare(title, {"by hand": hand, "by hand, full": full, **runs}, rounds, ("torchdiffeq",))


def call(rounds: int) -> None:
    t, u0, tol = torch.tensor([0.0, 1e-3], dtype=F64), torch.ones(1, dtype=F64), {"rtol": 1e-3, "atol": 1e-3}
    f = lambda t, u: -u
    runs = {
        "compiled": lambda: pyjlode.odeint(f, u0, t, engine="julia", method="tsit5", compile=True, **tol),
        "called back": lambda: pyjlode.odeint(f, u0, t, engine="julia", method="tsit5", compile=False, **tol),
        "native": lambda: pyjlode.odeint(f, u0, t, engine="torch", method="tsit5", **tol),
    }
    compare("one call, trivial", runs, rounds)


class MLP(nn.Module):
    def __init__(self, *sizes: int, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:]):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1]).to(dtype)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h)


def jax_mlp(module: MLP) -> tuple[Any, Any]:
    weights = [(jnp.array(m.weight.detach().numpy()), jnp.array(m.bias.detach().numpy())) for m in module.net[::2]]

    def f(t: Any, h: Any, weights: Any) -> Any:
        for W, b in weights[:-1]:
            h = jnp.tanh(h @ W.T + b)
        W, b = weights[-1]
        return h @ W.T + b

    return f, weights


def first(rounds: int) -> None:
    t, h0 = torch.tensor([0.0, 1.0], dtype=F64), torch.ones(2, dtype=F64)
    with torch.no_grad():
        pyjlode.odeint(lambda t, h: -h, h0, t, engine="julia", compile=True, method="tsit5")
    for gradient in (False, True):
        for turn in ("first", "another of its kind"):
            f = MLP(2, 64, 64, 2)
            start = time.perf_counter()
            with torch.set_grad_enabled(gradient):
                kind = {"adjoint": True} if gradient else {}
                solution = pyjlode.solve(f, h0, t, engine="julia", compile=True, method="tsit5", dense=False, **kind)
            middle = time.perf_counter()
            if gradient:
                solution.h[-1].sum().backward()
            after = time.perf_counter() - middle
            print(
                f"2-64-64-2, {turn}: solve {middle - start:.3f} s" + (f", backward {after:.3f} s" if gradient else "")
            )


STIFF = {
    "Robertson": ([1.0, 0.0, 0.0], [0.04, 3e7, 1e4], 1e5, (1e-6, 1e-8)),
    "van der Pol 1e3": ([2.0, 0.0], [1e3], 2e3, (1e-6, 1e-8)),
    "Brusselator 200": ([], [0.02], 10.0, (1e-6, 1e-6)),
}


def robertson(p: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, u: Tensor) -> Tensor:
        x, y, z = u
        a, b, c = p[0] * x, p[1] * y * y, p[2] * y * z
        return torch.stack([-a + c, a - b - c, b])

    return f


def vdp(p: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, u: Tensor) -> Tensor:
        x, v = u
        return torch.stack([v, p[0] * (1 - x**2) * v - x])

    return f


def brusselator(p: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    ends = torch.tensor([[1.0, 3.0]], dtype=F64)

    def f(t: Tensor, u: Tensor) -> Tensor:
        cells = u.view(-1, 2)
        x, y = cells.unbind(1)
        n = len(x)
        padded = torch.cat([ends, cells, ends])
        diffusion = p[0] * (n + 1) ** 2 * (padded[:-2] - 2 * cells + padded[2:])
        r = x * x * y
        return (diffusion + torch.stack([1 + r - 4 * x, 3 * x - r], 1)).reshape(-1)

    return f


def stiff(rounds: int) -> None:
    n = 100
    s = torch.arange(1, n + 1, dtype=F64) / (n + 1)
    cells = torch.stack([1 + torch.sin(2 * math.pi * s), torch.full_like(s, 3.0)], 1).reshape(-1)
    STIFF["Brusselator 200"][0][:] = cells.tolist()
    make = {
        "Robertson": (robertson, "robertson"),
        "van der Pol 1e3": (vdp, "vdp"),
        "Brusselator 200": (brusselator, "brusselator"),
    }
    for title, (u0, p, end, (rtol, atol)) in STIFF.items():
        f_of, name = make[title]
        f, start = f_of(torch.tensor(p, dtype=F64)), torch.tensor(u0, dtype=F64)
        t = torch.tensor([0.0, end], dtype=F64)
        exact = pyjlode.odeint(f, start, t, engine="julia", method="rodas5p", rtol=1e-11, atol=1e-13)[-1]
        weight = atol + rtol * exact.abs()

        def error(u: Any) -> float:
            return float(((torch.as_tensor(u) - exact) / weight).square().mean().sqrt())

        for method, alg in (("rodas5p", "Rodas5P()"), ("bdf", "QNDF()")):
            solve = lambda: pyjlode.odeint(
                f, start, t, engine="julia", method=method, compile=True, rtol=rtol, atol=atol
            )
            extra = f"jac = {name}_jac, tgrad = no_tgrad" + (
                f", jac_prototype = brusselator_pattern({n})" if "Bruss" in title else ""
            )
            hand, full = (ByHand(name, start, p, (0.0, end), alg, (rtol, atol), extra, x) for x in (False, True))
            print(f"error / tolerance: compiled {error(solve()[-1]):.2g}, by hand {error(hand.ends()):.2g}")
            compare(f"{title} {method}", {"by hand": hand, "by hand, full": full, "compiled": solve}, rounds)
        stiff_rivals(title, f, start, p, end, exact, error, rounds)


def stiff_rivals(
    title: str, f: Any, start: Tensor, p: list[float], end: float, exact: Tensor, error: Any, rounds: int
) -> None:
    """SciPy and diffrax at tolerances at which their error is about that of the compiled solve, or below it."""
    from scipy.integrate import solve_ivp

    t, (rtol, atol) = torch.tensor([0.0, end], dtype=F64), STIFF[title][3]
    ours = lambda: pyjlode.odeint(f, start, t, engine="julia", method="rodas5p", compile=True, rtol=rtol, atol=atol)
    goal = max(error(ours()[-1]), 1e-3)
    q = torch.tensor(p, dtype=F64).numpy()
    np_f = {
        "Robertson": lambda t, u: [-q[0] * u[0] + q[2] * u[1] * u[2], q[0] * u[0] - q[1] * u[1] ** 2 - q[2] * u[1] * u[2], q[1] * u[1] ** 2],
        "van der Pol 1e3": lambda t, u: [u[1], q[0] * (1 - u[0] ** 2) * u[1] - u[0]],
        "Brusselator 200": lambda t, u: f(torch.zeros((), dtype=F64), torch.from_numpy(u)).numpy(),
    }[title]  # fmt: skip
    runs: dict[str, Any] = {"compiled": ours}
    for method in ("LSODA", "BDF", "Radau"):
        for factor in (1.0, 0.1, 0.01, 1e-3):
            band = {"lband": 2, "uband": 2} if method == "LSODA" and "Bruss" in title else {}
            kwargs = {"method": method, "rtol": rtol * factor, "atol": atol * factor, **band}
            run = lambda kwargs=kwargs: solve_ivp(np_f, (0.0, end), start.numpy(), **kwargs).y[:, -1]
            if error(run()) <= goal or factor == 1e-3:
                break
        print(f"{method}: rtol {rtol * factor:.0e}, error / tolerance {error(run()):.2g} (goal {goal:.2g})")
        runs[method] = run
    if diffrax is not None and "Bruss" not in title:
        jf = {
            "Robertson": lambda t, u, p: jnp.stack([-p[0] * u[0] + p[2] * u[1] * u[2], p[0] * u[0] - p[1] * u[1] ** 2 - p[2] * u[1] * u[2], p[1] * u[1] ** 2]),
            "van der Pol 1e3": lambda t, u, p: jnp.stack([u[1], p[0] * (1 - u[0] ** 2) * u[1] - u[0]]),
        }[title]  # fmt: skip
        j0, jp = jnp.array(start.numpy()), jnp.array(q)
        for factor in (1.0, 0.1, 0.01):
            once = jax.jit(
                jax_solver(jf, None, jnp.array([0.0, end]), diffrax.Kvaerno5(), rtol * factor, atol * factor)
            )
            run = lambda once=once: once(j0, jp).block_until_ready()
            if error(torch.tensor(jax.device_get(run()))[-1]) <= goal:
                break
        runs["Kvaerno5"] = run
    compare(title, runs, rounds, ("Radau", "BDF"))


# Of time, for the networks.
SPAN = 10.0
NETWORKS = [
    ("2-16-16-2 batch 1 f64", (2, 16, 16, 2), (2,), F64, 1e-8),
    ("2-50-50-2 batch 20 f32", (2, 50, 50, 2), (20, 2), F32, 1e-5),
]


def neural(rounds: int) -> None:
    for title, sizes, shape, dtype, tol in NETWORKS:
        f = MLP(*sizes, dtype=dtype)
        h0 = torch.randn(shape, dtype=dtype)
        t = torch.tensor([0.0, SPAN], dtype=dtype)
        with torch.no_grad():
            runs: dict[str, Any] = {
                "compiled": lambda: pyjlode.odeint(
                    f, h0, t, engine="julia", method="tsit5", compile=True, rtol=tol, atol=tol
                )
            }
            if diffrax is not None:
                jf, weights = jax_mlp(f)
                j0 = jnp.array(h0.numpy())
                once = jax.jit(jax_solver(jf, None, jnp.array([0.0, SPAN]), diffrax.Tsit5(), tol, tol))
                runs["diffrax"] = lambda: once(j0, weights).block_until_ready()
            if torchdiffeq is not None:
                runs["torchdiffeq"] = lambda: torchdiffeq.odeint(f, h0, t, method="dopri5", rtol=tol, atol=tol)
            runs["native"] = lambda: pyjlode.odeint(f, h0, t, engine="torch", method="tsit5", rtol=tol, atol=tol)
            compare(title, runs, rounds, ("torchdiffeq", "native"))


def gradient(rounds: int) -> None:
    print(
        "gradients: adjoints of the Julia engine by name, of diffrax (checkpoints, backsolve), torchdiffeq's odeint_adjoint"
    )
    for title, sizes, shape, dtype, tol in NETWORKS:
        f = MLP(*sizes, dtype=dtype)
        h0, t = torch.randn(shape, dtype=dtype), torch.tensor([0.0, SPAN], dtype=dtype)
        jax_part = None
        if diffrax is not None:
            jax_part = (*jax_mlp(f), jnp.array(h0.numpy()), jnp.array([0.0, SPAN]))
        _gradient(title, f, h0, t, tol, list(f.parameters()), jax_part, rounds)
    for count in (101, 2):
        p = torch.tensor(LOTKA, dtype=F64, requires_grad=True)
        h0, t = torch.ones(2, dtype=F64), torch.linspace(0, 10, count, dtype=F64)
        jax_part = None
        if diffrax is not None:
            jax_part = (jax_lotka, jnp.array(LOTKA), jnp.ones(2), jnp.linspace(0.0, 10.0, count))
        _gradient(f"Lotka-Volterra {count}", lotka(p), h0, t, 1e-8, [p], jax_part, rounds)


def _gradient(
    title: str, f: Any, h0: Tensor, t: Tensor, tol: float, params: list[Tensor], jax_part: Any, rounds: int
) -> None:
    start = h0.clone().requires_grad_()

    def ours(adjoint: str) -> Any:
        h = pyjlode.odeint(
            f, start, t, engine="julia", method="tsit5", compile=True, adjoint=adjoint, rtol=tol, atol=tol
        )
        return torch.autograd.grad(h[1:].square().sum(), [start, *params])

    runs: dict[str, Any] = {
        name: lambda name=name: ours(name)
        for name in ("discrete", "interpolating", "gauss", "backsolve", "forward")
        if name != "forward" or h0.numel() < 10
    }
    if diffrax is not None:
        jf, weights, j0, times = jax_part
        for name, adjoint in (
            ("checkpoints", diffrax.RecursiveCheckpointAdjoint()),
            ("diffrax backsolve", diffrax.BacksolveAdjoint()),
        ):
            run = jax_solver(jf, None, times, diffrax.Tsit5(), tol, tol, adjoint)
            once = jax.jit(jax.grad(lambda a, run=run: (run(*a) ** 2).sum()))
            runs[name] = lambda once=once: jax.block_until_ready(once((j0, weights)))
    if torchdiffeq is not None:

        def theirs() -> Any:
            h = torchdiffeq.odeint_adjoint(
                f, start, t, method="dopri5", rtol=tol, atol=tol, adjoint_params=tuple(params)
            )
            return torch.autograd.grad(h[1:].square().sum(), [start, *params])

        runs["torchdiffeq"] = theirs
    compare(title, runs, rounds, ("torchdiffeq",))


def wide(rounds: int) -> None:
    f = MLP(64, 256, 256, 64, dtype=F32)
    h0, t = torch.randn(512, 64), torch.tensor([0.0, 1.0])
    tol = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        runs: dict[str, Any] = {
            "compiled": lambda: pyjlode.odeint(f, h0, t, engine="julia", method="tsit5", compile=True, **tol),
            "native": lambda: pyjlode.odeint(f, h0, t, engine="torch", method="tsit5", **tol),
        }
        if diffrax is not None:
            jf, weights = jax_mlp(f)
            j0 = jnp.array(h0.numpy())
            once = jax.jit(jax_solver(jf, None, jnp.array([0.0, 1.0]), diffrax.Tsit5(), 1e-5, 1e-5))
            runs["diffrax"] = lambda: once(j0, weights).block_until_ready()
        compare("64-256-256-64 batch 512", runs, rounds)
        print(
            "nfe",
            *(
                pyjlode.solve(f, h0, t, engine=e, method="tsit5", dense=False, **tol).stats.nfe
                for e in ("julia", "torch")
            ),
        )


def size(rounds: int) -> None:
    sizes, modes, rows = [], [], []
    for d in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        f, h0 = MLP(d, d, d, dtype=F64), torch.randn(d, dtype=F64)
        t, tol = torch.tensor([0.0, 5.0], dtype=F64), {"rtol": 1e-6, "atol": 1e-6}
        with torch.no_grad():
            runs = {
                "auto": lambda: pyjlode.odeint(f, h0, t, engine="auto", method="tsit5", **tol),
                "compiled": lambda: pyjlode.odeint(f, h0, t, engine="julia", compile=True, method="tsit5", **tol),
                "called back": lambda: pyjlode.odeint(f, h0, t, engine="julia", compile=False, method="tsit5", **tol),
                "native": lambda: pyjlode.odeint(f, h0, t, engine="torch", method="tsit5", **tol),
            }
            mode = pyjlode.solve(
                f, h0, t, engine="julia", compile=True, method="tsit5", dense=False, **tol
            ).stats.compiled
            rows.append(compare(f"d = {d} ({mode})", runs, rounds))
        sizes.append(d)
        modes.append(mode)
    worst = max(row["auto"] / min(row.values()) for row in rows)
    print(f'"auto" takes at most {worst:.2f} times as long as the fastest')
    _draw_sizes(sizes, modes, rows)


def _draw_sizes(sizes: list[int], modes: list[str], rows: list[dict[str, float]]) -> None:
    from pyjlode.plot import figure

    canvas = figure(7, 4.2)
    axes = canvas.add_subplot()
    for name, style in (("native", "-"), ("called back", "-"), ("compiled", "-"), ("auto", "k:")):
        axes.plot(
            sizes, [row[name] * 1e3 for row in rows], style, marker=None if name == "auto" else "o", ms=4, label=name
        )
    changes = [i for i in range(1, len(modes)) if modes[i] != modes[i - 1]]
    for i in changes:
        axes.axvline((sizes[i - 1] * sizes[i]) ** 0.5, color="0.8", lw=1)
        axes.annotate(
            f"{modes[i - 1]} code | {modes[i]} code", ((sizes[i - 1] * sizes[i]) ** 0.5, 0.75), ha="center", color="0.4",
            xycoords=("data", "axes fraction"), fontsize=9,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="d", ylabel="CPU time of a solve, ms")
    axes.set_xscale("log", base=2)
    axes.set_title("A network d-d-d, tsit5, rtol = 1e-6, one thread")
    axes.legend(frameon=False)
    path = Path(__file__).parent.parent / "docs" / "size.png"
    canvas.savefig(path, dpi=150)
    print(f"drawn in {path.name}")


def sweep(rounds: int) -> None:
    count, end, tol = 10_000, 5.0, 1e-6
    rho, h0 = torch.linspace(0.0, 28.0, count, dtype=F64), torch.ones(count, 3, dtype=F64)
    t = torch.tensor([0.0, end], dtype=F64)

    def f(t: Tensor, h: Tensor) -> Tensor:
        x, y, z = h.unbind(-1)
        return torch.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z], -1)

    options = {"batch_dims": 1}
    one_by_one = lambda: pyjlode.odeint(
        f, h0, t, engine="julia", compile=True, method="tsit5", rtol=tol, atol=tol, options=options
    )
    exact = pyjlode.odeint(
        f, h0, t, engine="julia", compile=True, method="vern9", rtol=1e-12, atol=1e-12, options=options
    )[-1]
    runs: dict[str, Any] = {
        "compiled": one_by_one,
        "native (common steps)": lambda: pyjlode.odeint(f, h0, t, engine="torch", method="tsit5", rtol=tol, atol=tol),
    }
    ends = {name: run()[-1] for name, run in runs.items()}
    if diffrax is not None:
        once = jax.jit(
            jax.vmap(jax_solver(jax_lorenz, None, jnp.array([0.0, end]), diffrax.Tsit5(), tol, tol), in_axes=(0, 0))
        )
        j0 = jnp.array(h0.numpy())
        jp = jnp.stack([jnp.full(count, 10.0), jnp.array(rho.numpy()), jnp.full(count, 8 / 3)], 1)
        runs["diffrax vmap"] = lambda: once(j0, jp).block_until_ready()
        ends["diffrax vmap"] = torch.tensor(jax.device_get(runs["diffrax vmap"]()))[:, -1]
    try:
        import torchode
    except ImportError:
        torchode = None
    if torchode is not None:
        term = torchode.ODETerm(lambda t, y: f(t, y))
        control = torchode.IntegralController(atol=tol, rtol=tol, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term), control)
        problem = torchode.InitialValueProblem(y0=h0, t_eval=t.expand(count, 2).contiguous())
        runs["torchode"] = lambda: solver.solve(problem)
        ends["torchode"] = runs["torchode"]().ys[:, -1]
    for name, h in ends.items():
        worst = ((h - exact) / (tol + tol * exact.abs())).abs().amax(1)
        print(f"{name}: error / tolerance, median {float(worst.median()):.2g}, largest {float(worst.max()):.2g}")
    times = compare(f"{count} Lorenz systems", runs, rounds)
    print("trajectories a second: " + ", ".join(f"{name} {count / s:.0f}" for name, s in times.items()))


def allocations(rounds: int) -> None:
    """Bytes that Julia allocates in a solve, and in one of twice the length."""
    cases: list[tuple[str, Any, Tensor, float]] = [
        ("Lorenz", lorenz(torch.tensor(LORENZ, dtype=F64)), torch.tensor([1.0, 0.0, 0.0], dtype=F64), 10.0),
        ("2-16-16-2", MLP(2, 16, 16, 2), torch.ones(2, dtype=F64), SPAN),
        ("64-256-256-64 batch 16", MLP(64, 256, 256, 64), torch.randn(16, 64, dtype=F64), 2.0),
        ("8-64-8 batch 128", MLP(8, 64, 8), torch.randn(128, 8, dtype=F64), 5.0),
    ]
    for title, f, h0, end in cases:
        for method in ("tsit5", "rodas5p") if h0.numel() < 10 else ("tsit5",):
            rows = []
            for stop in (end, 2 * end):
                t = torch.tensor([0.0, stop], dtype=F64)
                kwargs = {"engine": "julia", "compile": True, "method": method, "rtol": 1e-8, "atol": 1e-8}
                with torch.no_grad():
                    for _ in range(8):  # the first compiles, and some of the next make what is kept
                        before = int(julia("Base.gc_bytes()"))
                        stats = pyjlode.solve(f, h0, t, dense=False, **kwargs).stats
                        after = int(julia("Base.gc_bytes()"))
                rows.append((stats.naccept + stats.nreject, after - before))
            (n0, b0), (n1, b1) = rows
            print(
                f"{title:24s} {method:8s} {stats.compiled:7s} {n0} steps {b0 / 1024:.1f} KiB, {n1} steps "
                f"{b1 / 1024:.1f} KiB: {(b1 - b0) / (n1 - n0):.2f} bytes a step"
            )


def times(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one run of each, for each of so many rounds in which they take turns."""
    counts = {}
    for name, run in runs.items():
        for _ in range(20):  # the first compile, and make what is kept
            run()
        counts[name] = max(1, int(LEAST / max(min(seconds(run, 2) for _ in range(5)), 1e-7)))
    rows: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rows[name].append(seconds(run, counts[name]))
    return rows


def row(title: str, runs: dict[str, Callable[[], Any]], rounds: int, goal: float, inverse: bool = False) -> None:
    """A line of two contenders, ours first, and of the ratio of the other's time to ours; or `inverse`."""
    (ours, theirs), name = times(runs, rounds).values(), list(runs)[1]
    ratios = [a / b if inverse else b / a for a, b in zip(ours, theirs)]
    print(
        f"{title:40s} {min(ours) * 1e6:9.1f} us  {name} {min(theirs) * 1e6:9.1f} us  ratio "
        f"{statistics.median(ratios):5.2f}  (goal: {'at most' if inverse else 'at least'} {goal})",
        flush=True,
    )


def peers(rounds: int) -> None:
    solver = lambda tol, **how: pyjlode.Solver("tsit5", engine="julia", compile=True, rtol=tol, atol=tol, **how)
    for title, sizes, shape, dtype, tol in NETWORKS:
        f, h0, t = MLP(*sizes, dtype=dtype), torch.randn(shape, dtype=dtype), torch.tensor([0.0, SPAN], dtype=dtype)
        small = sizes == (2, 16, 16, 2)
        if diffrax is not None:
            jax_part = (*jax_mlp(f), jnp.array(h0.numpy()), jnp.array([0.0, SPAN]))
            _peers(title, f, h0, t, solver, tol, list(f.parameters()), jax_part, rounds, 2 if small else 3, 3)
    t = torch.tensor([0.0, 20.0], dtype=F64)
    lorenz0, henon0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.1, 0.2, 0.3, -0.2], dtype=F64)
    systems: list[tuple[str, str, Any, Any, Tensor, list[float], float]] = [
        ("Lorenz", "lorenz", lorenz, "jax_lorenz", lorenz0, LORENZ, 20.0),
        ("Henon-Heiles", "henon", lambda p: henon, "jax_henon", henon0, [], 100.0),
        ("Lotka-Volterra", "lotka", lotka, "jax_lotka", torch.ones(2, dtype=F64), LOTKA, 20.0),
    ]
    for title, name, make, jax_name, u0, p, end in systems:
        f, t = make(torch.tensor(p, dtype=F64)), torch.tensor([0.0, end], dtype=F64)
        solve, whole = solver(1e-8), solver(1e-8, options={"specialize": "full"})
        run = lambda f=f, u0=u0, t=t, solve=solve: solve(f, u0, t)
        full = lambda f=f, u0=u0, t=t, solve=whole: solve(f, u0, t)
        if diffrax is not None:
            once = jax.jit(jax_solver(globals()[jax_name], None, jnp.array([0.0, end]), diffrax.Tsit5(), 1e-8, 1e-8))
            j0, jp = jnp.array(u0.numpy()), jnp.array(p)
            theirs = lambda once=once, j0=j0, jp=jp: once(j0, jp).block_until_ready()
            row(f"{title}, forward", {"ours": run, "diffrax": theirs}, rounds, 2.5)
        hand, hand_full = (ByHand(name, u0, p, (0.0, end), "Tsit5()", (1e-8, 1e-8), full=x) for x in (False, True))
        row(f"{title}, forward", {"ours": run, "by hand": hand}, rounds, 1.25, True)
        row(f"{title}, forward, full", {"ours": full, "by hand": hand_full}, rounds, 1.25, True)
    if diffrax is not None:
        p = torch.tensor(LOTKA, dtype=F64, requires_grad=True)
        h0, t = torch.ones(2, dtype=F64), torch.linspace(0, 10, 101, dtype=F64)
        jax_part = (jax_lotka, jnp.array(LOTKA), jnp.ones(2), jnp.linspace(0.0, 10.0, 101))
        _peers("Lotka-Volterra 101 outputs", lotka(p), h0, t, solver, 1e-8, [p], jax_part, rounds, 2.5, 4)
    f, h0, t = MLP(2, 4, 2), torch.ones(2, dtype=F64), torch.tensor([0.0, 1e-3], dtype=F64)
    solve, pull = solver(1e-3), solver(1e-3, adjoint=True)
    start, bar = h0.clone().requires_grad_(), torch.ones(2, 2, dtype=F64)
    wrt = [start, *f.parameters()]

    def forward() -> None:
        with torch.no_grad():
            solve(f, h0, t)

    rows = times({"call": forward, "gradient": lambda: torch.autograd.grad(pull(f, start, t), wrt, bar)}, rounds)
    for name, goal in (("call", 50), ("gradient", 150)):
        print(f"a {name} of next to no work, a module of four tensors: {min(rows[name]) * 1e6:.1f} us (goal: {goal})")


def _peers(
    title: str,
    f: Any,
    h0: Tensor,
    t: Tensor,
    solver: Any,
    tol: float,
    params: list[Tensor],
    jax_part: Any,
    rounds: int,
    goal: float,
    goal_gradient: float,
) -> None:
    solve, pull = solver(tol), solver(tol, adjoint=True)
    jf, weights, j0, ts = jax_part
    run = jax_solver(jf, None, ts, diffrax.Tsit5(), tol, tol)
    once = jax.jit(run)
    gradient = jax.jit(jax.grad(lambda a: (run(*a) ** 2).sum()))
    start = h0.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            solve(f, h0, t)

    def ours() -> Any:
        return torch.autograd.grad(pull(f, start, t)[1:].square().sum(), [start, *params])

    theirs = lambda: once(j0, weights).block_until_ready()
    row(f"{title}, forward", {"ours": forward, "diffrax": theirs}, rounds, goal)
    theirs = lambda: jax.block_until_ready(gradient((j0, weights)))
    row(f"{title}, gradient", {"ours": ours, "diffrax": theirs}, rounds, goal_gradient)


PARTS: dict[str, Callable[[int], None]] = {
    "peers": peers,
    "first": first,
    "small": small,
    "call": call,
    "stiff": stiff,
    "neural": neural,
    "gradient": gradient,
    "wide": wide,
    "size": size,
    "sweep": sweep,
    "allocations": allocations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--alone", action="store_true", help="without diffrax and torchdiffeq")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch was imported")
    warnings.filterwarnings("ignore", category=UserWarning, module="equinox")
    julia(HAND)
    for name, run in PARTS.items():
        if args.part in (None, name):
            print(f"\n{name}")
            run(args.rounds)


if __name__ == "__main__":
    main()
