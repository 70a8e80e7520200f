"""Under `torch.func`, `vmap` and forward mode: the values and derivatives of loops, autograd and finite differences."""

from __future__ import annotations

import functools
import logging
import warnings

import pytest
import torch
from problems import GENERAL
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import pyjlode
from pyjlode import errors, numbers
from pyjlode.derivatives import load_forward_mode
from pyjlode.native import explicit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    load_forward_mode()  # torch warns of a deprecation of its own

F64 = torch.float64
A = torch.tensor([[-1.0, 2.0], [-2.0, -1.0]], dtype=F64)
T = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
H0 = torch.tensor([1.0, 0.5], dtype=F64)
P = torch.tensor([0.7, 0.3], dtype=F64)
H0S = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.1]], dtype=F64)
PS = torch.tensor([[0.7, 0.3], [0.1, 0.9], [1.2, 0.4]], dtype=F64)

STEP = {"step_size": 0.2}
METHODS = {
    **dict.fromkeys(("dopri5", "bosh3", "vern7"), None),
    **dict.fromkeys(("euler", "rk4", "explicit_adams", "implicit_euler", "gl4", "trbdf2"), STEP),
    "implicit_adams": {"step_size": 0.1, "max_iters": 30},
    **dict.fromkeys(("rodas5p", "rosenbrock23", "radau5", "bdf", "kvaerno5", "auto"), None),
}
LOOSE = 1e-4  # where no two solves have steps of their own
BRIEF = ("dopri5", "rk4", "gl4", "rodas5p", "radau5", "bdf", "kvaerno5")


def field(p):
    return lambda t, h: torch.tanh(A.to(h) @ h) * p[0] - p[1] * h**3 + torch.sin(t)


def states(p, h0, t=T, method="dopri5", rtol=1e-6, **kwargs):
    options = METHODS.get(method)
    return pyjlode.odeint(field(p), h0, t, method=method, rtol=rtol, atol=1e-2 * rtol, options=options, **kwargs)


def loss(p, h0, t=T, method="dopri5", **kwargs):
    return states(p, h0, t, method, **kwargs).square().sum()


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def autograd(f, *xs):
    xs = [x.clone().requires_grad_() for x in xs]
    return torch.autograd.grad(f(*xs), xs)


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    """The law: transform by transform, against a loop over samples of what autograd says."""

    def test_grad_and_vjp(self, method):
        def f(p, h0, t):
            return loss(p, h0, t, method, rtol=LOOSE)

        expected = autograd(f, P, H0, T)
        for got in (grad(f, (0, 1, 2))(P, H0, T), vjp(f, P, H0, T)[1](torch.ones((), dtype=F64))):
            for a, b in zip(got, expected):
                close(a, b)

    def test_grad_of_what_only_f_holds(self, method):
        def f(p):
            return loss(p, H0, T, method, rtol=LOOSE)

        close(grad(f)(P), autograd(f, P)[0])

    def test_tangents(self, method):
        def f(p, h0, t):
            return loss(p, h0, t, method, rtol=LOOSE)

        direction = (PS[1], H0S[1], torch.tensor([0.1, -0.2, 0.3], dtype=F64))
        expected = sum((g * d).sum() for g, d in zip(autograd(f, P, H0, T), direction))
        value, tangent = jvp(f, (P, H0, T), direction)
        close(value, f(P, H0, T))
        close(tangent, expected)
        with forward_ad.dual_level():
            out = f(*(forward_ad.make_dual(x, d) for x, d in zip((P, H0, T), direction)))
            close(forward_ad.unpack_dual(out).tangent, expected)

    def test_vmap(self, method):
        by_state = vmap(lambda h0: states(P, h0, T, method))(H0S)
        close(by_state, torch.stack([states(P, h0, T, method) for h0 in H0S]))
        by_what_f_holds = vmap(lambda p: states(p, H0, T, method))(PS)
        close(by_what_f_holds, torch.stack([states(p, H0, T, method) for p in PS]))

    def test_gradients_of_each_sample(self, method):
        def f(p, h0):
            return loss(p, h0, T, method)

        expected = torch.stack([autograd(f, p, h0)[0] for p, h0 in zip(PS, H0S)])
        # Common steps are others than those of a sample alone, which is seen at order 2.
        close(vmap(grad(f))(PS, H0S), expected, 5e-4 if method == "rosenbrock23" else 1e-5)

    def test_jacobians(self, method):
        def f(p):
            return states(p, H0, T, method, rtol=LOOSE)

        expected = jacobian(f, P)
        close(jacrev(f)(P), expected)
        close(jacfwd(f)(P), expected)
        close(jacobian(f, P, strategy="forward-mode", vectorize=True), expected)
        close(jacobian(f, P, vectorize=True), expected)


