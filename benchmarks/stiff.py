"""Stiff problems: work and precision beside SciPy, numbers of steps, a batch against a loop, and the dense limit.

    python benchmarks/stiff.py [--quick]       work-precision of every problem; writes docs/stiff.png
    python benchmarks/stiff.py --steps         accepted steps of radau5 and bdf over SciPy's, and errors in tolerances
    python benchmarks/stiff.py --batch         256 Robertson systems in one call, over a loop of SciPy's Radau, in
                                               seconds of the processor's time
    python benchmarks/stiff.py --julia         bdf on the Julia engine, which is QNDF there, beside FBDF
    python benchmarks/stiff.py --dense-limit   LU of the Jacobian against GMRES by size of the system

One thread; float64. The error is that of the last state in units of the tolerance `atol + rtol |h|`, root mean square,
against published values (see tests/stiff_problems.py) or, for the Brusselator, SciPy's Radau at rtol 1e-12. SciPy is
given the same field in NumPy. diffrax's Kvaerno5 runs under jit, compiled before the clock starts, where it is
installed (`pip install .[bench]`).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.sparse import bmat, diags, identity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import stiff_problems as sp

import pyjlode
from pyjlode.native import auto, linear

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

OURS = ["radau5", "rodas5p", "bdf", "kvaerno5", "auto"]
THEIRS = ["Radau", "BDF", "LSODA"]


def brusselator(n: int) -> sp.Stiff:
    """2 n equations to t = 10. What is known of the end is SciPy's Radau at rtol 1e-12."""
    h0 = sp.brusselator_start(n)
    problem = sp.Stiff(f"Brusselator, 2N = {2 * n}", sp.brusselator, h0, 10.0, h0)
    next_to = diags([1, 1, 1], [-1, 0, 1], shape=(n, n))
    pattern = bmat([[next_to, identity(n)], [identity(n), next_to]])
    known = solve_ivp(
        problem.f_numpy, (0, 10), h0, method="Radau", rtol=1e-12, atol=1e-12, jac_sparsity=pattern, t_eval=[10.0]
    )
    return sp.Stiff(problem.name, sp.brusselator, h0, 10.0, known.y[:, -1].tolist())


def problems(quick: bool, large: bool = True) -> list[sp.Stiff]:
    found = [sp.ROBERTSON_40, sp.ROBERTSON, sp.VAN_DER_POL, sp.HIRES, sp.HEAT, brusselator(20)]
    if quick:
        return found
    found += [sp.VAN_DER_POL_SCALED, sp.OREGONATOR, sp.ARENSTORF, sp.TWO_BODY]
    return [*found, brusselator(500)] if large else found


def ours(problem: sp.Stiff, method: str, tol: float) -> tuple[Any, int]:
    solution = pyjlode.solve(
        problem.f, problem.y0, problem.times, method=method, rtol=tol, atol=problem.atol(tol), dense=False
    )
    return solution.h[-1], solution.stats.naccept


def theirs(problem: sp.Stiff, method: str, tol: float) -> tuple[Any, int]:
    found = solve_ivp(
        problem.f_numpy, (0, problem.t1), problem.h0, method=method, rtol=tol, atol=problem.atol(tol).numpy()
    )
    return found.y[:, -1], len(found.t) - 1


def diffrax_kvaerno5(problem: sp.Stiff) -> Callable[[float], tuple[Any, int]] | None:
    """A function of the tolerance, compiled in its first call; None where diffrax is not installed."""
    try:
        import diffrax
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    jax.config.update("jax_enable_x64", True)
    term = diffrax.ODETerm(lambda t, h, args: problem.field(t, h, jnp))

    @jax.jit
    def solve(h0: Any, rtol: Any, atol: Any) -> Any:
        control = diffrax.PIDController(rtol=rtol, atol=atol)
        return diffrax.diffeqsolve(
            term, diffrax.Kvaerno5(), 0.0, problem.t1, None, h0, stepsize_controller=control, max_steps=100_000
        )

    def run(tol: float) -> tuple[Any, int]:
        found = solve(jnp.asarray(problem.h0, dtype=float), tol, jnp.asarray(problem.atol(tol).numpy()))
        return np.asarray(found.ys[-1]), int(found.stats["num_accepted_steps"])

    return run


