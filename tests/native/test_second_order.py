"""Systems of second order: order, symplecticity, reversibility and energy of their methods, gradients, and what is
refused."""

import math

import pytest
import torch
from torch import nn

from pyjlode import GRADIENTS, METHODS, SecondOrder, errors, odeint, odeint_event, solve
from pyjlode.derivatives import load_forward_mode
from pyjlode.methods.second import SymplecticTableau

F64 = torch.float64
SECOND = [m for m in METHODS.values() if m.kind == "second"]
SYMPLECTIC = [m for m in SECOND if isinstance(m.tableau, SymplecticTableau)]
SYMMETRIC = [m for m in SYMPLECTIC if m.name not in ("symplectic_euler", "mcate4")]


def each(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda m: m.name)


def vector(*x):
    return torch.tensor(x, dtype=F64)


def kepler(t, q, v):
    return -q / q.norm(dim=-1, keepdim=True) ** 3


def driven(t, q, v):
    return -q * (1 + 0.5 * torch.sin(2 * t)) - 0.3 * q**3


def damped(t, q, v):
    return -q - 0.3 * v**3 + torch.cos(t)


def separable(t, h):
    """q' = g(t, p), p' = -dV/dq(t, q): of no second-order form."""
    q, p = h
    return torch.tanh(p) * (1 + 0.2 * torch.cos(t)), -torch.sin(q) * (1 + 0.2 * torch.sin(t))


START = {
    "kepler": (SecondOrder(kepler), (vector(0.7, 0.0), vector(0.0, math.sqrt(1.3 / 0.7)))),
    "driven": (SecondOrder(driven), (vector(1.0, 0.3), vector(0.0, -0.5))),
    "damped": (SecondOrder(damped), (vector(1.0), vector(0.2))),
    "separable": (separable, (vector(1.0), vector(0.2))),
}


def order_of(method, name, direction):
    f, h0 = START[name]
    t = vector(0.0, 3.0 * direction)
    exact = odeint(f, h0, t, method="dopri8", rtol=1e-13, atol=1e-14, engine="torch")
    counts = (15, 30) if method.order > 6 else (30, 60) if method.order > 4 else (200, 400)
    off = []
    for n in counts:
        h = odeint(f, h0, t, method=method.name, options={"step_size": 3 / n}, engine="torch")
        off.append(max(float((a[-1] - b[-1]).abs().max()) for a, b in zip(h, exact)))
    return math.log2(off[0] / off[1]), off


@each(SECOND)
@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("name", START)
def test_order(method, name, direction):
    fits = {"damped": method not in SYMPLECTIC, "separable": method in SYMPLECTIC and not method.tableau.quadratic}
    if not fits.get(name, True):
        with pytest.raises(errors.BadOption, match=r"separable systems only|SecondOrder"):
            order_of(method, name, direction)
        return
    order, off = order_of(method, name, direction)
    assert order > method.order - 0.4 or off[1] < 1e-12


@each(SECOND)
def test_a_step_is_symplectic(method):
    """Its Jacobian S has Sᵀ J S = J; that of a Nyström method has not."""
    y0 = vector(0.9, 0.2, -0.3, 1.1)

    def step(y):
        h = odeint(SecondOrder(kepler), (y[:2], y[2:]), vector(0, 0.3), method=method.name, options={"step_size": 0.3})
        return torch.cat([h[0][-1], h[1][-1]])

    S = torch.autograd.functional.jacobian(step, y0)
    J = torch.zeros(4, 4, dtype=F64)
    J[:2, 2:], J[2:, :2] = torch.eye(2), -torch.eye(2)
    off = float((S.T @ J @ S - J).abs().max())
    assert off < 1e-13 if method in SYMPLECTIC else off > 1e-6


@each(SYMMETRIC)
def test_symmetric_methods_go_back_to_where_they_came_from(method):
    f, h0 = START["kepler"]
    there = [x[-1] for x in odeint(f, h0, vector(0, 10), method=method.name, options={"step_size": 0.1})]
    back = odeint(f, tuple(there), vector(10, 0), method=method.name, options={"step_size": 0.1})
    assert all(torch.allclose(a[-1], b, atol=1e-11) for a, b in zip(back, h0))


@each([m for m in SYMPLECTIC if m.order < 6])
def test_the_energy_stays_near_what_it_was(method):
    """The error of the energy does not grow: over the last periods it is what it was over the first."""
    n, periods = (40 if method.order == 1 else 12), 300
    f = SecondOrder(lambda t, q, v: -torch.sin(q))
    t = torch.arange(0, periods * n + 1, dtype=F64) * (2 * math.pi / n)
    q, v = odeint(f, (vector(1.0), vector(0.0)), t, method=method.name)
    off = (v.square() / 2 - torch.cos(q) + math.cos(1.0)).abs().squeeze()
    first, last = off[: 20 * n].max(), off[-20 * n :].max()
    assert last < 1.1 * first
    assert first < 0.5


