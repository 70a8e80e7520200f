"""Gradients through stiff methods: Robertson, as an ODE and a DAE, and a pendulum of index 1, against differences."""

import functools
import gc
import itertools
import weakref

import pytest
import torch
from designs import covering

import pyjlode
from pyjlode import METHODS, errors, odeint

F64 = torch.float64
STIFF = [m.name for m in METHODS.values() if m.controlled]
MASS = [m.name for m in METHODS.values() if m.mass]
# What two steps of order 2 differ by is more than the other tests ask for.
ACCURATE = [m for m in STIFF if METHODS[m].order > 2]
ADJOINTS = [False, "discrete", "interpolating", "gauss", "quadrature", "forward"]
CONTINUOUS = ["interpolating", "gauss", "quadrature"]
# "interpolating" is "gauss" here, to the last bit: `test_interpolating_is_gauss`.
DIFFERENT = [x for x in ADJOINTS if x != "interpolating"]
RATES = torch.tensor([0.04, 3e7, 1e4], dtype=F64)
WEIGHTS = torch.tensor([1.0, 1e4, -0.7], dtype=F64)


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def robertson(h, k):
    a, b, c = h.unbind(-1)
    slow, fast, back = k[0] * a, k[1] * b * b, k[2] * b * c
    return torch.stack([back - slow, slow - back - fast, fast], -1)


def robertson_dae(h, k):
    a, b, c = h.unbind(-1)
    slow, fast, back = k[0] * a, k[1] * b * b, k[2] * b * c
    return torch.stack([back - slow, slow - back - fast, a + b + c - 1], -1)


def pendulum(h, p):
    """A pendulum with friction as a system of index 1: the constraint is that of the acceleration."""
    x, y, u, v, tension = h.unbind(-1)
    gravity, friction = p
    force = u * u + v * v - tension * (x * x + y * y) - gravity * y
    return torch.stack([u, v, -tension * x - friction * u, -tension * y - gravity - friction * v, force], -1)


def loss(f, logs, h0, scale, t, method, adjoint, tol, atol, weights, mass=None):
    """Of one system; of each where h0 (B, n) and logs (B, p) are those of several."""
    rates = (scale * torch.exp(logs)).unbind(-1)
    h = odeint(
        lambda t, h: f(h, rates),
        h0,
        t,
        method=method,
        rtol=tol,
        atol=atol,
        adjoint=adjoint,
        mass_matrix=mass,
        options={"batch_dims": h0.ndim - 1} | ({} if mass is None else {"consistent": "compute"}),
    )
    return h[-1] @ weights + 0.5 * (h[1] @ weights)


def differences(values, n, step):
    """Central differences of order 4 at zero; `values` takes several points at once, (B, n) to (B,)."""
    points = step * tensor(-2.0, -1.0, 1.0, 2.0)[:, None, None] * torch.eye(n, dtype=F64)
    return tensor(1.0, -8.0, 8.0, -1.0) @ values(points.reshape(-1, n)).reshape(4, n) / (12 * step)


def one_by_one(value):
    """For `differences`: of a function of one point."""
    return lambda points: torch.stack([value(x) for x in points])


@functools.cache
def robertson_reference():
    t = tensor(0.0, 1.0, 40.0)

    def values(x):
        h0 = tensor(1.0, 0.0, 0.0).expand(len(x), 3)
        return loss(robertson, x, h0, RATES, t, "radau5", False, 1e-9, 1e-13, WEIGHTS)

    return differences(values, 3, 1e-2)


# (rtol of all adjoints but the continuous ones; rtol of these, which go along the dense output, whose order is lower).
# The methods of order 2 need thousands of steps.
TOLERANCES = {
    "rosenbrock23": (2e-7, 1.5e-8),
    "trbdf2_adaptive": (3e-9, 1e-7),
    "kencarp4": (1e-8, 2e-9),
    "kencarp5": (2e-10, 2e-10),
    "kvaerno5": (2e-10, 2e-10),
    "rodas5p": (1e-7, 1e-7),
    "radau5": (3e-7, 3e-7),
    "bdf": (1e-8, 1e-8),
    "auto": (1e-8, 1e-8),
}


def rates_to(accuracy, adjoints, methods=STIFF):
    slow = [pytest.mark.slow] if accuracy < 1e-4 else []
    return [pytest.param(accuracy, method, adjoint, marks=slow) for method in methods for adjoint in adjoints]


