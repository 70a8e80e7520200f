"""Fields given as a stiff and another part, on both engines: the same steps have the same states and gradients."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from zoo import F64, ZOO

from pyjlode import Split, errors, julia_function, odeint, odeint_event, solve
from pyjlode.errors import GradientUnavailable

pytestmark = [
    pytest.mark.usefixtures("julia"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:f kept its argument"),
]
each_mode = pytest.mark.parametrize("compile", [False, True], ids=["called_back", "compiled"])
each_method = pytest.mark.parametrize("method", ["kencarp4", "kencarp5"])
H0 = torch.tensor([1.0, 0.5], dtype=F64)


class Part(nn.Module):
    """A network that depends on time, beside a decay."""

    def __init__(self, seed, rate, dtype=F64):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        self.rate = nn.Parameter(torch.tensor(rate, dtype=dtype))

    def forward(self, t, h):
        return self.layers(h) * torch.cos(t) - self.rate * h


def field(dtype=F64):
    return Split(Part(0, 30.0, dtype), Part(1, 0.5, dtype))


def same_steps(n, span=1.0):
    """Steps of this size, on either engine, whose equations are solved to rounding."""
    size = span / n
    return {"first_step": size, "min_step": (1 + 1e-9) * size, "max_step": size, "max_num_steps": 4 * n}


def gradients(f, h0, t, **how):
    h0, t = h0.clone().requires_grad_(), torch.tensor(t, dtype=F64, requires_grad=True)
    h = odeint(f, h0, t, **how)
    weights = torch.linspace(1, 2, h.numel(), dtype=h.dtype).view(h.shape)
    return h.detach(), torch.autograd.grad((h * weights).sum(), [h0, t, *f.parameters()])


@each_mode
@each_method
@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.33, 0.5, 1.0], [1.0, 0.77, 0.0]], ids=str)
def test_of_the_same_steps_it_is_the_native_one(method, t, compile):
    f = field() if t[0] == 0 else Split(Part(0, -30.0), Part(1, -0.5))
    given, steps = {"method": method, "adjoint": True, "rtol": 1e-10, "atol": 1e-10}, same_steps(25)
    h, found = gradients(f, H0, t, engine="julia", compile=compile, options=steps, **given)
    right_h, right = gradients(f, H0, t, engine="torch", options={**steps, "max_iters": 50}, **given)
    torch.testing.assert_close(h, right_h, rtol=1e-9, atol=1e-9)
    by_time, right_by_time = (
        found[1],
        right[1],
    )  # on the Julia engine by the slopes there, and not by those of the cubic
    torch.testing.assert_close(by_time, right_by_time, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[:1] + found[2:], right[:1] + right[2:], rtol=1e-7, atol=1e-7)


@each_mode
def test_steps_are_those_that_the_tolerance_asks_for(compile):
    """As right as it says, and as few: an explicit method would need thousands."""
    n = 40
    D = torch.diag(torch.full((n,), -2.0)) + torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    D[0, 0] = D[-1, -1] = -1.0
    D = (2.0 * n * n * D).to(F64)
    h0 = torch.exp(-50 * (torch.linspace(0, 1, n, dtype=F64) - 0.3) ** 2)
    f = Split(lambda t, h: D @ h, lambda t, h: 5 * h * (1 - h))
    t = torch.tensor([0.0, 1.0], dtype=F64)
    right = odeint(lambda t, h: D @ h + 5 * h * (1 - h), h0, t, method="radau5", engine="torch", rtol=1e-9, atol=1e-11)
    s = solve(f, h0, t, method="kencarp4", engine="julia", compile=compile, rtol=1e-6, atol=1e-8, dense=False)
    assert bool(s.stats.compiled) == compile
    assert float((s.h[-1] - right[-1]).abs().max()) < 1e-5
    assert 10 < s.stats.naccept < 150
    assert s.stats.nnewton > 0


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_unit_of_time_does_not_matter(scale):
    """Nor to the error, nor to the number of steps."""
    f, t = field(), torch.tensor([0.0, 1.0], dtype=F64)
    how = {"method": "kencarp4", "engine": "julia", "compile": True, "rtol": 1e-6, "atol": 1e-6, "dense": False}
    with torch.no_grad():
        one = solve(f, H0, t, **how)
        slow = Split(lambda t, h: f.stiff(t / scale, h) / scale, lambda t, h: f.nonstiff(t / scale, h) / scale)
        other = solve(slow, H0, t * scale, **how)
        right = odeint(f, H0, t, method="radau5", engine="torch", rtol=1e-10, atol=1e-10)
    assert abs(one.stats.naccept - other.stats.naccept) <= 0.2 * one.stats.naccept + 3
    for s in (one, other):
        assert float((s.h - right).abs().max()) < 1e-5


@each_mode
@each_method
@pytest.mark.parametrize("adjoint", [True, "discrete", "forward"])
def test_gradients(adjoint, method, compile):
    """By h0, t and the parameters of both parts; of steps that each engine chooses."""
    if adjoint == "forward":  # of the sum: called back, as all sensitivities of stiff methods are
        compile, method = None, "kencarp4"
    f, t = field(), [0.0, 0.1, 0.3]
    tol = {"rtol": 1e-8, "atol": 1e-9}
    _, found = gradients(f, H0, t, method=method, adjoint=adjoint, engine="julia", compile=compile, **tol)
    _, right = gradients(f, H0, t, method="radau5", adjoint=False, engine="torch", rtol=1e-11, atol=1e-11)
    for a, b in zip(found, right):
        assert float((a - b).abs().max()) < 1e-5 * (1 + float(b.abs().max()))


@each_mode
def test_a_coarse_solve_has_the_gradient_of_its_numbers(compile):
    """Where that of the solution is another: against differences, at steps that stay."""
    f = field()
    how = {"method": "kencarp4", "engine": "julia", "compile": compile, "rtol": 1e-10, "atol": 1e-10}
    how["options"] = same_steps(4)
    found = gradients(f, H0, [0.0, 0.6, 1.0], adjoint=True, **how)[1][0]
    with torch.no_grad():
        for i in range(2):
            e = 1e-5 * torch.eye(2, dtype=F64)[i]
            ends = [odeint(f, H0 + s * e, [0.0, 0.6, 1.0], **how) for s in (1, -1)]
            weights = torch.linspace(1, 2, 6, dtype=F64).view(3, 2)
            assert float(found[i]) == pytest.approx(float(((ends[0] - ends[1]) * weights).sum()) / 2e-5, rel=1e-6)


@each_mode
def test_where_equations_were_not_solved_at_once(compile):
    """Van der Pol's oscillator, whose jumps reject steps of both kinds, with a driving force beside it."""
    mu = torch.tensor(20.0, dtype=F64, requires_grad=True)
    force = torch.tensor(0.3, dtype=F64, requires_grad=True)
    f = Split(
        lambda t, h: torch.stack([h[1], mu * ((1 - h[0] ** 2) * h[1]) - h[0]]),
        lambda t, h: torch.stack([0 * h[0], force * torch.cos(t)]),
    )
    h0, t = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([0.0, 20.0], dtype=F64)

    def found(**how):
        s = solve(f, h0, t, dense=False, **how)
        grads = torch.autograd.grad(s.h[-1].sum(), [mu, force])
        return s.stats, torch.cat([s.h[-1].detach(), torch.stack(grads)])

    right = found(method="rodas5p", engine="torch", adjoint=True, rtol=1e-9, atol=1e-9)[1]
    stats, x = found(method="kencarp4", engine="julia", compile=compile, adjoint=True, rtol=1e-8, atol=1e-8)
    assert stats.nreject > 0
    assert float(((x - right) / right).abs().max()) < 1e-3


