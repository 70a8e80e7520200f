"""A change of units changes nothing: every method on one problem, scaled in time and in state."""

import math

import pytest
import torch

from pyjlode import METHODS, solve

F64 = torch.float64
NATIVE = [m for m in METHODS.values() if m.kind not in ("scipy", "julia", "second")]
STIFF = [m.name for m in NATIVE if m.controlled]
# Powers of two: the numbers are the same but for their exponents.
TIMES = [2.0**-40, 2.0**40]
STATES = [2.0**-700, 2.0**-40, 2.0**40, 2.0**600]


def field(s, u):
    return torch.stack([-2 * u[0] * u[1] + torch.sin(3 * s), u[0] - 30 * u[1] ** 2])


def run(method, time=1.0, state=1.0, f=field, adjoint=False, start=(1.0, 0.5), k=None, **options):
    if METHODS[method].kind in ("fixed", "implicit", "adams", "reversible"):
        options["step_size"] = time / (200 if METHODS[method].kind in ("adams", "reversible") else 10)
    k = torch.ones((), dtype=F64) if k is None else k
    solution = solve(
        lambda t, h: state / time * k * f(t / time, h / state),
        state * torch.tensor(start, dtype=F64),
        time * torch.tensor([0.0, 0.1, 0.35], dtype=F64),
        method=method,
        rtol=1e-4,
        atol=1e-6 * state,
        options=options,
        adjoint=adjoint,
        dense=False,
        engine="torch",
    )
    stats = solution.stats
    return solution.h / state, (stats.naccept, stats.nreject)


@pytest.mark.parametrize("start", [(1.0, 0.5), (0.0, 0.0)], ids=["", "from zero"])
@pytest.mark.parametrize("method", [m.name for m in NATIVE])
def test_steps_and_states_do_not_depend_on_units(method, start):
    expected, steps = run(method, start=start)
    for time, state in [(TIMES[0], STATES[2]), (TIMES[1], STATES[1]), (1.0, STATES[0]), (1.0, STATES[3])]:
        scaled, taken = run(method, time, state, start=start)
        assert taken == steps
        torch.testing.assert_close(scaled, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [m.name for m in NATIVE])
def test_other_factors_change_rounding_only(method):
    expected, steps = run(method)
    for time, state in ((1e12, 1e-12), (1e-12, 1.0), (1.0, 1e12)):
        scaled, taken = run(method, time, state)
        assert abs(sum(taken) - sum(steps)) <= 2
        torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:autograd cannot differentiate f")
@pytest.mark.parametrize("method", STIFF)
def test_an_f_that_is_differenced(method):
    """Neither its derivatives by h, nor those by t, have a size of their own."""

    def blind(s, u):
        return field(torch.as_tensor(float(s.detach()), dtype=F64), u.detach())

    expected, steps = run(method, f=blind)
    for time, state in zip(TIMES, STATES[1:3]):
        scaled, taken = run(method, time, state, f=blind)
        assert taken == steps
        torch.testing.assert_close(scaled, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adjoint", [False, "discrete", "backsolve", "interpolating", "quadrature", "gauss", "forward"])
@pytest.mark.parametrize("method", ["dopri5", "rodas5p", "bdf", "gl4"])
def test_gradients_do_not_depend_on_units(method, adjoint):
    options = {"allow_unstable": True} if adjoint == "backsolve" and METHODS[method].controlled else {}

    def gradient(time, state):
        k = torch.ones((), dtype=F64, requires_grad=True)
        h, _ = run(method, time, state, adjoint=adjoint, k=k, **options)
        return torch.autograd.grad(h.square().sum(), k)[0]

    expected = gradient(1.0, 1.0)
    for time, state in ((TIMES[0], STATES[2]), (TIMES[1], 2.0**-100)):
        # The pivots of the sensitivities' matrix, which holds second derivatives, do depend on them.
        rtol = 1e-4 if adjoint == "forward" and METHODS[method].controlled else 1e-8
        torch.testing.assert_close(gradient(time, state), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [m.name for m in NATIVE if m.adaptive])
def test_slow_decay_and_states_below_the_tolerance(method, dtype):
    """y' = -y / T over [0, T] is solved, in few steps, whatever T is and however small y is against atol."""
    for time, state in ((1e12, 1.0), (1e-12, 1.0), (1.0, 1e-30), (1e12, 1e-30), (1.0, 1e-300), (1e12, 1e-300)):
        if dtype == torch.float32 and state < 1e-30:
            continue
        solution = solve(
            lambda t, h, time=time: -h / time,
            torch.tensor([1.0, 0.5], dtype=dtype) * state,
            torch.tensor([0.0, time], dtype=F64),
            method=method,
            rtol=1e-4,
            atol=1e-9,
            dense=False,
            engine="torch",
        )
        assert solution.stats.naccept + solution.stats.nreject < 500
        end = solution.h[-1].double() / (1 if state < 1 else state)
        assert float((end - torch.tensor([1.0, 0.5], dtype=F64) * state * math.exp(-1)).abs().max()) < 3e-3
