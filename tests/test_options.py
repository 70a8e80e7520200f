"""Every option and callback does what its documentation says, as seen from outside: through f and the callbacks."""

import itertools
import math
import warnings

import pytest
import torch

import pyjlode
from pyjlode import errors

F64 = torch.float64
ADAPTIVE = [name for name, row in pyjlode.METHODS.items() if row.kind == "adaptive"]
FIXED = [name for name, row in pyjlode.METHODS.items() if row.kind in ("fixed", "adams", "implicit")]
EXPLICIT = [name for name, row in pyjlode.METHODS.items() if row.kind == "fixed"]
TOL = {"rtol": 1e-6, "atol": 1e-8}


def van_der_pol(t, h):
    return torch.stack([h[1], 5 * (1 - h[0] ** 2) * h[1] - h[0]])


def decay(t, h):
    return -h


VDP0 = torch.tensor([2.0, 0.0], dtype=F64)
VDP_T = torch.tensor([0.0, 7.0, 15.0], dtype=F64)
ONE = torch.ones(1, dtype=F64)


def times(*values):
    return torch.tensor(values, dtype=F64)


class Counted:
    """A field that keeps the times it was asked for."""

    def __init__(self, f):
        self.f, self.calls = f, []

    def __call__(self, t, h):
        self.calls.append(float(t.detach()))
        return self.f(t, h)


class Stepped(Counted):
    """And the steps before they are taken, as (t0, dt)."""

    def __init__(self, f):
        super().__init__(f)
        self.steps = []

    def callback_step(self, t0, y0, dt):
        self.steps.append((float(t0), float(dt)))


class Watched(Stepped):
    """And which of them were accepted; `tried` has (t0, dt, accepted)."""

    def __init__(self, f):
        super().__init__(f)
        self.tried = []

    def callback_accept_step(self, t0, y0, dt):
        self.tried.append((float(t0), float(dt), True))

    def callback_reject_step(self, t0, y0, dt):
        self.tried.append((float(t0), float(dt), False))

    @property
    def accepted(self):
        return [(t0, dt) for t0, dt, ok in self.tried if ok]

    @property
    def rejected(self):
        return [(t0, dt) for t0, dt, ok in self.tried if not ok]

    @property
    def ends(self):
        return [t0 + dt for t0, dt in self.accepted]


# ----------------------------------------------------------------------------------------------------------------------
# The account of the work
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True], ids=["", "dense"])
@pytest.mark.parametrize("adjoint", [None, False, True, "forward", "backsolve"], ids=str)
@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_nfe_is_the_number_of_calls_of_f(method, adjoint, dense):
    """Whether or not something is differentiated, and whatever is kept; None: nothing requires grad."""
    f = Counted(lambda t, h: -h * torch.cos(t))
    options = {"step_size": 0.125} if method in FIXED else {}
    h0 = torch.ones(2, dtype=F64, requires_grad=adjoint is not None)
    t = times(0.0, 0.3, 0.5, 1.0)
    how = {} if adjoint is None else {"adjoint": adjoint}
    stats = pyjlode.solve(f, h0, t, method=method, options=options, dense=dense, **how, rtol=1e-4).stats
    assert stats.nfe == len(f.calls)
    assert stats.method == method
    if method in FIXED:
        assert (stats.naccept, stats.nreject) == (8, 0)


@pytest.mark.parametrize("adjoint", [False, True, "backsolve"], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "vern7", "rk4", "gl4"])
def test_nfe_is_the_number_of_calls_of_f_with_an_event_and_with_t_requiring_grad(method, adjoint):
    f = Counted(decay)
    options = {"step_size": 0.125} if method in FIXED else {}
    t = times(0.0, 1.0).requires_grad_()
    stats = pyjlode.solve(
        f, ONE, t, method=method, options=options, adjoint=adjoint, event_fn=lambda t, h: h - 0.5, dense=False, **TOL
    ).stats
    assert stats.nfe == len(f.calls)


@pytest.mark.parametrize(("method", "cost"), [("dopri5", 6), ("tsit5", 6), ("bosh3", 3)])
def test_steps_that_share_their_ends_cost_a_stage_less(method, cost):
    """First same as last: s - 1 calls a step, accepted or not, beside f(t0) and one call to choose the first step."""
    f = Counted(van_der_pol)
    stats = pyjlode.solve(f, VDP0, VDP_T, method=method, dense=False, **TOL).stats
    assert stats.nreject > 0
    assert len(f.calls) == 2 + cost * (stats.naccept + stats.nreject)


