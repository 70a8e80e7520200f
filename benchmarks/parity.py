"""Both engines on the same problems: how far apart they are, in units of the tolerance, as a table.

    python benchmarks/parity.py [--quick]

For each method that both engines have: the largest difference of the two solutions over a set of problems, divided by
`atol + rtol |h|`, at rtol = atol = 1e-8 in float64 and 1e-4 in float32, forward and backward in time; fixed steps: the
difference itself. Then for each gradient method the largest relative difference of the gradients by h0, t and the
parameters of a network. "-": the Julia engine declines and says why; the
name of an error: Julia's solver gave up on one of the problems. `--quick`: fewer problems.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pyjlode
from pyjlode.methods import METHODS

torch.set_num_threads(1)
F64 = torch.float64
ROWS = {name: row for name, row in METHODS.items() if row.julia is not None}
Problem = tuple[Callable[[Tensor, Any], Any], Tensor, list[float]]


def lorenz(t: Tensor, h: Tensor) -> Tensor:
    x, y, z = h
    return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def van_der_pol(t: Tensor, h: Tensor) -> Tensor:
    return torch.stack([h[1], 100 * (1 - h[0] ** 2) * h[1] - h[0]])


def robertson(t: Tensor, h: Tensor) -> Tensor:
    a, b, c = h
    slow, fast, square = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([fast - slow, slow - fast - square, square])


NONSTIFF: dict[str, Problem] = {
    "oscillator": (lambda t, h: torch.stack([h[1], -h[0]]), torch.tensor([1.0, 0.5]), [0.0, 2.0, 10.0]),
    "logistic": (lambda t, h: h * (1 - h), torch.tensor([0.1, 0.5]), [0.0, 1.0, 4.0]),
    "forced": (lambda t, h: -h + torch.cos(3 * t), torch.tensor([1.0]), [0.0, 1.0, 5.0]),
    "Lorenz": (lorenz, torch.tensor([1.0, 1.0, 1.0]), [0.0, 0.5, 1.0]),
}
STIFF: dict[str, Problem] = {
    "Robertson": (robertson, torch.tensor([1.0, 0.0, 0.0]), [0.0, 4.0, 40.0]),
    "van der Pol": (van_der_pol, torch.tensor([2.0, 0.0]), [0.0, 20.0, 60.0]),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h) * torch.cos(t)


def gap(problem: Problem, method: str, dtype: torch.dtype, backward: bool) -> float:
    """Largest difference of the engines' solutions, in tolerances; of fixed steps, absolute."""
    f, h0, times = problem
    t = torch.tensor(times, dtype=F64)
    adaptive = ROWS[method].adaptive
    tol = 1e-8 if dtype == F64 else 1e-4
    if backward:  # the same way back: h'(s) = -f(-s, h)
        t, forward = -t, f
        f = lambda s, h: -forward(-s, h)  # noqa: E731
    if not adaptive:
        t = torch.linspace(float(t[0]), float(t[-1]), 201, dtype=F64)
    a, b = (
        pyjlode.odeint(f, h0.to(dtype), t, method=method, engine=engine, rtol=tol, atol=tol, compile=False)
        for engine in ("torch", "julia")
    )
    scale = tol + tol * a.abs() if adaptive else torch.ones(())
    return float(((a - b).abs() / scale).max())


def solutions(quick: bool) -> None:
    print("| method | float64 | backward in time | float32 |\n| --- | --- | --- | --- |")
    for name, row in ROWS.items():
        stiff = row.kind in ("stiff", "auto")
        problems = list((STIFF if stiff else NONSTIFF).values())[: 1 if quick else None]
        cells = []
        for dtype, backward in ((F64, False), (F64, True), (torch.float32, False)):
            try:
                values = [gap(p, name, dtype, backward) for p in problems]
                cells.append(number(max(values), "" if row.adaptive else " absolute"))
            except pyjlode.errors.SolveError as error:
                cells.append(type(error).__name__)
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


def gradients(method: str, name: str, f: Any, h0: Tensor, params: list[Tensor], times: list[float]) -> float:
    """Largest relative difference, for each of h0, t and the parameters, of the Julia engine's gradient from `discrete`
    on the native engine at a tolerance a hundred times smaller."""

    def gradient(**kwargs: Any) -> tuple[Tensor, ...]:
        start = h0.clone().requires_grad_()
        t = torch.tensor(times, dtype=F64, requires_grad=True)
        h = pyjlode.odeint(f, start, t, method=method, **kwargs)
        weights = torch.linspace(0.5, 1.5, h.numel(), dtype=F64).view_as(h)
        return torch.autograd.grad((weights * h).sum(), [start, t, *params])

    want = gradient(engine="torch", adjoint="discrete", rtol=1e-10, atol=1e-13)
    got = gradient(engine="julia", compile=False, adjoint=name, rtol=1e-8, atol=1e-11)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want))


def gradient_table(quick: bool) -> None:
    net = Network()
    k = torch.tensor([0.04, 1e4, 3e7], dtype=F64, requires_grad=True)

    def reaction(t: Tensor, h: Tensor) -> Tensor:
        a, b, c = h
        slow, fast, square = k[0] * a, k[1] * b * c, k[2] * b * b
        return torch.stack([fast - slow, slow - fast - square, square])

    start, reactants = torch.tensor([1.0, 0.0, -0.5], dtype=F64), torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    columns: list[tuple[str, str, tuple[Any, Tensor, list[Tensor], list[float]]]] = [
        ("network, `tsit5`", "tsit5", (net, start, list(net.parameters()), [0.0, 0.7, 2.0])),
        ("network, `vern7`", "vern7", (net, start, list(net.parameters()), [0.0, 0.7, 2.0])),
    ]
    if not quick:
        columns += [
            ("Robertson, `rodas5p`", "rodas5p", (reaction, reactants, [k], [0.0, 4.0, 40.0])),
            ("Robertson, `radau5`", "radau5", (reaction, reactants, [k], [0.0, 4.0, 40.0])),
        ]
    print(f"| `adjoint` | {' | '.join(title for title, _, _ in columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name in sorted(pyjlode.bridge.engine.GRADIENTS):
        cells = []
        for _, method, (f, h0, params, times) in columns:
            try:
                cells.append(number(gradients(method, name, f, h0, params, times)))
            except pyjlode.errors.BadOption:
                cells.append("-")
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


def number(x: float, unit: str = "") -> str:
    return "not a number" if math.isnan(x) else (f"{x:.1f}" if 0.1 <= x < 1000 else f"{x:.0e}") + unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    solutions(args.quick)
    print()
    gradient_table(args.quick)


if __name__ == "__main__":
    main()
