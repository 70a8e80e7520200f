"""Events that go on: times, states and gradients against closed forms and finite differences."""

import copy
import math
import pickle

import pytest
import torch
from problems import GENERAL, thrown_ball

import pyjlode
from pyjlode import At, Event, solve
from pyjlode.errors import (
    BadDtype,
    BadOption,
    BadShape,
    BadTime,
    GradientUnavailable,
    MaxStepsReached,
    NonFiniteState,
    TooManyEvents,
)

F64 = torch.float64
G = 9.81
TIGHT = {"rtol": 1e-9, "atol": 1e-10, "engine": "torch"}
every_gradient = pytest.mark.parametrize("adjoint", [False, True, *GENERAL], ids=str)


def fall(t, h):
    return torch.stack([h[1], -G * torch.ones_like(h[1])])


def bounce(kept):
    return Event(lambda t, h: h[0], lambda t, h: torch.stack([h[0], -kept * h[1]]), direction=-1)


def bounces(end, kept=0.8):
    """Closed form: the times of the bounces of a ball dropped from 1 m, and its speed after each."""
    t, speed, found = math.sqrt(2 / G), math.sqrt(2 * G), []
    while t < end:
        speed *= kept
        found.append((t, speed))
        t += 2 * speed / G
    return found


def turn(t, h):
    return torch.stack([h[1], -h[0]])


CIRCLE = torch.tensor([0.0, 1.0], dtype=F64)  # h = (sin t, cos t)


def times(solution):
    return [float(x.t) for x in solution.events]


@pytest.mark.parametrize("method", ["dopri5", "vern7", "rk4", "rodas5p", "bdf"])
def test_bouncing_ball(method):
    options = {"step_size": 0.01, "interp": "cubic"} if method == "rk4" else None
    t = torch.linspace(0, 3, 31, dtype=F64)
    got = solve(
        fall, torch.tensor([1.0, 0.0], dtype=F64), t, events=[bounce(0.8)], method=method, options=options, **TIGHT
    )
    want = bounces(3.0)
    assert times(got) == pytest.approx([x for x, _ in want], rel=1e-7)
    assert [float(x.after[1]) for x in got.events] == pytest.approx([x for _, x in want], rel=1e-6)
    assert [float(x.before[1]) for x in got.events] == pytest.approx([-x / 0.8 for _, x in want], rel=1e-6)
    for moment, h in zip(t.tolist(), got.h):
        before = [(s, v) for s, v in want if s < moment]
        s, v = before[-1] if before else (-math.sqrt(2 / G), math.sqrt(2 * G))
        assert float(h[0]) == pytest.approx(v * (moment - s) - G / 2 * (moment - s) ** 2, abs=1e-6)


def both(theta, adjoint, method="dopri5"):
    """A loss of the outputs and the events of the thrown ball."""
    f, h0, t, events = thrown_ball(theta)
    got = solve(f, h0, t, events=events, adjoint=adjoint, method=method, dense=False, **TIGHT)
    assert [x.index for x in got.events] == [0, 1, 0, 0]
    loss = (got.h[:, 0] * torch.arange(4)).sum() + 0.7 * got.h[-1, 1] + 0.3 * got.h[2, 1]
    return (
        loss + sum((k + 1) * x.t for k, x in enumerate(got.events)) + got.events[2].before[1] * got.events[1].after[1]
    )


THETA = torch.tensor([9.81, 0.8, 1.0, 1.3, 0.7, 1.5], dtype=F64)


@pytest.fixture(scope="module")
def differences():
    """The gradient of `both` by finite differences."""
    with torch.no_grad():
        steps = 1e-5 * torch.eye(6, dtype=F64)
        return torch.stack([(both(THETA + e, False) - both(THETA - e, False)) / 2e-5 for e in steps])


