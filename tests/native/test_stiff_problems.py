"""Published reference values of stiff problems, numbers of steps, switching, and closed orbits."""

import numpy as np
import pytest
import stiff_problems as sp
import torch
from designs import covering, latin
from scipy.integrate import solve_ivp

from pyjlode import METHODS, solve

F64 = torch.float64
ACCURATE = [m.name for m in METHODS.values() if m.controlled and m.order > 2]
METHOD = pytest.mark.parametrize("method", ACCURATE)
# Van der Pol's oscillator stands there in two units of time.
STIFF = [problem for problem in sp.STIFF if problem is not sp.VAN_DER_POL_SCALED]


def named(x):
    return x.name if isinstance(x, sp.Stiff) else str(x)


def each(problems):
    return pytest.mark.parametrize("problem", problems, ids=named)


SOLVED = {}


def end(problem, method, tol):
    """The solution at the end: once for all who ask."""
    key = problem.name, method, tol
    if key not in SOLVED:
        kwargs = {"method": method, "rtol": tol, "atol": problem.atol(tol), "dense": False}
        SOLVED[key] = solve(problem.f, problem.y0, problem.times, **kwargs)
    return SOLVED[key]


@pytest.mark.parametrize(
    ("problem", "method", "tol"),
    [
        *covering(STIFF, ACCURATE, [1e-4, 1e-5]),
        (sp.VAN_DER_POL_SCALED, "rodas5p", 1e-6),
        *(pytest.param(*row.values[:2], 1e-6, marks=pytest.mark.slow) for row in covering(STIFF, ACCURATE)),
    ],
    ids=named,
)
def test_reference_value(problem, method, tol):
    """The error is within 30 times the tolerance, at an easy one or a tighter one."""
    assert problem.error(end(problem, method, tol).h[-1], tol) < 30


@each([sp.ROBERTSON_40, *(pytest.param(x, marks=pytest.mark.slow) for x in (sp.HIRES, sp.VAN_DER_POL))])
@pytest.mark.parametrize("method", ["radau5", "bdf"])
def test_tight_tolerance(problem, method):
    assert problem.error(end(problem, method, 1e-8).h[-1], 1e-8) < 30


def test_tight_tolerance_on_a_cycle_that_multiplies_errors():
    assert sp.OREGONATOR.error(end(sp.OREGONATOR, "bdf", 1e-9).h[-1], 1e-9) < 30


@pytest.mark.parametrize("method", ["kencarp4", "kencarp5", "kvaerno5", "trbdf2_adaptive"])
def test_no_jacobian_of_a_transient_is_kept(method):
    """After the jump steps grow by nine orders of size; with its Jacobian Newton's iteration would look converged."""
    problem = sp.VAN_DER_POL_STIFFER
    assert problem.error(end(problem, method, 1e-4).h[-1], 1e-4) < 30


@pytest.mark.parametrize("method", ["rodas5p", "radau5", "bdf", "kvaerno5", "kencarp4", "kencarp5"])
def test_stiff_oscillation(method):
    """An error estimate damped in the stiff components misses what they add to the error."""
    # h = (cos t, 0) + e with e' = A e + (sin t, 0), whose smooth solution is Re((i - A)^-1 (-i, 0) exp(i t)).
    A = np.array([[-10, -1e4], [1e4, -10]])
    smooth = np.linalg.solve(1j * np.eye(2) - A, np.array([-1j, 0]))
    start, last = ((np.array([np.cos(t), 0]) + (smooth * np.exp(1j * t)).real).tolist() for t in (0.0, 1.0))
    problem = sp.Stiff("stiff oscillation", sp.stiff_oscillation, start, 1.0, last)
    # The formulas of bdf above order 2 are unstable here, and tight tolerances need them.
    for tol in (1e-4, 1e-6) if method == "bdf" else (1e-4, 1e-7):
        assert problem.error(end(problem, method, tol).h[-1], tol) < 30


@pytest.mark.parametrize("method", ["rodas5p", "radau5", "bdf"])
def test_reference_value_of_a_dae(method):
    problem, M = sp.AKZO_NOBEL, torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=F64))
    for tol in (1e-4, 1e-7):
        atol = problem.atol(tol)
        h = solve(problem.f, problem.y0, problem.times, method=method, rtol=tol, atol=atol, mass_matrix=M).h[-1]
        assert problem.error(h, tol) < 30


@pytest.mark.parametrize(("method", "theirs"), [("radau5", "Radau"), ("bdf", "BDF")])
@pytest.mark.parametrize(("problem", "tol"), latin(STIFF, [1e-4, 1e-5, 1e-6]), ids=named)
def test_as_few_steps_as_scipy(problem, method, theirs, tol):
    atol = problem.atol(tol).numpy()
    steps = len(solve_ivp(problem.f_numpy, (0, problem.t1), problem.h0, method=theirs, rtol=tol, atol=atol).t) - 1
    assert end(problem, method, tol).stats.naccept <= 1.5 * steps


