"""The Julia engine through the front door: values, gradients, errors, and what it hands back to the native engine."""

import math
import sys
import threading
import traceback
import types

import pytest
import torch

import pyjlode
import pyjlode.bridge.engine
from pyjlode import errors, odeint, odeint_dense, odeint_event, solve
from pyjlode.bridge import packages, runtime

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
A = torch.tensor([[-0.3, 2.0], [-2.0, -0.3]], dtype=F64)
H0 = torch.tensor([1.0, 0.5], dtype=F64)
T = torch.linspace(0, 3, 7, dtype=F64)
TOL = {"rtol": 1e-9, "atol": 1e-11}


def linear(t, h):
    return h @ A.T.to(h)


def exact(t, h0=H0):
    return torch.stack([torch.matrix_exp(A * x) @ h0 for x in t])


class MLP(torch.nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).to(dtype)

    def forward(self, t, h):
        return self.net(h) * torch.cos(t)


def test_states_are_tensors_of_the_users_own_shape():
    solution = solve(linear, H0.expand(3, 2), T, engine="julia", **TOL)
    assert solution.stats.engine == "julia"
    assert solution.h.shape == (7, 3, 2)
    assert torch.allclose(solution.h, exact(T)[:, None].expand(7, 3, 2), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128])
def test_every_dtype(dtype):
    h0 = torch.tensor([1.0, 0.5]).to(dtype)
    rate = -0.5 + 1j if dtype.is_complex else -0.5
    h = odeint(lambda t, h: rate * h, h0, T, engine="julia", rtol=1e-6, atol=1e-7)
    assert h.dtype == dtype
    assert torch.allclose(h, h0 * torch.exp(T[:, None] * rate).to(dtype), atol=1e-5)


def test_pytrees():
    h0 = {"a": torch.ones(2, dtype=F64), "b": (torch.ones(3, 1, dtype=F64), torch.tensor(2.0 + 0j))}
    h = odeint(lambda t, h: {"a": -h["a"], "b": (h["b"][0], 1j * h["b"][1])}, h0, T, engine="julia", **TOL)
    assert torch.allclose(h["a"][-1], torch.full((2,), math.exp(-3), dtype=F64), atol=1e-7)
    assert torch.allclose(h["b"][0][-1], torch.full((3, 1), math.exp(3), dtype=F64), atol=1e-6)
    assert h["b"][1].dtype == torch.complex64
    assert abs(complex(h["b"][1][-1]) - 2 * (math.cos(3) + 1j * math.sin(3))) < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_time_runs_both_ways_and_reaches_f(sign):
    seen = []

    def f(t, h):
        seen.append(float(t))
        return torch.cos(t) * h

    h = odeint(f, H0, sign * T, engine="julia", **TOL)
    assert torch.allclose(h, H0 * torch.exp(torch.sin(sign * T))[:, None], atol=1e-8)
    assert max(sign * t for t in seen) == 3.0


def test_single_time_and_empty_state():
    assert torch.equal(odeint(linear, H0, T[:1], engine="julia"), H0[None])
    assert odeint(lambda t, h: -h, torch.zeros(0, 2, dtype=F64), T, engine="julia").shape == (7, 0, 2)


@pytest.mark.parametrize("name", sorted(pyjlode.bridge.engine.GRADIENTS))
def test_gradients_are_those_of_the_native_engine(name):
    torch.manual_seed(0)
    f, h0 = MLP(), torch.randn(5, 2, dtype=F64, requires_grad=True)
    t = T.clone().requires_grad_()
    inputs = [h0, t, *f.parameters()]

    def gradient(**kwargs):
        h = odeint(f, h0, t, **kwargs, **TOL)
        return torch.autograd.grad((h * torch.arange(7)[:, None, None]).square().sum(), inputs)

    want = gradient(engine="torch", adjoint=False)
    got = gradient(engine="julia", adjoint=name, method="tsit5")
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_parameters_that_f_does_not_use_and_none_at_all():
    unused = torch.ones(3, dtype=F64, requires_grad=True)
    h0 = H0.clone().requires_grad_()

    def f(t, h, unused=unused):
        return linear(t, h)

    h = odeint(f, h0, T, engine="julia", adjoint=True, **TOL)
    grads = torch.autograd.grad(h[-1].sum(), [h0, unused], allow_unused=True)
    assert torch.allclose(grads[0], torch.matrix_exp(3 * A).sum(0), atol=1e-7)
    assert grads[1] is None or not grads[1].any()


