"""Training steps of programs as people write them: pyjlode with Julia, pyjlode's native engine, and torchdiffeq.

    python benchmarks/training.py [--part NAME] [--rounds N] [--quick]

A step is a solve, a loss, its backward pass and a step of Adam. The engines take turns, step by step, in one process on
one thread. Printed are the median time of a step with `engine="auto"`, where Julia is set up; how many times as long
the native engine and torchdiffeq take (`adjoint=True` against `odeint_adjoint`, dopri5 at the same tolerances; the
median over the rounds); the time of the first three steps together, in which fields are captured and compiled; and
which engine `auto` was, and why. Julia is started before.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.pop("PYJLODE_ENGINE", None)

import torch
from torch import Tensor, nn

import pyjlode

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

F64 = torch.float64
Solve = Callable[..., Any]
Step = Callable[[], None]
PROGRAMS: dict[str, Callable[[Solve], Step]] = {}


def program(name: str) -> Callable[[Callable[[Solve], Step]], Callable[[Solve], Step]]:
    """A function of a solver, `solve(f, h0, t, parameters)`, that makes a training step."""

    def add(make: Callable[[Solve], Step]) -> Callable[[Solve], Step]:
        PROGRAMS[name] = make
        return make

    return add


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def stepping(parameters: Any, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


TIMES = torch.linspace(0.0, 3.0, 21)
CIRCLE = torch.stack([torch.cos(TIMES), torch.sin(TIMES)], -1)


@program("module")
def plain_module(solve: Solve) -> Step:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2, 16, 16, 2)

        def forward(self, t: Tensor, h: Tensor) -> Tensor:
            return self.net(h)

    f = Field()
    parameters = tuple(f.parameters())
    return stepping(parameters, lambda: (solve(f, CIRCLE[0], TIMES, parameters) - CIRCLE).square().mean())


@program("bound method, with state and a history")
def bound_method(solve: Solve) -> Step:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2, 32, 2)
            self.h0 = nn.Parameter(CIRCLE[0].clone())
            self.history: list[float] = []
            self.last: Tensor | None = None

        def field(self, t: Tensor, h: Tensor) -> Tensor:
            return self.net(h)

        def forward(self) -> Tensor:
            self.last = solve(self.field, self.h0, TIMES, tuple(self.net.parameters()))
            return self.last

    model = Model()

    def loss() -> Tensor:
        value = (model() - CIRCLE).square().mean()
        model.history.append(value.item())
        return value

    return stepping(model.parameters(), loss)


@program("lambda over a module, made anew")
def new_lambda(solve: Solve) -> Step:
    net = mlp(2, 16, 16, 2)
    parameters = tuple(net.parameters())
    return stepping(
        parameters,
        lambda: (solve(lambda t, h: net(h**3), CIRCLE[0], TIMES, parameters) - CIRCLE).square().mean(),
    )


@program("functools.partial, made anew")
def new_partial(solve: Solve) -> Step:
    net, rate = mlp(3, 16, 2), nn.Parameter(torch.tensor(0.3))

    def field(net: nn.Module, rate: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return net(torch.cat([h, t.reshape(1)])) - rate * h

    parameters = (*net.parameters(), rate)
    return stepping(
        parameters,
        lambda: (solve(functools.partial(field, net, rate), CIRCLE[0], TIMES, parameters) - CIRCLE).square().mean(),
    )


@program("tuple state, a pendulum with a closure")
def tuple_state(solve: Solve) -> Step:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.friction = nn.Parameter(torch.tensor(0.1))
            self.length = nn.Parameter(torch.tensor(1.2))
            self.solved = 0

        def forward(self) -> Tensor:
            def field(t: Tensor, h: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                angle, speed = h
                return speed, -torch.sin(angle) * 9.81 / self.length - self.friction * speed

            self.solved += 1
            return solve(field, (torch.ones(1), torch.zeros(1)), TIMES, tuple(self.parameters()))[0]

    model = Model()
    return stepping(model.parameters(), lambda: (model() - torch.cos(TIMES)[:, None]).square().mean())


@program("dictionary state")
def dictionary_state(solve: Solve) -> Step:
    net = mlp(3, 16, 3)
    parameters = tuple(net.parameters())

    def field(t: Tensor, h: dict[str, Tensor]) -> dict[str, Tensor]:
        out = net(torch.cat([h["position"], h["mass"]]))
        return {"position": out[:2], "mass": out[2:]}

    def loss() -> Tensor:
        h0 = {"position": CIRCLE[0], "mass": torch.ones(1)}
        return (solve(field, h0, TIMES, parameters)["position"] - CIRCLE).square().mean()

    return stepping(parameters, loss)


def lotka_volterra(a: float, b: float, c: float, d: float) -> Callable[[Tensor, Tensor], Tensor]:
    def field(t: Tensor, h: Tensor) -> Tensor:
        x, y = h[..., 0], h[..., 1]
        return torch.stack([a * x - b * x * y, d * x * y - c * y], -1)

    return field


@program("closure over four numbers, made anew")
def numbers(solve: Solve) -> Step:
    h0 = nn.Parameter(torch.tensor([1.0, 1.2], dtype=F64))
    t = torch.linspace(0, 6, 21, dtype=F64)
    return stepping([h0], lambda: solve(lotka_volterra(1.5, 1.0, 3.0, 1.0), h0, t, ()).square().mean())


@program("closure over four numbers that change")
def changing_numbers(solve: Solve) -> Step:
    h0, steps = nn.Parameter(torch.tensor([1.0, 1.2], dtype=F64)), [0]
    t = torch.linspace(0, 6, 21, dtype=F64)

    def loss() -> Tensor:
        steps[0] += 1
        return solve(lotka_volterra(1.5 + 1e-4 * steps[0], 1.0, 3.0, 1.0), h0, t, ()).square().mean()

    return stepping([h0], loss)


@program("module with buffers, counters and hooks")
def busy_module(solve: Solve) -> Step:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2, 16, 16, 2)
            self.register_buffer("scale", torch.tensor([0.9, 1.1]))
            self.nfe, self.hooked = 0, 0
            self.net.register_forward_hook(self.count)

        def count(self, module: nn.Module, args: Any, out: Tensor) -> None:
            self.hooked += 1

        def forward(self, t: Tensor, h: Tensor) -> Tensor:
            self.nfe += 1
            return self.net(h / self.scale)

    f = Field()
    parameters = tuple(f.parameters())

    def loss() -> Tensor:
        f.nfe = 0
        return (solve(f, CIRCLE[0], TIMES, parameters) - CIRCLE).square().mean()

    return stepping(parameters, loss)


@program("CNF in the plane, exact trace")
def flow(solve: Solve) -> Step:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2, 16, 16, 2)

        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            z = state[0]
            with torch.enable_grad():
                z = z if z.requires_grad else z.detach().requires_grad_()
                dz = self.net(z)
                trace = torch.zeros(len(z))
                for i in range(2):
                    trace = trace + torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i]
            return dz, -trace

    f, x = Flow(), torch.randn(16, 2)
    parameters, t = tuple(f.parameters()), torch.tensor([0.0, 1.0])

    def loss() -> Tensor:
        z, change = solve(f, (x, torch.zeros(len(x))), t, parameters)
        return (0.5 * z[-1].square().sum(1) - change[-1]).mean()

    return stepping(parameters, loss)


@program("latent ODE")
def latent(solve: Solve) -> Step:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.first = nn.GRU(2, 16), nn.Linear(16, 8)
            self.field, self.decoder = mlp(4, 20, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            mean, spread = self.first(self.encoder(x.flip(0))[1][0]).chunk(2, -1)
            z0 = mean + torch.exp(spread) * torch.randn_like(mean)
            z = solve(lambda t, z: self.field(z), z0, TIMES, tuple(self.field.parameters()))
            return (self.decoder(z) - x).square().mean()

    model = Model()
    x = torch.stack([CIRCLE * (1 + 0.1 * i) for i in range(8)], 1)
    return stepping(model.parameters(), lambda: model(x))


@program("Hamiltonian network")
def hamiltonian(solve: Solve) -> Step:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = mlp(2, 16, 16, 1)

        def forward(self, t: Tensor, h: Tensor) -> Tensor:
            with torch.enable_grad():
                x = h if h.requires_grad else h.detach().requires_grad_()
                q, p = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0].unbind(-1)
            return torch.stack([p, -q], -1)

    f, h0 = Field(), CIRCLE[:4]
    parameters = tuple(f.parameters())
    want = torch.stack([CIRCLE] * 4, 1)
    return stepping(parameters, lambda: (solve(f, h0, TIMES, parameters) - want).square().mean())


class Ours:
    """pyjlode as a solver of the programs.

    Attributes:
        last: how the last solve went.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.last: Any = None

    def __call__(self, f: Any, h0: Any, t: Tensor, parameters: tuple[Tensor, ...]) -> Any:
        solution = pyjlode.solve(
            f, h0, t, method="dopri5", rtol=1e-5, atol=1e-6, adjoint=True, engine=self.engine, dense=False
        )
        self.last = solution.stats
        return solution.h