@pytest.mark.parametrize("method", BRIEF)
def test_nested_transforms(method):
    def f(p, h0=H0):
        return loss(p, h0, T, method, rtol=LOOSE)

    expected = torch.autograd.functional.hessian(f, P)
    close(hessian(f)(P), expected)
    close(jacrev(jacrev(f))(P), expected)
    close(jvp(grad(f), (P,), (PS[1],))[1], expected @ PS[1])

    def g(p, h0):
        return states(p, h0, T, method)[-1]

    each = torch.stack([jacobian(lambda p, h0=h0: g(p, h0), p) for p, h0 in zip(PS, H0S)])
    close(vmap(jacrev(g))(PS, H0S), each)
    close(vmap(jacfwd(g))(PS, H0S), each)
    table = vmap(lambda p: vmap(lambda h0: g(p, h0))(H0S))(PS)
    close(table, torch.stack([torch.stack([g(p, h0) for h0 in H0S]) for p in PS]))


@pytest.mark.parametrize("method", ["dopri5", "rodas5p", "kvaerno5", "gl4"])
def test_third_derivative(method):
    def f(a):
        return pyjlode.odeint(
            lambda t, h: -a * h * h, H0[:1], T, method=method, rtol=1e-8, atol=1e-10, options=METHODS[method]
        )[-1, 0]

    # h = 1 / (1 + a t): f''' = -6 t³ / (1 + a t)⁴; fixed steps are of order 4.
    a = torch.tensor(0.5, dtype=F64)
    close(grad(grad(grad(f)))(a), -6 / (1 + a) ** 4, 1e-5 if METHODS[method] is None else 1e-2)


def test_finite_differences():
    e = 1e-5
    for i in range(2):
        step = e * torch.eye(2, dtype=F64)[i]
        difference = (loss(P + step, H0) - loss(P - step, H0)) / (2 * e)
        close(grad(loss)(P, H0)[i], difference)
        close(jvp(lambda p: loss(p, H0), (P,), (step / e,))[1], difference)


@pytest.mark.parametrize("adjoint", [True, *GENERAL])
def test_every_adjoint_is_differentiable_here(adjoint):
    def f(p, h0):
        return loss(p, h0, adjoint=adjoint)

    expected = [autograd(loss, p, h0)[0] for p, h0 in zip(PS, H0S)]
    close(vmap(grad(f))(PS, H0S), torch.stack(expected))
    close(jvp(lambda p: f(p, H0S[0]), (PS[0],), (P,))[1], expected[0] @ P)
    # A batched backward pass, outside of any transform.
    p = P.clone().requires_grad_()
    ys = states(p, H0, adjoint=adjoint)
    bars = torch.eye(ys.numel(), dtype=F64).reshape(-1, *ys.shape)
    J = jacobian(lambda p: states(p, H0), P).reshape(-1, 2)
    close(torch.autograd.grad(ys, p, bars, is_grads_batched=True, retain_graph=True)[0], J)
    close(vmap(lambda bar: torch.autograd.grad(ys, p, bar, retain_graph=True)[0])(bars), J)