# To 1e-6 "quadrature" takes the methods whose dense output is of low order up to half a minute.
EXACTLY = [x for x in DIFFERENT if x != "quadrature"]
TO_TWO_DIGITS = [*rates_to(1e-2, EXACTLY), *rates_to(1e-2, ["quadrature"], ["rodas5p", "radau5", "kencarp4"])]
TO_SIX_DIGITS = [*rates_to(1e-6, EXACTLY), *rates_to(1e-6, ["quadrature"], ["rodas5p", "radau5", "bdf", "auto"])]


@pytest.mark.parametrize(("accuracy", "method", "adjoint"), [*TO_TWO_DIGITS, *TO_SIX_DIGITS], ids=str)
def test_robertsons_rate_constants(accuracy, method, adjoint):
    """To 1e-6 relative, and to 1e-2 at looser tolerances; the continuous adjoints of the methods of order 2 to ten
    times that, which is nine seconds there: their error falls with rtol to the power 2/3, so that 1e-6 takes four to
    eight times as long."""
    logs = torch.zeros(3, dtype=F64, requires_grad=True)
    h0, t = tensor(1.0, 0.0, 0.0), tensor(0.0, 1.0, 40.0)
    looser = (
        1
        if accuracy == 1e-6
        else {"rosenbrock23": 2e4, "trbdf2_adaptive": 2e4, "kencarp4": 2e4, "radau5": 4e4}.get(method, 2e5)
    )
    tol = looser * TOLERANCES[method][adjoint in CONTINUOUS]
    value = loss(robertson, logs, h0, RATES, t, method, adjoint, tol, tol * 1e-4, WEIGHTS)
    (grad,) = torch.autograd.grad(value, logs)
    accuracy *= 10 if METHODS[method].order == 2 and adjoint in CONTINUOUS else 1
    assert float(((grad - robertson_reference()) / robertson_reference()).abs().max()) < accuracy


@pytest.mark.parametrize("method", STIFF)
def test_a_recorded_solve_takes_the_steps_of_an_unrecorded_one(method):
    """The slope that a step hands on is that of the state which is recorded: the two part no further than rounding."""
    steps = []
    for record in (False, True):
        logs = torch.zeros(3, dtype=F64, requires_grad=record)
        solution = pyjlode.solve(
            lambda t, h, logs=logs: robertson(h, RATES * torch.exp(logs)),
            tensor(1.0, 0.0, 0.0),
            tensor(0.0, 40.0),
            method=method,
            rtol=1e-5,
            atol=1e-9,
            adjoint=False,
            dense=False,
        )
        assert solution.h.requires_grad == record
        steps.append(solution.stats.naccept + solution.stats.nreject)
    assert abs(steps[1] - steps[0]) <= 0.02 * steps[0] + 2


DAES = {
    "robertson": (robertson_dae, torch.diag(tensor(1.0, 1.0, 0.0)), RATES, tensor(1.0, 0.0, 0.0), WEIGHTS, 1e-4, 4.0),
    "pendulum": (
        pendulum,
        torch.diag(tensor(1.0, 1.0, 1.0, 1.0, 0.0)),
        tensor(9.81, 0.2),
        tensor(1.0, 0.0, 0.1, 0.0, 0.0),
        tensor(1.0, 0.5, -0.3, 0.2, 0.1),
        1.0,
        0.6,
    ),
}


@functools.cache
def dae_reference(name):
    f, mass, scale, h0, weights, small, end = DAES[name]
    n, t = len(scale), tensor(0.0, end / 4, end)
    # Differential components only, and those that stay in the domain: the algebraic one is computed from them.
    which = [0] if name == "robertson" else [0, 1, 2, 3]

    def values(x):
        start = h0.expand(len(x), -1).index_add(1, torch.tensor(which), x[:, n:])
        return loss(f, x[:, :n], start, scale, t, "radau5", False, 1e-9, small * 1e-9, weights, mass)

    return which, differences(values, n + len(which), 1e-2)


INDEX_1 = [
    *covering([1e-3], DAES, MASS, DIFFERENT),
    *(
        pytest.param(1e-6, *case, marks=pytest.mark.slow)
        for case in itertools.product(DAES, MASS, ["discrete", "gauss"])
    ),
]


