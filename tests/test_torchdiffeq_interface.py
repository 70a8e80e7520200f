"""A user of torchdiffeq changes the import line, and all that its documentation offers goes on working.

The tests that compare numbers take torchdiffeq as `peer`. Two differences are meant: `dopri8` is Hairer's DOP853 here,
another method of that order and name; and arguments that are wrong raise `pyjlode.errors`, all ValueError, TypeError or
RuntimeError, where torchdiffeq asserts.
"""

import importlib
import inspect
import math

import pytest
import torch
import torchdiffeq

import pyjlode
from pyjlode import odeint, odeint_adjoint, odeint_dense, odeint_event

F64 = torch.float64

# The lists of torchdiffeq's README and FURTHER_DOCUMENTATION, and what its 0.2.5 has beside them. With the distance of
# its solution from ours at rtol=1e-6: the dense output of its dopri8 and bosh3 is worse than their steps.
ADAPTIVE = {"dopri8": 1e-4, "dopri5": 1e-6, "bosh3": 1e-4, "fehlberg2": 1e-4, "adaptive_heun": 1e-6}
FIXED = ["euler", "midpoint", "rk4", "heun2", "heun3"]
ADAMS = ["explicit_adams", "implicit_adams", "fixed_adams"]
# Of its development version (after 0.2.5), so that there is nothing to compare with.
TSIT5_AND_IMPLICIT = [
    "tsit5",
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA3",
    "gl4",
    "radauIIA5",
    "gl6",
    "sdirk2",
    "trbdf2",
]
ADAPTIVE_OPTIONS = {
    "first_step": 0.01,
    "safety": 0.8,
    "ifactor": 5.0,
    "dfactor": 0.3,
    "min_step": 1e-10,
    "max_step": 0.3,
    "max_num_steps": 2**31 - 1,
    "dtype": torch.float64,
    "step_t": torch.tensor([0.45], dtype=F64),
    "jump_t": torch.tensor([0.6], dtype=F64),
    "norm": lambda h: h.abs().max(),
}


@pytest.fixture
def peer():
    return torchdiffeq


def pendulum(t, h):
    return torch.stack([h[..., 1], -torch.sin(h[..., 0]) + 0.3 * torch.cos(t)], -1)


def autonomous(t, h):
    return torch.stack([h[..., 1], -torch.sin(h[..., 0]) - 0.1 * h[..., 1]], -1)


H0 = torch.tensor([[1.0, 0.0], [0.3, -0.5]], dtype=F64)
T = torch.linspace(0, 2, 9, dtype=F64)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    def forward(self, t, h):
        return self.net(h) - 0.2 * torch.cos(t) * h


def grads(interface, f, h0, t, **kwargs):
    """Gradients of a loss of all outputs by h0, the parameters and t."""
    h0, t = h0.clone().requires_grad_(), t.clone().requires_grad_()
    params = list(f.parameters())
    h = interface(f, h0, t, **kwargs)
    return torch.autograd.grad((h**2).sum(), [h0, t, *params])


def assert_close(a, b, tol):
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=tol, atol=tol), float((x - y).abs().max())


# ----------------------------------------------------------------------------------------------------------------------
# The names
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint", "odeint_event", "odeint_dense"])
def test_every_keyword_is_taken(peer, name):
    """By name; where ours passes keywords on, by `odeint`."""
    theirs = inspect.signature(getattr(peer, name)).parameters.values()
    ours = inspect.signature(getattr(pyjlode, name)).parameters | inspect.signature(odeint).parameters
    keywords = {p.name for p in theirs if p.kind is p.KEYWORD_ONLY}
    assert keywords <= set(ours)
    for p in theirs:  # the same defaults, but for functions and for what the adjoint replaces
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and not callable(p.default):
            by_dtype = {"rtol": 0, "atol": 1}  # in float32 theirs are not to be reached
            usual = pyjlode.arguments.DEFAULTS[F64]
            default = usual[by_dtype[p.name]] if p.name in by_dtype else ours[p.name].default
            assert default == p.default


def test_every_method_is_there(peer):
    solvers = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    assert {*ADAPTIVE, *FIXED, *ADAMS, "scipy_solver"} <= set(solvers)
    assert set(solvers) - {*ADAPTIVE, *FIXED, *ADAMS, "scipy_solver"} <= set(TSIT5_AND_IMPLICIT)
    for name in solvers:
        assert pyjlode.methods.find(name)


