"""The discrete adjoint on the Julia engine: the exact gradient of the numbers that came out, as natively."""

import math

import pytest
import torch

from pyjlode import METHODS, errors, odeint, solve

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
EXPLICIT = [m.name for m in METHODS.values() if m.kind in ("adaptive", "fixed") and m.julia]
SPANS = [[0.0, 2.0], [0.0, 0.31, 1.0, 1.7, 2.0], [1.5, 1.2, 0.0]]


def same_steps(method, engine):
    """Steps of 0.1, which no control of the error changes."""
    if METHODS[method].kind == "fixed":
        return {"step_size": 0.1, **({"interp": "cubic"} if engine == "torch" else {})}
    return {"first_step": 0.1, "max_step": 0.1}


class Net(torch.nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(dtype)
        self.register_buffer("rate", torch.tensor(0.3, dtype=dtype))

    def forward(self, t, h):
        return self.layers(h) * torch.cos(t) - self.rate * h


def gradients(f, h0, t, **given):
    h0 = h0.clone().requires_grad_()
    h = odeint(f, h0, t, **given)
    return torch.autograd.grad(h.square().sum(), [h0, *f.parameters()])


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("t", SPANS)
@pytest.mark.parametrize("method", EXPLICIT)
def test_of_the_same_steps_it_is_the_native_one(method, t, compile, dtype):
    f, h0, loose = Net(dtype), torch.tensor([1.0, 0.5], dtype=dtype), {"rtol": 1e6, "atol": 1e6}
    found, expected = (
        gradients(
            f, h0, t, method=method, engine=engine, adjoint="discrete", options=same_steps(method, engine), **more
        )
        for engine, more in (("julia", {"compile": compile, **loose}), ("torch", loose))
    )
    eps = 1000 * torch.finfo(dtype).eps  # vern9 has large coefficients
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("compile", [False, True])
def test_it_is_what_true_means_for_explicit_methods(compile):
    f, h0 = Net(), torch.tensor([1.0, 0.5], dtype=F64)
    given = {"engine": "julia", "compile": compile, "rtol": 1e-3, "atol": 1e-3}
    by_true, by_name = (gradients(f, h0, SPANS[1], adjoint=adjoint, **given) for adjoint in (True, "discrete"))
    torch.testing.assert_close(by_true, by_name, rtol=0, atol=0)


@pytest.mark.parametrize("compile", [False, True])
def test_against_differences_of_a_coarse_solve(compile):
    """At a tolerance where the gradient of the numbers and that of the solution are far apart."""
    f, h0 = Net(), torch.tensor([1.0, 0.5], dtype=F64)
    given = {"method": "bosh3", "engine": "julia", "compile": compile, "rtol": 1e6, "atol": 1e6}
    given["options"] = {"first_step": 0.9, "max_step": 0.9}
    found = gradients(f, h0, SPANS[1], adjoint="discrete", **given)[0]

    def loss(h0):
        with torch.no_grad():
            return float(odeint(f, h0, SPANS[1], **given).square().sum())

    for i in range(2):
        step = 1e-5 * torch.eye(2, dtype=F64)[i]
        assert float(found[i]) == pytest.approx((loss(h0 + step) - loss(h0 - step)) / 2e-5, rel=1e-8)


def test_solves_of_one_program_do_not_see_each_others_values():
    """They share Julia's integrator: each backward pass has the values of its own solve."""
    fs, t = [Net() for _ in range(4)], SPANS[1]
    h0 = torch.tensor([1.0, 0.5], dtype=F64)
    tol = {"rtol": 1e-10, "atol": 1e-10}
    expected = [gradients(f, h0, t, engine="torch", adjoint=True, **tol) for f in fs]
    for _ in range(3):
        starts = [h0.clone().requires_grad_() for _ in fs]
        states = [
            odeint(f, start, t, engine="julia", compile=True, adjoint=True, **tol) for f, start in zip(fs, starts)
        ]
        for i in (2, 0, 3, 1):
            for again in (True, False):
                found = torch.autograd.grad(
                    states[i].square().sum(), [starts[i], *fs[i].parameters()], retain_graph=again
                )
                torch.testing.assert_close(found, expected[i], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("compile", [False, True])
def test_a_buffer_that_changed_in_between_is_noticed(compile):
    f, h0 = Net(), torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    for _ in range(3):
        h = odeint(f, h0, SPANS[1], engine="julia", compile=compile, adjoint="discrete")
        f.rate.mul_(2)
        with pytest.raises(errors.GradientUnavailable, match="other values"):
            h.sum().backward()


def test_tuples_complex_numbers_and_times():
    w = torch.tensor([0.7, -0.2], dtype=F64, requires_grad=True)

    def f(t, h):
        z, x = h
        return (-1 + 2j) * z * w[0] + x.sum() * t, torch.stack([x[1], -x[0] * w[1]]) - z.abs()

    def found(engine, **more):
        z = torch.tensor([1.0 + 0.5j], dtype=torch.complex128, requires_grad=True)
        x, t = (
            torch.ones(2, dtype=F64, requires_grad=True),
            torch.tensor([0.0, 0.4, 1.0], dtype=F64, requires_grad=True),
        )
        a, b = odeint(f, (z, x), t, engine=engine, adjoint=True, rtol=1e-9, atol=1e-9, **more)
        return torch.autograd.grad(a.abs().sum() + b.square().sum(), (z, x, t, w))

    torch.testing.assert_close(found("julia"), found("torch"), rtol=1e-7, atol=1e-7)


def test_calls_are_counted():
    class Counting(Net):
        nfe = 0

        def forward(self, t, h):
            self.nfe += 1
            return super().forward(t, h)

    counts = []
    for engine, more in (("julia", {"compile": True}), ("torch", {})):
        f, h0 = Counting(), torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
        options = same_steps("tsit5", engine)
        solution = solve(
            f, h0, SPANS[0], method="tsit5", adjoint=True, dense=False, engine=engine, options=options, **more
        )
        solution.h.sum().backward()
        counts.append(solution.stats.nfe_backward)
    assert counts[0] == pytest.approx(20, abs=1)  # of each step one stage is computed again; the others were kept
    assert counts[1] <= 20 * 6  # steps, stages; there the graph of the first steps is kept, and there are no others


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"method": "radau5"}, "explicit"),
        ({"method": "rodas5p", "compile": False}, "explicit"),
        ({"options": {"jump_t": [0.5]}}, "jump_t"),
    ],
)
def test_where_it_cannot_be_had_another_is_taken_or_that_is_said(given, why):
    f, h0 = Net(), torch.tensor([1.0, 0.5], dtype=F64)
    with pytest.raises(errors.BadOption, match=why):
        gradients(f, h0, SPANS[0], engine="julia", adjoint="discrete", **given)
    found = gradients(f, h0, SPANS[0], engine="julia", adjoint=True, rtol=1e-9, atol=1e-9, **given)
    expected = gradients(f, h0, SPANS[0], engine="torch", adjoint=True, rtol=1e-9, atol=1e-9, **given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_through_an_event_another_is_taken():
    h0, w = torch.tensor([1.0], dtype=F64), torch.tensor(0.7, dtype=F64, requires_grad=True)
    event_t, _ = odeint(
        lambda t, h: -w * h, h0, [0.0, 1.0], engine="julia", adjoint=True, event_fn=lambda t, h: h[0] - 0.5
    )
    assert float(event_t.detach()) == pytest.approx(math.log(2) / 0.7)
    assert float(torch.autograd.grad(event_t, w)[0]) == pytest.approx(-math.log(2) / 0.49, rel=1e-5)