def timed(run: Callable[[], tuple[Any, int]], budget: float) -> tuple[Any, int, float]:
    """The result, and the least time of at most three runs within the budget."""
    best, spent = float("inf"), 0.0
    for _ in range(3):
        start = time.perf_counter()
        end, steps = run()
        wall = time.perf_counter() - start
        best, spent = min(best, wall), spent + wall
        if spent > budget:
            break
    return end, steps, best


# Points of one curve: requested tolerance, error over it, seconds.
Curve = list[tuple[float, float, float]]

# Seconds, after which a curve ends.
LONG = 10


def work_precision(quick: bool) -> None:
    exponents = (4, 6) if quick else (4, 5, 6, 7, 8, 9, 10)
    rows: dict[str, dict[str, Curve]] = {}
    print("problem, method, rtol: error over tolerance, accepted steps, seconds")
    for problem in problems(quick):
        curves = rows.setdefault(problem.name, {})
        compiled = diffrax_kvaerno5(problem)
        runs: dict[str, Callable[[float], tuple[Any, int]]] = {
            **{method: functools.partial(ours, problem, method) for method in OURS},
            **{method: functools.partial(theirs, problem, method) for method in THEIRS},
            **({"Kvaerno5": compiled} if compiled else {}),
        }
        for method, run in runs.items():
            for k in exponents:
                tol = 10.0**-k
                try:
                    if k == exponents[0]:
                        run(tol)  # compiles, loads
                    end, steps, wall = timed(functools.partial(run, tol), 0.1 if quick else 0.5)
                except (pyjlode.errors.SolveError, ValueError, RuntimeError) as failure:
                    print(f"{problem.name:24} {method:9} 1e-{k:02}  {type(failure).__name__}", flush=True)
                    break
                error = problem.error(end, tol)
                print(f"{problem.name:24} {method:9} 1e-{k:02} {error:9.2g} {steps:7} {wall:8.3f}", flush=True)
                curves.setdefault(method, []).append((tol, error, wall))
                if wall > LONG:
                    break
    beyond(rows)
    draw(rows)


def beyond(rows: dict[str, dict[str, Curve]], limit: float = 30) -> None:
    """Where our error is more than `limit` tolerances: beside the least and the largest of SciPy's methods there."""
    print(f"error of more than {limit:g} tolerances: ours, and SciPy's from .. to")
    for name, curves in rows.items():
        for method in OURS:
            for tol, error, _ in curves.get(method, []):
                if not error <= limit:
                    found = [e for other in THEIRS for at, e, _ in curves.get(other, []) if at == tol]
                    other = f"{min(found):.2g} .. {max(found):.2g}" if found else "-"
                    print(f"{name:24} {method:9} {tol:.0e} {error:9.2g}   {other}")


def draw(rows: dict[str, dict[str, Curve]]) -> None:
    """Seconds against error, a panel for each problem: our methods solid, others dashed."""
    from pyjlode.plot import figure

    across = 4 if len(rows) > 6 else 3
    down = -(-(len(rows) + 1) // across)
    fig = figure(3.6 * across, 2.9 * down)
    axes = fig.subplots(down, across, squeeze=False).reshape(-1)
    style = {method: {"color": f"C{i}", "linestyle": "-", "marker": "o"} for i, method in enumerate(OURS)}
    # The same colour is the same kind of method.
    alike = {"Radau": "radau5", "BDF": "bdf", "Kvaerno5": "kvaerno5"}
    for other in [*THEIRS, "Kvaerno5"]:
        color = style[alike[other]]["color"] if other in alike else "0.5"
        style[other] = {"color": color, "linestyle": "--", "marker": "x"}
    labels = {"Radau": "SciPy Radau", "BDF": "SciPy BDF", "LSODA": "SciPy LSODA", "Kvaerno5": "diffrax Kvaerno5"}
    for ax, (name, curves) in zip(axes, rows.items()):
        for method, look in style.items():
            if method in curves:
                errors, walls = zip(*((error * tol, wall) for tol, error, wall in curves[method]))
                ax.loglog(errors, walls, **look, markersize=3, linewidth=1, label=labels.get(method, method))
        ax.set_title(name, fontsize=9)
        ax.invert_xaxis()
        ax.minorticks_off()
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.25)
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    for ax in axes[::across]:
        ax.set_ylabel("seconds", fontsize=8)
    fig.supxlabel("error at the end, over the size of the solution (smaller to the right)", fontsize=9)
    handles = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}
    axes[len(rows)].legend(handles.values(), handles.keys(), loc="center", fontsize=8, frameon=False)
    target = Path(__file__).resolve().parent.parent / "docs" / "stiff.png"
    fig.savefig(target, dpi=110)
    print(f"wrote {target.name}")


