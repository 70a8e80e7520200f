"""Fully implicit systems F(t, y, y') = 0 of index 1, linear in y' or not: what is found, solved and refused."""

import math

import pytest
import torch

from pyjlode import Implicit, errors, odeint, solve

F64 = torch.float64
MASS = ["rodas5p", "radau5", "bdf"]


def vector(*x):
    return torch.tensor(x, dtype=F64)


def robertson(k):
    def F(t, y, dy):
        a, b, c = y.unbind()
        rate = k[0] * a - k[1] * b * c
        return torch.stack([dy[0] + rate, dy[1] - rate + k[2] * b * b, a + b + c - 1])

    return F


@pytest.mark.parametrize("method", ["bdf"])
def test_robertson(method):
    """idaRoberts_dns of SUNDIALS at t = 40, and the gradient of the same system with its mass matrix."""
    k = vector(0.04, 1e4, 3e7).requires_grad_()
    given = {"method": method, "rtol": 1e-7, "atol": vector(1e-8, 1e-12, 1e-8), "adjoint": True, "engine": "torch"}
    given["options"] = {"consistent": "compute"}
    y0, t = vector(1.0, 0.0, 0.3), vector(0, 40)
    h = odeint(Implicit(robertson(k)), y0, t, **given)
    assert h[-1].tolist() == pytest.approx([0.7158270688, 9.185534e-6, 0.2841637457], rel=1e-5)
    F = robertson(k)
    same = odeint(lambda t, y: -F(t, y, torch.zeros_like(y)), y0, t, mass_matrix=torch.diag(vector(1, 1, 0)), **given)
    assert torch.equal(h, same)
    found, right = (torch.autograd.grad(x[-1, 0], k)[0] for x in (h, same))
    assert torch.equal(found, right)


@pytest.mark.parametrize("method", MASS)
def test_a_mixed_leading_part(method):
    """y' + z' = -y, z = y²: rows and columns of dF/dy' are not those of an identity. y' (1 + 2 y) = -y."""

    def F(t, h, dh):
        y, z = h.unbind()
        return torch.stack([dh[0] + dh[1] + y, z - y * y])

    t = vector(0, 1)
    h = odeint(Implicit(F), vector(1.0, 1.0), t, method=method, rtol=1e-9, atol=1e-10)
    exact = odeint(lambda t, y: -y / (1 + 2 * y), vector(1.0), t, rtol=1e-11, atol=1e-12)
    assert float(h[-1, 0]) == pytest.approx(float(exact[-1, 0]), rel=1e-7)
    assert float(h[-1, 1]) == pytest.approx(float(exact[-1, 0]) ** 2, rel=1e-7)


def pendulum(reduced):
    """In Cartesian coordinates: of index 3, or of index 1 with the constraint differentiated twice."""

    def F(t, h, dh):
        x, y, u, v, tension = h.unbind()
        length = u * u + v * v - tension * (x * x + y * y) - 9.81 * y if reduced else x * x + y * y - 1
        return torch.stack([dh[0] - u, dh[1] - v, dh[2] + tension * x, dh[3] + tension * y + 9.81, length])

    return Implicit(F)


def test_a_pendulum_with_its_index_reduced():
    """Against the angle: th'' = -g sin th; and the same constraint as it stands is of index 3, and refused."""
    t, th0 = vector(0, 0.5, 1.0), vector(1.0)
    h0 = torch.cat([th0.sin(), -th0.cos(), vector(0.0, 0.0), 9.81 * th0.cos()])
    h = odeint(pendulum(True), h0, t, method="rodas5p", rtol=1e-9, atol=1e-10)
    th = odeint(lambda t, y: torch.stack([y[1], -9.81 * torch.sin(y[0])]), vector(1.0, 0.0), t, rtol=1e-11, atol=1e-12)
    assert torch.allclose(h[:, 0], torch.sin(th[:, 0]), atol=1e-7)
    with pytest.raises(errors.HighIndex, match="not of index 1"):
        odeint(pendulum(False), h0, t, method="rodas5p")