def test_odeint_adjoint_and_its_settings():
    def f(p):
        return pyjlode.odeint_adjoint(field(p), H0, T, rtol=1e-6, atol=1e-8, adjoint_rtol=1e-8).square().sum()

    close(grad(f)(P), autograd(lambda p: loss(p, H0), P)[0])


def test_steps_are_those_of_the_hardest_sample():
    rates = torch.tensor([1.0, 40.0], dtype=F64)

    def count(rate):
        solution = pyjlode.solve(lambda t, h: -rate * h, torch.ones(1, dtype=F64), T, dense=False)
        return solution.h[-1], solution.stats

    counted = []
    values = vmap(lambda rate: counted.append(count(rate)) or counted[-1][0])(rates)
    close(values[:, 0], torch.exp(-rates), 1e-6)
    easy, hard = (count(rate)[1].naccept for rate in rates)
    assert counted[0][1].naccept == hard > easy


def test_parameters_first_used_late():
    def f(p):
        h = pyjlode.odeint(
            lambda t, h: -h * p if t > 0.5 else -h, torch.ones(1, dtype=F64), T, options={"jump_t": [0.5]}
        )
        return h[-1, 0]

    p = torch.tensor(0.7, dtype=F64)
    expected = torch.exp(-0.5 - 0.5 * p)
    close(f(p), expected)
    close(grad(f)(p), -0.5 * expected)
    close(jvp(f, (p,), (torch.ones_like(p),))[1], -0.5 * expected)
    close(vmap(f)(torch.stack([p, 2 * p])), torch.stack([expected, torch.exp(-0.5 - p)]))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "rodas5p", "bdf", "gl4"])
def test_times_of_each_sample(method):
    ts = torch.tensor([[0.0, 0.3, 1.0], [0.1, 0.8, 0.9], [1.0, 0.9, 0.8]], dtype=F64)
    options = None if METHODS[method] is None else {}

    def f(t, h0):
        return pyjlode.odeint(field(P), h0, t, method=method, rtol=1e-7, atol=1e-9, options=options)

    close(vmap(f)(ts, H0S), torch.stack([f(t, h0) for t, h0 in zip(ts, H0S)]))
    each = torch.stack([jacobian(lambda t, h0=h0: f(t, h0), t) for t, h0 in zip(ts, H0S)])
    close(vmap(jacrev(f))(ts, H0S), each)
    close(vmap(jacfwd(f))(ts, H0S), each)


def test_times_of_each_sample_that_cannot_be():
    ts = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=F64)
    with pytest.raises(errors.BadOption, match="step_size"):
        vmap(lambda t: states(P, H0, t, "rk4"))(ts)
    with pytest.raises(errors.BadTime, match="strictly"):
        vmap(lambda t: states(P, H0, t))(torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=F64))
    with pytest.raises(errors.BadOption, match="explicit_adams"):
        vmap(lambda t: pyjlode.odeint(field(P), H0, t, method="explicit_adams"))(ts)
    with pytest.raises(errors.BadTime, match="event_fn"):
        vmap(lambda t: pyjlode.odeint(field(P), H0, t, event_fn=lambda t, h: h[0]))(ts)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "gl4", "rodas5p", "radau5", "kvaerno5", "bdf", "auto"])
