"""Both engines on the same problems: solutions, gradients and accounts agree, and more so as tolerances shrink.

All of it twice: with fields that Julia calls back, and with fields compiled to Julia.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BERNOULLI, COSINE, FEHLBERG, LINEAR, LOGISTIC, OSCILLATOR, max_error
from stiff_problems import ARENSTORF, HEAT, HIRES, Stiff, brusselator, brusselator_start

import pyjlode
from pyjlode import METHODS, errors
from pyjlode.bridge import engine as julia_engine

pytestmark = pytest.mark.usefixtures("julia", "compiled")
MODE = {"compile": False}


@pytest.fixture(scope="module", params=[False, True], ids=["called_back", "compiled"])
def compiled(request):
    MODE["compile"] = request.param


def how(kwargs):
    """With `compile` for the Julia engine: where it is True, not to compile is an error."""
    method = METHODS[kwargs.get("method", "dopri5")]
    # The Jacobian of the sensitivities has second derivatives of f, and is not compiled.
    stiff = method.kind in ("stiff", "auto", "implicit")
    differenced = kwargs.get("adjoint") == "forward" and stiff
    if kwargs["engine"] == "julia" and not differenced:
        return {**kwargs, "compile": MODE["compile"]}
    return kwargs


def odeint(f, h0, t, **kwargs):
    try:
        return pyjlode.odeint(f, h0, t, **how(kwargs))
    except errors.NotCompiled as error:  # LINEAR's matrix, for a state in float32
        if "f holds float64 tensors" not in str(error):
            raise
        return pyjlode.odeint(f, h0, t, **kwargs)


def solve(f, h0, t, **kwargs):
    solution = pyjlode.solve(f, h0, t, **how(kwargs))
    assert bool(solution.stats.compiled) == (kwargs["engine"] == "julia" and MODE["compile"])
    return solution


F64 = torch.float64
# The reference is the native engine's, by another method at a tolerance a thousand times smaller.
BRUSSELATOR = Stiff("Brusselator, 2 N = 40", brusselator, brusselator_start(20), 10.0, [])
BOTH = [m for m in METHODS.values() if m.julia is not None]
ADAPTIVE = [m for m in BOTH if m.kind == "adaptive"]
STIFF = [m for m in BOTH if m.kind in ("stiff", "auto")]
FIXED = [m for m in BOTH if m.kind in ("fixed", "implicit")]
GRADIENTS = sorted(julia_engine.GRADIENTS)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def each(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda m: m.name)


@each(ADAPTIVE)
@pytest.mark.parametrize("problem", [LINEAR, OSCILLATOR, LOGISTIC, COSINE, FEHLBERG], ids=lambda p: p.name)
@PRECISIONS
@DIRECTIONS
def test_adaptive_solutions(method, problem, dtype, backward):
    """Within 20 tolerances of each other and of the exact solution."""
    t = problem.times(9, backward=backward)
    tol = 1e-4 if dtype == torch.float32 or method.order == 3 else 1e-8
    h0 = problem.exact(t[0]).to(dtype)
    torch_h, julia_h = (
        odeint(problem.f, h0, t, method=method.name, engine=engine, rtol=tol, atol=tol) for engine in ("torch", "julia")
    )
    scale = 20 * tol * max(1.0, float(problem.exact(t).abs().max()))
    assert max_error(torch_h, julia_h) < scale
    assert max_error(julia_h, problem.exact(t)) < scale


def robertson(t, y):
    """Robertson's reaction (Hairer & Wanner II, IV.1)."""
    a, b, c = y
    slow, fast, square = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([fast - slow, slow - fast - square, square])


def van_der_pol(t, y):
    return torch.stack([y[1], 100 * (1 - y[0] ** 2) * y[1] - y[0]])


@each(STIFF)
@pytest.mark.parametrize(
    ("f", "h0", "end"), [(robertson, (1.0, 0.0, 0.0), 40.0), (van_der_pol, (2.0, 0.0), 200.0)], ids=["robertson", "vdp"]
)
def test_stiff_solutions(method, f, h0, end):
    h0, t = torch.tensor(h0, dtype=F64), torch.tensor([0.0, end / 3, end], dtype=F64)
    rtol = 1e-4 if method.order < 4 else 1e-6
    want = odeint(f, h0, t, method="radau5", rtol=1e-10, atol=1e-14, engine="torch")
    for engine in ("torch", "julia"):
        solution = solve(f, h0, t, method=method.name, engine=engine, rtol=rtol, atol=1e-6 * rtol)
        # The period of van der Pol's oscillation makes an error of the phase: a larger one of the state.
        allowed = 100 * rtol * (1 if f is robertson else 30)
        assert float(((solution.h - want).abs() / want.abs().amax(0)).max()) < allowed
        assert solution.stats.njac > 0


