"""Fully implicit systems F(t, y, y') = 0 of index 1, linear in y': what is found, solved and refused."""

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
    given = {"method": method, "rtol": 1e-8, "atol": vector(1e-9, 1e-13, 1e-9), "adjoint": True, "engine": "torch"}
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


def test_what_is_refused():
    y0, t = vector(1.0, 2.0), vector(0, 1)
    k = torch.tensor(2.0, dtype=F64, requires_grad=True)
    for F in (lambda t, y, dy: y * dy + y, lambda t, y, dy: (1 + t) * dy + y, lambda t, y, dy: dy**3 + y):
        with pytest.raises(errors.BadOption, match="constant"):
            odeint(Implicit(F), y0, t, method="radau5")
    with pytest.raises(errors.BadOption, match="require grad"):
        odeint(Implicit(lambda t, y, dy: k * dy + y), y0, t, method="radau5")
    with pytest.raises(errors.BadOption, match="does not take a mass_matrix"):
        odeint(Implicit(lambda t, y, dy: dy + y), y0, t)
    with pytest.raises(errors.BadOption, match="of its own"):
        odeint(Implicit(lambda t, y, dy: dy + y), y0, t, method="bdf", mass_matrix=torch.eye(2, dtype=F64))
    with pytest.raises(errors.InconsistentStart):
        odeint(Implicit(robertson(vector(0.04, 1e4, 3e7))), vector(1.0, 0.0, 0.3), t, method="bdf")
    with pytest.raises(errors.BadShape, match="F\\(t, y, dy\\)"):
        Implicit(None)
