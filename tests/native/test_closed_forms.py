"""Every method against closed forms: in both precisions, in both directions of time, and what the methods conserve.

Tolerances follow from the method: C dt^order for fixed steps, a factor of rtol for adaptive ones, and the roundings of the
precision for both.
"""

import math

import pytest
import torch
from problems import BERNOULLI, COSINE, LINEAR, LOGISTIC, OSCILLATOR, PROBLEMS, max_error
from torch import Tensor

from pyjlode import METHODS, odeint, odeint_dense, solve

NATIVE = [m for m in METHODS.values() if m.kind != "scipy"]
FIXED = [m for m in NATIVE if not m.adaptive]
IMPLICIT = [m for m in NATIVE if m.kind == "implicit"]
ADAPTIVE = [m for m in METHODS.values() if m.adaptive]
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
STEPS = 48
# Errors of a solve in units of its tolerance: the factor by which these problems let errors grow, and 10 for the rest.
# RKF1(2)'s estimate is (k1 - k3)/512 while its solution's error has no such factor.
WITHIN = {"fehlberg2": 5120.0}


def each(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


def problems(chosen):
    return pytest.mark.parametrize("problem", chosen, ids=lambda problem: problem.name)


def order_in_theory(method):
    return min(method.order, 5) if method.kind == "adams" else method.order


def rounding(dtype, steps, size=1.0):
    """What roundings may add up to over a solve: all of one sign, a few in each step."""
    return 4 * steps * torch.finfo(dtype).eps * size


def settings(method, dtype):
    """rtol and atol, and the options and number of steps of a solve over a span."""
    if method.adaptive:
        tol = 1e-5 if dtype == torch.float32 or method.order in (2, 3) else 1e-9
        return {"rtol": tol, "atol": tol, "options": {"max_step": 0.2} if method.kind == "adaptive" else {}}
    tol = 1e-6 if dtype == torch.float32 else 1e-11
    return {"rtol": tol, "atol": tol}


def allowed(method, problem, dtype):
    """The error that theory allows for: the numbers 10 stand for the derivatives of f, which are of order 1."""
    size = float(problem.exact(problem.times(50)).abs().max())
    growth = float(problem.exact(problem.times(50)).abs().amax(1).max() / problem.h0.abs().max())
    if method.adaptive:
        error = WITHIN.get(method.name, 10.0) * settings(method, dtype)["rtol"]
    else:
        dt = (problem.t1 - problem.t0) / STEPS
        q = order_in_theory(method)
        # The error constant of Adams' formulas, and the four starting steps; the others' constants are below 1.
        error = 10 * (2 * dt) ** q * (3.0**q if method.kind == "adams" else 1.0)
        error += 10 * settings(method, dtype)["rtol"] * (method.kind != "fixed")
    return (error + rounding(dtype, 100)) * size * max(1.0, growth)


def grid(method, problem, backward):
    """Output times: the grid of the fixed-step methods, and one of nine times for the adaptive ones."""
    return problem.times(9 if method.adaptive else STEPS + 1, backward=backward)


@each(METHODS.values())
@problems(PROBLEMS)
@PRECISIONS
@DIRECTIONS
def test_closed_form(method, problem, dtype, backward):
    t = grid(method, problem, backward)
    h0 = problem.exact(t[0]).to(dtype)
    h = odeint(problem.f, h0, t, method=method.name, **settings(method, dtype))
    assert h.dtype == dtype
    assert h.shape == (len(t), *h0.shape)
    print(max_error(h, problem.exact(t)) / allowed(method, problem, dtype))
    assert max_error(h, problem.exact(t)) < allowed(method, problem, dtype)