def losses(x):
    """Of a state of any structure."""
    total = torch.zeros((), dtype=F64)
    for leaf in pytree.tree_leaves(x):
        leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        total = total + (torch.linspace(1, 2, leaf.numel(), dtype=F64) * leaf.reshape(-1)).sum()
    return total


def decay(t, h):
    return pytree.tree_map(lambda x: -2.0 * x, h)


@pytest.mark.parametrize("stiff", [False, True], ids=["explicit", "implicit"])
@pytest.mark.parametrize("compile", [False, None], ids=["called_back", "compiled"])
@pytest.mark.parametrize("kind", ZOO)
def test_the_law_of_gradients(kind, compile, stiff):
    """For every kind of field as either part: that of the native engine through its solver, or an error."""
    times = torch.tensor([0.0, 0.35, 0.7], dtype=F64)

    def gradient(**how):
        x = ZOO[kind]()
        f = Split(x.f, decay) if stiff else Split(decay, x.f)
        with warnings.catch_warnings(), x.around():
            warnings.simplefilter("ignore")
            h = odeint(f, x.h0, times, method="kencarp4", rtol=1e-7, atol=1e-9, **how)
        x.after()
        grads = torch.autograd.grad(losses(h), x.leaves, allow_unused=True)
        return torch.cat([(torch.zeros_like(q) if g is None else g).reshape(-1) for q, g in zip(x.leaves, grads)])

    x = ZOO[kind]()
    try:
        right = gradient(engine="torch", adjoint=False)
    except (RuntimeError, errors.PyJLODEError):  # no second derivative, or no field for this method
        pytest.skip("the native engine does not solve it through its steps")
    for _ in range(1 if compile is False else 2):  # the second solve is compiled
        try:
            found = gradient(engine="julia", adjoint=True, compile=compile)
        except GradientUnavailable:
            assert x.refused
            return
        close = torch.linalg.vector_norm(found - right) <= max(x.tolerance, 1e-4) * torch.linalg.vector_norm(right)
        assert bool(close)


