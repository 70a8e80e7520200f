"""Every method against closed forms: in both precisions, in both directions of time, and what the methods conserve.

Tolerances follow from the method: C dt^order for fixed steps, a factor of rtol for adaptive ones, and the roundings of
the precision for both; times what the problem itself does to an error on its way.
"""

import functools

import pytest
import torch
from designs import covering
from problems import COSINE, FEHLBERG, LINEAR, LOGISTIC, OSCILLATOR, PROBLEMS, max_error

from pyjlode import METHODS, odeint

FIRST_ORDER = [m for m in METHODS.values() if m.kind != "second"]
NATIVE = [m for m in FIRST_ORDER if m.kind != "scipy"]
IMPLICIT = [m for m in NATIVE if m.kind == "implicit"]
# A symmetric method with step -dt undoes its step with dt (Hairer, Lubich & Wanner, Geometric Numerical Integration,
# V.1); Gauss methods conserve quadratic invariants (IV.2).
SYMMETRIC = {"implicit_midpoint", "trapezoid", "gl4", "gl6"}
GAUSS = {"implicit_midpoint", "gl4", "gl6"}
# Errors of a solve in units of its tolerance, on a problem that does not amplify them. RKF1(2)'s error estimate is
# (k1 - k3)/512 while the error of its solution has no such factor; LSODA's local errors add up over many steps.
# So do those of variable order; ode23s's estimate is of the L-stable part of its error.
WITHIN = {
    "fehlberg2": 5120.0,
    "scipy_solver": 100.0,
    "bdf": 100.0,
    "rosenbrock23": 100.0,
    "trbdf2_adaptive": 100.0,  # its estimate is damped, and a low order takes many steps
    "kencarp4": 30.0,
    "kencarp5": 60.0,  # where f is linear its estimate is of order 6
    "kvaerno5": 12.0,
}

DTYPES = [torch.float32, torch.float64]
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def each(methods):
    return pytest.mark.parametrize("method", list(methods), ids=lambda method: method.name)


def each_problem(problems):
    return pytest.mark.parametrize("problem", problems, ids=lambda problem: problem.name)


def met(slowly=(), **axes):
    """Cases in which any two values of these parameters meet; those with values of `slowly` are slow."""
    cases = [
        pytest.param(*case.values, marks=pytest.mark.slow if any(x in slowly for x in case.values) else ())
        for case in covering(*axes.values())
    ]
    return pytest.mark.parametrize(list(axes), cases, ids=lambda x: getattr(x, "name", str(x)))


@functools.cache
def amplification(problem, backward):
    """The largest factor by which the flow between two times of the span multiplies an error: max |dh(t)/dh(s)|.

    From products of exp(dt df/dh) along the exact solution.
    """
    t = problem.times(401, backward=backward)
    middle, dt = (t[1:] + t[:-1]) / 2, float(t[1] - t[0])
    factors = [
        torch.matrix_exp(dt * torch.autograd.functional.jacobian(functools.partial(problem.f, x), h))
        for x, h in zip(middle, problem.exact(middle))
    ]
    largest, since = 1.0, torch.zeros(0, *factors[0].shape, dtype=torch.float64)
    for factor in factors:
        since = factor @ torch.cat([since, torch.eye(len(factor), dtype=torch.float64)[None]])  # from every s to here
        largest = max(largest, float(torch.linalg.matrix_norm(since, 2).max()))
    return largest


def order_in_theory(method):
    # The first steps of an Adams method are of order 4.
    return min(method.order, 5) if method.kind == "adams" else method.order


def steps(method):
    """Steps of a fixed-step solve over a span."""
    return 240 if method.order == 1 else 48


def settings(method, dtype):
    """Tolerances and options of a solve; those of the implicit methods are for their iterations."""
    if method.adaptive:
        tol = 1e-5 if dtype == torch.float32 or method.order in (2, 3) else 1e-9
        return {"rtol": tol, "atol": tol}
    tol = 1e-5 if dtype == torch.float32 else 1e-11
    return {"rtol": tol, "atol": tol, "options": {"max_iters": 50} if method.kind in ("adams", "implicit") else {}}


def grid(method, problem, backward):
    """Output times: the grid of the fixed-step methods, and nine times for the adaptive ones."""
    return problem.times(9 if method.adaptive else steps(method) + 1, backward=backward)


def allowed(method, problem, dtype, backward):
    """The error that theory allows for; the numbers 2 and 10 stand for the derivatives of f, which are of order 1."""
    if method.adaptive:
        error = WITHIN.get(method.name, 10.0) * settings(method, dtype)["rtol"]
    else:
        dt = (problem.t1 - problem.t0) / steps(method)
        # Adams' formulas look back over several steps.
        error = 10 * ((6 if method.kind == "adams" else 2) * dt) ** order_in_theory(method)
        if method.kind != "fixed":
            error += 10 * settings(method, dtype)["rtol"]
    # Roundings may be of one sign: a few in each of some hundred steps.
    error += 4 * max(steps(method), 100) * torch.finfo(dtype).eps
    size = float(problem.exact(problem.times(50)).abs().max())
    # A reversible method undoes in its second state what it does in the first: that grows as errors do backward.
    both = [backward, not backward] if method.kind == "reversible" else [backward]
    return error * size * max(amplification(problem, direction) for direction in both)


