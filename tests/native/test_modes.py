"""What the caller's process is set to: inference mode, a default device; and solves that do not come to an end."""

import time
import warnings

import pytest
import torch

from pyjlode import METHODS, errors, odeint, odeint_event, solve, solver
from pyjlode.native import esdirk, explicit, rosenbrock
from pyjlode.native.explicit import boundary

F64 = torch.float64
NATIVE = [m for m in METHODS.values() if m.kind not in ("scipy", "julia", "second")]
EXPLICIT = [m.name for m in NATIVE if m.kind == "adaptive"]
MASS = [m.name for m in NATIVE if m.mass]
GRADIENTS = [False, "discrete", "interpolating", "quadrature", "gauss", "forward"]


def options_of(method):
    more = {"max_iters": 50} if method == "implicit_adams" else {}
    fixed = METHODS[method].kind in ("fixed", "implicit", "adams", "reversible")
    return {"step_size": 0.25, **more} if fixed else None


def gradient(method, adjoint, moving=False):
    weight = torch.tensor([[-1.0, 0.5], [0.2, -0.7]], dtype=F64, device="cpu", requires_grad=True)
    h0 = torch.tensor([1.0, 0.5], dtype=F64, device="cpu", requires_grad=True)
    t = torch.tensor([0.0, 0.25, 0.5], dtype=F64, device="cpu", requires_grad=moving)
    h = odeint(
        lambda t, h: torch.tanh(h) @ weight + torch.sin(t),
        h0,
        t,
        method=method,
        rtol=1e-2,
        atol=1e-2,
        adjoint=adjoint,
        options=options_of(method),
        engine="torch",
    )
    return torch.autograd.grad(h.sum(), (weight, h0, t) if moving else (weight, h0))