def test_backward_twice():
    h0 = H0.clone().requires_grad_()
    h = odeint(linear, h0, T, engine="julia", adjoint=True, **TOL)[-1].sum()
    (a,) = torch.autograd.grad(h, h0, retain_graph=True)
    (b,) = torch.autograd.grad(h, h0)
    assert torch.equal(a, b)


def test_event_and_its_gradient():
    """A ball falls from height x: it lands at sqrt(2 x / 9.81)."""

    def fall(t, h):
        return torch.stack([h[1], torch.full_like(h[1], -9.81)])

    h0 = torch.tensor([2.0, 0.0], dtype=F64, requires_grad=True)
    t, h = odeint_event(fall, h0, 0.0, event_fn=lambda t, h: h[0], engine="julia", adjoint=True, **TOL)
    want = math.sqrt(2 * 2.0 / 9.81)
    assert abs(float(t.detach()) - want) < 1e-8
    assert abs(float(h[-1, 0].detach())) < 1e-7
    (grad,) = torch.autograd.grad(t, h0)
    assert abs(float(grad[0]) - want / (2 * 2.0)) < 1e-6


@pytest.mark.parametrize(
    "event_fn",
    [
        lambda t, h: torch.relu(h - 0.5),
        lambda t, h: -(h - 0.5).clamp(min=0),
        lambda t, h: torch.where(h > 0.5, (h - 0.5) ** 3, 0.0),
        lambda t, h: (h > 0.5).to(h),
        lambda t, h: torch.cat([h, torch.relu(h - 0.5)]),
    ],
    ids=["relu", "clamp", "where", "step", "two"],
)
@pytest.mark.parametrize("compile", [False, True])
def test_an_event_function_that_is_zero_from_the_event_on(event_fn, compile):
    h0 = torch.ones(1, dtype=F64)
    f = lambda t, h: -h  # noqa: E731
    t, _ = odeint_event(f, h0, 0.0, event_fn=event_fn, engine="julia", compile=compile, **TOL)
    assert abs(float(t) - math.log(2)) < 1e-7


def test_dense_output():
    dense = odeint_dense(linear, H0, 0.0, 3.0, engine="julia", **TOL)
    t = torch.tensor([0.1, 1.7, 2.9], dtype=F64)
    assert torch.allclose(dense(t), exact(t), atol=1e-7)


class Broken(Exception):
    pass


def test_an_exception_in_f_is_that_exception_and_julia_goes_on():
    def f(t, h):
        if t > 1:
            raise Broken("in the middle")
        return -h

    with pytest.raises(Broken, match="in the middle") as caught:
        odeint(f, H0, T, engine="julia")
    assert "raise Broken" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert odeint(linear, H0, T, engine="julia").shape == (7, 2)


def test_an_interrupt_in_f_is_an_interrupt():
    def f(t, h):
        if t > 1:
            raise KeyboardInterrupt
        return -h

    with pytest.raises(KeyboardInterrupt):
        odeint(f, H0, T, engine="julia")
    assert odeint(linear, H0, T, engine="julia").shape == (7, 2)


def test_an_interrupt_between_calls_of_f_is_not_lost():
    """As where Ctrl-C comes in a `__del__`, and Python hands it to `sys.unraisablehook`."""
    calls = []

    def f(t, h):
        calls.append(float(t))
        if len(calls) == 20:
            what = types.SimpleNamespace(exc_value=KeyboardInterrupt(), object=None, err_msg=None)
            sys.unraisablehook(what)
        return -h

    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        odeint(f, H0, T, engine="julia", compile=False, rtol=1e-8, atol=1e-8)
    assert len(calls) == 20
    assert sys.unraisablehook is before
    assert odeint(linear, H0, T, engine="julia").shape == (7, 2)


def test_a_shape_that_changes_on_the_way():
    with pytest.raises(errors.BadShape, match="at the start"):
        odeint(lambda t, h: -h if t < 1 else -h[:1], H0, T, engine="julia")


@pytest.mark.parametrize(
    ("error", "f", "options"),
    [
        (errors.MaxStepsReached, linear, {"max_num_steps": 3}),
        (errors.StepSizeTooSmall, lambda t, h: h * h * 10, {}),
        (errors.NonFiniteState, lambda t, h: torch.log(0.5 - t) * h, {}),
    ],
)
def test_failures_are_those_of_the_native_engine(error, f, options):
    for engine in ("torch", "julia"):
        with pytest.raises(error):
            odeint(f, H0, T, engine=engine, options=options)


