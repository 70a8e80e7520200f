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
    "crank": (ts.slider_crank, ts.CRANK_START, ts.CRANK_END),
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


@pytest.mark.parametrize("at", ["start", "end"])
def test_slider_crank_at_the_published_states(at):
    """Accelerations and the forces in the joints follow from places and velocities, and are those published; the start
    is printed with nine digits."""
    k = ("start", "end").index(at)
    t = torch.tensor(0.1 * k, dtype=F64)
    x, v = ts.CRANK_START.split(7) if at == "start" else (ts.CRANK_END[1], ts.CRANK_END_VELOCITIES)
    y = torch.cat([x, v, torch.zeros(10, dtype=F64)])
    J = torch.func.jacrev(ts.slider_crank, 1)(t, y)[14:, 14:]
    found = -torch.linalg.solve(J, ts.slider_crank(t, y)[14:])  # the equations are linear in them
    assert torch.allclose(found, ts.CRANK_FORCES[k], rtol=1e-7 if at == "end" else 2e-6, atol=1e-6)
    assert float(ts.crank_constraints(t, x).abs().max()) < (1e-8 if at == "end" else 1e-7)


@pytest.mark.slow
def test_slider_crank():
    """Its index reduced from 2 to 1, with undamped vibrations of the rod: 200 of them until the end."""
    y0 = torch.cat([ts.CRANK_START, torch.zeros(10, dtype=F64)])
    h = end("crank", "rodas5p", 1e-5, ts.CRANK_MASS, start=y0, atol=1e-9, consistent="compute")
    x = ts.CRANK_END[1]
    assert float((h[-1, :7] / x - 1).abs().max()) < 2e-4
    assert float(ts.crank_constraints(torch.tensor(0.1), h[-1, :7]).abs().max()) < 1e-6