@pytest.mark.parametrize("method", [m.name for m in NATIVE])
def test_training_after_a_solve_in_inference_mode(method):
    """What is kept between solves is made outside of it; and Jacobians are autograd's in it, too."""
    for cache in (explicit.coefficients, rosenbrock.coefficients, esdirk.coefficients):
        cache.cache_clear()
    stiff = METHODS[method].controlled or METHODS[method].kind == "implicit"
    rate = torch.nn.Parameter(torch.tensor([0.5, 200.0 if stiff else 2.0], dtype=F64))

    def solved():
        h0, t = torch.ones(2, dtype=F64), torch.tensor([0.0, 0.1, 1.0], dtype=F64)
        return odeint(
            lambda t, h: -rate * (h - torch.cos(t)),
            h0,
            t,
            method=method,
            options=options_of(method),
            adjoint=True,
            engine="torch",
            rtol=1e-4,
        )

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        h = solved()
        assert h.is_inference()
    with torch.no_grad():
        torch.testing.assert_close(h.clone(), solved(), rtol=1e-9, atol=0)
    first, second = ([gradient(method, adjoint, True) for adjoint in (False, "discrete", "gauss")] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("method", [m.name for m in NATIVE])
def test_a_default_device_that_is_not_the_states_changes_nothing(method):
    """Every gradient; by the times, too, in every other one, and with the next method in the others."""
    adjoints = GRADIENTS if METHODS[method].controlled else [*GRADIENTS, "backsolve"]
    first = [m.name for m in NATIVE].index(method)
    cases = [(adjoint, bool((first + k) % 2)) for k, adjoint in enumerate(adjoints)]
    expected = [gradient(method, *case) for case in cases]
    with torch.device("meta"):
        torch.testing.assert_close([gradient(method, *case) for case in cases], expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", [m.name for m in NATIVE])
def test_dense_output_events_and_lists_of_times_on_another_default_device(method):
    h0 = torch.tensor([1.0, 0.5], dtype=F64)
    kwargs = {"method": method, "rtol": 1e-6, "atol": 1e-8, "options": options_of(method), "engine": "torch"}

    def results():
        solution = solve(lambda t, h: -h, h0, [0.0, 1.0], **kwargs)
        event_t, _ = odeint_event(lambda t, h: -h, h0, 0.0, event_fn=lambda t, h: h[0] - 0.5, **kwargs)
        return solution.h, solution.interpolate(torch.tensor([0.3, 0.7], dtype=F64, device="cpu")), event_t

    expected = results()
    with torch.device("meta"):
        torch.testing.assert_close(results(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", MASS)
def test_a_mass_matrix_on_another_default_device(method):
    mass, h0 = torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), torch.tensor([1.0, 0.3], dtype=F64)

    def results(adjoint):
        p = torch.ones((), dtype=F64, device="cpu", requires_grad=True)
        t = torch.tensor([0.0, 0.1], dtype=F64, device="cpu")
        h = odeint(
            lambda t, h: torch.stack([-p * h[0], h[1] - p * h[0]]),
            h0,
            t,
            method=method,
            mass_matrix=mass,
            adjoint=adjoint,
            options={"consistent": "compute"},
            engine="torch",
        )
        return torch.autograd.grad(h[-1].sum(), p)

    for adjoint in GRADIENTS:
        expected = results(adjoint)
        with torch.device("meta"):
            torch.testing.assert_close(results(adjoint), expected, rtol=0, atol=0)


def robertson(t, h):
    a, b, c = h.unbind(-1)
    slow, fast, back = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return torch.stack([back - slow, slow - back - fast, fast])


CRAWLING = [*zip(["dopri5", "tsit5", "dopri8", "vern7", "vern9"], [1e-4, 1e-7, 1e-4, 1e-7, 1e-4])]
CRAWLING += [pytest.param(method, 1e-11 / tol, marks=pytest.mark.slow) for method, tol in CRAWLING]


@pytest.mark.parametrize(("method", "tol"), CRAWLING)
def test_an_explicit_method_that_crawls_says_so_early_and_once(method, tol):
    """Robertson to t = 400 takes an explicit method 1e5 steps and more."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(errors.MaxStepsReached):
            odeint(
                robertson,
                torch.tensor([1.0, 0.0, 0.0], dtype=F64),
                torch.tensor([0.0, 400.0], dtype=F64),
                method=method,
                rtol=tol,
                atol=tol * 1e-4,
                options={"max_num_steps": 1200},
                engine="torch",
            )
    assert [w.category for w in caught] == [UserWarning]
    assert "method='auto'" in str(caught[0].message)
    assert "stiff" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3", "vern7", "vern9"])
def test_a_long_solve_that_is_not_stiff_is_no_crawl(method, tol, monkeypatch):
    """Hundreds of steps that accuracy limits, as many as would be a crawl: an oscillator."""
    monkeypatch.setattr(explicit, "CRAWL", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint(
            lambda t, h: torch.stack([h[1], -h[0] * (1 + h[0] ** 2)]),
            torch.tensor([1.0, 0.0], dtype=F64),
            torch.tensor([0.0, 200.0 if METHODS[method].order > 3 else 20.0], dtype=F64),
            method=method,
            rtol=tol,
            atol=tol,
            engine="torch",
        )


def test_a_stiff_solve_of_few_steps_is_not_told():
    """One that is over soon costs nobody anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint(lambda t, h: -300 * (h - torch.cos(t)), torch.ones(1, dtype=F64), [0.0, 1.0], engine="torch")


def test_boundaries_of_stability():
    """Hairer & Wanner, Solving ODEs II IV.2: 3.3 for DOPRI5, 2.51 for three stages of order 3, 2 for two of order 2."""
    assert abs(boundary(METHODS["dopri5"].tableau) - 3.3066) < 0.01
    assert abs(boundary(METHODS["bosh3"].tableau) - 2.5127) < 0.01
    assert abs(boundary(METHODS["adaptive_heun"].tableau) - 2) < 0.01


@pytest.mark.parametrize(
    ("method", "steps"), [("dopri5", 500), ("rk4", 500), pytest.param("dopri5", None, marks=pytest.mark.slow)]
)
def test_an_event_that_is_never_met_ends(method, steps, monkeypatch):
    """By a limit that is there without the user's asking, and is short enough to wait for."""
    if steps:
        monkeypatch.setattr(solver, "EVENT_STEPS", steps)
    start = time.perf_counter()
    with pytest.raises(errors.EventNotFound, match="max_num_steps"):
        odeint_event(
            lambda t, h: torch.stack([h[1], -h[0]]),
            torch.tensor([1.0, 0.0], dtype=F64),
            0.0,
            event_fn=lambda t, h: h[0] - 2,
            method=method,
            options=options_of(method),
            engine="torch",
        )
    assert time.perf_counter() - start < 90  # a third of that alone on a machine


def test_the_users_own_limit_holds_for_events():
    with pytest.raises(errors.EventNotFound):
        odeint_event(
            lambda t, h: torch.stack([h[1], -h[0]]),
            torch.tensor([1.0, 0.0], dtype=F64),
            0.0,
            event_fn=lambda t, h: h[0] - 2,
            options={"max_num_steps": 50},
        )
