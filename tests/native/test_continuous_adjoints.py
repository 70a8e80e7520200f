"""The backward solves of the continuous adjoints: their tolerances, grids, quadrature, and systems with an integral."""

import functools
import math

import numpy as np
import pytest
import torch
from designs import covering, latin

from pyjlode import odeint
from pyjlode.native.sensitivity import gauss_kronrod

F64 = torch.float64
CONTINUOUS = ["backsolve", "interpolating", "quadrature", "gauss"]
PEOPLE = 14e6
# Rates of infection, incubation and recovery, a day.
RATES = torch.tensor([0.5, 0.2, 0.15], dtype=F64)


def seir(t, h, rates):
    s, e, i, _ = h.unbind(-1)
    infected, ill, well = rates[0] * s * i / PEOPLE, rates[1] * e, rates[2] * i
    return torch.stack([-infected, infected - ill, ill - well, well], -1)


@functools.cache
def seir_gradient(adjoint, tol=1e-5, factor=1.0, unit=1.0, **kwargs):
    """Of `(h / people).square().sum() * factor` by the rates, with the state counted in `unit`."""
    rates = RATES.clone().requires_grad_()
    start = torch.tensor([PEOPLE - 10, 0.0, 10.0, 0.0], dtype=F64, requires_grad=True)
    h = odeint(
        lambda t, h: seir(t, h * unit, rates) / unit,
        start / unit,
        torch.linspace(0, 160, 9, dtype=F64),
        adjoint=adjoint,
        rtol=tol,
        atol=tol / unit,
        engine="torch",
        **kwargs,
    )
    loss = factor * (h * unit / PEOPLE).square().sum()
    of_rates, of_start = torch.autograd.grad(loss, (rates, start))
    return of_rates, of_start * PEOPLE


@pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
@pytest.mark.parametrize("adjoint", CONTINUOUS)
def test_a_loss_of_normalised_populations(adjoint, method):
    """The adjoint is some 1e-7 of what atol is for."""
    if method == "rodas5p" and adjoint == "backsolve":
        pytest.skip("a stiff method does not solve backward")
    for gradient, expected in zip(seir_gradient(adjoint, method=method), seir_gradient(False, 1e-8)):
        size = float(expected.abs().max())  # a state that is solved backward loses a factor of 100
        torch.testing.assert_close(gradient, expected, rtol=0, atol=(3e-1 if adjoint == "backsolve" else 2e-3) * size)


@pytest.mark.parametrize(("adjoint", "factor"), [*zip(CONTINUOUS, [1e-9, 1e9, -1e-30, 1e-9])])
def test_the_gradient_of_a_scaled_loss_is_the_scaled_gradient(adjoint, factor):
    for one, other in zip(seir_gradient(adjoint), seir_gradient(adjoint, factor=factor)):
        torch.testing.assert_close(other / factor, one, rtol=1e-8, atol=1e-12 * float(one.abs().max()))


@pytest.mark.parametrize("unit", [1e-12, 1e6, 1e12])
@pytest.mark.parametrize("adjoint", ["interpolating", "gauss"])
def test_the_gradient_does_not_depend_on_the_unit_of_the_state(adjoint, unit):
    for one, other in zip(seir_gradient(adjoint), seir_gradient(adjoint, unit=unit)):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9 * float(one.abs().max()))


def test_states_in_units_of_their_own_and_small_ones():
    """Each element of the adjoint is controlled in its own unit; one of the same unit as a large one, as that is."""

    def gradient(adjoint, tol):
        k = torch.tensor([0.3, 1.1], dtype=F64, requires_grad=True)
        start = torch.tensor([1e9, 1e-6, 1e-8], dtype=F64, requires_grad=True)

        def f(t, h):
            x, y, z = h[0] / 1e9, h[1] / 1e-6, h[2]
            dx, dy = -k[0] * x * y + 0.2 * torch.sin(t), k[1] * (x - y) + z
            return torch.stack([dx * 1e9, dy * 1e-6, -k[0] * z * (1 + y)])

        atol = torch.tensor([1e9, 1e-6, 1.0], dtype=F64) * tol
        h = odeint(f, start, torch.linspace(0, 5, 3, dtype=F64), adjoint=adjoint, rtol=tol, atol=atol, engine="torch")
        loss = (h / start.detach()[:2].new_tensor([1e9, 1e-6, 1.0])).square().sum()
        of_k, of_start = torch.autograd.grad(loss, (k, start))
        return torch.cat([of_k, of_start * torch.tensor([1e9, 1e-6, 1.0], dtype=F64)])

    expected = gradient(False, 1e-12)
    for adjoint in CONTINUOUS:
        torch.testing.assert_close(gradient(adjoint, 1e-7), expected, rtol=2e-5, atol=1e-6)


