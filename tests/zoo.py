"""Vector fields as people write them: every way in which an `f` can hold, keep, share, exchange and make its tensors.

A kind is a function without arguments that returns a fresh `Specimen`, the same in every call.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from pyjlode.nn import HamiltonianNN, LagrangianNN, SecondOrder, TimeMLP

F64 = torch.float64
CONTINUOUS = frozenset({"backsolve", "interpolating", "quadrature", "gauss"})


@dataclass
class Specimen:
    """One vector field.

    Attributes:
        f, h0: for `odeint`.
        leaves: what a loss is differentiated by.
        around: the context in which the solve, and it alone, takes place.
        after: called between the solve and its backward pass.
        smooth: finite differences by `leaves` see all that the gradient is of: nothing is detached, and nothing that f
            holds was made of them before.
        refused: gradients that may say that they cannot: those that ask f again, of what it does not give again.
        tolerance: of gradients, in units of their norm.
    """

    f: Callable[..., Any]
    h0: Any
    leaves: list[Tensor]
    around: Callable[[], Any] = contextlib.nullcontext
    after: Callable[[], None] = lambda: None
    smooth: bool = True
    refused: frozenset[Any] = frozenset()
    tolerance: float = 1e-4


ZOO: dict[str, Callable[[], Specimen]] = {}


def kind(make: Callable[[], Specimen]) -> Callable[[], Specimen]:
    @functools.wraps(make)
    def same() -> Specimen:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return make()

    ZOO[make.__name__] = same
    return same


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64, requires_grad=True)


def start(*values: float) -> Tensor:
    return torch.tensor(values or (0.8, -0.5), dtype=F64)


def linear(n: int = 2, m: int = 2, **kwargs: Any) -> nn.Linear:
    return nn.Linear(n, m, dtype=F64, **kwargs)


def of(module: nn.Module, f: Callable[..., Any] | None = None, h0: Any = None, **kwargs: Any) -> Specimen:
    return Specimen(f or module, start() if h0 is None else h0, list(module.parameters()), **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Where the tensors lie
# ----------------------------------------------------------------------------------------------------------------------


@kind
def closure() -> Specimen:
    A, b = leaf(0.3, -1.2), leaf(0.9, 0.1)
    return Specimen(lambda t, h: torch.tanh(A * h.flip(0)) * torch.cos(2 * t) + b * t * h, start(), [A, b])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = linear(3, 4), linear(4, 2)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.cat([h, torch.sin(3 * t).reshape(1)]))))


@kind
def module() -> Specimen:
    return of(Net())


@kind
def function_over_module() -> Specimen:
    net = nn.Sequential(linear(2, 5), nn.Softplus(), linear(5, 2))
    return of(net, lambda t, h: net(h**3))


@kind
def partial_of_function() -> Specimen:
    W = leaf(0.4, -0.7)

    def f(scale: Tensor, t: Tensor, h: Tensor, *, power: float) -> Tensor:
        return -scale * h.abs() ** power

    return Specimen(functools.partial(f, W, power=1.5), start(), [W])


class Trainer:
    """Its field is a method; the object holds all else that a program has."""

    def __init__(self) -> None:
        self.net, self.history, self.calls = nn.Sequential(linear(), nn.Tanh()), [], 0
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def field(self, t: Tensor, h: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(h.detach().clone())
        return self.net(h)


@kind
def bound_method_with_history() -> Specimen:
    trainer = Trainer()
    return of(trainer.net, trainer.field)


GLOBAL = leaf(0.6)
SETTINGS = types.ModuleType("settings")
SETTINGS.W = leaf(-0.4)  # type: ignore[attr-defined]


@kind
def globals_and_modules() -> Specimen:
    return Specimen(lambda t, h: SETTINGS.W * h + torch.sin(GLOBAL * t), start(), [GLOBAL, SETTINGS.W])


@kind
def class_attribute() -> Specimen:
    class C:
        W = leaf(0.7)

    return Specimen(lambda t, h: -C.W * h, start(), [C.W])


@kind
def containers() -> Specimen:
    a, b, c = leaf(0.7), leaf(0.2), leaf(-0.3)
    queue, table, pair = collections.deque([a]), {"b": b}, (c, None)
    return Specimen(lambda t, h: -queue[0] * h + table["b"] * h.flip(0) + pair[0] * t, start(), [a, b, c])


@kind
def behind_a_weak_reference() -> Specimen:
    W = leaf(0.7)
    ref = weakref.ref(W)
    return Specimen(lambda t, h: -ref() * h, start(), [W])


@kind
def default_arguments() -> Specimen:
    W = leaf(0.7, 0.2)

    def f(t: Tensor, h: Tensor, W: Tensor = W) -> Tensor:
        return -W * h

    return Specimen(f, start(), [W])


# ----------------------------------------------------------------------------------------------------------------------
# What is kept of a call
# ----------------------------------------------------------------------------------------------------------------------


class KeepsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        self.last = torch.tanh(self.layer(h))
        self.cache = {"t": t, "z": self.last * 2}
        return 1.5 * self.last


@kind
def keeps_its_last_result() -> Specimen:
    return of(KeepsLast())


@kind
def forward_hook_keeps() -> Specimen:
    net, seen = nn.Sequential(linear(2, 4), nn.Tanh(), linear(4, 2)), []
    net[1].register_forward_hook(lambda module, args, out: seen.append(out))
    return of(net, lambda t, h: net(h))


@kind
def cache_dictionary() -> Specimen:
    W, cache = leaf(0.5, -0.3), {}

    def f(t: Tensor, h: Tensor) -> Tensor:
        if "W" not in cache:
            cache["W"] = W.exp()
        return -cache["W"] * h

    return Specimen(f, start(), [W])


@kind
def memoised_weights() -> Specimen:
    W = leaf(0.5, -0.3)

    @functools.lru_cache
    def weights() -> Tensor:
        return W.exp()

    return Specimen(lambda t, h: -weights() * h, start(), [W])


@kind
def memoised_by_time() -> Specimen:
    W = leaf(0.5, -0.3)

    @functools.lru_cache(None)
    def weights(t: float) -> Tensor:
        return W * math.sin(t)

    return Specimen(lambda t, h: -weights(float(t.detach())) * h, start(), [W], refused=CONTINUOUS | {"checkpointed"})


@kind
def cached_parametrization() -> Specimen:
    net = parametrizations.weight_norm(linear())
    return of(net, lambda t, h: torch.tanh(net(h)), around=parametrize.cached)


@kind
def orthogonal_parametrization() -> Specimen:
    net = parametrizations.orthogonal(linear())
    return of(net, lambda t, h: torch.tanh(net(h)))


@kind
def old_spectral_norm() -> Specimen:
    net = nn.Sequential(nn.utils.spectral_norm(linear(2, 4)), nn.Tanh(), nn.utils.spectral_norm(linear(4, 2)))
    return of(net, lambda t, h: net(h), smooth=False)  # its power iteration is detached


@kind
def new_spectral_norm() -> Specimen:
    net = nn.Sequential(parametrizations.spectral_norm(linear(2, 4)), nn.Tanh(), linear(4, 2))
    return of(net, lambda t, h: net(h), smooth=False)


@kind
def old_weight_norm() -> Specimen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.utils.weight_norm(linear())
    return of(net, lambda t, h: torch.tanh(net(h)))


@kind
def pruned() -> Specimen:
    net = nn.Sequential(linear(2, 6), nn.Tanh(), linear(6, 2))
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    return of(net, lambda t, h: net(h))


@kind
def batch_norm_in_training() -> Specimen:
    net = nn.Sequential(linear(2, 3), nn.BatchNorm1d(3, dtype=F64), nn.Tanh(), linear(3, 2))
    return of(net, lambda t, h: net(h), h0=torch.randn(5, 2, dtype=F64))


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nfe, self.layer = 0, linear()
        self.register_buffer("evaluations", torch.tensor(0.0))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        self.nfe += 1
        self.evaluations += 1
        return torch.sin(self.layer(h))


@kind
def counts_its_calls() -> Specimen:
    return of(CountsCalls())


# ----------------------------------------------------------------------------------------------------------------------
# What is used later, or exchanged
# ----------------------------------------------------------------------------------------------------------------------


@kind
def later_in_time() -> Specimen:
    W = leaf(0.7)
    return Specimen(lambda t, h: -W * h if t > 0.5 else -h, start(), [W], tolerance=1e-3)


@kind
def later_and_hidden() -> Specimen:
    W = leaf(0.7)
    ref = weakref.ref(W)
    return Specimen(lambda t, h: -ref() * h if t > 0.5 else -h, start(), [W], tolerance=1e-3)


@kind
def in_the_middle_and_hidden() -> Specimen:
    W = leaf(0.7)
    ref = weakref.ref(W)
    return Specimen(
        lambda t, h: -ref() * h if 0.3 < t < 0.5 else -h,
        start(),
        [W],
        refused=CONTINUOUS | {"checkpointed"},
        tolerance=3e-3,
    )


@kind
def encoded() -> Specimen:
    """f holds the result of an encoder, whose parameters are what is trained."""
    encoder, data = linear(), start(0.3, 0.9)
    code = torch.tanh(encoder(data))
    return of(encoder, lambda t, h: torch.sin(code * h), smooth=False)


@kind
def encoded_and_direct() -> Specimen:
    W = leaf(0.4, -0.6)
    code = W.exp()
    return Specimen(lambda t, h: torch.sin(code * h) + W * t, start(), [W], smooth=False)


@kind
def encoding_used_later() -> Specimen:
    W = leaf(0.4, -0.6)
    code = W.exp()
    return Specimen(
        lambda t, h: torch.sin(code * h) if t > 0.5 else -h,
        start(),
        [W],
        smooth=False,
        tolerance=1e-3,
        refused=CONTINUOUS | {"checkpointed"},
    )


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.context = linear(), None

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.layer(h)) * self.context


@kind
def clipped_by_a_hook() -> Specimen:
    """A hook on a parameter hears of its whole gradient, once."""
    net = nn.Sequential(linear(2, 4), nn.Tanh(), linear(4, 2))
    for q in net.parameters():
        q.register_hook(lambda g: 0.5 * g.clamp(-0.1, 0.1))
    return of(net, lambda t, h: net(h), smooth=False)


@kind
def context_exchanged_before_backward() -> Specimen:
    f, first = Conditional(), leaf(0.4, 0.9)
    f.context = first.exp()

    def exchange() -> None:
        f.context = torch.ones(2, dtype=F64)

    return Specimen(f, start(), [first, *f.parameters()], after=exchange, smooth=False)


@kind
def constant_exchanged_before_backward() -> Specimen:
    f = Conditional()
    f.context = start(0.7, 0.2)

    def exchange() -> None:
        f.context = start(-3.0, 5.0)

    return of(f, after=exchange)


@kind
def functional_call() -> Specimen:
    net = nn.Sequential(linear(2, 3), nn.Tanh(), linear(3, 2))
    params = {name: (1.2 * x.detach()).requires_grad_() for name, x in net.named_parameters()}
    around = functools.partial(nn.utils.stateless._reparametrize_module, net, params)
    return Specimen(lambda t, h: net(h), start(), list(params.values()), around=around)


@kind
def hypernetwork() -> Specimen:
    net, hyper, z = linear(), nn.Linear(3, 6, dtype=F64), start(0.2, -0.4, 0.9)

    @contextlib.contextmanager
    def around() -> Any:
        made = hyper(z)
        with nn.utils.stateless._reparametrize_module(net, {"weight": made[:4].view(2, 2), "bias": made[4:]}):
            yield

    return of(hyper, lambda t, h: torch.tanh(net(h)), around=around)


# ----------------------------------------------------------------------------------------------------------------------
# What the call does
# ----------------------------------------------------------------------------------------------------------------------


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = linear(2, 6), linear(6, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(h))).sum()


@kind
def hamiltonian() -> Specimen:
    energy, h0 = Energy(), start().requires_grad_()

    def f(t: Tensor, h: Tensor) -> Tensor:
        q, p = torch.autograd.grad(energy(h), h, create_graph=True)[0]
        return torch.stack([p, -q])

    return Specimen(f, h0, [h0, *energy.parameters()])


@kind
def hamiltonian_by_enable_grad() -> Specimen:
    energy = Energy()

    def f(t: Tensor, h: Tensor) -> Tensor:
        with torch.enable_grad():
            h = h.requires_grad_()
            q, p = torch.autograd.grad(energy(h), h, create_graph=True)[0]
        return torch.stack([p, -q])

    return of(energy, f)


@kind
def hamiltonian_by_torch_func() -> Specimen:
    energy = Energy()

    def f(t: Tensor, h: Tensor) -> Tensor:
        q, p = torch.func.grad(energy)(h)
        return torch.stack([p, -q])

    return of(energy, f)


@kind
def hamiltonian_module() -> Specimen:
    field = HamiltonianNN(nn.Sequential(linear(2, 6), nn.Tanh(), linear(6, 1, bias=False)))
    return Specimen(field, start(), list(field.parameters()))


class Lagrangian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(linear(2, 4), nn.Tanh(), linear(4, 1, bias=False))

    def forward(self, q: Tensor, v: Tensor) -> Tensor:
        return 2 * v.square().sum(-1, keepdim=True) + self.net(torch.cat([q, v], -1))


@kind
def lagrangian_module() -> Specimen:
    field = LagrangianNN(Lagrangian())

    def f(t: Tensor, h: Tensor) -> Tensor:
        return torch.cat(field(t, (h[:1], h[1:])))

    return Specimen(f, start(), list(field.parameters()))


@kind
def second_order_module() -> Specimen:
    net = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 2))
    field = SecondOrder(lambda t, q, v: net(torch.cat([q, v])) - q + torch.sin(t))
    return Specimen(field, (start(), start(0.1, 0.4)), list(net.parameters()))


class GraphConvolution(nn.Module):
    """Kipf & Welling's layer as a field, on four nodes of a path: tanh(A h W + b) - h."""

    def __init__(self) -> None:
        super().__init__()
        A = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]], dtype=F64)
        root = A.sum(1).rsqrt()
        self.register_buffer("A", root[:, None] * A * root)
        self.layer = linear()

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.A @ h)) - h