@pytest.mark.parametrize("method", ["radau5", "rodas5p", "bdf", "kvaerno5", "trbdf2_adaptive"])
@pytest.mark.parametrize(
    ("error", "f"),
    [
        (errors.StepSizeTooSmall, lambda t, h: h * h * 10),
        (errors.NonFiniteState, lambda t, h: torch.log(0.5 - t) * h),
        (errors.NonFiniteState, lambda t, h: -torch.sqrt(h) - 1),
    ],
    ids=["blows up", "leaves its domain in time", "leaves its domain in state"],
)
def test_steps_of_a_stiff_method_that_become_too_small(error, f, method):
    for engine in ("torch", "julia"):
        with pytest.raises(error, match=r"dt="):
            odeint(f, torch.ones(2, dtype=F64), T, engine=engine, method=method)


def test_what_julia_cannot_do_is_said_and_auto_leaves_it_to_torch(monkeypatch):
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")
    h0 = H0.clone().requires_grad_()
    for kwargs in (
        {"adjoint": False},
        {"adjoint": "discrete", "method": "radau5"},
        {"adjoint": "forward", "method": "radau5"},
        {"adjoint": True, "method": "radau5", "atol": torch.full((2,), 1e-6, dtype=F64)},
        {"options": {"norm": torch.linalg.norm}, "adjoint": True},
    ):
        with pytest.raises(errors.BadOption, match=r"the Julia engine cannot do this: .*torch"):
            odeint(linear, h0, T, engine="julia", **kwargs)
        stats = solve(linear, h0, T, engine="auto", **kwargs).stats
        assert stats.engine == "torch"
        assert "cannot" in stats.reason
    assert solve(linear, H0, T, engine="auto").stats.engine == "julia"
    assert solve(linear, h0, T, engine="auto", adjoint=True).stats.engine == "julia"


@pytest.mark.parametrize("method", ["kencarp5", "kvaerno5"])
def test_auto_leaves_inaccurate_methods_to_the_native_engine(method, monkeypatch):
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")
    stats = solve(linear, H0, T, method=method).stats
    assert stats.engine == "torch"
    assert "thousands of tolerances" in stats.reason
    assert solve(linear, H0, T, method=method, engine="julia").stats.engine == "julia"


@pytest.mark.parametrize("adjoint", ["gauss", "backsolve"])
def test_the_backward_solve_has_its_own_options(adjoint):
    """Those that Julia takes count there; with others the solve is the native engine's."""
    net = MLP()

    def calls(**kwargs):
        s = solve(net, H0, T, engine="julia", compile=False, method="tsit5", adjoint=adjoint, **kwargs)
        s.h.square().sum().backward()
        return s.stats.nfe_backward

    few = calls()
    assert calls(adjoint_options={"max_step": 0.01}) > max(2 * few, 300)
    assert calls(adjoint_options={"safety": 0.3}) > 1.5 * few
    assert calls(adjoint_options={"first_step": 1e-9, "ifactor": 2.0}) > few + 20
    assert calls(adjoint_options={"step_t": [0.1 + 0.01 * i for i in range(100)]}) > max(2 * few, 300)

    cannot = [{"norm": lambda state: torch.ones(())}, {"norm": torch.linalg.norm}]
    cannot += [{"norm": "seminorm"}] if adjoint == "backsolve" else []
    for options in cannot:
        with pytest.raises(errors.BadOption, match=r"the Julia engine cannot do this: .*norm"):
            calls(adjoint_options=options)
    if adjoint == "gauss":  # the parameters are not solved for
        calls(adjoint_options={"norm": "seminorm"})
    net.callback_step_adjoint = print
    with pytest.raises(errors.BadOption, match="callbacks"):
        calls()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("adjoint", ["gauss", "interpolating", "quadrature", "backsolve"])