@pytest.mark.parametrize("problem", [HIRES, HEAT, ARENSTORF, BRUSSELATOR], ids=lambda p: p.name)
def test_problems_of_the_examples_and_the_books(problem):
    """Chemistry, diffusion, and the restricted three-body problem: each engine is as near to the reference as asked."""
    method = "vern9" if problem is ARENSTORF else "rodas5p"
    h0, t = torch.tensor(problem.h0, dtype=F64), torch.tensor([0.0, problem.t1], dtype=F64)
    if problem is BRUSSELATOR:
        end = odeint(problem.f, h0, t, method="radau5", engine="torch", rtol=1e-10, atol=1e-10)[-1]
    else:
        end = torch.tensor(problem.end, dtype=F64)
    size = torch.as_tensor(problem.size, dtype=F64).expand_as(h0)
    tol = 1e-10 if problem is ARENSTORF else 1e-7
    for engine in ("torch", "julia"):
        h = odeint(problem.f, h0, t, method=method, engine=engine, rtol=tol, atol=tol * size)[-1]
        # The orbit passes the moon closely: an error there has grown by several thousand at its end.
        assert float(((h - end).abs() / (size + end.abs())).max()) < tol * (1e5 if problem is ARENSTORF else 100)


def rates_of(k):
    def f(t, y):
        a, b, c = y
        slow, fast, square = k[0] * a, k[1] * b * c, k[2] * b * b
        return torch.stack([fast - slow, slow - fast - square, square])

    return f


@pytest.mark.parametrize(
    ("method", "name"), [("rodas5p", "gauss"), ("radau5", "gauss"), ("rodas5p", "forward"), ("kencarp4", "forward")]
)
def test_gradients_of_a_stiff_system(method, name):
    """Robertson's final state by its initial state and the three rates."""
    t = torch.tensor([0.0, 40.0], dtype=F64)
    gradients = []
    for kwargs in (
        {"engine": "torch", "adjoint": "discrete", "method": "rodas5p", "rtol": 1e-10, "atol": 1e-13},
        {"engine": "julia", "adjoint": name, "method": method, "rtol": 1e-8, "atol": 1e-11},
    ):
        h0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64, requires_grad=True)
        k = torch.tensor([0.04, 1e4, 3e7], dtype=F64, requires_grad=True)
        h = odeint(rates_of(k), h0, t, **kwargs)
        gradients.append(torch.cat(torch.autograd.grad(h[-1, 2], [h0, k])))
    want, got = gradients
    assert float(((got - want) / want).abs().max()) < 2e-5


@pytest.mark.parametrize(("method", "name"), [("kencarp4", "gauss"), ("bdf", "gauss"), ("rodas5p", "interpolating")])
def test_stiff_gradients_that_would_be_inaccurate_are_refused(method, name):
    h0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64, requires_grad=True)
    kwargs = {"method": method, "adjoint": name, "rtol": 1e-6, "atol": 1e-9}
    with pytest.raises(errors.BadOption, match="inaccurate there"):
        odeint(robertson, h0, [0.0, 1.0], engine="julia", **kwargs)
    with pytest.raises(errors.BadOption, match="inaccurate there"):
        odeint(robertson, h0, [0.0, 1.0], engine="julia", **(kwargs | {"method": "tsit5", "adjoint_method": method}))


def robertson_dae(t, y):
    """Its third equation is that the masses add up to one."""
    rates = robertson(t, y)
    return torch.stack([rates[0], rates[1], y.sum() - 1])


def driven_dae(t, y):
    """x' = -x + z, 0 = z - cos t, in other coordinates and with other equations."""
    x, z = RIGHT @ y
    return LEFT @ torch.stack([-x + z, z - torch.cos(t)])


def regular(t, y):
    return torch.stack([-100 * y[0] + y[1], -y[1] + torch.sin(t)])


