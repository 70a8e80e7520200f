"""Laws that hold for every state, time grid and linear system, tried on random ones (hypothesis)."""

import math
from collections import namedtuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import GENERAL
from torch.utils import _pytree as pytree

import pyjlode

F64 = torch.float64
ADAPTIVE = ["dopri5", "tsit5", "dopri8", "vern7", "vern9", "bosh3"]
FIXED = ["euler", "midpoint", "heun3", "rk4", "explicit_adams", "gl4", "radauIIA3", "trapezoid", "sdirk2"]
GRADIENTS = [False, True, *GENERAL]
TOL = {"rtol": 1e-9, "atol": 1e-11}

FEWER = settings(max_examples=settings().max_examples // 2)

Pair = namedtuple("Pair", "first second")

# ----------------------------------------------------------------------------------------------------------------------
# What is drawn
# ----------------------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)  # () is a number, and a 0 makes it empty
dtypes = st.sampled_from([torch.float32, F64, torch.complex64, torch.complex128])
seeds = st.integers(0, 2**31)


def states(leaves):
    """Pytrees of tensors: nested tuples, lists, dicts and named tuples."""
    return st.recursive(
        leaves,
        lambda child: st.one_of(
            st.lists(child, min_size=1, max_size=3),
            st.lists(child, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abcd"), child, min_size=1, max_size=3),
            st.tuples(child, child).map(lambda pair: Pair(*pair)),
        ),
        max_leaves=5,
    )


@st.composite
def tensors(draw, shape=shapes, dtype=dtypes):
    generator = torch.Generator().manual_seed(draw(seeds))
    return torch.randn(draw(shape), dtype=draw(dtype), generator=generator)


@st.composite
def grids(draw, longest=1.5, most=6):
    """Strictly monotone times in either direction, evenly spread or not, from anywhere."""
    start = draw(st.floats(-3, 3))
    gaps = draw(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=most))
    scale = draw(st.floats(0.01, longest)) / sum(gaps)
    t = start + torch.tensor([0.0, *gaps], dtype=F64).mul(scale).cumsum(0) * draw(st.sampled_from([1, -1]))
    return t


@st.composite
def systems(draw, least=1):
    """A (n, n), its entries such that nothing is stiff, and a state x (n,)."""
    n = draw(st.integers(least, 4))
    generator = torch.Generator().manual_seed(draw(seeds))
    A = torch.randn(n, n, dtype=F64, generator=generator) * draw(st.floats(0, 2)) / math.sqrt(n)
    return A, torch.randn(n, dtype=F64, generator=generator)


def propagate(A, x, t):
    """exp(A (t - t[0])) x at every time: (T, n)."""
    return torch.matrix_exp(A * (t - t[0])[:, None, None]) @ x


def close(a, b, tol=1e-6):
    return torch.allclose(a, b, rtol=tol, atol=tol)


def fixed_options(method, t):
    """A few steps over the span, for a method with fixed steps."""
    return {"step_size": float((t[-1] - t[0]).abs()) / 8} if method in FIXED else {}


# ----------------------------------------------------------------------------------------------------------------------
# States
# ----------------------------------------------------------------------------------------------------------------------


@given(tensors(), grids(), st.sampled_from(ADAPTIVE + FIXED))
@example(torch.tensor(2.0), torch.tensor([0.0, 1.0], dtype=F64), "dopri5")
@example(torch.zeros(3, 0, 2), torch.tensor([0.0, -1.0], dtype=F64), "gl4")
def test_every_shape_and_dtype_comes_back_with_time_in_front(h0, t, method):
    """And it is the solution: h' = -h, each element for itself."""
    h = pyjlode.odeint(lambda t, h: -h, h0, t, method=method, options=fixed_options(method, t), rtol=1e-5, atol=1e-6)
    assert h.shape == (len(t), *h0.shape)
    assert h.dtype == h0.dtype
    assert torch.equal(h[0], h0)
    exact = torch.exp(-(t - t[0])).reshape(-1, *[1] * h0.ndim) * h0
    assert close(h, exact.to(h.dtype), 0.5 if method == "euler" else 1e-2)


@given(states(tensors()), grids(), st.sampled_from(["dopri5", "vern7", "rk4", "heun3"]))
def test_every_pytree_comes_back_in_its_own_structure(h0, t, method):
    """f sees it so too; each leaf is the solution of its own equation, whatever lies beside it."""
    structure = pytree.tree_structure(h0)

    def f(t, h):
        assert pytree.tree_structure(h) == structure
        return pytree.tree_map(lambda x: (-x * torch.cos(t)).to(x.dtype), h)

    h = pyjlode.odeint(f, h0, t, method=method, options=fixed_options(method, t), rtol=1e-5, atol=1e-6)
    assert type(h) is type(h0)
    assert pytree.tree_structure(h) == structure
    factor = torch.exp(-(torch.sin(t) - torch.sin(t[0])))
    for x, x0 in zip(pytree.tree_leaves(h), pytree.tree_leaves(h0)):
        assert x.dtype == x0.dtype
        assert x.shape == (len(t), *x0.shape)
        assert close(x, (factor.reshape(-1, *[1] * x0.ndim) * x0).to(x.dtype), 1e-2)


@given(states(tensors(dtype=st.just(F64))), seeds, st.sampled_from(["rk4", "gl4", "dopri5", "vern7"]))
def test_a_pytree_is_the_vector_of_its_leaves(h0, seed, method):
    """With every element coupled to every other. Fixed steps are the same ones as on the flat tensor, to rounding."""
    leaves, structure = pytree.tree_flatten(h0)
    flat = torch.cat([x.reshape(-1) for x in leaves])
    n = flat.numel()
    A = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed)) / max(n, 1)
    t = torch.linspace(0, 1, 5, dtype=F64)

    def f(t, h):
        x = A @ torch.cat([x.reshape(-1) for x in pytree.tree_leaves(h)])
        parts = x.split([x.numel() for x in leaves])
        return pytree.tree_unflatten([part.reshape(x.shape) for part, x in zip(parts, leaves)], structure)

    tree = pyjlode.odeint(f, h0, t, method=method, **TOL)
    vector = pyjlode.odeint(lambda t, x: A @ x, flat, t, method=method, **TOL)
    tol = {"rk4": 1e-12, "gl4": 1e-9}.get(method, 1e-6)
    assert close(torch.cat([x.reshape(5, -1) for x in pytree.tree_leaves(tree)], 1), vector, tol)