def test_events(method):
    """A ball that is thrown up: each sample has its own time of impact."""
    options = {"step_size": 0.05, "interp": "cubic"} if method in ("rk4", "gl4") else None
    g = torch.tensor([9.8, 1.6, 3.7], dtype=F64)
    start = torch.tensor([[10.0, 1.0], [3.0, 2.0], [1.0, -1.0]], dtype=F64)

    def impact(g, h0, adjoint=False):
        t, h = pyjlode.odeint_event(
            lambda t, h: torch.stack([h[1], -g]),
            h0,
            torch.tensor(0.0, dtype=F64),
            event_fn=lambda t, h: h[0],
            method=method,
            options=options,
            adjoint=adjoint,
            rtol=1e-7 if method == "bdf" else 1e-5,  # of the others a step is exact here
        )
        return torch.stack([t, h[-1, 1]])

    def exact(g, h0):
        speed = torch.sqrt(h0[1] ** 2 + 2 * g * h0[0])
        return torch.stack([(h0[1] + speed) / g, -speed])

    close(vmap(impact)(g, start), vmap(exact)(g, start))
    for transform in (jacrev, jacfwd):
        close(transform(impact)(g[0], start[0]), transform(exact)(g[0], start[0]))
        close(vmap(transform(impact, 1))(g, start), vmap(transform(exact, 1))(g, start))
    close(jacfwd(jacrev(impact))(g[0], start[0]), jacfwd(jacrev(exact))(g[0], start[0]), 1e-5)
    close(jacrev(lambda g: impact(g, start[0], True))(g[0]), jacrev(exact)(g[0], start[0]))


def test_event_by_the_parameters_of_event_fn():
    def f(c):
        return pyjlode.odeint_event(lambda t, h: -h, torch.ones(1, dtype=F64), 0.0, event_fn=lambda t, h: h[0] - c)[0]

    c = torch.tensor([0.5, 0.2], dtype=F64)
    close(vmap(f)(c), -torch.log(c))
    close(vmap(grad(f))(c), -1 / c)
    close(grad(f)(c[0]), -1 / c[0])
    with pytest.raises(errors.GradientUnavailable, match="event_fn does not change"):
        grad(
            lambda a: pyjlode.odeint_event(
                lambda t, h: -a * h, torch.ones(1, dtype=F64), 0.0, event_fn=lambda t, h: h[0].detach() - 0.5
            )[0]
        )(c[0])


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4", "rodas5p", "radau5", "kvaerno5", "bdf"])
def test_dense_output(method):
    points = torch.tensor([0.1, 0.55, 0.9], dtype=F64)
    options = {"step_size": 0.05, "interp": "cubic"} if method == "rk4" else None

    def f(p, h0, t):
        return pyjlode.solve(field(p), h0, T, method=method, rtol=1e-5, atol=1e-7, options=options).interpolate(t)

    expected = jacobian(f, (P, H0, points))
    for transform in (jacrev, jacfwd):
        for a, b in zip(transform(f, (0, 1, 2))(P, H0, points), expected):
            close(a, b)
    close(vmap(f, (0, 0, None))(PS, H0S, points), torch.stack([f(p, h0, points) for p, h0 in zip(PS, H0S)]), 1e-4)
    with pytest.raises(errors.BadTime, match="differ between the samples"):
        vmap(f, (None, None, 0))(P, H0, torch.stack([points, points / 2]))


@pytest.mark.parametrize(
    ("method", "dtype"), [*zip(["dopri5", "rk4", "rodas5p", "kvaerno5"], [torch.float32, F64, torch.float32, F64])]
)
def test_tuples_and_complex_states(method, dtype):
    def f(p, x, z):
        def rhs(t, state):
            x, z = state
            return -p * x + z.real, 1j * z * p - x.sum() * z

        options = {"step_size": 0.1} if method == "rk4" else None
        h = pyjlode.odeint(rhs, (x, z), T.to(dtype), method=method, rtol=1e-5, atol=1e-6, options=options)
        return h[0][-1].square().sum() + h[1][-1].abs().square().sum()

    tol = 1e-3 if dtype is torch.float32 else 1e-5
    p = torch.tensor(0.7, dtype=dtype)
    x, z = torch.tensor([1.0, 0.3], dtype=dtype), torch.complex(H0, -H0).to(torch.complex(p, p).dtype)
    expected = autograd(f, p, x, z)
    for a, b in zip(grad(f, (0, 1, 2))(p, x, z), expected):
        close(a, b, tol)
    close(jvp(lambda p: f(p, x, z), (p,), (torch.ones_like(p),))[1], expected[0], tol)
    ps = torch.stack([p, 2 * p])
    close(vmap(grad(f), (0, None, None))(ps, x, z), torch.stack([autograd(f, q, x, z)[0] for q in ps]), tol)