@every_gradient
def test_gradient_through_bounces_and_pushes(adjoint, differences):
    theta = THETA.clone().requires_grad_()
    both(theta, adjoint).backward()
    torch.testing.assert_close(theta.grad, differences, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adjoint", [False, True, "gauss"], ids=str)
@pytest.mark.parametrize("method", ["vern7", "rodas5p", "radau5", "bdf", "kvaerno5", "auto"])
def test_gradient_by_every_kind_of_method(method, adjoint, differences):
    theta = THETA.clone().requires_grad_()
    both(theta, adjoint, method).backward()
    torch.testing.assert_close(theta.grad, differences, rtol=1e-6, atol=2e-6)


def test_second_derivative_through_events():
    def first(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(both(x, False), x, create_graph=True)[0]

    d = torch.tensor([0.3, 0.1, 0.2, 0.1, -0.2, 0.3], dtype=F64)
    x = THETA.clone().requires_grad_()
    (slope,) = torch.autograd.grad(both(x, False), x, create_graph=True)
    (got,) = torch.autograd.grad(slope, x, d)
    torch.testing.assert_close(got, (first(THETA + 1e-5 * d) - first(THETA - 1e-5 * d)) / 2e-5, rtol=1e-5, atol=1e-5)


@every_gradient
def test_saltation(adjoint):
    """f and the affect change at the event: h' = 1 up to h = 1, then h' = 2 from h = a."""
    h0 = torch.tensor([0.2, 1.0], dtype=F64, requires_grad=True)  # a position and the speed
    a = torch.tensor(3.0, dtype=F64, requires_grad=True)
    switch = Event(lambda t, h: h[0] - 1, lambda t, h: torch.stack([a, 2 * h[1]]), direction=1)
    got = solve(
        lambda t, h: torch.stack([h[1], 0 * h[1]]),
        h0,
        torch.tensor([0.0, 0.5, 2.0], dtype=F64),
        events=[switch],
        adjoint=adjoint,
        **TIGHT,
    )
    # h(2) = a + 2 v (2 - (1 - x) / v)
    assert float(got.h[2, 0].detach()) == pytest.approx(3 + 2 * (2 - 0.8), rel=1e-9)
    by_h0, by_a = torch.autograd.grad(got.h[2, 0], (h0, a))
    assert by_h0.tolist() == pytest.approx([2.0, 4.0], rel=1e-7)
    assert float(by_a) == pytest.approx(1.0)


@pytest.mark.parametrize("adjoint", [False, True, "backsolve"], ids=str)
def test_only_what_happens_depends_on_parameters(adjoint):
    level, jump = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.5, 2.0))
    event = Event(lambda t, h: h[0] - level, lambda t, h: h + jump, direction=-1)
    got = solve(
        lambda t, h: -h, torch.ones(1, dtype=F64), [0.0, 1.0], events=[event], adjoint=adjoint, **TIGHT
    )  # h(1) = (level + jump) exp(-(1 + log level))
    by_level, by_jump = torch.autograd.grad(got.h[-1, 0], (level, jump))
    decayed = math.exp(-1 - math.log(0.5))
    assert float(by_jump) == pytest.approx(decayed, rel=1e-7)
    assert float(by_level) == pytest.approx(decayed - 2.5 * decayed / 0.5, rel=1e-7)


