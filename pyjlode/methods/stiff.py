"""The numbers of the adaptive methods for stiff systems, and nothing else.

"HW" is Hairer & Wanner, *Solving Ordinary Differential Equations II: Stiff and Differential-Algebraic Problems* (2nd
ed., Springer 1996). ``tests/native/test_stiff_tableaus.py`` checks every array here against the order conditions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .explicit import hermite_dense


@dataclass(frozen=True, eq=False)
class RosenbrockTableau:
    """A Rosenbrock method in the form that needs no product with J (HW (IV.7.25))::

    (M / (γ dt) - J) u_i = f(t + α_i dt, y + Σ_j A[i, j] u_j) + M Σ_j C[i, j] u_j / dt + Γ_i dt ∂f/∂t
    y1 = y + Σ_i m_i u_i
    """

    name: str
    order: int
    gamma: float
    """γ, the diagonal of Γ."""
    A: np.ndarray
    """(s, s), strictly lower triangular."""
    C: np.ndarray
    """(s, s), strictly lower triangular."""
    alpha: np.ndarray
    """(s,), times of the stages."""
    gammas: np.ndarray
    """(s,), Γ_i = Σ_j Γ[i, j]: weights of ∂f/∂t."""
    m: np.ndarray
    """(s,)"""
    E: np.ndarray
    """(s,), the local error estimate is Σ_i E_i u_i."""
    error_order: int
    """Order of the embedded solution: the estimate is O(dt^(error_order + 1))."""
    P: np.ndarray
    """(s, q): dense output y(t + θ dt) = y + Σ_i u_i Σ_j P[i, j] θ^(j+1)."""
    dense_order: int

    @property
    def stages(self) -> int:
        return len(self.m)


@dataclass(frozen=True, eq=False)
class EsdirkTableau:
    """A stiffly accurate Runge-Kutta method whose first stage is explicit and whose others have one diagonal entry."""

    name: str
    order: int
    A: np.ndarray
    """(s, s), lower triangular; the last row is B."""
    E: np.ndarray
    """(s,), the local error estimate is dt E K."""
    error_order: int
    P: np.ndarray
    """(s, q): dense output y(t + θ dt) = y + dt Σ_i K[i] Σ_j P[i, j] θ^(j+1)."""
    dense_order: int
    explicit: np.ndarray | None = None
    """(s, s), strictly lower triangular: A of the explicit method for the other part of a field that is split, with the
    same B and C. None where there is none."""

    @property
    def stages(self) -> int:
        return len(self.A)

    @property
    def gamma(self) -> float:
        return float(self.A[-1, -1])

    @property
    def B(self) -> np.ndarray:
        return self.A[-1]

    @property
    def C(self) -> np.ndarray:
        times: np.ndarray = self.A.sum(1)
        times[-1] = 1.0
        return times

    @property
    def smoothed(self) -> bool:
        """Whether the estimate is to be damped in the stiff components (Hosea & Shampine 1996). Not where the formula
        of lower order is a stage: it is bounded there as the other one is, and a damped estimate would not see what a
        stiff oscillation adds to the error."""
        lower = self.B - self.E
        return not any(np.allclose(row, lower, rtol=0, atol=1e-12) for row in self.A)


@dataclass(frozen=True, eq=False)
class RadauTableau:
    """Radau IIA with three stages in transformed variables (HW IV.8): T⁻¹ A⁻¹ T is diagonal up to a complex pair.

    z_i is the stage's state less y.
    """

    name: str
    order: int
    error_order: int
    A: np.ndarray
    """(3, 3)"""
    C: np.ndarray
    """(3,)"""
    T: np.ndarray
    """(3, 3) real: columns are the real eigenvector of A⁻¹, and real and imaginary part of the complex one."""
    real: float
    """The real eigenvalue of A⁻¹."""
    pair: complex
    """The complex one, of positive imaginary part."""
    e: np.ndarray
    """(3,): the error estimate is (real M / dt - J)⁻¹ (f(t, y) + M Σ_i e_i z_i / dt), HW (IV.8.19)."""
    P: np.ndarray
    """(3, 3): dense output, the collocation polynomial y + Σ_i z_i Σ_j P[i, j] θ^(j+1)."""
    dense_order: int

    @property
    def stages(self) -> int:
        return 3


@dataclass(frozen=True, eq=False)
class NDFTableau:
    """Numerical differentiation formulas of order 1 to 5 (Shampine & Reichelt, The MATLAB ODE suite, SIAM J. Sci.
    Comput. 18, 1997, (4)-(8)); index k is the order, index 0 is not used."""

    name: str
    order: int
    kappa: np.ndarray
    """(6,), Klopfenstein's and Shampine & Reichelt's choice: accuracy for stability."""

    @property
    def gamma(self) -> np.ndarray:
        """(6,): γ_k = Σ_{j <= k} 1/j."""
        return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, 6))])

    @property
    def alpha(self) -> np.ndarray:
        """(6,): (1 - κ_k) γ_k, by which dt is divided in the iteration matrix."""
        alpha: np.ndarray = (1 - self.kappa) * self.gamma
        return alpha

    @property
    def error(self) -> np.ndarray:
        """(7,): the local error of order k is error[k] times the backward difference k + 1."""
        kappa = np.append(self.kappa, 0.0)
        gamma = np.append(self.gamma, 0.0)
        constants: np.ndarray = kappa * gamma + 1 / np.arange(1, 8)
        return constants


def _lower(*rows: list[float]) -> np.ndarray:
    A = np.zeros((len(rows) + 1, len(rows) + 1))
    for i, row in enumerate(rows, start=1):
        A[i, : len(row)] = row
    return A


# ---------------------------------------------------------------------------------------------------------------------
# Rosenbrock methods
# ---------------------------------------------------------------------------------------------------------------------


def _rodas5p() -> RosenbrockTableau:
    """Steinebach, Construction of Rosenbrock-Wanner method Rodas5P and numerical benchmarks within the Julia
    Differential Equations package, BIT Numer. Math. 63:27 (2023). Stiffly accurate, L-stable, for index-1 systems."""
    y1 = [-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946]
    A = _lower(
        [3.0],
        [2.849394379747939, 0.45842242204463923],
        [-6.954028509809101, 2.489845061869568, -10.358996098473584],
        [2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641],
        y1,
        [*y1, 1.0],
        [*y1, 1.0, 1.0],
    )
    C = _lower(
        [-14.155112264123755],
        [-17.97296035885952, -2.859693295451294],
        [147.12150275711716, -1.41221402718213, 71.68940251302358],
        [165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306],
        [24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471],
        [
            30.91273214028599,
            -3.1208243349937974,
            77.79954646070892,
            34.28646028294783,
            -19.097331116725623,
            -28.087943162872662,
        ],
        [
            37.80277123390563,
            -3.2571969029072276,
            112.26918849496327,
            66.9347231244047,
            -40.06618937091002,
            -54.66780262877968,
            -9.48861652309627,
        ],
    )
    gamma = 0.21193756319429014
    m = np.array([*y1, 1.0, 1.0, 1.0])
    # y(θ) = (1 - θ) y + θ (y1 + (1 - θ) (h1 + θ (h2 + θ h3))), h_i = Σ_j H[i, j] u_j.
    H = np.array(
        [
            [
                25.948786856663858,
                -2.5579724845846235,
                10.433815404888879,
                -2.3679251022685204,
                0.524948541321073,
                1.1241088310450404,
                0.4272876194431874,
                -0.17202221070155493,
            ],
            [
                -9.91568850695171,
                -0.9689944594115154,
                3.0438037242978453,
                -24.495224566215796,
                20.176138334709044,
                15.98066361424651,
                -6.789040303419874,
                -6.710236069923372,
            ],
            [
                11.419903575922262,
                2.8879645146136994,
                72.92137995996029,
                80.12511834622643,
                -52.072871366152654,
                -59.78993625266729,
                -0.15582684282751913,
                4.883087185713722,
            ],
        ]
    )
    return RosenbrockTableau(
        name="rodas5p",
        order=5,
        gamma=gamma,
        A=A,
        C=C,
        alpha=np.array([0.0, 3 * gamma, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0]),
        gammas=np.array(
            [gamma, -0.42387512638858027, -0.3384627126235924, 1.8046452872882734, 2.325825639765069, 0.0, 0.0, 0.0]
        ),
        m=m,
        E=np.array([0.0] * 7 + [1.0]),
        error_order=4,
        P=np.stack([m + H[0], H[1] - H[0], H[2] - H[1], -H[2]], axis=1),
        dense_order=4,
    )


def _rosenbrock23() -> RosenbrockTableau:
    """ode23s: Shampine & Reichelt, The MATLAB ODE suite, SIAM J. Sci. Comput. 18 (1997) 1-22, Sec. 3. L-stable.

    Its own variables k_i are turned into u_i = dt Σ_j Γ[i, j] k_j.
    """
    d, e = float(1 / (2 + np.sqrt(2))), float(6 + np.sqrt(2))
    alpha = _lower([1 / 2], [0.0, 1.0])
    Gamma = np.array([[d, 0, 0], [-d, d, 0], [d * (e - 2), -d * e, d]])
    inverse = np.linalg.inv(Gamma)
    return RosenbrockTableau(
        name="rosenbrock23",
        order=2,
        gamma=d,
        A=np.tril(alpha @ inverse, -1),
        C=np.tril(-inverse, -1),
        alpha=np.array([0, 1 / 2, 1]),
        gammas=np.array([d, 0.0, -d]),
        m=np.array([0, 1.0, 0]) @ inverse,
        E=np.array([1, -2, 1]) / 6 @ inverse,
        error_order=2,
        P=inverse.T @ np.array([[1, -1], [-2 * d, 1], [0, 0]]) / (1 - 2 * d),
        dense_order=2,
    )


RODAS5P = _rodas5p()
ROSENBROCK23 = _rosenbrock23()

# ---------------------------------------------------------------------------------------------------------------------
# ESDIRK methods
# ---------------------------------------------------------------------------------------------------------------------


def _hermite(B: np.ndarray) -> np.ndarray:
    """P of the cubic Hermite polynomial: the first and the last stage are the slopes at the ends."""
    P = hermite_dense(B)
    P[-2] += P[-1]
    return P[:-1]


def _continuous(A: np.ndarray) -> np.ndarray:
    """P of order 4 and degree 4 whose value and slope at the ends are those of the step; of these the one of least
    norm.

    The method has stage order 2, so that the order conditions left (HNW II.2) are those of the vectors below, each of
    which meets one power of θ.
    """
    s, c = len(A), A.sum(1)
    phi = np.stack([np.ones(s), c, c**2, c**3, A @ c**2])
    exact = np.zeros((5, 4))
    exact[[0, 1, 2, 3, 4], [0, 1, 2, 3, 3]] = 1, 1 / 2, 1 / 3, 1 / 4, 1 / 12
    unit = np.eye(s)
    powers = np.eye(4)
    rows = [np.kron(phi, powers), np.kron(unit, powers[:1]), np.kron(unit, np.ones((1, 4)))]
    rows.append(np.kron(unit, np.arange(1, 5)[None]))
    right = np.concatenate([exact.reshape(-1), unit[0], A[-1], unit[-1]])
    matrix = np.concatenate(rows)
    P = np.linalg.lstsq(matrix, right, rcond=None)[0]
    P += np.linalg.lstsq(matrix, right - matrix @ P, rcond=None)[0]  # what rounding left
    return P.reshape(s, 4)


def _kvaerno5() -> EsdirkTableau:
    """Kværnø, Singly diagonally implicit Runge-Kutta methods with an explicit first stage, BIT Numer. Math. 44 (2004)
    489-502. The sixth stage is the embedded solution of order 4; both are L-stable."""
    g = 0.26
    A = np.zeros((7, 7))
    A[1, :2] = g, g
    A[2, :3] = 0.13, 0.84033320996790809, g
    A[3, :4] = 0.22371961478320505, 0.47675532319799699, -0.06470895363112615, g
    A[4, :5] = 0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998, g
    A[5, :6] = 0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676, g
    A[6] = [
        0.13659751177640291,
        0,
        -0.05496908796538376,
        -0.04118626728321046,
        0.62993304899016403,
        0.06962479448202728,
        g,
    ]
    return EsdirkTableau(name="kvaerno5", order=5, A=A, E=A[6] - A[5], error_order=4, P=_continuous(A), dense_order=4)


def _kencarp4() -> EsdirkTableau:
    """ARK4(3)6L[2]SA: Kennedy & Carpenter, Additive Runge-Kutta schemes for convection-diffusion-reaction equations,
    Appl. Numer. Math. 44 (2003) 139-181."""
    A = np.zeros((6, 6))
    A[1, :2] = 1 / 4, 1 / 4
    A[2, :3] = 8611 / 62500, -1743 / 31250, 1 / 4
    A[3, :4] = 5012029 / 34652500, -654441 / 2922500, 174375 / 388108, 1 / 4
    A[4, :5] = 15267082809 / 155376265600, -71443401 / 120774400, 730878875 / 902184768, 2285395 / 8070912, 1 / 4
    A[5] = 82889 / 524892, 0, 15625 / 83664, 69875 / 102672, -2260 / 8211, 1 / 4
    embedded = np.array(
        [
            4586570599 / 29645900160,
            0,
            178811875 / 945068544,
            814220225 / 1159782912,
            -3700637 / 11593932,
            61727 / 225920,
        ]
    )
    X = np.zeros((6, 6))
    X[1, 0] = 1 / 2
    X[2, :2] = 13861 / 62500, 6889 / 62500
    X[3, :3] = -116923316275 / 2393684061468, -2731218467317 / 15368042101831, 9408046702089 / 11113171139209
    X[4, :2] = -451086348788 / 2902428689909, -2682348792572 / 7519795681897
    X[4, 2:4] = 12662868775082 / 11960479115383, 3355817975965 / 11060851509271
    X[5, :3] = 647845179188 / 3216320057751, 73281519250 / 8382639484533, 552539513391 / 3454668386233
    X[5, 3:5] = 3354512671639 / 8306763924573, 4040 / 17871
    return EsdirkTableau(
        name="kencarp4", order=4, A=A, E=A[5] - embedded, error_order=3, P=_continuous(A), dense_order=4, explicit=X
    )


def _kencarp5() -> EsdirkTableau:
    """ARK5(4)8L[2]SA of the same paper.

    Its two formulas differ by a tenth of the error of the better one where f is linear (of order 6, both), and by as
    little beside other pairs where it is not. The estimate here is ten times that, for tolerances to mean what they
    mean with the other methods.
    """
    g = 41 / 200
    A = np.zeros((8, 8))
    A[1, :2] = g, g
    A[2, :3] = 41 / 400, -567603406766 / 11931857230679, g
    A[3, :4] = 683785636431 / 9252920307686, 0, -110385047103 / 1367015193373, g
    A[4, :3] = 3016520224154 / 10081342136671, 0, 30586259806659 / 12414158314087
    A[4, 3:5] = -22760509404356 / 11113319521817, g
    A[5, :3] = 218866479029 / 1489978393911, 0, 638256894668 / 5436446318841
    A[5, 3:6] = -1179710474555 / 5321154724896, -60928119172 / 8023461067671, g
    A[6, :3] = 1020004230633 / 5715676835656, 0, 25762820946817 / 25263940353407
    A[6, 3:5] = -2161375909145 / 9755907335909, -211217309593 / 5846859502534
    A[6, 5:7] = -4269925059573 / 7827059040749, g
    A[7, :4] = -872700587467 / 9133579230613, 0, 0, 22348218063261 / 9555858737531
    A[7, 4:6] = -1143369518992 / 8141816002931, -39379526789629 / 19018526304540
    A[7, 6:] = 32727382324388 / 42900044865799, g
    embedded = np.array(
        [
            -975461918565 / 9796059967033,
            0,
            0,
            78070527104295 / 32432590147079,
            -548382580838 / 3424219808633,
            -33438840321285 / 15594753105479,
            3629800801594 / 4656183773603,
            4035322873751 / 18575991585200,
        ]
    )
    X = np.zeros((8, 8))
    X[1, 0] = 41 / 100
    X[2, :2] = 367902744464 / 2072280473677, 677623207551 / 8224143866563
    X[3, :3] = 1268023523408 / 10340822734521, 0, 1029933939417 / 13636558850479
    X[4, :3] = 14463281900351 / 6315353703477, 0, 66114435211212 / 5879490589093
    X[4, 3] = -54053170152839 / 4284798021562
    X[5, :3] = 14090043504691 / 34967701212078, 0, 15191511035443 / 11219624916014
    X[5, 3:5] = -18461159152457 / 12425892160975, -281667163811 / 9011619295870
    X[6, :3] = 19230459214898 / 13134317526959, 0, 21275331358303 / 2942455364971
    X[6, 3:6] = -38145345988419 / 4862620318723, -1 / 8, -1 / 8
    X[7, :3] = -19977161125411 / 11928030595625, 0, -40795976796054 / 6384907823539
    X[7, 3:5] = 177454434618887 / 12078138498510, 782672205425 / 8267701900261
    X[7, 5:7] = -69563011059811 / 9646580694205, 7356628210526 / 4942186776405
    return EsdirkTableau(
        name="kencarp5",
        order=5,
        A=A,
        E=10 * (A[7] - embedded),
        error_order=4,
        P=_continuous(A),
        dense_order=4,
        explicit=X,
    )


def _trbdf2() -> EsdirkTableau:
    """Bank et al., IEEE Trans. CAD 4 (1985) 436-451, with the error estimate of Hosea & Shampine, Analysis and
    implementation of TR-BDF2, Appl. Numer. Math. 20 (1996) 21-37."""
    g = 2 - np.sqrt(2)
    d, w = g / 2, np.sqrt(2) / 4
    A = np.array([[0, 0, 0], [d, d, 0], [w, w, d]])
    embedded = np.array([(1 - w) / 3, (3 * w + 1) / 3, d / 3])
    return EsdirkTableau(
        name="trbdf2_adaptive", order=2, A=A, E=A[2] - embedded, error_order=2, P=_hermite(A[2]), dense_order=2
    )


KVAERNO5 = _kvaerno5()
KENCARP4 = _kencarp4()
KENCARP5 = _kencarp5()
TRBDF2 = _trbdf2()

# ---------------------------------------------------------------------------------------------------------------------
# Radau IIA, three stages
# ---------------------------------------------------------------------------------------------------------------------


def _radau5() -> RadauTableau:
    """HW IV.8, with the eigenvectors computed and not typed in; Ehle 1969, Axelsson 1969."""
    r = np.sqrt(6)
    A = np.array(
        [
            [(88 - 7 * r) / 360, (296 - 169 * r) / 1800, (-2 + 3 * r) / 225],
            [(296 + 169 * r) / 1800, (88 + 7 * r) / 360, (-2 - 3 * r) / 225],
            [(16 - r) / 36, (16 + r) / 36, 1 / 9],
        ]
    )
    C = np.array([(4 - r) / 10, (4 + r) / 10, 1.0])
    values, vectors = np.linalg.eig(np.linalg.inv(A))
    real, pair = int(np.argmin(abs(values.imag))), int(np.argmax(values.imag))
    v = vectors[:, pair] / vectors[-1, pair]
    T = np.stack([vectors[:, real].real / vectors[-1, real].real, v.real, v.imag], axis=1)
    return RadauTableau(
        name="radau5",
        order=5,
        error_order=3,
        A=A,
        C=C,
        T=T,
        real=float(values[real].real),
        pair=complex(values[pair]),
        e=np.array([-13 - 7 * r, -13 + 7 * r, -1]) / 3,
        P=np.linalg.inv(C[:, None] ** np.arange(1, 4)).T,  # the polynomial through 0 at θ = 0 and z_i at C_i
        dense_order=3,
    )


RADAU5 = _radau5()

# ---------------------------------------------------------------------------------------------------------------------
# Multistep
# ---------------------------------------------------------------------------------------------------------------------

NDF = NDFTableau(name="bdf", order=5, kappa=np.array([0, -0.1850, -1 / 9, -0.0823, -0.0415, 0]))
