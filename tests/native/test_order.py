"""Order of convergence of every method of the table, of its dense output, and error against tolerance.

The problem is Fehlberg's: nonlinear, coupled, not autonomous, with a closed form. Errors are root mean squares over
several phases of it.
"""

import pytest
import torch
from designs import latin
from problems import FEHLBERG as P
from problems import rms_error, slope

from pyjlode import METHODS, odeint, odeint_dense, solve
from pyjlode.methods.stiff import EsdirkTableau

NATIVE = [m for m in METHODS.values() if m.kind not in ("scipy", "second")]
ADAPTIVE = [m for m in METHODS.values() if m.adaptive]
FIXED = [m for m in NATIVE if not m.adaptive]
# Those of one order, with error control or without.
ONE_ORDER = [m for m in NATIVE if m.kind != "auto" and m.name != "bdf"]
PAIRS = [m for m in ONE_ORDER if m.adaptive]
SMOOTH = [m for m in ONE_ORDER if m.kind != "stiff" or isinstance(m.tableau, EsdirkTableau)]
SPAN = P.t1 - P.t0
# Numbers of steps: dt is exact, and half of the span is a whole number of steps.
COUNTS = (32, 24, 16, 12, 8, 6, 4)
FLOOR = 3e-13  # errors below it are roundings
TIGHT = 1e-12  # tolerance of the implicit methods' iterations


