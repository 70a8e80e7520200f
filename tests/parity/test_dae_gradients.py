"""Gradients of systems with a mass matrix on the Julia engine: those of the native engine, which replays its steps."""

import pytest
import torch

from pyjlode import Implicit, errors, julia_method, odeint, odeint_event, solve

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
METHODS = ["rodas5p", "radau5"]
each = pytest.mark.parametrize("method", METHODS)


def vector(*x):
    return torch.tensor(x, dtype=F64)


def robertson(logs):
    k = vector(0.04, 1e4, 3e7) * torch.exp(logs)

    def f(t, y):
        a, b, c = y.unbind()
        slow, back, fast = k[0] * a, k[1] * b * c, k[2] * b * b
        return torch.stack([back - slow, slow - back - fast, a + b + c - 1])

    return f


def pendulum(p):
    def f(t, h):
        x, y, u, v, tension = h.unbind()
        force = u * u + v * v - tension * (x * x + y * y) - p[0] * y
        return torch.stack([u, v, -tension * x - p[1] * u, -tension * y - p[0] - p[1] * v, force])

    return f


def mixed(p):
    """Of x and z with x' = -p0 x + z, 0 = z - cos(p1 t) - p2 x², in other coordinates and with other equations."""
    left, right = vector(1, 2, -1, 1).view(2, 2), vector(2, 1, 1, 1).view(2, 2)

    def f(t, y):
        x, z = right @ y
        return left @ torch.stack([-p[0] * x + z, z - torch.cos(p[1] * t) - p[2] * x * x])

    return f


_LEFT, _RIGHT = vector(1, 2, -1, 1).view(2, 2), vector(2, 1, 1, 1).view(2, 2)
SYSTEMS = {
    "robertson": (
        robertson,
        torch.diag(vector(1, 1, 0)),
        vector(0, 0, 0),
        vector(1, 0, 0),
        [0, 1, 10],
        vector(1, 1e4, 1),
    ),
    "pendulum": (
        pendulum,
        torch.diag(vector(1, 1, 1, 1, 0)),
        vector(9.81, 0.2),
        vector(1, 0, 0.1, 0, 0),
        [0, 0.3, 0.6],
        vector(1, 0.5, -0.3, 0.2, 0.1),
    ),
    "mixed": (
        mixed,
        _LEFT @ torch.diag(vector(1, 0)) @ _RIGHT,
        vector(1, 1.5, 0.3),
        vector(0.2, -0.1),
        [0, 1, 2, 2.5],
        vector(1, -2),
    ),
}


def gradient(name, method, engine, adjoint, compile=None):
    make, M, p, h0, times, weights = SYSTEMS[name]
    p, h0, t = (x.clone().requires_grad_() for x in (p, h0, vector(*times)))
    h = odeint(
        make(p), h0, t, method=method, rtol=1e-8, atol=1e-11, mass_matrix=M, adjoint=adjoint, engine=engine,
        compile=compile, options={"consistent": "compute"}
    )  # fmt: skip
    return torch.cat(torch.autograd.grad((h @ weights)[1:].sum() + 0.5 * (h[-1] @ weights) ** 2, (p, h0, t)))


@each
@pytest.mark.parametrize("name", SYSTEMS)
def test_by_parameters_start_and_times(name, method):
    """Cotangents at several outputs, with parts along what is algebraic; parameters in the algebraic equations."""
    want, got = gradient(name, "radau5", "torch", "discrete"), gradient(name, method, "julia", True)
    assert torch.allclose(got, want, rtol=2e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", SYSTEMS)
def test_by_sensitivities(name):
    """adjoint="forward", with a start that is computed; times are not among what it differentiates by."""
    out = []
    for engine in ("torch", "julia"):
        make, M, p, h0, times, weights = SYSTEMS[name]
        p, h0 = p.clone().requires_grad_(), h0.clone().requires_grad_()
        h = odeint(
            make(p), h0, vector(*times), method="rodas5p", rtol=1e-8, atol=1e-11, mass_matrix=M, engine=engine,
            adjoint="forward" if engine == "julia" else "discrete", options={"consistent": "compute"},
        )  # fmt: skip
        out.append(torch.cat(torch.autograd.grad((h @ weights)[1:].sum() + 0.5 * (h[-1] @ weights) ** 2, (p, h0))))
    assert torch.allclose(out[1], out[0], rtol=1e-4, atol=1e-6 * float(out[0].abs().max()))


def test_called_back():
    """The same where Julia calls f back."""
    want, got = (gradient("mixed", "rodas5p", "julia", True, compile=c) for c in (None, False))
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)


