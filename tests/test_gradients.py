"""Laws of the gradient: every way to it gives the derivative of the solution, for every way that f can hold its
tensors."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import itertools
import weakref

import pytest
import torch
from designs import covering
from problems import GENERAL
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

import pyjlode
from pyjlode.errors import BadOption, GradientUnavailable

F64 = torch.float64
CONTINUOUS = ["backsolve", "interpolating", "quadrature", "gauss"]
# True is "discrete": `test_adjoint_true_is_the_recommended_one`.
ADJOINTS = [True, *(name for name in GENERAL if name != "discrete")]
NAMES = [False, *ADJOINTS]
# The derivative of the numbers that came out, not of the solution they stand for.
EXACT = [False, True, "checkpointed"]


def label(value: object) -> str | None:
    return f"adjoint={value}" if isinstance(value, bool) else None


def fits(adjoint: object, method: str) -> bool:
    """Whether this gradient is one of the method's."""
    return adjoint != "checkpointed" or pyjlode.METHODS[method].alone


every_gradient = pytest.mark.parametrize("adjoint", NAMES, ids=label)
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=label)


# ----------------------------------------------------------------------------------------------------------------------
# Two problems, and their derivatives by finite differences
# ----------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small MLP that depends on time."""

    def __init__(self, width: int = 2, dtype: torch.dtype = F64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner, self.outer = nn.Linear(3, width, dtype=dtype), nn.Linear(width, 2, dtype=dtype)
        for q in self.parameters():
            q.data = torch.randn(q.shape, generator=generator, dtype=F64).to(dtype) / q.shape[-1] ** 0.5

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.cat([h, torch.sin(3 * t).reshape(1)]))))


def product(A: Tensor, x: Tensor) -> Tensor:
    """Matrix times vector, for batches of both."""
    return (A @ x[..., None])[..., 0]


def mlp(W: Tensor, b: Tensor, V: Tensor, c: Tensor):
    def f(t, h):
        x = torch.cat([h, torch.sin(3 * t).expand(*h.shape[:-1], 1)], -1)
        return product(V, torch.tanh(product(W, x) + b)) + c

    return f


def closure(A: Tensor, b: Tensor):
    return lambda t, h: torch.tanh(product(A, h)) * torch.cos(2 * t) + b * t * h


FIELDS = {"mlp": mlp, "closure": closure}


def inputs(kind: str, t: Tensor, *, with_t: bool = True) -> list[Tensor]:
    """h0, t and the parameters, as leaves."""
    if kind == "mlp":
        params = [q.detach().clone() for q in Net().parameters()]
    else:
        params = [torch.tensor([[0.3, -1.2], [0.9, 0.1]], dtype=F64), torch.tensor([-0.7, 0.4], dtype=F64)]
    leaves = [torch.tensor([0.8, -0.5], dtype=F64), t.clone(), *params]
    for leaf in leaves:
        leaf.requires_grad_()
    leaves[1].requires_grad_(with_t)
    return leaves


def weights(T: int) -> Tensor:
    return torch.randn(T, 2, generator=torch.Generator().manual_seed(1), dtype=F64)


def loss_of(kind: str, leaves: list[Tensor], **kwargs) -> Tensor:
    h0, t, *params = leaves
    return (weights(len(t)) * pyjlode.odeint(FIELDS[kind](*params), h0, t, **kwargs)).sum()


def gradient_of(kind: str, t: Tensor, *, with_t: bool = True, **kwargs) -> list[Tensor]:
    leaves = inputs(kind, t, with_t=with_t)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return list(torch.autograd.grad(loss_of(kind, leaves, **kwargs), wanted))


def stencil(values: Tensor, eps: float) -> Tensor:
    """Central differences of fourth order: values (4, d) at -2, -1, 1 and 2 times eps -> (d,)."""
    return torch.tensor([1.0, -8.0, 8.0, -1.0], dtype=F64) @ values / (12 * eps)


@torch.no_grad()
def differences(kind: str, t: Tensor, eps: float = 1e-3, **kwargs) -> list[Tensor]:
    """The gradient by finite differences. The moved copies of h0 and the parameters are solved as one batch."""
    h0, _, *params = inputs(kind, t)
    leaves = [h0, *params]
    moved = moves(torch.cat([leaf.reshape(-1) for leaf in leaves]), eps)
    h0, *params = (
        x.reshape(len(moved), *leaf.shape) for x, leaf in zip(moved.split([x.numel() for x in leaves], 1), leaves)
    )
    ys = pyjlode.odeint(FIELDS[kind](*params), h0, t, **kwargs)
    grad = stencil(torch.einsum("tbi,ti->b", ys, weights(len(t))).reshape(4, -1), eps)
    by_leaf = [g.reshape(x.shape) for g, x in zip(grad.split([x.numel() for x in leaves]), leaves)]
    h0, _, *params = inputs(kind, t)
    values = torch.stack([loss_of(kind, [h0, times, *params], **kwargs) for times in moves(t, eps)])
    return [by_leaf[0], stencil(values.reshape(4, -1), eps), *by_leaf[1:]]


def moves(x: Tensor, eps: float) -> Tensor:
    """(d,) -> (4 d, d): each element moved, in the order that `stencil` takes."""
    steps = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=F64)[:, None, None]
    return (x + eps * steps * torch.eye(len(x), dtype=F64)).flatten(0, 1)


SPARSE = torch.tensor([0.0, 0.3, 0.75, 1.0], dtype=F64)
GRID = torch.linspace(0, 0.5, 5, dtype=F64)
UNEVEN = torch.tensor([0.0, 0.1, 0.22, 0.3, 0.42, 0.5, 0.61], dtype=F64)
TIGHT = {"rtol": 1e-12, "atol": 1e-13}