def test_an_implicit_ode_needs_no_algebra():
    """A regular dF/dy': M y' = A y."""
    M, A = torch.tensor([[2.0, 1.0], [0.5, 1.0]], dtype=F64), torch.tensor([[-1.0, 0.3], [0.1, -2.0]], dtype=F64)
    s = solve(Implicit(lambda t, y, dy: M @ dy - A @ y), vector(1.0, 2.0), vector(0, 1), method="bdf", rtol=1e-8)
    exact = torch.matrix_exp(torch.linalg.solve(M, A)) @ vector(1.0, 2.0)
    assert torch.allclose(s.h[-1], exact, atol=1e-5)


def moving(k, method, adjoint):
    """A functional of a system of index 1 whose mass matrix depends on k, as f and the start do."""
    zero = torch.zeros_like(k[0])
    M = torch.stack([k[0], k[1], zero, 0.3 * k[2], k[0] + 1, zero, zero, zero, zero]).reshape(3, 3)

    def f(t, y):
        a, b, c = y.unbind()
        return torch.stack([c - a * k[0], torch.cos(t) * c - 2 * b, a + b * k[1] - c])

    one = torch.ones_like(k[0])
    y0 = torch.stack([one, 0.5 * one, 1 + 0.5 * k[1]])
    h = odeint(f, y0, vector(0, 1), method=method, mass_matrix=M, adjoint=adjoint, rtol=1e-8, atol=1e-9, engine="torch")
    return h[-1] @ vector(1, 2, -1)


@pytest.mark.parametrize(
    ("method", "adjoint"),
    [*[(m, a) for m in MASS for a in (False, True)], ("rodas5p", "checkpointed"), ("radau5", "gauss")],
)
def test_the_gradient_by_the_mass_matrix(method, adjoint):
    k = vector(1.2, 0.4, 0.7)
    leaf = k.clone().requires_grad_()
    found = torch.autograd.grad(moving(leaf, method, adjoint), leaf)[0]
    steps = 1e-4 * torch.eye(3, dtype=F64)
    right = torch.stack([(moving(k + e, "rodas5p", False) - moving(k - e, "rodas5p", False)) / 2e-4 for e in steps])
    assert torch.allclose(found, right, rtol=1e-5, atol=1e-6)


def test_a_matrix_that_is_a_parameter_itself():
    """M y' = -y, whose gradient by M has a closed form; and by the coefficients of y' of an implicit field."""
    M = torch.tensor([[2.0, 0.5], [0.0, 1.0]], dtype=F64, requires_grad=True)
    y0, t = vector(1.0, 2.0), vector(0, 1)
    given = {"method": "rodas5p", "adjoint": True, "rtol": 1e-9, "atol": 1e-10, "engine": "torch"}
    exact = (torch.matrix_exp(-torch.linalg.inv(M)) @ y0).sum()
    right = torch.autograd.grad(exact, M)[0]
    h = odeint(lambda t, y: -y, y0, t, mass_matrix=M, **given)
    assert torch.allclose(torch.autograd.grad(h[-1].sum(), M)[0], right, atol=1e-7)
    h = odeint(Implicit(lambda t, y, dy: M @ dy + y), y0, t, **given)
    assert torch.allclose(torch.autograd.grad(h[-1].sum(), M)[0], right, atol=1e-7)
    with pytest.raises(errors.BadOption, match="mass_matrix requires grad"):
        odeint(lambda t, y: -y, y0, t, mass_matrix=M, **{**given, "adjoint": "forward"})