def test_counts_of_work():
    """Reuse: fewer Jacobians than factorisations, fewer of these than steps allow."""
    stats = end(sp.VAN_DER_POL, "radau5", 1e-5).stats
    assert 0 < stats.njac < stats.naccept
    assert stats.njac < stats.nlu < 2 * (stats.naccept + stats.nreject) + 2 * stats.njac
    assert stats.nfe > 3 * stats.nnewton > 0
    stats = end(sp.VAN_DER_POL, "bdf", 1e-5).stats
    assert stats.njac < 0.2 * stats.naccept
    stats = end(sp.VAN_DER_POL, "rodas5p", 1e-5).stats
    assert stats.njac == stats.naccept
    assert stats.nlu == stats.naccept + stats.nreject
    assert stats.nnewton == 0


# --- Switching -------------------------------------------------------------------------------------------------------


def test_auto_switches_at_the_jumps_of_van_der_pol():
    """Two slow phases, stiff, and the jump between them at t = 807, which is not."""
    solution = end(sp.VAN_DER_POL, "auto", 1e-6)
    assert [name for _, name in solution.stats.switches[:3]] == ["rodas5p", "tsit5", "rodas5p"]
    assert solution.stats.switches[0][0] < 1
    assert solution.stats.switches[1][0] == pytest.approx(807, abs=1)
    assert solution.stats.naccept < 600


@pytest.mark.parametrize("tol", [1e-5, 1e-8, pytest.param(1e-10, marks=pytest.mark.slow)])
def test_auto_finds_stiffness_at_every_tolerance(tol):
    """The stiff component has no part in the solution, the less the tighter the tolerance; explicit steps to the end
    would be tens of thousands."""
    solution = end(sp.ROBERTSON_40, "auto", tol)
    assert solution.stats.switches[0][0] < 0.1
    assert solution.stats.naccept < 1000


@each([sp.ARENSTORF, sp.TWO_BODY])
def test_auto_stays_explicit_on_orbits_which_close(problem):
    solution = end(problem, "auto", 1e-9)
    assert solution.stats.switches == []
    # The orbits are unstable: HNW II.0 and Kepler's third law say by how much.
    assert float((solution.h[-1] - torch.tensor(problem.end, dtype=F64)).abs().max()) < 1e-3


def test_auto_takes_bdf_for_large_systems(monkeypatch):
    from pyjlode.native import auto, linear

    monkeypatch.setattr(auto, "DENSE_LIMIT", 20)
    monkeypatch.setattr(linear, "DENSE_LIMIT", 20)
    n = 40
    h0, t = torch.tensor(sp.heat_modes(n, 0.0), dtype=F64), torch.tensor([0.0, 0.2], dtype=F64)
    problem = sp.Stiff("heat", sp.heat, h0.tolist(), 0.2, sp.heat_modes(n, 0.2))
    solution = solve(problem.f, h0, t, method="auto", rtol=1e-5, atol=1e-5, dense=False)
    assert solution.stats.switches[0][1] == "bdf"
    assert problem.error(solution.h[-1], 1e-5) < 30


# --- Batches ---------------------------------------------------------------------------------------------------------


SEVERAL = torch.tensor([0.04, 3e7, 1e4], dtype=F64) * torch.logspace(-1, 1, 5, dtype=F64)[:, None]
SEVERAL_ATOL = 1e-6 * torch.tensor([1.0, 1e-4, 1.0], dtype=F64)


@pytest.fixture(scope="module")
def ends_by_scipy():
    """Robertson's reaction at t = 40, for several sets of rates."""
    how = {"method": "Radau", "rtol": 1e-9, "atol": 1e-3 * SEVERAL_ATOL.numpy()}
    ends = [
        solve_ivp(lambda t, h, k=k: sp.robertson(t, h, np, k), (0, 40), [1.0, 0, 0], **how).y[:, -1]
        for k in SEVERAL.tolist()
    ]
    return torch.tensor(np.array(ends), dtype=F64)


@METHOD
def test_batch_of_systems(method, ends_by_scipy):
    """Each system of a batch is solved as well as it is alone, with blocks of the Jacobian only."""

    def f(t, h):
        return torch.stack(sp.robertson_terms(h.unbind(-1), SEVERAL.unbind(-1)), -1)

    h0, t = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64).repeat(5, 1), torch.tensor([0.0, 40.0], dtype=F64)
    options = {"batch_dims": 1}
    h = solve(f, h0, t, method=method, rtol=1e-6, atol=SEVERAL_ATOL, options=options, dense=False).h[-1]
    errors = (h - ends_by_scipy) / (SEVERAL_ATOL + 1e-6 * ends_by_scipy)
    assert float(errors.square().mean(-1).sqrt().max()) < 30


def test_batch_with_several_dimensions_is_the_same_batch():
    def f(t, h):
        return -torch.stack([1e3 * h[..., 0] * h[..., 1] ** 2, h[..., 1]], -1)

    h0 = torch.rand(2, 3, 2, dtype=F64) + 0.5
    t = torch.tensor([0.0, 1.0], dtype=F64)
    whole = solve(f, h0, t, method="radau5", options={"batch_dims": 2}).h
    flat = solve(f, h0.reshape(6, 2), t, method="radau5", options={"batch_dims": 1}).h
    torch.testing.assert_close(whole.reshape(2, 6, 2), flat, rtol=0, atol=0)