# method -> (times, arguments, how far the gradient may be from that of the exact solution).
ADAPTIVE = {
    "dopri5": (SPARSE, {"rtol": 1e-7, "atol": 1e-9}, 1e-5),
    "tsit5": (SPARSE, {"rtol": 1e-7, "atol": 1e-9}, 1e-5),
    "dopri8": (SPARSE, {"rtol": 1e-7, "atol": 1e-9}, 1e-5),
    "bosh3": (SPARSE, {"rtol": 1e-5, "atol": 1e-7}, 1e-3),
    "vern7": (SPARSE, {"rtol": 1e-7, "atol": 1e-9}, 1e-5),
    "vern9": (SPARSE, {"rtol": 1e-7, "atol": 1e-9}, 1e-5),
}
# The same for fixed steps of about 1/8: C h^p.
FIXED = {
    "rk4": (GRID, {}, 1e-2),
    "explicit_adams": (UNEVEN, {}, 5e-2),
    "implicit_adams": (UNEVEN, {"options": {"max_iters": 100}, **TIGHT}, 1e-2),
    "radauIIA5": (GRID, {}, 1e-3),
    "sdirk2": (GRID, {}, 1e-1),
    "gl4": (GRID, {}, 1e-2),
    "trapezoid": (GRID, {}, 1e-1),
}
SETTINGS = {**ADAPTIVE, **FIXED}


@functools.cache
def exact(kind: str, backward: bool = False) -> list[Tensor]:
    """The gradient of the solution itself."""
    return differences(kind, SPARSE.flip(0) if backward else SPARSE, method="vern9", **TIGHT)


@functools.cache
def by_differences(kind: str, method: str) -> list[Tensor]:
    """The gradient of the numbers that a method with fixed steps makes; of the solution where the error is
    controlled."""
    if method in ADAPTIVE:
        return exact(kind)
    t, kwargs, _ = FIXED[method]
    return differences(kind, t, method=method, **kwargs)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference between two lists of gradients, each in units of the larger of 1 and its own size."""
    assert len(a) == len(b)
    return max(float((x - y).abs().max() / max(1.0, float(y.abs().max()))) for x, y in zip(a, b) if x.numel())


@pytest.mark.parametrize(("method", "adjoint", "kind"), covering(SETTINGS, NAMES, FIELDS), ids=label)
def test_gradient_is_the_finite_difference(kind, adjoint, method):
    """For h0, t and every parameter."""
    if not fits(adjoint, method):
        return
    t, kwargs, accuracy = SETTINGS[method]
    wanted = by_differences(kind, method)
    found = gradient_of(kind, t, method=method, adjoint=adjoint, **kwargs)
    own = method in FIXED and adjoint in EXACT
    assert distance(found, wanted) < (1e-8 if own else accuracy)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("adjoint", [True, "backsolve", "interpolating"], ids=label)
def test_scipy_gradient_is_the_finite_difference(kind, adjoint):
    found = gradient_of(kind, SPARSE, method="scipy_solver", adjoint=adjoint, rtol=1e-7, atol=1e-9)
    assert distance(found, exact(kind)) < 1e-5


@pytest.mark.parametrize("adjoint", ["discrete", "quadrature", "gauss", "forward"])
def test_scipy_has_not_every_adjoint(adjoint):
    with pytest.raises(BadOption, match="backsolve"):
        gradient_of("closure", SPARSE, method="scipy_solver", adjoint=adjoint)


def test_scipy_without_adjoint_has_no_gradient():
    loss = loss_of("closure", inputs("closure", SPARSE), method="scipy_solver", adjoint=False)
    with pytest.raises(GradientUnavailable, match="adjoint=True"):
        loss.backward()


@pytest.mark.parametrize(("adjoint", "kind"), [*zip(NAMES, itertools.cycle(FIELDS))], ids=label)
def test_gradcheck(adjoint, kind):
    leaves = inputs(kind, SPARSE)

    def solve(h0, t, *params):
        return pyjlode.odeint(FIELDS[kind](*params), h0, t, adjoint=adjoint, rtol=1e-7, atol=1e-9)

    assert torch.autograd.gradcheck(solve, leaves, fast_mode=True, eps=1e-4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "gl4"])
@pytest.mark.parametrize("adjoint", EXACT, ids=label)
def test_gradcheck_of_fixed_steps_entry_by_entry(adjoint, method):
    if not fits(adjoint, method):
        return
    t, kwargs, _ = SETTINGS[method]
    leaves = inputs("closure", t[:6])

    def solve(h0, t, *params):
        return pyjlode.odeint(closure(*params), h0, t, adjoint=adjoint, method=method, **kwargs)

    assert torch.autograd.gradcheck(solve, leaves)


@functools.cache
def between_grid_points(method: str, interp: str) -> tuple[dict, list[Tensor]]:
    kwargs = {"method": method, "options": {"step_size": 0.11, "interp": interp}}
    return kwargs, differences("closure", SPARSE, **kwargs)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@every_gradient
@pytest.mark.parametrize("method", ["midpoint", "explicit_adams", "sdirk2"])
def test_gradient_through_output_between_the_grid_points(method, adjoint, interp):
    if not fits(adjoint, method):
        return
    kwargs, wanted = between_grid_points(method, interp)
    found = gradient_of("closure", SPARSE, adjoint=adjoint, **kwargs)
    if adjoint in EXACT:
        assert distance(found, wanted) < 1e-8
    else:
        # The derivative in an output time is the slope: that of a straight line between grid points is off by h/2 f'.
        assert distance([found[0], *found[2:]], [wanted[0], *wanted[2:]]) < 3e-2


# ----------------------------------------------------------------------------------------------------------------------
# Agreement of the gradient methods
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS)
def test_adjoint_true_is_the_recommended_one(method):
    t, kwargs, _ = SETTINGS[method]
    a, b = (gradient_of("mlp", t, method=method, adjoint=adjoint, **kwargs) for adjoint in (True, "discrete"))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@every_gradient
def test_gradient_of_a_solve_there_and_back_is_the_identity(adjoint):
    net, h0 = Net(), torch.tensor([0.8, -0.5], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    there = pyjlode.odeint(net, h0, t, adjoint=adjoint, rtol=1e-6, atol=1e-8)[-1]
    back = pyjlode.odeint(net, there, t.flip(0), adjoint=adjoint, rtol=1e-6, atol=1e-8)[-1]
    rows = [torch.autograd.grad(back[i], h0, retain_graph=True)[0] for i in range(2)]
    torch.testing.assert_close(torch.stack(rows), torch.eye(2, dtype=F64), rtol=0, atol=1e-5)


@every_gradient
def test_decreasing_time(adjoint):
    found = gradient_of("closure", SPARSE.flip(0), adjoint=adjoint, rtol=1e-7, atol=1e-9)
    assert distance(found, exact("closure", backward=True)) < 1e-5


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@every_gradient
def test_gradient_across_a_jump(adjoint, method):
    """f jumps at t=0.5, which the solver is told."""
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=F64) if method == "rk4" else SPARSE
    a = torch.tensor([-0.7, 1.3], dtype=F64, requires_grad=True)
    h0 = torch.tensor([0.8], dtype=F64, requires_grad=True)
    options = {"perturb": True} if method == "rk4" else {"jump_t": torch.tensor([0.5])}
    ys = pyjlode.odeint(
        lambda t, h: (a[0] if t < 0.5 else a[1]) * h, h0, t, adjoint=adjoint, method=method, options=options
    )
    found = torch.autograd.grad(ys[-1], [h0, a])
    end = torch.exp(0.5 * a.sum()).detach()
    wanted = [end[None], 0.5 * end * h0.detach().expand(2)]
    assert distance(list(found), wanted) < (1e-3 if method == "rk4" else 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Second derivatives
# ----------------------------------------------------------------------------------------------------------------------

SECOND = ["dopri5", "dopri8", "bosh3", "vern7", "rk4", "explicit_adams", "implicit_adams"]
SECOND += ["radauIIA5", "sdirk2", "gl4", "trapezoid"]


@every_adjoint
def test_create_graph_with_an_adjoint_says_what_to_use(adjoint):
    leaves = inputs("closure", SPARSE)
    loss = loss_of("closure", leaves, adjoint=adjoint)
    with pytest.raises(GradientUnavailable, match="adjoint=False") as caught:
        torch.autograd.grad(loss, leaves, create_graph=True)
    assert isinstance(caught.value, RuntimeError)
    # The solve is not spoilt: the first derivative is still to be had.
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(loss, leaves))


# ----------------------------------------------------------------------------------------------------------------------
# Ways in which f can hold its tensors
# ----------------------------------------------------------------------------------------------------------------------


def by_hand(f, h0: Tensor, t: Tensor, n: int = 12) -> Tensor:
    """The classical Runge-Kutta method written out, for autograd to record: what f depends on, it depends on."""
    ys, h = [h0], h0
    for a, b in zip(t, t[1:]):
        dt = (b - a) / n
        for i in range(n):
            s = a + i * dt
            k1 = f(s, h)
            k2 = f(s + dt / 2, h + dt / 2 * k1)
            k3 = f(s + dt / 2, h + dt / 2 * k2)
            k4 = f(s + dt, h + dt * k3)
            h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        ys.append(h)
    return torch.stack(ys)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64, requires_grad=True)


WORLD = leaf(0.4, -0.9)  # a global tensor


def through_global(t, h):
    return torch.sin(h) * WORLD


def through_default(t, h, w=WORLD, *, v=WORLD):
    return torch.sin(h) * w + h * v


class Plain:
    """A callable that is no module."""

    def __init__(self, *tensors: Tensor) -> None:
        self.first, self.others = tensors[0], list(tensors[1:])

    def __call__(self, t, h):
        return torch.sin(h) * self.first + sum(h * x for x in self.others)

    def slope(self, t, h):
        return self(t, h)


class Slotted:
    """A callable without a dictionary."""

    __slots__ = ("w",)

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def __call__(self, t, h):
        return torch.sin(h) * self.w


class Buffered(nn.Module):
    """Holds a parameter, and a buffer that requires grad; uses the buffer alone."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(2, dtype=F64))
        self.register_buffer("w", w)

    def forward(self, t, h):
        return torch.sin(h) * self.w


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"deep": nn.Sequential(Net())})

    def forward(self, t, h):
        return self.parts["deep"][0](t, h)