def test_the_energy_of_others_does_not():
    """The test above can fail."""
    f = SecondOrder(lambda t, q, v: -torch.sin(q))
    t = torch.arange(0, 300 * 12 + 1, dtype=F64) * (2 * math.pi / 12)
    q, v = odeint(f, (vector(1.0), vector(0.0)), t, method="nystrom4")
    off = (v.square() / 2 - torch.cos(q) + math.cos(1.0)).abs().squeeze()
    assert off[-240:].max() > 5 * off[:240].max()


def test_evaluations_of_the_acceleration():
    """Verlet asks once a step; one more call at the start tells whether the acceleration depends on v."""
    f, h0 = START["kepler"]
    for method, stages in (("velocity_verlet", 1), ("yoshida4", 3), ("mcate4", 4), ("kahan_li6", 9)):
        s = solve(f, h0, vector(0, 1), method=method, options={"step_size": 0.1}, dense=False)
        assert (s.stats.naccept, s.stats.nfe) == (10, 10 * stages + 2)


@pytest.mark.parametrize("method", ["dopri5", "vern7", "radau5", "gl4", "explicit_adams"])
def test_every_other_method_solves_such_a_field(method):
    f, (q, v) = START["driven"]
    t = torch.linspace(0, 2, 41, dtype=F64)
    h = odeint(f, (q, v), t, method=method, rtol=1e-9, atol=1e-9)
    plain = odeint(
        lambda t, h: torch.cat([h[2:], driven(t, h[:2], h[2:])]), torch.cat([q, v]), t, method=method, rtol=1e-9,
        atol=1e-9,
    )  # fmt: skip
    assert torch.allclose(torch.cat(h, 1), plain, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
def test_dtypes(dtype):
    """q'' = -q of any dtype: q0 cos t + v0 sin t."""
    q0, v0 = torch.tensor([1.0, -0.5]).to(dtype), torch.tensor([0.25, 1.0]).to(dtype)
    if dtype.is_complex:
        q0, v0 = q0 * (1 + 1j), v0 * (0.5 - 1j)
    t = torch.linspace(0, 2, 41)
    q, v = odeint(SecondOrder(lambda t, q, v: -q), (q0, v0), t, method="kahan_li6")
    assert q.dtype == v.dtype == dtype
    assert torch.allclose(q, q0 * torch.cos(t)[:, None] + v0 * torch.sin(t)[:, None], atol=1e-5)
    assert torch.allclose(v, v0 * torch.cos(t)[:, None] - q0 * torch.sin(t)[:, None], atol=1e-5)


def test_the_state_may_be_a_pytree():
    q0 = {"a": vector(1.0, 2.0), "b": vector(0.5)}
    v0 = {"a": vector(0.0, 1.0), "b": vector(-1.0)}
    f = SecondOrder(lambda t, q, v: {"b": -4 * q["b"], "a": -q["a"]})
    q, v = odeint(f, (q0, v0), vector(0, 0.5, 1), method="suzuki8", options={"step_size": 0.1})
    assert torch.allclose(q["b"][-1], 0.5 * torch.cos(vector(2.0)) - 0.5 * torch.sin(vector(2.0)), atol=1e-10)
    assert torch.allclose(v["a"][-1], v0["a"] * math.cos(1) - q0["a"] * math.sin(1), atol=1e-10)


@each(SECOND)
def test_dense_output_is_a_cubic(method):
    """Of the order of the method, up to four, between its steps; by default in the output as well."""
    f, h0 = START["driven"]
    off, times = [], torch.linspace(0, 2, 200, dtype=F64)
    exact = odeint(f, h0, times, rtol=1e-12, atol=1e-12, method="dopri8")
    for n in (20, 40):
        s = solve(f, h0, vector(0, 0.77, 2), method=method.name, options={"step_size": 2 / n})
        assert torch.equal(s.h[0][1], s.interpolate(vector(0.77))[0][0])
        off.append(float((s.interpolate(times)[0] - exact[0]).abs().max()))
    assert math.log2(off[0] / off[1]) > min(method.order, 4) - 0.6


# --- Gradients -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t, q, v):
        return self.layers(q) - q * (1 + 0.1 * t)


def gradients(method, adjoint, **more):
    f = SecondOrder(Net())
    h0 = [vector(0.4, -0.2).requires_grad_(), vector(0.1, 0.9).requires_grad_()]
    t = vector(0, 0.35, 0.8, 1.3).requires_grad_()
    q, v = odeint(f, tuple(h0), t, method=method, adjoint=adjoint, **more)
    loss = q.square().sum() + (v[1:] * q[1:]).sum()
    return [x.detach() for x in torch.autograd.grad(loss, [*h0, t, *f.parameters()])]


@each(SECOND)
@pytest.mark.parametrize("options", [{"step_size": 0.1}, None], ids=["steps", "grid of t"])
def test_the_discrete_gradient_is_that_through_the_solver(method, options):
    for a, b in zip(
        gradients(method.name, False, options=options), gradients(method.name, True, options=options), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("adjoint", [a for a in GRADIENTS if a not in ("discrete", "checkpointed", "reversible")])
def test_other_adjoints(adjoint):
    """The backward solve is not of second order, and goes over the same steps by rk4; the gradient differs by the
    errors of both solves."""
    options = {"step_size": 0.02}
    if adjoint == "forward":
        with pytest.raises(errors.BadOption, match=r"forward.*second order"):
            gradients("mcate4", adjoint, options=options)
        return
    for a, b in zip(gradients("mcate4", False, options=options), gradients("mcate4", adjoint, options=options)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_differences():
    k = vector(1.3)

    def loss(k):
        f = SecondOrder(lambda t, q, v: -k * torch.sin(q))
        return odeint(f, (vector(1.0), vector(0.0)), vector(0, 3), method="yoshida4", options={"step_size": 0.25},
                      adjoint=True)[0][-1].sum()  # fmt: skip

    exact = torch.func.grad(loss)(k)
    found = torch.autograd.grad(loss(leaf := k.clone().requires_grad_()), leaf)[0]
    difference = (loss(k + 1e-5) - loss(k - 1e-5)) / 2e-5
    assert float(found) == pytest.approx(float(difference), rel=1e-8)
    assert float(exact) == pytest.approx(float(found), rel=1e-12)


def test_under_vmap_and_forward_mode():
    def last(q0):
        f = SecondOrder(lambda t, q, v: -(q**3))
        return odeint(f, (q0, torch.zeros_like(q0)), vector(0, 1), method="mcate4", options={"step_size": 0.1})[0][-1]

    starts = torch.linspace(0.5, 2, 4, dtype=F64)[:, None]
    each_alone = torch.stack([last(q) for q in starts])
    assert torch.allclose(torch.func.vmap(last)(starts), each_alone, rtol=1e-13)
    load_forward_mode()
    _, tangent = torch.func.jvp(last, (starts[1],), (torch.ones(1, dtype=F64),))
    assert float(tangent) == pytest.approx(float(last(starts[1] + 1e-5) - last(starts[1] - 1e-5)) / 2e-5, rel=1e-7)


@pytest.mark.parametrize("adjoint", [False, True])
def test_an_event_and_its_gradient(adjoint):
    """q'' = -g from q0: the fall lasts sqrt(2 q0 / g), and every method here is exact."""
    g = vector(9.81).requires_grad_()
    q0 = vector(2.0).requires_grad_()
    t, (_, v) = odeint_event(
        SecondOrder(lambda t, q, v: -g.expand_as(q)), (q0, vector(0.0)), 0.0, event_fn=lambda t, h: h[0],
        method="velocity_verlet", options={"step_size": 0.13}, adjoint=adjoint,
    )  # fmt: skip
    fall = (2 * q0 / g).sqrt()
    assert float(t.detach()) == pytest.approx(float(fall.detach()), rel=1e-9)
    found = torch.autograd.grad(t + v[-1].sum(), [q0, g])
    right = torch.autograd.grad((fall - g * fall).sum(), [q0, g])
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(found, right))


# --- What is refused -------------------------------------------------------------------------------------------------


def test_what_is_refused():
    f, (q, v) = START["kepler"]
    t = vector(0, 1)
    options = {"step_size": 0.1}
    with pytest.raises(errors.BadShape, match=r"pair \(q, v\)"):
        odeint(lambda t, h: h, vector(1.0, 2.0), t, method="yoshida4")
    with pytest.raises(errors.BadShape, match=r"pair \(q, v\)"):
        odeint(f, torch.cat([q, v]), t)
    with pytest.raises(errors.BadShape, match="same structure and shapes"):
        odeint(f, (q, v[:1]), t, method="yoshida4")
    with pytest.raises(errors.BadShape, match="acceleration"):
        SecondOrder(3.0)
    with pytest.raises(errors.BadOption, match="does not depend on q"):
        odeint(lambda t, h: (h[1] * h[0], -h[0]), (q + 1, v + 1), t, method="yoshida4", options=options)
    with pytest.raises(errors.UnknownMethod, match="velocity_verlet"):
        odeint(f, (q, v), t, method="leapfrog")
    with pytest.raises(errors.NotCompiled, match="not an explicit Runge-Kutta method"):
        odeint(f, (q, v), t, method="yoshida4", options=options, engine="torch", compile=True)


def test_a_field_is_found_out_at_a_start_at_rest():
    """v = 0 there, where friction shows nothing."""
    with pytest.raises(errors.BadOption, match="does not depend on v"):
        odeint(
            SecondOrder(lambda t, q, v: -q - 0.1 * v), (vector(1.0), vector(0.0)), vector(0, 1),
            method="velocity_verlet", options={"step_size": 0.1},
        )  # fmt: skip
