"""The law of gradients, over all kinds of vector fields: the gradient of every method and engine is that of
`adjoint=False`, which is that of finite differences, or an error says why there is none."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GENERAL
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from zoo import CONTINUOUS, F64, ZOO, Energy, Specimen

import pyjlode
from pyjlode.bridge import engine as julia_engine
from pyjlode.errors import GradientUnavailable, NotCompiled
from pyjlode.native import sensitivity

TIMES = torch.tensor([0.0, 0.35, 0.7, 1.0], dtype=F64)
TIGHT = {"rtol": 1e-7, "atol": 1e-9}
# What is compared to four digits. Julia's are asked for more, against the same.
LOOSE = {"rtol": 1e-6, "atol": 1e-8}

# PyTorch's own: by torch.func.jvp, and by batched backward passes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:f kept its argument"),
]

# True is "discrete", to the last bit: `test_adjoint_true_is_the_recommended_one`.
DIFFERENT = [True, *(name for name in GENERAL if name != "discrete")]
every_kind = pytest.mark.parametrize("kind", ZOO)


def loss_of(x: Specimen, **kwargs) -> Tensor:
    """A loss of all states at all times."""
    with x.around():
        ys = pyjlode.odeint(x.f, x.h0, kwargs.pop("t", TIMES), **{**LOOSE, **kwargs})
    x.after()
    total = torch.zeros((), dtype=F64)
    for leaf in pytree.tree_leaves(ys):
        leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        total = total + (torch.linspace(1, 2, leaf.numel(), dtype=F64) * leaf.reshape(-1)).sum()
    return total


def gradient_of(kind: str, **kwargs) -> Tensor:
    """By all leaves, one after the other; zero where a leaf has none."""
    x = ZOO[kind]()
    grads = torch.autograd.grad(loss_of(x, **kwargs), x.leaves, allow_unused=True)
    return torch.cat([(torch.zeros_like(q) if g is None else g).reshape(-1) for q, g in zip(x.leaves, grads)])


def close(found: Tensor, right: Tensor, tolerance: float) -> bool:
    return bool(torch.linalg.vector_norm(found - right) <= tolerance * torch.linalg.vector_norm(right))


REFERENCE: dict[str, Tensor] = {}


def reference(kind: str) -> Tensor:
    if kind not in REFERENCE:
        REFERENCE[kind] = gradient_of(kind, adjoint=False)
    return REFERENCE[kind]


def test_there_are_many_kinds():
    assert len(ZOO) >= 50


@pytest.mark.parametrize("kind", [name for name, make in ZOO.items() if make().smooth])
def test_differentiating_through_the_solver_is_right(kind):
    eps, directions = 1e-3, None
    values = []
    for k in (-2, -1, 1, 2):
        x = ZOO[kind]()
        generator = torch.Generator().manual_seed(5)
        directions = [torch.randn(q.shape, generator=generator, dtype=F64) for q in x.leaves]
        with torch.no_grad():
            for q, d in zip(x.leaves, directions):
                q += k * eps * d
        try:
            values.append(loss_of(x, rtol=1e-8, atol=1e-10).detach())
        finally:
            with torch.no_grad():  # some are global
                for q, d in zip(x.leaves, directions):
                    q -= k * eps * d
    slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * eps)
    along = torch.cat([d.reshape(-1) for d in directions])
    size = float(torch.linalg.vector_norm(reference(kind)) * torch.linalg.vector_norm(along))
    assert abs(float(reference(kind) @ along - slope)) <= ZOO[kind]().tolerance * size


def check(kind: str, tolerance: float = 0.0, **kwargs) -> None:
    x = ZOO[kind]()
    try:
        found = gradient_of(kind, **kwargs)
    except GradientUnavailable:
        refused = x.refused
        if refused and kwargs.get("engine") == "julia":  # it records nothing of a solve, which the native engine may do
            refused = refused | {"discrete", "checkpointed"}
        assert kwargs["adjoint"] in refused
        return
    assert close(found, reference(kind), max(x.tolerance, tolerance))


def in_turn():
    """Every kind with every gradient; of the continuous ones, which ask f for the same products, one in turn."""
    turns = itertools.cycle([{name} for name in sorted(CONTINUOUS)])
    for kind, now in zip(ZOO, turns):
        for adjoint in DIFFERENT:
            marks = [pytest.mark.slow] if adjoint in CONTINUOUS - now else []
            yield pytest.param(kind, adjoint, marks=marks)


@pytest.mark.parametrize(("kind", "adjoint"), [*in_turn()], ids=str)
def test_every_gradient_is_the_same(kind, adjoint):
    check(kind, adjoint=adjoint)


@every_kind
def test_steps_taken_again_are_the_same(kind, monkeypatch):
    """Where the graph of no step is kept."""
    monkeypatch.setattr(sensitivity, "GRAPH_BUDGET", 0)
    x = ZOO[kind]()
    try:
        found = gradient_of(kind, adjoint="discrete")
    except GradientUnavailable:
        assert x.refused
        return
    assert close(found, reference(kind), 1e-9)


@every_kind
@pytest.mark.parametrize("adjoint", julia_engine.GRADIENTS)
@pytest.mark.parametrize("compile", [False, None], ids=["called-back", "compiled"])
def test_every_gradient_is_the_same_on_julia(kind, adjoint, compile, julia):
    # SciML's quadrature in each step does not see the kinks of f.
    tolerance = 1e-3 if kind == "interpolated_data" and adjoint == "gauss" else 0.0
    for _ in range(2 if compile is None else 1):  # the second solve of a field is compiled
        check(kind, tolerance, adjoint=adjoint, engine="julia", compile=compile, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("adjoint", [True, *sorted(CONTINUOUS | {"forward"})])
def test_kinks_at_known_times_are_seen_on_julia(adjoint, julia):
    options = {"jump_t": TIMES.new_tensor([0.25, 0.5, 0.75])}
    check("interpolated_data", adjoint=adjoint, engine="julia", rtol=1e-8, atol=1e-10, options=options)


# The stages of one step as one graph: where tensors lie, what is kept of a call, and what the call does.
IN_GRAPHS = [
    "closure",
    "counts_its_calls",
    "hamiltonian",
    "partly_detached",
    "interpolated_data",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in (
            "behind_a_weak_reference",
            "encoded_and_direct",
            "context_exchanged_before_backward",
            "hypernetwork",
            "written_in_place",
            "attention",
            "shared_and_unused",
        )
    ),
]
NO_GRAPHS = [
    "keeps_its_last_result",
    "memoised_weights",
    "old_spectral_norm",
    "later_in_time",
    "divergence",
    "complex_state",
    "sparse_matrix",
]


@pytest.mark.parametrize("kind", IN_GRAPHS)
def test_every_gradient_is_the_same_in_compiled_steps(kind, monkeypatch):
    monkeypatch.setattr(torch._inductor, "compile", lambda module, inputs, options: module)  # as it is: seconds faster
    how = {"method": "adaptive_heun", "rtol": 1e-2, "atol": 1e-4, "adjoint": True}
    assert close(gradient_of(kind, compile=True, **how), gradient_of(kind, **how), 1e-10)


@pytest.mark.parametrize("kind", NO_GRAPHS)
def test_steps_are_not_compiled_wrong(kind):
    with pytest.raises(NotCompiled):
        gradient_of(kind, compile=True)


@settings(max_examples=2 * settings().max_examples)
@given(
    st.sampled_from(sorted(ZOO)),
    st.sampled_from(sorted(GENERAL)),
    st.sampled_from(["tsit5", "vern7", "rk4", "bosh3", "rodas5p", "radau5", "kvaerno5", "bdf"]),
    st.booleans(),
)
def test_the_law_over_methods_and_directions(kind, adjoint, method, backward):
    x = ZOO[kind]()
    kwargs: dict = {"method": method, "rtol": 1e-6, "atol": 1e-8, "t": TIMES.flip(0) if backward else TIMES}
    if method == "rk4":
        kwargs["options"] = {"step_size": 0.02}
    stiff = pyjlode.METHODS[method].controlled
    # Of a checkpoint PyTorch takes no second derivative, which the Jacobian of a recorded stiff step needs.
    if stiff and (adjoint == "backsolve" or kind == "checkpointed"):
        return
    if adjoint == "checkpointed" and not pyjlode.METHODS[method].alone:
        return
    right = gradient_of(kind, adjoint=False, **kwargs)
    try:
        found = gradient_of(kind, adjoint=adjoint, **kwargs)
    except GradientUnavailable:
        assert x.refused
        return
    assert close(found, right, max(1e-3, 3 * x.tolerance))


# ----------------------------------------------------------------------------------------------------------------------
# Programs
# ----------------------------------------------------------------------------------------------------------------------

every_adjoint = pytest.mark.parametrize("adjoint", DIFFERENT, ids=str)


def train(adjoint, *, steps: int = 3, around=None, method: str = "dopri5") -> Tensor:
    """Parameters after a few steps of training on a spiral."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 2, dtype=F64))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        ys = pyjlode.odeint(
            lambda t, h: net(h**3), torch.tensor([2.0, 0.0], dtype=F64), TIMES, adjoint=adjoint, **TIGHT
        )
        ys.square().mean().backward()
        optimizer.step()
    return torch.cat([q.detach().reshape(-1) for q in net.parameters()])


