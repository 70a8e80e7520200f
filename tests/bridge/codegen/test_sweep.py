"""Independent systems in one call of Julia, each with its own part of what f holds and steps of its own."""

import os
import subprocess
import sys

import pytest
import torch
from problems import robertson_batch
from torch import nn

from pyjlode import odeint, solve
from pyjlode.errors import BadOption, NotCompiled, StepSizeTooSmall

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
RHO = torch.linspace(0.0, 28.0, 7, dtype=F64)
START = torch.tensor([1.0, 0.5, 2.0], dtype=F64)
T = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=F64)
JULIA = {"engine": "julia", "compile": True, "options": {"batch_dims": 1}}
TOL = {"rtol": 1e-9, "atol": 1e-9}


def lorenz(rho):
    def f(t, h):
        x, y, z = h.unbind(-1)
        return torch.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z], -1)

    return f


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "vern7", "rodas5p", "bdf", "auto"])
def test_each_system_is_solved_as_if_alone(method):
    if method in ("rodas5p", "bdf", "auto"):
        make, parts = robertson_batch, torch.tensor([0.01, 0.04, 0.2], dtype=F64)
        h0, t, tol = torch.tensor([1.0, 0.0, 0.0], dtype=F64).expand(3, 3), 10 * T, {"rtol": 1e-7, "atol": 1e-10}
    else:
        make, parts, h0, t, tol = lorenz, RHO, START.expand(7, 3), T, TOL
    together = solve(make(parts), h0, t, method=method, dense=False, **tol, **JULIA)
    one = {"engine": "julia", "compile": True, "method": method, "dense": False, **tol}
    alone = [solve(make(part), h0[0], t, **one) for part in parts]
    assert together.h.shape == (len(t), *h0.shape)
    assert together.stats.compiled == "scalar"
    for i, single in enumerate(alone):
        # What is left behind by the system before (a Jacobian, a matrix factorised) may last some steps.
        assert torch.allclose(together.h[:, i], single.h, rtol=1e-5, atol=1e-7)
    if make is lorenz:
        for i, single in enumerate(alone):
            assert torch.allclose(together.h[:, i], single.h, rtol=1e-11, atol=1e-11)
        # By the field at the start, which the front door adds.
        assert together.stats.naccept == sum(single.stats.naccept for single in alone)


@pytest.mark.parametrize("options", [{"first_step": 1e-3}, {"max_step": 0.01}, {"specialize": "full"}])
def test_each_system_has_the_options(options):
    kwargs = {"engine": "julia", "compile": True, "method": "tsit5", "dense": False, **TOL}
    h0 = START.expand(7, 3)
    together = solve(lorenz(RHO), h0, T, options={"batch_dims": 1, **options}, **kwargs)
    alone = [solve(lorenz(rho), START, T, options=options, **kwargs) for rho in RHO]
    assert torch.allclose(together.h, torch.stack([single.h for single in alone], 1), rtol=1e-11, atol=1e-11)
    assert together.stats.naccept == sum(single.stats.naccept for single in alone)


def test_backward_in_time_from_own_starts():
    h0 = torch.randn(7, 3, dtype=F64)
    h = odeint(lorenz(RHO), h0, -T / 10, **TOL, **JULIA)
    for i in range(7):
        alone = odeint(lorenz(RHO[i]), h0[i], -T / 10, engine="torch", **TOL)
        assert torch.allclose(h[:, i], alone, rtol=1e-6, atol=1e-6)


