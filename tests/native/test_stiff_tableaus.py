"""The laws of the coefficients of the adaptive stiff methods.

A Rosenbrock method has order p exactly when Σ_i b_i Φ_i(τ) = 1/γ(τ) for every rooted tree τ with at most p nodes, where
a vertex with one child weighs it by β = α + Γ and one with several by α (Hairer & Wanner II, "HW", Theorem IV.7.4).
"""

import numpy as np
import pytest
from test_tableaus import Conditions, density, size, trees

from pyjlode.methods import stiff as st
from pyjlode.methods.explicit import RADAU_IIA5

ROSENBROCK = [st.RODAS5P, st.ROSENBROCK23]
ESDIRK = [st.KVAERNO5, st.KENCARP4, st.KENCARP5, st.TRBDF2]
TOL = 2e-13  # the published coefficients of rodas5p have 16 digits, and some are above 100
FAILS = 1e-5


def each(tabs):
    return pytest.mark.parametrize("tab", tabs, ids=lambda tab: tab.name)


def alphas(tab):
    """Γ, α, and weights turned from those of u_i to those of the slopes, u = Γ k."""
    Gamma = np.linalg.inv(np.eye(tab.stages) / tab.gamma - tab.C)
    return Gamma, tab.A @ Gamma


def weights(tab, tree):
    """Φ_i(τ) of a Rosenbrock method."""
    Gamma, alpha = alphas(tab)
    A = alpha + Gamma if len(tree) == 1 else alpha
    return np.prod([A @ weights(tab, child) for child in tree], axis=0) if tree else np.ones(tab.stages)


def order(tab, b, theta=1.0):
    """The order of the weights b of the slopes; asserts that the first failing order fails clearly."""
    for p in range(1, 7):
        residual = max(abs(b @ weights(tab, tree) - theta**p / density(tree)) for tree in trees(p))
        if residual > TOL:
            assert residual > FAILS
            return p - 1
    return np.inf


@each(ROSENBROCK)
def test_rosenbrock_shapes_and_sums(tab):
    Gamma, alpha = alphas(tab)
    assert not np.any(np.triu(tab.A))
    assert not np.any(np.triu(tab.C))
    np.testing.assert_allclose(np.diag(Gamma), tab.gamma, atol=TOL)
    np.testing.assert_allclose(alpha.sum(1), tab.alpha, atol=TOL)
    np.testing.assert_allclose(Gamma.sum(1), tab.gammas, atol=TOL)


@each(ROSENBROCK)
def test_rosenbrock_orders(tab):
    Gamma, _ = alphas(tab)
    assert order(tab, tab.m @ Gamma) == tab.order
    # ode23s's third stage serves the estimate alone, and makes no solution of order 3 of its own.
    assert order(tab, (tab.m - tab.E) @ Gamma) == tab.error_order
    for theta in (0.2, 0.5, 0.8):
        dense = tab.P @ theta ** np.arange(1, tab.P.shape[1] + 1)
        assert order(tab, dense @ Gamma, theta) >= tab.dense_order
    np.testing.assert_allclose(tab.P.sum(1), tab.m, atol=TOL)


@each(ROSENBROCK)
def test_rosenbrock_is_L_stable(tab):
    """R(z) = 1 + z bᵀ (I - z β)⁻¹ 1 vanishes at infinity, and is at most 1 on the imaginary axis."""
    Gamma, alpha = alphas(tab)
    b, beta, one = tab.m @ Gamma, alpha + Gamma, np.ones(tab.stages)

    def R(z):
        return 1 + z * b @ np.linalg.solve(np.eye(tab.stages) - z * beta, one)

    assert abs(R(-1e9)) < 1e-6
    assert all(abs(R(1j * y)) <= 1 + 1e-9 for y in np.logspace(-3, 4, 200))


@each([st.RODAS5P])
def test_rodas5p_is_stiffly_accurate(tab):
    """The last stages lie at y1 less what they add: the algebraic equations hold at the end of a step (HW VI.4)."""
    np.testing.assert_array_equal(tab.A[-1] + np.eye(tab.stages)[-1], tab.m)
    np.testing.assert_array_equal(tab.alpha[-3:], 1.0)


