"""Programs written for torchdiffeq, and mistakes of people who come from other libraries: right, or told what to do."""

import copy
import functools
import inspect
import logging
import math
import multiprocessing
import pickle
import re
import warnings
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torchdiffeq
from designs import covering

import pyjlode
import pyjlode.nn
from pyjlode import errors, odeint, odeint_adjoint, odeint_dense, odeint_event, solve

F64 = torch.float64
H0 = torch.tensor([1.0, 0.5], dtype=F64)
T = torch.linspace(0, 1, 5, dtype=F64)
FIXED = [name for name, row in pyjlode.METHODS.items() if row.kind in ("fixed", "implicit", "adams", "reversible")]
SYSTEMS = [name for name, row in pyjlode.METHODS.items() if row.kind in ("adaptive", "stiff", "auto")]
NATIVE = [name for name, row in pyjlode.METHODS.items() if row.kind not in ("scipy", "second")]
A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64)


def decay(t, h):
    return -h


# --- Names of arguments ----------------------------------------------------------------------------------------------

BY_NAME = {
    "odeint": lambda **k: odeint(t=T, **k)[-1],
    "odeint_adjoint": lambda **k: odeint_adjoint(t=T, **k)[-1],
    "solve": lambda **k: solve(t=T, **k).h[-1],
    "odeint_event": lambda **k: odeint_event(t0=T[0], event_fn=lambda t, h: t - 1.0, **k)[1][-1],
    "odeint_dense": lambda **k: odeint_dense(t0=T[0], t1=T[-1], **k)(T[-1]),
}


@pytest.mark.parametrize("names", [("f", "h0"), ("func", "y0"), ("f", "y0"), ("func", "h0")], ids=str)
@pytest.mark.parametrize("call", BY_NAME)
def test_our_names_and_torchdiffeqs(call, names):
    end = BY_NAME[call](**{names[0]: decay, names[1]: H0})
    assert torch.allclose(end, H0 * torch.exp(-T[-1]), rtol=1e-6)


def test_partial_with_func():
    assert torch.equal(functools.partial(odeint, func=decay)(y0=H0, t=T), odeint(decay, H0, T))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: odeint(decay, H0, T, func=decay),
        lambda: odeint(decay, H0, T, y0=H0),
        lambda: odeint(f=decay, func=decay, h0=H0, t=T),
        lambda: odeint_dense(decay, H0, 0.0, 1.0, y0=H0),
    ],
)
def test_an_argument_given_twice(wrong):
    with pytest.raises(TypeError, match="twice"):
        wrong()


@pytest.mark.parametrize("call", [odeint, solve, odeint_adjoint])
def test_a_missing_argument_is_named(call):
    with pytest.raises(TypeError, match=r"missing .* 't'"):
        call(func=decay, y0=H0)


@pytest.mark.parametrize("call", [odeint, solve, odeint_adjoint, odeint_event, odeint_dense])
def test_the_signature_shows_our_names(call):
    assert list(inspect.signature(call).parameters)[:2] == ["f", "h0"]


# --- Defaults, warnings, the log -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [False, True, "backsolve"])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128], ids=str)
def test_defaults_do_not_warn(dtype, adjoint):
    h0 = H0.to(dtype, copy=True).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h = odeint(decay, h0, T, adjoint=adjoint)
        h.abs().sum().backward()
    double = dtype in (F64, torch.complex128)
    rtol, atol = (1e-7, 1e-9) if double else (1e-6, 1e-7)
    assert torch.equal(h, odeint(decay, h0, T, adjoint=adjoint, rtol=rtol, atol=atol))
    assert torch.equal(h, odeint(decay, h0, T, adjoint=adjoint, atol=atol))


