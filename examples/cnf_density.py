"""Continuous normalizing flows: four densities in the plane, and one real table.

    python examples/cnf_density.py [--quick] [--resume] [--out cnf_density.png]

Each of two moons, eight Gaussians, a checkerboard and a pinwheel is learnt from samples by a flow from the standard
normal. Two checks do not trust the solver: the density is summed over the plane, where it must come to one, and points
are carried to the base and back, where they must come home to within the tolerance times what the flow makes of an
error: it spreads the thin bridges between two Gaussians, say, by a factor of hundreds. The picture shows data, density
and samples; beside it (.gif) the flow in time.

The table is scikit-learn's breast-cancer data (569 rows of 30 measurements), standardised. The flow starts as the
full-covariance Gaussian that it is compared with: rows are whitened by the training rows' mean and covariance. It is
trained with Hutchinson's estimate and Finlay et al.'s two regularisers, stopped where rows held out of the training set
are best, and evaluated with the exact trace on test rows.

Source: Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, FFJORD, 2018; Finlay, Jacobsen, Nurbekyan & Oberman, How to
train your neural ODE, 2020.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from shared import COLORS, FAINT, INK, STYLE, arguments, fit, headline, table
from sklearn.datasets import load_breast_cancer
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KernelDensity
from torch import Tensor

from pyjlode import odeint, plot
from pyjlode.nn import CNF, TimeMLP

LIMIT = 4.0  # of the pictures; the sum over the plane reaches twice as far
TOL = 1e-5  # rtol and atol of the checks


# ----------------------------------------------------------------------------------------------------------------------
# Four densities in the plane, scaled to be about as wide as the standard normal's picture
# ----------------------------------------------------------------------------------------------------------------------


def two_moons(n: int) -> Tensor:
    """Two half circles of radius one that reach into each other, with noise of 0.1."""
    angle, upper = math.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, torch.cos(angle), 1 - torch.cos(angle))
    y = torch.where(upper, torch.sin(angle), 0.5 - torch.sin(angle))
    return 1.5 * (torch.stack([x - 0.5, y - 0.25], -1) + 0.1 * torch.randn(n, 2))


def eight_gaussians(n: int) -> Tensor:
    """Eight of deviation 0.25 on a circle of radius 2.5."""
    angle = math.pi / 4 * torch.randint(0, 8, (n,))
    return 2.5 * torch.stack([torch.cos(angle), torch.sin(angle)], -1) + 0.25 * torch.randn(n, 2)


def checkerboard(n: int) -> Tensor:
    """The eight dark fields of four by four, each of side 1.5."""
    x, row = torch.rand(n) * 4 - 2, torch.randint(0, 2, (n,))
    y = torch.rand(n) + 2 * row - 2 + x.floor() % 2
    return 1.5 * torch.stack([x, y], -1)


def pinwheel(n: int) -> Tensor:
    """Five arms, each a Gaussian that is turned the more the farther out it is."""
    arm = torch.randint(0, 5, (n,))
    radius, across = 1 + 0.3 * torch.randn(n), 0.1 * torch.randn(n)
    angle = 2 * math.pi / 5 * arm + 0.4 * torch.exp(radius)
    turned = torch.stack([radius * angle.cos() - across * angle.sin(), radius * angle.sin() + across * angle.cos()], -1)
    return 1.8 * turned


DENSITIES: dict[str, Callable[[int], Tensor]] = {
    "two moons": two_moons,
    "eight Gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    "pinwheel": pinwheel,
}


def learn(name: str, args: argparse.Namespace) -> CNF:
    """Train a flow on samples that never repeat."""
    steps, batch = (60, 256) if args.quick else (1500, 512)
    torch.manual_seed(args.seed)
    width = 32 if args.quick else 64
    flow = CNF(TimeMLP([2, width, width, width, 2]), 2, rtol=1e-4, atol=1e-4, kinetic_energy=0.01)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2 if args.quick else 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = DENSITIES[name]

    def step(i: int) -> dict[str, float]:
        loss = flow.loss(draw(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        assert flow.stats is not None
        return {"loss": loss.item(), "nfe": flow.stats.nfe}

    fit(name.replace(" ", "-"), {"flow": flow, "optimizer": optimizer, "schedule": schedule}, step, steps, args)
    return flow


@torch.no_grad()
def check(flow: CNF, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Held-out log-likelihood, mass of the density, and the way there and back at `rtol=atol=TOL`."""
    torch.manual_seed(args.seed + 1000)
    x = DENSITIES[name](500 if args.quick else 5000)
    # Each point is to be within the tolerance, not the root mean square of all of them.
    flow.solver_options.update(rtol=TOL, atol=TOL, options={"norm": largest})
    z, log_det = flow(x)
    assert flow.stats is not None
    nfe = flow.stats.nfe
    error = (flow.inverse(z)[0] - x).norm(dim=-1)
    grown = amplification(flow, z)
    side = torch.linspace(-2 * LIMIT, 2 * LIMIT, 161 if args.quick else 401)
    grid = torch.cartesian_prod(side, side).split(20_000)
    mass = sum(float(flow.log_prob(part).exp().double().sum()) for part in grid) * float(side[1] - side[0]) ** 2
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(x).mean()
    return {
        "log_likelihood": float((flow.base.log_prob(z) + log_det).mean()),
        "gaussian": float(gaussian),
        "mass": mass,
        "nfe": nfe,
        "round_trip": float(error.max()),
        "amplification": float(grown.max()),
        "of_bound": float((error / (TOL * grown)).max()),
    }