@pytest.mark.parametrize(("accuracy", "name", "method", "adjoint"), INDEX_1, ids=str)
def test_systems_of_index_1(accuracy, name, method, adjoint):
    """With respect to parameters and to the start (Cao, Li, Petzold & Serban 2003): the start's algebraic component has
    no derivative, because it is computed from the others."""
    f, mass, scale, h0, weights, small, end = DAES[name]
    logs, start = torch.zeros(len(scale), dtype=F64, requires_grad=True), h0.clone().requires_grad_()
    tol = accuracy / (100 if method == "bdf" else 30)
    t = tensor(0.0, end / 4, end)
    value = loss(f, logs, start, scale, t, method, adjoint, tol, small * tol, weights, mass)
    of_logs, of_start = torch.autograd.grad(value, (logs, start))
    which, reference = dae_reference(name)
    grad = torch.cat([of_logs, of_start[which]])
    assert float(((grad - reference) / reference.abs().max()).abs().max()) < accuracy
    assert float(of_start[-1].abs()) < accuracy


def forced(t, h, p):
    return torch.stack([-p[0] * h[0] ** 2 + torch.sin(p[1] * t), p[1] * h[0] * h[1] - h[1] ** 3])


def forced_loss(h0, t, p, method, adjoint, tol=1e-7):
    h = odeint(lambda t, h: forced(t, h, p), h0, t, method=method, rtol=tol, atol=tol, adjoint=adjoint)
    return h[1].square().sum() + 2 * h[-1].prod()


FORCED = [tensor(1.0, 0.5), tensor(0.1, 0.6, 1.3), tensor(2.0, 0.7)]


@functools.cache
def forced_reference():
    def value(x):
        h0, t, p = (a + b for a, b in zip(FORCED, x.split([2, 3, 2])))
        return forced_loss(h0, t, p, "dopri8", False, 1e-12)

    return differences(one_by_one(value), 7, 1e-3)


@pytest.mark.parametrize("method", ACCURATE)
@pytest.mark.parametrize("adjoint", [False, "discrete", "gauss"], ids=str)
def test_times_start_and_parameters(method, adjoint):
    inputs = [x.clone().requires_grad_() for x in FORCED]
    grads = torch.autograd.grad(forced_loss(*inputs, method, adjoint), inputs)
    torch.testing.assert_close(torch.cat(grads), forced_reference(), rtol=1e-4, atol=1e-4)


@functools.cache
def hessian(method):
    h0, p = tensor(1.0, 0.5).requires_grad_(), tensor(2.0, 0.7).requires_grad_()
    value = forced_loss(h0, tensor(0.1, 0.4), p, method, False, 1e-7)
    grad = torch.cat(torch.autograd.grad(value, (h0, p), create_graph=True))
    rows = [torch.cat(torch.autograd.grad(g, (h0, p), retain_graph=True)) for g in grad]
    return torch.stack(rows)


