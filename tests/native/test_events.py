"""Events: times, states and gradients against closed forms."""

import math

import pytest
import torch
from problems import GENERAL

import pyjlode
from pyjlode.errors import EventNotFound, GradientUnavailable

F64 = torch.float64
G = 9.81


def fall(t, h):
    return torch.stack([h[1], -G * torch.ones_like(h[1])])


@pytest.mark.parametrize("adjoint", [False, True, *GENERAL], ids=str)
def test_bouncing_ball_time_and_gradient(adjoint):
    x0 = torch.tensor(2.0, dtype=F64, requires_grad=True)
    h0 = torch.stack([x0, torch.zeros_like(x0)])
    event_t, h = pyjlode.odeint_event(
        fall, h0, torch.tensor(0.0, dtype=F64), event_fn=lambda t, h: h[0], adjoint=adjoint, rtol=1e-10, atol=1e-10
    )
    assert float(event_t.detach()) == pytest.approx(math.sqrt(2 * 2.0 / G), rel=1e-9)
    assert float(h[-1, 1].detach()) == pytest.approx(-math.sqrt(2 * G * 2.0), rel=1e-9)
    (slope,) = torch.autograd.grad(event_t, x0, retain_graph=True)
    assert float(slope) == pytest.approx(1 / math.sqrt(2 * G * 2.0), rel=1e-7)
    (slope,) = torch.autograd.grad(h[-1, 1], x0)
    assert float(slope) == pytest.approx(-math.sqrt(G / (2 * 2.0)), rel=1e-7)


def test_many_bounces_restart_at_the_returned_state():
    t, h = torch.tensor(0.0, dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    want, speed = math.sqrt(2 / G), math.sqrt(2 * G)
    for _ in range(5):
        t, states = pyjlode.odeint_event(fall, h, t, event_fn=lambda t, h: h[0], rtol=1e-10, atol=1e-10)
        assert float(t) == pytest.approx(want, rel=1e-8)
        h = torch.stack([states[-1, 0], -0.8 * states[-1, 1]])
        speed *= 0.8
        want += 2 * speed / G


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["dopri5", "vern7", "rk4"])
def test_the_first_of_several_events_wins_in_both_directions(method, reverse):
    options = {"step_size": 0.01, "interp": "cubic"} if method == "rk4" else None
    event_t, _ = pyjlode.odeint_event(
        lambda t, h: torch.ones_like(h),
        torch.zeros(1, dtype=F64),
        torch.tensor(0.0, dtype=F64),
        event_fn=lambda t, h: torch.stack([h[0] - 2, h[0] - 1, h[0] + 3, h[0] + 0.5]),
        reverse_time=reverse,
        method=method,
        options=options,
    )
    assert float(event_t) == pytest.approx(-0.5 if reverse else 1.0, abs=1e-9)


def test_no_event_ends_with_an_error():
    short = {"max_num_steps": 300}
    with pytest.raises(EventNotFound, match="did not cross"):
        pyjlode.odeint_event(lambda t, h: -h, torch.ones(1, dtype=F64), 0.0, event_fn=lambda t, h: h + 1, options=short)


def test_second_derivative_through_an_event():
    x0 = torch.tensor(2.0, dtype=F64, requires_grad=True)
    event_t, _ = pyjlode.odeint_event(
        fall, torch.stack([x0, torch.zeros_like(x0)]), 0.0, event_fn=lambda t, h: h[0], rtol=1e-10, atol=1e-10
    )
    (first,) = torch.autograd.grad(event_t, x0, create_graph=True)
    (second,) = torch.autograd.grad(first, x0)
    assert float(second) == pytest.approx(-0.5 / math.sqrt(2 * G) * 2.0**-1.5, rel=1e-6)


every_gradient = pytest.mark.parametrize("adjoint", [False, True, *GENERAL], ids=str)
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SPAN = torch.tensor([0.0, 1.0], dtype=F64)


def decay(t, h):
    return -h


@every_gradient
def test_only_the_event_function_has_parameters(adjoint):
    level = torch.tensor(0.5, dtype=F64, requires_grad=True)
    event_t, h = pyjlode.odeint(
        decay, torch.ones(1, dtype=F64), SPAN, event_fn=lambda t, h: h - level, adjoint=adjoint, **TIGHT
    )
    by_time, by_state = (torch.autograd.grad(x, level, retain_graph=True)[0] for x in (event_t, h[-1, 0]))
    assert float(by_time) == pytest.approx(-2.0, rel=1e-7)  # t = -ln(level)
    assert float(by_state) == pytest.approx(1.0, rel=1e-7)


