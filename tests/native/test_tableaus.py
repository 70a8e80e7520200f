"""The laws of a Butcher tableau, checked on every tableau of the native engine.

A Runge-Kutta method has order p exactly when Σ_i b_i Φ_i(τ) = 1/γ(τ) for every rooted tree τ with at most p nodes
(Butcher 1963; Hairer, Nørsett & Wanner I, "HNW", Theorem II.2.13). With θ^|τ|/γ(τ) on the right the same law gives the
order of the dense output at θ. A tree is written as the tuple of its root's subtrees. "HW" is Hairer & Wanner II.
"""

from functools import cache

import numpy as np
import pytest

from pyjlode.methods import METHODS, stiff
from pyjlode.methods import explicit as tableaus
from pyjlode.methods.explicit import ExplicitTableau, ImplicitTableau
from pyjlode.methods.second import SymplecticTableau

EXPLICIT = [tab for tab in vars(tableaus).values() if isinstance(tab, ExplicitTableau)]
IMPLICIT = [tab for tab in vars(tableaus).values() if isinstance(tab, ImplicitTableau)]
ADAPTIVE = [tab for tab in EXPLICIT if tab.E is not None]
GAUSS = [tableaus.IMPLICIT_MIDPOINT, tableaus.GAUSS_LEGENDRE4, tableaus.GAUSS_LEGENDRE6]
RADAU = [tableaus.IMPLICIT_EULER, tableaus.RADAU_IIA3, tableaus.RADAU_IIA5]
L_STABLE = [*RADAU, tableaus.SDIRK2, tableaus.TRBDF2]
THETAS = [0.1, 0.35, 0.5, 0.7, 0.9]

# Residuals are measured in units of the sum of the moduli of their terms, so that TOL counts roundings: here every
# condition that holds does so within 2e-16. Those that fail, fail by FAILS at least; the least is the dense output of
# VERN7 at order 7, because its P has large entries that cancel.
TOL = 5 * np.finfo(float).eps
FAILS = 5e-13


def each(tabs):
    return pytest.mark.parametrize("tab", tabs, ids=lambda tab: tab.name)


# --- Rooted trees ----------------------------------------------------------------------------------------------------


def grafted(tree):
    """All trees with one leaf more than `tree`."""
    yield tuple(sorted((*tree, ())))
    for i, child in enumerate(tree):
        for grown in grafted(child):
            yield tuple(sorted((*tree[:i], grown, *tree[i + 1 :])))


@cache
def trees(order):
    """All rooted trees with `order` nodes."""
    return [()] if order == 1 else sorted({grown for tree in trees(order - 1) for grown in grafted(tree)})


@cache
def size(tree):
    return 1 + sum(map(size, tree))


@cache
def density(tree):
    """γ(τ): the product of the sizes of all subtrees."""
    return size(tree) * int(np.prod([density(child) for child in tree]))


def elementary_weights(A, max_order):
    """τ -> Φ(τ), a vector over the stages: Φ(τ)_i = Π_children (A Φ(child))_i."""
    weights = {}
    for order in range(1, max_order + 1):
        for tree in trees(order):
            weights[tree] = np.prod([A @ weights[child] for child in tree], axis=0) if tree else np.ones(len(A))
    return weights


class Conditions:
    """The order conditions of weights over the stages of A."""

    def __init__(self, A, max_order):
        self.phi = elementary_weights(A, max_order)
        self.modulus = elementary_weights(np.abs(A), max_order)

    def residual(self, terms, order, theta=1.0, exact=1.0):
        """The largest relative residual at `order`; exact=0 asks that the weights vanish on every tree."""
        b, b_modulus = terms.sum(axis=1), np.abs(terms).sum(axis=1)
        return max(
            abs(b @ self.phi[tree] - exact * theta**order / density(tree))
            / (b_modulus @ self.modulus[tree] + theta**order / density(tree))
            for tree in trees(order)
        )

    def order(self, terms, theta=1.0, exact=1.0):
        """The order of the weights Σ_j terms[:, j]; asserts that the first failing order fails clearly."""
        for order in range(1, max(map(size, self.phi)) + 1):
            residual = self.residual(terms, order, theta, exact)
            if residual > TOL:
                assert residual > FAILS, f"order {order}: {residual:.1e} is neither rounding nor a failure"
                return order - 1
        return np.inf


@cache
def conditions(tab):
    """Order conditions over all rows of K: the stages, f(t + dt, y1) and the extra stages."""
    return Conditions(full_A(tab), tab.order + 1)