@pytest.mark.parametrize("sign", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("direction", [-1, 0, 1])
@pytest.mark.parametrize("affect", [None, lambda t, h: h.clone()], ids=["noted", "restarted"])
def test_directions(direction, affect, sign):
    end = 20.0
    got = solve(turn, CIRCLE, [0.0, sign * end], events=[Event(lambda t, h: h[0], affect, direction)], **TIGHT)
    all_zeros = [k * math.pi for k in range(1, 7)]  # falling along the solve where k is odd, forward in time
    first = {0: 0, -1: 0, 1: 1} if sign > 0 else {0: 0, -1: 1, 1: 0}
    want = all_zeros if direction == 0 else all_zeros[first[direction] :: 2]
    assert times(got) == pytest.approx([sign * x for x in want], rel=1e-8)
    torch.testing.assert_close(got.h[-1, 0], torch.tensor(math.sin(sign * end), dtype=F64), rtol=1e-6, atol=1e-6)


def test_the_earliest_of_several_events_in_one_step_comes_first():
    seen = []

    def marked(i):
        return lambda t, h: seen.append(i) or h + 0

    levels = [0.7, 0.2, 0.5, 0.2]
    events = [Event(lambda t, h, x=x: h[0] - x, marked(i)) for i, x in enumerate(levels)]
    options = {"first_step": 1.0}
    got = solve(lambda t, h: torch.ones_like(h), torch.zeros(1, dtype=F64), [0.0, 1.0], events=events, options=options)
    assert [x.index for x in got.events] == seen == [1, 3, 2, 0]  # two at the same time: as they are listed
    assert times(got) == pytest.approx([0.2, 0.2, 0.5, 0.7], abs=1e-12)


def test_given_times_and_the_outputs_there():
    doses = [1.0, 0.0, 2.0, 3.0, -1.0, 5.0]  # in any order; the last four are at the end, and outside
    got = solve(
        lambda t, h: -h,
        torch.ones(1, dtype=F64),
        [0.0, 1.0, 1.5, 2.0, 3.0],
        events=[At(doses, lambda t, h: h + 1)],
        **TIGHT,
    )
    assert times(got) == [0.0, 1.0, 2.0]
    e = math.exp(-1)
    before = [1.0, 2 * e, 0, (2 * e + 1) * e, ((2 * e + 1) * e + 1) * e]
    before[2] = (2 * e + 1) * math.exp(-0.5)
    assert got.h[:, 0].tolist() == pytest.approx(before, rel=1e-7)  # an output at an event is the state before it
    for x, h in zip(got.events, (1.0, 2 * e, (2 * e + 1) * e)):
        assert (float(x.before), float(x.after)) == pytest.approx((h, h + 1), rel=1e-7)


@every_gradient
def test_outputs_at_given_times_move_each_with_its_own(adjoint):
    """The output at 1 moves with t, and what the dose at 1 does with its own time."""
    t = torch.tensor([0.0, 1.0, 2.0], dtype=F64, requires_grad=True)
    dose = torch.tensor(1.0, dtype=F64, requires_grad=True)
    got = solve(
        lambda t, h: -h, torch.ones(1, dtype=F64), t, events=[At(dose, lambda t, h: h + 1)], adjoint=adjoint, **TIGHT
    )
    e = math.exp(-1)  # h(t1) = exp(-t1); h(t2) = exp(-t2) + exp(dose - t2)
    by_t, by_dose = torch.autograd.grad(got.h[1, 0], (t, dose), retain_graph=True, allow_unused=True)
    assert by_t.tolist() == pytest.approx([e, -e, 0.0], abs=1e-7)
    assert by_dose is None or float(by_dose) == pytest.approx(0.0, abs=1e-7)
    by_t, by_dose = torch.autograd.grad(got.h[2, 0], (t, dose))
    assert by_t.tolist() == pytest.approx([e * e, 0.0, -e * e - e], abs=1e-7)
    assert float(by_dose) == pytest.approx(e, rel=1e-7)


@pytest.mark.parametrize("adjoint", [False, True, "gauss"], ids=str)
def test_what_happens_at_the_start_moves_with_its_own_time(adjoint):
    t = torch.tensor([0.0, 2.0], dtype=F64, requires_grad=True)
    dose = torch.tensor(0.0, dtype=F64, requires_grad=True)
    got = solve(
        lambda t, h: -h, torch.ones(1, dtype=F64), t, events=[At(dose, lambda t, h: h + 1)], adjoint=adjoint, **TIGHT
    )
    e2 = math.exp(-2)  # h(t1) = exp(t0 - t1) + exp(dose - t1)
    by_t, by_dose = torch.autograd.grad(got.h[1, 0], (t, dose))
    assert by_t.tolist() == pytest.approx([e2, -2 * e2], rel=1e-7)
    assert float(by_dose) == pytest.approx(e2, rel=1e-7)


@pytest.mark.parametrize("adjoint", [False, True], ids=str)
@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_midpoint"])
def test_gradient_of_fixed_steps_is_that_of_the_numbers(adjoint, method):
    """On a grid as coarse as it can be, which starts anew at each event."""

    def run(theta):
        h0 = torch.stack([theta[0], 0 * theta[0]])
        event = Event(lambda t, h: h[0], lambda t, h: torch.stack([h[0], -theta[1] * h[1]]), direction=-1)
        options = {"step_size": 0.16, "interp": "cubic"}
        got = solve(
            lambda t, h: torch.stack([h[1], -2 - 0.4 * h[1]]),
            h0,
            [0.0, 1.5, 3.0],
            events=[event, At(theta[2], lambda t, h: h + theta[1])],
            adjoint=adjoint,
            method=method,
            options=options,
            engine="torch",
        )
        return got.h[1, 0] + 2 * got.h[2, 1] + got.events[-1].t

    theta = torch.tensor([1.0, 0.8, 1.3], dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(run(theta), theta)
    with torch.no_grad():
        want = [(run(theta + e) - run(theta - e)) / 2e-6 for e in 1e-6 * torch.eye(3, dtype=F64)]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adjoint", [False, True], ids=str)
def test_solves_one_after_the_other_are_one_solve(adjoint):
    """Each event belongs to one of them: what happens at the end of the first is the second's."""
    events = [bounce(0.8), At([0.5, 1.0], lambda t, h: h + torch.tensor([0.0, 1.0], dtype=F64))]
    h0 = torch.tensor([1.0, 0.0], dtype=F64)
    whole = solve(fall, h0, [0.0, 1.0, 2.0], events=events, adjoint=adjoint, **TIGHT)
    first = solve(fall, h0, [0.0, 1.0], events=events, adjoint=adjoint, **TIGHT)
    second = solve(fall, first.h[-1], [1.0, 2.0], events=events, adjoint=adjoint, **TIGHT)
    assert times(first) + times(second) == pytest.approx(times(whole), rel=1e-9)
    torch.testing.assert_close(second.h[-1], whole.h[-1], rtol=1e-7, atol=1e-7)


def test_a_terminal_event_ends_the_solve():
    t = torch.linspace(0, 3, 31, dtype=F64)
    apex = Event(lambda t, h: h[1], direction=-1, terminal=True)
    got = solve(fall, torch.tensor([1.0, 0.0], dtype=F64), t, events=[bounce(0.8), apex], **TIGHT)
    want = math.sqrt(2 / G) * 1.8
    assert float(got.event_t) == pytest.approx(want, rel=1e-8)
    assert [x.index for x in got.events] == [0, 1]
    assert got.t.tolist() == pytest.approx([*t[t < want].tolist(), want])
    assert got.h.shape == (len(got.t), 2)
    assert got.h[-1].tolist() == pytest.approx([0.64, 0.0], abs=1e-7)
    assert got.interpolate(want - 1e-9).tolist() == pytest.approx([0.64, 0.0], abs=1e-6)
    with pytest.raises(BadTime, match="outside"):
        got.interpolate(want + 0.1)


def test_an_event_that_is_terminal_the_third_time():
    got = solve(turn, CIRCLE, [0.0, 20.0], events=[Event(lambda t, h: h[0], terminal=3), Event(lambda t, h: h[1])])
    assert times(got) == pytest.approx([k * math.pi / 2 for k in range(1, 7)], rel=1e-6)
    assert float(got.event_t) == pytest.approx(3 * math.pi, rel=1e-6)


def test_dense_output_is_that_of_each_piece():
    t = torch.linspace(0, 3, 301, dtype=F64)
    h0 = torch.tensor([1.0, 0.0], dtype=F64)
    at_t = solve(fall, h0, t, events=[bounce(0.8)], **TIGHT)
    dense = solve(fall, h0, [0.0, 3.0], events=[bounce(0.8)], **TIGHT)
    torch.testing.assert_close(dense.interpolate(t), at_t.h, rtol=1e-7, atol=1e-7)
    assert float(dense.interpolate(dense.events[1].t)[1]) == pytest.approx(float(dense.events[1].before[1]))
    assert len(dense.steps.accepted) == dense.stats.naccept
    assert dense.plot() is not None


@pytest.mark.parametrize("kind", ["tuple", "dict", "float32", "complex"])
def test_states_of_all_kinds(kind):
    one = torch.ones((), dtype=F64)
    if kind == "tuple":
        h0, f = (one, 0 * one), lambda t, h: (h[1], -G * torch.ones_like(h[1]))
        event = Event(lambda t, h: h[0], lambda t, h: (h[0], -0.8 * h[1]), -1)
    elif kind == "dict":
        h0, f = {"v": 0 * one, "x": one}, lambda t, h: {"v": -G * torch.ones_like(h["v"]), "x": h["v"]}
        event = Event(lambda t, h: h["x"], lambda t, h: {"x": h["x"], "v": -0.8 * h["v"]}, -1)
    elif kind == "float32":
        h0, f, event = torch.tensor([1.0, 0.0]), fall, bounce(0.8)
    else:
        h0, f = torch.complex(one, 0 * one), lambda t, h: torch.complex(h.imag, -G * torch.ones_like(h.imag))
        event = Event(lambda t, h: h.real, lambda t, h: torch.complex(h.real, -0.8 * h.imag), -1)
    got = solve(f, h0, torch.tensor([0.0, 3.0], dtype=F64), events=[event], engine="torch")
    assert times(got) == pytest.approx([x for x, _ in bounces(3.0)], rel=1e-5)
    assert type(got.events[0].after) is type(h0)


def test_reset_far_from_the_threshold():
    """A leaky integrate-and-fire neuron under constant current fires at equal intervals."""
    fire = Event(lambda t, v: v[0] - 1, lambda t, v: torch.zeros_like(v), direction=1)
    got = solve(lambda t, v: 1.5 - v, torch.zeros(1, dtype=F64), [0.0, 10.0], events=[fire], **TIGHT)
    period = math.log(3)
    assert times(got) == pytest.approx([period * k for k in range(1, 10)], rel=1e-7)


def test_modes_are_carried_in_the_state():
    """A thermostat: the heater is a component that events switch."""

    def room(t, h):
        return torch.stack([10 * h[1] - h[0], torch.zeros_like(h[1])])

    off = Event(lambda t, h: h[0] - 6, lambda t, h: torch.stack([h[0], 0 * h[1]]), direction=1)
    on = Event(lambda t, h: h[0] - 4, lambda t, h: torch.stack([h[0], 0 * h[1] + 1]), direction=-1)
    got = solve(room, torch.tensor([4.0, 1.0], dtype=F64), [0.0, 4.0], events=[off, on], **TIGHT)
    up, down = math.log(6 / 4), math.log(6 / 4)
    assert times(got) == pytest.approx([up + k * (up + down) / 2 for k in range(len(got.events))], rel=1e-7)
    assert [x.index for x in got.events] == [k % 2 for k in range(9)]


def test_bounces_without_end():
    h0 = torch.tensor([1.0, 0.0], dtype=F64)
    for kept in (0.3, 0.5, 0.7):
        end = math.sqrt(2 / G) * (1 + 2 * kept / (1 - kept))
        with pytest.raises(TooManyEvents, match="infinitely many") as caught:
            solve(fall, h0, [0.0, 50.0], events=[bounce(kept)], engine="torch")
        assert caught.value.t == pytest.approx(end, rel=1e-6)
    with pytest.raises(TooManyEvents, match="max_events=7"):
        solve(fall, h0, [0.0, 50.0], events=[bounce(1.0)], options={"max_events": 7}, engine="torch")


def test_a_ball_that_is_held_where_it_comes_to_rest():
    """What the error of bounces without end advises."""

    def f(t, h):
        return torch.stack([h[1], -G * h[2], 0 * h[2]])

    def land(t, h):
        v = -0.5 * h[1]
        free = (v > 1e-3).to(v)
        return torch.stack([h[0], v * free, free])

    event = Event(lambda t, h: h[0], land, direction=-1)
    got = solve(f, torch.tensor([1.0, 0.0, 1.0], dtype=F64), [0.0, 5.0], events=[event], engine="torch")
    assert got.h[-1].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
    assert len(got.events) == math.ceil(math.log(math.sqrt(2 * G) / 1e-3, 2))


def test_an_event_that_grazes_has_no_gradient():
    h0 = CIRCLE.clone().requires_grad_()
    graze = Event(lambda t, h: h[0].detach() - 0.5, lambda t, h: h * 2, direction=1)
    got = solve(turn, h0, [0.0, 2.0], events=[graze], **TIGHT)
    with pytest.raises(GradientUnavailable, match="does not change"):
        got.h[-1].sum().backward()


def test_f_that_uses_other_parameters_after_an_event():
    """They are found, whichever mode the start is in."""
    first, second = (torch.nn.Linear(1, 1).double() for _ in range(2))

    def f(t, h):
        x, mode = h[:1], h[1:]
        return torch.cat([(first if float(mode.detach()) < 0.5 else second)(x), 0 * mode])

    switch = At(0.5, lambda t, h: torch.cat([h[:1], 1 + 0 * h[1:]]))
    grads = []
    for adjoint in (False, "discrete", "gauss"):
        got = solve(f, CIRCLE * 0 + 0.1, [0.0, 1.0], events=[switch], adjoint=adjoint, **TIGHT)
        params = [*first.parameters(), *second.parameters()]
        grads.append(torch.autograd.grad(got.h[-1, 0], params))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-6, atol=1e-8)


def test_a_solver_that_is_kept_and_solutions_that_are_copied():
    solver = pyjlode.Solver("tsit5", rtol=1e-9, atol=1e-10, engine="torch")
    h0 = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    got = solver.solve(fall, h0, [0.0, 1.0], events=[bounce(0.8)], dense=False)
    again = copy.deepcopy(got)
    assert torch.autograd.grad(again.events[0].t, h0)[0][0] == pytest.approx(1 / math.sqrt(2 * G), rel=1e-6)
    bare = pickle.loads(pickle.dumps(got))
    assert bare.events[0].t == got.events[0].t.detach()
    assert not bare.events[0].after.requires_grad


def test_no_events_are_an_ordinary_solve():
    got = solve(turn, CIRCLE, [0.0, 1.0], events=[], engine="torch")
    assert got.events == []
    torch.testing.assert_close(got.h, solve(turn, CIRCLE, [0.0, 1.0], engine="torch").h, rtol=0, atol=0)
    alone = solve(turn, CIRCLE, [0.0], events=[bounce(1.0), At(0.0, lambda t, h: h)], engine="torch")
    assert alone.h.shape == (1, 2)
    assert alone.events == []


def wrong(error, match, make):
    return pytest.param(error, match, make, id=match)


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        wrong(BadOption, "condition must be a function", lambda: Event(1.0)),
        wrong(BadOption, "affect must be a function", lambda: At(1.0, 2.0)),
        wrong(BadOption, "direction must be", lambda: Event(turn, direction=2)),
        wrong(BadOption, "terminal must be", lambda: Event(turn, terminal=0.5)),
        wrong(BadTime, "times must be finite", lambda: At([math.nan], turn)),
        wrong(BadOption, "a list of pyjlode.Event", lambda: bounce(1.0)),
        wrong(BadOption, "A function of", lambda: [turn]),
        wrong(BadShape, "one number for the whole state", lambda: [Event(lambda t, h: h)]),
        wrong(BadDtype, "floating-point", lambda: [Event(lambda t, h: h[0] > 0)]),
        wrong(BadShape, "returned None", lambda: [At(0.5, lambda t, h: None)]),
        wrong(BadShape, "shape", lambda: [At(0.5, lambda t, h: h[0])]),
        wrong(BadShape, "in place", lambda: [At(0.5, lambda t, h: h.mul_(2))]),
        wrong(BadDtype, "float32", lambda: [At(0.5, lambda t, h: h.float())]),
    ],
)
def test_mistakes(error, match, make):
    with pytest.raises(error, match=match):
        solve(turn, CIRCLE, [0.0, 1.0], events=make(), engine="torch")