@pytest.mark.parametrize(
    "solved",
    [
        lambda f, **k: odeint(f, H0, T, **k),
        lambda f, **k: odeint_adjoint(f, H0, T, **k),
        lambda f, **k: odeint_dense(f, H0, 0.0, 1.0, **k),
        lambda f, **k: pyjlode.nn.NeuralODE(f, **k)(H0),
    ],
)
@pytest.mark.parametrize("cause", ["option", "callback"])
def test_warnings_point_at_the_callers_line(solved, cause):
    def f(t, h):
        return -h

    given = {"method": "rk4"}
    if cause == "option":
        given["options"] = {"first_step": 0.1}
    else:
        f.callback_accept_step = lambda t0, y0, dt: None
    with pytest.warns(UserWarning, match="rk4") as told:
        solved(f, **given)
    assert {w.filename for w in told} == {__file__}


def test_a_warning_from_within_the_solver_points_there_too():
    with pytest.warns(UserWarning, match="did not settle") as told:
        odeint(lambda t, h: -30 * h, H0, T, method="implicit_adams", options={"max_iters": 1})
    assert {w.filename for w in told} == {__file__}


def test_one_log_line_for_each_decision(caplog):
    pyjlode.notices._logged.clear()
    with caplog.at_level(logging.INFO, "pyjlode"):
        for _ in range(3):
            odeint(decay, H0, T, engine="torch")
            odeint(decay, H0, T, engine="torch", method="rk4")
    lines = [r.getMessage() for r in caplog.records if r.name == "pyjlode" and r.getMessage().startswith("engine")]
    assert len(lines) == 2
    assert "dopri5" in lines[0]
    assert "rk4" in lines[1]


def test_what_was_not_shown_is_logged_later(caplog):
    pyjlode.notices._logged.clear()
    odeint(decay, H0, T, engine="torch")
    with caplog.at_level(logging.INFO, "pyjlode"):
        odeint(decay, H0, T, engine="torch")
    assert "dopri5" in caplog.text


# --- The structure of what f returns ---------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x v")
Other = namedtuple("Other", "v x")
A2, B3 = torch.ones(2, dtype=F64), torch.zeros(3, dtype=F64)
SAME = {
    "dict in another order": ({"a": A2, "b": B3}, lambda a, b: {"b": b, "a": a}, lambda h: (h["a"], h["b"])),
    "OrderedDict": (OrderedDict(a=A2, b=B3), lambda a, b: {"b": b, "a": a}, lambda h: (h["a"], h["b"])),
    "dict in a tuple": (({"a": A2, "b": B3},), lambda a, b: ({"b": b, "a": a},), lambda h: (h[0]["a"], h[0]["b"])),
    "list for a tuple": ((A2, B3), lambda a, b: [a, b], lambda h: h),
    "named tuple": (Pair(A2, B3), lambda a, b: Pair(a, b), lambda h: (h.x, h.v)),
    "tuple for a named tuple": (Pair(A2, B3), lambda a, b: (a, b), lambda h: (h.x, h.v)),
    "nested": (((A2,), [B3]), lambda a, b: ((a,), [b]), lambda h: (h[0][0], h[1][0])),
}


@pytest.mark.parametrize("adjoint", [False, True, "backsolve"])
@pytest.mark.parametrize("case", SAME)
def test_results_are_matched_by_name(case, adjoint):
    h0, made, parts = SAME[case]
    rate = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def f(t, h):
        a, b = parts(h)
        return made(-rate * a, 1 - b)

    h = odeint(f, h0, T, adjoint=adjoint)
    a, b = parts(h)
    assert type(h) is type(h0)
    assert torch.allclose(a[-1], torch.exp(-2 * T[-1]).expand(2), rtol=1e-6)
    assert torch.allclose(b[-1], (1 - torch.exp(-T[-1])).expand(3), rtol=1e-6)
    (g,) = torch.autograd.grad(a[-1].sum(), rate)
    assert float(g) == pytest.approx(-2 * float(torch.exp(-2 * T[-1])), rel=1e-5)