class Shared(nn.Module):
    """One matrix in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2, dtype=F64), nn.Linear(2, 2, dtype=F64)
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor([[0.3, -1.0], [0.8, 0.1]]))
            self.one.bias.fill_(0.1)
            self.two.bias.fill_(-0.2)
        self.two.weight = self.one.weight

    def forward(self, t, h):
        return self.two(torch.tanh(self.one(h)))


def way_closure():
    w = leaf(0.4, -0.9)
    return lambda t, h: torch.sin(h) * w, [w]


def way_nested_function():
    w = leaf(0.4, -0.9)

    def outer(t, h):
        def inner(x):
            return torch.sin(x) * w

        return inner(h)

    return outer, [w]


def way_partial():
    w, v = leaf(0.4, -0.9), leaf(0.2, 0.1)
    return functools.partial(lambda v, t, h, *, w: torch.sin(h) * w + v, v, w=w), [w, v]


def way_instance():
    w, v = leaf(0.4, -0.9), leaf(0.2, 0.1)
    return Plain(w, v), [w, v]


def way_bound_method():
    w, v = leaf(0.4, -0.9), leaf(0.2, 0.1)
    return Plain(w, v).slope, [w, v]


def way_global():
    return through_global, [WORLD]


def way_default_argument():
    return through_default, [WORLD]


def way_containers():
    w, v = leaf(0.4, -0.9), leaf(0.2, 0.1)
    held, named = [w], {"v": (v,)}
    return lambda t, h: torch.sin(h) * held[0] + named["v"][0], [w, v]


def way_wrapped():
    w = leaf(0.4, -0.9)

    @functools.wraps(way_closure)
    def f(t, h):
        return torch.sin(h) * w

    return f, [w]


def way_module():
    net = Net()
    return net, list(net.parameters())


def way_submodule():
    net = Nested()
    return net, list(net.parameters())


def way_module_in_a_closure():
    held = {"net": Net()}
    return lambda t, h: held["net"](t, h), list(held["net"].parameters())


def way_module_method():
    net = Net()
    return net.forward, list(net.parameters())


def way_buffer():
    w = leaf(0.4, -0.9)
    return Buffered(w), [w]


def way_shared_parameter():
    net = Shared()
    return net, list(net.parameters())


def way_deque():
    held = collections.deque([leaf(0.4, -0.9)])
    return lambda t, h: torch.sin(h) * held[0], list(held)


def way_slots():
    f = Slotted(leaf(0.4, -0.9))
    return f, [f.w]


def way_method_of_slots():
    f = Slotted(leaf(0.4, -0.9))
    return f.__call__, [f.w]


def way_hidden_intermediate():
    w = leaf(0.4, -0.9)
    held = collections.deque([w * w])
    return lambda t, h: torch.sin(h) * held[0], [w]


def way_intermediate():
    encoder, x = nn.Linear(3, 2, dtype=F64), torch.tensor([0.3, 0.1, -0.5], dtype=F64)
    z = torch.tanh(encoder(x))
    return lambda t, h: torch.sin(h) * z, list(encoder.parameters())


def way_two_outputs_of_one_operation():
    w = leaf(0.4, -0.9, 0.2, 0.1)
    z, v = (w * w).chunk(2)
    return lambda t, h: torch.sin(h) * z + v, [w]


def way_second_output_of_an_operation():
    w = leaf(0.4, -0.9, 0.2, 0.1)
    z, v = (w * w).chunk(2)
    both = (z, v)
    return lambda t, h: torch.sin(h) * both[1], [w]


def way_intermediate_of_an_intermediate():
    w = leaf(0.4, -0.9)
    z = w * w
    v = torch.sin(z)
    return lambda t, h: torch.sin(h) * z + v, [w]


def way_intermediates_with_a_common_leaf():
    w = leaf(0.4, -0.9)
    z, v = w * w, torch.sin(w)
    return lambda t, h: torch.sin(h) * z + v, [w]


def way_leaf_and_intermediate():
    w = leaf(0.4, -0.9)
    z = torch.exp(w)
    return lambda t, h: torch.sin(h) * z + w, [w]


def way_view_of_a_leaf():
    w = leaf(0.4, -0.9, 0.2, 0.1)
    z = w[1:3]
    return lambda t, h: torch.sin(h) * z, [w]


def way_leaf_used_late():
    w, v = leaf(0.4, -0.9), leaf(0.2, 0.1)
    return lambda t, h: torch.sin(h) * w + (v * torch.sin(t - 0.5) ** 4 if t > 0.5 else 0.0), [w, v]


WAYS = {name.removeprefix("way_"): make for name, make in list(globals().items()) if name.startswith("way_")}
OF_WAYS: dict[str, tuple[Tensor, ...]] = {}


@pytest.mark.parametrize("way", WAYS)
@every_gradient
def test_every_tensor_that_f_uses_gets_its_gradient(adjoint, way):
    f, leaves = WAYS[way]()
    h0 = leaf(0.8, -0.5)
    h0.requires_grad_(way != "buffer")
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    kept = [x for x in (*leaves, h0) if x.requires_grad]
    if way not in OF_WAYS:  # all gradients are compared with one
        OF_WAYS[way] = torch.autograd.grad((by_hand(f, h0, t) ** 2).sum(), kept, retain_graph=True)
    wanted = OF_WAYS[way]
    for x in kept:
        x.grad = None
    ys = pyjlode.odeint(f, h0, t, adjoint=adjoint, rtol=1e-6, atol=1e-7)
    (ys**2).sum().backward()
    found = [x.grad for x in kept]
    WORLD.grad = None
    assert all(g is not None for g in found)
    assert distance(found, list(wanted)) < 1e-4


@every_gradient
def test_state_closed_over_by_f(adjoint):
    """h' = h0 - h^2 with h(0) = h0: h0 counts both as the start and as a parameter."""
    h0 = leaf(0.8, 0.5)
    t = torch.tensor([0.0, 1.0], dtype=F64)

    def f(t, h):
        return h0 - h**2

    (wanted,) = torch.autograd.grad(by_hand(f, h0, t)[-1].sum(), h0)
    (found,) = torch.autograd.grad(pyjlode.odeint(f, h0, t, adjoint=adjoint)[-1].sum(), h0)
    assert distance([found], [wanted]) < 1e-6