def test_float32_and_two_batch_dimensions():
    rho, h0 = RHO[:6].float().view(2, 3), START.float().expand(2, 3, 3)
    kwargs = {**JULIA, "options": {"batch_dims": 2}, "rtol": 1e-5, "atol": 1e-5}
    h = odeint(lorenz(rho), h0, T, **kwargs)
    assert h.dtype == torch.float32
    want = odeint(lorenz(rho.double()), h0.double(), T, engine="torch", **TOL)
    assert torch.allclose(h.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["tsit5", "dopri8", "rodas5p"])
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 3)], ids=["of elements", "of systems", "of both"])
def test_each_element_has_its_tolerance(method, shape):
    make, parts, h0, t = lorenz, RHO[:3], START.expand(3, 3), T
    if method == "rodas5p":
        make, parts = robertson_batch, torch.tensor([0.01, 0.04, 0.2], dtype=F64)
        h0, t = torch.tensor([1.0, 0.0, 0.0], dtype=F64).expand(3, 3), 10 * T
    atol = torch.logspace(-10, -4, 9, dtype=F64)[: 9 if shape == (3, 3) else 3].view(shape)

    def solved(parts, atol):
        how = {"method": method, "rtol": 1e-5, "dense": False, **JULIA}
        return solve(make(parts), h0[: len(parts)], t, atol=atol, **how)

    together = solved(parts, atol)
    steps = together.stats.systems.naccept.tolist()
    assert len(set(steps)) > 1
    for i, own in enumerate(atol.expand(3, 3)):
        twice = solved(parts[i].expand(2), own)  # of systems alike
        assert twice.stats.systems.naccept.tolist() == [steps[i]] * 2
        assert torch.allclose(together.h[:, i], twice.h[:, 0], rtol=1e-12, atol=1e-12)


def test_tolerances_of_states_of_several_tensors_and_gradients():
    rho = RHO.clone().requires_grad_()

    def f(t, h):
        slopes = lorenz(rho)(t, torch.cat([h["xy"], h["z"]], -1))
        return {"xy": slopes[:, :2], "z": slopes[:, 2:]}

    h0 = {"xy": START[:2].repeat(7, 1), "z": START[2:].repeat(7, 1)}
    atol = {"xy": torch.tensor([1e-9, 1e-5], dtype=F64), "z": 1e-7}
    grads, steps = [], []
    for how in (JULIA, {"engine": "torch", "options": {"batch_dims": 1}}):
        solution = solve(f, h0, T, method="tsit5", rtol=1e-6, atol=atol, adjoint=True, dense=False, **how)
        grads += torch.autograd.grad(solution.h["z"][-1].sum(), rho)
        steps.append(solution.stats.systems.naccept)
    assert (steps[0] - steps[1]).abs().max() <= 2
    assert torch.allclose(*grads, rtol=1e-4)


def test_one_stiff_system_with_tolerances_of_its_elements_has_the_exact_gradient():
    k, h0 = torch.tensor([0.04], dtype=F64, requires_grad=True), torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)
    how = {"method": "rodas5p", "rtol": 1e-8, "atol": torch.tensor([1e-8, 1e-12, 1e-8], dtype=F64), "adjoint": True}
    got, want = (
        torch.autograd.grad(odeint(robertson_batch(k), h0, 10 * T, **how, **engine)[-1, 0, 0], k)[0]
        for engine in ({"engine": "julia", "compile": True}, {"engine": "torch"})
    )
    assert torch.allclose(got, want, rtol=1e-5)