def full_A(tab):
    s, x = tab.stages, len(tab.C_extra)
    A = np.zeros((s + 1 + x, s + 1 + x))
    A[:s, :s], A[s, :s], A[s + 1 :] = tab.A, tab.B, tab.A_extra
    return A


def padded(tab, weights):
    """Weights over the first rows of K as a column over all rows."""
    return np.pad(weights, (0, tab.stages + 1 + len(tab.C_extra) - len(weights)))[:, None]


def dense_terms(tab, theta):
    """The terms P[i, j] θ^(j+1) of the weights of dense output at θ."""
    return tab.P * theta ** np.arange(1, tab.P.shape[1] + 1)


def test_number_of_rooted_trees():
    """The known count, OEIS A000081."""
    assert [len(trees(order)) for order in range(1, 11)] == [1, 1, 2, 4, 9, 20, 48, 115, 286, 719]


# --- Explicit methods ------------------------------------------------------------------------------------------------


@each(EXPLICIT)
def test_explicit_shapes(tab):
    s, x = tab.stages, len(tab.C_extra)
    assert tab.A.shape == (s, s)
    assert tab.B.shape == tab.C.shape == (s,)
    assert tab.A_extra.shape == (x, s + 1 + x)
    assert not np.any(np.triu(full_A(tab)))
    assert (tab.E is None) == (tab.P is None) == (tab.error_order == 0) == (tab.dense_order == 0)
    if tab.E is not None:
        assert tab.E.shape[1] == s + 1
        assert tab.P.shape[0] == s + 1 + x
    for array in (tab.A, tab.B, tab.C, tab.E, tab.P, tab.A_extra, tab.C_extra):
        assert array is None or array.dtype == np.float64


@each(EXPLICIT)
def test_rows_of_A_sum_to_C(tab):
    A, C = full_A(tab), np.concatenate([tab.C, [1.0], tab.C_extra])
    assert np.all(np.abs(A.sum(axis=1) - C) <= TOL * (1 + np.abs(A).sum(axis=1)))


@each(EXPLICIT)
def test_order_of_the_step(tab):
    assert conditions(tab).order(padded(tab, tab.B)) == tab.order


@each([tab for tab in ADAPTIVE if len(tab.E) == 1])
def test_order_of_the_embedded_solution(tab):
    assert conditions(tab).order(padded(tab, np.append(tab.B, 0.0) - tab.E[0])) == tab.error_order


@pytest.mark.parametrize(("row", "order"), [(0, 5), (1, 3)])
def test_orders_of_the_two_estimates_of_dop853(row, order):
    """HNW II.10: the estimates are O(dt^6) and O(dt^4); E5² / E3 is then O(dt^8)."""
    tab = tableaus.DOPRI8
    assert conditions(tab).order(padded(tab, tab.E[row]), exact=0.0) == order
    assert tab.error_order == 2 * 5 - 3


@each(ADAPTIVE)
def test_fsal_means_that_the_error_uses_the_new_slope(tab):
    assert tab.fsal == (tab.name in {"bosh3", "dopri5", "tsit5"})


@each(ADAPTIVE)
@pytest.mark.parametrize("theta", THETAS)
def test_order_of_the_dense_output(tab, theta):
    assert conditions(tab).order(dense_terms(tab, theta), theta) == tab.dense_order


@pytest.mark.parametrize("theta", THETAS)
def test_vern7_dense_output_is_nearly_of_order_7(theta):
    """Verner publishes it as of order 7; what it lacks is far below its error of the next order."""
    tab = tableaus.VERN7
    weights, phi = dense_terms(tab, theta).sum(axis=1), conditions(tab).phi
    defects = [abs(weights @ phi[tree] - theta**7 / density(tree)) for tree in trees(7)]
    assert sum(defect > 1e-12 for defect in defects) == 12
    assert max(defects) < 1e-6


@each(ADAPTIVE)
def test_dense_output_ends_at_the_step(tab):
    """Continuity: the weights at θ = 1 are B, and nothing on f(t + dt, y1) and the extra stages."""
    rounding = TOL * np.abs(tab.P).sum(axis=1)
    assert np.all(np.abs(tab.P.sum(axis=1) - padded(tab, tab.B)[:, 0]) <= rounding)