@every_gradient
def test_encoder_that_makes_both_state_and_field(adjoint):
    encoder = nn.Linear(3, 4, dtype=F64)
    x, t = torch.tensor([0.3, 0.1, -0.5], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)

    def run(solve):
        z = torch.tanh(encoder(x))
        return torch.autograd.grad(solve(lambda t, h: torch.sin(h) * z[2:], z[:2], t)[-1].sum(), encoder.parameters())

    wanted, found = run(by_hand), run(functools.partial(pyjlode.odeint, adjoint=adjoint))
    assert distance(list(found), list(wanted)) < 1e-6


@every_gradient
def test_time_closed_over_by_f(adjoint):
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64, requires_grad=True)

    def f(s, h):
        return torch.sin(h) * t[-1]

    h0 = torch.tensor([0.8], dtype=F64)
    (wanted,) = torch.autograd.grad(by_hand(f, h0, t).sum(), t)
    (found,) = torch.autograd.grad(pyjlode.odeint(f, h0, t, adjoint=adjoint).sum(), t)
    assert distance([found], [wanted]) < 1e-6


@every_gradient
def test_parameters_that_do_not_require_grad_stay_without(adjoint):
    net = Net()
    net.inner.requires_grad_(False)
    ys = pyjlode.odeint(net, torch.tensor([0.8, -0.5], dtype=F64), SPARSE, adjoint=adjoint)
    ys.sum().backward()
    assert all(q.grad is None for q in net.inner.parameters())
    assert all(q.grad is not None and bool(q.grad.any()) for q in net.outer.parameters())