def steps(quick: bool) -> None:
    print("accepted steps over SciPy's, and error over tolerance (ours, SciPy's)")
    worst: dict[str, float] = {}
    for problem in problems(quick, large=False):
        for method, other in (("radau5", "Radau"), ("bdf", "BDF")):
            for k in (4, 6, 8):
                tol = 10.0**-k
                (a, n), (b, m) = ours(problem, method, tol), theirs(problem, other, tol)
                worst[method] = max(worst.get(method, 0.0), n / m)
                errors = f"{problem.error(a, tol):9.2g} {problem.error(b, tol):9.2g}"
                print(f"{problem.name:24} {method:7} 1e-{k:02} {n:6} / {m:6} = {n / m:5.2f} {errors}", flush=True)
    print("largest ratio:", {method: round(ratio, 2) for method, ratio in worst.items()})


def batch(quick: bool) -> None:
    """Rate constants spread over a factor of 100 each; our tolerance is searched for SciPy's accuracy."""
    B, tol, every = 256, 1e-6, 8 if quick else 1
    generator = torch.Generator().manual_seed(0)
    k = sp.robertson.__defaults__[0]  # type: ignore[index]
    rates = torch.tensor(k, dtype=sp.F64) * 10 ** (2 * torch.rand(B, 3, generator=generator, dtype=sp.F64) - 1)

    def f(t: Any, h: Any) -> Any:
        return torch.stack(sp.robertson_terms(h.unbind(-1), rates.unbind(-1)), -1)

    h0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=sp.F64).repeat(B, 1)
    for t1 in (40.0, 1e5):
        size = torch.tensor([1.0, 1e-4, 1.0] if t1 == 40 else [1e-3, 1e-8, 1.0], dtype=sp.F64)
        t = torch.tensor([0.0, t1], dtype=sp.F64)

        def solve(method: str, tol: float, t: Any = t, size: Any = size) -> Any:
            options = {"batch_dims": 1}
            return pyjlode.odeint(f, h0, t, method=method, rtol=tol, atol=tol * size, options=options)[-1]

        exact = solve("radau5", 1e-10)

        def error(h: Any, which: Any = slice(None), exact: Any = exact, size: Any = size) -> float:
            scaled = (h - exact[which]) / (tol * size + tol * exact[which].abs())
            return float(scaled.square().mean(-1).sqrt().max())

        def loop(rows: list[list[float]], size: Any = size, t1: float = t1) -> list[Any]:
            ends = []
            for row in rows:
                found = solve_ivp(
                    lambda _, h, row: sp.robertson(_, h, np, row),
                    (0, t1),
                    [1.0, 0.0, 0.0],
                    method="Radau",
                    rtol=tol,
                    atol=tol * size.numpy(),
                    args=(row,),
                )
                ends.append(found.y[:, -1])
            return ends

        some = rates[::every].tolist()
        target = error(torch.tensor(np.array(loop(some)), dtype=sp.F64), slice(None, None, every))
        print(
            f"t = {t1:g}: SciPy's Radau, rtol {tol:g}, error {target:.3g}; seconds, ratio to a loop of {B} calls of it"
        )
        for method in ("radau5", "rodas5p", "kvaerno5", "bdf"):
            for ours_tol in 10.0 ** -np.arange(4, 9, 0.25):
                reached = error(solve(method, ours_tol)[::every], slice(None, None, every))
                if reached <= target:
                    ratios = []
                    for part in range(4):  # in turn, so that what else the machine does slows both
                        them = cpu(functools.partial(loop, some[part::4]))
                        us = cpu(functools.partial(solve, method, ours_tol))
                        ratios.append((4 * every * them, us))
                    them, us = (sum(x) / 4 for x in zip(*ratios))
                    print(f"  {method:9} rtol {ours_tol:.1e} {us:.3f} s, error {reached:.3g}, ratio {them / us:.0f}")
                    break