def test_a_condition_that_is_not_a_number():
    with pytest.raises(NonFiniteState, match="a condition of events returned NaN"):
        solve(turn, CIRCLE, [0.0, 1.0], events=[Event(lambda t, h: h[0] * math.nan)], engine="torch")


def test_too_many_steps_between_events():
    with pytest.raises(MaxStepsReached, match="max_num_steps=3"):
        solve(turn, CIRCLE, [0.0, 1e3], events=[Event(lambda t, h: h[0] + 2)], options={"max_num_steps": 3})


def test_what_does_not_go_with_events():
    events = [At(0.5, lambda t, h: h)]
    with pytest.raises(BadOption, match="not both"):
        solve(turn, CIRCLE, [0.0, 1.0], events=events, event_fn=lambda t, h: h)
    with pytest.raises(BadOption, match="batch_dims"):
        solve(turn, CIRCLE[None], [0.0, 1.0], events=events, options={"batch_dims": 1})
    with pytest.raises(BadOption, match=r"torch\.func"):
        torch.func.grad(lambda x: solve(turn, x, [0.0, 1.0], events=events).h.sum())(CIRCLE)


def test_args_are_given_to_conditions_and_affects_too():
    def solved(*args):
        hits = Event(lambda t, h, g, e: h[0], lambda t, h, g, e: torch.stack([h[0], -e * h[1]]), direction=-1)
        doubled = At([0.1], lambda t, h, g, e: h * torch.tensor([1.0, 2.0], dtype=h.dtype))
        h0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
        return pyjlode.solve(
            lambda t, h, g, e: torch.stack([h[1], -g]), h0, [0.0, 1.2], args=args, events=[hits, doubled]
        )

    g = torch.tensor(9.81, dtype=torch.float64)
    inner = solved(g, 0.5)
    assert [x.index for x in inner.events][:2] == [1, 0]
    bounce = inner.events[1]
    torch.testing.assert_close(bounce.after[1], -0.5 * bounce.before[1])