DIFFERENT = {
    "another key": ({"a": A2}, lambda h: {"b": -h["a"]}, "key 'a'.*'b'"),
    "a key less": ({"a": A2, "b": B3}, lambda h: {"a": -h["a"]}, "key 'b'"),
    "tuple for a dict": ({"a": A2, "b": B3}, lambda h: (h["a"], h["b"]), "tuple.*dictionary.*'a', 'b'"),
    "dict for a tuple": ((A2, B3), lambda h: {"a": h[0], "b": h[1]}, "dict.*tuple"),
    "another named tuple": (Pair(A2, A2), lambda h: Other(h.v, h.x), "Other.*Pair"),
    "one more": ((A2, B3), lambda h: (*h, h[0]), "3 elements.*2"),
    "tensor for a tuple": ((A2, A2), lambda h: torch.stack(h), "Tensor.*tuple"),
    "nested": (((A2,), B3), lambda h: (h[0][0], h[1]), r"\[0\] is a Tensor"),
}


@pytest.mark.parametrize("late", [False, True], ids=["at the start", "later"])
@pytest.mark.parametrize("case", DIFFERENT)
def test_another_structure_is_an_error(case, late):
    h0, wrong, words = DIFFERENT[case]

    def f(t, h):
        return wrong(h) if t > 0.3 or not late else torch.utils._pytree.tree_map(torch.neg, h)

    with pytest.raises(errors.BadShape, match=words):
        odeint(f, h0, T)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "radau5", "scipy_solver"])
@pytest.mark.parametrize("bad", [lambda b: b.sum(), lambda b: b[None], lambda b: b[:2]], ids=["()", "(1, 3)", "(2,)"])
def test_another_shape_at_a_later_call_of_a_tuple(bad, method):
    def f(t, h):
        return -h[0], -h[1] if t < 0.3 else bad(h[1])

    with pytest.raises(errors.BadShape, match=r"tensor 1 .* at t=.*\(3,\)"):
        odeint(f, (A2, B3), T, method=method)


# --- One buffer ------------------------------------------------------------------------------------------------------


class Out:
    """Returns one tensor of its own, or one array, each time."""

    def __init__(self, kind):
        self.kind = kind
        self.tensor, self.array = torch.empty(2, dtype=F64), np.empty(2)

    def __call__(self, t, h):
        if self.kind == "numpy":
            np.matmul(A.numpy(), h.detach().numpy(), out=self.array)
            return torch.from_numpy(self.array)
        if self.kind == "copy_":
            return self.tensor.copy_(A @ h)
        torch.mv(A, h.detach(), out=self.tensor)
        return self.tensor if self.kind == "out" else self.tensor[:]


@pytest.mark.filterwarnings("ignore:autograd cannot differentiate f")  # but for "copy_" it cannot
@pytest.mark.parametrize(
    ("method", "kind", "dense", "moving"),
    covering([*NATIVE, "scipy_solver"], ["out", "view", "numpy", "copy_"], [False, True], [False, True]),
)
def test_one_buffer_for_every_result(method, kind, dense, moving):
    tol = 1e-2 if method == "implicit_adams" else 1e-4  # its corrector is to settle
    given = {"method": method, "dense": dense, "rtol": tol, "atol": tol}
    h0 = H0.clone().requires_grad_(moving)
    right = solve(lambda t, h: A @ h, h0, T, **given)
    try:
        found = solve(Out(kind), h0, T, **given)
    except errors.NotConverged:  # autograd does not see into it, and these methods have no other Jacobian
        assert kind != "copy_"
        assert pyjlode.METHODS[method].kind == "implicit"
        return
    assert torch.allclose(found.h, right.h, atol=1e-4)
    if dense and method != "scipy_solver":
        assert torch.allclose(found.interpolate(0.37), right.interpolate(0.37), atol=1e-4)


@pytest.mark.parametrize("adjoint", [False, True, "backsolve", "gauss"])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "explicit_adams"])
def test_gradients_through_one_buffer(method, adjoint):
    def gradient(f):
        h0 = H0.clone().requires_grad_()
        h = odeint(f, h0, T, method=method, adjoint=adjoint, rtol=1e-8, atol=1e-8)
        return torch.autograd.grad(h[-1].square().sum(), h0)[0]

    right = gradient(lambda t, h: A @ h)
    try:
        found = gradient(Out("copy_"))
    except errors.GradientUnavailable:  # PyTorch keeps the graph of every write to it, and that is said
        assert adjoint is not False
        return
    assert torch.allclose(found, right, rtol=1e-6)