def test_a_backward_solve_that_fails_is_an_error(adjoint, compiled):
    """SciMLSensitivity goes on with whatever its solve leaves."""
    kwargs = {"engine": "julia", "adjoint": adjoint, "compile": compiled, "method": "tsit5"}
    net = MLP()
    h = odeint(net, H0, T, adjoint_options={"max_num_steps": 3}, **kwargs)
    with pytest.raises(errors.MaxStepsReached, match=rf"backward solve of adjoint='{adjoint}'.*max_num_steps=3 .*t=0;"):
        h.sum().backward()
    assert net.net[0].weight.grad is None
    odeint(net, H0, T, **kwargs).sum().backward()
    assert net.net[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("adjoint", ["gauss", "interpolating", "quadrature", "backsolve"])
def test_a_nan_on_the_way_back_is_an_error(adjoint):
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.nan

    h0 = H0.clone().requires_grad_()
    h = odeint(lambda t, h: linear(t, Forward.apply(h)), h0, T, engine="julia", adjoint=adjoint, compile=False)
    with pytest.raises(errors.NonFiniteState, match="backward solve"):
        h.sum().backward()


@pytest.mark.parametrize("adjoint", ["gauss", "interpolating", "quadrature", "backsolve", "forward"])
def test_tolerances_of_each_element(adjoint):
    def gradients(**kwargs):
        torch.manual_seed(0)
        net, h0 = MLP(), H0.clone().requires_grad_()
        h = odeint(net, h0, T, method="tsit5", **kwargs)
        return torch.autograd.grad(h.square().sum(), [h0, *net.parameters()])

    want = gradients(engine="torch", adjoint="discrete", rtol=1e-10, atol=1e-10)
    tol = {"rtol": torch.tensor([1e-8, 1e-7], dtype=F64), "atol": torch.tensor([1e-9, 1e-8], dtype=F64)}
    for a, b in zip(gradients(engine="julia", adjoint=adjoint, **tol), want):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_nobody_can_take_is_no_obstacle():
    for kwargs in ({"method": "euler", "options": {"step_size": 0.01}}, {"method": "bdf"}):
        with torch.no_grad():
            h = odeint(MLP(), H0, T, engine="julia", adjoint=True, **kwargs)
        assert h.shape == (7, 2)


def test_auto_leaves_large_networks_to_the_native_engine(monkeypatch):
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")
    net, narrow = torch.nn.Linear(4096, 4096), torch.nn.Linear(64, 64)
    kwargs = {"method": "tsit5", "rtol": 1e-3, "atol": 1e-3, "dense": False}
    with torch.no_grad():
        stats = solve(lambda t, h: net(h), torch.zeros(4096), T, **kwargs).stats
        assert stats.engine == "torch"
        assert "large" in stats.reason
        assert solve(lambda t, h: narrow(h), torch.zeros(4096, 64), T, **kwargs).stats.engine == "torch"
        assert solve(lambda t, h: narrow(h), torch.zeros(8, 64), T, **kwargs).stats.engine == "julia"
        for more in ({"engine": "julia"}, {"compile": True}):
            assert solve(lambda t, h: net(h), torch.zeros(4096), T, **kwargs, **more).stats.engine == "julia"


def test_a_state_that_is_the_negative_of_its_memory():
    h0 = torch.tensor([1 + 2j], dtype=torch.complex128).conj().imag
    assert h0.is_neg()
    for compile in (False, True, True, True, True, True, True):
        h = odeint(lambda t, h: -h, h0, T, engine="julia", compile=compile, **TOL)
        assert torch.allclose(h[:, 0], -2 * torch.exp(-T), rtol=1e-6)


def test_options_reach_the_solver():
    few = solve(linear, H0, T, engine="julia", options={"first_step": 1e-6}, **TOL).stats
    many = solve(linear, H0, T, engine="julia", options={"max_step": 0.01}, **TOL).stats
    assert many.naccept >= 300 > few.naccept
    times = []

    def jump(t, h):
        times.append(float(t))
        return torch.where(t < 1.1, -h, h)

    h = odeint(jump, H0, T, engine="julia", options={"jump_t": [1.1]}, **TOL)
    assert min(abs(t - 1.1) for t in times) < 1e-8
    assert torch.allclose(h[-1], H0 * math.exp(-1.1 + 1.9), atol=1e-6)


def test_threads_take_turns():
    results = {}

    def work(i):
        h0 = (H0 * (i + 1)).requires_grad_()
        h = odeint(linear, h0, T, engine="julia", adjoint=True, **TOL)
        results[i] = (h.detach(), torch.autograd.grad(h[-1].sum(), h0)[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(10):
        assert torch.allclose(results[i][0], exact(T, H0 * (i + 1)), atol=1e-7 * (i + 1))
        assert torch.allclose(results[i][1], torch.matrix_exp(3 * A).sum(0), atol=1e-6)


def test_backward_on_another_thread_than_forward():
    """As autograd does it for a tensor on a device: the solution was made here, and its adjoint runs there."""
    h0 = H0.clone().requires_grad_()
    h = odeint(linear, h0, T, engine="julia", adjoint=True, **TOL)[-1].sum()
    thread = threading.Thread(target=h.backward)
    thread.start()
    thread.join(timeout=60)
    assert torch.allclose(h0.grad, torch.matrix_exp(3 * A).sum(0), atol=1e-6)


def test_progress_on_this_engine(capsys):
    h = odeint(linear, H0, T, engine="julia", options={"progress": True}, **TOL)
    assert torch.allclose(h, exact(T), atol=1e-7)
    assert "100%" in capsys.readouterr().err
    with pytest.raises(errors.BadOption, match="julia_function"):
        odeint(pyjlode.julia_function(LOTKA, RATES), H0, T, adjoint=True, options={"progress": True})


def test_tolerances_per_element_and_per_leaf():
    h = odeint(linear, H0, T, engine="julia", rtol=torch.tensor([1e-9, 1e-8]), atol=torch.tensor([1e-11, 1e-10]))
    assert torch.allclose(h, exact(T), atol=1e-6)


def test_nfe_counts_every_call():
    calls = 0

    def f(t, h):
        nonlocal calls
        calls += 1
        return linear(t, h)

    stats = solve(f, H0, T, engine="julia", dense=False).stats
    assert stats.nfe == calls
    assert stats.naccept > 0


# ----------------------------------------------------------------------------------------------------------------------
# What only Julia has
# ----------------------------------------------------------------------------------------------------------------------

LOTKA = """
function lotka(du, u, p, t)
    du[1] = p[1] * u[1] - p[2] * u[1] * u[2]
    du[2] = -p[3] * u[2] + p[4] * u[1] * u[2]
end
"""
RATES = torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=F64)


def lotka(p):
    def f(t, h):
        x, y = h
        return torch.stack([p[0] * x - p[1] * x * y, -p[2] * y + p[3] * x * y])

    return f


def test_julia_method():
    method = pyjlode.julia_method("KenCarp47(linsolve=KrylovJL_GMRES())")
    h = odeint(linear, H0, T, method=method, engine="julia", rtol=1e-7, atol=1e-8)
    assert torch.allclose(h, exact(T), atol=1e-3)  # GMRES is content with less than rtol
    assert solve(linear, H0, T, method=pyjlode.julia_method("BS5()"), rtol=1e-6).stats.engine == "julia"
    with pytest.raises(errors.BadOption, match="needs Julia"):
        odeint(linear, H0, T, method=method, engine="torch")
    for wrong in ("NoSuchMethod()", "Tsit5("):
        with pytest.raises(errors.BadOption, match="does not make a solver"):
            odeint(linear, H0, T, method=pyjlode.julia_method(wrong))


@pytest.mark.parametrize("expression", ["ROCK2()", "VCABM()", "SSPRK43()", "Feagin12()", "ETDRK4(krylov=true)"])
def test_solvers_of_other_packages(expression):
    """Loaded when they are named, or the error names the package."""
    ((name, package),) = packages.of(expression).items()
    method = pyjlode.julia_method(expression)
    if runtime.without(package):
        with pytest.raises(errors.BadOption, match=rf"{name} is in {package}\.jl"):
            odeint(linear, H0, T, method=method)
        return
    if name != "ETDRK4":  # which is for problems that are split
        assert torch.allclose(odeint(linear, H0, T, method=method, rtol=1e-7, atol=1e-8), exact(T), atol=1e-4)


def test_solvers_of_second_order_are_refused():
    for expression in ("VelocityVerlet()", "DPRKN6()"):
        with pytest.raises(errors.BadOption, match="second order"):
            odeint(linear, H0, T, method=pyjlode.julia_method(expression))


@pytest.mark.parametrize("specialize", ["auto", "full"])
@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_julia_function(method, specialize):
    f = pyjlode.julia_function(LOTKA, RATES)
    h0 = torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
    kwargs = {"adjoint": "gauss", "rtol": 1e-9, "atol": 1e-10}
    h = odeint(f, h0, T, method=method, options={"specialize": specialize}, **kwargs)
    got = torch.autograd.grad(h[-1].sum(), [h0, f.params])
    p = RATES.clone().requires_grad_()
    want_h = odeint(lotka(p), h0, T, engine="torch", adjoint=False, rtol=1e-10, atol=1e-11)
    want = torch.autograd.grad(want_h[-1].sum(), [h0, p])
    assert torch.allclose(h, want_h, atol=1e-6)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_julia_function_for_a_look_and_its_mistakes():
    f = pyjlode.julia_function(LOTKA, RATES)
    u = torch.tensor([2.0, 0.5], dtype=F64)
    assert torch.allclose(f(torch.tensor(0.0), u), lotka(RATES)(0.0, u))
    with pytest.raises(errors.GradientUnavailable, match="engine='julia'"):
        f(torch.tensor(0.0), u).sum().backward()
    with pytest.raises(errors.BadOption, match="source"):
        pyjlode.julia_function("function f(", 1)
    with pytest.raises(errors.BadOption, match="needs Julia"):
        odeint(f, u, T, engine="torch")
    with torch.no_grad():
        assert solve(f, u, T).stats.nfe > 10


def seir(beta, sigma, gamma):
    def f(t, h):
        S, E, I, _ = h.unbind()
        new = beta * S * I / h.sum()
        return torch.stack([-new, new - sigma * E, sigma * E - gamma * I, gamma * I])

    return f


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("adjoint", ["gauss", "interpolating", "quadrature", "backsolve"])
def test_an_adjoint_does_not_depend_on_units(adjoint, compile):
    """Populations of millions, and a loss of their parts: the adjoint is small, and its error is in proportion."""
    people = 14e6
    p = torch.tensor([0.45, 0.2, 0.15], dtype=F64, requires_grad=True)
    h0 = torch.tensor([people - 100, 60.0, 40.0, 0.0], dtype=F64)
    t = torch.linspace(0, 120, 13, dtype=F64)

    def gradient(unit=1.0, **kwargs):
        h = odeint(seir(*p), h0, t, **{"rtol": 1e-6, "atol": 1e-6, **kwargs})
        return torch.autograd.grad(unit * (h / people).square().sum(), p)[0] / unit

    want = gradient(engine="torch", rtol=1e-10, atol=1e-10)
    julia = {"engine": "julia", "method": "tsit5", "adjoint": adjoint, "compile": compile}
    got = gradient(**julia)
    assert torch.allclose(got, want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))
    assert torch.allclose(gradient(1e-9, **julia), got, rtol=1e-12)
    assert torch.allclose(gradient(1e9, **julia), got, rtol=1e-12)


@pytest.mark.parametrize("reals", [2, 3])
@pytest.mark.parametrize("adjoint", [False, "gauss", "interpolating", "forward"])
def test_real_and_complex_states_together(adjoint, reals):
    w = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def f(t, s):
        x, z = s
        return -w * x * z.abs(), 1j * w * z + x.sum()

    def gradient(**kwargs):
        x0 = torch.ones(reals, dtype=F64, requires_grad=True)
        z0 = torch.tensor([1 + 1j], requires_grad=True)  # of half the precision
        x, z = odeint(f, (x0, z0), T[:4], **kwargs, **TOL)
        loss = x[-1].sum() + (z[-1] * z[-1].conj()).real.sum()
        return torch.autograd.grad(loss, [x0, z0, w])

    want = gradient(engine="torch", adjoint=False)
    kwargs = {"engine": "torch"} if adjoint is False else {"engine": "julia", "method": "tsit5"}
    for a, b in zip(gradient(adjoint=adjoint, **kwargs), want):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_number_keeps_its_shape():
    shapes = set()

    def f(t, h):
        shapes.add(tuple(h.shape))
        return -h

    h = odeint(f, torch.tensor(1.0, dtype=F64), T, engine="julia", compile=False, **TOL)
    assert shapes == {()}
    assert torch.allclose(h, torch.exp(-T), atol=1e-8)


def test_where_julias_stiff_solver_fails_the_native_engine_tries(monkeypatch):
    """As Julia's bdf and radau5 fail with some mass matrices."""
    monkeypatch.delenv("PYJLODE_ENGINE")
    f, h0 = (lambda t, h: -h), torch.ones(2, dtype=F64)
    inner = pyjlode.bridge.engine.solve

    def fails(p, stats, **kwargs):
        inner(p, stats, **kwargs)
        raise errors.StepSizeTooSmall("no step succeeds", t=0.1, dt=1e-9)

    monkeypatch.setattr(pyjlode.bridge.engine, "solve", fails)
    solution = solve(f, h0, T, method="radau5")
    assert solution.stats.engine == "torch"
    assert "Julia's solver failed: no step succeeds" in solution.stats.reason
    assert torch.allclose(solution.h, torch.exp(-T)[:, None].expand(7, 2), atol=1e-6)
    for kwargs in ({"engine": "julia", "method": "radau5"}, {"method": "tsit5"}, {"compile": True, "method": "radau5"}):
        with pytest.raises(errors.StepSizeTooSmall):
            odeint(f, h0, T, **kwargs)


def test_where_it_fails_between_events_the_native_engine_solves_from_the_start(monkeypatch):
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")
    legs, inner = [], pyjlode.bridge.engine.first_event

    def fails(p, stats):
        legs.append(p.times[0])
        if len(legs) > 1:
            raise errors.StepSizeTooSmall("no step succeeds", t=0.7, dt=1e-9)
        return inner(p, stats)

    monkeypatch.setattr(pyjlode.bridge.engine, "first_event", fails)
    reset = pyjlode.Event(lambda t, h: h[0] - 0.5, lambda t, h: h + 0.5)
    h0, t = torch.ones(1, dtype=F64), torch.tensor([0.0, 1.5], dtype=F64)
    solution = solve(lambda t, h: -h, h0, t, method="radau5", rtol=1e-8, atol=1e-8, events=[reset])
    assert solution.stats.engine == "torch"
    assert "Julia's solver failed: no step succeeds" in solution.stats.reason
    assert [float(x.t) for x in solution.events] == pytest.approx([math.log(2), 2 * math.log(2)], rel=1e-6)
    assert float(solution.h[-1]) == pytest.approx(4 * math.exp(-1.5), rel=1e-6)
    legs.clear()
    with pytest.raises(errors.StepSizeTooSmall):
        solve(lambda t, h: -h, h0, t, method="radau5", events=[reset], engine="julia")


def test_forward_of_a_stiff_method_says_what_it_is_not():
    p = torch.tensor(0.7, dtype=F64, requires_grad=True)
    f = lambda t, h: -p * h  # noqa: E731
    stats = [solve(f, H0, T, engine="julia", method="rodas5p", adjoint="forward").stats for _ in range(2)]
    assert "sensitivities of a method for stiff systems" in stats[-1].not_compiled


def test_auto_goes_native_where_an_adjoint_would_call_f_back(monkeypatch):
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")
    rate = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def reads(t, h):
        return -rate * h * math.exp(-float(t))

    def plain(t, h):
        return -rate * h

    def stats(f):
        solution = solve(f, H0, T, adjoint=True, dense=False)
        (gradient,) = torch.autograd.grad(solution.h[-1].sum(), rate)
        assert gradient.isfinite()
        return solution.stats

    for _ in range(3):
        got = stats(reads)
        assert got.engine == "torch"
        assert "call f back" in got.reason
    assert "Python number" in got.reason
    first, *others = [stats(plain) for _ in range(3)]
    assert first.engine == "torch"
    assert "first time" in first.reason
    assert all(x.engine == "julia" and x.compiled for x in others)
    with torch.no_grad():  # without a gradient a solve that calls back is faster there
        assert solve(reads, H0, T, dense=False).stats.engine == "julia"


@pytest.mark.parametrize("method", ["kencarp4", "trbdf2_adaptive"])
def test_estimates_of_singly_implicit_methods_have_the_unit_of_the_state(method):
    """Damped as SciML damps them they are too small: errors of 2,400 and 4,500 tolerances here."""

    def van_der_pol(t, h):
        return torch.stack([h[1], 1e3 * (1 - h[0] ** 2) * h[1] - h[0]])

    def end(method, tol):
        start, t = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([0.0, 1500.0], dtype=F64)
        how = {"rtol": tol, "atol": tol, "max_num_steps": 10**6}
        return odeint(van_der_pol, start, t, method=method, engine="julia", compile=True, **how)[-1]

    tol = 1e-7
    want = end("rodas5p", 1e-11)
    far = (end(method, tol) - want).abs() / (tol * (1 + want.abs()))
    assert float(far.max()) < 500