def each(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


def steps_of(method, dt, **more):
    """Options that make every step `dt` long."""
    if method.adaptive:
        iterations = {"max_iters": 50} if method.kind == "stiff" else {}
        return {"first_step": dt, "min_step": dt, "max_step": dt, **iterations, **more}
    if method.kind == "adams":
        more = {"max_iters": 50, **more}
    return {"step_size": dt, **more}


def measured_order(error, points=4):
    """Slope of `error(n)` against 1/n over the finest `points` numbers of steps whose error is not rounding."""
    pairs = []
    for n in COUNTS:
        e = error(n)
        if e > FLOOR:
            pairs.append((1 / n, e))
        if len(pairs) == points:
            return slope(*zip(*pairs))
    raise AssertionError(f"only {len(pairs)} errors are above rounding")


def order_in_theory(method):
    # The three steps that start an Adams method have local errors O(dt^5), the first multistep one has too.
    return min(method.order, 5) if method.kind == "adams" else method.order


def observed(f):
    """f, and a list that the starts of the steps of a solve with it are added to."""
    starts = []

    def g(t, h):
        return f(t, h)

    g.callback_step = lambda t, h, dt: starts.append(t)
    return g, starts


# --- The state at the end of steps -----------------------------------------------------------------------------------


@each(ONE_ORDER)
def test_order(method):
    """Error ~ dt^order, not less. Not much more either: the table would understate the method."""
    t, order = P.times(3), order_in_theory(method)

    def error(n):
        h = odeint(P.f, P.h0, t, method=method.name, rtol=TIGHT, atol=TIGHT, options=steps_of(method, SPAN / n))
        return rms_error(h, P.exact(t))

    measured = measured_order(error)
    assert measured > order - (0.7 if method.kind == "adams" else 0.25)
    if method.kind != "adams":
        assert measured < order + 1.5


@each(PAIRS)
@pytest.mark.parametrize("n", [4, 12, 16])
def test_an_embedded_pair_can_be_forced_into_fixed_steps(method, n):
    """min_step = max_step = first_step: n steps, none rejected, however bad their error estimate."""
    s = solve(P.f, P.h0, P.times(2), method=method.name, rtol=TIGHT, atol=TIGHT, options=steps_of(method, SPAN / n))
    assert (s.stats.naccept, s.stats.nreject) == (n, 0)


@each([m for m in NATIVE if m.kind == "adams"])
def test_adams_of_max_order_does_not_integrate_the_next_degree(method):
    """The formula has the order that was asked for, and not a higher one."""
    q = 5
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    h = odeint(
        lambda t, h: (q + 1) * t**q * torch.ones_like(h),
        torch.zeros(1, dtype=torch.float64),
        t,
        method=method.name,
        options={"max_order": q},
    )[:, 0]
    assert float((h.diff() - (t ** (q + 1)).diff()).abs()[q:].min()) > 1e-10


@each([m for m in NATIVE if m.kind == "adams"])
def test_adams_order_holds_on_a_grid_that_is_not_uniform(method):
    """The weights are those of the times as they are."""
    q = 6
    s = torch.linspace(0, 1, 16, dtype=torch.float64)
    t = s + 0.3 * s * (1 - s) + 0.01 * torch.sin(37 * s) * s * (1 - s)
    h = odeint(
        lambda t, h: q * t ** (q - 1) * torch.ones_like(h),
        torch.zeros(1, dtype=torch.float64),
        t,
        method=method.name,
        options={"max_order": q},
    )[:, 0]
    assert float((h.diff() - (t**q).diff()).abs()[q - 1 :].max()) < 1e-11


# --- Error against tolerance -----------------------------------------------------------------------------------------

# RKF1(2)'s error estimate is (k1 - k3)/512 (Fehlberg made the error of the first-order solution small), while the error
# of the solution of order 2, which goes on, has no such factor.
WITHIN = {"fehlberg2": 512.0, "bdf": 100.0, "rosenbrock23": 100.0, "trbdf2_adaptive": 100.0, "kencarp4": 30.0}
WITHIN["kencarp5"] = 60.0  # where f is linear, its estimate is of order 6


@each(ADAPTIVE)
def test_error_is_proportional_to_tolerance(method):
    """Error ~ tolerance, and within a factor of it: 10, for a problem of this length and these derivatives."""
    tolerances = [10.0**-k for k in {2: (3, 4, 5), 3: (3, 4, 5, 6, 7)}.get(method.order, range(4, 11))]
    t = P.times(17)
    errors = [rms_error(odeint(P.f, P.h0, t, method=method.name, rtol=tol, atol=tol), P.exact(t)) for tol in tolerances]
    # The local error of a method that goes on with the less accurate of its solutions is the tolerance; its error is a
    # power of the step less.
    assert slope(tolerances, errors) > (2 / 3 - 0.1 if method.name in ("rosenbrock23", "trbdf2_adaptive") else 0.75)
    assert slope(tolerances, errors) < 1.25
    for tol, error in zip(tolerances, errors):
        assert error < WITHIN.get(method.name, 10.0) * tol


@each([m for m in PAIRS if m.name not in {"rosenbrock23", "trbdf2_adaptive", "radau5"}])
def test_a_tighter_tolerance_takes_steps_as_the_order_says(method):
    """Steps ~ tolerance^(-1/order): the reason to have methods of high order."""
    tolerances = [1e-4, 1e-5, 1e-6] if method.order <= 3 else [1e-6, 1e-8, 1e-10, 1e-12]
    steps = [
        solve(P.f, P.h0, P.times(2), method=method.name, rtol=tol, atol=tol, dense=False).stats.naccept
        for tol in tolerances
    ]
    assert slope(tolerances, steps) == pytest.approx(-1 / method.order, rel=0.35)


# --- Dense output ----------------------------------------------------------------------------------------------------


def dense_order_in_theory(method):
    """Error over one step is O(dt^(q+1)) for a polynomial of order q; q = 3 for the cubic Hermite one."""
    q = method.tableau.dense_order if method.adaptive else 3
    return min(order_in_theory(method), q + 1)


@each(ONE_ORDER)
def test_order_of_the_dense_output(method):
    """Interior points: the dense output does not spoil the order, or has at least the order that it states."""

    def error(n):
        dt = SPAN / n
        h = odeint_dense(
            P.f, P.h0, P.t0, P.t1, method=method.name, rtol=TIGHT, atol=TIGHT, options=steps_of(method, dt)
        )
        fractions = torch.tensor([0.15, 0.4, 0.7, 0.9], dtype=torch.float64)
        t = (P.t0 + dt * (torch.arange(n, dtype=torch.float64)[:, None] + fractions)).reshape(-1)
        return rms_error(h(t), P.exact(t))

    assert measured_order(error) > dense_order_in_theory(method) - 0.3


@each([m for m in PAIRS if m.name != "radau5"])
def test_dense_output_is_as_good_as_the_steps(method):
    """At a tolerance, errors between the steps are of the size of those at the ends of the steps."""
    f, ends = observed(P.f)
    tol = 1e-5 if method.order <= 3 else 1e-8
    s = solve(f, P.h0, P.times(2), method=method.name, rtol=tol, atol=tol)
    ends, between = torch.stack(ends), torch.linspace(P.t0, P.t1, 301, dtype=torch.float64)
    at_ends = float((s.interpolate(ends) - P.exact(ends)).abs().max())
    assert float((s.interpolate(between) - P.exact(between)).abs().max()) < 10 * max(at_ends, tol)


@pytest.mark.parametrize(("method", "interp"), latin(FIXED, ["linear", "cubic"]), ids=lambda x: getattr(x, "name", x))
def test_order_of_outputs_inside_fixed_steps(method, interp):
    q = {"linear": 1, "cubic": 3}[interp]

    def error(n):
        dt = SPAN / n
        t = torch.cat([P.times(2)[:1], P.t0 + dt * (torch.arange(n, dtype=torch.float64) + 0.4), P.times(2)[1:]])
        options = steps_of(method, dt, interp=interp)
        return rms_error(odeint(P.f, P.h0, t, method=method.name, rtol=TIGHT, atol=TIGHT, options=options), P.exact(t))

    assert measured_order(error) > min(order_in_theory(method), q + 1) - 0.3


@each(SMOOTH)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_dense_output_is_continuously_differentiable_across_steps(method, backward):
    """At the end of each step both polynomials have its state, and its slope f."""
    f, ends = observed(P.f)
    t = P.times(2, backward=backward)
    options = {} if method.adaptive else {"step_size": SPAN / 12}
    with torch.no_grad():
        s = solve(f, P.exact(t[0]), t, method=method.name, rtol=1e-5, atol=1e-5, options=options)
    nodes = torch.stack(ends)[1:]
    assert len(nodes) > 2
    close = 1e-6
    left, at, right = (s.interpolate(nodes + shift) for shift in (-close, 0, close))
    slopes = torch.stack([P.f(x, h) for x, h in zip(nodes, at)])
    # The rest is the second derivative's: below 200 on this problem.
    assert float((at - left - close * slopes).abs().max()) < 200 * close**2
    assert float((right - at - close * slopes).abs().max()) < 200 * close**2