# ----------------------------------------------------------------------------------------------------------------------
# The basic call
# ----------------------------------------------------------------------------------------------------------------------


def test_the_call_of_the_readme():
    f, h0 = Net(), torch.rand(5, 2, dtype=F64)
    for interface in (odeint, odeint_adjoint):
        h = interface(f, h0, T)
        assert h.shape == (9, 5, 2)
        assert torch.equal(h[0], h0)
        h[-1].sum().backward()
    assert all(p.grad is not None for p in f.parameters())


@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
@pytest.mark.parametrize("method", [*ADAPTIVE, None], ids=str)
def test_adaptive_solutions_are_the_same_within_the_tolerances(peer, method, backward):
    t = T.flip(0) if backward else T
    rtol = 1e-5 if method == "adaptive_heun" else 1e-6
    ours, theirs = (
        interface(pendulum, H0, t, rtol=rtol, atol=1e-2 * rtol, method=method) for interface in (odeint, peer.odeint)
    )
    assert_close([ours], [theirs], max(ADAPTIVE[method or "dopri5"], rtol))
    exact = odeint(pendulum, H0, t, method="vern9", rtol=1e-12, atol=1e-13)
    assert_close([ours], [exact], 1e-4 if method == "fehlberg2" else 2 * rtol)


@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
@pytest.mark.parametrize(
    "options",
    [{}, {"step_size": 0.15}, {"step_size": 0.15, "interp": "cubic"}, {"perturb": True}, {"grid": True}],
    ids=str,
)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_are_the_same_to_rounding(peer, method, options, backward):
    t = T.flip(0) if backward else T
    if "grid" in options:
        options = {"grid_constructor": lambda f, h0, t: torch.linspace(float(t[0]), float(t[-1]), 7, dtype=F64)}
    ours, theirs = (interface(pendulum, H0, t, method=method, options=options) for interface in (odeint, peer.odeint))
    assert_close([ours], [theirs], 1e-12)


@pytest.mark.parametrize("method", TSIT5_AND_IMPLICIT)
def test_methods_of_the_development_version(method):
    """By its names, with its options, for tensors and tuples."""
    o = {} if method == "tsit5" else {"step_size": 0.02, "interp": "cubic", "max_iters": 100}
    exact = odeint(coupled, PAIR, T, method="vern9", rtol=1e-12, atol=1e-13)
    assert_close(
        odeint(coupled, PAIR, T, method=method, options=o), exact, 2e-2 if method == "implicit_euler" else 4e-4
    )


@pytest.mark.parametrize("method", ADAMS)
def test_adams_methods_are_at_least_as_accurate(peer, method):
    """Theirs are of one order less than they say, so the numbers are not the same."""
    t = torch.linspace(0, 2, 81, dtype=F64)
    exact = odeint(pendulum, H0, t, method="vern9", rtol=1e-12, atol=1e-13)
    ours, theirs = (
        float((interface(pendulum, H0, t, method=method, rtol=1e-10, atol=1e-11) - exact).abs().max())
        for interface in (odeint, peer.odeint)
    )
    assert ours < 1e-5
    assert ours <= 2 * theirs


@pytest.mark.filterwarnings("ignore:The following arguments have no effect:UserWarning")  # torchdiffeq's min_step
@pytest.mark.parametrize("solver", ["RK45", "LSODA", "Radau"])
def test_scipy_solver(peer, solver):
    ours, theirs = (
        interface(pendulum, H0, T, method="scipy_solver", options={"solver": solver}, rtol=1e-8, atol=1e-9)
        for interface in (odeint, peer.odeint)
    )
    assert_close([ours], [theirs], 1e-6)


def coupled(t, h):
    a, b = h
    return -a * b.sum(), torch.cos(t) - b


PAIR = (torch.tensor([1.0, -0.4], dtype=F64), torch.tensor([[0.2], [0.7], [0.1]], dtype=F64))


@pytest.mark.parametrize(("method", "tol"), [("dopri5", 1e-6), ("rk4", 1e-12), ("implicit_adams", 1e-5)])
def test_tuple_state(peer, method, tol):
    """A tuple comes back, and the mixed norm over its tensors gives the same steps."""
    t = torch.linspace(0, 2, 41, dtype=F64)
    ours, theirs = (interface(coupled, PAIR, t, method=method, rtol=1e-7) for interface in (odeint, peer.odeint))
    assert isinstance(ours, tuple)
    assert [x.shape for x in ours] == [(41, 2), (41, 3, 1)]
    assert_close(ours, theirs, tol)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "midpoint"])