def torchdiffeq(f: Any, h0: Any, t: Tensor, parameters: tuple[Tensor, ...]) -> Any:
    """The same by torchdiffeq, which knows tuples but no dictionaries."""
    from torchdiffeq import odeint_adjoint

    settings: dict[str, Any] = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-6, "adjoint_params": parameters}
    if not isinstance(h0, dict):
        return odeint_adjoint(f, h0, t, **settings)
    keys = list(h0)

    def of_tuple(t: Tensor, h: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out = f(t, dict(zip(keys, h)))
        return tuple(out[key] for key in keys)

    return dict(zip(keys, odeint_adjoint(of_tuple, tuple(h0.values()), t, **settings)))


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="", help="programs whose name contains this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="five rounds, without torchdiffeq")
    args = parser.parse_args()
    rounds = 5 if args.quick else args.rounds
    start = time.perf_counter()
    pyjlode.odeint(lambda t, h: -h, torch.ones(1), torch.tensor([0.0, 1.0]), engine="julia")
    print(f"the first solve of the process, which starts Julia: {time.perf_counter() - start:.1f} s\n")
    print(f"{'a training step':42} {'auto, ms':>9} {'native':>8} {'torchdiffeq':>12} {'first 3, s':>11}  auto was")
    for name, make in PROGRAMS.items():
        if args.part not in name:
            continue
        solvers: dict[str, Any] = {"auto": Ours("auto"), "torch": Ours("torch")}
        if not args.quick:
            solvers["torchdiffeq"] = torchdiffeq
        steps = {}
        for key, solver in solvers.items():
            torch.manual_seed(0)
            steps[key] = make(solver)
        first = sum(timed(steps["auto"]) for _ in range(3))
        for key in list(steps)[1:]:
            timed(steps[key])
        for _ in range(7):  # until what is kept between calls is
            timed(steps["auto"])
        times: dict[str, list[float]] = {key: [] for key in steps}
        for i in range(rounds):
            for key, step in steps.items():
                if key != "torchdiffeq" or i < 3:
                    times[key].append(timed(step))
        ours = times["auto"]
        ratios = {key: statistics.median([b / a for a, b in zip(ours, x)]) for key, x in times.items()}
        stats = solvers["auto"].last
        how = f"{stats.engine} {stats.compiled}".strip() + f": {stats.not_compiled or stats.reason}"
        other = f"{ratios['torchdiffeq']:12.1f}" if "torchdiffeq" in ratios else f"{'':12}"
        print(
            f"{name:42} {1e3 * statistics.median(ours):9.2f} {ratios['torch']:8.2f} {other} {first:11.2f}  {how[:90]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
