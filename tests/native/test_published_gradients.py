"""Gradients that SUNDIALS publishes with its examples: those of integrals of stiff systems and DAEs, by adjoints.

The files are `examples/{idas,cvodes}/serial/*.out` of LLNL/sundials; five digits are printed there. The integral
`G' = g(y)` is one more component of the state here.
"""

import pytest
import torch

from pyjlode import odeint

F64 = torch.float64
MASS = ["rodas5p", "radau5", "bdf"]


def vector(*x):
    return torch.tensor(x, dtype=F64)


# To the digits that are printed, and to three of them in a third of the time.
to_digits = pytest.mark.parametrize("digits", [3, pytest.param(5, marks=pytest.mark.slow)])


def printed(digits, found, *values, rel=6e-5):
    """To the digits that are printed: half of the fifth, and what the tolerances of the example leave."""
    assert found.tolist() == pytest.approx(values, rel=rel * 10 ** (5 - digits))


@pytest.mark.parametrize(
    ("method", "adjoint"), [*[(name, True) for name in MASS], ("rodas5p", "gauss"), ("rodas5p", "checkpointed")]
)
@to_digits
def test_robertson_as_a_dae(method, adjoint, digits):
    """idasRoberts_ASAi_dns: G = ∫ y3, by the three rates and by the differential part of a consistent start."""
    p = vector(0.04, 1e4, 3e7).requires_grad_()
    y0 = vector(1.0, 0.0, 0.5, 0.0).requires_grad_()  # y3 is computed

    def f(t, y):
        a, b, c, _ = y.unbind()
        first, second, third = p[0] * a, p[1] * b * c, p[2] * b * b
        return torch.stack([second - first, first - second - third, a + b + c - 1, c])

    h = odeint(
        f, y0, vector(0, 50), method=method, adjoint=adjoint, engine="torch", rtol=10.0 ** -(digits + 3),
        atol=10.0 ** (5 - digits) * vector(1e-8, 1e-13, 1e-8, 1e-7),
        mass_matrix=torch.diag(vector(1, 1, 0, 1)), options={"consistent": "compute"},
    )  # fmt: skip
    by_p, by_y0 = torch.autograd.grad(h[-1, 3], [p, y0])
    printed(digits, by_p, 1.7341e2, -5.0592e-4, 8.4323e-8)
    printed(digits, by_y0[:2], -7.6780, -1.2758e-4, rel=5e-4)
    assert float(by_y0[2]) == 0  # it was not used


@pytest.mark.parametrize("method", ["bdf", "rodas5p"])
@to_digits
def test_robertson_as_an_ode(method, digits):
    """cvsRoberts_ASAi_dns, at both of its ends."""
    p = vector(0.04, 1e4, 3e7).requires_grad_()
    y0 = vector(1.0, 0.0, 0.0, 0.0).requires_grad_()

    def f(t, y):
        a, b, c, _ = y.unbind()
        first, second, third = p[0] * a, p[1] * b * c, p[2] * b * b
        return torch.stack([second - first, first - second - third, third, c])

    h = odeint(f, y0, vector(0, 50, 4e7), method=method, adjoint=True, engine="torch",
               rtol=10.0 ** -(digits + 3), atol=10.0 ** (5 - digits) * vector(1e-9, 1e-14, 1e-9, 1e-7))  # fmt: skip
    early = torch.autograd.grad(h[1, 3], [p, y0], retain_graph=True)
    printed(digits, early[0], 1.7341e2, -5.0591e-4, 8.4323e-8)
    printed(digits, early[1][:3], 8.4191, 16.097, 16.097)
    late = torch.autograd.grad(h[2, 3], [p, y0])
    printed(digits, h[2, 3:].detach(), 3.9983e7)
    printed(digits, late[0], 7.6842e5, -3.0691, 5.1145e-4, rel=2e-4)
    printed(digits, late[1][:3], 3.9967e7, 3.9967e7, 3.9967e7)


@pytest.mark.parametrize("method", ["bdf"])
@to_digits
def test_akzo_nobel(method, digits):
    """idasAkzoNob_ASAi_dns: G = ∫ y1 over 180, by the five differential components of the start."""
    k1, k2, k3, k4, K, transfer, Ks, pressure, H = 18.7, 0.58, 0.09, 0.42, 34.4, 3.3, 115.83, 0.9, 737.0
    y0 = vector(0.444, 0.00123, 0.0, 0.007, 0.0, 0.36, 0.0).requires_grad_()

    def f(t, y):
        y1, y2, y3, y4, y5, y6, _ = y.unbind()
        r1, r2, r3 = k1 * y1**4 * y2.sqrt(), k2 * y3 * y4, k2 / K * y1 * y5
        r4, r5 = k3 * y1 * y4**2, k4 * y6**2 * y2.sqrt()
        inflow = transfer * (pressure / H - y2)
        rates = [-2 * r1 + r2 - r3 - r4, inflow - r1 / 2 - r4 - r5 / 2, r1 - r2 + r3, -r2 + r3 - 2 * r4, r2 - r3 + r5]
        return torch.stack([*rates, Ks * y1 * y4 - y6, y1])

    h = odeint(f, y0, vector(0, 180), method=method, adjoint=True, engine="torch",
               rtol=10.0 ** -(digits + 4), atol=10.0 ** -(digits + 6),
               mass_matrix=torch.diag(vector(1, 1, 1, 1, 1, 0, 1)), options={"consistent": "compute"})  # fmt: skip
    assert float(h[-1, 6].detach()) == pytest.approx(31.2642162580310945, rel=10.0 ** -(digits + 2))
    printed(digits, torch.autograd.grad(h[-1, 6], y0)[0][:5], 22.207, -62.695, -2.5114, 91.837, 3.5176, rel=1e-4)
