"""What a stiff method is given: Jacobians, mass matrices, starts of algebraic equations, and input that is wrong."""

import math
import warnings

import numpy as np
import pytest
import stiff_problems as sp
import torch

import pyjlode
from pyjlode import METHODS, errors, notices, odeint, solve
from pyjlode.native import linear

F64 = torch.float64
STIFF = [m.name for m in METHODS.values() if m.controlled]
MASS = [m.name for m in METHODS.values() if m.mass]
METHOD = pytest.mark.parametrize("method", STIFF)
WITH_MASS = pytest.mark.parametrize("method", MASS)
T = torch.tensor([0.0, 1.0], dtype=F64)


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# --- Jacobians -------------------------------------------------------------------------------------------------------


@METHOD
def test_users_jacobian_is_used(method):
    calls = []

    def jac(t, h):
        calls.append(t)
        return torch.diag(tensor(-1e4, -1.0))

    h = solve(lambda t, h: h * tensor(-1e4, -1.0), tensor(1.0, 1.0), T, method=method, rtol=1e-6, jac=jac, dense=False)
    assert calls
    assert h.stats.njac == len(calls)
    assert float((h.h[-1] - tensor(0.0, math.exp(-1))).abs().max()) < 1e-4


def test_what_autograd_refuses_is_differenced_with_one_warning(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())  # as in a process that has just begun

    def f(t, h):
        a, b = h.numpy()
        return torch.from_numpy(np.array([-1e4 * (a - np.cos(t.numpy())), -b * a]))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for method in ("rodas5p", "radau5", "bdf", "kvaerno5"):
            h = odeint(f, tensor(1.0, 1.0), tensor(0.0, 1.0), method=method, rtol=1e-6, atol=1e-6)[-1]
            assert abs(float(h[1]) - 0.43107) < 1e-4, h
    assert sum("finite differences" in str(x.message) for x in told) == 1


