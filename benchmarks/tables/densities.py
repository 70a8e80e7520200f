"""Continuous normalizing flows with and without the two regularisers: nats, and evaluations for a pass.

    python benchmarks/tables/densities.py [--quick] [--resume] [--seeds 3] [--out densities.json]

Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, FFJORD, 2018, draw the densities in the plane and give no figures of
them; Finlay, Jacobsen, Nurbekyan & Oberman, How to train your neural ODE, 2020, claim that the kinetic energy and the
norm of the Jacobian in the loss keep the likelihood and save evaluations. Both are measured here on held-out points,
with the exact trace. The tables of the papers (POWER, MINIBOONE ...) are in no package registry: scikit-learn's
breast-cancer data (569 rows of 30 columns, whitened) stand for them, with Hutchinson's estimate in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from common import Numbers, Runs, arguments, example, pm, table
from torch import Tensor

from pyjlode.nn import CNF, TimeMLP

cnf_density = example("cnf_density")
WEIGHTS = ("0", "0.01", "0.1")  # of both regularisers
PLANE = ("eight Gaussians", "checkerboard", "pinwheel")
TABLE = "breast cancer"
TOL = 1e-5  # of the evaluation


def train(flow: CNF, draw: Callable[[], Tensor], steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        flow.loss(draw()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measured(flow: CNF, x: Tensor, offset: float = 0.0) -> Numbers:
    """Nats and evaluations of one pass from the data to the base."""
    flow.trace = "exact"
    flow.solver_options.update(rtol=TOL, atol=TOL)
    nats = float(flow.log_prob(x).mean()) + offset
    assert flow.stats is not None
    return {"nats": nats, "nfe": flow.stats.nfe}


def plane(name: str, weight: float, args: argparse.Namespace) -> Numbers:
    torch.manual_seed(args.seed)
    flow = CNF(TimeMLP([2, 48, 48, 2]), 2, rtol=1e-4, atol=1e-4, kinetic_energy=weight, jacobian_norm=weight)
    train(flow, lambda: cnf_density.DENSITIES[name](256), 10 if args.quick else 500, 1e-2)
    return measured(flow, cnf_density.DENSITIES[name](5000))


def tabular(weight: float, args: argparse.Namespace) -> Numbers:
    data, _, test = cnf_density.rows(args)
    mean, L = data.mean(0), torch.linalg.cholesky(torch.cov(data.T))
    data, test = (torch.linalg.solve_triangular(L, (x - mean).T, upper=False).T for x in (data, test))
    D = data.shape[1]
    torch.manual_seed(args.seed)
    field = TimeMLP([D, 64, 64, D])
    for weights in (field.layers[-1].linear.weight, field.layers[-1].linear.bias, field.layers[-1].shift.weight):
        torch.nn.init.zeros_(weights)  # begins as the Gaussian
    weights = {"kinetic_energy": weight, "jacobian_norm": weight}
    flow = CNF(field, D, trace="hutchinson", rtol=1e-3, atol=1e-3, **weights)
    # Noise on few rows keeps them from being learnt by heart.
    draw = lambda: data[torch.randint(0, len(data), (128,))] + 0.05 * torch.randn(128, D)  # noqa: E731
    train(flow, draw, 5 if args.quick else 300, 1e-3)
    return measured(flow, test, -float(L.diagonal().log().sum()))


def run(name: str, weight: str, args: argparse.Namespace) -> Numbers:
    return tabular(float(weight), args) if name == TABLE else plane(name, float(weight), args)


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, ...], list[Numbers]]:
    args = arguments(__doc__, "densities", argv)
    runs, found = Runs(args), {}
    for name in (*PLANE, TABLE):  # all seeds of one before the next
        found |= runs.all([(name, weight) for weight in WEIGHTS], run)
    forms = {"nats": ".3f", "nfe": ".0f", "cpu_seconds": ".0f"}
    rows = [
        [f"{name}, {weight}", *(pm(numbers, key, form) for key, form in forms.items())]
        for (name, weight), numbers in found.items()
    ]
    head = ["density, weight of the regularisers", "nats", f"evaluations at {TOL:.0e}", "training, CPU s"]
    print(table(head, rows))
    return found


if __name__ == "__main__":
    main()
