"""Every wrong argument has its own exception, and every failing solve ends."""

import math
import subprocess
import sys

import pytest
import torch

import pyjlode
from pyjlode import errors

F64 = torch.float64
H0, T = torch.ones(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)


def f(t, h):
    return -h


ARGUMENTS = {
    "nan state": (errors.NonFiniteState, {"h0": torch.tensor([1.0, math.nan])}),
    "integer state": (errors.BadDtype, {"h0": torch.ones(2, dtype=torch.int64)}),
    "empty pytree": (errors.BadShape, {"h0": ()}),
    "empty t": (errors.BadTime, {"t": torch.zeros(0)}),
    "2-D t": (errors.BadTime, {"t": torch.zeros(1, 2)}),
    "nan t": (errors.BadTime, {"t": torch.tensor([0.0, math.nan])}),
    "repeated t": (errors.BadTime, {"t": torch.tensor([0.0, 1.0, 1.0])}),
    "turning t": (errors.BadTime, {"t": torch.tensor([0.0, 1.0, 0.5])}),
    "integer t": (errors.BadDtype, {"t": torch.tensor([0, 1])}),
    "shape of f": (errors.BadShape, {"f": lambda t, h: h[None]}),
    "dtype of f": (errors.BadDtype, {"f": lambda t, h: h.float()}),
    "device of f": (errors.BadShape, {"f": lambda t, h: h.to("meta")}),
    "f is no tensor": (errors.BadShape, {"f": lambda t, h: 0.0}),
    "negative rtol": (errors.BadTolerance, {"rtol": -1.0}),
    "zero tolerances": (errors.BadTolerance, {"rtol": 0.0, "atol": 0.0}),
    "shape of atol": (errors.BadTolerance, {"atol": torch.ones(3)}),
    "unknown method": (errors.UnknownMethod, {"method": "dorpi5"}),
    "unknown option": (errors.BadOption, {"options": {"frist_step": 1.0}}),
    "two grids": (
        errors.BadOption,
        {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": lambda f, h, t: t}},
    ),
    "unknown adjoint": (errors.BadOption, {"adjoint": "guass"}),
    "unknown engine": (errors.BadOption, {"engine": "fortran"}),
    "no julia": (errors.EngineUnavailable, {"engine": "julia"}),
    "adjoint_rtol without backward solve": (errors.BadOption, {"adjoint": True, "adjoint_rtol": 1e-3}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_argument(case):
    kind, wrong = ARGUMENTS[case]
    given = {"f": f, "h0": H0, "t": T, **wrong}
    with pytest.raises(kind) as caught:
        pyjlode.odeint(given.pop("f"), given.pop("h0"), given.pop("t"), **given)
    assert isinstance(caught.value, errors.PyJLODEError)
    assert isinstance(caught.value, (ValueError, TypeError, RuntimeError))


def test_unknown_names_list_the_near_ones():
    with pytest.raises(errors.UnknownMethod, match="dopri5"):
        pyjlode.odeint(f, H0, T, method="dorpi5")
    with pytest.raises(errors.BadOption, match="first_step"):
        pyjlode.odeint(f, H0, T, options={"frist_step": 1.0})


def test_stiff_problem_runs_out_of_steps_with_advice():
    with pytest.raises(errors.MaxStepsReached, match="auto"):
        pyjlode.odeint(lambda t, h: -1e6 * (h - torch.cos(t)), H0, T, options={"max_num_steps": 200})


def test_blow_up_ends_near_the_pole():
    with pytest.raises(errors.SolveError) as caught:
        pyjlode.odeint(lambda t, h: h * h, H0, torch.tensor([0.0, 2.0], dtype=F64))
    assert caught.value.t == pytest.approx(1.0, abs=1e-3)


def test_nan_in_f_is_located():
    def cliff(t, h):
        return -h if float(t) < 0.5 else h * math.nan

    with pytest.raises(errors.NonFiniteState) as caught:
        pyjlode.odeint(cliff, H0, T)
    assert caught.value.t == pytest.approx(0.5, abs=1e-6)


def test_overflow_of_a_fixed_step_method_names_the_step():
    t = torch.tensor([0.0, 400.0], dtype=F64)
    with pytest.raises(errors.NonFiniteState, match="step"):
        pyjlode.odeint(lambda t, h: h**3, H0, t, method="euler", options={"step_size": 1.0})


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("adjoint", [False, True, "backsolve"], ids=str)
def test_an_exception_in_f_passes_through_and_leaves_all_usable(error, adjoint):
    calls = 0

    def failing(t, h):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise error
        return -h

    h0 = H0.clone().requires_grad_()
    with pytest.raises(type(error)) as caught:
        pyjlode.odeint(failing, h0, T, adjoint=adjoint)
    assert caught.value is error
    h = pyjlode.odeint(failing, h0, T, adjoint=adjoint)
    (grad,) = torch.autograd.grad(h[-1].sum(), h0)
    assert torch.allclose(grad, torch.full((2,), math.exp(-1), dtype=F64), atol=1e-6)


def test_float32_below_its_reach_warns_once():
    code = (
        "import warnings, torch, pyjlode\n"
        "with warnings.catch_warnings(record=True) as w:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): pyjlode.odeint(lambda t, h: -h, torch.ones(2), torch.tensor([0.0, 1.0]))\n"
        "print(sum('below what' in str(x.message) for x in w))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_import_starts_nothing_heavy():
    code = "import sys, pyjlode; print([m for m in ('juliacall', 'matplotlib', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_interpolation_outside_and_without_gradient():
    solution = pyjlode.solve(f, H0, T)
    with pytest.raises(errors.BadTime, match="outside"):
        solution.interpolate(1.5)
    with pytest.raises(errors.BadOption, match="dense=True"):
        pyjlode.solve(f, H0, T, dense=False).interpolate(0.5)
    with pytest.raises(errors.GradientUnavailable):
        pyjlode.solve(f, H0.clone().requires_grad_(), T, adjoint=True).interpolate(0.5)


@pytest.mark.parametrize("adjoint", [False, True])
def test_a_shape_that_changes_on_the_way_is_not_broadcast(adjoint):
    h0 = torch.ones(3, 2, dtype=F64, requires_grad=adjoint)

    def f(t, h):
        return -h if t < 0.5 else -h[:1]

    with pytest.raises(errors.BadShape, match=r"\(1, 2\) at t=.*\(3, 2\) at the start"):
        pyjlode.odeint(f, h0, T, adjoint=adjoint)