class Opaque(torch.autograd.Function):
    """The identity, with a derivative that no batch of cotangents passes at once."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.numpy().copy())


@pytest.mark.parametrize("mode", ["reverse_columns", "row by row", "difference_columns"])
@pytest.mark.parametrize("batch", [1, 4])
def test_jacobians_agree_with_autograd(mode, batch):
    A = torch.randn(3, 3, dtype=F64)

    def f(t, h):
        return torch.tanh(Opaque.apply(h @ A) if mode == "row by row" else h @ A) * torch.sin(t) - h**3

    h0 = torch.randn(batch, 3, dtype=F64)
    seen = {}

    def probe(p, stats):
        made = linear.Linear(p, stats)
        t = torch.tensor(0.3, dtype=F64)
        if mode == "difference_columns":
            seen["J"] = made.difference_columns(t, p.y0)
        else:
            seen["J"] = made.reverse_columns(t, p.y0, True)[1]
        seen["rate"] = made.time_derivative(t, p.y0)

    from pyjlode.native import stiff

    original, stiff.maker = stiff.maker, lambda p, stats: (probe(p, stats), original(p, stats))[1]
    try:
        odeint(f, h0, T, method="radau5", rtol=1e-3, options={"batch_dims": 1})
    finally:
        stiff.maker = original
    t = torch.tensor(0.3, dtype=F64)
    for i in range(batch):
        exact = torch.autograd.functional.jacobian(lambda h: f(t, h), h0[i])
        torch.testing.assert_close(seen["J"][i], exact, rtol=1e-7, atol=1e-7)
    rate = torch.tanh(h0 @ A) * torch.cos(t)
    torch.testing.assert_close(seen["rate"].reshape(batch, 3), rate, rtol=1e-9, atol=1e-9)


def test_a_jacobian_is_that_of_the_state_that_f_is_given():
    """f knows h0 by another way too: what it does with that is no part of df/dh."""
    h0 = tensor(1.0, 2.0).requires_grad_()

    def f(t, h):
        return -h * h0

    for method in ("rodas5p", "radau5"):
        h = odeint(f, h0, T, method=method, rtol=1e-8, atol=1e-8)[-1]
        (grad,) = torch.autograd.grad(h.sum(), h0)
        torch.testing.assert_close(grad, torch.exp(-h0) * (1 - h0), rtol=1e-5, atol=1e-6)


def test_a_field_that_does_not_depend_on_the_state():
    """Its Jacobian is zero, and no warning is due."""
    slope = tensor(1.0, 2.0)
    fields = ((lambda t, h: torch.cos(t).expand(2), tensor(1.0, 1.0) * math.sin(1)), (lambda t, h: slope, slope))
    for f, end in fields:
        h = odeint(f, tensor(0.0, 0.0), T, method="radau5", rtol=1e-8, atol=1e-8)[-1]
        torch.testing.assert_close(h, end, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["rodas5p", "rosenbrock23"])
def test_time_that_f_reads_as_a_number(method):
    """No derivative sees `float(t)`; the Rosenbrock methods keep their order all the same."""

    def f(t, h):
        return -50 * (h - math.sin(3 * float(t)))

    def seen(t, h):
        return -50 * (h - torch.sin(3 * t))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (solve(g, tensor(0.0), 3 * T, method=method, rtol=1e-5, atol=1e-5, dense=False) for g in (f, seen))
    assert a.stats.naccept <= 1.1 * b.stats.naccept + 2
    assert float((a.h[-1] - b.h[-1]).abs()) < 1e-4


@METHOD
def test_matrix_free(method, monkeypatch):
    """GMRES with products gives the same solution and gradient as LU."""
    n = 24
    start = tensor(*sp.heat_modes(n, 0.0))

    def run():
        scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
        h = odeint(
            lambda t, h: scale * sp.heat(t, h, torch) - h**3,
            start,
            tensor(0.0, 0.01),
            method=method,
            rtol=1e-4,
            atol=1e-5,
            adjoint=True,
        )
        return h[-1].detach(), torch.autograd.grad(h[-1].square().sum(), scale)[0]

    dense, slope = run()
    monkeypatch.setattr(linear, "DENSE_LIMIT", 4)
    free, slope_free = run()
    torch.testing.assert_close(free, dense, rtol=3e-3, atol=3e-4)
    torch.testing.assert_close(slope_free, slope, rtol=3e-3, atol=3e-4)


@METHOD
def test_complex_state(method):
    """Complex numbers are pairs of reals: the Jacobian need not be that of a holomorphic function."""
    h0 = torch.tensor([1.0 + 0.5j], dtype=torch.complex128)
    h = odeint(lambda t, h: -1000 * (h - torch.cos(t)) + 0.1 * h.conj(), h0, T, method=method, rtol=1e-6, atol=1e-6)
    alone = odeint(lambda t, h: -1000 * (h - torch.cos(t)) + 0.1 * h, tensor(1.0), T, method="radau5", rtol=1e-8)
    assert h.dtype == torch.complex128
    assert abs(h[-1, 0].real - alone[-1, 0]) < 1e-4
    assert abs(h[-1, 0].imag) < 1e-4


@METHOD
def test_float32(method):
    h0 = torch.tensor([1.0, 2.0])
    h = odeint(lambda t, h: torch.stack([-500 * (h[0] - h[1]), -h[1]]), h0, T, method=method, rtol=1e-4, atol=1e-5)
    assert h.dtype == torch.float32
    assert h[-1, 1] == pytest.approx(2 * math.exp(-1), rel=3e-3)
    assert h[-1, 0] == pytest.approx(2 * math.exp(-1) * 500 / 499, rel=3e-3)


@METHOD
@pytest.mark.parametrize("shape", [(0,), (), (2, 3)])
def test_shapes(method, shape):
    h0 = torch.full(shape, 2.0, dtype=F64)
    h = odeint(lambda t, h: -3 * h, h0, T, method=method, rtol=1e-7, atol=1e-7)
    assert h.shape == (2, *shape)
    torch.testing.assert_close(h[-1], h0 * math.exp(-3), rtol=1e-4, atol=1e-4)


@METHOD
def test_jumps_and_backward_time(method):
    def f(t, h):
        return torch.where(t < 0.5, -20 * h, 20 - 20 * h)

    kwargs = {"method": method, "rtol": 1e-7, "atol": 1e-9, "options": {"jump_t": [0.5]}}
    h = odeint(f, tensor(1.0), T, **kwargs)[-1]
    exact = 1 + (math.exp(-10) - 1) * math.exp(-10)
    assert float(h) == pytest.approx(exact, abs=3e-6)
    back = odeint(lambda t, h: torch.sin(t) - 0.5 * h, tensor(1.0), T.flip(0), method=method, rtol=1e-7, atol=1e-9)[-1]
    there = odeint(lambda t, h: torch.sin(t) - 0.5 * h, back, T, rtol=1e-10)[-1]
    assert float(there) == pytest.approx(1.0, abs=1e-4)


@METHOD
def test_event(method):
    """h' = -h crosses 1/2 at log 2, with its derivative."""
    rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
    tol = 1e-7 if method == "rosenbrock23" else 1e-9
    event_t, _ = odeint(
        lambda t, h: -rate * h, tensor(1.0), T, method=method, rtol=tol, atol=tol, event_fn=lambda t, h: h - 0.5
    )
    assert float(event_t.detach()) == pytest.approx(math.log(2), abs=1e-5)
    assert float(torch.autograd.grad(event_t, rate)[0]) == pytest.approx(-math.log(2), abs=1e-4)


