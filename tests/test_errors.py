"""Every wrong argument has its own exception, and every failing solve ends."""

import math
import signal
import subprocess
import sys
import warnings

import pytest
import torch

import pyjlode
from pyjlode import errors, notices
from pyjlode.bridge import engine, runtime

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


def test_without_julia(monkeypatch):
    monkeypatch.setattr(runtime, "find", lambda: "no Julia is set up.")
    with pytest.raises(errors.EngineUnavailable, match=r"engine='julia': no Julia is set up\."):
        pyjlode.odeint(f, H0, T, engine="julia")


# What else a person may write by mistake, and words of the message that say what to do about it.
MISTAKES = {
    "h0 is a list": (errors.BadDtype, "torch.as_tensor", {"h0": [1.0, 2.0]}),
    "h0 is NumPy's": (errors.BadDtype, "torch.as_tensor", {"h0": H0.numpy()}),
    "t is a number": (errors.BadTime, "one-dimensional", {"t": 1.0}),
    "half precision": (errors.BadDtype, "cast it first", {"h0": H0.half()}),
    "f is no function": (errors.BadShape, r"f\(t, h\)", {"f": H0}),
    "f returns nothing": (errors.BadShape, "NoneType", {"f": lambda t, h: None}),
    "f returns a tuple": (errors.BadShape, "got a tuple", {"f": lambda t, h: (-h,)}),
    "f works in place": (errors.BadShape, "in place", {"f": lambda t, h: h.mul_(-1)}),
    "rtol is a word": (errors.BadTolerance, "rtol must be a number", {"rtol": "1e-3"}),
    "rtol is a string": (errors.BadTolerance, "rtol must be a number", {"rtol": "1e-3"}),
    "method is a class": (errors.BadOption, "pyjlode.METHODS", {"method": dict}),
    "options is a word": (errors.BadOption, "dictionary", {"options": "step_size"}),
    "step_size is a word": (errors.BadOption, "positive number", {"method": "rk4", "options": {"step_size": "small"}}),
    "max_num_steps is infinite": (errors.BadOption, "positive integer", {"options": {"max_num_steps": math.inf}}),
    "step_t is a word": (errors.BadOption, "sequence of times", {"options": {"step_t": "now"}}),
    "solver of scipy": (
        errors.BadOption,
        "did you mean 'RK45'",
        {"method": "scipy_solver", "options": {"solver": "rk_45"}},
    ),
    "grid is a list": (
        errors.BadOption,
        "1-D tensor",
        {"method": "rk4", "options": {"grid_constructor": lambda f, h, t: [0.0, 1.0]}},
    ),
    "grid is no function": (errors.BadOption, "function", {"method": "rk4", "options": {"grid_constructor": 0.1}}),
    "event is a number": (errors.BadShape, "event_fn must return a tensor", {"event_fn": lambda t, h: 0.5}),
    "event is a truth": (errors.BadDtype, "crossing of zero", {"event_fn": lambda t, h: h[0] < 0.5}),
    "adjoint_params are names": (errors.BadOption, "iterable of tensors", {"adjoint_params": ["weight"]}),
    "adjoint_params is a tensor": (errors.BadOption, "iterable of tensors", {"adjoint_params": torch.ones(2)}),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_the_message_says_what_to_do(case):
    kind, words, wrong = MISTAKES[case]
    given = {"f": f, "h0": H0.clone(), "t": T, **wrong}
    with pytest.raises(kind, match=words) as caught:
        pyjlode.odeint(given.pop("f"), given.pop("h0"), given.pop("t"), **given)
    assert len(str(caught.value)) < 250


def test_event_starts_at_one_time():
    with pytest.raises(errors.BadTime, match="one time"):
        pyjlode.odeint_event(f, H0, T, event_fn=lambda t, h: h[0] - 0.5)


@pytest.mark.parametrize("adjoint", [False, True])
def test_a_state_that_f_changes_in_place_is_refused(adjoint):
    # Also of several tensors, where h is a view of the solver's own vector; a solve that went on would be wrong.
    def field(t, h):
        return h[0].neg_(), -h[1]

    with torch.no_grad(), pytest.raises(errors.BadShape, match="in place"):
        pyjlode.odeint(field, (H0.clone(), H0.clone()), T, adjoint=adjoint)


def test_unknown_names_list_the_near_ones():
    with pytest.raises(errors.UnknownMethod, match="dopri5"):
        pyjlode.odeint(f, H0, T, method="dorpi5")
    with pytest.raises(errors.BadOption, match="first_step"):
        pyjlode.odeint(f, H0, T, options={"frist_step": 1.0})


def test_stiff_problem_runs_out_of_steps_with_advice():
    with pytest.raises(errors.MaxStepsReached, match="auto"), pytest.warns(UserWarning, match="stiff"):
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


def test_float32_below_its_reach_warns_once(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())  # as in a process that has just begun
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            pyjlode.odeint(lambda t, h: -h, torch.ones(2), [0.0, 1.0], rtol=1e-8)
    assert sum("below what" in str(x.message) for x in told) == 1


def test_import_starts_nothing_heavy():
    heavy = ("juliacall", "matplotlib", "scipy", "sympy", "tqdm", "jax", "torchdiffeq", "torch._dynamo")
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        f"import pyjlode; print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
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


def test_an_exception_of_a_signal_handler_says_nothing_of_f():
    """In the first call of f it was taken for one of arguments that are swapped."""

    class Late(Exception):
        pass

    def late(*args):
        raise Late

    def f(t, h):
        if not calls:
            calls.append(t)
            signal.raise_signal(signal.SIGTERM)
        return torch.cos(t) - h

    calls, before = [], signal.signal(signal.SIGTERM, late)
    try:
        with pytest.raises(Late):
            pyjlode.odeint(f, torch.zeros(2), torch.tensor([0.0, 1.0]))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_exception_before_a_call_into_julia_is_itself():
    """It has no text, as what Julia raises where a callback gave up."""

    class Late(Exception):
        pass

    class Functions:
        functions = ("f",)

        def listening(self):
            raise Late

        def raise_error(self):
            pass

    with pytest.raises(Late):
        engine._call(Functions(), lambda: None)