@every_gradient
def test_an_event_function_that_is_flat_beyond_the_event(adjoint):
    h0 = torch.ones(1, dtype=F64, requires_grad=True)
    event_t, _ = pyjlode.odeint(decay, h0, SPAN, event_fn=lambda t, h: torch.relu(h - 0.5), adjoint=adjoint, **TIGHT)
    assert float(event_t.detach()) == pytest.approx(math.log(2), rel=1e-8)
    assert float(torch.autograd.grad(event_t, h0)[0]) == pytest.approx(1.0, rel=1e-6)


@every_gradient
@pytest.mark.parametrize("stop", [lambda t, h: h.detach() - 0.5, lambda t, h: torch.where(t < 0.5, 1.0, -1.0)])
def test_an_event_function_without_gradient_raises_where_one_is_asked_for(adjoint, stop):
    h0 = torch.ones(1, dtype=F64, requires_grad=True)
    event_t, h = pyjlode.odeint(decay, h0, SPAN, event_fn=stop, adjoint=adjoint, **TIGHT)
    assert float(torch.autograd.grad(h[0].sum(), h0, retain_graph=True)[0]) == 1.0
    for asked in (event_t, h[-1].sum()):
        with pytest.raises(GradientUnavailable, match="does not change"):
            torch.autograd.grad(asked, h0, retain_graph=True)


@pytest.mark.parametrize("adjoint", [False, True, "discrete"], ids=str)
@pytest.mark.parametrize("method", ["euler", "rk4", "midpoint", "dopri5", "tsit5", "bosh3", "rodas5p"])
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_gradient_through_an_event_is_that_of_the_numbers(adjoint, method, interp):
    """On steps as coarse as they can be: finite differences see no change of step there, nor of Newton iterations."""
    fixed = not pyjlode.METHODS[method].adaptive
    if interp == "cubic" and not fixed:
        return

    def run(x):
        h0 = x * torch.tensor([1.0, 0.6], dtype=F64)
        return pyjlode.odeint(
            lambda t, h: torch.stack([-h[0] * h[1] - 0.3, -0.5 * h[1]]),
            h0,
            SPAN,
            event_fn=lambda t, h: h[0] - 0.2 - 0.1 * t,
            adjoint=adjoint,
            method=method,
            options={"step_size": 0.4, "interp": interp} if fixed else {"first_step": 0.3, "max_step": 0.3},
            rtol=1.0,  # no step is rejected, and all are 0.3 long
            atol=1.0,
        )

    x = torch.tensor(1.1, dtype=F64, requires_grad=True)
    event_t, h = run(x)
    with torch.no_grad():
        high, low = run(x + 1e-5), run(x - 1e-5)
    for i, got in enumerate([event_t, h[-1, 0], h[-1, 1]]):
        pick = (lambda out: out[0]) if i == 0 else (lambda out, i=i: out[1][-1, i - 1])
        want = float(pick(high) - pick(low)) / 2e-5
        assert float(torch.autograd.grad(got, x, retain_graph=True)[0]) == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_the_event_is_found_on_the_output_as_it_is_interpolated():
    event_t, h = pyjlode.odeint(
        decay,
        torch.ones(1, dtype=F64),
        SPAN,
        event_fn=lambda t, h: h - 0.8,
        method="euler",
        options={"step_size": 0.5},
    )
    assert float(event_t) == pytest.approx(0.2, rel=1e-12)  # on the chord from 1 to 0.5
    assert float(h[-1]) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "vern7", "dopri8", "bosh3"])
def test_the_crossing_is_searched_for_on_the_numbers_of_the_dense_output(method, dtype):
    from pyjlode.native import explicit, interpolation

    asked, find = [], explicit.ExplicitStep.pointwise

    def compared(step):
        at = find(step)

        def check(t):
            asked.append(torch.equal(at(t), interpolation.output(step.rk.p, step, [t])[0].detach()))
            return at(t)

        return at and check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explicit.ExplicitStep, "pointwise", compared)
        h0 = torch.tensor([2.0, 0.0], dtype=dtype, requires_grad=True)
        pyjlode.odeint(fall, h0, SPAN, event_fn=lambda t, h: h[0] - torch.sin(t), method=method, engine="torch")
    assert all(asked)
    assert len(asked) > 3
