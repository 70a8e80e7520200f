"""Independent systems in a batch: steps of their own against common steps, and against torchode where it is installed.

    python benchmarks/batch.py [--part NAME] [--rounds N] [--quick]

Everything runs in turns, in one process on one thread, and is printed as tables of Markdown: the processor's time (the
best of the rounds), its ratio to that of steps of their own, batched calls of f, the steps of the system with most of
them, and the error at the end against a tight solve: of each system the largest relative one, and of these the median
and the largest. The error norm of common steps is that of all systems together, in which one of 256 counts a sixteenth;
"common, tolerance / 16" has the hardest system solved as accurately as alone. torchode 1.0.1, and diffrax in "sweep",
are used if they can be imported; compiled steps if there is a C++ compiler, of which the time to compile is not a part.

Parts, each of which takes a minute or two: "phases", 256 van der Pol oscillators, mu = 25, that start all over the
plane; "spread", mu from 1 to 100, each over its period; "gradient" and "spread-gradient", those of these with a loss of
6 times and its backward pass (all four also as sweeps, where Julia is set up); "stiff", 256 Robertson systems with rate
constants over a factor of 100; "latent", a training step of a latent ODE with 64 series of 50 irregular times, on times
of their own and on the union of all; "flow", a CNF in two dimensions, trained by flow matching, the density of 256
points and a training step; "recognition", a training step of an ODERNN with an adaptive method between observations, 64
series of 20 irregular times; "sweep", 10,000 Lorenz systems with a parameter each and the gradient by it, and
10,000 Robertson systems with theirs, compiled for the Julia engine where that is set up, and by `jax.vmap` of diffrax:
trajectories a second. Of the Robertson systems all but the sweep solve every fiftieth, as a batch of 200.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyjlode import solve
from pyjlode.bridge import runtime
from pyjlode.errors import NotCompiled
from pyjlode.nn import CNF, ODERNN

try:
    import torchode
except ImportError:
    torchode = None

try:
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
except ImportError:
    diffrax = None

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

F64 = torch.float64
OWN = {"batch_dims": 1}
Run = Callable[[], tuple[Any, ...]]


def measured(runs: dict[str, Run], rounds: int) -> dict[str, tuple[float, tuple[Any, ...]]]:
    """The best processor's time of each, in milliseconds, and what it returned last."""
    best = dict.fromkeys(runs, (math.inf, ()))
    turns = [(i, name) for i in range(rounds + 1) for name in runs]
    bar = tqdm(turns, leave=False, mininterval=1)  # rows come when all is done, and the first round compiles
    for i, name in bar:
        bar.set_postfix_str(name)
        start = time.process_time()
        result = runs[name]()
        spent = 1e3 * (time.process_time() - start)
        best[name] = (min(best[name][0], spent) if i else math.inf, result)  # the first round warms up
    return best


def table(title: str, found: dict[str, tuple[float, tuple[Any, ...]]], want: Tensor | None = None) -> None:
    """Print a table: of each contender's time, calls of f, and steps, and errors of its states (B, d)."""
    errors = want is not None
    print(f"\n{title}\n\n| | ms | ratio | calls of f | steps |{' error | largest |' if errors else ''}")
    print("| --- " * (7 if errors else 5) + "|")
    first = next(iter(found.values()))[0]
    for name, (spent, (h, calls, steps)) in found.items():
        row = f"| {name} | {spent:.0f} | {spent / first:.2f} | {calls} | {steps} |"
        if want is not None:
            apart = ((h - want).abs() / want.abs().amax(1, keepdim=True)).amax(1)
            row += f" {float(apart.median()):.1e} | {float(apart.max()):.1e} |"
        print(row, flush=True)


@functools.cache
def has_compiler() -> bool:
    """Whether PyTorch's compiler makes steps here."""
    try:
        solve(lambda t, h: -h, torch.ones(1, dtype=F64), [0.0, 1.0], engine="torch", compile=True)
    except NotCompiled:
        return False
    return True


def van_der_pol(mu: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, h: Tensor) -> Tensor:
        x, v = h[:, 0], h[:, 1]
        return torch.stack([v, mu * (1 - x * x) * v - x], 1)

    return f


def has_julia() -> bool:
    return not isinstance(runtime.find(), str)


SWEEP: dict[str, Any] = {"engine": "julia", "compile": True, "options": OWN}


def of(solution: Any) -> tuple[Any, ...]:
    return of_stats(solution.h[-1], solution.stats)


def of_stats(h: Tensor, stats: Any) -> tuple[Any, ...]:
    most = stats.naccept if stats.systems is None else int(stats.systems.naccept.max())
    return h, stats.nfe, most