def from_a_guess(k, adjoint):
    """x' + k0 z' = f and k1 times that: which combinations are algebraic moves with k."""
    one = torch.ones_like(k[0])
    M = torch.stack([one, k[0], k[1], k[0] * k[1]]).reshape(2, 2)

    def f(t, y):
        return torch.stack([-y[0] + torch.cos(t), k[1] * torch.cos(t) + y[1] * y[0] - k[0]])

    given = {"method": "radau5", "adjoint": adjoint, "rtol": 1e-9, "atol": 1e-10, "engine": "torch"}
    h = odeint(f, vector(1.0, 2.0), vector(0, 0.5), mass_matrix=M, options={"consistent": "compute"}, **given)
    return h[0] @ vector(0.3, -0.5) + h[-1] @ vector(1, 2)


@pytest.mark.parametrize("adjoint", [False, True, "gauss"])
def test_the_gradient_by_the_mass_matrix_through_a_start_that_is_computed(adjoint):
    k = vector(0.8, 0.4)
    leaf = k.clone().requires_grad_()
    found = torch.autograd.grad(from_a_guess(leaf, adjoint), leaf)[0]
    steps = 1e-4 * torch.eye(2, dtype=F64)
    right = torch.stack([(from_a_guess(k + e, False) - from_a_guess(k - e, False)) / 2e-4 for e in steps])
    assert torch.allclose(found, right, rtol=1e-5, atol=1e-6)


def cubic(p):
    """y' + p0 y'³ + y = z, z = cos(p1 t)."""

    def F(t, h, dh):
        return torch.stack([dh[0] + p[0] * dh[0] ** 3 + h[0] - h[1], h[1] - torch.cos(p[1] * t)])

    return F


def slope_of_cubic(p):
    """y' by Cardano's formula."""

    def f(t, y):
        c = (torch.cos(p[1] * t) - y) / p[0]
        root = torch.sqrt(c * c / 4 + 1 / (27 * p[0] ** 3))
        third = (root + c / 2) ** (1 / 3)
        return third - 1 / (3 * p[0] * third)

    return f


@pytest.mark.parametrize("adjoint", [False, True, "gauss", "forward"])
@pytest.mark.parametrize("method", MASS)
def test_nonlinear_in_the_derivative(method, adjoint):
    """The gradient by parameters and start is that of the same system solved for y'."""
    p, x0, t = vector(1.0, 1.3).requires_grad_(), vector(0.3).requires_grad_(), vector(0, 0.5, 2)
    given = {"rtol": 1e-8, "atol": 1e-9, "engine": "torch", "adjoint": adjoint}
    h = odeint(Implicit(cubic(p)), torch.cat([x0, vector(1.0)]), t, method=method, **given)
    exact = odeint(slope_of_cubic(p), x0, t, rtol=1e-10, atol=1e-11)
    assert h.shape == (3, 2)
    assert torch.allclose(h[:, 0], exact[:, 0], atol=1e-7)
    found, right = (torch.autograd.grad(x[1, 0] + x[-1, 0].square(), (p, x0)) for x in (h, exact))
    assert torch.allclose(torch.cat(found), torch.cat(right), rtol=1e-5, atol=1e-6)


def test_of_two_roots_the_one_near_the_guess():
    """y'² = y has the roots y' = ± √y."""
    t = vector(0, 1)
    for sign in (1, -1):
        s = solve(Implicit(lambda t, y, dy: dy * dy - y, vector(0.9 * sign)), vector(1.0), t, method="bdf", rtol=1e-8)
        assert float(s.h[-1]) == pytest.approx((1 + sign / 2) ** 2, rel=1e-5)
        assert float(s.interpolate(0.5)) == pytest.approx((1 + sign / 4) ** 2, rel=1e-5)
    with pytest.raises(errors.HighIndex, match="dy0="):
        odeint(Implicit(lambda t, y, dy: dy * dy - y), vector(1.0), t, method="bdf")
    with pytest.raises(errors.HighIndex, match="dy0="):  # nor is there a root
        odeint(Implicit(lambda t, y, dy: dy * dy + y + 1), vector(1.0), t, method="bdf")