def test_a_constant_may_be_one_tensor():
    drift = torch.tensor([1.0, -2.0], dtype=F64)
    for method in [m for m in NATIVE if m != "bdf"]:
        h = odeint(lambda t, h: drift, H0, T, method=method)
        assert torch.allclose(h[-1], H0 + drift), method


# --- Pickling --------------------------------------------------------------------------------------------------------

SOLVE_ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.SolveError)]
ALL_ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.PyJLODEError)]
PLAIN_ERRORS = [e for e in ALL_ERRORS if e not in SOLVE_ERRORS and e.__init__ is Exception.__init__]


@pytest.mark.parametrize("again", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", SOLVE_ERRORS)
def test_errors_pickle(kind, again):
    error = kind("it stopped", t=1.5, dt=-0.25)
    error.more = "mine"
    back = again(error)
    assert type(back) is kind
    assert (str(back), back.t, back.dt, back.more) == ("it stopped", 1.5, -0.25, "mine")


@pytest.mark.parametrize("kind", PLAIN_ERRORS)
def test_plain_errors_pickle(kind):
    back = pickle.loads(pickle.dumps(kind("wrong")))
    assert type(back) is kind
    assert str(back) == "wrong"


def blow_up(rate):
    return odeint(lambda t, h: rate * h * h, H0, torch.tensor([0.0, 2.0], dtype=F64), engine="torch")


def plain_solution(rate):
    return solve(lambda t, h: -rate * h, H0, T, dense=False, engine="torch")


def test_another_process_gives_errors_and_solutions_back():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(errors.SolveError) as caught:
            pool.apply_async(blow_up, (1.0,)).get(timeout=120)
        found = pool.apply_async(plain_solution, (1.0,)).get(timeout=120)
    assert caught.value.t == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(found.h, plain_solution(1.0).h)
    assert found.stats.nfe == plain_solution(1.0).stats.nfe


def test_a_solution_is_copied_with_its_graph_and_pickled_without():
    h0 = H0.clone().requires_grad_()
    kept = solve(decay, h0, T)
    for again in (copy.copy(kept), copy.deepcopy(kept)):
        assert torch.equal(again.h, kept.h)
        assert torch.equal(again.interpolate(0.3), kept.interpolate(0.3))
        (g,) = torch.autograd.grad(again.h[-1].sum(), h0, retain_graph=True)
        assert torch.allclose(g, torch.exp(-T[-1]).expand(2), rtol=1e-6)
    assert copy.deepcopy(kept).h is not kept.h
    for solution in (kept, solve(decay, h0, T, dense=False)):
        back = pickle.loads(pickle.dumps(solution))
        assert torch.equal(back.h, kept.h)
        assert not back.h.requires_grad
        with pytest.raises(errors.BadOption, match=r"pickle|dense=True"):
            back.interpolate(0.3)


# --- Mistakes --------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "RK45": "dopri5",
    "RK23": "bosh3",
    "DOP853": "dopri8",
    "Radau": "radau5",
    "BDF": "bdf",
    "LSODA": "auto",
    "lsoda": "auto",
    "ode45": "dopri5",
    "ode15s": "bdf",
    "Tsit5()": "tsit5",
    "Tsit5": "tsit5",
    "DP5()": "dopri5",
    "Rodas5P()": "rodas5p",
    "TRBDF2()": "trbdf2_adaptive",
    "RK4": "rk4",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_methods_of_other_libraries(name):
    with pytest.raises(errors.UnknownMethod, match=f"here it is '{ELSEWHERE[name]}'"):
        odeint(decay, H0, T, method=name)


def test_every_hint_is_a_method():
    assert set(pyjlode.methods.ELSEWHERE.values()) <= set(pyjlode.METHODS)
    assert not set(pyjlode.methods.ELSEWHERE) & set(pyjlode.METHODS)


def test_a_method_as_an_object_of_another_library():
    class Tsit5:
        pass

    for method in (Tsit5, Tsit5()):
        with pytest.raises(errors.BadOption, match="method='tsit5'"):
            odeint(decay, H0, T, method=method)


MISTAKES = {
    "f(h, t), by shape": (errors.BadFunction, r"takes \(h, t\)", lambda: odeint(lambda h, t: -h, H0, T)),
    "f(h, t), by failure": (
        errors.BadFunction,
        r"takes \(h, t\)",
        lambda: odeint(lambda h, t: torch.stack([h[1], -h[0]]), H0, T),
    ),
    "f(h, t) of a tuple": (
        errors.BadFunction,
        r"takes \(h, t\)",
        lambda: odeint(lambda h, t: (h[1], h[0]), (H0, H0), T),
    ),
    "a Linear": (errors.BadFunction, "TimeMLP", lambda: odeint(torch.nn.Linear(2, 2).double(), H0, T)),
    "a Sequential": (
        errors.BadFunction,
        r"lambda t, h: net\(h\)",
        lambda: odeint_adjoint(torch.nn.Sequential(torch.nn.Linear(2, 2)).double(), H0, T),
    ),
    "a function of h": (errors.BadFunction, "NeuralODE", lambda: odeint(lambda h: -h, H0, T)),
    "times before the state": (errors.BadTime, "order of arguments", lambda: odeint(decay, T, torch.ones(2, 2))),
    "solve_ivp's order": (errors.BadDtype, "order of arguments", lambda: odeint(decay, (0, 10), [1.0, 0.0])),
    "state before f": (errors.BadShape, "order of arguments", lambda: odeint(H0, decay, T)),
    "a misspelt keyword": (TypeError, "'rtol'", lambda: odeint(decay, H0, T, rtoll=1e-3)),
    "SciPy's t_eval": (TypeError, "all times", lambda: odeint(decay, H0, T, t_eval=T)),
    "args that are no tuple": (errors.BadOption, "tuple", lambda: odeint(decay, H0, T, args=1.0)),
    "an option that is said twice": (
        TypeError,
        "twice",
        lambda: solve(decay, H0, T, max_step=1, options={"max_step": 1}),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_hint_for_usual_mistakes(case):
    kind, words, call = MISTAKES[case]
    with pytest.raises(kind, match=words):
        call()


def test_errors_of_f_itself_stay_what_they_are():
    class Mine(Exception):
        pass

    def f(t, h):
        raise Mine("at the start")

    with pytest.raises(Mine, match="at the start"):
        odeint(f, H0, T)

    def broken(t, h):
        return torch.zeros(3, dtype=F64) @ h

    with pytest.raises(RuntimeError, match="size"):
        odeint(broken, H0, T)

    def fails_once(t, h, calls=[]):  # noqa: B006
        calls.append(t)
        if len(calls) == 1:
            raise Mine
        return -h

    with pytest.raises(Mine):
        odeint(fails_once, H0[0], T)


# --- What means the same as in torchdiffeq ---------------------------------------------------------------------------


class Times:
    def __init__(self):
        self.seen = []

    def __call__(self, t, h):
        self.seen.append(float(t))
        return -h


@pytest.mark.parametrize("adjoint", [False, "backsolve"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("method", FIXED)
def test_perturb_keeps_f_off_the_grid(method, dtype, adjoint):
    grid = {0.0, 0.5, 1.0}
    for perturb in (True, False):
        f, h0 = Times(), H0.to(dtype, copy=True).requires_grad_()
        h = odeint(f, h0, [0.0, 1.0], method=method, adjoint=adjoint, options={"step_size": 0.5, "perturb": perturb})
        forward, f.seen = f.seen, []
        if adjoint:
            h[-1].sum().backward()
        assert grid.isdisjoint(forward) if perturb else {0.0, 0.5} <= set(forward), forward
        assert not adjoint or (grid.isdisjoint(f.seen) if perturb else {1.0, 0.5} <= set(f.seen)), f.seen


@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
def test_perturb_of_a_field_that_jumps_at_the_start(backward):
    """As theirs: the value on the side that the solve is on."""
    t = torch.tensor([1.0, 2.0], dtype=F64) if not backward else torch.tensor([1.0, 0.0], dtype=F64)

    def f(t, h):
        return torch.full_like(h, 1.0 if t > 1 else 2.0 if t < 1 else torch.nan)

    given = {"method": "rk4", "options": {"step_size": 0.25, "perturb": True}}
    ours = odeint(f, H0, t, **given)
    assert torch.allclose(ours, torchdiffeq.odeint(f, H0, t, **given))
    assert torch.allclose(ours[-1], H0 + (1.0 if not backward else -2.0))


@pytest.mark.parametrize("method", FIXED)
def test_a_fixed_method_without_options_steps_over_t(method):
    steps = []

    def f(t, h):
        return -h

    f.callback_step = lambda t0, y0, dt: steps.append((float(t0), float(dt)))
    odeint(f, H0, T, method=method, rtol=1e-2, atol=1e-2)  # the corrector of implicit_adams is content with it
    assert steps == [(float(a), float(b - a)) for a, b in zip(T, T[1:])]


@pytest.mark.parametrize("outputs", [2, 3, 6])
@pytest.mark.parametrize("adjoint", ["backsolve", "interpolating", "quadrature", "gauss"])
@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_euler"])
def test_a_backward_solve_goes_over_the_forward_grid(method, adjoint, outputs):
    """y' = -3 y: dL/dy0 with the steps of the grid, and not with one step for each interval."""
    grid = torch.linspace(0, 1, 51, dtype=F64)
    h0 = torch.ones(1, dtype=F64, requires_grad=True)
    h = odeint(
        lambda t, h: -3 * h,
        h0,
        torch.linspace(0, 1, outputs, dtype=F64),
        method=method,
        adjoint=adjoint,
        options={"grid_constructor": lambda f, h0, t: grid},
    )
    h[-1].sum().backward()
    assert float(h0.grad) == pytest.approx(float(torch.exp(torch.tensor(-3.0))), rel=0.1 if "euler" in method else 1e-6)
    if method == "euler":  # the linear problem's adjoint by the same steps is the derivative of the numbers
        assert float(h0.grad) == pytest.approx(0.94**50, rel=1e-12)


def test_a_backward_grid_of_its_own():
    asked = []

    def grid(f, h0, t):
        asked.append(t.tolist())
        return torch.linspace(float(t[0]), float(t[-1]), 11, dtype=F64)

    h0 = torch.ones(1, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    options = {"grid_constructor": grid}
    h = odeint_adjoint(decay, h0, t, method="euler", options=options, adjoint_options=options)
    h[-1].sum().backward()
    assert asked == [[0.0, 0.5, 1.0], [1.0, 0.5], [0.5, 0.0]]
    assert float(h0.grad) == pytest.approx(0.95**20, rel=1e-12)


@pytest.mark.parametrize("state", ["tensor", "0-d", "tuple of one", "tuple"])
def test_the_norm_sees_what_torchdiffeqs_norm_sees(state):
    one = torch.ones((), dtype=F64)
    h0 = {"tensor": H0, "0-d": one, "tuple of one": (one,), "tuple": (one, H0[None])}[state]

    def seen(interface):
        found = set()

        def norm(h):
            found.add(tuple(tuple(x.shape) for x in h) if isinstance(h, tuple) else tuple(h.shape))
            return max(x.abs().max() for x in (h if isinstance(h, tuple) else (h,)))

        interface(lambda t, h: h, h0, T, options={"norm": norm})
        return found

    assert seen(odeint) == seen(torchdiffeq.odeint)


# --- The default device ----------------------------------------------------------------------------------------------


def test_the_front_door_makes_nothing_on_the_default_device():
    before = torch.get_default_device()
    torch.set_default_device("meta")  # what lies there has no numbers
    try:
        _, t, values = None, *pyjlode.arguments.times([0.0, 0.5, 1.0])
        assert t.device.type == "cpu"
        assert values == [0.0, 0.5, 1.0]
        layout, _ = pyjlode.arguments.state(H0)
        row = pyjlode.methods.find("rodas5p")
        rel, _ = pyjlode.arguments.tolerances([1e-3, 1e-4], 1e-5, pyjlode.arguments.state((H0, H0))[0], row)
        assert rel.device.type == "cpu"
        options, _ = pyjlode.arguments.options_said({"step_t": [0.3], "jump_t": (0.4,)}, row)
        assert options == {"step_t": (0.3,), "jump_t": (0.4,)}
        assert pyjlode.arguments.mass_matrix([[1.0, 0.0], [0.0, 0.0]], row, layout, 1).device.type == "cpu"
    finally:
        torch.set_default_device(before)


# --- Empty states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [False, True, "gauss"])
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("method", SYSTEMS)
def test_empty_batches_of_systems(method, shape, adjoint):
    h0 = torch.zeros(shape, dtype=F64, requires_grad=True)
    h = odeint(decay, h0, T, method=method, adjoint=adjoint, options={"batch_dims": 1})
    h.sum().backward()
    assert h.shape == (len(T), *shape)
    assert h0.grad.shape == shape


# --- Rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
def test_a_step_in_float32_rounds_the_state_once(method, recorded):
    """h' = 0.2: whatever the method, its increment is the same but for its own last bit."""
    n, dt = 900, 0.01
    h0 = torch.tensor([2.1], requires_grad=recorded)
    h = odeint(lambda t, h: 0 * h + 0.2, h0, [0.0, n * dt], method=method, options={"step_size": dt}).detach()
    half = 2.0**-23  # of the last bit of numbers from 2 to 4
    assert abs(float(h[-1]) - (2.1 + n * dt * 0.2)) < 1.1 * n * half


# --- The table of docs/torchdiffeq.md --------------------------------------------------------------------------------


def default_tolerances():
    h = odeint(decay, H0.float(), T)
    assert torch.equal(h, odeint(decay, H0.float(), T, rtol=1e-6, atol=1e-7))


def dtype_of_time():
    """From t0 = 2^24 on, float32 knows no step below 2."""
    start = 2.0**24
    t = torch.tensor([start, start + 1, start + 2], dtype=F64)
    for options in ({}, {"dtype": torch.float32}):
        h = odeint(decay, H0.float(), t, method="rk4", options={"step_size": 0.01, **options})
        assert torch.allclose(h[1], H0.float() * math.exp(-1), rtol=1e-5)


def the_last_step():
    def f(t, h):
        latest.append(float(t.detach()))
        return -h

    ends = []
    for interface in (odeint, torchdiffeq.odeint):
        latest = []
        interface(f, H0, T, rtol=1e-3)
        ends.append(max(latest))
    assert ends[0] == float(T[-1]) < ends[1]


def steps_allowed():
    with pytest.raises(errors.MaxStepsReached, match="max_num_steps=100000"):
        odeint(lambda t, h: -h, H0, [0.0, 1e6], method="euler", options={"step_size": 1e-3})


def an_event_that_is_zero_at_the_start():
    def f(t, h):  # a ball that leaves the ground
        return torch.stack([h[1], torch.full_like(h[1], -2.0)])

    t, h = odeint_event(f, torch.tensor([0.0, 1.0], dtype=F64), 0.0, event_fn=lambda t, h: h[0])
    assert float(t) == pytest.approx(1.0)
    assert float(h[-1][1]) == pytest.approx(-1.0)


def dopri8():
    """Between its steps, which are long here."""

    def f(t, h):
        return torch.stack([h[1], -h[0]])

    t = torch.linspace(0, 10, 101, dtype=F64)
    exact = torch.stack([t.cos() + 0.5 * t.sin(), 0.5 * t.cos() - t.sin()], 1)
    ours, theirs = (
        float((interface(f, H0, t, method="dopri8", rtol=1e-9, atol=1e-10) - exact).detach().abs().max())
        for interface in (odeint, torchdiffeq.odeint)
    )
    assert ours < 1e-7 < theirs


def adams_methods():
    """Of order 5 on a grid of unequal steps."""
    found = []
    for n in (40, 80):
        s = torch.linspace(0, 1, n + 1, dtype=F64)
        grid = s + 0.3 * s * (1 - s)
        for interface in (odeint, torchdiffeq.odeint):
            h = interface(decay, H0, grid, method="explicit_adams")
            found.append(float((h[-1] - H0 * math.exp(-1)).abs().max()))
    ours, theirs = math.log2(found[0] / found[2]), math.log2(found[1] / found[3])
    assert ours > 4.5 > theirs


def implicit_methods_that_do_not_converge():
    with pytest.raises(errors.NotConverged):
        odeint(lambda t, h: 50 * torch.sin(40 * h) + 100, H0, T, method="implicit_euler", options={"max_iters": 2})


def unknown_options():
    with pytest.raises(errors.BadOption, match="step_size"):
        odeint(decay, H0, T, method="rk4", options={"stepsize": 0.1})


def wrong_arguments():
    wrong = (
        lambda: odeint(decay, [1.0, 2.0], T),
        lambda: odeint(decay, H0, T[[0, 2, 1]]),
        lambda: odeint(decay, H0, T, method="dopri6"),
    )
    for call in wrong:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            call()
        assert isinstance(caught.value, errors.PyJLODEError)


def a_grid_in_a_backward_solve():
    test_a_backward_grid_of_its_own()
    test_a_backward_solve_goes_over_the_forward_grid("euler", "backsolve", 6)


def a_stiff_method_in_odeint_adjoint():
    with pytest.raises(errors.BadOption, match="adjoint=True"):
        odeint_adjoint(decay, H0.clone().requires_grad_(), T, method="rodas5p")
    odeint(decay, H0.clone().requires_grad_(), T, method="rodas5p", adjoint=True)[-1].sum().backward()
    odeint_adjoint(decay, H0.clone().requires_grad_(), T, method="implicit_euler")[-1].sum().backward()  # as theirs


def the_adjoints_own_objects():
    called = []

    def norm(state):
        t, h, a, *params = state
        called.append((t.shape, h.shape, a.shape, len(params)))
        return max(x.abs().max() for x in state)

    rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
    for interface in (odeint_adjoint, torchdiffeq.odeint_adjoint):
        called.clear()
        more = {} if interface is odeint_adjoint else {"adjoint_params": (rate,)}
        h = interface(lambda t, h: -rate * h, H0, T, adjoint_options={"norm": norm}, **more)
        h[-1].sum().backward()
        assert set(called) == {(torch.Size([]), torch.Size([2]), torch.Size([2]), 1)}
    assert not hasattr(odeint_adjoint(lambda t, h: -rate * h, H0, T).grad_fn, "adjoint_options")


ROWS = [
    default_tolerances,
    dtype_of_time,
    the_last_step,
    steps_allowed,
    an_event_that_is_zero_at_the_start,
    dopri8,
    adams_methods,
    implicit_methods_that_do_not_converge,
    unknown_options,
    wrong_arguments,
    a_grid_in_a_backward_solve,
    a_stiff_method_in_odeint_adjoint,
    the_adjoints_own_objects,
]


def test_every_row_of_the_table_is_tested():
    table = (Path(__file__).parents[1] / "docs" / "torchdiffeq.md").read_text().split("| --- | --- | --- | --- |\n")[1]
    names = [row.split("|")[1].strip() for row in table.split("\n\n")[0].splitlines()]
    plain = [re.sub(r"[`']", "", name).replace(" ", "_").lower() for name in names]
    assert plain == [row.__name__ for row in ROWS]


@pytest.mark.parametrize("row", ROWS)
def test_what_differs_from_torchdiffeq(row):
    row()