@pytest.mark.parametrize("method", ACCURATE)
def test_second_derivatives(method):
    """adjoint=False: the Hessian is symmetric, and that of a non-stiff method."""
    H = hessian(method)
    torch.testing.assert_close(H, H.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(H, hessian("dopri8"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", STIFF)
def test_discrete_is_the_derivative_of_the_numbers_that_came_out(method):
    """At a loose tolerance the replay agrees with differentiation through the solver to what Newton leaves."""
    grads = []
    for adjoint in (False, "discrete"):
        h0, p = tensor(1.0, 0.5).requires_grad_(), tensor(2.0, 0.7).requires_grad_()
        value = forced_loss(h0, tensor(0.1, 0.6, 1.3), p, method, adjoint, 1e-4)
        grads.append(torch.cat(torch.autograd.grad(value, (h0, p))))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adjoint", [True, "gauss"])
@pytest.mark.parametrize("method", ["rodas5p", "radau5", "bdf", "kvaerno5"])
def test_batches(method, adjoint):
    """The gradient of a batch is that of its systems."""
    k = RATES * torch.logspace(-0.5, 0.5, 2, dtype=F64)[:, None]
    h0, t = tensor(1.0, 0.0, 0.0).repeat(2, 1), tensor(0.0, 0.1)
    kwargs = {"method": method, "rtol": 1e-5, "atol": 1e-9, "adjoint": adjoint}

    def gradient(h0, k, **more):
        logs = torch.zeros_like(k, requires_grad=True)
        rate = k * torch.exp(logs)
        h = odeint(lambda t, h: robertson(h, rate.unbind(-1)), h0, t, **kwargs, **more)
        return torch.autograd.grad((h[-1] @ WEIGHTS).sum(), logs)[0]

    together = gradient(h0, k, options={"batch_dims": 1})
    for i in range(2):
        torch.testing.assert_close(together[i], gradient(h0[i], k[i]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", STIFF)
def test_interpolating_is_gauss(method):
    """A stiff method does not carry the integral over the parameters as a state."""
    grads = []
    for adjoint in ("interpolating", "gauss"):
        h0, p = tensor(1.0, 0.5).requires_grad_(), tensor(2.0, 0.7).requires_grad_()
        value = forced_loss(h0, tensor(0.1, 0.6, 1.3), p, method, adjoint, 1e-3)
        grads.append(torch.cat(torch.autograd.grad(value, (h0, p))))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_backsolve_is_refused_with_the_reason_and_works_where_insisted():
    h0 = tensor(1.0).requires_grad_()
    kwargs = {"method": "radau5", "rtol": 1e-8, "atol": 1e-8}
    with pytest.raises(errors.BadOption, match="backward in time"):
        pyjlode.odeint_adjoint(lambda t, h: -3 * h, h0, tensor(0.0, 1.0), **kwargs)
    for method in ("radau5", "rodas5p"):
        p = torch.tensor(3.0, dtype=F64, requires_grad=True)
        h = pyjlode.odeint_adjoint(
            lambda t, h, p=p: -p * h,
            h0,
            tensor(0.0, 1.0),
            **{**kwargs, "method": method},
            options={"allow_unstable": True},
        )
        grads = torch.autograd.grad(h[-1].sum(), (h0, p))
        exact = torch.exp(tensor(-3.0))
        torch.testing.assert_close(grads[0], exact, rtol=1e-5, atol=0)
        torch.testing.assert_close(grads[1], -exact[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("adjoint", [False, True, "gauss"], ids=str)
@pytest.mark.parametrize("method", ["radau5", "bdf", "rodas5p", "kvaerno5", "auto"])
def test_a_solve_is_freed_without_the_garbage_collector(method, adjoint):
    p = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def f(t, h):
        return -p * h

    def run(f):
        h = odeint(f, tensor(1.0, 1.0), tensor(0.0, 1.0), method=method, rtol=1e-4, adjoint=adjoint)
        h.sum().backward()
        return h

    # PyTorch may import torch._dynamo in the first one, and something there keeps the frames that imported it.
    run(lambda t, h: -p * h)
    gc.disable()
    try:
        h = run(f)
        gone = weakref.ref(f)
        del f, h
        assert gone() is None
    finally:
        gc.enable()


def relaxing(t, h, p):
    """h[0] follows h[1] at the rate p[0]."""
    return torch.stack([-p[0] * (h[0] ** 3 - h[1] ** 2), -p[1] * h[1] + 0.1 * h[0]])


def driven(t, h, p):
    """Van der Pol's oscillator, on the slow manifold."""
    return torch.stack([h[1], p[0] * (1 - h[0] ** 2) * h[1] - p[1] * h[0]])


# (f, parameters, start, times, size of the state)
REPLAYED = {
    "relaxing": (relaxing, tensor(1e5, 1.0), tensor(1.0, 1.0), torch.linspace(0, 2, 5, dtype=F64), tensor(1.0, 1.0)),
    "robertson": (
        lambda t, h, p: robertson(h, p),
        RATES,
        tensor(1.0, 0.0, 0.0),
        tensor(0.0, 40.0, 4e3),
        tensor(1.0, 1e-4, 1.0),
    ),
    "van der Pol": (
        driven,
        tensor(100.0, 1.0),
        tensor(2.0, 0.0),
        torch.linspace(0, 20, 5, dtype=F64),
        tensor(1.0, 1e2),
    ),
}


def replayed(name, method, adjoint, rtol, options=None):
    """The gradient by the logarithms of the parameters and by the start, in the sizes of the state."""
    f, p, start, t, size = REPLAYED[name]
    logs, h0 = torch.zeros_like(p, requires_grad=True), start.clone().requires_grad_()
    solution = pyjlode.solve(
        lambda t, h: f(t, h, p * torch.exp(logs)),
        h0,
        t,
        method=method,
        rtol=rtol,
        atol=rtol * size * 1e-2,
        adjoint=adjoint,
        options=options,
        dense=False,
        engine="torch",
    )
    of_logs, of_start = torch.autograd.grad((solution.h / size).sum(), (logs, h0))
    return solution, torch.cat([of_logs, of_start * size])


# Robertson's million steps of time at 1e-6 are two seconds for most methods, and twenty for those of order 2.
LONG = [pytest.param(method, "robertson", 1e-6, marks=pytest.mark.slow) for method in ("rodas5p", "kvaerno5", "bdf")]


@pytest.mark.parametrize(
    ("method", "name", "rtol"),
    [*covering(STIFF, ["relaxing", "van der Pol"], [1e-3, 1e-5]), *covering(STIFF, ["robertson"], [1e-3]), *LONG],
)
def test_a_replay_is_the_step_that_was_taken(method, name, rtol):
    """However loosely its equations were solved: the gradient is that of the recorded solve, which solves them to
    rounding, within what Newton's iteration leaves of them."""
    recorded, expected = replayed(name, method, False, rtol)
    kept, gradient = replayed(name, method, "discrete", rtol)
    # That what is left changes no step is a condition of the comparison.
    if kept.stats.naccept == recorded.stats.naccept:
        near = 1e-8 if method in ("rodas5p", "rosenbrock23", "auto") else 2 * rtol
        assert float((gradient - expected).abs().max()) <= near * float(expected.abs().max())
    else:
        torch.testing.assert_close(gradient, expected, rtol=30 * rtol, atol=30 * rtol * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("method", "rtol"),
    [
        *((m.name, 1e-3) for m in METHODS.values() if m.controlled or m.kind == "implicit"),
        *(pytest.param(method, 1e-6, marks=pytest.mark.slow) for method in STIFF),
    ],
)
def test_the_derivative_by_a_slow_rate_is_not_lost_to_a_fast_one(method, rtol):
    """d sum(h) / d p[1] is -2.863 where p[0] = 1e5."""
    f, p, start, t, _ = REPLAYED["relaxing"]
    p, options = p.clone().requires_grad_(), None
    if METHODS[method].kind == "implicit":  # it solves its equations further than any tolerance asks
        t, options = tensor(0.0, 0.5, 1.0, 1.5, 2.0), {"step_size": 0.02 if METHODS[method].order == 1 else 0.05}
    h = odeint(
        lambda t, h: f(t, h, p), start, t, method=method, rtol=rtol, adjoint=True, engine="torch", options=options
    )
    (grad,) = torch.autograd.grad(h.sum(), p)
    assert abs(float(grad[1]) + 2.863) < 0.03


def jumping(x, method, adjoint, rtol):
    """A loss of parameters, start and times of a system that jumps at t = 0.5."""
    p, h0, t = x[:2], x[2:4], x[4:]

    def f(t, h):
        fast = relaxing(t, h, torch.stack([1e4 * p[0], p[1]]))
        return fast + torch.where(t < 0.5, torch.sin(3 * t), -h[1])

    kwargs = {"rtol": rtol, "atol": 1e-3 * rtol, "options": {"jump_t": [0.5]}, "engine": "torch"}
    return odeint(f, h0, t, method=method, adjoint=adjoint, **kwargs)[1:].square().sum()


JUMPING = tensor(1.0, 1.0, 1.0, 1.0, 0.0, 0.3, 0.8)


@functools.cache
def jumping_reference():
    return differences(one_by_one(lambda e: jumping(JUMPING + e, "radau5", False, 1e-6)), 7, 1e-2)


@pytest.mark.parametrize("method", ["kvaerno5", "kencarp4", "trbdf2_adaptive"])
def test_gradients_of_stiffly_accurate_steps_pass_jumps_and_times(method):
    """A step after a jump starts with a slope of its own; and dL/dt goes through the slope that a step carries."""
    gradients = []
    for adjoint in (False, "discrete"):
        x = JUMPING.clone().requires_grad_()
        gradients.append(torch.autograd.grad(jumping(x, method, adjoint, 1e-7 if method == "kvaerno5" else 1e-6), x)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], jumping_reference(), rtol=1e-3, atol=1e-3)