# --- Mass matrices ---------------------------------------------------------------------------------------------------

SINGULAR = torch.diag(tensor(1.0, 1.0, 0.0))


def robertson_dae(t, h):
    a, b, c = h.unbind(-1)
    slow, fast, back = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return torch.stack([back - slow, slow - back - fast, a + b + c - 1], -1)


@WITH_MASS
def test_robertson_as_a_dae(method):
    P = sp.ROBERTSON_40
    tol = 1e-7
    solution = solve(
        robertson_dae, P.y0, P.times, method=method, rtol=tol, atol=P.atol(tol), mass_matrix=SINGULAR, dense=False
    )
    assert P.error(solution.h[-1], tol) < 30
    assert float(solution.h[-1].sum()) == pytest.approx(1.0, abs=1e-9)


@WITH_MASS
def test_regular_mass_matrix_is_a_change_of_variables(method):
    M = tensor(2.0, 1.0, 0.0, 0.5, 3.0, 1.0, 0.0, 0.2, 1.0).reshape(3, 3)
    A = torch.tensor([[-100.0, 1.0, 0.0], [0.0, -1.0, 2.0], [0.0, -2.0, -1.0]], dtype=F64)
    h0 = tensor(1.0, 2.0, 3.0)
    h = odeint(lambda t, h: A @ h, h0, T, method=method, rtol=1e-8, atol=1e-8, mass_matrix=M)[-1]
    exact = torch.matrix_exp(torch.linalg.solve(M, A)) @ h0
    assert float((h - exact).abs().max()) < 1e-6


@WITH_MASS
def test_a_mass_matrix_that_is_not_diagonal(method):
    """M and f of the semi-explicit x' = -x + z, 0 = x² - z, in other coordinates and with other equations."""
    L, R = tensor(1.0, 2.0, -1.0, 1.0).reshape(2, 2), tensor(2.0, 1.0, 1.0, 1.0).reshape(2, 2)
    M = L @ torch.diag(tensor(1.0, 0.0)) @ R

    def f(t, h):
        x, z = R @ h
        return L @ torch.stack([-x + z, x * x - z])

    h0 = torch.linalg.solve(R, tensor(0.5, 0.25))
    x, z = R @ odeint(f, h0, T, method=method, rtol=1e-8, atol=1e-8, mass_matrix=M)[-1]
    assert float(x) == pytest.approx(1 / (1 + math.e), abs=1e-6)  # x' = x² - x
    assert float(z) == pytest.approx(float(x) ** 2, abs=1e-7)


@WITH_MASS
@pytest.mark.parametrize("points", [(0.2, 0.5, 0.9)])
def test_order_on_a_dae_holds_in_its_dense_output(method, points):
    t = tensor(0.0, *points, 1.0)
    h = odeint(
        lambda t, h: torch.stack([-h[0] + h[1], h[0] ** 2 - h[1]]),
        tensor(0.5, 0.25),
        t,
        method=method,
        rtol=1e-8,
        atol=1e-8,
        mass_matrix=torch.diag(tensor(1.0, 0.0)),
    )
    x = 1 / (1 + torch.exp(t))
    assert float((h - torch.stack([x, x * x], -1)).abs().max()) < 3e-7