def test_adjoint_atol_is_absolute():
    """Said by the user it is in the units of the adjoint: a loss that is as small as it is has no control left."""
    loose = seir_gradient("gauss", adjoint_atol=1.0, factor=1e-3)[0] * 1e3
    tight = seir_gradient("gauss", adjoint_atol=1e-14)[0]
    expected = seir_gradient("gauss")[0]
    torch.testing.assert_close(tight, expected, rtol=1e-4, atol=1e-4)
    assert float((loose - expected).abs().max()) > 1e-2


# Methods over a grid, and what a step of a fortieth leaves of e^-3.
GRIDDED = {"euler": 0.2, "midpoint": 6e-3, "rk4": 1e-5, "implicit_adams": 1e-5, "trapezoid": 6e-3, "gl4": 1e-5}


@pytest.mark.parametrize(
    ("adjoint", "method", "times", "sign"),
    covering(CONTINUOUS, GRIDDED, [[0.0, 1.0], [0.0, 0.35, 0.5, 1.0]], [1.0, -1.0]),
)
def test_the_backward_solve_goes_over_the_forward_solves_grid(adjoint, method, times, sign):
    """41 points over [0, 1], whatever the outputs are; forward and backward in time."""
    h0 = torch.ones(1, dtype=F64, requires_grad=True)
    k = torch.tensor(3.0, dtype=F64, requires_grad=True)
    made = []

    def grid(f, h, t):
        made.append(t.tolist())
        return torch.linspace(0, sign, 41, dtype=F64)

    h = odeint(
        lambda t, h: -sign * k * h,
        h0,
        sign * torch.tensor(times, dtype=F64),
        method=method,
        adjoint=adjoint,
        options={"grid_constructor": grid, "interp": "cubic"},
        engine="torch",
    )
    of_h0, of_k = torch.autograd.grad(h[-1].sum(), (h0, k))
    assert len(made) == 1  # the user's function is not asked again
    expected = math.exp(-3)
    assert abs(float(of_h0) / expected - 1) < GRIDDED[method]
    assert abs(float(of_k) / expected + 1) < 2 * GRIDDED[method]


def test_the_adjoint_may_have_a_grid_or_steps_of_its_own():
    calls = []

    def grid(f, h, t):
        calls.append(t.tolist())
        return torch.linspace(float(t[0]), float(t[-1]), 51, dtype=F64)

    for options in ({"grid_constructor": grid}, {"step_size": 0.02}):
        h0 = torch.ones(1, dtype=F64, requires_grad=True)
        h = odeint(
            lambda t, h: -3 * h,
            h0,
            torch.tensor([0.0, 0.5, 1.0], dtype=F64),
            method="rk4",
            adjoint="backsolve",
            options={"grid_constructor": lambda f, h, t: torch.linspace(0, 1, 3, dtype=F64)},
            adjoint_options=options,
            engine="torch",
        )
        steps = torch.autograd.grad(h[-1].sum(), h0)[0]
        assert abs(float(steps) / math.exp(-3) - 1) < 1e-5
    assert calls == [[1.0, 0.5], [0.5, 0.0]]


def kinked(name, t, h, p):
    if name == "log":
        rate = torch.where(h[1] > 0, torch.log1p(h[1].clamp_min(0)), 0.0)
        return torch.stack([0.1 * p[0] * rate, -p[1] * h[0] * torch.sin(p[2] * t)])
    if name == "relu":
        return torch.stack([-p[0] * torch.relu(h[1]) + p[1] * torch.sin(p[2] * t), p[2] * h[0] - 0.1 * h[1]])
    # The adjoint is constant here, and its steps are as long as can be.
    return torch.stack([p[0] * torch.relu(torch.sin(5 * t)), p[1] * torch.cos(3 * t).abs() + p[2] * t])


