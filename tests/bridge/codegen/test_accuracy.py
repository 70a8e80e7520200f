"""Elementary functions in compiled code: a few units in the last place, everywhere; and products of all sizes."""

import ctypes

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

from pyjlode.bridge import runtime
from pyjlode.bridge.codegen import scalar

pytestmark = pytest.mark.usefixtures("julia")
_C = ctypes.PYFUNCTYPE(None, *[ctypes.c_void_p] * 6, ctypes.c_double)


def _erf(x):
    """In 25 digits, of the type that x has."""
    return np.array([x.dtype.type(mpmath.nstr(mpmath.erf(mpmath.mpf(float(v))), 25)) for v in x])


# Name -> f, the same in a wider type, and the largest error in units of the last place. float64 is compared in the
# 80 bits of x87 where there are any.
FUNCTIONS = {
    "exp": (torch.exp, np.exp, 2),
    "expm1": (torch.expm1, np.expm1, 3),
    "tanh": (torch.tanh, np.tanh, 4),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 4),
    "sin": (torch.sin, np.sin, 2),
    "cos": (torch.cos, np.cos, 2),
    "tan": (torch.tan, np.tan, 3),
    "atan": (torch.atan, np.arctan, 2),
    "atan2": (lambda x: torch.atan2(x, x - 1), lambda x: np.arctan2(x, x - 1), 2),
    "pow": (lambda x: x.abs() ** 2.25, lambda x: np.abs(x) ** x.dtype.type(2.25), 3),
    "erf": (torch.erf, _erf, 3),
    "log": (lambda x: torch.log(x.abs()), lambda x: np.log(np.abs(x)), 2),
    "log1p": (lambda x: torch.log1p(x.clamp(min=-0.75)), lambda x: np.log1p(np.maximum(x, -0.75)), 2),
}
# From where on numbers are a quarter and more apart.
APART = {torch.float32: 2.0**21, torch.float64: 2.0**50}
WIDER = {torch.float32: np.float64, torch.float64: np.longdouble}


@pytest.fixture
def value(program_of, monkeypatch):
    """value(f, x): f at x, by compiled code in loops."""

    def value(f, x):
        monkeypatch.setattr(scalar, "LIMIT", -1)
        program, _ = program_of(lambda t, h: f(h), x)
        assert program.mode == "array"
        with runtime.julia() as calls:
            address = program.address(calls, "f")
        out, work = torch.empty_like(x), torch.empty(max(program.work, 1), dtype=x.dtype)
        _C(address)(out.data_ptr(), 0, x.data_ptr(), 0, 0, work.data_ptr(), 0.0)
        return out

    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_are_exact_to_a_few_units(name, dtype, value):
    if dtype == torch.float64 and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no wider type than float64 here")
    f, wider, units = FUNCTIONS[name]
    span = 87.0 if dtype == torch.float32 else 708.0
    generator = torch.Generator().manual_seed(0)
    near, far = (torch.randn(2000, generator=generator, dtype=torch.float64) for _ in range(2))
    tiny = torch.logspace(-30, 0, 500, dtype=torch.float64)
    x = torch.cat([near, 10 * far, tiny, -tiny, torch.linspace(-span, span, 1003, dtype=torch.float64)]).to(dtype)
    x = x.clamp(-span, span)
    with np.errstate(over="ignore"):
        want = wider(x.numpy().astype(WIDER[dtype]))
    got = value(f, x).numpy()
    error = np.abs(got.astype(WIDER[dtype]) - want) / np.spacing(np.abs(want.astype(got.dtype)))
    worst = int(np.argmax(error))
    assert error[worst] <= units, f"{name}({x[worst]!r}) is off by {error[worst]:.1f} units"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_at_the_ends(name, dtype, value):
    """Infinities, NaN, zeros of both signs, and arguments beyond which the result no longer changes."""
    f, _, _ = FUNCTIONS[name]
    inf, big = float("inf"), 3e38 if dtype == torch.float32 else 1e308
    ends = [inf, -inf, float("nan"), 0.0, -0.0, big, -big, 90.0, -90.0, 105.0, -105.0, 720.0, -720.0, 746.0, -746.0]
    x = torch.tensor(ends, dtype=dtype)
    want = f(x)
    if name in ("sin", "cos", "tan"):
        want[x.abs() >= APART[dtype]] = torch.nan
    torch.testing.assert_close(value(f, x), want, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", [torch.log, torch.log1p])
def test_logarithms_where_there_is_none(f, dtype, value):
    tiny = torch.finfo(dtype).smallest_normal
    ends = [-2.0, -1.0, -0.5, -0.0, 0.0, tiny / 1024, tiny, -tiny, 1.0, float("inf"), -float("inf"), float("nan")]
    x = torch.tensor(ends, dtype=dtype)
    torch.testing.assert_close(value(f, x), f(x), rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sines_of_large_numbers_and_beside_their_zeros(name, dtype, value):
    if dtype == torch.float64 and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no wider type than float64 here")
    f, wider, units = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    zeros = torch.pi / 2 * torch.randint(int(APART[dtype] / 2), (2000,), generator=generator, dtype=torch.float64)
    large = APART[dtype] ** (0.9 * torch.rand(2000, generator=generator, dtype=torch.float64))
    x = torch.cat([zeros, zeros * (1 + 2**-52), large, -large]).to(dtype)
    want = wider(x.numpy().astype(WIDER[dtype]))
    got = value(f, x).numpy()
    error = np.abs(got.astype(WIDER[dtype]) - want) / np.spacing(np.abs(want.astype(got.dtype)))
    assert error.max() <= units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_all_sizes(check, dtype):
    """Sizes on both sides of what fits in a vector, with one row and several."""
    torch.manual_seed(0)
    for rows, widths in ((1, (3, 5)), (1, (8, 17)), (2, (4, 9)), (5, (16, 3)), (9, (2, 24)), (7, (33, 31))):
        a, b = widths
        net = nn.Sequential(nn.Linear(3, a), nn.Tanh(), nn.Linear(a, b), nn.SiLU(), nn.Linear(b, 3)).to(dtype)
        functions = ("f", "jvp", "vjp", "vjp_p", "keep", "pull")
        check(lambda t, h, net=net: net(h), torch.randn(rows, 3, dtype=dtype), "array", functions, points=1)


def test_matrices_on_either_side_and_in_a_batch(check):
    torch.manual_seed(0)
    A, B = (torch.randn(n, n, dtype=torch.float64).requires_grad_() for n in (12, 5))
    C = torch.randn(3, 4, 4, dtype=torch.float64)
    functions = ("f", "vjp", "keep", "pull")
    check(lambda t, h: A @ torch.tanh(h) @ B, torch.randn(12, 5, dtype=torch.float64), "array", functions)
    check(lambda t, h: A.T @ torch.tanh(h), torch.randn(12, dtype=torch.float64), "array", functions)
    check(lambda t, h: torch.bmm(C, torch.tanh(h)) + h, torch.randn(3, 4, 2, dtype=torch.float64), "array", functions)


def test_networks_are_loops_and_small_systems_are_not(program_of):
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    assert program_of(lambda t, h: net(h), torch.ones(2))[0].mode == "array"
    matrix = torch.randn(3, 3)
    assert program_of(lambda t, h: matrix @ torch.tanh(h), torch.ones(3))[0].mode == "scalar"