@every_gradient
def test_frozen_module_passes_the_gradient_on_to_the_state(adjoint):
    net, h0 = Net().requires_grad_(False), leaf(0.8, -0.5)
    (found,) = torch.autograd.grad(pyjlode.odeint(net, h0, SPARSE, adjoint=adjoint).sum(), h0)
    (wanted,) = torch.autograd.grad(by_hand(net, h0, SPARSE).sum(), h0)
    assert distance([found], [wanted]) < 1e-6


@every_gradient
def test_unused_parameters_get_none_or_zero(adjoint):
    net = Net()
    net.idle = nn.Linear(4, 5)  # of another dtype, too
    pyjlode.odeint(net, leaf(0.8, -0.5), SPARSE, adjoint=adjoint).sum().backward()
    assert all(q.grad is None or not bool(q.grad.any()) for q in net.idle.parameters())


@every_gradient
def test_adjoint_params_are_what_is_differentiated_by(adjoint):
    net = Net()
    others = list(net.outer.parameters())
    ys = pyjlode.odeint(net, leaf(0.8, -0.5), SPARSE, adjoint=adjoint, adjoint_params=tuple(net.inner.parameters()))
    wanted = torch.autograd.grad(by_hand(net, leaf(0.8, -0.5), SPARSE).sum(), list(net.parameters()))
    ys.sum().backward()
    assert distance([q.grad for q in net.inner.parameters()], list(wanted[:2])) < 1e-6
    if adjoint is not False:
        assert all(q.grad is None for q in others)


@every_gradient
def test_no_adjoint_params_leaves_the_state(adjoint):
    net, h0 = Net(), leaf(0.8, -0.5)
    ys = pyjlode.odeint(net, h0, SPARSE, adjoint=adjoint, adjoint_params=())
    (found,) = torch.autograd.grad(ys.sum(), h0)
    (wanted,) = torch.autograd.grad(by_hand(net, h0, SPARSE).sum(), h0)
    assert distance([found], [wanted]) < 1e-6


@pytest.mark.parametrize("name", ["one", "two"])
@every_gradient
def test_object_that_keeps_its_last_loss(adjoint, name):
    """An attribute with last iteration's graph must not tie this solve to it."""

    class Trainer:
        def __init__(self) -> None:
            self.net = Net()
            self.loss = self.last = None

        def slope(self, t, h):
            return self.net(t, h)

        def run(self) -> list[Tensor]:
            self.net.zero_grad()
            self.last, self.loss = self.loss, solve(self.slope).square().sum()
            self.loss.backward()
            return [q.grad.clone() for q in self.net.parameters()]

        def run_beside_a_copy(self) -> list[Tensor]:
            self.history = [self.loss]
            return self.run()

    def solve(f):
        return pyjlode.odeint(f, torch.tensor([0.8, -0.5], dtype=F64), SPARSE, adjoint=adjoint, rtol=1e-3, atol=1e-4)

    trainer = Trainer()
    run = trainer.run if name == "one" else trainer.run_beside_a_copy
    first, *more = [run() for _ in range(3)]
    assert all(torch.equal(a, b) for grads in more for a, b in zip(first, grads))


@every_gradient
def test_checkpointed_field(adjoint):
    net = Net()

    def f(t, h):
        return checkpoint(net, t, h, use_reentrant=False)

    leaves = [leaf(0.8, -0.5), *net.parameters()]
    h0, t = leaves[0], torch.tensor([0.0, 1.0], dtype=F64)
    wanted = torch.autograd.grad(by_hand(net, h0, t).sum(), leaves)
    found = torch.autograd.grad(pyjlode.odeint(f, h0, t, adjoint=adjoint, rtol=1e-5, atol=1e-6).sum(), leaves)
    assert distance(list(found), list(wanted)) < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# States, times, losses
# ----------------------------------------------------------------------------------------------------------------------


def of_complex(h0: Tensor, w: Tensor, **kwargs) -> Tensor:
    """A real loss of a complex solution; h0 and w of shape (..., 2)."""
    ys = pyjlode.odeint(lambda t, h: w * h * torch.cos(t) - h * h, h0, GRID, **kwargs)
    return (ys.real**2 + ys.imag * ys.real).sum((0, -1))


COMPLEX = torch.tensor([0.8 - 0.2j, -0.5 + 0.3j, 0.3 + 1.1j, -0.4 + 0.6j], dtype=torch.complex128)


@functools.cache
def complex_by_differences(method: str) -> Tensor:
    moved = torch.view_as_complex(moves(torch.view_as_real(COMPLEX).reshape(-1), 1e-3).reshape(-1, 4, 2))
    tight = TIGHT if method == "dopri5" else {}
    return stencil(of_complex(moved[:, :2], moved[:, 2:], method=method, **tight).reshape(4, -1), 1e-3)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "gl4"])
@every_gradient
def test_complex_state_against_differences_in_both_parts(adjoint, method):
    leaves = [x.clone().requires_grad_() for x in COMPLEX.split(2)]
    kwargs = {"rtol": 1e-8, "atol": 1e-10} if method == "dopri5" else {}
    found = torch.autograd.grad(of_complex(*leaves, adjoint=adjoint, method=method, **kwargs), leaves)
    # The convention of torch: the gradient of a real loss in a + ib is dL/da + i dL/db.
    accuracy = 1e-6 if method == "dopri5" or adjoint in EXACT else 1e-2
    assert distance([torch.view_as_real(torch.cat(found)).reshape(-1)], [complex_by_differences(method)]) < accuracy


@pytest.mark.parametrize(("before", "after"), [(1, 0), (2, 1), (3, 2)])
@every_gradient
def test_complex_tensors_beside_any_number_of_reals(adjoint, before, after):
    """As the same equations in real numbers."""

    def by_complex(w, x, z, y):
        return -w * x * z.abs().sum(), 1j * w * z + x.sum(), z.real.sum() - y

    found = beside_reals(by_complex, BESIDE, before, after, adjoint)
    assert distance(found, in_real_numbers(before, after)) < 1e-4