@each(ESDIRK)
def test_esdirk_orders(tab):
    conditions = Conditions(tab.A, 6)
    assert conditions.order(tab.B[:, None]) == tab.order
    assert conditions.order((tab.B - tab.E)[:, None]) == (3 if tab.name == "trbdf2_adaptive" else tab.error_order)
    for theta in (0.2, 0.5, 0.8):
        dense = (tab.P @ theta ** np.arange(1, tab.P.shape[1] + 1))[:, None]
        exact = {tree: theta ** size(tree) / density(tree) for p in range(1, tab.dense_order + 1) for tree in trees(p)}
        for tree, value in exact.items():
            assert abs(dense.sum(1) @ conditions.phi[tree] - value) < 1e-13


@each(ESDIRK)
def test_esdirk_dense_output_is_continuously_differentiable(tab):
    unit = np.eye(tab.stages)
    np.testing.assert_allclose(tab.P[:, 0], unit[0], atol=1e-13)
    np.testing.assert_allclose(tab.P.sum(1), tab.B, atol=1e-13)
    np.testing.assert_allclose(tab.P @ np.arange(1, tab.P.shape[1] + 1), unit[-1], atol=1e-13)


@each(ESDIRK)
def test_esdirk_form_and_L_stability(tab):
    assert not np.any(np.triu(tab.A, 1))
    np.testing.assert_array_equal(np.diag(tab.A)[1:], tab.gamma)
    assert tab.A[0, 0] == 0
    z = -1e8
    assert abs(1 + z * tab.B @ np.linalg.solve(np.eye(tab.stages) - z * tab.A, np.ones(tab.stages))) < 1e-6


def test_radau5_transforms_the_tableau_of_radau_iia():
    tab = st.RADAU5
    np.testing.assert_allclose(tab.A, RADAU_IIA5.A, atol=1e-16)
    a, b = tab.pair.real, tab.pair.imag
    block = np.array([[tab.real, 0, 0], [0, a, b], [0, -b, a]])
    np.testing.assert_allclose(np.linalg.inv(tab.T) @ np.linalg.inv(tab.A) @ tab.T, block, atol=2e-13)
    assert tab.real == pytest.approx(3.6378342527444957, abs=1e-13)  # HW IV.8: γ̂


def test_radau5_dense_output_is_the_collocation_polynomial():
    tab = st.RADAU5
    np.testing.assert_allclose(tab.C[:, None] ** np.arange(1, 4) @ tab.P.T, np.eye(3), atol=1e-13)


def test_radau5_estimate_is_that_of_the_embedded_formula():
    """HW (IV.8.17): with γ₀ f(t, y) it is a quadrature of order 3 less that of the method: O(dt⁴)."""
    tab = st.RADAU5
    # dt γ₀ (f(t, y) + Σ e_i z_i / dt) with z = dt A k: weights of f(t, y) and of the slopes k.
    b0, b = 1 / tab.real, tab.e @ tab.A / tab.real
    for q in range(1, 4):
        at_start = b0 if q == 1 else 0.0
        assert at_start + b @ tab.C ** (q - 1) == pytest.approx(0.0, abs=1e-13)
    assert abs(b @ tab.C**3) > 1e-3


@pytest.mark.parametrize("k", range(1, 6))
def test_ndf_is_of_order_k_with_its_error_constant(k):
    """Shampine & Reichelt (1997), (4): applied to polynomials, on the grid 0, -1, -2, ... with dt = 1, the formula
    Σ_m ∇^m y / m - κ γ_k (y - y⁽⁰⁾) = y' holds up to degree k, and y⁽⁰⁾ misses y by ∇^(k+1) y."""
    tab = st.NDF

    def differences(q):
        values = np.array([0.0**q if q else 1.0, *((-1.0) ** q * np.arange(1, k + 2.0) ** q)])
        out = []
        while len(values):
            out.append(values[0])
            values = values[:-1] - values[1:]
        return np.array(out)

    for q in range(k + 2):
        D = differences(q)
        left = sum(D[m] / m for m in range(1, k + 1)) - tab.kappa[k] * tab.gamma[k] * D[k + 1]
        slope = 1.0 if q == 1 else 0.0
        if q <= k:
            assert left == pytest.approx(slope, abs=1e-12)
        else:
            assert slope - left == pytest.approx(tab.error[k] * D[k + 1], abs=1e-9)