@each(ADAPTIVE)
def test_dense_output_is_continuously_differentiable(tab):
    """Its slope is f(t, y) at θ = 0 and f(t + dt, y1) at θ = 1: every one of these interpolants is C¹ across steps."""
    unit = np.eye(len(tab.P))
    slopes = tab.P * np.arange(1, tab.P.shape[1] + 1)  # the terms of the derivative at θ = 1
    np.testing.assert_array_equal(tab.P[:, 0], unit[0])
    assert np.all(np.abs(slopes.sum(axis=1) - unit[tab.stages]) <= TOL * np.abs(slopes).sum(axis=1))


# --- Implicit methods ------------------------------------------------------------------------------------------------


def stability_function(tab, z):
    """R(z) = 1 + z Bᵀ (I - z A)⁻¹ 1: one step of y' = λy, z = λ dt (HW (IV.3.2))."""
    return 1 + z * tab.B @ np.linalg.solve(np.eye(tab.stages) - z * tab.A, np.ones(tab.stages))


@each(IMPLICIT)
def test_implicit_rows_of_A_sum_to_C(tab):
    assert tab.A.shape == (tab.stages, tab.stages)
    assert tab.B.shape == tab.C.shape == (tab.stages,)
    assert tab.A.dtype == tab.B.dtype == tab.C.dtype == np.float64
    np.testing.assert_allclose(tab.A.sum(axis=1), tab.C, atol=TOL)


@each(IMPLICIT)
def test_implicit_order_of_the_step(tab):
    assert Conditions(tab.A, tab.order + 1).order(tab.B[:, None]) == tab.order


@each(IMPLICIT)
def test_diagonal_methods(tab):
    assert tab.diagonal == (tab.name in {"implicit_euler", "implicit_midpoint", "trapezoid", "sdirk2", "trbdf2"})


@each([*GAUSS, *RADAU])
def test_collocation(tab):
    """C(s) and B(s): Gauss and Radau IIA are collocation methods (HNW Sec. II.7)."""
    for q in range(1, tab.stages + 1):
        np.testing.assert_allclose(tab.A @ tab.C ** (q - 1), tab.C**q / q, atol=TOL)
        np.testing.assert_allclose(tab.B @ tab.C ** (q - 1), 1 / q, atol=TOL)


@each(GAUSS)
def test_gauss_has_order_2s_and_is_symplectic(tab):
    """Hairer, Lubich & Wanner, Geometric Numerical Integration, Theorem VI.4.3: b_i a_ij + b_j a_ji = b_i b_j."""
    M = tab.B[:, None] * tab.A
    assert tab.order == 2 * tab.stages
    np.testing.assert_allclose(M + M.T, np.outer(tab.B, tab.B), atol=TOL)


@each(RADAU)
def test_radau_iia_has_order_2s_minus_1(tab):
    assert tab.order == 2 * tab.stages - 1


@each([*L_STABLE, tableaus.TRAPEZOID])
def test_stiffly_accurate(tab):
    np.testing.assert_array_equal(tab.A[-1], tab.B)
    assert tab.C[-1] == 1


@each(IMPLICIT)
def test_A_stable(tab):
    """|R| <= 1 on the imaginary axis, and no pole in the left half plane: 1/eigenvalues of A are on its right."""
    assert all(abs(stability_function(tab, 1j * y)) <= 1 + 1e-12 for y in np.logspace(-3, 4, 200))
    eigenvalues = np.linalg.eigvals(tab.A)
    assert np.all(eigenvalues.real[np.abs(eigenvalues) > TOL] > 0)


@each(L_STABLE)
def test_L_stable(tab):
    assert abs(stability_function(tab, -1e9)) < 1e-7


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
def test_the_table_says_what_the_tableau_is(row):
    """It names the tableau, which is read when first used, and repeats of it what is asked before."""
    tab = row.tableau
    assert (tab is None) == (not row.coefficients)
    if tab is None:
        return
    assert (row.order, row.coefficients.partition(".")[0]) == (tab.order, type(tab).__module__.rpartition(".")[2])
    if row.kind in ("adaptive", "fixed", "reversible", "stiff"):
        assert row.error_order == getattr(tab, "error_order", 0)
    assert row.alone == (
        row.kind not in ("adams", "reversible", "stiff", "auto", "scipy") or isinstance(tab, stiff.RosenbrockTableau)
    )
    assert row.imex == (getattr(tab, "explicit", None) is not None)
    assert row.reversible == (row.kind == "reversible" or isinstance(tab, SymplecticTableau))