@pytest.mark.parametrize(("name", "method"), latin(["log", "relu", "time"], ["dopri8", "dopri5", "rodas5p"]))
def test_gauss_sees_kinks(name, method):
    """It is `quadrature`, which subdivides, where its own rule would miss one."""
    gradients = []
    for adjoint in ("gauss", "quadrature"):
        p = torch.tensor([1.3, 0.7, 2.0], dtype=F64, requires_grad=True)
        h0 = torch.tensor([1.0, 0.2], dtype=F64)
        t = torch.linspace(0, 3, 4, dtype=F64)
        h = odeint(lambda t, h, p=p: kinked(name, t, h, p), h0, t, method=method, rtol=1e-6, atol=1e-6, adjoint=adjoint)
        gradients.append(torch.autograd.grad(h.square().sum(), p)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    if name == "time":
        # h0 = 1 + p0 ∫ relu(sin 5t), h1 = 0.2 + p1 ∫ |cos 3t| + p2 t²/2, by the midpoint rule.
        s = (torch.arange(300000, dtype=F64) + 0.5) * 1e-5
        parts = torch.stack([torch.relu(torch.sin(5 * s)), torch.cos(3 * s).abs(), s]).cumsum(1)[:, 99999::100000]
        parts = parts * 1e-5
        h1 = 0.2 + 0.7 * parts[1] + 2.0 * parts[2]
        expected = torch.stack([2 * (1 + 1.3 * parts[0]) @ parts[0], 2 * h1 @ parts[1], 2 * h1 @ parts[2]])
        torch.testing.assert_close(gradients[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("m", range(1, 9))
def test_kronrod_rules_have_their_degree(m):
    """3 m + 1, and 2 m - 1 of the Gauss rule within; positive weights and nodes inside."""
    pair = gauss_kronrod(m)
    assert pair.nodes.min() > 0
    assert pair.nodes.max() < 1
    assert pair.weights.min() > 0
    for k in range(3 * m + 2):
        assert abs((pair.weights * pair.nodes**k).sum() - 1 / (k + 1)) < 1e-14
    for k in range(2 * m):
        assert abs((pair.embedded * pair.nodes**k).sum() - 1 / (k + 1)) < 1e-14
    if m == 7:  # QUADPACK, dqk15
        assert abs(np.sort(2 * pair.nodes - 1)[-1] - 0.991455371120812639206854697526329) < 1e-14


def robertson_gradient(method, adjoint, tol):
    """By the logarithms of the rates, through an integral beside the differential-algebraic system."""
    logs = torch.zeros(3, dtype=F64, requires_grad=True)
    rates = torch.tensor([0.04, 3e7, 1e4], dtype=F64)

    def f(t, h):
        k = rates * torch.exp(logs)
        a, b, c, _ = h.unbind(-1)
        slow, fast, back = k[0] * a, k[1] * b * b, k[2] * b * c
        return torch.stack([back - slow, slow - back - fast, a + b + c - 1, c])

    h = odeint(
        f,
        torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=F64),
        torch.tensor([0.0, 4.0, 40.0], dtype=F64),
        method=method,
        rtol=tol,
        atol=tol * torch.tensor([1.0, 1e-4, 1.0, 1.0], dtype=F64),
        mass_matrix=torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64)),
        options={"max_num_steps": 2000},
        adjoint=adjoint,
        engine="torch",
    )
    return torch.autograd.grad(h[-1, 3] + h[1, 0], logs)[0]


@pytest.mark.parametrize("tol", [1e-4, pytest.param(1e-5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adjoint", ["quadrature", "gauss"])  # which is "interpolating" of these methods
@pytest.mark.parametrize("method", ["rodas5p", "radau5", "bdf"])
def test_an_integral_beside_algebraic_equations(method, adjoint, tol):
    """The adjoint of an integral is constant, and that of all else starts from nothing: f's dependence on time cannot
    be seen at the start, and the backward solve must not conclude that there is none."""
    expected = torch.tensor([5.11600, 1.79850, -3.59677], dtype=F64)
    gradient = robertson_gradient(method, adjoint, tol)
    torch.testing.assert_close(gradient, expected, rtol=max(30 * tol, 1e-4), atol=0)


def test_an_f_that_begins_to_read_the_time_as_a_number_later():
    """A dose that starts at t = 1, read off through Python: rodas5p's derivative in time is looked for again."""
    states = []

    def by_number(t, h):
        s = float(t.detach())
        return -1e3 * (h - (math.sin(3 * (s - 1)) if s > 1 else 0.0))

    for f in (by_number, lambda t, h: -1e3 * (h - torch.where(t > 1, torch.sin(3 * (t - 1)), 0.0))):
        h0, t = torch.ones(1, dtype=F64), torch.tensor([0.0, 1.0, 3.0], dtype=F64)
        states.append(odeint(f, h0, t, method="rodas5p", rtol=1e-6, atol=1e-9, engine="torch"))
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
