"""States that are on a device: what is done there, on arrays of the host's memory that refuse what a device would make
slow or impossible (JLArrays.jl: no element by itself), against the same on the host."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from problems import GENERAL

import pyjlode
from pyjlode import errors, odeint, odeint_event, solve
from pyjlode.bridge import places, runtime

pytestmark = pytest.mark.usefixtures("jlarrays")

F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
TOL = {"rtol": 1e-8, "atol": 1e-10, "engine": "julia", "compile": False}


class MLP(torch.nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)

    def forward(self, t, h):
        return self.net(h) * torch.cos(t)


STAND_IN = 2  # as in julia/test/jlarrays.jl
JULIA = Path(__file__).parents[2] / "julia"


@contextlib.contextmanager
def standing_in():
    """Within this context states on the host are given to Julia as arrays that behave as a device's."""
    if "JLArrays" not in runtime.seconds():
        runtime.load("JLArrays")
        with runtime.julia():
            runtime.evaluate(f'include(raw"{JULIA / "test" / "jlarrays.jl"}")')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "of", lambda x: places.Place(STAND_IN, x.device))
        patch.setitem(places.PACKAGES, STAND_IN, "JLArrays")
        yield


def both(run):
    """The same on the host, and as on a device."""
    here = run()
    with standing_in():
        return here, run()


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
def test_solutions(method, dtype):
    h0, rate = torch.tensor([1.0, 0.5, -2.0]).to(dtype), -0.5 + (1j if dtype.is_complex else 0)
    tol = {"rtol": 1e-5, "atol": 1e-6} if dtype != F64 else {}
    here, there = both(lambda: odeint(lambda t, h: rate * h * torch.cos(t), h0, T, method=method, **{**TOL, **tol}))
    torch.testing.assert_close(there, here, rtol=1e-5 if dtype != F64 else 1e-12, atol=1e-7)
    exact = h0 * torch.exp(rate * torch.sin(T))[:, None]
    torch.testing.assert_close(there.to(torch.complex128), exact.to(torch.complex128), rtol=1e-4, atol=1e-4)


def test_what_f_is_shown_is_the_solvers_memory():
    """Not copies, which would all lie in one place: the same few addresses come again."""
    seen = set()

    def f(t, h):
        seen.add(h.data_ptr())
        return -h

    with standing_in():
        solution = solve(f, torch.ones(3, dtype=F64), T, method="dopri5", dense=False, **TOL)
    assert solution.stats.nfe > 30
    assert 2 < len(seen) < 12


def test_tuples_tolerances_of_each_element_and_dense_output():
    h0 = (torch.ones(2, dtype=F64), torch.tensor([[0.1], [0.2], [0.3]], dtype=F64))

    def run():
        tol = {**TOL, "rtol": (torch.tensor([1e-6, 1e-7], dtype=F64), 1e-8)}
        solution = solve(lambda t, h: (-h[0], h[1] * torch.sin(t)), h0, T, method="tsit5", **tol)
        return [*solution.h, *solution.interpolate(torch.tensor([0.3, 1.1], dtype=F64))]

    for here, there in zip(*both(run)):
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("adjoint", GENERAL)
def test_gradients(adjoint):
    net, h0 = MLP(), torch.tensor([[1.0, 0.2], [0.3, -0.4]], dtype=F64, requires_grad=True)

    def run():
        h = odeint(net, h0, T, method="dopri5", adjoint=adjoint, **TOL)
        return torch.autograd.grad((h * torch.arange(1.0, 6.0)[:, None, None]).square().sum(), (h0, *net.parameters()))

    for here, there in zip(*both(run)):
        torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("adjoint", ["gauss", "forward"])
def test_events(adjoint):
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def run():
        t, _ = odeint_event(
            lambda t, h: -rate * h, torch.tensor([1.0], dtype=F64), torch.tensor(0.0, dtype=F64),
            event_fn=lambda t, h: h[0] - 0.5, method="tsit5", adjoint=adjoint, **TOL,
        )  # fmt: skip
        return t.detach(), *torch.autograd.grad(t, rate)

    here, there = both(run)
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-10)
    assert there[0].item() == pytest.approx(math.log(2) / 0.7, rel=1e-7)


def test_matrix_free_stiff_systems():
    """A heat equation of 64 points; JLArrays.jl has no LU, and this takes none."""
    n = 64
    x = torch.linspace(0, 1, n + 2, dtype=F64)[1:-1]
    kernel = torch.tensor([[[1.0, -2.0, 1.0]]], dtype=F64) * (n + 1) ** 2

    def heat(t, h):
        return torch.conv1d(h[None, None], kernel, padding=1)[0, 0]

    def run():
        t = torch.tensor([0.0, 0.1], dtype=F64)
        return odeint(
            heat, torch.sin(math.pi * x), t, method=pyjlode.julia_method("FBDF(linsolve=KrylovJL_GMRES())"), **TOL
        )[-1]

    here, there = both(run)
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(there, math.exp(-(math.pi**2) * 0.1) * torch.sin(math.pi * x), rtol=1e-3, atol=1e-4)


def test_errors_come_through():
    def f(t, h):
        if t > 0.5:
            raise ZeroDivisionError("of f's own")
        return -h

    with standing_in(), pytest.raises(ZeroDivisionError, match="of f's own"):
        odeint(f, torch.ones(2, dtype=F64), T, **TOL)
    with standing_in(), pytest.raises(errors.SolveError):
        odeint(lambda t, h: h * h, torch.ones(2, dtype=F64), T, **TOL)


def test_nothing_is_compiled_there():
    with standing_in():
        with pytest.raises(errors.NotCompiled, match="lies on"):
            odeint(lambda t, h: -h, torch.ones(2, dtype=F64), T, **{**TOL, "compile": True})
        stats = solve(lambda t, h: -h, torch.ones(2, dtype=F64), T, **{**TOL, "compile": None}).stats
    assert "lies on" in stats.not_compiled


def test_julia_functions_are_for_the_host():
    f = pyjlode.julia_function("f(du, u, p, t) = (du .= -u)", torch.zeros(1, dtype=F64))
    with standing_in(), pytest.raises(errors.BadOption, match="code for the CPU"):
        odeint(f, torch.ones(2, dtype=F64), T, engine="julia")


def test_without_cuda(monkeypatch):
    monkeypatch.setattr(runtime, "find", lambda: runtime.Found("julia", "nowhere", "this test"))
    runtime.without.cache_clear()
    assert "pyjlode setup --cuda" in runtime.without("CUDA")
    runtime.without.cache_clear()