def largest(state: Any) -> Tensor:
    """The norm of an error that is as large as its largest element."""
    parts = state if isinstance(state, tuple) else (state,)
    return torch.stack([x.abs().max() for x in parts]).max()


def amplification(flow: CNF, z: Tensor) -> Tensor:
    """How much an error that is made anywhere on the path has grown where the data are: the largest spectral norm of
    dh(1)/dh(t) over t, shape (n,) for points z (n, 2) of the base.

    An error made on the way to the base is carried there and back again, and so grows by no more than that.
    """
    f = copy.deepcopy(flow.f).double()
    jacobian = torch.func.vmap(torch.func.jacrev(f, argnums=1), (None, 0))

    def variation(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, dh = state
        return f(t, h), jacobian(t, h) @ dh

    one = torch.eye(2, dtype=torch.float64).expand(len(z), 2, 2)
    _, dh = odeint(variation, (z.double(), one), torch.linspace(*flow.t, 21), rtol=1e-5, atol=1e-5)
    return torch.linalg.matrix_norm(dh[-1] @ torch.linalg.inv(dh), 2).amax(0)


# ----------------------------------------------------------------------------------------------------------------------
# A real table
# ----------------------------------------------------------------------------------------------------------------------


def rows(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised training, validation and test rows: 60, 15 and 25 per cent."""
    x = load_breast_cancer().data
    rest, test = train_test_split(x, test_size=0.25, random_state=args.seed)
    train, valid = train_test_split(rest, test_size=0.2, random_state=args.seed)
    mean, std = train.mean(0), train.std(0)
    train, valid, test = (torch.from_numpy((part - mean) / std).float() for part in (train, valid, test))
    return train, valid, test


def rivals(train: Tensor, valid: Tensor, test: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Mean test log-likelihoods of scikit-learn's densities, each at its best on the validation rows."""
    x, v, y = (part.double().numpy() for part in (train, valid, test))
    mixtures = [
        GaussianMixture(k, covariance_type=kind, reg_covar=reg, random_state=args.seed).fit(x)
        for k in range(2, 7)
        for kind in ("full", "tied", "diag")
        for reg in (1e-3, 1e-2, 1e-1)
    ]
    kernels = GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.1, 2, 20)}).fit(x)
    return {
        "Gaussian, full covariance": GaussianMixture(1, reg_covar=1e-6, random_state=args.seed).fit(x).score(y),
        "Gaussian mixture": max(mixtures, key=lambda mixture: mixture.score(v)).score(y),
        "kernel density": kernels.best_estimator_.score(y) / len(y),
    }


