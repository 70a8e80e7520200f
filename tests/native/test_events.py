"""Events: times, states and gradients against closed forms."""

import math

import pytest
import torch

import pyjlode
from pyjlode.errors import EventNotFound

F64 = torch.float64
G = 9.81


def fall(t, h):
    return torch.stack([h[1], -G * torch.ones_like(h[1])])


@pytest.mark.parametrize("adjoint", [False, True, *pyjlode.GRADIENTS], ids=str)
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