def test_the_graph_of_a_long_solve_fits_on_the_stack():
    """PyTorch frees it in a recursion."""
    net = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(1, 1, dtype=F64), nn.Tanh())])
    options = {"step_size": 1 / 500}
    ys = pyjlode.odeint(
        lambda t, h: net(h), torch.ones(1, dtype=F64), TIMES, method="rk4", adjoint=True, options=options
    )
    assert all(g.isfinite().all() for g in torch.autograd.grad(ys.sum(), list(net.parameters())))


@every_adjoint
def test_training_ends_where_it_ends_through_the_solver(adjoint):
    assert close(train(adjoint), train(False), 1e-5)


@every_adjoint
def test_two_solves_with_one_field_and_one_backward_pass(adjoint):
    def gradients(adjoint):
        f = Energy()
        with torch.no_grad():
            for i, q in enumerate(f.parameters()):
                q.copy_(torch.linspace(-1, 1, q.numel(), dtype=F64).view_as(q) * (i + 1) / 2)
        field = lambda t, h: f.scale * torch.tanh(f.inner(h))[:2]  # noqa: E731
        total, codes = torch.zeros((), dtype=F64), [torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.3, 0.9)]
        for code in codes:
            f.scale = code.exp()
            total = total + pyjlode.odeint(field, torch.ones(2, dtype=F64), TIMES, adjoint=adjoint, **TIGHT)[-1].sum()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, [*codes, f.inner.weight])])

    assert close(gradients(adjoint), gradients(False), 1e-5)