@WITH_MASS
def test_batch_of_daes(method):
    def f(t, h):
        return torch.stack([-h[..., 0] + h[..., 1], h[..., 0] ** 2 - h[..., 1]], -1)

    x = tensor(0.5, 0.2, 0.7)
    h = odeint(
        f,
        torch.stack([x, x * x], -1),
        T,
        method=method,
        rtol=1e-8,
        atol=1e-8,
        mass_matrix=torch.diag(tensor(1.0, 0.0)),
        options={"batch_dims": 1},
    )
    exact = 1 / (1 + (1 / x - 1) * math.e)
    assert float((h[-1] - torch.stack([exact, exact**2], -1)).abs().max()) < 1e-6


@WITH_MASS
def test_inconsistent_start(method):
    kwargs = {"method": method, "mass_matrix": SINGULAR}
    wrong = tensor(1.0, 0.0, 0.1)
    with pytest.raises(errors.InconsistentStart, match="compute"):
        odeint(robertson_dae, wrong, T, **kwargs)
    h = odeint(robertson_dae, wrong, T, **kwargs, options={"consistent": "compute"})
    assert h[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-15)
    torch.testing.assert_close(h, odeint(robertson_dae, tensor(1.0, 0.0, 0.0), T, **kwargs), rtol=1e-9, atol=1e-12)


def test_gradient_of_a_computed_start():
    """h[0] is a function of the differential part and of the parameters: by the implicit function theorem."""
    h0, p = tensor(2.0, 7.0).requires_grad_(), torch.tensor(3.0, dtype=F64, requires_grad=True)
    h = odeint(
        lambda t, h: torch.stack([-h[0], p * h[0] ** 2 - h[1] ** 3]),
        h0,
        T,
        method="radau5",
        mass_matrix=torch.diag(tensor(1.0, 0.0)),
        options={"consistent": "compute"},
    )
    z = (3 * 4.0) ** (1 / 3)
    assert float(h[0, 1]) == pytest.approx(z)
    dh0, dp = torch.autograd.grad(h[0, 1], (h0, p))
    assert dh0.tolist() == pytest.approx([2 * 3 * 2.0 / (3 * z * z), 0.0])
    assert float(dp) == pytest.approx(4.0 / (3 * z * z))


@WITH_MASS
def test_higher_index(method):
    """x' = z, 0 = x - sin t is of index 2."""
    with pytest.raises(errors.HighIndex, match="index 1"):
        odeint(
            lambda t, h: torch.stack([h[1], h[0] - torch.sin(t)]),
            tensor(0.0, 1.0),
            T,
            method=method,
            mass_matrix=torch.diag(tensor(1.0, 0.0)),
        )


# --- Wrong input -----------------------------------------------------------------------------------------------------


def decay(t, h):
    return -h


