"""Solves with compiled fields through the front door: as those with callbacks, and as the native engine's."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import pyjlode
from pyjlode import odeint, solve
from pyjlode.bridge.codegen import program as programs
from pyjlode.bridge.codegen import scalar
from pyjlode.capture import held as capture
from pyjlode.errors import NotCompiled
from pyjlode.problem import Field

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64
T = torch.linspace(0, 2, 5, dtype=F64)
TOL = {"rtol": 1e-9, "atol": 1e-11}


class MLP(nn.Module):
    def __init__(self, dtype=F64, width=6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).to(dtype)

    def forward(self, t, h):
        return self.net(h) * torch.cos(t)


def second(*args, **kwargs):
    """The second of two solves, which compiles what it can."""
    solve(*args, **kwargs)
    return solve(*args, **kwargs)


def lorenz(p):
    def f(t, u):
        x, y, z = u
        return torch.stack([p[0] * (y - x), x * (p[1] - z) - y, x * y - p[2] * z])

    return f


def lotka(p):
    return lambda t, u: torch.stack([p[0] * u[0] - p[1] * u[0] * u[1], -p[2] * u[1] + p[3] * u[0] * u[1]])


def leaf(*numbers):
    return torch.tensor(numbers, dtype=F64, requires_grad=True)


def problems():
    h2 = torch.tensor([0.5, -0.3], dtype=F64)
    return {
        "mlp": (MLP(), h2, T),
        "mlp_batch": (MLP(), torch.randn(4, 2, dtype=F64), T),
        "lorenz": (lorenz(leaf(10.0, 28.0, 8 / 3)), torch.tensor([1.0, 0.0, 0.0], dtype=F64), T / 4),
        "lotka": (lotka(leaf(1.5, 1.0, 3.0, 1.0)), torch.tensor([1.0, 1.0], dtype=F64), T),
        "backward_in_time": (MLP(), h2, -T),
        "time": (lambda t, h: torch.sin(3 * t) - h, h2, T),
    }


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "vern7", "bosh3", "rodas5p", "bdf", "kencarp4"])
@pytest.mark.parametrize("name", problems())
def test_states_are_those_of_the_callback(name, method):
    f, h0, t = problems()[name]
    kwargs = {"engine": "julia", "method": method, "rtol": 1e-6, "atol": 1e-8, "dense": False}
    with torch.no_grad():
        ours, theirs = (solve(f, h0, t, compile=c, **kwargs) for c in (True, False))
        native = odeint(f, h0, t, engine="torch", method="dopri8", rtol=1e-9, atol=1e-11)
    assert ours.stats.compiled
    assert not ours.stats.not_compiled
    assert theirs.stats.not_compiled == "compile=False"
    # The same steps, but for the order of summation.
    for name in ("naccept", "nreject", "njac"):
        assert abs(getattr(ours.stats, name) - getattr(theirs.stats, name)) <= 0.05 * theirs.stats.naccept + 2
    assert torch.allclose(ours.h, theirs.h, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours.h, native, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("width", [2, 40], ids=["scalar", "array"])
def test_a_field_that_is_driven_by_samples(width):
    """As such fields are written: the place of a time among others indexes."""
    torch.manual_seed(0)
    places, samples = torch.linspace(0, 2, 9, dtype=F64), torch.randn(9, 2, dtype=F64, requires_grad=True)
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).to(F64)

    def f(t, h):
        i = torch.searchsorted(places, t).clamp(1, 8)
        part = (t - places[i - 1]) / (places[i] - places[i - 1])
        return net(torch.cat([h, torch.lerp(samples[i - 1], samples[i], part)]))

    def run(**how):
        solution = solve(f, torch.ones(2, dtype=F64), T, step_t=places[1:-1], adjoint=True, rtol=1e-8, **how)
        return solution, torch.autograd.grad(solution.h.square().sum(), (samples, *net.parameters()))

    ours, got = run(engine="julia", compile=True)
    theirs, want = run(engine="torch")
    assert ours.stats.compiled == ("scalar" if width == 2 else "array")
    torch.testing.assert_close(ours.h, theirs.h, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_an_index_out_of_range_is_no_number():
    """PyTorch raises an IndexError, which compiled code cannot: it ends the solve, and is not a wrong number."""
    samples = torch.ones(4, dtype=F64)
    edges = torch.linspace(0.25, 1.75, 5, dtype=F64)
    f = lambda t, h: -h * samples[torch.searchsorted(edges, t)]  # noqa: E731
    h0 = torch.ones(2, dtype=F64)
    ended = solve(f, h0, T[:3], engine="julia", compile=True)
    assert torch.allclose(ended.h[-1], torch.exp(-T[2]).expand(2), rtol=1e-5)
    with pytest.raises((IndexError, pyjlode.errors.SolveError)):
        solve(f, h0, T, engine="julia", compile=True)
    with pytest.raises(IndexError):
        solve(f, h0, T, engine="torch")


@pytest.mark.parametrize("adjoint", ["interpolating", "gauss", "quadrature", "backsolve", "forward"])
@pytest.mark.parametrize("name", ["mlp", "mlp_batch", "lorenz", "lotka"])
@pytest.mark.parametrize("mode", ["scalar", "array"])
def test_gradients_are_the_native_engines(name, adjoint, mode, monkeypatch):
    if mode == "array":
        if adjoint == "forward":
            pytest.skip("the sensitivities of large fields are not compiled")
        monkeypatch.setattr(scalar, "LIMIT", -1)
    monkeypatch.setattr(programs, "_NETWORK", math.inf)
    monkeypatch.setattr(capture, "_roots", type(capture._roots)())
    f, h0, t = problems()[name]
    params = list(f.parameters()) if isinstance(f, nn.Module) else [c.cell_contents for c in f.__closure__]

    def gradient(**kwargs):
        start, times = h0.clone().requires_grad_(), t.clone().requires_grad_()
        solution = solve(f, start, times, dense=False, **TOL, **kwargs)
        return solution.stats, torch.autograd.grad(solution.h.square().sum(), [start, times, *params])

    stats, ours = gradient(engine="julia", method="tsit5", adjoint=adjoint, compile=True)
    _, want = gradient(engine="torch", method="dopri8", adjoint="discrete")
    assert stats.compiled == mode
    for a, b in zip(ours, want):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_sensitivities_of_some_of_what_f_uses():
    """What f does not use has no part in the field of the sensitivities; of what it uses all must be asked for."""
    p, unused = leaf(1.5, 1.0, 3.0, 1.0), leaf(1.0)
    h0 = torch.tensor([1.0, 1.0], dtype=F64)
    kwargs = {"engine": "julia", "adjoint": "forward", "method": "tsit5", **TOL}
    want = torch.autograd.grad(odeint(lotka(p), h0, T, compile=True, **kwargs)[-1, 0], p)[0]
    solution = second(lotka(p), h0, T, adjoint_params=(p, unused), **kwargs)
    assert solution.stats.compiled
    got = torch.autograd.grad(solution.h[-1, 0], (p, unused), allow_unused=True)
    assert torch.allclose(got[0], want, rtol=1e-6)
    assert not torch.any(got[1])
    q = leaf(1.0)
    solution = second(lambda t, u: q * lotka(p)(t, u), h0, T, adjoint_params=(p,), **kwargs)
    assert "other tensors" in solution.stats.not_compiled
    assert torch.allclose(torch.autograd.grad(solution.h[-1, 0], p)[0], want, rtol=1e-6)


def test_sensitivities_at_an_event():
    p = leaf(2.0)
    h0 = torch.ones(1, dtype=F64)
    kwargs = {"engine": "julia", "adjoint": "forward", "compile": True, **TOL}
    t, _ = odeint(lambda t, h: -p * h, h0, T[:2], event_fn=lambda t, h: h - 0.5, **kwargs)
    assert abs(float(t.detach()) - math.log(2) / 2) < 1e-8
    assert abs(float(torch.autograd.grad(t, p)[0]) + math.log(2) / 4) < 1e-7


def test_gradient_by_an_implicit_method():
    p = leaf(1.5, 1.0, 3.0, 1.0)
    h0 = torch.tensor([1.0, 1.0], dtype=F64)

    def gradient(**kwargs):
        h = odeint(lotka(p), h0, T, rtol=1e-8, atol=1e-10, **kwargs)
        return torch.autograd.grad(h[-1, 0], p)[0]

    ours = gradient(engine="julia", method="rodas5p", adjoint="gauss", compile=True)
    want = gradient(engine="torch", method="dopri8", adjoint="discrete")
    assert torch.allclose(ours, want, rtol=1e-3)


@pytest.mark.parametrize("method", ["rodas5p", "bdf", "kvaerno5", "radau5"])
def test_sparse_jacobian_is_found(method):
    n = 60
    h0 = torch.exp(-(torch.linspace(-3, 3, n, dtype=F64) ** 2))

    def heat(t, h):
        padded = torch.nn.functional.pad(h[None], (1, 1))[0]
        return 400 * (padded[:-2] - 2 * h + padded[2:]) - h**3

    t = torch.tensor([0.0, 0.1], dtype=F64)
    kwargs = {"engine": "julia", "method": method, "rtol": 1e-7, "atol": 1e-9}
    ours = solve(heat, h0, t, compile=True, **kwargs)
    program = programs.program_of(Field(heat, h0.shape, (heat, h0.shape)), h0)[0]
    assert program.pattern is not None
    assert len(program.pattern.rows) == 3 * n - 2
    assert torch.allclose(ours.h, odeint(heat, h0, t, compile=False, **kwargs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_precision_is_kept(dtype):
    f = MLP(dtype)
    with torch.no_grad():
        solution = solve(f, torch.ones(3, 2, dtype=dtype), T, engine="julia", compile=True, rtol=1e-5, atol=1e-6)
    assert solution.h.dtype == dtype
    assert solution.stats.compiled


def test_pytrees_events_and_dense_output():
    h0 = {"x": torch.tensor([1.0], dtype=F64), "v": (torch.zeros(1, dtype=F64),)}

    def f(t, h):
        return {"x": h["v"][0], "v": (-h["x"],)}

    solution = solve(f, h0, T, engine="julia", compile=True, **TOL)
    assert solution.stats.compiled
    assert torch.allclose(solution.h["x"][:, 0], torch.cos(T), atol=1e-7)
    assert torch.allclose(solution.interpolate(0.77)["x"], torch.tensor([math.cos(0.77)], dtype=F64), atol=1e-7)
    event = odeint(f, h0, T[:2], engine="julia", compile=True, event_fn=lambda t, h: h["x"], **TOL)
    assert abs(float(event[0]) - math.pi / 2) < 1e-7


def test_training_compiles_nothing_new(monkeypatch):
    f, h0 = MLP(), torch.ones(2, dtype=F64)
    kwargs = {"engine": "julia", "compile": True, "adjoint": True, "method": "tsit5"}
    odeint(f, h0, T, **kwargs)[-1].sum().backward()

    def never(*args):
        raise AssertionError("traced again")

    monkeypatch.setattr(programs, "Trace", never)
    before = odeint(f, h0, T, **kwargs)
    with torch.no_grad():
        for x in f.parameters():
            x.mul_(1.5)
    after = odeint(f, h0, T, **kwargs)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, odeint(f, h0, T, engine="torch"), atol=1e-5)
    another = MLP()
    assert torch.allclose(odeint(another, h0, T, **kwargs), odeint(another, h0, T, engine="torch"), atol=1e-5)


def test_what_python_changes_is_seen():
    class F(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = 1.0
            self.register_buffer("shift", torch.zeros(2, dtype=F64))

        def forward(self, t, h):
            return -self.rate * h + self.shift

    f, h0 = F(), torch.ones(2, dtype=F64)
    run = lambda: float(odeint(f, h0, T, engine="julia", compile=True, **TOL)[-1, 0])  # noqa: E731
    assert abs(run() - math.exp(-2)) < 1e-7
    f.rate = 2.0
    assert abs(run() - math.exp(-4)) < 1e-7
    f.shift.fill_(2.0)
    assert abs(run() - 1.0) < 1e-7
    f.shift = torch.full((2,), 4.0, dtype=F64)
    assert abs(run() - (2 - math.exp(-4))) < 1e-7


def test_what_is_solved_again_is_compiled():
    rate = torch.tensor(0.71, dtype=F64)
    runs = [solve(lambda t, h: -rate * h, torch.ones(2, dtype=F64), T, engine="julia", **TOL) for _ in range(3)]
    assert [bool(run.stats.compiled) for run in runs] == [False, True, True]
    assert "first time" in runs[0].stats.not_compiled
    for run in runs[1:]:
        assert torch.allclose(run.h, runs[0].h, rtol=1e-12, atol=1e-12)
    assert not solve(lambda t, h: -rate * h, runs[0].h[0], T, engine="julia", compile=False).stats.compiled


@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_a_solver_compiled_for_it(method):
    p, h0 = leaf(10.0, 28.0, 8 / 3), torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    kwargs = {"engine": "julia", "method": method, "compile": True, **TOL}
    for specialize in ("auto", "full"):
        kwargs["options"] = {"specialize": specialize}
        hs = [odeint(lorenz(p.detach()), h0, T / 4, **kwargs) for _ in range(5)]
        hs.append(odeint(lorenz(p), h0, T / 4, adjoint=True, **kwargs))
        hs.append(solve(lorenz(p.detach()), h0, T / 4, **kwargs).interpolate(T / 4))
        (slope,) = torch.autograd.grad(hs[-2].sum(), p)
        if specialize == "auto":
            want, by_p = hs[0], slope
        assert all(torch.allclose(h, want, rtol=1e-6, atol=1e-6) for h in hs)
        assert torch.allclose(slope, by_p, rtol=1e-5)
    with torch.no_grad():
        p.mul_(0.9)  # is read anew
    h = odeint(lorenz(p.detach()), h0, T / 4, **kwargs)
    assert torch.allclose(h, odeint(lorenz(p.detach()), h0, T / 4, engine="torch", **TOL), rtol=1e-6, atol=1e-6)


def branches(t, h):
    return h if h.sum() > 10 else -h


def test_fallback_has_a_reason():
    solution = second(branches, torch.ones(2, dtype=F64), T, engine="julia", **TOL)
    assert "branch" in solution.stats.not_compiled
    assert solution.stats.compiled == ""
    assert torch.allclose(solution.h[-1], torch.full((2,), math.exp(-2), dtype=F64))
    with pytest.raises(NotCompiled, match="branch"):
        odeint(branches, torch.ones(2, dtype=F64), T, engine="julia", compile=True)


def test_errors_of_a_solve_are_as_with_callbacks():
    with pytest.raises(pyjlode.errors.SolveError):
        odeint(lambda t, h: h**2, torch.ones(1, dtype=F64), 2 * T, engine="julia", compile=True)
    solution = solve(lambda t, h: torch.log(h), torch.full((1,), 2.0, dtype=F64), T, engine="julia", compile=True)
    assert torch.isfinite(solution.h).all()


def test_what_cancels_is_no_difference(recwarn):
    """Of a sum that is 1 for every state the derivative is rounding, in PyTorch as in compiled code."""
    torch.manual_seed(0)
    W = torch.randn(16, 16).requires_grad_()
    scores = 0.1 * torch.randn(16, 1).expand(16, 32)

    def f(t, h):
        return torch.softmax(h @ W @ scores, -1).cumsum(-1)[:, :16] - 1

    solution = pyjlode.solve(f, torch.randn(8, 16), T, adjoint=True, engine="julia", compile=True, dense=False)
    assert solution.stats.compiled == "array"
    assert not [w for w in recwarn if "report this" in str(w.message)]


@pytest.mark.parametrize("function", ["f", "vjp", "vjp_p", "jac", "tgrad"])
def test_wrong_code_is_caught_at_first_use(function, monkeypatch):
    monkeypatch.setattr(capture, "_roots", type(capture._roots)())
    p = leaf(1.5, 1.0, 3.0, 1.0)
    f = lotka(p)
    text = programs.Program.text

    def planted(self, name):
        right = text(self, name)
        # The last number that is stored becomes another.
        head, _, tail = right.rpartition("] = ")
        return f"{head}] = 0.01 + {tail}" if name == function else right

    monkeypatch.setattr(programs.Program, "text", planted)
    h0 = torch.tensor([1.0, 1.0], dtype=F64)
    kwargs = {"engine": "julia", "adjoint": "gauss", "method": "rodas5p", **TOL}
    with pytest.warns(UserWarning, match=f"{function}\\[.*not"):
        solution = second(f, h0, T, **kwargs)
    assert solution.stats.compiled == ""
    assert function in solution.stats.not_compiled
    want = odeint(f, h0, T, engine="torch", rtol=1e-8, atol=1e-9)
    assert torch.allclose(solution.h, want, atol=1e-5)
    with pytest.raises(NotCompiled, match="differs"):  # and it is remembered
        solve(f, h0, T, compile=True, **kwargs)


@pytest.mark.parametrize("adjoint", ["gauss", "forward", True])
def test_custom_backward_is_compiled(adjoint):
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.round(x)

        @staticmethod
        def backward(ctx, g):
            return g

    w = leaf(0.7, -0.2)
    f = lambda t, h: Straight.apply(h * w) - h  # noqa: E731
    h0 = torch.tensor([1.0, 3.0], dtype=F64)
    kwargs = {"method": "tsit5", "options": {"max_step": 0.001}, "rtol": 1e-3, "atol": 1e-3}  # it jumps
    want = torch.autograd.grad(odeint(f, h0, T / 10, engine="torch", **kwargs)[-1].sum(), w)[0]
    solution = second(f, h0, T / 10, engine="julia", adjoint=adjoint, **kwargs)
    assert solution.stats.compiled
    assert torch.allclose(torch.autograd.grad(solution.h[-1].sum(), w)[0], want, rtol=1e-4)


def expressions():
    """Random expressions of (t, a, b, p) as functions."""
    unary = [
        torch.sin,
        torch.tanh,
        torch.sigmoid,
        lambda x: x * x,
        lambda x: torch.exp(-x * x),
        torch.nn.functional.softplus,
    ]
    binary = [torch.add, torch.sub, torch.mul, lambda x, y: x / (1 + y * y), torch.maximum, torch.atan2]
    leaves = st.sampled_from([lambda t, a, b, p, i=i: (t, a, b, p)[i] for i in range(4)])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda f, x: lambda *v: f(x(*v)), st.sampled_from(unary), inner),
            st.builds(lambda f, x, y: lambda *v: f(x(*v), y(*v)), st.sampled_from(binary), inner, inner),
        ),
        max_leaves=8,
    )


@pytest.mark.parametrize("mode", ["scalar", "array"])
@hypothesis.settings(max_examples=15, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(x=expressions(), y=expressions())
def test_random_expressions(check, mode, x, y):
    p = leaf(0.3)[0].detach().requires_grad_()
    f = lambda t, h: torch.stack([x(t, h[0], h[1], p), y(t, h[0], h[1], p)]) + torch.sin(h + p * t)  # noqa: E731
    check(f, torch.tensor([0.31, -0.72], dtype=F64), mode, points=1)


@hypothesis.settings(max_examples=8, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    widths=st.lists(st.integers(1, 9), min_size=0, max_size=2),
    rows=st.integers(1, 3),
    act=st.sampled_from([nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.ReLU]),
    mode=st.sampled_from(["scalar", "array"]),
)
def test_random_networks(check, widths, rows, act, mode):
    layers = []
    for a, b in zip([3, *widths], [*widths, 3]):
        layers += [nn.Linear(a, b), act()]
    net = nn.Sequential(*layers[:-1]).double()
    check(lambda t, h: net(h) * t, torch.randn(rows, 3, dtype=F64), mode, points=1)