@pytest.mark.parametrize("method", ["rodas5p", "radau5", "bdf"])
@pytest.mark.parametrize("consistent", ["check", "compute"])
def test_mass_matrix(method, consistent):
    """x' = -a x, 0 = y - x²."""
    M = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))

    def f(a):
        h0 = torch.stack([a, a**2 if consistent == "check" else a])
        return pyjlode.odeint(
            lambda t, h: torch.stack([-a * h[0], h[1] - h[0] ** 2]),
            h0,
            T,
            method=method,
            mass_matrix=M,
            rtol=1e-7,
            atol=1e-9,
            options={"consistent": consistent},
        )[-1]

    def exact(a):
        x = a * torch.exp(-a)
        return torch.stack([x, x**2])

    a = torch.tensor([0.7, 1.3], dtype=F64)
    for transform in (jacrev, jacfwd):
        close(vmap(transform(f))(a), vmap(transform(exact))(a))
        close(transform(f)(a[0]), transform(exact)(a[0]))


def test_batch_dims_and_jac_under_transforms():
    def f(p, method, jac=None):
        def rhs(t, h):
            return torch.stack([h[..., 1], p * (1 - h[..., 0] ** 2) * h[..., 1] - h[..., 0]], -1)

        return pyjlode.odeint(rhs, H0S, T, method=method, rtol=1e-4, atol=1e-6, options={"batch_dims": 1}, jac=jac)[-1]

    def jac(t, h):
        zero, one = torch.zeros_like(h[..., 0]), torch.ones_like(h[..., 0])
        top = torch.stack([zero, one], -1)
        return torch.stack([top, torch.stack([-2 * h[..., 0] * h[..., 1] - 1, 1 - h[..., 0] ** 2], -1)], -2)

    p = torch.tensor(1.0, dtype=F64)
    for method in ("rodas5p", "kvaerno5", "radau5"):
        solved = functools.partial(f, method=method)
        expected = jacobian(solved, p)
        close(jacrev(solved)(p), expected)
        close(jacfwd(solved)(p), expected)
        close(vmap(solved)(p[None])[0], solved(p))
    solved = functools.partial(states, P, method="kvaerno5", rtol=LOOSE)
    close(jacfwd(solved)(H0), jacobian(solved, H0))
    assert f(p, "kvaerno5", jac).isfinite().all()