LEFT, RIGHT = torch.tensor([[1.0, 2.0], [-1.0, 1.0]], dtype=F64), torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=F64)
ONE, THREE = torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64))
# Field, mass matrix, start, end, and an event that is met before it.
WITH_MASS = {
    "robertson": (robertson_dae, THREE, torch.tensor([1.0, 0.0, 0.0]), 40.0, lambda t, y: y[0] - 0.8),
    "driven": (driven_dae, LEFT @ ONE @ RIGHT, torch.tensor([-1.0, 2.0]), 6.0, lambda t, y: (RIGHT @ y)[1]),
    "regular": (regular, LEFT, torch.tensor([1.0, 0.5]), 3.0, lambda t, y: y[1] - 0.1),
}


@each([m for m in BOTH if m.mass])
@pytest.mark.parametrize("name", sorted(WITH_MASS))
def test_mass_matrices_with_and_without_an_event(name, method):
    f, M, h0, end, event_fn = WITH_MASS[name]
    h0, t = h0.double(), torch.tensor([0.0, end / 3, end], dtype=F64)
    kwargs = {"method": method.name, "mass_matrix": M, "rtol": 1e-7, "atol": 1e-10}
    a, b = (solve(f, h0, t, engine=e, **kwargs) for e in ("torch", "julia"))
    assert max_error(a.h, b.h) < 1e-5
    times = torch.linspace(0.0, end, 20, dtype=F64)
    assert max_error(a.interpolate(times), b.interpolate(times)) < 1e-5
    a, b = (solve(f, h0, t[[0, 2]], engine=e, event_fn=event_fn, **kwargs) for e in ("torch", "julia"))
    assert 0 < float(b.event_t) < end
    assert float(a.event_t) == pytest.approx(float(b.event_t), rel=1e-4)
    assert max_error(a.h, b.h) < 1e-5


def test_a_mass_matrix():
    h0, t = torch.tensor([1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 40.0], dtype=F64)
    a, b = (
        odeint(robertson_dae, h0, t, method="rodas5p", mass_matrix=THREE, engine=e, rtol=1e-7, atol=1e-10)
        for e in ("torch", "julia")
    )
    assert max_error(a, b) < 1e-6
    assert abs(float(b[-1].sum()) - 1) < 1e-9


def test_starts_that_the_mass_matrix_forbids():
    wrong, t = torch.tensor([1.0, 0.0, 0.1], dtype=F64), [0.0, 1.0]
    kwargs = {"method": "rodas5p", "mass_matrix": THREE}
    with pytest.raises(errors.InconsistentStart, match="compute"):
        odeint(robertson_dae, wrong, t, engine="julia", **kwargs)
    compute = {"options": {"consistent": "compute"}, "rtol": 1e-8, "atol": 1e-10, **kwargs}
    a, b = (odeint(robertson_dae, wrong, t, engine=e, **compute) for e in ("torch", "julia"))
    assert b[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-15)
    assert max_error(a, b) < 1e-6


@each(FIXED)
@DIRECTIONS
def test_fixed_steps_are_the_same_numbers(method, backward):
    """The same method on the same grid: equal to what the equations of implicit steps are solved to."""
    t = OSCILLATOR.times(40, backward=backward)
    h0 = OSCILLATOR.exact(t[0])
    torch_h, julia_h = (
        odeint(OSCILLATOR.f, h0, t, method=method.name, engine=engine, rtol=1e-10, atol=1e-10)
        for engine in ("torch", "julia")
    )
    assert max_error(torch_h, julia_h) < (1e-11 if method.kind == "fixed" else 1e-6)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "vern7"])
def test_solutions_meet_as_tolerances_shrink(method):
    t = FEHLBERG.times(5)
    gaps = []
    for tol in (1e-5, 1e-7, 1e-9):
        a, b = (
            odeint(FEHLBERG.f, FEHLBERG.h0, t, method=method, engine=e, rtol=tol, atol=tol) for e in ("torch", "julia")
        )
        gaps.append(max_error(a, b))
    assert gaps[2] < 1e-2 * gaps[0]
    assert gaps[2] < 1e-7


class Field(torch.nn.Module):
    def __init__(self, dtype, width=8, dim=3):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(dim, width), torch.nn.Tanh(), torch.nn.Linear(width, dim)).to(
            dtype
        )
        self.rate = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, t, h):
        return self.net(h) - self.rate * torch.cos(t) * h


