"""Gradients that replay a solve without its states: `checkpointed` and `reversible` are `discrete` to rounding, in
memory that does not grow with the number of steps, or hardly."""

import math

import pytest
import torch
from torch import nn

from pyjlode import METHODS, SecondOrder, errors, odeint, odeint_event, solve
from pyjlode.native import checkpoints
from pyjlode.native.checkpoints import Point, place, slots

F64 = torch.float64
ALONE = [m.name for m in METHODS.values() if m.alone and m.kind != "second"]
SECOND = [m.name for m in METHODS.values() if m.kind == "second"]
REVERSIBLE = [m.name for m in METHODS.values() if m.reversible]


def net(n):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, 12), nn.Tanh(), nn.Linear(12, n)).double()


def gradient(method, adjoint, steps=40, **options):
    """Of a field that depends on time, by h0, t and all parameters; over about so many steps."""
    layers = net(2)
    h0 = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.9, 1.2, 3.0], dtype=F64, requires_grad=True)
    row = METHODS[method]
    size = 3 / steps
    given = {"max_step": size, **options} if row.adaptive else {"step_size": size, **options}
    f, state = (lambda t, h: layers(h) * torch.cos(t) - 0.1 * h**3), h0
    if row.kind == "second":
        f, state = SecondOrder(lambda t, q, v: layers(q) * torch.cos(t) - q), (h0, 1 - h0)
    s = solve(
        f, state, t, method=method, adjoint=adjoint, engine="torch", rtol=1e-6, atol=1e-6, options=given, dense=False
    )
    h = torch.cat(s.h, 1) if row.kind == "second" else s.h
    found = torch.autograd.grad(h.square().sum(), [h0, t, *layers.parameters()])
    return torch.cat([x.reshape(-1) for x in found]), s.stats


@pytest.mark.parametrize("method", [*ALONE, *SECOND])
def test_checkpointed_is_discrete(method):
    right, stats = gradient(method, "discrete")
    found, _ = gradient(method, "checkpointed")
    assert stats.naccept >= 40 > slots(40)
    assert float((found - right).abs().max()) < 1e-13 * float(right.abs().max())


@pytest.mark.parametrize("method", REVERSIBLE)
@pytest.mark.parametrize("options", [{}, {"perturb": True}], ids=str)
def test_reversible_is_discrete(method, options):
    right, _ = gradient(method, "discrete", **options)
    found, _ = gradient(method, "reversible", **options)
    assert float((found - right).abs().max()) < 1e-11 * float(right.abs().max())


@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_over_jumps(method):
    right, _ = gradient(method, "discrete", jump_t=[0.7, 1.5])
    found, _ = gradient(method, "checkpointed", jump_t=[0.7, 1.5])
    assert float((found - right).abs().max()) < 1e-13 * float(right.abs().max())


def test_memory_and_work():
    """States at once are at most `slots`, and few steps are taken again for each step; of any number of steps."""
    for steps in (1, 2, 3, 7, 20, 64, 150, 700, 2500):
        points, most, taken = [], 0, 0
        for i in range(steps):
            place(points, Point(i, torch.empty(0), math.inf if i == 0 else 0), slots(i))
            most = max(most, len(points))
        for i in reversed(range(steps)):
            at = points[-1].i
            for j in range(at + 1, i + 1):
                taken += 1
                if j < i:
                    place(points, Point(j, torch.empty(0), 0), slots(steps))
                most = max(most, len(points))
            if points[-1].i == i:
                points.pop()
        assert not points
        assert most <= slots(steps) <= 8 + 4 * math.log2(steps)
        assert taken <= 2 * steps


@pytest.mark.parametrize(("adjoint", "method"), [("checkpointed", "rk4"), ("reversible", "yoshida4")])
def test_no_more_states_are_alive(adjoint, method, monkeypatch):
    """Counted where they are kept: the solve itself holds no others."""
    kept = checkpoints.Checkpoints if adjoint == "checkpointed" else checkpoints.Reversed
    made = []
    start = kept.__init__
    monkeypatch.setattr(kept, "__init__", lambda self, p: (made.append(self), start(self, p))[1])
    gradient(method, adjoint, steps=400)
    (keeper,) = made
    assert len(keeper) == 400
    assert adjoint == "reversible" or not keeper.points  # let go as they were used