def test_complex_state(peer, method):
    def f(t, z):
        return (1j - 0.2) * z + 0.1 * torch.cos(t)

    z0 = torch.tensor([1.0 + 0.5j, -0.3j], dtype=torch.complex128)
    ours, theirs = (interface(f, z0, T, method=method) for interface in (odeint, peer.odeint))
    assert ours.dtype == torch.complex128
    assert_close([ours], [theirs], 1e-6 if method == "dopri5" else 1e-12)


@pytest.mark.parametrize("state", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("time", [torch.float32, F64], ids=str)
def test_dtypes_of_state_and_time(peer, state, time):
    """The state's is what comes out and what f sees of the time, whichever the times have."""
    seen = set()

    def f(t, h):
        seen.add((t.dtype, h.dtype))
        return autonomous(t, h)

    ours = odeint(f, H0.to(state), T.to(time), rtol=1e-5, atol=1e-5)
    assert seen == {(state, state)}
    theirs = peer.odeint(autonomous, H0.to(state), T.to(time), rtol=1e-5, atol=1e-5)
    assert ours.dtype == theirs.dtype == state
    assert_close([ours], [theirs], 1e-3)


TOLERANCES = {
    "numbers": (1e-6, 1e-8),
    "tensors": (torch.tensor(1e-6), torch.tensor(1e-8)),
    "by element": (torch.full((2,), 1e-6, dtype=F64), torch.tensor([1e-8, 1e-3], dtype=F64)),
    "whole shape": (1e-6, torch.full((2, 2), 1e-8, dtype=F64)),
}


@pytest.mark.parametrize("case", TOLERANCES)
def test_tolerances_by_element(peer, case):
    rtol, atol = TOLERANCES[case]
    ours, theirs = (interface(pendulum, H0, T, rtol=rtol, atol=atol) for interface in (odeint, peer.odeint))
    assert_close([ours], [theirs], 1e-2 if case == "by element" else 2e-5)


def test_tolerances_by_element_are_each_its_own():
    """A loose element costs nothing, a tight one much."""

    def steps(atol):
        f = lambda t, h: torch.cos(t * torch.tensor([1.0, 20.0], dtype=F64)) * h  # noqa: E731
        return pyjlode.solve(
            f, torch.ones(2, dtype=F64), T, rtol=1e-14, atol=torch.tensor(atol, dtype=F64)
        ).stats.naccept

    loose, slow, fast, tight = steps([1e-2, 1e-2]), steps([1e-9, 1e9]), steps([1e9, 1e-9]), steps([1e-9, 1e-9])
    assert loose < slow < fast
    assert fast == pytest.approx(tight, rel=0.15)


def test_tolerances_by_tensor_of_a_tuple(peer):
    def steps(rtol, atol):
        return pyjlode.solve(coupled, PAIR, T, rtol=rtol, atol=atol).stats.naccept

    rtol, atol = (1e-3, 1e-9), (1e-4, 1e-11)
    assert steps(1e-3, 1e-4) < steps(rtol, atol) <= steps(1e-9, 1e-11)
    ours, theirs = (interface(coupled, PAIR, T, rtol=rtol, atol=atol) for interface in (odeint, peer.odeint))
    assert_close(ours, theirs, 1e-2)
    # As tensors, one for each element of its tensor.
    parts = tuple(torch.full_like(x, a) for x, a in zip(PAIR, atol))
    again = odeint(coupled, PAIR, T, rtol=rtol, atol=parts)
    assert_close(again, ours, 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
@pytest.mark.parametrize("name", ADAPTIVE_OPTIONS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_every_adaptive_option(peer, method, name, backward):
    t = T.flip(0) if backward else T
    o = {name: ADAPTIVE_OPTIONS[name]}
    tol = {"rtol": 1e-6, "atol": 1e-8}
    ours, theirs = (interface(pendulum, H0, t, method=method, options=o, **tol) for interface in (odeint, peer.odeint))
    assert_close([ours], [theirs], 2 * ADAPTIVE[method])


def test_all_adaptive_options_at_once():
    h = odeint(pendulum, H0, T, method="dopri5", options=ADAPTIVE_OPTIONS)
    assert_close([h], [odeint(pendulum, H0, T)], 1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_jump_t_on_a_field_that_jumps(peer, sign):
    def f(t, h):
        return torch.where(sign * t < 0.6, -h, 3 + 0 * h)

    t, o = sign * T, {"jump_t": torch.tensor([sign * 0.6], dtype=F64)}
    ours, theirs = (interface(f, H0, t, method="dopri5", options=o) for interface in (odeint, peer.odeint))
    assert_close([ours], [theirs], 1e-6)
    assert_close([ours[-1]], [H0 * math.exp(-sign * 0.6) + sign * 3 * 1.4], 1e-6)


def test_norm_of_a_tuple(peer):
    seen = []

    def norm(h):
        seen.append([tuple(x.shape) for x in h])
        return max(x.abs().max() for x in h)

    ours, theirs = (
        interface(coupled, PAIR, T, method="dopri5", options={"norm": norm}) for interface in (odeint, peer.odeint)
    )
    assert all(shapes == [(2,), (3, 1)] for shapes in seen)
    assert_close(ours, theirs, 1e-6)


def test_perturb_on_a_field_that_jumps(peer):
    def f(t, h):
        return torch.floor(t * 2) + 0 * h

    t = torch.linspace(0, 2, 5, dtype=F64)
    ours, theirs = (interface(f, H0, t, method="rk4", options={"perturb": True}) for interface in (odeint, peer.odeint))
    assert_close([ours], [theirs], 1e-12)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_options_of_the_adams_methods(method):
    t = torch.linspace(0, 2, 81, dtype=F64)
    exact = odeint(pendulum, H0, t, method="vern9", rtol=1e-12, atol=1e-13)
    o = {"max_order": 5, "interp": "cubic", "step_size": 0.025}
    if method == "implicit_adams":
        o["max_iters"] = 8
    assert_close([odeint(pendulum, H0, t, method=method, options=o)], [exact], 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# odeint_dense
# ----------------------------------------------------------------------------------------------------------------------


def test_dense_output(peer):
    """A function of time, from 0-d tensors of times."""
    t0, t1 = torch.tensor(0.0, dtype=F64), torch.tensor(2.0, dtype=F64)
    ours, theirs = (dense(pendulum, H0, t0, t1, rtol=1e-8, atol=1e-9) for dense in (odeint_dense, peer.odeint_dense))
    for x in (0.01, 0.7, 1.234, 1.99):
        t = torch.tensor(x, dtype=F64)
        assert ours(t).shape == (2, 2)
        assert_close([ours(t)], [theirs(t)], 1e-6)
    assert_close([ours(T)], [odeint(pendulum, H0, T, rtol=1e-8, atol=1e-9)], 1e-7)


@pytest.mark.parametrize("method", [*ADAPTIVE, "tsit5", "rk4"])
def test_dense_output_of_other_methods_and_of_tuples(method):
    """Which torchdiffeq does not have; differentiable too."""
    o = {"step_size": 0.01} if method == "rk4" else {}
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
    h = odeint_dense(
        lambda t, h: tuple(scale * x for x in coupled(t, h)),
        PAIR,
        0.0,
        2.0,
        method=method,
        options=o,
        rtol=1e-5,
        atol=1e-6,
    )
    exact = odeint(coupled, PAIR, torch.tensor([0.0, 0.5], dtype=F64), rtol=1e-11)
    found = h(0.5)
    assert_close(found, [x[-1] for x in exact], 1e-3)
    (g,) = torch.autograd.grad(found[0].sum(), scale)
    assert float(g) != 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_gradients_are_the_same(peer, name, backward):
    f, t = Net(), (T.flip(0) if backward else T)
    tol = {"rtol": 1e-9, "atol": 1e-10}
    ours = grads(getattr(pyjlode, name), f, H0, t, **tol)
    theirs = grads(peer.odeint_adjoint, f, H0, t, adjoint_params=tuple(f.parameters()), **tol)
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("method", FIXED)
def test_gradients_through_fixed_steps_are_the_same_to_rounding(peer, method):
    f = Net()
    ours, theirs = (grads(interface, f, H0, T, method=method) for interface in (odeint, peer.odeint))
    assert_close(ours, theirs, 1e-11)


@pytest.mark.parametrize(("method", "tol"), [("rk4", 1e-7), ("euler", 1e-1), ("midpoint", 1e-3)])
def test_adjoint_with_fixed_steps_is_the_same_to_rounding(peer, method, tol):
    """The backward solve steps between the output times too, over the same augmented state.

    By t[0] to what the steps leave: theirs is the balance of the derivatives by all times, ours is -g f(t[0], h0).
    """
    f = Net()
    ours, theirs = (
        grads(interface, f, H0, T, method=method, options={"step_size": 0.05})
        for interface in (odeint_adjoint, peer.odeint_adjoint)
    )
    assert_close([ours[0], ours[1][1:], *ours[2:]], [theirs[0], theirs[1][1:], *theirs[2:]], 1e-10)
    assert_close([ours[1][0]], [theirs[1][0]], tol)


ADJOINT = {
    "tolerances": {"adjoint_rtol": 1e-8, "adjoint_atol": 1e-9},
    "method": {"adjoint_method": "bosh3", "adjoint_rtol": 1e-7, "adjoint_atol": 1e-7},
    "fixed": {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.02}},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "norm": {"adjoint_options": {"norm": lambda parts: max(x.abs().max() for x in parts)}},
    "options": {"adjoint_options": {"first_step": 0.01, "max_step": 0.1}},
}


@pytest.mark.parametrize("case", ADJOINT)
def test_every_keyword_of_the_adjoint(peer, case):
    f = Net()
    ours, theirs = (
        grads(interface, f, H0, T, rtol=1e-9, atol=1e-10, method="dopri5", **ADJOINT[case])
        for interface in (odeint_adjoint, peer.odeint_adjoint)
    )
    assert_close(ours, theirs, 1e-3)
    assert_close(ours, grads(odeint, f, H0, T, rtol=1e-9, atol=1e-10), 1e-4)


def test_adjoint_of_a_tuple_state(peer):
    w = torch.tensor(0.8, dtype=F64, requires_grad=True)

    class Coupled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(w.detach().clone())

        def forward(self, t, h):
            return tuple(self.w * x for x in coupled(t, h))

    def run(interface, **kwargs):
        f, h0 = Coupled(), tuple(x.clone().requires_grad_() for x in PAIR)
        a, b = interface(f, h0, T, rtol=1e-8, atol=1e-9, **kwargs)
        return torch.autograd.grad((a**2).sum() + b[-1].sum(), [*h0, f.w])

    for kwargs in ({}, {"adjoint_options": {"norm": "seminorm"}}):
        ours, theirs = (run(interface, **kwargs) for interface in (odeint_adjoint, peer.odeint_adjoint))
        assert_close(ours, theirs, 1e-5)


def test_adjoint_params(peer):
    """With them f is no module; none of them leaves the state; the others get nothing."""
    w, v = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.5, 0.3))

    def f(t, h):
        return -w * h + v

    def run(interface, params):
        h0 = H0.clone().requires_grad_()
        h = interface(f, h0, T, adjoint_params=params)
        return torch.autograd.grad(h.sum(), [h0, w, v], allow_unused=True)

    for params in ((w, v), (w,), ()):
        ours, theirs = (run(interface, params) for interface in (odeint_adjoint, peer.odeint_adjoint))
        assert [g is None for g in ours] == [g is None for g in theirs]
        assert_close([g for g in ours if g is not None], [g for g in theirs if g is not None], 1e-5)


def test_adjoint_without_a_module_finds_the_parameters():
    """torchdiffeq refuses, for fear of a silent zero."""
    w = torch.tensor(0.5, dtype=F64, requires_grad=True)
    h = odeint_adjoint(lambda t, h: -w * h, H0, T, rtol=1e-9)
    (g,) = torch.autograd.grad(h.sum(), w)
    assert float(g) == pytest.approx(-float((T * torch.exp(-0.5 * T)).sum() * H0.sum()), rel=1e-6)


def test_another_adjoint_method_needs_its_own_options(peer):
    """Both refuse to guess."""
    for interface, error in ((odeint_adjoint, pyjlode.errors.BadOption), (peer.odeint_adjoint, ValueError)):
        with pytest.raises(error, match="adjoint_options"):
            interface(Net(), H0, T, method="rk4", options={"step_size": 0.1}, adjoint_method="dopri5")
    h = odeint_adjoint(
        Net(), H0, T, method="rk4", options={"step_size": 0.1}, adjoint_method="dopri5", adjoint_options={}
    )
    h.sum().backward()


# ----------------------------------------------------------------------------------------------------------------------
# Events
# ----------------------------------------------------------------------------------------------------------------------


def ball(t, h):
    """Height and speed in free fall."""
    return torch.stack([h[1], torch.full_like(h[1], -9.8)])


def up_and_to_the_wall(t, h):
    """The floor, a ceiling, and a time."""
    return torch.stack([h[0], 30.0 - h[0], 5.0 - t])


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse_time"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_event_times_states_and_gradients(peer, method, reverse, name):
    """odeint_interface is odeint or odeint_adjoint; gradients by the state, by the parameters and by t0."""

    class Fall(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.g = torch.nn.Parameter(torch.tensor(9.8, dtype=F64))

        def forward(self, t, h):
            return torch.stack([h[1], -self.g + 0 * h[1]])

    def run(event, interface):
        f = Fall()
        h0 = torch.tensor([3.0, -2.0 if reverse else 2.0], dtype=F64, requires_grad=True)
        t0 = torch.tensor(0.5, dtype=F64, requires_grad=True)
        t, h = event(
            f,
            h0,
            t0,
            event_fn=lambda t, h: h[0],
            reverse_time=reverse,
            odeint_interface=interface,
            method=method,
            options={"step_size": 0.05} if method == "rk4" else {},
            atol=1e-9,
        )
        by_time = torch.autograd.grad(t, [h0, f.g, t0], retain_graph=True)
        by_state = torch.autograd.grad(h[-1][1], [h0, f.g])
        return [t.detach(), h.detach(), *by_time, *by_state]

    ours = run(odeint_event, getattr(pyjlode, name))
    # Closed form: 3 + 2 s - 4.9 s² = 0.
    s = (2 + math.sqrt(4 + 4 * 4.9 * 3)) / 9.8
    sign = -1 if reverse else 1
    exact = 0.5 + sign * s
    linear = method == "rk4"  # outputs between the points of a fixed grid are linear, as in torchdiffeq
    assert float(ours[0]) == pytest.approx(exact, abs=1e-2 if linear else 1e-8)
    assert ours[1].shape == (2, 2)
    theirs = run(peer.odeint_event, getattr(peer, name))
    assert_close(ours[:2], theirs[:2], 1e-2 if linear else 1e-7)
    assert_close(ours[2:], theirs[2:], 1e-1 if linear else 1e-5)


@pytest.mark.parametrize(("speed", "when"), [(2.0, 1), (40.0, 2)], ids=["floor", "ceiling"])
def test_the_first_of_several_events_ends_the_solve(peer, speed, when):
    h0, t0 = torch.tensor([3.0, speed], dtype=F64), torch.tensor(0.0, dtype=F64)
    ours, theirs = (
        event(ball, h0, t0, event_fn=up_and_to_the_wall, atol=1e-9, odeint_interface=interface)
        for event, interface in ((odeint_event, odeint), (peer.odeint_event, peer.odeint))
    )
    assert_close(ours, theirs, 1e-7)
    level = {1: 0.0, 2: 30.0}[when]
    assert float(ours[1][-1, 0]) == pytest.approx(level, abs=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_event_fn_of_odeint_itself(peer, sign):
    """t has two elements, of which the second tells the direction; event_fn may look at the time alone."""
    t = torch.tensor([1.0, 1.0 + sign], dtype=F64)
    for event_fn in (lambda t, h: t - (1 + 0.7 * sign), lambda t, h: h[0, 0] - 0.8):
        ours, theirs = (interface(pendulum, H0, t, event_fn=event_fn, atol=1e-9) for interface in (odeint, peer.odeint))
        assert_close(ours, theirs, 1e-7)


def test_event_of_a_tuple_state(peer):
    """With the event's parameters in the state, as torchdiffeq asks for."""

    def f(t, h):
        return h[1], -9.8 + 0 * h[1], 0 * h[2]

    def run(event, interface):
        h0 = tuple(torch.tensor([x], dtype=F64, requires_grad=True) for x in (3.0, 2.0, 0.4))
        t0 = torch.tensor(0.0, dtype=F64)
        t, h = event(f, h0, t0, event_fn=lambda t, h: (h[0] - h[2])[0], odeint_interface=interface, atol=1e-9)
        return [t, *h, *torch.autograd.grad(t, h0)]

    ours, theirs = run(odeint_event, odeint), run(peer.odeint_event, peer.odeint)
    assert_close(ours, theirs, 1e-6)


def test_event_parameters_outside_the_state_get_their_gradient():
    """Which torchdiffeq drops. 3 + 2 s - 4.9 s² = c: ds/dc = 1 / (2 - 9.8 s)."""
    h0 = torch.tensor([3.0, 2.0], dtype=F64, requires_grad=True)
    c = torch.tensor(0.4, dtype=F64, requires_grad=True)
    t, _ = odeint_event(ball, h0, torch.tensor(0.0, dtype=F64), event_fn=lambda t, h: h[0] - c)
    (g,) = torch.autograd.grad(t, c)
    assert float(g) == pytest.approx(1 / (2 - 9.8 * float(t.detach())), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Callbacks
# ----------------------------------------------------------------------------------------------------------------------


class Called(Net):
    """Has every documented callback, and keeps (name, t0, shape of y0, dt)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def note(self, name, t0, y0, dt):
        self.calls.append((name, float(t0), y0, float(dt)))

    def callback_step(self, t0, y0, dt):
        self.note("step", t0, y0, dt)

    def callback_step_adjoint(self, t0, y0, dt):
        self.note("step_adjoint", t0, y0, dt)

    def times(self, name):
        return [t0 for called, t0, _, _ in self.calls if called == name]


class CalledAdaptive(Called):
    def callback_accept_step(self, t0, y0, dt):
        self.note("accept", t0, y0, dt)

    def callback_reject_step(self, t0, y0, dt):
        self.note("reject", t0, y0, dt)

    def callback_accept_step_adjoint(self, t0, y0, dt):
        self.note("accept_adjoint", t0, y0, dt)

    def callback_reject_step_adjoint(self, t0, y0, dt):
        self.note("reject_adjoint", t0, y0, dt)


@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
@pytest.mark.parametrize("method", ["rk4", "explicit_adams"])
def test_callbacks_of_fixed_steps(peer, method, backward):
    """The same steps at the same times, in the backward pass as well."""
    t = T.flip(0) if backward else T

    def run(interface):
        f = Called()
        h = interface(f, H0, t, method=method, options={"step_size": 0.125})
        forward = f.times("step")
        h.sum().backward()
        return f, forward, f.times("step_adjoint")

    (f, *ours), (_, *theirs) = run(odeint_adjoint), run(peer.odeint_adjoint)
    assert ours[0] == pytest.approx(theirs[0])
    # torchdiffeq gives the times of the backward pass the wrong sign where t decreases.
    assert ours[1] == pytest.approx([-x for x in theirs[1]] if backward else theirs[1])
    name, t0, y0, dt = f.calls[0]
    assert (name, t0, abs(dt)) == ("step", float(t[0]), 0.125)
    assert torch.equal(y0, H0)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_callbacks_of_adaptive_steps(method):
    """Each step is announced, then accepted or rejected; so too backward, beginning at the last time."""
    f = CalledAdaptive()
    h = odeint_adjoint(f, H0, T, method=method, rtol=1e-3, atol=1e-4)
    assert {name for name, *_ in f.calls} <= {"step", "accept", "reject"}
    h.sum().backward()
    for suffix in ("", "_adjoint"):
        names = [name for name, *_ in f.calls if name.endswith("_adjoint") == bool(suffix)]
        assert names[::2] == ["step" + suffix] * (len(names) // 2)
        assert set(names[1::2]) <= {"accept" + suffix, "reject" + suffix}
        assert "accept" + suffix in names
    assert f.times("accept")[0] == 0.0
    assert f.times("accept_adjoint")[0] == 2.0


def test_callbacks_may_be_attributes_of_a_function():
    calls = []

    def f(t, h):
        return -h

    f.callback_step = lambda t0, y0, dt: calls.append(float(t0))
    odeint(f, H0, T, method="rk4")
    assert calls == T[:-1].tolist()


def test_callbacks_that_scipy_does_not_call_are_named_in_a_warning():
    with pytest.warns(UserWarning, match="does not call callback_step"):
        odeint(Called(), H0, T, method="scipy_solver")