@met(slowly=(LINEAR, OSCILLATOR), method=FIRST_ORDER, problem=PROBLEMS, dtype=DTYPES, backward=[False, True])
def test_closed_form(method, problem, dtype, backward):
    """The solution is the exact one within what order, tolerance and precision allow for."""
    t = grid(method, problem, backward)
    h0 = problem.exact(t[0]).to(dtype)
    h = odeint(problem.f, h0, t, method=method.name, **settings(method, dtype))
    assert h.dtype == dtype
    assert h.shape == (len(t), *h0.shape)
    assert max_error(h, problem.exact(t)) < allowed(method, problem, dtype, backward)


@met(method=[m for m in NATIVE if m.order >= 4], problem=[LINEAR, OSCILLATOR, LOGISTIC], backward=[False, True])
def test_six_digits_in_float64(method, problem, backward):
    """What a person may count on, whatever the theory's constants: order 4 and up, at the settings above, is good to
    1e-6 of the state where the problem does not amplify errors."""
    t = grid(method, problem, backward)
    h = odeint(problem.f, problem.exact(t[0]), t, method=method.name, **settings(method, torch.float64))
    scale = amplification(problem, backward) * float(problem.exact(t).abs().max())
    digits = 2e-5 if method.kind == "adams" else 1e-6
    assert max_error(h, problem.exact(t)) < digits * scale


# --- There and back --------------------------------------------------------------------------------------------------


@met(slowly=(LINEAR, OSCILLATOR), method=FIRST_ORDER, problem=[LINEAR, OSCILLATOR, LOGISTIC, COSINE], dtype=DTYPES)
def test_there_and_back(method, problem, dtype):
    """The flow of f back in time is the inverse of its flow: a solve to t1 and one back end at h0."""
    t = grid(method, problem, False)
    h0 = problem.h0.to(dtype)
    there = odeint(problem.f, h0, t, method=method.name, **settings(method, dtype))[-1]
    back = odeint(problem.f, there, t.flip(0), method=method.name, **settings(method, dtype))[-1]
    error = allowed(method, problem, dtype, False) * amplification(problem, True)
    assert max_error(back, h0) < error + allowed(method, problem, dtype, True)


@each(IMPLICIT)
@each_problem([COSINE, FEHLBERG])
def test_symmetric_methods_are_reversible(method, problem):
    """A symmetric method undoes its own steps, however wrong they are; the others return only as near as their order.

    The steps are large: the solution itself is wrong in the third digit or so.
    """
    t = problem.times(13)
    there = odeint(problem.f, problem.h0, t, method=method.name)
    back = odeint(problem.f, there[-1], t.flip(0), method=method.name)
    gap = max_error(back.flip(0), there)
    assert max_error(there, problem.exact(t)) > 1e-8
    if method.name in SYMMETRIC:
        assert gap < 1e-12 * amplification(problem, True)
    else:
        assert gap > 1e-7


# --- Invariants ------------------------------------------------------------------------------------------------------

INERTIA = torch.tensor([2.0, 1.0, 2 / 3], dtype=torch.float64)


def rigid_body(t, y):
    """Euler's equations of a free rigid body; y is its angular momentum (Hairer, Lubich & Wanner, IV.1)."""
    return torch.linalg.cross(y, y / INERTIA.to(y))


def drift(method, invariant, n=40, dt=0.25):
    t = dt * torch.arange(n + 1, dtype=torch.float64)
    h0 = torch.tensor([0.8, 0.2, 0.9], dtype=torch.float64)
    y = odeint(rigid_body, h0, t, method=method.name, options={"max_iters": 50})
    values = invariant(y)
    return float((values - values[0]).abs().max())


@each(IMPLICIT)
def test_gauss_methods_conserve_quadratic_invariants(method):
    """Energy and angular momentum squared are constant to rounding with Gauss methods, and with no other of the
    implicit ones (of those here, only theirs have b_i a_ij + b_j a_ji = b_i b_j; Cooper 1987)."""
    energy = drift(method, lambda y: (y.square() / INERTIA).sum(-1) / 2)
    momentum = drift(method, lambda y: y.square().sum(-1))
    if method.name in GAUSS:
        assert max(energy, momentum) < 1e-12
    else:
        assert max(energy, momentum) > 1e-8


@each(FIRST_ORDER)
@PRECISIONS
def test_every_method_conserves_linear_invariants(method, dtype):
    """Where the components of f add up to zero, the sum of the state is constant to rounding (Hairer, Lubich & Wanner,
    IV.1.5): a chain of reactions loses no mass, however wrong its course is."""

    def reaction(t, y):
        a, b, c = y.unbind()
        first, second = 2 * a, 3 * b * c
        return torch.stack([second - first, first - second, torch.zeros_like(a)])

    t = torch.linspace(0, 3, 31, dtype=torch.float64)
    h0 = torch.tensor([1.0, 0.5, 0.25], dtype=dtype)
    options = {"max_iters": 50} if method.kind in ("adams", "implicit") else {}
    h = odeint(reaction, h0, t, method=method.name, rtol=1e-4, atol=1e-4, options=options)
    assert max_error(h.double().sum(-1), h0.double().sum().expand(31)) < 500 * torch.finfo(dtype).eps
    assert max_error(h[:, :1], h[:1, :1]) > 0.1  # something happened