@pytest.mark.parametrize(("adjoint", "method"), [("checkpointed", "dopri5"), ("reversible", "yoshida4")])
def test_a_second_backward_pass(adjoint, method):
    k = torch.tensor(1.3, dtype=F64, requires_grad=True)
    h0 = (torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64))
    t = torch.tensor([0.0, 5.0], dtype=F64)
    options = {"max_step": 0.05} if method == "dopri5" else {"step_size": 0.05}
    q, _ = odeint(SecondOrder(lambda t, q, v: -k * torch.sin(q)), h0, t, method=method, adjoint=adjoint,
                  engine="torch", options=options)  # fmt: skip
    loss = q[-1].square().sum()
    first = torch.autograd.grad(loss, k, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, k)[0], first)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
@pytest.mark.parametrize(("adjoint", "method"), [("checkpointed", "dopri5"), ("checkpointed", "rk4"),
                                                 ("reversible", "kahan_li6")])  # fmt: skip
def test_events(adjoint, method, sign):
    """A pendulum's quarter period, and what it depends on."""

    def found(adjoint):
        q0 = torch.tensor(1.1, dtype=F64, requires_grad=True)
        k = torch.tensor(2.0, dtype=F64, requires_grad=True)
        t, (_, v) = odeint_event(
            SecondOrder(lambda t, q, v: -k * torch.sin(q)), (q0, torch.zeros_like(q0)), 0.0,
            event_fn=lambda t, h: h[0], reverse_time=sign < 0, method=method, adjoint=adjoint, engine="torch",
            options={"max_step": 0.02} if method == "dopri5" else {"step_size": 0.02},
        )  # fmt: skip
        return torch.stack(torch.autograd.grad(t + v[-1], [q0, k]))

    assert torch.allclose(found(adjoint), found("discrete"), rtol=1e-11)


def test_a_batch_has_common_steps():
    h0 = torch.linspace(0.1, 1, 6, dtype=F64).reshape(3, 2).requires_grad_()
    t = torch.linspace(0, 2, 5, dtype=F64)
    given = {"method": "dopri5", "options": {"batch_dims": 1, "max_step": 0.05}, "engine": "torch"}
    s = solve(lambda t, h: -(h**3), h0, t, adjoint="checkpointed", dense=False, **given)
    assert "checkpointed" in s.stats.reason
    right = torch.autograd.grad(odeint(lambda t, h: -(h**3), h0, t, rtol=1e-10, atol=1e-10).sum(), h0)[0]
    assert torch.allclose(torch.autograd.grad(s.h.sum(), h0)[0], right, rtol=1e-6)
    with pytest.raises(errors.BadOption, match="t with a row for each system"):
        odeint(lambda t, h: -(h**3), h0, t.expand(3, 5), adjoint="checkpointed", **given)


def test_a_way_back_that_rounding_loses_is_refused():
    """A chaotic one: a pendulum that is driven."""
    q0 = torch.tensor([1e-3], dtype=F64, requires_grad=True)
    f = SecondOrder(lambda t, q, v: -10 * torch.sin(q) + 15 * torch.cos(2 * t))
    t = torch.tensor([0.0, 100.0], dtype=F64)
    q, _ = odeint(f, (q0, torch.zeros(1, dtype=F64)), t, method="velocity_verlet", options={"step_size": 0.05},
                  adjoint="reversible")  # fmt: skip
    with pytest.raises(errors.GradientUnavailable, match="checkpointed"):
        q[-1].sum().backward()


def test_a_random_field_is_found_out():
    drop, layers = nn.Dropout(0.5), net(2)
    h = odeint(lambda t, h: drop(layers(h)), torch.ones(2, dtype=F64), torch.tensor([0.0, 1.0]), method="rk4",
               options={"step_size": 0.02}, adjoint="checkpointed", engine="torch")  # fmt: skip
    with pytest.raises(errors.GradientUnavailable, match="random"):
        h.sum().backward()


@pytest.mark.parametrize("method", ["bdf", "radau5", "kvaerno5", "auto", "explicit_adams"])
def test_methods_whose_steps_lean_on_earlier_ones_are_refused(method):
    with pytest.raises(errors.BadOption, match="earlier steps left"):
        gradient(method, "checkpointed")


def test_what_else_is_refused():
    with pytest.raises(errors.BadOption, match="symplectic"):
        gradient("dopri5", "reversible")
    with pytest.raises(errors.BadOption, match="symplectic"):
        gradient("nystrom4", "reversible")
    with pytest.raises(errors.NotCompiled, match="checkpointed"):
        odeint(lambda t, h: -h, torch.ones(1, requires_grad=True), torch.tensor([0.0, 1.0]), adjoint="checkpointed",
               compile=True, engine="torch")  # fmt: skip
