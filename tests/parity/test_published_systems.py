"""Julia's solvers on systems with published or accurate solutions: stiff oscillators, circuits, mechanisms."""

import ivp_test_set as ts
import pytest
import stiff_problems as sp
import torch

from pyjlode import solve

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64


def end(f, y0, t1, method, tol, atol, mass=None, **how):
    t = torch.tensor([0.0, t1], dtype=F64)
    options = {"max_num_steps": 1_000_000, **how}
    given = {"mass_matrix": mass, "options": options, "dense": False, "engine": "julia", "compile": True}
    return solve(f, y0, t, method=method, rtol=tol, atol=atol, **given)


@pytest.mark.parametrize("tol", [1e-4, 1e-9])
@pytest.mark.parametrize("problem", [sp.ROBERTSON, sp.VAN_DER_POL_SCALED, sp.VAN_DER_POL_STIFFER], ids=lambda x: x.name)
def test_bdf_of_relaxation_oscillators(problem, tol):
    """Within 30 times the tolerance, in some thousand steps. With eps = 1e-6 and at 1e-4, Julia's FBDF ends on another
    branch."""
    found = end(problem.f, problem.y0, problem.t1, "bdf", tol, problem.atol(tol))
    assert problem.error(found.h[-1], tol) < 30
    assert found.stats.naccept < 5000


def test_ring_modulator():
    """Two transformers and a ring of four diodes, to the end of 70,000 steps."""
    t1, published = ts.RING_END
    h = end(ts.ring_modulator, ts.RING_START, t1, "rodas5p", 1e-6, 1e-8).h
    assert float((h[-1] / published - 1).abs().max()) < 1e-4


def test_ring_modulator_on_both_engines():
    t1 = 1e-6
    h = end(ts.ring_modulator, ts.RING_START, t1, "rodas5p", 1e-6, 1e-8).h[-1]
    t = torch.tensor([0.0, t1], dtype=F64)
    given = {"rtol": 1e-6, "atol": 1e-8, "options": {"max_num_steps": 10_000}, "dense": False}
    native = solve(ts.ring_modulator, ts.RING_START, t, method="rodas5p", **given).h[-1]
    assert torch.allclose(h, native, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_slider_crank():
    """Its index reduced to 1, and its start computed."""
    t1, published = ts.CRANK_END
    y0 = torch.cat([ts.CRANK_START, torch.zeros(10, dtype=F64)])
    h = end(ts.slider_crank, y0, t1, "rodas5p", 1e-7, 1e-12, ts.CRANK_MASS, consistent="compute").h
    assert torch.allclose(h[0, 14:], ts.CRANK_FORCES[0], rtol=2e-6, atol=1e-6)
    assert float((h[-1, :7] / published - 1).abs().max()) < 1e-6
    assert torch.allclose(h[-1, 14:], ts.CRANK_FORCES[1], rtol=1e-3)


@pytest.mark.parametrize(("method", "digits"), [("rodas5p", 1e-6), ("bdf", 1e-3)])
def test_transistor_amplifier(method, digits):
    t1, published = ts.AMPLIFIER_END
    h = end(ts.amplifier, ts.AMPLIFIER_START, t1, method, 1e-4, 1e-6, ts.AMPLIFIER_MASS).h
    assert float((h[-1] / published - 1).abs().max()) < digits