def by_torchode(f: Any, h0: Tensor, t: Tensor, tol: float) -> Any:
    term = torchode.ODETerm(f)
    control = torchode.IntegralController(atol=tol, rtol=tol, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
    return solver.solve(torchode.InitialValueProblem(y0=h0, t_eval=t.expand(len(h0), -1)))


def steps_of(solution: Any) -> int:
    return int(solution.stats["n_accepted"].max())


def oscillators(title: str, mu: Tensor, h0: Tensor, t: Tensor, tol: float, rounds: int) -> None:
    f = van_der_pol(mu)
    kwargs: dict[str, Any] = {"dense": False, "engine": "torch"}
    # Of different spans by a scale of time for each: h' = span f over the unit of time.
    span = (t[..., -1] - t[..., 0]).expand(len(h0))[:, None]
    scaled = f if t.ndim == 1 else lambda s, h: span * f(s, h)

    def own(**how: Any) -> Run:
        return lambda: of(solve(f, h0, t, rtol=tol, atol=tol, options=OWN, **{**kwargs, **how}))

    def common(tol: float, **how: Any) -> Run:
        return lambda: of(solve(scaled, h0, t if t.ndim == 1 else (0.0, 1.0), rtol=tol, atol=tol, **kwargs, **how))

    part = len(h0) ** 0.5
    runs: dict[str, Run] = {
        "own": own(),
        "common": common(tol),
        f"common, tolerance / {part:.0f}": common(tol / part),
    }
    if has_compiler():
        runs["own, `compile=True`"] = own(compile=True)
        runs["common, `compile=True`"] = common(tol, compile=True)
    if has_julia():
        runs["a sweep"] = own(engine="julia", compile=True)
    if torchode:

        def theirs() -> tuple[Any, ...]:
            s = by_torchode(f, h0, t, tol)
            return s.ys[:, -1], int(s.stats["n_f_evals"].max()), steps_of(s)

        runs["torchode"] = theirs
    tight = {**kwargs, "rtol": 1e-10, "atol": 1e-10, "method": "dopri8", "options": OWN}
    table(title, measured(runs, rounds), solve(f, h0, t, **tight).h[-1])


def phases(rounds: int, quick: bool) -> None:
    count = 32 if quick else 256
    random = torch.Generator().manual_seed(0)
    h0 = torch.rand(count, 2, generator=random, dtype=F64) * 4 - 2
    t = torch.tensor([0.0, 10.0 if quick else 50.0], dtype=F64)
    mu = torch.full((count,), 25.0, dtype=F64)
    oscillators(f"{count} van der Pol, mu = 25, t = {float(t[1]):g}, rtol 1e-5", mu, h0, t, 1e-5, rounds)


def periods(quick: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mu, the start, and the end of a period of each: that is near 1.61 mu for large mu, and 6.7 for mu = 1."""
    count = 32 if quick else 256
    mu = torch.logspace(0, 1 if quick else 2, count, dtype=F64)
    h0 = torch.tensor([[2.0, 0.0]], dtype=F64).repeat(count, 1)
    return mu, h0, (1.61 * mu + 5) * (0.3 if quick else 1.0)


def spread(rounds: int, quick: bool) -> None:
    mu, h0, end = periods(quick)
    t = torch.stack([torch.zeros_like(end), end], 1)
    title = f"{len(mu)} van der Pol, mu to {float(mu[-1]):g}, a period of each, rtol 1e-5"
    oscillators(title, mu, h0, t, 1e-5, rounds)


def gradient(rounds: int, quick: bool) -> None:
    count, end = 32 if quick else 256, 2.0 if quick else 10.0
    random = torch.Generator().manual_seed(0)
    start = torch.rand(count, 2, generator=random, dtype=F64) * 4 - 2
    t = torch.linspace(0, end, 6, dtype=F64)
    title = f"{count} van der Pol, mu = 25, t = {end:g}: a loss of 6 times and its gradient"
    gradients(title, torch.full((count,), 25.0, dtype=F64), start, t, rounds)


def spread_gradient(rounds: int, quick: bool) -> None:
    mu, h0, end = periods(quick)
    t = torch.linspace(0, 1, 6, dtype=F64) * (0.3 * end[:, None])
    title = f"{len(mu)} van der Pol, mu to {float(mu[-1]):g}, 0.3 periods: a loss of 6 times and its gradient"
    gradients(title, mu, h0, t, rounds)


def gradients(title: str, mu: Tensor, start: Tensor, t: Tensor, rounds: int) -> None:
    mu = mu.clone().requires_grad_()
    f = van_der_pol(mu)
    kwargs: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "dense": False, "engine": "torch"}
    span = t[..., -1].expand(len(start))[:, None]

    def run(make: Callable[[Tensor], tuple[Tensor, int, int]]) -> Run:
        def step() -> tuple[Any, ...]:
            h0 = start.clone().requires_grad_()
            h, calls, steps = make(h0)
            return torch.autograd.grad(h.square().mean(), (h0, mu))[0], calls, steps

        return step

    def ours(**way: Any) -> Run:
        common = "options" not in way

        def make(h0: Tensor) -> tuple[Tensor, int, int]:
            if common and t.ndim > 1:
                solution = solve(lambda s, h: span * f(s, h), h0, torch.linspace(0, 1, 6), **{**kwargs, **way})
            else:
                solution = solve(f, h0, t, **{**kwargs, **way})
            return solution.h, *of(solution)[1:]

        return run(make)

    runs = {
        "own, `adjoint=True`": ours(adjoint=True, options=OWN),
        "own, `adjoint=False`": ours(adjoint=False, options=OWN),
        "common, `adjoint=True`": ours(adjoint=True),
    }
    if has_compiler():
        runs["own, `compile=True`"] = ours(adjoint=True, options=OWN, compile=True)
        runs["common, `compile=True`"] = ours(adjoint=True, compile=True)
    if has_julia():
        runs["a sweep"] = ours(adjoint=True, **SWEEP)
    if torchode:

        def theirs(h0: Tensor) -> tuple[Tensor, int, int]:
            s = by_torchode(f, h0, t, 1e-5)
            return s.ys.transpose(0, 1), int(s.stats["n_f_evals"].max()), steps_of(s)

        runs["torchode, `AutoDiffAdjoint`"] = run(theirs)
    table(title, measured(runs, rounds))


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

        runs = {"`rodas5p`, own": by("rodas5p"), "`radau5`, common": by("radau5")}
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

    runs = {"own times": own, "the union of all times": all_times}
    table(f"{samples} samples of {count} latent paths, {times} times of each: a training step", measured(runs, rounds))


def both_ways(make: Callable[..., nn.Module], count: int, tol: float) -> dict[str, Any]:
    """Models that differ in their steps alone, and hold the same field."""
    part = count**0.5
    ways: dict[str, dict[str, Any]] = {
        "own": {"options": OWN},
        "common": {},
        f"common, tolerance / {part:.0f}": {"rtol": tol / part, "atol": tol / part},
    }
    kwargs: dict[str, Any] = {"rtol": tol, "atol": tol, "adjoint": True, "engine": "torch"}
    return {name: make(**{**kwargs, **way}) for name, way in ways.items()}


class TimeField(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)]
        self.net = nn.Sequential(*layers)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(torch.cat([h, t.expand(*h.shape[:-1], 1)], -1))


def flow(rounds: int, quick: bool) -> None:
    count, training = (32, 20) if quick else (256, 1500)
    torch.manual_seed(0)

    def eight_bumps(count: int) -> Tensor:
        angle = torch.randint(0, 8, (count,)) * math.pi / 4
        return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(count, 2)

    f = TimeField(64)
    trained = CNF(f, 2)
    optimizer = torch.optim.Adam(f.parameters(), 3e-3)
    for _ in range(training):
        optimizer.zero_grad()
        trained.matching_loss(eight_bumps(256), coupling="independent").backward()
        optimizer.step()
    x = eight_bumps(count)
    flows = both_ways(lambda **how: CNF(f, 2, **how), count, 1e-5)

    def density(flow: CNF) -> Run:
        def run() -> tuple[Any, ...]:
            with torch.no_grad():
                return of_stats(flow.log_prob(x), flow.stats)

        return run

    def step(flow: CNF) -> Run:
        def run() -> tuple[Any, ...]:
            loss = flow.loss(x)
            loss.backward()
            return of_stats(loss, flow.stats)

        return run

    table(f"{count} points of a trained CNF, rtol 1e-5: log_prob", measured(each(density, flows), rounds))
    table("the same: a training step", measured(each(step, flows), rounds))


def recognition(rounds: int, quick: bool) -> None:
    count, times = (8, 5) if quick else (64, 20)
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 20))
    x, t = torch.randn(count, times, 2), torch.rand(count, times).sort(1).values * 4

    def make(**how: Any) -> ODERNN:
        torch.manual_seed(1)
        return ODERNN(2, 20, 4, lambda t, h: f(h), method="dopri5", **how)

    def step(model: ODERNN) -> Run:
        def run() -> tuple[Any, ...]:
            mean = model(x, t).mean
            mean.square().sum().backward()
            return mean, "", ""

        return run

    title = f"an ODERNN on {count} series of {times} times, rtol 1e-4: a training step"
    table(title, measured(each(step, both_ways(make, count, 1e-4)), rounds))


def each(run: Callable[[Any], Run], models: dict[str, Any]) -> dict[str, Run]:
    return {name: run(model) for name, model in models.items()}


def lorenz(rho: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, h: Tensor) -> Tensor:
        x, y, z = h.unbind(-1)
        return torch.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z], -1)

    return f


def robertson(k: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, h: Tensor) -> Tensor:
        a, b, c = h.unbind(-1)
        first, second, third = k * a, 3e7 * b * b, 1e4 * b * c
        return torch.stack([third - first, first - second - third, second], -1)

    return f


def by_diffrax(field: Any, solver: Any, end: float, rtol: float, atol: float, adjoint: Any = None) -> Any:
    """(y0 (n,), p) -> (n,), the end of one system."""
    control = diffrax.PIDController(rtol=rtol, atol=atol)
    term, save = diffrax.ODETerm(field), diffrax.SaveAt(t1=True)

    def solve_one(y0: Any, p: Any) -> Any:
        more = {} if adjoint is None else {"adjoint": adjoint}
        found = diffrax.diffeqsolve(
            term, solver, 0.0, end, None, y0, p, saveat=save, stepsize_controller=control, max_steps=4096, **more
        )
        return found.ys[0]

    return solve_one


def jax_lorenz(t: Any, y: Any, rho: Any) -> Any:
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (rho - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def jax_robertson(t: Any, y: Any, k: Any) -> Any:
    first, second, third = k * y[0], 3e7 * y[1] * y[1], 1e4 * y[1] * y[2]
    return jnp.stack([third - first, first - second - third, second])


def rates(title: str, counts: dict[str, int], runs: dict[str, Run], rounds: int, want: Tensor) -> None:
    """Print trajectories a second, and errors against those that are wanted: of every tenth or fiftieth system, which
    may be all that a contender solves."""
    print(f"\n{title}\n\n| | trajectories a second | error | steps of each |\n| --- | --- | --- | --- |")
    for name, (spent, (h, steps)) in measured(runs, rounds).items():
        apart = (h[:: counts[name] // len(want)] - want).abs() / want.abs().amax(0)
        error = float(apart.amax(1).median())
        told = f"{steps:.0f}" if steps else ""
        print(f"| {name} | {counts[name] / spent * 1e3:,.0f} | {error:.1e} | {told} |", flush=True)


def mean_steps(solution: Any) -> float:
    stats = solution.stats
    return stats.naccept if stats.systems is None else float(stats.systems.naccept.double().mean())


def sweep(rounds: int, quick: bool) -> None:
    count = 200 if quick else 10_000
    rho, start = torch.linspace(0.0, 28.0, count, dtype=F64), torch.ones(count, 3, dtype=F64)
    t = torch.tensor([0.0, 5.0], dtype=F64)
    kwargs: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6, "method": "tsit5", "dense": False}
    ways: dict[str, dict[str, Any]] = {
        "native, steps of their own": {"engine": "torch", "options": OWN},
        "native, common steps": {"engine": "torch"},
    }
    if has_julia():
        ways = {"sweep": SWEEP, **ways}

    def forward(way: dict[str, Any]) -> Run:
        def run() -> tuple[Any, ...]:
            solution = solve(lorenz(rho), start, t, **kwargs, **way)
            return solution.h[-1], mean_steps(solution)

        return run

    def backward(way: dict[str, Any]) -> Run:
        def run() -> tuple[Any, ...]:
            p, h0 = rho.clone().requires_grad_(), start.clone().requires_grad_()
            solution = solve(lorenz(p), h0, t, adjoint=True, **kwargs, **way)
            by_p, by_h0 = torch.autograd.grad(solution.h[-1].sum(), (p, h0))
            return torch.cat([by_h0, by_p[:, None]], 1), mean_steps(solution)

        return run

    some = slice(None, None, 10)
    tight = {**kwargs, "rtol": 1e-11, "atol": 1e-11, "method": "dopri8", "engine": "torch", "options": OWN}
    want = solve(lorenz(rho[some]), start[some], t, **tight).h[-1]
    p, h0 = rho[some].clone().requires_grad_(), start[some].clone().requires_grad_()
    by_p, by_h0 = torch.autograd.grad(solve(lorenz(p), h0, t, adjoint=True, **tight).h[-1].sum(), (p, h0))
    forwards = {name: forward(way) for name, way in ways.items()}
    backwards = {name: backward(way) for name, way in ways.items()}
    if diffrax:
        one = by_diffrax(jax_lorenz, diffrax.Tsit5(), 5.0, 1e-6, 1e-6)
        once = jax.jit(jax.vmap(one))
        gradient = jax.jit(jax.vmap(jax.grad(lambda y0, p: one(y0, p).sum(), argnums=(0, 1))))
        j0, jp = jnp.array(start.numpy()), jnp.array(rho.numpy())

        def theirs() -> tuple[Any, ...]:
            return torch.tensor(jax.device_get(once(j0, jp))), 0

        def their_gradient() -> tuple[Any, ...]:
            y, p = jax.device_get(gradient(j0, jp))
            return torch.cat([torch.tensor(y), torch.tensor(p)[:, None]], 1), 0

        forwards["diffrax vmap Tsit5"], backwards["diffrax vmap Tsit5"] = theirs, their_gradient
    all_of_them = dict.fromkeys(forwards, count)
    rates(f"{count} Lorenz systems to t = 5, rtol 1e-6", all_of_them, forwards, rounds, want)
    title = "the same with the gradient of the sum of the ends by all starts and parameters"
    rates(title, all_of_them, backwards, rounds, torch.cat([by_h0, by_p[:, None]], 1))

    k, start, t = torch.logspace(-3, -0.5, count, dtype=F64), torch.zeros(count, 3, dtype=F64), t.new_tensor([0.0, 1e4])
    start[:, 0] = 1.0
    kwargs = {"rtol": 1e-6, "atol": 1e-10, "dense": False}
    some = slice(None, None, 50)  # what the others solve: all would take them minutes

    def stiff_run(method: str, part: slice, way: dict[str, Any]) -> Run:
        def run() -> tuple[Any, ...]:
            solution = solve(robertson(k[part]), start[part], t, method=method, **kwargs, **way)
            return solution.h[-1], mean_steps(solution)

        return run

    want = solve(
        robertson(k[some]), start[some], t, method="radau5", rtol=1e-9, atol=1e-13, dense=False, engine="torch"
    ).h[-1]
    runs = {f"{name}, rodas5p": stiff_run("rodas5p", slice(None), way) for name, way in ways.items() if name == "sweep"}
    runs["native, steps of their own, rodas5p"] = stiff_run("rodas5p", some, ways["native, steps of their own"])
    counts = {name: count if name.startswith("sweep") else count // 50 for name in runs}
    if diffrax:
        stiff_once = jax.jit(jax.vmap(by_diffrax(jax_robertson, diffrax.Kvaerno5(), 1e4, 1e-6, 1e-10)))
        s0, sk = jnp.array(start[some].numpy()), jnp.array(k[some].numpy())
        runs["diffrax vmap Kvaerno5"] = lambda: (torch.tensor(jax.device_get(stiff_once(s0, sk))), 0)
        counts["diffrax vmap Kvaerno5"] = count // 50
    rates(f"{count} Robertson systems to t = 1e4, rtol 1e-6", counts, runs, rounds, want)

    def stiff_gradient(part: slice, way: dict[str, Any]) -> Run:
        def run() -> tuple[Any, ...]:
            p = k[part].clone().requires_grad_()
            solution = solve(robertson(p), start[part], t, method="rodas5p", adjoint=True, **kwargs, **way)
            return torch.autograd.grad(solution.h[-1].sum(0)[0], p)[0][:, None], mean_steps(solution)

        return run

    p = k[some].clone().requires_grad_()
    tight = {**kwargs, "rtol": 1e-9, "atol": 1e-13, "method": "radau5", "engine": "torch", "adjoint": True}
    (want,) = torch.autograd.grad(solve(robertson(p), start[some], t, **tight).h[-1].sum(0)[0], p)
    runs = {name: stiff_gradient(slice(None), way) for name, way in ways.items() if name == "sweep"}
    runs["native, steps of their own"] = stiff_gradient(some, ways["native, steps of their own"])
    counts = {name: count if name == "sweep" else count // 50 for name in runs}
    rates(
        "the same with the gradient of the sum of the first numbers by all rates", counts, runs, rounds, want[:, None]
    )


PARTS = {
    "phases": phases,
    "spread": spread,
    "gradient": gradient,
    "spread-gradient": spread_gradient,
    "stiff": stiff,
    "latent": latent,
    "flow": flow,
    "recognition": recognition,
    "sweep": sweep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    args = parser.parse_args()
    for name in [args.part] if args.part else PARTS:
        PARTS[name](args.rounds, args.quick)


if __name__ == "__main__":
    main()