@pytest.mark.parametrize(("method", "cost"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
def test_fixed_steps_call_f_once_a_stage(method, cost):
    f = Counted(van_der_pol)
    pyjlode.odeint(f, VDP0, torch.linspace(0, 1, 33, dtype=F64), method=method)
    assert len(f.calls) == 32 * cost


def test_output_times_of_an_adaptive_solve_cost_nothing():
    """dopri5 has its dense output from the stages of the step."""
    few, many = Counted(van_der_pol), Counted(van_der_pol)
    a = pyjlode.odeint(few, VDP0, times(0.0, 15.0), **TOL)
    b = pyjlode.odeint(many, VDP0, torch.linspace(0, 15, 301, dtype=F64), **TOL)
    assert few.calls == many.calls
    assert torch.equal(a[-1], b[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Callbacks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["", "backward"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_callbacks_tell_every_step(method, backward):
    """One `step` before each `accept` or `reject` of the same step; accepted steps follow on each other."""
    # Backward in time the field is turned around, which keeps it stable.
    f = Watched((lambda t, h: -van_der_pol(t, h)) if backward else van_der_pol)
    t = VDP_T.flip(0) if backward else VDP_T
    stats = pyjlode.solve(f, VDP0, t, method=method, rtol=1e-3, atol=1e-5).stats
    assert len(f.accepted) == stats.naccept
    assert len(f.rejected) == stats.nreject > 0
    assert f.steps == [(t0, dt) for t0, dt, _ in f.tried]
    assert f.accepted[0][0] == float(t[0])
    assert f.ends[-1] == pytest.approx(float(t[-1]), abs=1e-12)
    for (t0, dt), (t1, _) in itertools.pairwise(f.accepted):
        assert t1 == pytest.approx(t0 + dt, abs=1e-12)
        assert (dt < 0) == backward
    # A rejected step is tried again from the same time, and shorter.
    for (t0, dt, ok), (t1, again, _) in itertools.pairwise(f.tried):
        if not ok:
            assert t1 == t0
            assert abs(again) < abs(dt)


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_tell_every_step(method):
    f = Stepped(decay)
    t = times(0.0, 0.25, 0.625, 1.0)
    stats = pyjlode.solve(f, torch.ones(2, dtype=F64), t, method=method, dense=False).stats
    assert f.steps == [(0.0, 0.25), (0.25, 0.375), (0.625, 0.375)]
    assert stats.naccept == 3


def test_callbacks_see_the_state_as_the_user_wrote_it():
    """0-d times of the state's dtype, and a state of the user's own structure: that at the start of the step."""

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate, self.seen = torch.nn.Parameter(torch.tensor(1.0, dtype=F64)), []

        def forward(self, t, h):
            return {"a": -self.rate * h["a"], "b": (h["b"][0] * 0 + 1,)}

        def callback_accept_step(self, t0, y0, dt):
            assert t0.shape == dt.shape == ()
            assert t0.dtype == dt.dtype == F64
            self.seen.append((float(t0), {"a": y0["a"].detach(), "b": (y0["b"][0].detach(),)}))

    f = Field()
    h0 = {"a": torch.ones(2, 3, dtype=F64), "b": (torch.zeros((), dtype=F64),)}
    for adjoint in (False, True, "backsolve"):
        f.seen.clear()
        pyjlode.odeint(f, h0, times(0.0, 1.0), adjoint=adjoint)
        assert len(f.seen) > 3
        for t0, y0 in f.seen:
            assert y0["a"].shape == (2, 3)
            assert float(y0["b"][0]) == pytest.approx(t0, abs=1e-9)
            assert float(y0["a"][1, 2]) == pytest.approx(math.exp(-t0), rel=1e-6)


def test_an_exception_in_a_callback_reaches_the_user():
    """The common way to stop a solve, or to refuse a step."""

    class Impatient(Counted):
        def callback_step(self, t0, y0, dt):
            if len(self.calls) > 20:
                raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        pyjlode.odeint(Impatient(van_der_pol), VDP0, VDP_T)


@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "gl4", "scipy_solver"])
def test_callbacks_that_a_method_does_not_call_are_named_in_a_warning(method):
    f = Watched(decay)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyjlode.odeint(f, ONE, times(0.0, 0.1), method=method, rtol=1e-3, atol=1e-3)
    said = {str(w.message) for w in caught}
    uncalled = ["callback_accept_step", "callback_reject_step"]
    if method == "scipy_solver":
        uncalled.append("callback_step")
    assert said == {f"{method} does not call {name}." for name in uncalled}
    assert bool(f.steps) == (method != "scipy_solver")
    assert not f.tried


# ----------------------------------------------------------------------------------------------------------------------
# Step size control
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_first_step_is_the_first_that_is_tried(method, sign):
    given, chosen = Watched(decay), Watched(decay)
    t = times(0.0, sign * 1.0)
    pyjlode.odeint(given, ONE, t, method=method, rtol=1e-4, options={"first_step": 2.0**-7})
    assert given.steps[0] == (0.0, sign * 2.0**-7)
    # Choosing one costs a call.
    pyjlode.odeint(chosen, ONE, t, method=method, rtol=1e-4)
    assert chosen.calls[0] == given.calls[0] == 0.0
    assert chosen.calls[1] not in given.calls


def test_first_step_beyond_the_span_is_the_span():
    f = Watched(lambda t, h: torch.zeros_like(h))
    pyjlode.odeint(f, ONE, times(0.0, 1.0), options={"first_step": 5.0})
    assert f.tried == [(0.0, 1.0, True)]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_no_step_is_longer_than_max_step(method):
    f = Watched(lambda t, h: torch.zeros_like(h))  # without error, so that only max_step stops it
    pyjlode.odeint(f, ONE, times(1.0, -3.0), method=method, options={"max_step": 0.25})
    assert max(abs(dt) for _, dt in f.steps) == pytest.approx(0.25, rel=4e-15)
    assert len(f.accepted) >= 16
    assert not f.rejected


def test_max_step_holds_where_first_step_is_longer():
    f = Watched(decay)
    pyjlode.odeint(f, ONE, times(0.0, 1.0), options={"max_step": 0.25, "first_step": 0.5})
    assert max(abs(dt) for _, dt in f.steps) <= 0.25


def test_max_step_finds_what_a_long_step_would_miss():
    """A field that is zero at the stages of every long step, with a narrow pulse in between."""

    def pulse(t, h):
        return torch.exp(-(((t - 5.03) / 0.02) ** 2)).expand(1)

    t = times(0.0, 10.0)
    h = pyjlode.odeint(pulse, 0 * ONE, t, options={"max_step": 0.05})
    assert float(h[-1]) == pytest.approx(0.02 * math.sqrt(math.pi), rel=1e-5)


@pytest.mark.parametrize("step", [2.0**-4, 0.25])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_steps_of_min_step_are_accepted_whatever_their_error(method, step):
    """On a tolerance that asks for much less."""
    f = Watched(lambda t, h: -h * (2 + torch.sin(8 * t)))
    pyjlode.odeint(f, ONE, times(0.0, 2.0), method=method, rtol=1e-14, atol=1e-15, options={"min_step": step})
    assert min(abs(dt) for _, dt in f.steps[:-1]) >= step
    assert len(f.accepted) <= 2.0 / step


@pytest.mark.parametrize("tight", [2.0, 4.0])
def test_safety_scales_the_steps(tight):
    """A new step aims at `safety` times the size whose error is the tolerance: half of it takes twice the steps."""

    def count(safety):
        f = Watched(lambda t, h: torch.stack([h[1], -h[0]]))
        pyjlode.odeint(f, VDP0, times(0.0, 30.0), method="dopri5", rtol=1e-8, atol=1e-8, options={"safety": safety})
        return len(f.accepted), len(f.rejected)

    (plain, _), (more, rejected) = count(0.9), count(0.9 / tight)
    assert more == pytest.approx(tight * plain, rel=0.1)
    assert rejected == 0


@pytest.mark.parametrize(("dfactor", "ifactor"), [(0.2, 10.0), (0.5, 2.0), (0.9, 1.1)])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "vern9"])
def test_dfactor_and_ifactor_bound_the_next_step(method, dfactor, ifactor):
    f = Watched(van_der_pol)
    o = {"dfactor": dfactor, "ifactor": ifactor, "first_step": 1e-3}
    pyjlode.odeint(f, VDP0, VDP_T, method=method, rtol=1e-4, atol=1e-6, options=o)
    tried = f.tried[:-1]  # the last step ends where the solve does
    factors = [(abs(b / a), ok) for (_, a, ok), (_, b, _) in itertools.pairwise(tried)]
    assert all(dfactor * (1 - 1e-9) <= factor <= ifactor * (1 + 1e-9) for factor, _ in factors)
    assert all(factor < 1 for factor, ok in factors if not ok)
    if ifactor <= 2:  # which the start asks for
        assert max(factor for factor, _ in factors) == pytest.approx(ifactor, rel=1e-9)


def test_steps_without_error_grow_by_ifactor():
    f = Watched(lambda t, h: torch.zeros_like(h))
    pyjlode.odeint(f, ONE, times(0.0, 1.0), options={"first_step": 2.0**-10, "ifactor": 4.0})
    assert [dt for _, dt in f.accepted[:-1]] == [2.0**-10 * 4**k for k in range(5)]


def test_a_step_with_a_hopeless_error_shrinks_by_dfactor():
    f = Watched(lambda t, h: 40 * h * torch.cos(40 * t))
    pyjlode.odeint(f, ONE, times(0.0, 4.0), options={"first_step": 2.0, "dfactor": 0.25})
    assert [dt for _, dt in f.rejected[:2]] == [2.0, 0.5]


# ----------------------------------------------------------------------------------------------------------------------
# Times that steps end at
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["step_t", "jump_t"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_steps_end_at_the_times_given(method, name, sign):
    """In any order; those outside the span, and its ends, change nothing."""
    inside = [0.7, 0.1, 0.3, 0.30001]
    f = Watched(decay)
    given = sign * times(*inside, 0.0, 1.0, -0.5, 1.5)
    rtol = 1e-6 if pyjlode.METHODS[method].order > 2 else 1e-4
    h = pyjlode.odeint(f, ONE, times(0.0, sign * 1.0), method=method, rtol=rtol, options={name: given})
    ends = [t0 for t0, _ in f.accepted] + [f.ends[-1]]
    for t in inside:
        assert min(abs(end - sign * t) for end in ends) == 0.0
    assert max(sign * end for end in ends) == 1.0
    assert float(h[-1]) == pytest.approx(math.exp(-sign), rel=1e-5 if rtol < 1e-4 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_jump_t_resolves_a_jump(method, sign, dtype):
    """Each side of the jump is solved with that side's f: few rejections, no f at the jump itself, the exact answer."""
    where = 0.7311

    def jumps(t, h):
        return torch.where(sign * t < where, -h, 2 * h)

    def run(options):
        f = Watched(jumps)
        t = times(0.0, sign * 1.5)
        h = pyjlode.odeint(f, torch.ones(2, dtype=dtype), t, method=method, rtol=1e-5, atol=1e-6, options=options)
        return f, h[-1].double()

    blind, _ = run({})
    known, h = run({"jump_t": times(sign * where)})
    assert len(known.rejected) <= 2
    assert len(known.rejected) < len(blind.rejected)
    exact = math.exp(sign * (-where + 2 * (1.5 - where)))
    assert torch.allclose(h, torch.full_like(h, exact), rtol=1e-3 if pyjlode.METHODS[method].order < 4 else 1e-4)
    there = float(torch.tensor(sign * where, dtype=dtype))
    assert there not in known.calls
    # f is asked on either side, one rounding unit away.
    reach = 4 * torch.finfo(dtype).eps
    assert any(0 < sign * (there - t) < reach for t in known.calls)
    assert any(0 < sign * (t - there) < reach for t in known.calls)


def test_step_t_resolves_a_kink():
    """|t - c| has no second derivative at c; a step that ends there sees none of it."""

    def kink(t, h):
        return (t - 0.7311).abs().expand(1)

    def run(options):
        f = Watched(kink)
        h = pyjlode.odeint(f, 0 * ONE, times(0.0, 2.0), rtol=1e-10, atol=1e-12, options=options)
        return f, float(h[-1])

    (blind, _), (known, h) = run({}), run({"step_t": times(0.7311)})
    assert not known.rejected
    assert len(blind.rejected) > 0
    assert len(known.accepted) < len(blind.accepted)
    assert h == pytest.approx((0.7311**2 + (2 - 0.7311) ** 2) / 2, abs=1e-14)


def test_a_time_is_not_both_a_step_and_a_jump():
    with pytest.raises(errors.BadOption, match="in common"):
        pyjlode.odeint(decay, ONE, times(0.0, 1.0), options={"step_t": [0.5], "jump_t": times(0.2, 0.5)})


# ----------------------------------------------------------------------------------------------------------------------
# Limits
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
def test_max_num_steps_counts_accepted_and_rejected_steps(method):
    """As many as the solve takes are enough, one less is not."""
    tol = {"rtol": 1e-3, "atol": 1e-5}
    stats = pyjlode.solve(van_der_pol, VDP0, VDP_T, method=method, dense=False, **tol).stats
    assert stats.nreject > 0
    n = stats.naccept + stats.nreject
    pyjlode.odeint(van_der_pol, VDP0, VDP_T, method=method, options={"max_num_steps": n}, **tol)
    with pytest.raises(errors.MaxStepsReached) as caught:
        pyjlode.odeint(van_der_pol, VDP0, VDP_T, method=method, options={"max_num_steps": n - 1}, **tol)
    assert 0 < caught.value.t < 15


def test_max_num_steps_of_a_fixed_step_size():
    o = {"step_size": 0.125, "max_num_steps": 8}
    pyjlode.odeint(decay, ONE, times(0.0, 1.0), method="rk4", options=o)
    f = Counted(decay)
    with pytest.raises(errors.MaxStepsReached):
        pyjlode.odeint(f, ONE, times(0.0, 1.0), method="rk4", options={**o, "max_num_steps": 7})
    assert len(f.calls) <= 1  # known before it starts


def test_max_num_steps_ends_the_search_for_an_event():
    for method, o in (("dopri5", {}), ("rk4", {"step_size": 0.1})):
        f = Counted(decay)
        with pytest.raises(errors.EventNotFound):
            pyjlode.odeint_event(
                f, ONE, 0.0, event_fn=lambda t, h: h + 1, method=method, options={**o, "max_num_steps": 20}
            )
        assert len(f.calls) < 20 * 12


def test_max_iters_of_newton():
    def f(t, h):
        return -(h**3)

    o = {"step_size": 0.5}
    pyjlode.odeint(f, ONE, times(0.0, 1.0), method="implicit_euler", options={**o, "max_iters": 50})
    with pytest.raises(errors.NotConverged, match="1 Newton iterations"):
        pyjlode.odeint(f, ONE, times(0.0, 1.0), method="implicit_euler", options={**o, "max_iters": 1})


def test_max_iters_of_the_adams_corrector():
    """Each iteration is a call of f; where they do not reach the tolerance a warning says so."""
    t = torch.linspace(0, 1, 21, dtype=F64)

    def calls(n):
        f = Counted(lambda t, h: -h * h)
        with pytest.warns(UserWarning, match=f"in {n} iterations"):
            pyjlode.odeint(f, ONE, t, method="implicit_adams", rtol=1e-15, atol=0.0, options={"max_iters": n})
        return len(f.calls)

    assert calls(2) - calls(1) == 17  # the first three of the 20 steps are Runge-Kutta steps


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_max_order_below_four_is_rk4(method):
    t = torch.linspace(0, 1, 21, dtype=F64)
    with pytest.warns(UserWarning, match="max_order=3"):
        h = pyjlode.odeint(van_der_pol, VDP0, t, method=method, options={"max_order": 3})
    assert torch.equal(h, pyjlode.odeint(van_der_pol, VDP0, t, method="rk4"))


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_max_order_raises_the_accuracy(method):
    t = torch.linspace(0, 2, 65, dtype=F64)
    h0 = torch.tensor([1.0, 0.0], dtype=F64)

    def error(order):
        h = pyjlode.odeint(
            lambda t, h: torch.stack([h[1], -h[0]]), h0, t, method=method, options={"max_order": order}, rtol=1e-13
        )
        return float((h[-1] - torch.stack([torch.cos(t[-1]), -torch.sin(t[-1])])).abs().max())

    # The Runge-Kutta steps at the start, of order 4, bound what the higher orders can gain.
    assert error(5) < error(4)


# ----------------------------------------------------------------------------------------------------------------------
# norm
# ----------------------------------------------------------------------------------------------------------------------


def rms(x):
    return x.square().mean().sqrt()


def test_norm_gets_the_state_and_rules_the_steps():
    """Eight times the norm is an eighth of the tolerances: the same steps to the last bit."""
    shapes = []

    def eightfold(h):
        shapes.append(h.shape)
        return 8 * rms(h)

    def f(t, h):
        return -h * h * torch.cos(t)

    h0, t = torch.rand(3, 2, dtype=F64), times(0.0, 1.0, 5.0)
    a = pyjlode.odeint(f, h0, t, rtol=2.0**-20, atol=2.0**-24, options={"norm": eightfold})
    b = pyjlode.odeint(f, h0, t, rtol=2.0**-23, atol=2.0**-27, options={"norm": rms})
    assert torch.equal(a, b)
    assert set(shapes) == {(3, 2)}


@pytest.mark.parametrize("name", ["options", "adjoint_options"])
def test_a_norm_that_is_negative_is_none(name):
    def f(t, h):
        return A @ h

    A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64, requires_grad=True)
    with pytest.raises(errors.BadOption, match=r"norm'\] returned -.* never negative"):
        pyjlode.odeint(
            f, VDP0, times(0.0, 5.0), adjoint="backsolve", **{name: {"norm": lambda h: -torch.ones(())}}
        ).sum().backward()


def test_norm_of_a_tuple_state_gets_the_tuple():
    """By default the largest of the root mean squares of its tensors."""
    seen = []

    def norm(h):
        seen.append(tuple(x.shape for x in h))
        return max(rms(x) for x in h)

    def f(t, h):
        return -h[0], torch.stack([h[0].sum(), h[1][0] ** 2])

    h0, t = (torch.rand(2, 2, dtype=F64), torch.rand(2, dtype=F64)), times(0.0, 2.0)
    own, default = (pyjlode.solve(f, h0, t, options=o) for o in ({"norm": norm}, {}))
    assert torch.allclose(own.h[1], default.h[1], rtol=1e-12)
    assert (own.stats.naccept, own.stats.nreject) == (default.stats.naccept, default.stats.nreject)
    assert set(seen) == {((2, 2), (2,))}


def test_norm_that_leaves_an_element_out_does_not_control_it():
    def f(t, h):
        return torch.stack([-h[0], 30 * torch.cos(30 * t)])

    def count(norm):
        return pyjlode.solve(f, VDP0, times(0.0, 5.0), options={"norm": norm}).stats.naccept

    assert count(lambda h: h[0].abs()) < count(lambda h: h.abs().max()) / 4


# ----------------------------------------------------------------------------------------------------------------------
# Fixed grids
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", FIXED)
def test_step_size_makes_equal_steps_and_a_shorter_last_one(method, sign):
    loose = {"rtol": 1e-3, "atol": 1e-3}  # the corrector of implicit_adams is content with it
    f = Stepped(decay)
    t = sign * times(0.0, 0.6, 1.125)
    h = pyjlode.odeint(f, ONE, t, method=method, options={"step_size": 0.25}, **loose)
    assert f.steps == [
        (sign * t0, sign * dt) for t0, dt in [(0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25), (1, 0.125)]
    ]
    # The same steps as a grid.
    grid = sign * times(0.0, 0.25, 0.5, 0.75, 1.0, 1.125)
    again = pyjlode.odeint(decay, ONE, t, method=method, options={"grid_constructor": lambda f, h, t: grid}, **loose)
    assert torch.equal(h, again)
    direct = pyjlode.odeint(decay, ONE, grid, method=method, **loose)
    assert torch.equal(h[-1], direct[-1])


def test_step_size_beyond_the_span_is_one_step():
    f = Stepped(decay)
    pyjlode.odeint(f, ONE, times(0.0, 1.0), method="rk4", options={"step_size": 3.0})
    assert f.steps == [(0.0, 1.0)]


def test_step_size_that_divides_the_span_but_for_rounding():
    """0.1 into [0, 1] is ten steps, none of them a sliver."""
    for n, size in ((10, 0.1), (30, 0.1), (7, 1 / 7), (49, 1 / 49)):
        f = Stepped(decay)
        pyjlode.odeint(f, ONE, times(0.0, n * size), method="euler", options={"step_size": size})
        assert len(f.steps) == n
        assert min(dt for _, dt in f.steps) > 0.99 * size


@pytest.mark.parametrize("method", FIXED)
def test_grid_constructor_is_asked_once_with_the_arguments_of_odeint(method):
    calls = []

    def constructor(f, h0, t):
        calls.append((f, h0, t))
        return torch.cat([torch.linspace(0, 0.5, 5, dtype=F64), t[1:]])

    f, t, h0 = Stepped(decay), times(0.0, 0.75, 1.0), (ONE, ONE[None])
    f.f = lambda t, h: (-h[0], -h[1])
    pyjlode.odeint(f, h0, t, method=method, options={"grid_constructor": constructor})
    ((given_f, given_h0, given_t),) = calls
    assert given_f is f
    assert torch.equal(given_h0[1], h0[1])
    assert torch.equal(given_t, t)
    assert f.steps == [(0.0, 0.125), (0.125, 0.125), (0.25, 0.125), (0.375, 0.125), (0.5, 0.25), (0.75, 0.25)]


BAD_GRIDS = {
    "starts elsewhere": [0.1, 1.0],
    "ends early": [0.0, 0.5],
    "turns": [0.0, 0.6, 0.4, 1.0],
    "repeats": [0.0, 0.5, 0.5, 1.0],
    "empty": [],
}


@pytest.mark.parametrize("case", BAD_GRIDS)
def test_bad_grids_are_refused(case):
    grid = torch.tensor(BAD_GRIDS[case], dtype=F64)
    with pytest.raises(errors.BadOption, match="grid_constructor"):
        pyjlode.odeint(decay, ONE, times(0.0, 1.0), method="rk4", options={"grid_constructor": lambda f, h, t: grid})


@pytest.mark.parametrize("method", EXPLICIT)
def test_linear_interp_lies_on_the_chord(method):
    o = {"step_size": 0.5, "interp": "linear"}
    h = pyjlode.odeint(van_der_pol, VDP0, times(0.0, 0.125, 0.5, 0.875, 1.0), method=method, options=o)
    assert torch.allclose(h[1], 0.75 * h[0] + 0.25 * h[2], rtol=1e-14)
    assert torch.allclose(h[3], 0.25 * h[2] + 0.75 * h[4], rtol=1e-14)
    default = pyjlode.odeint(van_der_pol, VDP0, times(0.0, 0.125, 1.0), method=method, options={"step_size": 0.5})
    assert torch.equal(default[1], h[1])


@pytest.mark.parametrize("method", ["heun3", "rk4", "radauIIA3", "gl4", "gl6"])
def test_cubic_interp_is_exact_for_cubics(method):
    """Where the step is: of order 3 and more."""
    t = times(0.0, 0.1, 0.8, 1.0, 1.7, 2.0)
    exact = (t**3 - 2 * t**2 + 1)[:, None]

    def solve(interp):
        return pyjlode.odeint(
            lambda t, h: (3 * t**2 - 4 * t).expand(1),
            ONE,
            t,
            method=method,
            options={"step_size": 1.0, "interp": interp},
        )

    assert torch.allclose(solve("cubic"), exact, atol=1e-12)
    assert float((solve("linear") - exact).abs().max()) > 0.1


def test_interp_is_not_looked_at_where_outputs_are_grid_points():
    t = torch.linspace(0, 1, 9, dtype=F64)
    a, b = (pyjlode.odeint(van_der_pol, VDP0, t, method="rk4", options={"interp": i}) for i in ("linear", "cubic"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", [*EXPLICIT, "trapezoid", "gl4", "radauIIA5"])
def test_perturb_keeps_f_inside_each_step(method, sign):
    """A field that jumps at the grid's points is seen from the step's own side: a staircase is integrated exactly."""

    def stairs(t, h):
        return torch.floor(sign * t).expand(2) + 1

    def run(perturb):
        f = Counted(stairs)
        t = sign * times(0.0, 1.0, 2.0, 3.0)
        return f, pyjlode.odeint(f, torch.zeros(2, dtype=F64), t, method=method, options={"perturb": perturb})[:, 0]

    f, h = run(True)
    assert torch.allclose(sign * h, times(0.0, 1.0, 3.0, 6.0), rtol=1e-12)
    assert not {1.0, 2.0, 3.0} & {sign * t for t in f.calls}
    if method in ("rk4", "heun2", "trapezoid", "radauIIA5"):  # that look at a step's end
        assert not torch.allclose(sign * run(False)[1], times(0.0, 1.0, 3.0, 6.0), rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The dictionary itself
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "rk4", "gl4"])
def test_dtype_is_taken_and_changes_nothing(method, dtype):
    """Time is float64 on the host always; f sees it in the dtype of the state."""
    seen = set()

    def f(t, h):
        seen.add(t.dtype)
        return -h * t

    for state in (torch.float32, F64):
        seen.clear()
        h0 = torch.ones(2, dtype=state)
        t = torch.linspace(0, 1, 9, dtype=F64)
        a = pyjlode.odeint(f, h0, t, method=method, options={"dtype": dtype}, rtol=1e-5)
        b = pyjlode.odeint(f, h0, t, method=method, rtol=1e-5)
        assert torch.equal(a, b)
        assert a.dtype == state
        assert seen == {state}


def test_numbers_may_be_tensors_and_none_is_the_default():
    o = {"first_step": 0.125, "safety": 0.8, "ifactor": 3.0, "dfactor": 0.5, "min_step": 1e-9, "max_step": 0.5}
    o |= {"max_num_steps": 1000}
    plain = pyjlode.odeint(van_der_pol, VDP0, VDP_T, options=o)
    tensors = pyjlode.odeint(van_der_pol, VDP0, VDP_T, options={k: torch.tensor(v, dtype=F64) for k, v in o.items()})
    assert torch.equal(plain, tensors)
    nothing = dict.fromkeys([*o, "step_t", "jump_t", "norm"])
    default = pyjlode.odeint(van_der_pol, VDP0, VDP_T)
    assert torch.equal(pyjlode.odeint(van_der_pol, VDP0, VDP_T, options=nothing), default)
    assert not torch.equal(plain, default)


def test_the_options_are_left_as_they_were():
    o = {"step_t": [0.5], "norm": rms, "first_step": 0.1, "dtype": F64}
    before = dict(o)
    pyjlode.odeint_adjoint(decay, ONE, times(0.0, 1.0), options=o, adjoint_options=o)
    assert o == before


BAD_OPTIONS = {
    "zero first_step": ("dopri5", {"first_step": 0.0}),
    "negative max_step": ("dopri5", {"max_step": -1.0}),
    "negative min_step": ("dopri5", {"min_step": -1.0}),
    "nan safety": ("dopri5", {"safety": math.nan}),
    "zero ifactor": ("dopri5", {"ifactor": 0.0}),
    "no steps": ("dopri5", {"max_num_steps": 0}),
    "norm is a number": ("dopri5", {"norm": 2.0}),
    "norm is a name": ("dopri5", {"norm": "seminorm"}),
    "zero step_size": ("rk4", {"step_size": 0.0}),
    "unknown interp": ("rk4", {"interp": "quadratic"}),
    "order 0": ("explicit_adams", {"max_order": 0}),
    "order 13": ("implicit_adams", {"max_order": 13}),
    "no iterations": ("gl4", {"max_iters": 0}),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_values_that_mean_nothing_are_refused(case):
    method, o = BAD_OPTIONS[case]
    with pytest.raises(errors.BadOption, match=next(iter(o))):
        pyjlode.odeint(decay, ONE, times(0.0, 1.0), method=method, options=o)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("dopri5", "step_size", 0.1),
        ("dopri5", "max_order", 4),
        ("rk4", "first_step", 0.1),
        ("rk4", "max_iters", 3),
        ("gl4", "jump_t", [0.5]),
        ("explicit_adams", "safety", 0.5),
    ],
)
def test_options_that_a_method_has_no_use_for_are_named_in_a_warning(method, name, value):
    t = torch.linspace(0, 1, 9, dtype=F64)
    with pytest.warns(UserWarning, match=f"{method} makes no use of.*{name}"):
        h = pyjlode.odeint(decay, ONE, t, method=method, options={name: value})
    assert torch.equal(h, pyjlode.odeint(decay, ONE, t, method=method))


@pytest.mark.parametrize("solver", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
def test_solver_names_the_method_of_scipy(solver):
    f = Counted(van_der_pol)
    solution = pyjlode.solve(f, VDP0, VDP_T, method="scipy_solver", options={"solver": solver}, **TOL)
    reference = pyjlode.odeint(van_der_pol, VDP0, VDP_T, method="vern9", rtol=1e-11, atol=1e-12)
    assert torch.allclose(solution.h, reference, rtol=1e-2, atol=1e-2)
    assert solution.stats.nfe == len(f.calls)
    assert (solution.stats.njac > 0) == (solver in ("Radau", "BDF", "LSODA"))


def test_options_of_scipy_reach_it():
    zero = Counted(lambda t, h: torch.zeros_like(h))
    o = {"solver": "RK45", "max_step": 0.25, "first_step": 0.125}
    stats = pyjlode.solve(zero, ONE, times(0.0, 4.0), method="scipy_solver", options=o).stats
    assert stats.naccept >= 16
    assert 0.125 in zero.calls


def test_stats_say_whether_the_state_was_copied():
    a = torch.rand(3, 4, dtype=F64)
    states = {a: False, a.T: True, (a,): True, (a, a): True, a.to(torch.complex128): True, a[:0]: False}
    for h0, copied in states.items():
        decay = (lambda t, h: tuple(-x for x in h)) if isinstance(h0, tuple) else (lambda t, h: -h)
        assert pyjlode.solve(decay, h0, [0.0, 1.0]).stats.copied is copied


# ----------------------------------------------------------------------------------------------------------------------
# progress
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("adjoint", [False, True])
def test_progress_shows_where_the_solve_is_and_changes_nothing(sign, adjoint, capsys):
    h0, t = torch.ones(2, dtype=F64, requires_grad=True), torch.tensor([1.0, 1.0 + 3.0 * sign], dtype=F64)

    def gradient(**options):
        h = pyjlode.odeint(lambda t, h: -h * t, h0, t, adjoint=adjoint, options=options)
        return h.detach(), *torch.autograd.grad(h[-1].sum(), h0)

    plain = gradient()
    assert capsys.readouterr().err == ""
    shown = gradient(progress=True)
    last = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert "100%" in last
    assert "3/3" in last
    for a, b in zip(plain, shown):
        assert torch.equal(a, b)


def test_progress_towards_an_event_of_unknown_time(capsys):
    pyjlode.odeint_event(lambda t, h: -h, ONE, 0.0, event_fn=lambda t, h: h - 0.5, options={"progress": True})
    assert "t - t0 = 0." in capsys.readouterr().err


def test_progress_is_a_switch():
    with pytest.raises(errors.BadOption, match="True or False"):
        pyjlode.odeint(lambda t, h: -h, ONE, [0.0, 1.0], options={"progress": "yes"})