def gradients(f, h0, t, **kwargs):
    t = t.clone().requires_grad_()
    h0 = h0.clone().requires_grad_()
    h = odeint(f, h0, t, **kwargs)
    weights = torch.linspace(0.5, 1.5, h.numel(), dtype=h.dtype).view_as(h)
    return torch.autograd.grad((weights * h * h).sum(), [h0, t, *f.parameters()])


@pytest.mark.parametrize("name", GRADIENTS)
@PRECISIONS
@DIRECTIONS
def test_gradients(name, dtype, backward):
    f, h0 = Field(dtype), torch.randn(4, 3, dtype=dtype)
    t = torch.linspace(0, 2, 4, dtype=F64)
    t = t.flip(0) if backward else t
    tol = 1e-5 if dtype == torch.float32 else 1e-8
    settings = {"rtol": tol, "atol": tol, "method": "tsit5", "adjoint": name}
    want = gradients(f.double(), h0.double(), t, engine="torch", adjoint=False, rtol=1e-11, atol=1e-12, method="vern9")
    f.to(dtype)
    for engine in ("torch", "julia"):
        for a, b in zip(gradients(f, h0, t, engine=engine, **settings), want):
            assert max_error(a, b) < 100 * tol * max(1.0, float(b.abs().max()))


@each(ADAPTIVE)
def test_gradients_of_each_method(method):
    """An adjoint reads the dense output: it must be as good as the steps."""
    f, h0, t = Field(F64), torch.randn(2, 3, dtype=F64), torch.tensor([0.0, 0.7, 2.0], dtype=F64)
    want = gradients(f, h0, t, engine="torch", adjoint=False, rtol=1e-11, atol=1e-12, method="vern9")
    got = gradients(f, h0, t, engine="julia", adjoint="gauss", rtol=1e-8, atol=1e-8, method=method.name)
    for a, b in zip(got, want):
        assert max_error(a, b) < 1e-6 * max(1.0, float(b.abs().max()))


@each(FIXED)
def test_gradients_of_fixed_steps(method):
    """That of the discrete solution, by sensitivities; adjoints of fixed steps are the native engine's."""
    f, h0, t = Field(F64), torch.randn(2, 3, dtype=F64), torch.linspace(0, 1, 21, dtype=F64)
    kwargs = {"method": method.name, "rtol": 1e-10, "atol": 1e-10}
    got, want = (gradients(f, h0, t, engine=engine, adjoint="forward", **kwargs) for engine in ("julia", "torch"))
    for a, b in zip(got, want):
        assert max_error(a, b) < (1e-10 if method.kind == "fixed" else 1e-5) * max(1.0, float(b.abs().max()))
    for adjoint in ("backsolve", "interpolating", "quadrature", "gauss"):
        with pytest.raises(errors.BadOption, match=r"fixed steps .*'forward'"):
            gradients(f, h0, t, engine="julia", adjoint=adjoint, **kwargs)