def test_a_part_that_is_not_compiled_is_called_back():
    """The other is compiled; the gradient is by the parameters of both."""

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -0.8], dtype=F64))

        def forward(self, t, h):
            return self.w * torch.sort(h).values

    f = Split(Part(0, 20.0), Sorted())
    tol = {"method": "kencarp4", "adjoint": True, "rtol": 1e-9, "atol": 1e-9}
    right = gradients(f, H0, [0.0, 0.5], engine="torch", **tol)[1]
    for _ in range(3):
        torch.testing.assert_close(gradients(f, H0, [0.0, 0.5], engine="julia", **tol)[1], right, rtol=1e-5, atol=1e-6)
    s = solve(f, H0, [0.0, 0.5], method="kencarp4", engine="julia", adjoint=True)
    assert not s.stats.compiled
    with pytest.raises(errors.NotCompiled):
        odeint(f, H0, [0.0, 0.5], engine="julia", compile=True, **tol)


def test_training_changes_what_was_compiled():
    """The same program with other values in every step, and parts that share a parameter."""
    torch.manual_seed(0)
    shared = nn.Linear(2, 2).double()
    f = Split(lambda t, h: -20 * h + shared(h), lambda t, h: torch.sin(shared(h)))
    h0, t = H0, torch.tensor([0.0, 0.2, 0.5], dtype=F64)
    for _ in range(5):
        grads = []
        for engine in ("julia", "torch"):
            h = odeint(f, h0, t, method="kencarp4", adjoint=True, engine=engine, rtol=1e-9, atol=1e-9)
            grads.append(torch.autograd.grad(h.square().sum(), list(shared.parameters())))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            for q, g in zip(shared.parameters(), grads[0]):
                q -= 0.1 * g


def test_structures_dense_output_and_events():
    def stiff(t, h):
        return {"a": -50 * (h["a"] - h["b"]), "b": 0 * h["b"]}

    def other(t, h):
        return {"b": torch.ones_like(h["b"]), "a": 0 * h["a"]}

    h0 = {"a": torch.zeros(1, dtype=F64), "b": torch.zeros(1, dtype=F64)}
    tol = {"method": "kencarp4", "engine": "julia", "rtol": 1e-8, "atol": 1e-9}
    for _ in range(2):
        event_t, h = odeint_event(Split(stiff, other), h0, 0.0, event_fn=lambda t, h: h["b"] - 0.7, **tol)
        assert float(event_t) == pytest.approx(0.7, rel=1e-7)
        assert float(h["a"][-1]) == pytest.approx(0.7 - 0.02, rel=1e-4)
        s = solve(Split(stiff, other), h0, torch.tensor([0.0, 1.0], dtype=F64), **tol)
        between = s.interpolate(torch.tensor([0.25, 0.9], dtype=F64))
        assert torch.allclose(between["b"][:, 0], torch.tensor([0.25, 0.9], dtype=F64), atol=1e-6)