def test_what_is_seen_of_the_derivative_may_move_with_a_parameter():
    """(y + p z)' + (y + p z)'³ / 10 = -y, z = y + t: one combination of y' and z' is seen."""

    def last(p):
        def F(t, h, dh):
            d = dh[0] + p * dh[1]
            return torch.stack([d + 0.1 * d**3 + h[0], h[1] - h[0] - t])

        given = {"method": "radau5", "rtol": 1e-9, "atol": 1e-10, "adjoint": True, "engine": "torch"}
        return odeint(Implicit(F), vector(1.0, 1.0), vector(0, 1), **given)[-1, 0]

    p = torch.tensor(0.7, dtype=F64, requires_grad=True)
    found = torch.autograd.grad(last(p), p)[0]
    with torch.no_grad():
        assert float(found) == pytest.approx(float(last(p + 1e-4) - last(p - 1e-4)) / 2e-4, rel=1e-5)


def test_events_and_starts_of_a_nonlinear_system():
    F = Implicit(cubic(vector(1.0, 1.0)))
    given = {"method": "bdf", "rtol": 1e-8, "atol": 1e-9}
    s = solve(F, vector(0.0, 1.0), vector(0, 10), event_fn=lambda t, h: h[1] - 0.5, **given)
    assert float(s.event_t) == pytest.approx(math.pi / 3, rel=1e-6)
    assert s.h.shape == (2, 2)
    with pytest.raises(errors.InconsistentStart, match="is off by"):
        odeint(F, vector(0.0, 0.5), vector(0, 1), **given)
    h = odeint(F, vector(0.0, 0.5), vector(0, 1), options={"consistent": "compute"}, **given)
    assert h[0].tolist() == pytest.approx([0.0, 1.0])


def test_an_index_above_one_is_refused():
    """The rod of a pendulum, x² + y² = 1, with an air resistance that is not linear in y'."""

    def F(t, h, dh):
        x, y, u, v, tension = h.unbind()
        drag = 0.1 * dh[0] * dh[0].abs()
        return torch.stack(
            [dh[0] - u, dh[1] - v, dh[2] + tension * x + drag, dh[3] + tension * y + 9.81, x * x + y * y - 1]
        )

    with pytest.raises(errors.HighIndex, match="Differentiate its algebraic equations"):
        odeint(Implicit(F, vector(0.3, 0, 0, 0, 0)), vector(1.0, 0, 0.3, 0, 0), vector(0, 1), method="radau5")


def test_what_is_refused():
    y0, t = vector(1.0, 2.0), vector(0, 1)
    seen = Implicit(lambda t, y, dy: torch.stack([dy[0] + torch.relu(t - 0.005) * dy[1] + y[0], y[1] - y[0]]))
    with pytest.raises(errors.BadOption, match="null space of dF/dy' is not constant"):
        odeint(seen, y0, t, method="radau5")
    with pytest.raises(errors.BadOption, match="events and jac"):
        odeint(Implicit(lambda t, y, dy: dy**3 + dy + y), y0, t, method="bdf", jac=lambda t, y: torch.eye(2))
    with pytest.raises(errors.BadShape, match="dy0 has shape"):
        odeint(Implicit(lambda t, y, dy: dy**3 + dy + y, vector(1.0)), y0, t, method="bdf")
    with pytest.raises(errors.BadOption, match="does not take a mass_matrix"):
        odeint(Implicit(lambda t, y, dy: dy + y), y0, t)
    with pytest.raises(errors.BadOption, match="of its own"):
        odeint(Implicit(lambda t, y, dy: dy + y), y0, t, method="bdf", mass_matrix=torch.eye(2, dtype=F64))
    with pytest.raises(errors.InconsistentStart):
        odeint(Implicit(robertson(vector(0.04, 1e4, 3e7))), vector(1.0, 0.0, 0.3), t, method="bdf")
    with pytest.raises(errors.BadShape, match="F\\(t, y, dy\\)"):
        Implicit(None)