@each
def test_by_the_mass_matrix(method):
    """x' + k0 z' = f and k1 times that, from a start that is computed: what is algebraic moves with the matrix."""

    def gradient(engine, method, adjoint):
        k = vector(0.8, 0.4).requires_grad_()
        M = torch.stack([torch.ones_like(k[0]), k[0], k[1], k[0] * k[1]]).reshape(2, 2)

        def f(t, y):
            return torch.stack([-y[0] + torch.cos(t), k[1] * torch.cos(t) + y[1] * y[0] - k[0]])

        h = odeint(f, vector(1.0, 2.0), vector(0, 0.2, 0.5), mass_matrix=M, options={"consistent": "compute"},
                   method=method, adjoint=adjoint, rtol=1e-9, atol=1e-10, engine=engine)  # fmt: skip
        return torch.autograd.grad(h[0] @ vector(0.3, -0.5) + h[1:].sum(0) @ vector(1, 2), k)[0]

    assert torch.allclose(
        gradient("julia", method, True), gradient("torch", "radau5", "discrete"), rtol=1e-5, atol=1e-6
    )


@each
def test_an_event_of_a_dae(method):
    """x' = z, 0 = z + p x²: x = 1 / (1 + p t) is half at t = 1 / p. Julia finds it, and the native engine has the
    gradient: the slope of z is in Julia's dense output to three digits only."""
    p = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def event(**how):
        return odeint_event(
            lambda t, y: torch.stack([y[1], y[1] + p * y[0] ** 2]), vector(1, -0.7), 0.0, method=method, rtol=1e-9,
            event_fn=lambda t, y: y[0] - 0.5, mass_matrix=torch.diag(vector(1, 0)), atol=1e-10, **how
        )  # fmt: skip

    with torch.no_grad():
        time, h = event(engine="julia")
    assert time.item() == pytest.approx(1 / 0.7, rel=1e-7)
    assert torch.allclose(h[-1], vector(0.5, -0.175), rtol=1e-7)
    with pytest.raises(errors.BadOption, match="through an event are the native engine's"):
        event(engine="julia", adjoint=True)
    time, h = event(adjoint=True)
    of_time = torch.autograd.grad(time, p, retain_graph=True)[0]
    assert float(of_time) == pytest.approx(-1 / 0.49, rel=1e-6)
    assert float(torch.autograd.grad(h[-1, 1], p)[0]) == pytest.approx(-0.25, rel=1e-6)


@pytest.mark.parametrize("method", ["rodas5p", "bdf"])
def test_implicit_systems_that_are_not_linear(method):
    """y' + p0 y'³ + y = z, z = cos(p1 t) on both engines; gradients where Julia has them."""
    out = []
    for engine in ("torch", "julia"):
        p, y0 = vector(1.0, 1.3).requires_grad_(), vector(0.3, 1.0)

        def F(t, h, dh, p=p):
            return torch.stack([dh[0] + p[0] * dh[0] ** 3 + h[0] - h[1], h[1] - torch.cos(p[1] * t)])

        given = {"method": method, "rtol": 1e-8, "atol": 1e-9, "engine": engine}
        if method == "bdf":
            with torch.no_grad():
                out.append([solve(Implicit(F), y0, vector(0, 0.5, 2), **given).h])
        else:
            h = odeint(Implicit(F), y0, vector(0, 0.5, 2), adjoint=True, **given)
            out.append([h.detach(), torch.autograd.grad(h[-1, 0] + h[1, 0] ** 2, p)[0]])
    for a, b in zip(*out):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


FULLY = {"method": julia_method("DFBDF()"), "engine": "julia", "rtol": 1e-8, "atol": 1e-10}


def cubic(p):
    """y' + p0 y'³ + y = z, z = cos(p1 t)."""
    return Implicit(lambda t, h, dh: torch.stack([dh[0] + p[0] * dh[0] ** 3 + h[0] - h[1], h[1] - torch.cos(p[1] * t)]))


def robertson_implicit(p):
    k = vector(0.04, 1e4, 3e7) * torch.exp(p)

    def F(t, y, dy):
        a, b, c = y.unbind()
        rate = k[0] * a - k[1] * b * c
        return torch.stack([dy[0] + rate, dy[1] - rate + k[2] * b * b, a + b + c - 1])

    return Implicit(F)