@every_adjoint
def test_adapting_by_a_gradient_step_inside(adjoint):
    """Model-agnostic meta-learning: the gradient by what the inner step began from, of first order in that step."""

    def outer(adjoint):
        torch.manual_seed(4)
        net = nn.Linear(2, 2, dtype=F64)
        params = dict(net.named_parameters())
        inner = pyjlode.odeint(lambda t, h: torch.tanh(net(h)), torch.ones(2, dtype=F64), TIMES, **TIGHT)
        grads = torch.autograd.grad(inner.square().sum(), list(params.values()), create_graph=True)
        fast = {name: q - 0.1 * g for (name, q), g in zip(params.items(), grads)}

        class Solve(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, h):
                return pyjlode.odeint(lambda t, h: torch.tanh(self.net(h)), h, TIMES, adjoint=adjoint, **TIGHT)

        named = {f"net.{name}": q for name, q in fast.items()}
        ys = torch.func.functional_call(Solve(), named, (torch.full((2,), 0.5, dtype=F64),))
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(ys.square().sum(), list(params.values()))])

    assert close(outer(adjoint), outer(False), 1e-5)


@every_adjoint
def test_a_backward_pass_twice(adjoint):
    W = torch.tensor(0.7, dtype=F64, requires_grad=True)
    ys = pyjlode.odeint(lambda t, h: -W * h, torch.ones(1, dtype=F64), TIMES, adjoint=adjoint, **TIGHT)
    first = torch.autograd.grad(ys.sum(), W, retain_graph=True)[0]
    second = torch.autograd.grad(ys.sum(), W)[0]
    assert torch.equal(first, second)


@every_adjoint
def test_freezing_in_between_takes_no_gradient_from_the_rest(adjoint):
    """As programs do that train two networks in turn."""
    x = ZOO["module"]()
    loss, (frozen, *rest) = loss_of(x, adjoint=adjoint), x.leaves
    frozen.requires_grad_(False)
    loss.backward()
    assert frozen.grad is None
    found = torch.cat([q.grad.reshape(-1) for q in rest])
    assert close(found, reference("module")[frozen.numel() :], 1e-4)


@every_adjoint
def test_checkpointing_the_solve_itself(adjoint):
    x = ZOO["module"]()
    ys = checkpoint(
        lambda h: pyjlode.odeint(x.f, h, TIMES, adjoint=adjoint, **LOOSE), x.h0.requires_grad_(), use_reentrant=False
    )
    loss = (torch.linspace(1, 2, ys.numel(), dtype=F64) * ys.reshape(-1)).sum()
    grads = torch.autograd.grad(loss, x.leaves)
    assert close(torch.cat([g.reshape(-1) for g in grads]), reference("module"), 1e-4)