@pytest.mark.parametrize("name", [True, *(name for name in GRADIENTS if name not in ("discrete", "checkpointed"))])
def test_gradients_where_f_jumps(name):
    """What stops a step forward stops it on the way back, too."""
    rate = torch.tensor([0.4, 1.3, -0.7], dtype=F64)
    h0, t, at = torch.tensor([1.0, -0.5, 0.3], dtype=F64), torch.tensor([0.0, 0.5, 2.0], dtype=F64), 0.7312
    theta = rate.clone().requires_grad_()
    kwargs = {"method": "tsit5", "rtol": 1e-9, "atol": 1e-9, "adjoint": name, "options": {"jump_t": [at]}}
    # Which side of the jump a time is on is no tensor's to say: this field is called back.
    h = pyjlode.odeint(
        lambda t, h: h * torch.sin(theta) * (3.0 if float(t) > at else 1.0),
        h0, t, engine="julia", compile=False, **kwargs,
    )  # fmt: skip
    exact = torch.stack([h0 * torch.exp(torch.sin(theta) * (s + 2 * max(0.0, s - at))) for s in (0.0, 0.5, 2.0)])
    got, want = (torch.autograd.grad((x * x).sum(), theta)[0] for x in (h, exact))
    assert torch.allclose(h, exact, rtol=1e-6, atol=0)
    assert torch.allclose(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_meet_as_tolerances_shrink(name):
    f, h0, t = Field(F64), torch.randn(2, 3, dtype=F64), torch.tensor([0.0, 0.7, 2.0], dtype=F64)
    gaps = []
    for tol in (1e-5, 1e-8):
        both = [
            gradients(f, h0, t, engine=e, adjoint=name, method="tsit5", rtol=tol, atol=tol) for e in ("torch", "julia")
        ]
        gaps.append(max(max_error(a, b) for a, b in zip(*both)))
    assert gaps[1] < 1e-2 * gaps[0]


@pytest.mark.parametrize("backward", [False, True])
def test_events(backward):
    sign = -1 if backward else 1
    t = torch.tensor([0.0, float(sign)], dtype=F64)

    def event(t, h):
        return torch.stack([h[0] - 0.2, h[1] + 5.0])

    found = []
    for engine in ("torch", "julia"):
        h0 = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
        time, h = odeint(OSCILLATOR.f, h0, t, event_fn=event, engine=engine, adjoint="gauss", rtol=1e-9, atol=1e-10)
        found.append([time.detach(), h.detach(), *torch.autograd.grad(time, h0)])
    for a, b in zip(*found):
        assert max_error(a, b) < 1e-7
    assert abs(float(found[0][0]) - sign * torch.acos(torch.tensor(0.2, dtype=F64))) < 1e-8


@each(ADAPTIVE)
@pytest.mark.parametrize("problem", [BERNOULLI, FEHLBERG, LOGISTIC], ids=lambda p: p.name)
def test_a_tolerance_means_the_same(method, problem):
    """Both control the step size alike: the same tolerance takes as many steps."""
    tol = 1e-5 if method.order == 3 else 1e-9
    accounts = [
        solve(
            problem.f, problem.h0, problem.times(2), method=method.name, engine=e, rtol=tol, atol=tol, dense=False
        ).stats
        for e in ("torch", "julia")
    ]
    for name in ("nfe", "naccept"):
        a, b = (getattr(stats, name) for stats in accounts)
        # The first steps differ.
        assert abs(a - b) <= max(4 * (1 if name == "naccept" else method.order), 0.25 * a)


@each([METHODS["dopri5"], METHODS["vern7"]])
def test_step_control_is_that_of_the_options(method):
    def steps(engine, **options):
        t = FEHLBERG.times(2)
        return solve(
            FEHLBERG.f, FEHLBERG.h0, t, method=method.name, engine=engine, rtol=1e-9, atol=1e-9, options=options
        ).stats.naccept

    for options in ({"safety": 0.45}, {"first_step": 1e-6, "ifactor": 1.2}):
        a, b = (steps(engine, **options) for engine in ("torch", "julia"))
        assert abs(a - b) <= max(4, 0.15 * a)
        assert a > 1.2 * steps("torch")


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.floats(0.1, 2.0),
    st.booleans(),
    st.sampled_from(["dopri5", "tsit5", "vern7", "bosh3"]),
)
@settings(max_examples=25)
def test_random_smooth_fields(seed, dim, span, backward, method):
    torch.manual_seed(seed)
    f, h0 = Field(F64, dim=dim), torch.randn(2, dim, dtype=F64)
    t = torch.tensor([0.0, -span if backward else span], dtype=F64)
    tol = 1e-5 if method == "bosh3" else 1e-8
    with torch.no_grad():
        a, b = (odeint(f, h0, t, method=method, engine=e, rtol=tol, atol=tol) for e in ("torch", "julia"))
    assert max_error(a, b) < 20 * tol * max(1.0, float(a.abs().max()))


def test_training_runs_lie_on_each_other():
    """Five hundred steps of Adam from the same weights: the losses agree to what the tolerance lets through."""
    t = torch.linspace(0, 1, 4, dtype=F64)
    target = torch.stack([torch.cos(2 * t), torch.sin(2 * t)], -1)
    curves = []
    for engine in ("torch", "julia"):
        torch.manual_seed(0)
        f = Field(F64, dim=2)
        optimizer = torch.optim.Adam(f.parameters(), lr=0.01)
        losses = []
        for _ in range(500):
            optimizer.zero_grad()
            h = odeint(f, target[0], t, engine=engine, adjoint=True, method="tsit5", rtol=1e-6, atol=1e-7)
            loss = (h - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(torch.tensor(losses))
    assert torch.allclose(curves[0], curves[1], rtol=1e-3, atol=1e-8)
    assert curves[1][-1] < 1e-2 * curves[1][0]