@kind
def graph_convolution() -> Specimen:
    return of(GraphConvolution(), h0=torch.randn(4, 2, dtype=F64))


@kind
def augmented_state() -> Specimen:
    field = TimeMLP([4, 5, 4]).double()
    return of(field, h0=nn.functional.pad(start(), (0, 2)))


@kind
def detached_energy() -> Specimen:
    """As programs do that take the force for a constant of the graph."""
    energy, scale = Energy(), leaf(0.8)

    def f(t: Tensor, h: Tensor) -> Tensor:
        with torch.enable_grad():
            x = h.detach().requires_grad_()
            force = torch.autograd.grad(energy(x), x, create_graph=True)[0]
        return -scale * force + h.flip(0)

    return Specimen(f, start(), [scale, *energy.parameters()], smooth=False)


@kind
def divergence() -> Specimen:
    """FFJORD's field: the log-density beside the state, gradients turned on for the arguments themselves."""
    net = nn.Sequential(linear(2, 5), nn.Tanh(), linear(5, 2))

    def f(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        with torch.enable_grad():
            x.requires_grad_(True)
            t.requires_grad_(True)
            dx = net(x) * torch.cos(t)
            trace = sum(torch.autograd.grad(dx[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return dx, -trace

    return of(net, f, h0=(torch.randn(3, 2, dtype=F64), torch.zeros(3, dtype=F64)))


@kind
def tuple_state() -> Specimen:
    k = leaf(1.3)
    return Specimen(lambda t, h: (h[1], -k * torch.sin(h[0])), (start(0.5), start(0.0)), [k])


@kind
def dictionary_state() -> Specimen:
    k = leaf(1.3)

    def f(t: Tensor, h: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"q": h["v"], "v": -k * torch.sin(h["q"])}

    return Specimen(f, {"q": start(0.5), "v": start(0.0)}, [k])


@kind
def complex_state() -> Specimen:
    H = leaf(0.9, 0.3)
    return Specimen(
        lambda t, h: -1j * H * h + 0.1 * h.flip(0), torch.tensor([1 + 0.5j, 0.2j], dtype=torch.complex128), [H]
    )


@kind
def number_state() -> Specimen:
    k = leaf(0.8)
    return Specimen(lambda t, h: -k[0] * h * t, torch.tensor(1.2, dtype=F64), [k])


@kind
def written_in_place() -> Specimen:
    p = leaf(0.3)

    def f(t: Tensor, h: Tensor) -> Tensor:
        d = torch.zeros_like(h)
        d[0] = h[1]
        d[1] = -h[0] - p[0] * h[1]
        return d

    return Specimen(f, start(), [p])


@kind
def recurrent_cell() -> Specimen:
    cell = nn.GRUCell(1, 3, dtype=F64)
    return of(cell, lambda t, h: cell(torch.sin(t).reshape(1, 1), h) - h, h0=torch.randn(1, 3, dtype=F64))


@kind
def attention() -> Specimen:
    net = nn.MultiheadAttention(4, 2, batch_first=True, dtype=F64)
    return of(net, lambda t, h: net(h, h, h, need_weights=False)[0] - h, h0=torch.randn(1, 3, 4, dtype=F64))


@kind
def normalised_layers() -> Specimen:
    net = nn.Sequential(linear(2, 4), nn.LayerNorm(4, dtype=F64), nn.SiLU(), linear(4, 2))
    return of(net, lambda t, h: net(h), h0=torch.randn(3, 2, dtype=F64))


@kind
def convolution() -> Specimen:
    net = nn.Conv1d(1, 1, 3, padding=1, dtype=F64)
    return of(net, lambda t, h: torch.tanh(net(h)), h0=torch.randn(1, 1, 6, dtype=F64))


@kind
def graph_network() -> Specimen:
    net, edges = linear(), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])

    def f(t: Tensor, h: Tensor) -> Tensor:
        return torch.zeros_like(h).index_add(0, edges[1], torch.tanh(net(h[edges[0]]))) - h

    return of(net, f, h0=torch.randn(4, 2, dtype=F64))


@kind
def sparse_matrix() -> Specimen:
    W = leaf(0.4)
    A = torch.sparse_coo_tensor([[0, 1], [1, 0]], [1.0, -2.0], (2, 2), dtype=F64, check_invariants=True).coalesce()
    return Specimen(lambda t, h: W * torch.sparse.mm(A, h[:, None])[:, 0], start(), [W])


@kind
def checkpointed() -> Specimen:
    net = nn.Sequential(linear(2, 4), nn.Tanh(), linear(4, 2))
    return of(net, lambda t, h: checkpoint(net, h, use_reentrant=False))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@kind
def own_function() -> Specimen:
    W = leaf(0.4, 0.9)
    return Specimen(lambda t, h: -Cube.apply(W * h), start(), [W])


@kind
def partly_detached() -> Specimen:
    a, b = linear(), linear()
    return Specimen(
        lambda t, h: torch.tanh(a(h)) + b(h).detach(), start(), [*a.parameters(), *b.parameters()], smooth=False
    )


@kind
def partly_without_gradient() -> Specimen:
    W = leaf(0.5, -0.2)

    def f(t: Tensor, h: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(5 * h)
        return W * h * gate

    return Specimen(f, start(), [W], smooth=False)


@kind
def interpolated_data() -> Specimen:
    k, times = leaf(0.9), torch.linspace(0, 1, 5, dtype=F64)
    values = leaf(0.0, 0.4, -0.3, 0.8, 0.2)

    def f(t: Tensor, h: Tensor) -> Tensor:
        i = torch.searchsorted(times, t.detach().clamp(1e-9, 1)) - 1
        rate = (values[i + 1] - values[i]) / 0.25
        return -k * h + values[i] + rate * (t - times[i])

    return Specimen(f, start(), [k, values], tolerance=1e-3)  # steps go over the kinks of the data


class Shared(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h)


@kind
def shared_and_unused() -> Specimen:
    layer = linear()
    f = Shared(nn.Sequential(layer, nn.Tanh(), layer))
    f.unused = linear()
    return of(f)


@kind
def tangent_inside() -> Specimen:
    net = nn.Sequential(linear(2, 4), nn.Tanh(), linear(4, 2))

    def f(t: Tensor, h: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: net(x), (h,), (torch.ones_like(h),))[1]

    return of(net, f)


@kind
def mapped_inside() -> Specimen:
    net = linear()
    return of(net, lambda t, h: torch.func.vmap(lambda x: torch.tanh(net(x)))(h), h0=torch.randn(3, 2, dtype=F64))