BESIDE = torch.tensor([1 + 1j, 0.3 - 0.2j], dtype=torch.complex128)


def beside_reals(f, z: Tensor, before: int, after: int, adjoint: bool | str) -> list[Tensor]:
    """The gradient of a state of several tensors, z in the middle."""
    w = leaf(0.7)
    h0 = (torch.ones(before, dtype=F64), z.clone(), torch.ones(after, dtype=F64))
    h0 = tuple(x.requires_grad_() for x in h0)
    ys = pyjlode.odeint(lambda t, h: f(w, *h), h0, SPARSE, rtol=1e-6, atol=1e-8, adjoint=adjoint)
    parts = torch.view_as_real(ys[1]) if z.is_complex() else ys[1]
    loss = ys[0].sum() + parts[..., 0].square().sum() + parts[..., 1].sum() + ys[2].sum()
    grads = torch.autograd.grad(loss, [w, *h0], allow_unused=True)
    return [torch.view_as_real(g) if g.is_complex() else g for g in grads]


@functools.cache
def in_real_numbers(before: int, after: int) -> list[Tensor]:
    def by_reals(w, x, z, y):
        turned = torch.stack([-z[:, 1], z[:, 0]], -1)
        return -w * x * z.norm(dim=-1).sum(), w * turned + x.sum() * z.new_tensor([1.0, 0.0]), z[:, 0].sum() - y

    return beside_reals(by_reals, torch.view_as_real(BESIDE), before, after, False)


@every_gradient
def test_tuple_and_dict_states(adjoint):
    w = leaf(0.4, -0.9)
    x, v = leaf(0.8, -0.5), torch.tensor([[0.1, 0.2]], dtype=F64, requires_grad=True)
    t = SPARSE.clone().requires_grad_()

    def pair(t, h):
        return torch.sin(h[1][0]) * w, -h[0][None] * t

    def named(t, h):
        a, b = pair(t, (h["x"], h["deep"][0]))
        return {"x": a, "deep": [b]}

    flat = by_hand(
        lambda t, h: torch.cat([y.reshape(-1) for y in pair(t, (h[:2], h[2:][None]))]), torch.cat([x, v[0]]), t
    )
    leaves = [x, v, w, t]
    wanted = torch.autograd.grad(flat.square().sum(), leaves)
    ys = pyjlode.odeint(pair, (x, v), t, adjoint=adjoint)
    assert [y.shape for y in ys] == [(4, 2), (4, 1, 2)]
    assert distance(list(torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)), list(wanted)) < 1e-6
    ys = pyjlode.odeint(named, {"x": x, "deep": [v]}, t, adjoint=adjoint)
    assert (ys["x"].shape, ys["deep"][0].shape) == ((4, 2), (4, 1, 2))
    loss = ys["x"].square().sum() + ys["deep"][0].square().sum()
    assert distance(list(torch.autograd.grad(loss, leaves)), list(wanted)) < 1e-6


@every_gradient
def test_leaves_of_different_precision(adjoint):
    x, v = torch.tensor([0.8], requires_grad=True), leaf(0.3)
    ys = pyjlode.odeint(
        lambda t, h: (-h[0], h[1] * torch.cos(t).double()), (x, v), torch.tensor([0.0, 1.0]), adjoint=adjoint
    )
    assert [y.dtype for y in ys] == [torch.float32, F64]
    found = torch.autograd.grad(ys[0][-1] + ys[1][-1], [x, v])
    assert [g.dtype for g in found] == [torch.float32, F64]
    assert float(found[0]) == pytest.approx(float(torch.exp(torch.tensor(-1.0))), abs=1e-5)
    assert float(found[1]) == pytest.approx(float(torch.exp(torch.sin(torch.tensor(1.0)))), abs=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "explicit_adams", "gl4"])
@every_gradient
def test_one_time_is_the_identity(adjoint, method):
    if not fits(adjoint, method):
        return
    net, h0 = Net(), leaf(0.8, -0.5)
    t = torch.tensor([0.3], dtype=F64, requires_grad=True)
    ys = pyjlode.odeint(net, h0, t, adjoint=adjoint, method=method)
    assert torch.equal(ys, h0[None])
    g, *others = torch.autograd.grad((2 * ys).sum(), [h0, t, *net.parameters()], allow_unused=True)
    assert torch.equal(g, torch.full((2,), 2.0, dtype=F64))
    assert all(x is None or not bool(x.any()) for x in others)


@every_gradient
@pytest.mark.parametrize("n", [2, 100])
def test_two_times_and_many(n, adjoint):
    t = torch.linspace(0, 1, n, dtype=F64, requires_grad=True)
    w, h0 = leaf(0.4, -0.9), leaf(0.8, -0.5)

    def f(t, h):
        return torch.cos(h) * w

    weights = torch.cos(7 * t.detach())[:, None]
    leaves = [w, h0, t]
    wanted = torch.autograd.grad((weights * by_hand(f, h0, t, n=20 if n == 2 else 1)).mean(), leaves)
    h = pyjlode.odeint(f, h0, t, adjoint=adjoint, rtol=1e-5, atol=1e-7)
    found = torch.autograd.grad((weights * h).mean(), leaves)
    assert distance(list(found), list(wanted)) < 1e-4
    assert float((found[2] - wanted[2]).abs().max()) < 2e-3 / n


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "implicit_adams", "gl4"])
@every_gradient
def test_empty_batch(adjoint, method):
    if not fits(adjoint, method):
        return
    net = nn.Linear(3, 3)
    h0, t = torch.zeros(0, 3, requires_grad=True), torch.linspace(0, 1, 6).requires_grad_()
    ys = pyjlode.odeint(lambda t, h: net(h), h0, t, adjoint=adjoint, method=method, rtol=1e-4, atol=1e-4)
    assert ys.shape == (6, 0, 3)
    ys.sum().backward()
    assert h0.grad is not None
    assert h0.grad.shape == (0, 3)
    assert all(q.grad is None or not bool(q.grad.any()) for q in net.parameters())
    assert t.grad is None or not bool(t.grad.any())