@pytest.mark.parametrize("method", ["rodas5p", "radau5", "bdf", "kvaerno5", "auto"])
def test_stiff_problems(method):
    """Robertson's reaction, by its slowest rate and for several of them."""

    def f(k):
        def rhs(t, h):
            a, b, c = h
            first, second, third = k * a, 3e7 * b * b, 1e4 * b * c
            return torch.stack([third - first, first - second - third, second])

        h0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
        t = torch.tensor([0.0, 0.1], dtype=F64)
        return pyjlode.odeint(rhs, h0, t, method=method, rtol=1e-5, atol=1e-9)[-1]

    k = torch.tensor([0.04, 0.05], dtype=F64)
    expected = torch.stack([jacobian(f, q) for q in k])
    torch.testing.assert_close(vmap(jacfwd(f))(k), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(vmap(jacrev(f))(k), expected, rtol=1e-3, atol=1e-5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t, h):
        return self.net(h)


class Solver(nn.Module):
    """Solves inside: what hypernetworks and MAML call by functional_call."""

    def __init__(self, adjoint=False, method=None):
        super().__init__()
        self.f, self.kwargs = Net(), {"adjoint": adjoint, "method": method, "rtol": 1e-7, "atol": 1e-9}

    def forward(self, h0):
        return pyjlode.odeint(self.f, h0, T, **self.kwargs)[-1]


@pytest.mark.parametrize("adjoint", [False, True, "backsolve"])
def test_functional_call_and_gradients_of_each_sample(adjoint):
    model = Solver(adjoint)
    params = dict(model.named_parameters())

    def f(params, h0):
        return functional_call(model, params, (h0,)).square().sum()

    each = vmap(grad(f), (None, 0))({name: x.detach() for name, x in params.items()}, H0S)
    for i, h0 in enumerate(H0S):
        for name, g in zip(params, torch.autograd.grad(f(params, h0), list(params.values()))):
            close(each[name][i], g, 1e-5)


@pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
def test_ensemble_is_trained(method):
    models = [Solver(method=method) for _ in range(3)]
    params, buffers = stack_module_state(models)
    target = -H0S

    def f(params, buffers):
        return (functional_call(models[0], (params, buffers), (H0S,)) - target).square().mean()

    def alone(model):
        return (model(H0S) - target).square().mean()

    close(vmap(f)(params, buffers), torch.stack([alone(m) for m in models]), 1e-5)
    first = vmap(f)(params, buffers).detach()
    gradients = vmap(grad(f))(params, buffers)
    for i, model in enumerate(models):
        for name, g in zip(params, torch.autograd.grad(alone(model), list(model.parameters()))):
            close(gradients[name][i], g, 1e-5)
    optimizer = torch.optim.Adam(params.values(), lr=0.02)
    for _ in range(6):
        optimizer.zero_grad()
        vmap(f)(params, buffers).sum().backward()
        optimizer.step()
    assert (vmap(f)(params, buffers) < first).all()


def test_maml():
    """The gradient through an inner step of gradient descent, which itself goes through a solve."""
    model = Solver()
    params = {name: x.detach() for name, x in model.named_parameters()}

    def inner(params, target):
        return (functional_call(model, params, (H0S,)) - target).square().mean()

    def outer(scale):
        scaled = {name: scale * x for name, x in params.items()}
        slopes = grad(inner)(scaled, -H0S)
        return inner({name: x - 0.1 * slopes[name] for name, x in scaled.items()}, -H0S)

    one = torch.ones((), dtype=F64)
    e = 1e-4
    close(grad(outer)(one), (outer(one + e) - outer(one - e)) / (2 * e), 1e-5)
    targets = torch.stack([-H0S, H0S])
    tasks = vmap(lambda target: grad(inner)(params, target)["f.net.0.bias"])(targets)
    close(tasks, torch.stack([grad(inner)(params, target)["f.net.0.bias"] for target in targets]), 1e-5)


def test_engine_and_reason(caplog):
    stats = []

    def f(p, engine="auto", **kwargs):
        solution = pyjlode.solve(field(p), H0, T, engine=engine, **kwargs)
        stats.append(solution.stats)
        return solution.h.sum()

    with caplog.at_level(logging.INFO, "pyjlode"):
        grad(f)(P)
    assert stats[0].engine == "torch"
    with pytest.raises(errors.BadOption, match=r"torch\.func"):
        grad(lambda p: f(p, "julia"))(P)
    with pytest.raises(errors.BadOption, match="scipy_solver"):
        grad(lambda p: f(p, method="scipy_solver"))(P)
    with pytest.raises(errors.UnknownMethod):
        grad(lambda p: f(p, method="dopri"))(P)
    with pytest.raises(errors.BadOption, match="adjoint"):
        grad(lambda p: f(p, adjoint="discret"))(P)


def test_reason_where_nothing_is_asked_for(monkeypatch):
    monkeypatch.delenv("PYJLODE_ENGINE", raising=False)
    reasons = []

    def f(p):
        solution = pyjlode.solve(field(p), H0, T)
        reasons.append(solution.stats.reason)
        return solution.h.sum()

    grad(f)(P)
    assert "torch.func" in reasons[0]


def test_errors_of_a_sample():
    with pytest.raises(errors.NonFiniteState, match="h0 holds NaN"):
        vmap(lambda h0: states(P, h0))(torch.tensor([[1.0, 1.0], [float("nan"), 1.0]], dtype=F64))
    with pytest.raises(errors.SolveError, match="blows up"):
        vmap(lambda h0: pyjlode.odeint(lambda t, h: h * h, h0, T))(torch.tensor([[0.1], [1.7]], dtype=F64))
    with pytest.raises(errors.NonFiniteState, match="at the output"):
        vmap(lambda h0: pyjlode.odeint(lambda t, h: h * 1e200, h0, T, method="euler", options={"step_size": 0.1}))(H0S)
    with pytest.raises(errors.BadShape):
        vmap(lambda h0: pyjlode.odeint(lambda t, h: h[:1], h0, T))(H0S)
    with pytest.raises(errors.BadOption, match="GMRES"):
        grad(lambda h0: pyjlode.odeint(lambda t, h: -h, h0, T, method="bdf").sum())(torch.ones(4001, dtype=F64))


def test_nothing_that_is_kept_stays_wrapped():
    """A cache that is filled under a transform serves outside of it."""
    for coefficients in (explicit.coefficients,):
        coefficients.cache_clear()
    grad(lambda p: loss(p, H0, method="bosh3"))(P)
    close(states(P, H0, method="bosh3"), states(P, H0))
    vmap(lambda p: states(p, H0, method="kencarp4"))(PS)
    assert states(P, H0, method="kencarp4").isfinite().all()


def test_numbers_of_wrapped_tensors():
    x = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    seen = []

    def look(row):
        seen.append((numbers.read(row.sum()), numbers.rows(row).tolist(), numbers.hidden(row)))
        return ((row - numbers.constant(row)) * row).sum()

    close(vmap(grad(look))(x), x)
    assert seen == [(6.0, x.tolist(), True)]
    close(hessian(look)(x[0]), 2 * torch.eye(2))
    assert numbers.read(torch.tensor(2.0)) == 2.0
    assert not numbers.transformed()


def compiled_loss(method, net):
    options = METHODS.get(method)

    def f(h0):
        return pyjlode.odeint(net, 2 * h0, T, method=method, options=options).square().sum() * 3

    return f


@pytest.mark.filterwarnings("ignore")  # of Dynamo's own
@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_euler", "trbdf2", "rodas5p", "kvaerno5", "bdf", "auto"])
def test_compiled_program_that_solves(method):
    net = Net()
    f = compiled_loss(method, net)
    g = torch.compile(f, backend="eager")
    wanted = [H0.clone().requires_grad_(), *net.parameters()]
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(g(wanted[0]), wanted), torch.autograd.grad(f(wanted[0]), wanted)):
            close(a, b, 1e-12)


@pytest.mark.filterwarnings("ignore")
def test_whole_graph_is_refused_with_torchs_message():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="chooses its steps"):
        torch.compile(compiled_loss("dopri5", Net()), backend="eager", fullgraph=True)(H0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "adjoint"),
    [*zip(["dopri5", "gl4", "rodas5p", "radau5", "bdf", "kvaerno5"], [False, True, "gauss", True, False, "gauss"])],
)
def test_compiled_f(method, adjoint):
    net = Net()
    compiled = torch.compile(net, backend="aot_eager")
    results = [
        torch.autograd.grad(
            pyjlode.odeint(f, H0, T, method=method, adjoint=adjoint, options=METHODS[method]).square().sum(),
            list(net.parameters()),
        )
        for f in (net, compiled)
    ]
    for a, b in zip(*results):
        close(b, a, 1e-7)
