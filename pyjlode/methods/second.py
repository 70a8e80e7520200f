"""Methods for systems of second order, `q'' = a(t, q, v)` with `v = q'`: their numbers, and nothing else.

"HLW" is Hairer, Lubich & Wanner, *Geometric Numerical Integration* (2nd ed., Springer 2006), "HNW" as in
`methods/explicit.py`. Indices start at 0. `tests/native/test_second_order.py` checks every array by its order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class SymplecticTableau:
    """An explicit symplectic method: kicks of v and drifts of q in turns (HLW II.5 and VI.4)::

        v += kicks[i] dt a(t_i, q)        q += drifts[i] dt v        t_i = t + dt Σ_{j<i} drifts[j]

    A kick of weight 0 is left out, and so is a drift.
    """

    name: str
    order: int
    kicks: np.ndarray
    """(s,)"""
    drifts: np.ndarray
    """(s,)"""
    quadratic: bool = False
    """Whether the order holds for a kinetic energy that is quadratic only: for q' = v."""


@dataclass(frozen=True, eq=False)
class NystromTableau:
    """An explicit Nyström method (HNW II.14)::

    k_i = a(t + C[i] dt, q + C[i] dt v + dt² Σ_j A[i, j] k_j, v + dt Σ_j D[i, j] k_j)
    q1 = q + dt v + dt² Σ_i Bq[i] k_i          v1 = v + dt Σ_i Bv[i] k_i
    """

    name: str
    order: int
    A: np.ndarray
    """(s, s), strictly lower triangular."""
    D: np.ndarray
    """(s, s), the same."""
    C: np.ndarray
    """(s,)"""
    Bq: np.ndarray
    """(s,)"""
    Bv: np.ndarray
    """(s,)"""


SecondTableau = SymplecticTableau | NystromTableau


def _composed(*gammas: float) -> tuple[np.ndarray, np.ndarray]:
    """Kicks and drifts of Verlet steps (drift, kick, drift) of lengths γ: HLW II.4 (4.6)."""
    gamma = np.array(gammas)
    return np.array([0.0, *gamma]), np.array([gamma[0], *(gamma[:-1] + gamma[1:]), gamma[-1]]) / 2


def _mirrored(*gammas: float) -> tuple[np.ndarray, np.ndarray]:
    """The same with the γ mirrored at the last one, which is left out: it makes their sum 1."""
    return _composed(*gammas, 1 - 2 * sum(gammas), *reversed(gammas))


# Symplectic Euler; HLW I.1 (1.9). de Vogelaere 1956.
SYMPLECTIC_EULER = SymplecticTableau("symplectic_euler", 1, kicks=np.array([1.0]), drifts=np.array([1.0]))

# Störmer 1907, Verlet 1967; HLW I.1 (1.17). The acceleration at the end is that of the next step's start.
VELOCITY_VERLET = SymplecticTableau("velocity_verlet", 2, kicks=np.array([0.5, 0.5]), drifts=np.array([1.0, 0.0]))

# Forest & Ruth, Physica D 43 (1990) 105-117; Yoshida, Phys. Lett. A 150 (1990) 262-268; Candy & Rozmus 1991.
YOSHIDA4 = SymplecticTableau("yoshida4", 4, *_mirrored(1 / (2 - 2 ** (1 / 3))))

# McLachlan & Atela, The accuracy of symplectic integrators, Nonlinearity 5 (1992) 541-562, Table 2.
MCATE4 = SymplecticTableau(
    "mcate4",
    4,
    kicks=np.array([0.1344961992774310892, -0.2248198030794208058, 0.7563200005156682911, 0.3340036032863214255]),
    drifts=np.array([0.5153528374311229364, -0.085782019412973646, 0.4415830236164665242, 0.1288461583653841854]),
    quadratic=True,
)

# Kahan & Li, Math. Comp. 66 (1997) 1089-1099; HLW V.3 (3.11).
KAHAN_LI6 = SymplecticTableau(
    "kahan_li6",
    6,
    *_mirrored(
        0.39216144400731413927925056, 0.33259913678935943859974864, -0.70624617255763935980996482,
        0.08221359629355080023149045,
    ),
)  # fmt: skip

# Suzuki & Umeno 1993, McLachlan, SIAM J. Sci. Comput. 16 (1995) 151-168; HLW V.3 (3.12).
SUZUKI8 = SymplecticTableau(
    "suzuki8",
    8,
    *_mirrored(
        0.74167036435061295344822780, -0.40910082580003159399730010, 0.19075471029623837995387626,
        -0.57386247111608226665638773, 0.29906418130365592384446354, 0.33462491824529818378495798,
        0.31529309239676659663205666,
    ),
)  # fmt: skip

# Nyström 1925; HNW II.14 (14.11), where a depends on v.
NYSTROM4 = NystromTableau(
    "nystrom4",
    4,
    A=np.array([[0, 0, 0, 0], [1 / 8, 0, 0, 0], [1 / 8, 0, 0, 0], [0, 0, 1 / 2, 0]]),
    D=np.array([[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 1 / 2, 0, 0], [0, 0, 1, 0]]),
    C=np.array([0, 1 / 2, 1 / 2, 1]),
    Bq=np.array([1 / 6, 1 / 6, 1 / 6, 0]),
    Bv=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
)