@pytest.mark.parametrize(
    ("field", "p", "y0", "times"),
    [
        pytest.param(cubic, vector(1.0, 1.3), vector(0.3, 0.0), [0, 0.5, 2], id="not linear"),
        pytest.param(cubic, vector(1.0, 1.3), vector(0.3, 0.0), [2, 0.5, 0], id="backward"),
        pytest.param(robertson_implicit, vector(0, 0, 0), vector(1, 0, 0.3), [0, 1, 40], id="Robertson"),
    ],
)
def test_a_fully_implicit_method(field, p, y0, times):
    """DFBDF, from a start that is computed: the solution, and the gradient by the adjoint of Cao et al."""
    out = []
    for given in (
        {"method": "radau5", "engine": "torch", "adjoint": "discrete"},
        {"adjoint_method": "rodas5p", "adjoint_options": {}},
    ):
        q = p.clone().requires_grad_()
        given = {**FULLY, "atol": vector(1e-10), "adjoint": True, "options": {"consistent": "compute"}, **given}
        if field is robertson_implicit:
            given["atol"] = vector(1e-10, 1e-14, 1e-10)
        h = odeint(field(q), y0, vector(*times), **given)
        out.append([h.detach(), torch.autograd.grad((h[1:] ** 2).sum(), q)[0]])
    for a, b, rtol in zip(*out, (1e-5, 2e-4)):
        assert torch.allclose(a, b, rtol=rtol, atol=1e-5)


def test_a_fully_implicit_method_of_an_ode_and_of_an_event():
    h = odeint(lambda t, y: -y * torch.exp(-t), vector(1.0, 2.0), vector(0, 1), **FULLY)
    exact = torch.exp(vector(-1).exp() - 1)
    assert torch.allclose(h[-1], exact * vector(1.0, 2.0), rtol=1e-6)
    with torch.no_grad():
        time, _ = odeint_event(
            cubic(vector(0.0, 1.0)), vector(0.0, 1.0), 0.0, event_fn=lambda t, y: y[0] - 0.5, **FULLY
        )
    # y' + y = cos t: y = (sin t + cos t - exp(-t)) / 2
    t = float(time)
    assert (vector(t).sin() + vector(t).cos() - vector(-t).exp()).item() == pytest.approx(1.0, rel=1e-6)


def test_a_start_that_no_step_begins_at():
    with pytest.raises(errors.InconsistentStart):
        odeint(cubic(vector(1.0, 1.3)), vector(0.3, 0.0), vector(0, 1), **FULLY)
    with pytest.raises(errors.HighIndex):
        odeint(Implicit(lambda t, y, dy: torch.stack([dy[0] - y[1], y[0] - t])), vector(0, 1), vector(0, 1), **FULLY)


def test_what_is_refused():
    M, h0 = torch.diag(vector(1, 0)), vector(1, -0.7).requires_grad_()
    given = {"mass_matrix": M, "engine": "julia"}

    def f(t, y):
        return torch.stack([y[1], y[1] + 0.7 * y[0] ** 2])

    with pytest.raises(errors.BadOption, match="its adjoints are 'gauss' and 'forward' there"):
        odeint(f, h0, vector(0, 1), method=julia_method("Rodas4()"), adjoint="interpolating", **given)
    for moved in ({"mass_matrix": M.clone().requires_grad_()}, {"t": vector(0, 1).requires_grad_()}):
        how = {**given, "t": vector(0, 1), **moved}
        with pytest.raises(errors.BadOption, match="adjoint=True has"):
            odeint(f, h0, how.pop("t"), method="rodas5p", adjoint="forward", **how)
    for how, match in (
        ({"adjoint": True}, "adjoint_method='rodas5p'"),
        ({"adjoint": "forward"}, "has gradients by adjoint=True there"),
        (
            {"adjoint": True, "mass_matrix": None, "adjoint_method": "rodas5p"},
            "no gradients but of systems with a mass",
        ),
    ):
        with pytest.raises(errors.BadOption, match=match):
            odeint(f, h0, vector(0, 1), **{**FULLY, "mass_matrix": M, **how})
    with pytest.raises(errors.BadOption, match="inaccurate there"):
        odeint(f, h0, vector(0, 1), method="bdf", adjoint=True, **given)