@each_mode
def test_errors_pass_and_another_field_is_noticed(compile):
    rate = torch.ones(2, dtype=F64)
    f = Split(lambda t, h: -20 * h, lambda t, h: rate * torch.cos(h))
    h0 = H0.clone().requires_grad_()
    tol = {"method": "kencarp4", "engine": "julia", "compile": compile, "adjoint": True, "rtol": 1e-6, "atol": 1e-7}
    h = odeint(f, h0, [0.0, 0.5], **tol)
    rate.mul_(3)
    with pytest.raises(GradientUnavailable, match="other values"):
        h.sum().backward()
    h = odeint(f, h0, [0.0, 0.5], **tol)
    first = torch.autograd.grad(h.sum(), h0, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(h.sum(), h0)[0], first)

    class Mine(Exception):
        pass

    def bad(t, h):
        if float(t) > 0.1:
            raise Mine("here")
        return -h

    for parts in ((bad, decay), (decay, bad)):
        with pytest.raises(Mine, match="here"):
            odeint(Split(*parts), H0, [0.0, 0.5], method="kencarp4", engine="julia")


def test_calls_of_parts_that_count_them_are_counted():
    class Counting(Part):
        nfe = 0

        def forward(self, t, h):
            self.nfe += 1
            return super().forward(t, h)

    f = Split(Counting(0, 20.0), Counting(1, 0.1))
    for _ in range(3):
        before = f.stiff.nfe
        with torch.no_grad():
            s = solve(f, H0, [0.0, 0.5], method="kencarp4", engine="julia", dense=False)
        assert f.stiff.nfe - before >= 4 * s.stats.naccept
        assert s.stats.nfe >= 4 * s.stats.naccept


def test_what_is_declined():
    f, t = field(), torch.tensor([0.0, 0.5], dtype=F64)
    given = {"method": "kencarp4", "engine": "julia"}
    with pytest.raises(errors.BadOption, match="jump_t"):
        odeint(f, H0, t, adjoint="discrete", options={"jump_t": [0.2]}, **given)
    with pytest.raises(errors.BadOption, match="stiff method"):
        odeint(f, H0, t, adjoint="gauss", **given)
    with pytest.raises(errors.BadOption, match="float32"):
        odeint(field(torch.float32), H0.float(), t, adjoint=True, **given)
    with pytest.raises(errors.BadOption, match="batch of systems"), torch.no_grad():
        odeint(f, torch.ones(3, 2, dtype=F64), t, options={"batch_dims": 1}, **given)
    decay_there = julia_function("(du, u, p, t) -> (du .= -p[1] .* u)", torch.ones(1, dtype=F64))
    with pytest.raises(errors.BadOption, match="julia_function"), torch.no_grad():
        odeint(Split(decay_there, lambda t, h: torch.cos(h)), H0, t, **given)


def test_auto(monkeypatch):
    """The native engine while the parts would be called back, and then Julia; the gradient is the same."""
    monkeypatch.setenv("PYJLODE_ENGINE", "auto")
    f, t, engines, grads = field(), torch.tensor([0.0, 0.5], dtype=F64), [], []
    for _ in range(3):
        s = solve(f, H0, t, method="kencarp4", adjoint=True, rtol=1e-9, atol=1e-9, dense=False)
        engines.append(s.stats.engine)
        grads.append(torch.autograd.grad(s.h[-1].sum(), list(f.parameters())))
    assert engines[-1] == "julia", s.stats.reason
    torch.testing.assert_close(grads[0], grads[-1], rtol=1e-5, atol=1e-7)
    assert math.isfinite(s.stats.wall)
