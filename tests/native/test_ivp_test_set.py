"""Systems of the Test Set for IVP Solvers against its reference solutions."""

import ivp_test_set as ts
import pytest
import torch

from pyjlode import solve

F64 = torch.float64


def end(system, method, tol, mass=None, start=None, atol=None, **options):
    f, y0, (t1, _) = SYSTEMS[system]
    return solve(
        f,
        y0 if start is None else start,
        torch.tensor([0.0, t1], dtype=F64),
        method=method,
        rtol=tol,
        atol=tol if atol is None else atol,
        mass_matrix=mass,
        options={"max_num_steps": 100_000, **options},
        dense=False,
        engine="torch",
    ).h


SYSTEMS = {
    "amplifier": (ts.amplifier, ts.AMPLIFIER_START, ts.AMPLIFIER_END),
    "squeezer": (ts.squeezer, ts.SQUEEZER_START, ts.SQUEEZER_END),
}


@pytest.mark.parametrize(
    ("method", "tol", "digits"),
    [
        pytest.param("rodas5p", 1e-3, 1e-3, id="rodas5p"),
        pytest.param("radau5", 1e-4, 4e-5, id="radau5", marks=pytest.mark.slow),
        pytest.param("bdf", 1e-5, 1e-3, id="bdf", marks=pytest.mark.slow),
        pytest.param("radau5", 1e-6, 2e-7, id="radau5-tight", marks=pytest.mark.slow),
    ],
)
def test_transistor_amplifier(method, tol, digits):
    """A DAE of index 1 whose mass matrix has rank 5, with the start as it is published: it is consistent."""
    h = end("amplifier", method, tol, ts.AMPLIFIER_MASS)
    assert float((h[-1] / ts.AMPLIFIER_END[1] - 1).abs().max()) < digits


@pytest.mark.parametrize(
    ("method", "tol", "digits"),
    [
        pytest.param("rodas5p", 1e-5, 1e-4, id="rodas5p"),
        pytest.param("radau5", 1e-5, 1e-5, id="radau5", marks=pytest.mark.slow),
        pytest.param("radau5", 1e-7, 1e-9, id="radau5-tight", marks=pytest.mark.slow),
    ],
)
def test_squeezer(method, tol, digits):
    """Its index reduced from 3 to 1. Accelerations and forces at the start are computed, and are those published."""
    y0 = torch.cat([ts.SQUEEZER_START, torch.zeros(20, dtype=F64)])
    h = end("squeezer", method, tol, ts.SQUEEZER_MASS, start=y0, consistent="compute")
    assert h[0, 14:16].tolist() == pytest.approx([14222.4439199541138705911625887, -10666.8329399655854029433719415])
    assert h[0, 21:23].tolist() == pytest.approx([98.5668703962410896057654982170, -6.12268834425566265503114393122])
    assert float((h[-1, :7] / ts.SQUEEZER_END[1] - 1).abs().max()) < digits
    assert float((h[-1, 21:] / ts.SQUEEZER_FORCES - 1).abs().max()) < max(10 * digits, 1e-5)
    assert float(ts.squeezer_constraints(h[-1, :7]).abs().max()) < digits


def test_the_equations_at_the_published_solution():
    """The loops close at the published end, whose numbers were found without these equations."""
    assert float(ts.squeezer_constraints(ts.SQUEEZER_END[1]).abs().max()) < 1e-15