def julia(quick: bool) -> None:
    """Errors in tolerances, accepted steps and factorisations of Julia's two methods of this family."""
    daes = {sp.AKZO_NOBEL.name: torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=sp.F64))}
    head = f"{'error':>12} {'steps':>7} {'LU':>5}"
    print(f"{'problem':25} {'tol':6} {head}  {head}   (QNDF, then FBDF)")
    for problem in [*sp.STIFF, sp.VAN_DER_POL_STIFFER, sp.AKZO_NOBEL]:
        for tol in (1e-4, 1e-8) if quick else (1e-4, 1e-6, 1e-8, 1e-9):
            cells = []
            for method in ("bdf", pyjlode.julia_method("FBDF()")):
                try:
                    found = pyjlode.solve(
                        problem.f,
                        problem.y0,
                        problem.times,
                        method=method,
                        rtol=tol,
                        atol=problem.atol(tol),
                        mass_matrix=daes.get(problem.name),
                        engine="julia",
                        dense=False,
                        options={"max_num_steps": 100_000},
                    )
                    stats = found.stats
                    cells.append(f"{problem.error(found.h[-1], tol):12.3g} {stats.naccept:7} {stats.nlu:5}")
                except pyjlode.errors.SolveError as error:
                    cells.append(f"{type(error).__name__:>26}")
            print(f"{problem.name:25} {tol:<6g} {'  '.join(cells)}", flush=True)


def cpu(run: Callable[[], Any]) -> float:
    """Seconds of the processor's time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def network(n: int) -> sp.Stiff:
    """A field without a structure: n states that decay at rates of 1 to 1e4 and are coupled by a dense network."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(n, n, generator=generator, dtype=sp.F64) / n**0.5
    rates = torch.logspace(0, 4, n, dtype=sp.F64)
    return sp.Stiff("network", lambda t, h, xp: torch.tanh(A @ h) - rates * (h - 1), [0.0] * n, 1.0, [0.0] * n)


def dense_limit(quick: bool) -> None:
    """One solve with bdf, by LU and by GMRES, over the size of the system."""
    print("problem, size, seconds by LU, by GMRES, largest difference in tolerances")
    for n in (200, 500, 1000, 2000) if quick else (200, 500, 1000, 2000, 4000):
        h0 = sp.brusselator_start(n // 2)
        for problem in (sp.Stiff("Brusselator", sp.brusselator, h0, 1.0, h0), network(n)):
            found = []
            for limit in (10**9, 0):
                linear.DENSE_LIMIT = auto.DENSE_LIMIT = limit
                found.append(timed(functools.partial(ours, problem, "bdf", 1e-5), 1.0))
            (a, _, lu), (b, _, free) = found
            print(f"{problem.name:12} {n:6} {lu:8.3f} {free:8.3f} {float((a - b).abs().max()) / 1e-5:6.2g}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer problems, tolerances and sizes")
    modes = {"steps": steps, "batch": batch, "julia": julia, "dense-limit": dense_limit}
    for mode in modes:
        parser.add_argument(f"--{mode}", action="store_true")
    chosen = parser.parse_args()
    wanted = [run for mode, run in modes.items() if getattr(chosen, mode.replace("-", "_"))]
    for run in wanted or [work_precision]:
        run(chosen.quick)