@given(systems(), grids(), st.sampled_from(["dopri5", "rk4", "gl4"]))
def test_a_complex_state_is_its_two_real_parts(system, t, method):
    A, x = system
    B = torch.complex(A, A.T)
    real = torch.cat([torch.cat([A, -A.T], 1), torch.cat([A.T, A], 1)])
    z0 = torch.complex(x, x.flip(0))
    o = fixed_options(method, t)
    z = pyjlode.odeint(lambda t, z: B @ z, z0, t, method=method, options=o, **TOL)
    y = pyjlode.odeint(lambda t, y: real @ y, torch.cat([z0.real, z0.imag]), t, method=method, options=o, **TOL)
    assert close(torch.cat([z.real, z.imag], 1), y, 1e-7)


@given(st.integers(0, 5), systems(), grids(), st.sampled_from(FIXED))
def test_fixed_steps_solve_each_of_a_batch_for_itself(batch, system, t, method):
    A, _ = system
    h0 = torch.randn(batch, len(A), dtype=F64, generator=torch.Generator().manual_seed(batch))

    def solve(h0):
        f = lambda t, h: torch.tanh(h @ A.T) * torch.cos(t)  # noqa: E731
        return pyjlode.odeint(f, h0, t, method=method, options=fixed_options(method, t))

    h = solve(h0)
    assert h.shape == (len(t), batch, len(A))
    for i in range(batch):
        assert close(h[:, i], solve(h0[i]), 1e-9 if method in ("gl4", "radauIIA3", "trapezoid", "sdirk2") else 1e-13)


# ----------------------------------------------------------------------------------------------------------------------
# Linear systems
# ----------------------------------------------------------------------------------------------------------------------


@given(systems(), grids(), st.sampled_from(ADAPTIVE))
def test_linear_systems_are_the_matrix_exponential(system, t, method):
    A, x = system
    assert close(pyjlode.odeint(lambda t, x: A @ x, x, t, method=method, **TOL), propagate(A, x, t), 1e-6)


@given(systems(), grids(longest=0.5), st.sampled_from(["rk4", "gl4", "gl6", "radauIIA5", "implicit_adams"]))
def test_fixed_steps_converge_to_the_matrix_exponential(system, t, method):
    A, x = system
    o = {"step_size": float((t[-1] - t[0]).abs()) / 30, "interp": "cubic"}
    h = pyjlode.odeint(lambda t, x: A @ x, x, t, method=method, options=o, rtol=1e-6, atol=1e-6)
    assert close(h, propagate(A, x, t), 1e-5)


@given(systems(), systems(), st.floats(-3, 3), grids(), st.sampled_from(FIXED))
def test_fixed_steps_of_a_linear_system_are_linear_in_the_state(system, other, a, t, method):
    A, x = system
    y = torch.cat([other[1], torch.ones(4, dtype=F64)])[: len(x)]

    def solve(h0):
        return pyjlode.odeint(lambda t, h: A @ h, h0, t, method=method, options=fixed_options(method, t))

    assert close(solve(a * x + y), a * solve(x) + solve(y), 1e-9)