def test_a_network_is_shared_and_its_input_is_not():
    net, drive = nn.Linear(3, 3).double(), torch.randn(5, 3, dtype=F64)
    h0 = torch.randn(5, 3, dtype=F64)

    def f(t, h):
        return torch.tanh(net(h)) + drive * torch.cos(t)

    with torch.no_grad():
        h = odeint(f, h0, T, **TOL, **JULIA)
        want = odeint(f, h0, T, engine="torch", **TOL)
        net.weight.mul_(2)  # read anew at each solve
        drive.zero_()
        again = odeint(f, h0, T, **TOL, **JULIA)
        want_again = odeint(f, h0, T, engine="torch", **TOL)
    assert torch.allclose(h, want, rtol=1e-7, atol=1e-7)
    assert torch.allclose(again, want_again, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n", [2, 3])
def test_from_rest_a_shared_tensor_as_long_as_the_batch_is_shared(n):
    b, net, h0 = torch.tensor([1.0, 2.0, 3.0], dtype=F64)[:n], nn.Linear(n, n).double(), torch.zeros(n, n, dtype=F64)
    for f in (
        lambda t, h: torch.sin(t) - b * h,
        lambda t, h: torch.sin(t) - b[:, None] * h,
        lambda t, h: torch.tanh(net(h)) + torch.sin(t),
        lambda t, h: torch.sin(t) - b.mean() * h,
        lambda t, h: torch.sin(t) - torch.where(h > 0.2, b * h, h),
        lambda t, h: torch.sin(t) - torch.where(h > 0.2, b[:, None] * h, h),
    ):
        with torch.no_grad():
            for _ in range(2):
                got = odeint(f, h0, T, **TOL, **JULIA)
                assert torch.allclose(got, odeint(f, h0, T, engine="torch", **TOL), rtol=1e-6, atol=1e-7)


def test_a_tensor_that_is_shared_and_is_not():
    b = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    with pytest.raises(NotCompiled, match="not each f with its own part"):
        odeint(lambda t, h: torch.sin(t) - b * h * b[:, None], torch.zeros(3, 3, dtype=F64), T, **JULIA)


@pytest.mark.filterwarnings("ignore:f is not compiled")
def test_systems_that_are_not_independent_are_found_out_from_rest():
    def f(t, h):
        return torch.sin(t) + h.mean(0) - 2 * h  # at rest all are alike

    with pytest.raises(NotCompiled, match="not each f with its own part"):
        odeint(f, torch.zeros(4, 3, dtype=F64), T, **JULIA)


@pytest.mark.filterwarnings("ignore:f is not compiled")
def test_systems_that_are_not_independent_are_found_out():
    def f(t, h):
        return h.mean(0) - h

    with pytest.raises(NotCompiled, match="not each f with its own part"):
        odeint(f, torch.randn(4, 3, dtype=F64), T, **JULIA)


def test_the_system_that_fails_is_named():
    k = torch.tensor([0.1, 0.2, 5.0], dtype=F64)
    h0 = torch.ones(3, 1, dtype=F64)

    def f(t, h):
        return k[:, None] * h**2

    with pytest.raises(StepSizeTooSmall, match="system 2 of the batch"):
        odeint(f, h0, T, **JULIA)


def test_what_a_sweep_cannot_do_is_said():
    h0 = START.expand(7, 3)
    with pytest.raises(BadOption, match="dense=False"):
        solve(lorenz(RHO), h0, T, method="bdf", **JULIA)
    with pytest.raises(BadOption, match="needs compile=True"):
        odeint(lorenz(RHO), h0, T, engine="julia", method="bdf", options={"batch_dims": 1})
    with pytest.raises(BadOption, match="needs compile=True"):
        odeint(lorenz(RHO), h0, T, engine="julia", compile=False, options={"batch_dims": 1})
    with pytest.raises(BadOption, match="has gradients by adjoint=True for explicit methods"):
        odeint(lorenz(RHO), h0, T, adjoint="gauss", **JULIA)


def test_on_threads():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import test_sweep as s\n"
        "from pyjlode.bridge import runtime\n"
        "h = s.odeint(s.lorenz(s.RHO), s.START.expand(7, 3), s.T, **s.TOL, **s.JULIA)\n"
        "print(runtime.evaluate('Threads.nthreads()'))\n"
        "print(h[-1].tolist())\n"
    )
    ends = []
    for threads in ("1", "2"):
        env = {**os.environ, "PYTHON_JULIACALL_THREADS": threads, "PYTHON_JULIACALL_HANDLE_SIGNALS": "yes"}
        lines = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        ).stdout.splitlines()
        assert lines[-2] == threads
        ends.append(lines[-1])
    assert ends[0] == ends[1]