def flow_of_rows(train: Tensor, valid: Tensor, test: Tensor, args: argparse.Namespace) -> float:
    """Mean test log-likelihood of a flow, in the whitened coordinates it starts as the Gaussian in."""
    mean, L = train.mean(0), torch.linalg.cholesky(torch.cov(train.T))

    def white(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(L, (x - mean).T, upper=False).T

    D, steps = train.shape[1], 150 if args.quick else 1500
    torch.manual_seed(args.seed)
    f = TimeMLP([D, 64, 64, D])
    torch.nn.init.zeros_(f.layers[-1].linear.weight)
    torch.nn.init.zeros_(f.layers[-1].linear.bias)
    torch.nn.init.zeros_(f.layers[-1].shift.weight)
    flow = CNF(f, D, trace="hutchinson", kinetic_energy=0.01, jacobian_norm=0.01, rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=3e-3 if args.quick else 1e-3, weight_decay=1e-2)
    best = Best(flow)
    data, held = white(train), white(valid)

    def step(i: int) -> dict[str, float]:
        loss = flow.loss(data[torch.randint(0, len(data), (128,))] + 0.05 * torch.randn(128, D))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        if (i + 1) % 25 == 0:
            best.look(mean_log_prob(flow, held))
        assert flow.stats is not None
        return {"loss": loss.item(), "valid": best.score, "nfe": flow.stats.nfe}

    fit("breast-cancer", {"flow": flow, "optimizer": optimizer, "best": best}, step, steps, args)
    flow.load_state_dict(best.weights)
    return mean_log_prob(flow, white(test)) - float(L.diagonal().log().sum())


class Best:
    """The weights that were best on the validation rows; the ones at the start count, too."""

    def __init__(self, flow: CNF) -> None:
        self.flow, self.score, self.weights = flow, -math.inf, copy.deepcopy(flow.state_dict())

    def look(self, score: float) -> None:
        if score > self.score:
            self.score, self.weights = score, copy.deepcopy(self.flow.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.weights = state["score"], state["weights"]


def mean_log_prob(flow: CNF, x: Tensor) -> float:
    """With the exact trace, and a tolerance that the difference of two models is well above."""
    exact = copy.copy(flow)
    exact.trace, exact.solver_options = "exact", {**flow.solver_options, "rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        return float(exact.log_prob(x).mean())


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def draw(flows: dict[str, CNF], args: argparse.Namespace) -> None:
    """Data, density and samples, one column for each density."""
    several = len(flows) > 1
    canvas = plot.figure(*((3 * len(flows) + 0.3, 9.6) if several else (9.2, 3.6)))
    axes = canvas.subplots(3, len(flows), squeeze=False) if several else canvas.subplots(1, 3)[:, None]
    dots = {"s": 2, "lw": 0, "color": INK, "alpha": 0.5}
    torch.manual_seed(args.seed)
    for (name, flow), (left, middle, right) in zip(flows.items(), axes.T):
        left.scatter(*DENSITIES[name](3000).T, **dots)
        right.scatter(*flow.sample(3000).T, **dots)
        plot.density_flow(middle, flow, xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), points=160)
        if several:
            left.set_title(name)
        for ax in (left, middle, right):
            ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])
    for ax, what in zip(axes[:, 0], ("data", "density of the flow", "samples of the flow")):
        if several:
            ax.set_ylabel(what, fontsize=13)
        else:
            ax.set_title(what)
    headline(canvas, "Flows learn four densities from samples" if several else "A flow learns a density")
    canvas.savefig(args.out, dpi=110)
    print(f"picture     {args.out}")


def animate(flows: dict[str, CNF], args: argparse.Namespace) -> None:
    """The density at each time, from the standard normal to the data, with the paths of some samples over it."""
    frames = 8 if args.quick else 30
    canvas = plot.figure(3 * len(flows), 3.3)
    axes = canvas.subplots(1, len(flows), squeeze=False)[0]
    torch.manual_seed(args.seed)
    starts = [flow.base.sample((150,)) for flow in flows.values()]
    t = [i / frames for i in range(frames + 1)]
    t += [1.0] * (2 if args.quick else 8)  # a rest at the end

    def frame(i: int) -> list[Any]:
        for ax, (name, flow), z in zip(axes, flows.items(), starts):
            ax.clear()
            lim = (-LIMIT, LIMIT)
            plot.density_flow(ax, flow, t=t[i], xlim=lim, ylim=lim, points=50 if args.quick else 100)
            with torch.no_grad():
                ax.scatter(*flow.integrate(z, 0.0, t[i]).h.T, s=4, lw=0, color=COLORS[1])
            ax.set(aspect="equal", xticks=[], yticks=[], title=name)
        canvas.suptitle(f"t = {t[i]:.2f}", color=FAINT if t[i] == 0 else INK)
        return []

    out = args.out.with_suffix(".gif")
    FuncAnimation(canvas, frame, frames=len(t), init_func=lambda: []).save(out, PillowWriter(fps=10), dpi=70)
    print(f"animation   {out}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, check, print and draw; returns the numbers printed."""
    args = arguments(__doc__, "cnf_density", argv)
    names = ["two moons"] if args.quick else list(DENSITIES)
    flows = {name: learn(name, args) for name in names}
    checks = {name: check(flow, name, args) for name, flow in flows.items()}
    print(
        table(
            [
                "density",
                "log-likelihood",
                "of a Gaussian",
                "mass",
                "nfe",
                "there and back",
                "growth",
                "of tol x growth",
            ],
            [[name, *c.values()] for name, c in checks.items()],
            f"held-out log-likelihood per point; mass over the plane; forward, then inverse at rtol=atol={TOL:.0e}:\n"
            "the largest error; the most that the flow makes an error grow; the largest of tolerance x growth",
        )
    )
    parts = rows(args)
    scores = {**rivals(*parts, args), "continuous normalizing flow": flow_of_rows(*parts, args)}
    print(
        table(
            ["breast-cancer data", "log-likelihood"],
            [[name, score] for name, score in scores.items()],
            f"mean over {len(parts[2])} test rows, nats; standardised, 30 columns",
        )
    )
    with matplotlib.rc_context(STYLE):
        draw(flows, args)
        animate(flows, args)
    return {"densities": checks, "rows": scores}


if __name__ == "__main__":
    main()