@given(systems(), st.floats(-3, 3), grids(), st.sampled_from(ADAPTIVE))
def test_adaptive_solutions_of_a_linear_system_are_linear_in_the_state(system, a, t, method):
    A, x = system

    def solve(h0):
        return pyjlode.odeint(lambda t, h: A @ h, h0, t, method=method, **TOL)

    assert close(solve(a * x + x.flip(0)), a * solve(x) + solve(x.flip(0)), 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------------


def wave(t, h):
    """Nonlinear and not autonomous."""
    return torch.sin(t) * torch.cos(h) - 0.3 * h.flip(-1)


@given(tensors(shape=st.just((3,)), dtype=st.just(F64)), grids(), st.sampled_from(ADAPTIVE))
def test_semigroup(h0, t, method):
    """From t0 to t1 and from there to t2 is from t0 to t2; and back again is where it began."""
    whole = pyjlode.odeint(wave, h0, t, method=method, **TOL)
    state, parts = h0, []
    for i in range(1, len(t)):
        state = pyjlode.odeint(wave, state, t[i - 1 : i + 1], method=method, **TOL)[-1]
        parts.append(state)
    assert close(whole[1:], torch.stack(parts), 1e-6)
    back = pyjlode.odeint(wave, whole[-1], t[[-1, 0]], method=method, **TOL)
    assert close(back[-1], h0, 1e-6)


@given(tensors(shape=st.just((2,)), dtype=st.just(F64)), grids(), st.sampled_from(FIXED))
def test_semigroup_of_grids(h0, t, method):
    """Fixed one-step methods on t itself: exact, since the steps are the same ones."""
    if method == "explicit_adams":  # its history begins anew
        method = "heun2"
    whole = pyjlode.odeint(wave, h0, t, method=method)
    middle = len(t) // 2
    first = pyjlode.odeint(wave, h0, t[: middle + 1], method=method)
    second = pyjlode.odeint(wave, first[-1], t[middle:], method=method)
    assert torch.equal(whole, torch.cat([first, second[1:]]))


@given(
    tensors(shape=st.just((2,)), dtype=st.just(F64)),
    grids(),
    st.floats(-20, 20),
    st.sampled_from(ADAPTIVE + FIXED),
)
def test_shift_of_time(h0, t, c, method):
    """A field that is shifted with the times has the same states."""
    o = fixed_options(method, t)
    here = pyjlode.odeint(wave, h0, t, method=method, options=o, **TOL)
    there = pyjlode.odeint(lambda s, h: wave(s - c, h), h0, t + c, method=method, options=o, **TOL)
    assert close(here, there, 1e-7)


@given(
    tensors(shape=st.just((2,)), dtype=st.just(F64)),
    grids(),
    st.sampled_from([-2.0, -1.0, 0.25, 8.0, 1e-3, -1e3]),
    st.sampled_from(ADAPTIVE + FIXED),
)
def test_scale_of_time(h0, t, a, method):
    """In units of time 1/a as long, or backwards, with a field a times as strong."""
    s = t / a
    here = pyjlode.odeint(wave, h0, t, method=method, options=fixed_options(method, t), **TOL)
    there = pyjlode.odeint(
        lambda s, h: a * wave(a * s, h), h0, s, method=method, options=fixed_options(method, s), **TOL
    )
    assert close(here, there, 1e-6)


@given(tensors(shape=st.just((2,)), dtype=st.just(F64)), grids(), st.sampled_from(ADAPTIVE))
def test_outputs_asked_for_in_between_change_nothing(h0, t, method):
    few = pyjlode.solve(wave, h0, t[[0, -1]], method=method, **TOL)
    many = pyjlode.solve(wave, h0, t, method=method, **TOL)
    assert close(few.h[-1], many.h[-1], 1e-14)
    assert (few.stats.naccept, few.stats.nreject) == (many.stats.naccept, many.stats.nreject)


@given(
    tensors(shape=st.just((2,)), dtype=st.just(F64)),
    grids(),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
    st.sampled_from(ADAPTIVE),
)
def test_dense_output_is_the_solution_in_between(h0, t, fractions, method):
    solution = pyjlode.solve(wave, h0, t, method=method, **TOL)
    assert close(solution.interpolate(t), solution.h, 1e-10)
    inside = t[0] + torch.tensor(fractions, dtype=F64) * (t[-1] - t[0])
    dense = solution.interpolate(inside)
    assert dense.shape == (len(fractions), 2)
    # Many times at once are a matrix product, one time is another: vern9's weights cancel in four digits of sixteen.
    assert close(dense[0], solution.interpolate(inside[0]), 1e-11)
    for time, state in zip(inside, dense):
        if time != t[0]:
            there = pyjlode.odeint(wave, h0, torch.stack([t[0], time]), method="vern9", rtol=1e-11, atol=1e-12)[-1]
            assert close(state, there, 1e-5 if method == "bosh3" else 1e-6)
    span = (float(t[0]), float(t[-1]))
    assert close(pyjlode.odeint_dense(wave, h0, *span, method=method, **TOL)(inside), dense, 1e-10)


@given(systems(), grids(most=1), st.floats(0.1, 0.9))
def test_an_event_is_where_the_solution_is_zero(system, t, fraction):
    """The event is put where the solution itself passes through a value."""
    A, x = system
    when = t[0] + fraction * (t[1] - t[0])
    c = x / x.norm().clamp_min(1e-3)
    level = c @ (torch.matrix_exp(A * (when - t[0])) @ x)
    event_t, h = pyjlode.odeint(
        lambda t, h: A @ h, x, t, event_fn=lambda s, h: torch.stack([c @ h - level, s - when]), **TOL
    )
    # The second element makes sure that there is one; the first may be crossed before, or just here.
    assert float((event_t - t[0]).abs()) <= float((when - t[0]).abs()) + 1e-9
    at = propagate(A, x, torch.stack([t[0], event_t]))
    assert close(h, at, 1e-6)
    assert min(abs(float(c @ h[-1] - level)), abs(float(event_t - when))) < 1e-7


# ----------------------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------------------


@FEWER
@pytest.mark.parametrize("adjoint", GRADIENTS, ids=str)
@given(systems(), grids(longest=1.0, most=3))
def test_gradients_of_linear_systems(adjoint, system, t):
    """By the state, the matrix and the times, against those of the matrix exponential."""
    A, x, t = (v.clone().requires_grad_() for v in (*system, t))
    weight = torch.cos(torch.arange(len(t) * len(x), dtype=F64)).reshape(len(t), len(x))
    exact = torch.autograd.grad((weight * propagate(A, x, t)).sum(), (x, A, t))
    h = pyjlode.odeint(lambda t, x: A @ x, x, t, adjoint=adjoint, **TOL)
    found = torch.autograd.grad((weight * h).sum(), (x, A, t))
    for a, b in zip(found, exact):
        assert close(a, b, 1e-5)


@FEWER
@pytest.mark.parametrize("adjoint", GRADIENTS, ids=str)
@given(
    st.recursive(
        tensors(shape=st.lists(st.integers(0, 2), max_size=2).map(tuple), dtype=st.just(F64)),
        lambda child: st.one_of(st.lists(child, min_size=1, max_size=2), st.tuples(child, child)),
        max_leaves=3,
    ),
    grids(longest=1.0, most=3),
)
def test_gradients_of_any_pytree(adjoint, h0, t):
    """Also of its empty tensors. h' = -w h: dh/dh0 = exp(-w s), dh/dw = -s h."""
    h0 = pytree.tree_map(lambda x: x.clone().requires_grad_(), h0)
    leaves, w = pytree.tree_leaves(h0), torch.tensor(0.7, dtype=F64, requires_grad=True)
    h = pyjlode.odeint(lambda t, h: pytree.tree_map(lambda x: -w * x, h), h0, t, adjoint=adjoint, **TOL)
    total = sum(x.sum() for x in pytree.tree_leaves(h))
    *by_state, by_w = torch.autograd.grad(total, [*leaves, w], allow_unused=not any(x.numel() for x in leaves))
    s = t - t[0]
    if any(x.numel() for x in leaves):
        for x, g in zip(leaves, by_state):
            assert g.shape == x.shape
            assert close(g, torch.exp(-0.7 * s).sum().expand(x.shape), 1e-6)
    expected = -(s * torch.exp(-0.7 * s)).sum() * sum(x.detach().sum() for x in leaves)
    assert close(torch.zeros_like(w) if by_w is None else by_w, expected, 1e-6)


@FEWER
@pytest.mark.parametrize("method", ["rk4", "explicit_adams", "gl4", "bosh3", "vern7"])
@given(systems(), grids(longest=1.0, most=4))
def test_the_discrete_adjoint_is_differentiation_through_the_solver(method, system, t):
    """To rounding: both are the gradient of the numbers that came out."""

    def run(adjoint):
        A, x = (v.clone().requires_grad_() for v in system)
        o = fixed_options(method, t)
        f = lambda t, x: torch.tanh(A @ x) * torch.cos(t)  # noqa: E731
        h = pyjlode.odeint(f, x, t, method=method, options=o, adjoint=adjoint, rtol=1e-5, atol=1e-7)
        return torch.autograd.grad(h.square().sum(), (x, A))

    for a, b in zip(run(True), run(False)):
        assert close(a, b, 1e-9)