WRONG = {
    "mass of another shape": (errors.BadShape, {"mass_matrix": torch.eye(3)}),
    "mass that is no matrix": (errors.BadShape, {"mass_matrix": "M"}),
    "complex mass": (errors.BadDtype, {"mass_matrix": torch.eye(2, dtype=torch.complex128)}),
    "nan mass": (errors.NonFiniteState, {"mass_matrix": torch.full((2, 2), math.nan)}),
    "mass for an explicit method": (errors.BadOption, {"mass_matrix": torch.eye(2), "method": "dopri5"}),
    "mass for kvaerno5": (errors.BadOption, {"mass_matrix": torch.eye(2), "method": "kvaerno5"}),
    "mass and a complex state": (
        errors.BadDtype,
        {"mass_matrix": torch.eye(4), "h0": torch.ones(2, dtype=torch.complex128)},
    ),
    "jac that is no function": (errors.BadOption, {"jac": torch.eye(2)}),
    "jac for an explicit method": (errors.BadOption, {"jac": lambda t, h: -torch.eye(2), "method": "dopri5"}),
    "jac of another shape": (errors.BadShape, {"jac": lambda t, h: torch.eye(3)}),
    "jac for a pytree": (errors.BadOption, {"jac": decay, "h0": (tensor(1.0), tensor(1.0))}),
    "batch_dims of a vector": (errors.BadOption, {"options": {"batch_dims": 1}}),
    "batch_dims that is no integer": (errors.BadOption, {"options": {"batch_dims": 0.5}}),
    "batch_dims of a pytree": (
        errors.BadOption,
        {"options": {"batch_dims": 1}, "h0": (torch.ones(2, 2, dtype=F64), torch.ones(3, 2, dtype=F64))},
    ),
    "adjoint_method that takes no mass": (
        errors.BadOption,
        {"mass_matrix": torch.eye(2), "adjoint": "gauss", "adjoint_method": "dopri5"},
    ),
    "unknown consistent": (errors.BadOption, {"options": {"consistent": "maybe"}}),
    "backsolve": (errors.BadOption, {"adjoint": "backsolve"}),
    "backsolve with a mass": (
        errors.BadOption,
        {"adjoint": "backsolve", "mass_matrix": torch.eye(2), "options": {"allow_unstable": True}},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case):
    kind, wrong = WRONG[case]
    given = {"method": "radau5", "h0": torch.ones(2, dtype=F64), **wrong}
    f = (lambda t, h: tuple(-x for x in h)) if isinstance(given["h0"], tuple) else decay
    with pytest.raises(kind) as caught:
        odeint(f, given.pop("h0"), T, **given)
    assert isinstance(caught.value, errors.PyJLODEError)


@METHOD
def test_blow_up_and_nan(method):
    with pytest.raises(errors.SolveError) as caught:
        odeint(lambda t, h: h * h, tensor(1.0), 2 * T, method=method, rtol=1e-4, atol=1e-4)
    assert caught.value.t == pytest.approx(1.0, abs=1e-2)

    def cliff(t, h):
        return torch.where(t < 0.5, -h, h * math.nan)

    with pytest.raises(errors.NonFiniteState) as caught:
        odeint(cliff, tensor(1.0), T, method=method, rtol=1e-4, atol=1e-4)
    assert caught.value.t == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", [m for m in STIFF if m not in {"auto", "rodas5p", "rosenbrock23"}])
def test_newton_that_never_converges(method):
    """With a Jacobian of the wrong sign and size nothing converges, however small the step that rounding allows."""
    with pytest.raises(errors.NotConverged, match="jac="):
        odeint(
            lambda t, h: -h - 1e12 * (h - torch.cos(t)),
            tensor(1.0),
            T + 1,
            method=method,
            jac=lambda t, h: torch.full((1, 1), 1e30, dtype=F64),
            options={"first_step": 0.1},
        )


@METHOD
def test_singular_iteration_matrix_is_stepped_around(method):
    """1/(γ dt) is an eigenvalue of J at one dt: another dt does it."""
    row = METHODS[method]
    gamma = getattr(row.tableau, "gamma", 1.0)
    dt = 0.1
    rate = 1 / (gamma * dt) if isinstance(gamma, float) else 1 / (dt / float(row.tableau.alpha[1]))
    rate = row.tableau.real / dt if method == "radau5" else rate
    h = odeint(
        lambda t, h: rate * h,
        tensor(1.0),
        tensor(0.0, 0.2),
        method=method,
        rtol=1e-6,
        atol=1e-6,
        options={"first_step": dt},
    )
    assert float(h[-1]) == pytest.approx(math.exp(rate * 0.2), rel=1e-3)


def test_too_small_step_of_an_explicit_method_names_auto():
    with pytest.raises(errors.StepSizeTooSmall, match="method='auto'"):
        odeint(lambda t, h: -1e9 * (h - torch.cos(t)), tensor(1.0), T, options={"min_step": 1e-3})


def test_trbdf2_has_fixed_steps_and_trbdf2_adaptive_chooses_them():
    f, h0 = lambda t, h: -100 * (h - torch.cos(t)), tensor(0.0)
    adaptive = solve(f, h0, T, method="trbdf2_adaptive", rtol=1e-5, atol=1e-5)
    fixed = solve(f, h0, T, method="trbdf2", options={"step_size": 0.01})
    assert solve(f, h0, T, method="trbdf2").stats.naccept == len(T) - 1
    assert adaptive.stats.nlu > 0
    assert fixed.stats.naccept == 100
    assert float((adaptive.h[-1] - math.cos(1)).abs()) < 0.02


def test_options_that_a_stiff_method_does_not_know_are_named():
    with pytest.warns(UserWarning, match="step_size"):
        pyjlode.odeint(decay, tensor(1.0), T, method="radau5", options={"step_size": 0.1})