@every_gradient
def test_scalar_state(adjoint):
    a = torch.tensor(0.7, dtype=F64, requires_grad=True)
    h0 = torch.tensor(1.5, dtype=F64, requires_grad=True)
    ys = pyjlode.odeint(lambda t, h: a * h, h0, torch.tensor([0.0, 2.0], dtype=F64), adjoint=adjoint)
    assert ys.shape == (2,)
    found = torch.autograd.grad(ys[-1], [h0, a])
    end = torch.exp(2 * a).detach()
    assert distance(list(found), [end, 2 * end * 1.5]) < 1e-6


@every_gradient
def test_loss_that_does_not_depend_on_a_leaf_of_the_state(adjoint):
    w, x, v = leaf(0.4), leaf(0.8), leaf(0.1)
    ys = pyjlode.odeint(lambda t, h: (w * h[0], -h[1]), (x, v), SPARSE, adjoint=adjoint)
    grads = torch.autograd.grad(ys[0].sum(), [x, v, w], allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None or not bool(grads[1].any())
    assert grads[2] is not None


@every_gradient
def test_backward_twice(adjoint):
    leaves = inputs("mlp", SPARSE)
    loss = loss_of("mlp", leaves, adjoint=adjoint, rtol=1e-4)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@every_gradient
def test_backward_twice_without_keeping_the_graph_is_refused(adjoint):
    leaves = inputs("mlp", SPARSE)
    loss = loss_of("mlp", leaves, adjoint=adjoint, rtol=1e-4)
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@every_gradient
def test_field_that_turns_gradients_on_itself(adjoint):
    """A field that is itself a gradient: h' = -dV/dh, with V a module (Hamiltonian networks, flows)."""
    net = nn.Sequential(nn.Linear(2, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 1, dtype=F64))

    def f(t, h):
        with torch.enable_grad():
            x = h if h.requires_grad else h.detach().requires_grad_()
            return -torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]

    leaves, t = [leaf(0.8, -0.5), *net.parameters()], torch.tensor([0.0, 1.0], dtype=F64)
    run = [
        torch.autograd.grad(solve(f, leaves[0], t)[-1].sum(), leaves, allow_unused=True)
        for solve in (by_hand, functools.partial(pyjlode.odeint, adjoint=adjoint))
    ]
    wanted, found = ([torch.zeros_like(x) if g is None else g for g, x in zip(gs, leaves)] for gs in run)
    assert distance(found, wanted) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Training, and the settings of the continuous adjoints
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolating"])
def test_seminorm_costs_no_more_and_changes_nothing(adjoint):
    def run(**kwargs):
        net, h0 = Net(width=8), leaf(0.8, -0.5)
        with torch.no_grad():
            net.outer.weight.mul_(3)
        solution = pyjlode.solve(net, h0, SPARSE * 4, adjoint=adjoint, rtol=1e-7, atol=1e-9, **kwargs)
        return torch.autograd.grad(solution.h.sum(), [h0, *net.parameters()]), solution.stats.nfe_backward

    (plain, cost), (semi, less) = run(), run(adjoint_options={"norm": "seminorm"})
    assert 0 < less <= cost
    assert distance(list(semi), list(plain)) < 1e-5


@pytest.mark.parametrize("adjoint", CONTINUOUS)
def test_adjoint_norm_is_called_with_the_parts_of_the_backward_state(adjoint):
    w, h0, seen = leaf(0.4, -0.9), torch.tensor([[0.8, -0.5]], dtype=F64, requires_grad=True), []

    def norm(parts):
        seen.append([tuple(x.shape) for x in parts])
        return max(float(x.abs().max()) for x in parts)

    ys = pyjlode.odeint(lambda t, h: h * w, h0, SPARSE, adjoint=adjoint, adjoint_options={"norm": norm})
    assert not seen
    (found,) = torch.autograd.grad(ys[-1].sum(), w)
    assert distance([found], [(h0 * torch.exp(w)).detach()[0]]) < 1e-5
    # (vjp_t, y, adj_y, *adj_params)
    params = [(2,)] if adjoint in ("backsolve", "interpolating") else []
    assert seen
    assert all(shapes == [(), (1, 2), (1, 2), *params] for shapes in seen)


@pytest.mark.parametrize("adjoint", CONTINUOUS)
def test_adjoint_callbacks_are_called_backward_in_time(adjoint):
    net, calls = Net(), collections.defaultdict(list)
    for event in ("step", "accept_step", "reject_step"):
        setattr(
            net, f"callback_{event}_adjoint", lambda t0, y0, dt, e=event: calls[e].append((float(t0), y0, float(dt)))
        )
    ys = pyjlode.odeint(net, leaf(0.8, -0.5), SPARSE, adjoint=adjoint)
    assert not calls
    ys.sum().backward()
    starts = [t0 for t0, _, _ in calls["accept_step"]]
    assert starts[0] == 1.0
    assert starts == sorted(starts, reverse=True)
    assert all(dt < 0 for _, _, dt in calls["step"])
    assert len(calls["step"]) == len(calls["accept_step"]) + len(calls["reject_step"])
    _t0, parts, _ = calls["step"][0]
    assert [tuple(x.shape) for x in parts[:3]] == [(), (2,), (2,)]


def test_adjoint_callbacks_are_not_called_where_there_is_no_backward_solve():
    net = Net()
    net.callback_step_adjoint = lambda *args: pytest.fail("called")
    pyjlode.odeint(net, leaf(0.8, -0.5), SPARSE, adjoint="discrete").sum().backward()