@every_adjoint
@pytest.mark.parametrize("method", ["dopri5", "rk4", "rodas5p", "kvaerno5", "bdf"])
def test_validation_under_inference_mode_comes_first(adjoint, method):
    """As trainers do for a check of sanity."""
    row = pyjlode.METHODS[method]
    if (adjoint == "backsolve" and row.controlled) or (adjoint == "checkpointed" and not row.alone):
        return
    x = ZOO["module"]()
    t, kwargs = TIMES.clone().requires_grad_(), {"method": method, "rtol": 1e-5, "atol": 1e-6}
    with torch.inference_mode():
        pyjlode.odeint(x.f, x.h0, t, adjoint=adjoint, **kwargs)
    pyjlode.odeint(x.f, x.h0, t, adjoint=adjoint, **kwargs).sum().backward()
    assert t.grad is not None
    assert all(q.grad is not None for q in x.leaves)


@every_adjoint
def test_a_retained_gradient_is_the_whole_one(adjoint):
    W = torch.tensor([0.5, 0.3], dtype=F64, requires_grad=True)
    code = W.exp()
    code.retain_grad()
    ys = pyjlode.odeint(lambda t, h: torch.cos(t) - code * h, torch.ones(2, dtype=F64), TIMES, adjoint=adjoint, **TIGHT)
    ys.square().sum().backward()
    torch.testing.assert_close(code.grad, W.grad / code.detach())


@every_adjoint
def test_a_copy_of_a_trained_model_trains(adjoint):
    x = ZOO["keeps_its_last_result"]()
    loss_of(x, adjoint=adjoint).backward()
    x.f.last = x.f.cache = None
    twin = copy.deepcopy(x.f)
    twin.zero_grad()
    loss_of(Specimen(twin, x.h0, list(twin.parameters())), adjoint=adjoint).backward()
    for a, b in zip(x.f.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_a_field_that_leaves_pytorch_says_so():
    net = nn.Linear(2, 2, dtype=F64)
    with pytest.warns(UserWarning, match="not trained"):
        ys = pyjlode.odeint(lambda t, h: net(h).detach(), torch.ones(2, dtype=F64), TIMES, adjoint=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        ys.sum().backward()


@pytest.mark.parametrize("adjoint", sorted(CONTINUOUS))
def test_a_random_field_has_no_adjoint(adjoint):
    net = nn.Sequential(nn.Linear(2, 16, dtype=F64), nn.Dropout(0.5), nn.Linear(16, 2, dtype=F64))
    kwargs = {"method": "rk4", "options": {"step_size": 0.1}}
    ys = pyjlode.odeint(lambda t, h: net(h), torch.ones(2, dtype=F64), TIMES, adjoint=adjoint, **kwargs)
    with pytest.raises(GradientUnavailable, match="random"):
        ys.sum().backward()


def test_steps_taken_again_notice_another_field(monkeypatch):
    monkeypatch.setattr(sensitivity, "GRAPH_BUDGET", 0)
    scale, W = [1.0], torch.tensor(0.7, dtype=F64, requires_grad=True)
    ys = pyjlode.odeint(lambda t, h: -W * scale[0] * h, torch.ones(2, dtype=F64), TIMES, adjoint="discrete")
    scale[0] = 2.0
    with pytest.raises(GradientUnavailable, match="other values"):
        ys.sum().backward()


def test_nothing_that_needs_no_gradient_gets_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ys = pyjlode.odeint(lambda t, h: -h, torch.ones(2, dtype=F64), TIMES, adjoint=True)
    assert not ys.requires_grad


@pytest.mark.parametrize("adjoint", [False, True, "backsolve", "gauss"])
def test_a_time_in_a_list_has_its_gradient(adjoint):
    end = torch.tensor(1.0, dtype=F64, requires_grad=True)
    ys = pyjlode.odeint(lambda t, h: -t * h, torch.ones(1, dtype=F64), [0.0, 0.5, end], adjoint=adjoint, **TIGHT)
    (g,) = torch.autograd.grad(ys[-1].sum(), end)
    assert float(g) == pytest.approx(-0.6065306597, rel=1e-6)


@pytest.mark.parametrize("adjoint", [False, True, *GENERAL])
def test_params_that_lie_behind_what_f_holds(adjoint):
    W = torch.tensor(0.3, dtype=F64, requires_grad=True)
    c = W.exp()
    d = c.sin()
    ys = pyjlode.odeint(
        lambda t, h: -d * h, torch.ones(1, dtype=F64), TIMES, adjoint=adjoint, adjoint_params=(c,), **TIGHT
    )
    (g,) = torch.autograd.grad(ys[-1].sum(), W)
    right = -torch.exp(-d) * torch.cos(c) * c  # y(1) = exp(-d)
    assert float(g) == pytest.approx(float(right.detach()), rel=1e-6)