@pytest.mark.parametrize("adjoint", CONTINUOUS)
def test_adjoint_method_and_tolerances_are_those_of_the_backward_solve(adjoint):
    def run(**kwargs):
        net, h0 = Net(), leaf(0.8, -0.5)
        solution = pyjlode.solve(net, h0, SPARSE, adjoint=adjoint, rtol=1e-7, atol=1e-9, **kwargs)
        grads = torch.autograd.grad(solution.h.sum(), [h0, *net.parameters()])
        return list(grads), solution.stats.nfe_backward

    exact, cost = run()
    loose, less = run(adjoint_rtol=1e-3, adjoint_atol=1e-3)
    other, _ = run(adjoint_method="vern7", adjoint_rtol=1e-7, adjoint_atol=1e-9)
    assert less < cost
    assert 1e-6 < distance(loose, exact) < 1e-1
    assert distance(other, exact) < 1e-5
    fixed, _ = run(adjoint_method="rk4", adjoint_options={"step_size": 0.05})
    assert distance(fixed, exact) < 1e-4


@every_gradient
def test_stats_count_the_backward_pass(adjoint):
    calls = itertools.count()

    class Counting(Net):
        def forward(self, t, h):
            next(calls)
            return super().forward(t, h)

    net = Counting()
    solution = pyjlode.solve(net, leaf(0.8, -0.5), SPARSE, adjoint=adjoint)
    assert solution.stats.nfe == next(calls)
    solution.h.sum().backward()
    assert solution.stats.nfe + solution.stats.nfe_backward == next(calls) - 1


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_new():
    """What `gc` tells of are objects made since: the process has a million others."""
    gc.collect()
    gc.freeze()


def alive() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process refers to, by address; but for those of tracing, which have
    no memory."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and not issubclass(type(x), FakeTensor)]
    tensors = [x for x in tensors if x.layout == torch.strided]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def bytes_held(adjoint: bool | str, steps: int, width: int = 4, n: int = 64, method: str = "rk4") -> tuple[int, int]:
    """Bytes that the graph of a solve holds, in tensors that Python sees and in those that autograd saved."""
    net = nn.Sequential(nn.Linear(n, width), nn.Tanh(), nn.Linear(width, n))
    h0, t = torch.ones(n, requires_grad=True), torch.tensor([0.0, 1.0])
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    gc.collect()
    before = alive()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ys = pyjlode.odeint(
            lambda t, h: net(h), h0, t, adjoint=adjoint, method=method, options={"step_size": 1 / steps}
        )
    gc.collect()
    after = alive()
    assert ys.requires_grad
    return sum(size for at, size in after.items() if at not in before), sum(saved.values())


def test_memory_of_backsolve_does_not_grow_with_the_steps(only_new):
    short, long = bytes_held("backsolve", 50), bytes_held("backsolve", 500)
    assert long[0] - short[0] <= 4 * 64 * 8
    assert long[1] == short[1]


def test_memory_of_the_backward_pass_of_backsolve_does_not_grow_with_the_steps(only_new):
    def most(steps: int) -> int:
        n, peak, calls = 64, 0, itertools.count()
        net = nn.Linear(n, n)

        def f(t, h):
            nonlocal peak
            if next(calls) % (steps // 5) == 0:
                peak = max(peak, sum(alive().values()))
            return torch.tanh(net(h))

        ys = pyjlode.odeint(
            f,
            torch.ones(n, requires_grad=True),
            torch.tensor([0.0, 1.0]),
            adjoint="backsolve",
            method="euler",
            options={"step_size": 1 / steps},
        )
        base, peak = sum(alive().values()), 0
        ys.sum().backward()
        return peak - base

    short, long = most(50), most(500)
    assert long <= short + 64 * 64 * 4 * 2


def test_memory_without_adjoint_holds_the_activations(only_new):
    """The other side of the trade, so that the measurements above are seen to measure."""
    assert bytes_held(False, 50, width=1024)[1] > 50 * 4 * 1024 * 4


class Watched(nn.Module):
    """A module that tells when it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, t, h):
        return self.net(t, h)


@every_gradient
def test_solve_is_freed_without_the_garbage_collector(adjoint, only_new):
    """With a gradient by t and without, before a backward pass and after."""

    def count() -> int:
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def once(with_t: bool, backward: bool) -> weakref.ref:
        f, h0 = Watched(), leaf(0.8, -0.5)
        t = SPARSE.clone().requires_grad_(with_t)
        solution = pyjlode.solve(f, h0, t, adjoint=adjoint, rtol=1e-3)
        if backward:
            solution.h.sum().backward()
        return weakref.ref(f)

    kinds = [*itertools.product([False, True], repeat=2)]
    for kind in kinds:
        once(*kind)  # what is made once and kept (caches)
    gc.collect()
    gc.disable()
    try:
        before = count()
        for kind in kinds:
            assert once(*kind)() is None
            assert count() == before
    finally:
        gc.enable()


@every_gradient
def test_module_can_be_copied_after_training(adjoint):
    """Nothing of a solve stays behind in the module."""
    net = Net()
    before = set(vars(net))
    pyjlode.odeint(net, leaf(0.8, -0.5), SPARSE, adjoint=adjoint).sum().backward()
    assert set(vars(net)) == before
    copy.deepcopy(net)


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolating", "gauss"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "gl4"])
def test_parameters_without_effect_do_not_stop_an_adjoint(method, adjoint):
    """h = a t + b is a solution on which df/da and df/db vanish but for rounding, to the fourth power of it."""
    a, b = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.2, 3.0))
    t = torch.linspace(1, 8, 10, dtype=F64)
    h0 = torch.tensor(3.2, dtype=F64, requires_grad=True)
    h = pyjlode.odeint(lambda t, h: a + (h - (a * t + b)) ** 5, h0, t, method=method, adjoint=adjoint)
    of_a, of_b, of_h0 = torch.autograd.grad(h[-1], (a, b, h0))
    assert float(of_h0) == pytest.approx(1.0)
    assert float(of_a) == pytest.approx(7.0)
    assert abs(float(of_b)) < 1e-9


@pytest.mark.parametrize("other", [torch.ones(2, requires_grad=True)])
def test_an_assertion_in_f_holds_nothing(other):
    """pytest rewrites it to calls of its own, from which all that the session's tests hold can be reached."""

    def f(t, h):
        assert h.shape == (2,)
        return -h

    assert pyjlode.parameters.Held(f).bindings == []
