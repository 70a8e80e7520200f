"""Systems of the Test Set for IVP Solvers (Mazzia & Magherini, University of Bari, release 2.4, 2008), as functions of
PyTorch, with its reference solutions at the end."""

import math

import torch

F64 = torch.float64


def tensor(*x):
    return torch.tensor(x, dtype=F64)


# --- Transistor amplifier: 8 equations, a DAE of index 1 (II-22; Hairer & Wanner II, VII.1) -------------------------

_C = [k * 1e-6 for k in range(1, 6)]
AMPLIFIER_MASS = torch.zeros(8, 8, dtype=F64)
for _i, _j, _c in ((0, 1, _C[0]), (3, 4, _C[2]), (6, 7, _C[4])):
    AMPLIFIER_MASS[_i, _i] = AMPLIFIER_MASS[_j, _j] = -_c
    AMPLIFIER_MASS[_i, _j] = AMPLIFIER_MASS[_j, _i] = _c
AMPLIFIER_MASS[2, 2], AMPLIFIER_MASS[5, 5] = -_C[1], -_C[3]
AMPLIFIER_START = tensor(0, 3, 3, 6, 3, 3, 6, 0)
AMPLIFIER_END = (
    0.2,
    tensor(
        -0.5562145012262709e-2,
        0.3006522471903042e1,
        0.2849958788608128e1,
        0.2926422536206241e1,
        0.2704617865010554e1,
        0.2761837778393145e1,
        0.4770927631616772e1,
        0.1236995868091548e1,
    ),
)


def amplifier(t, y):
    supply, R0, R = 6.0, 1000.0, 9000.0
    signal = 0.1 * torch.sin(200 * math.pi * t)

    def current(u):
        return 1e-6 * (torch.exp(u / 0.026) - 1)

    first, second = current(y[1] - y[2]), current(y[4] - y[5])
    return torch.stack(
        [
            (y[0] - signal) / R0,
            2 * y[1] / R - supply / R + 0.01 * first,
            y[2] / R - first,
            (y[3] - supply) / R + 0.99 * first,
            2 * y[4] / R - supply / R + 0.01 * second,
            y[5] / R - second,
            (y[6] - supply) / R + 0.99 * second,
            y[7] / R,
        ]
    )


# --- Andrews' squeezing mechanism: seven bodies and six constraints (II-9; Hairer & Wanner II, VII.7) ----------------

SQUEEZER_START = tensor(
    -0.0617138900142764496358948458001,
    0,
    0.455279819163070380255912382449,
    0.222668390165885884674473185609,
    0.487364979543842550225598953530,
    -0.222668390165885884674473185609,
    1.23054744454982119249735015568,
)
SQUEEZER_END = (
    0.03,
    tensor(
        0.1581077119629904e2,
        -0.1575637105984298e2,
        0.4082224013073101e-1,
        -0.5347301163226948,
        0.5244099658805304,
        0.5347301163226948,
        0.1048080741042263e1,
    ),
)
# The Lagrange multipliers there.
SQUEEZER_FORCES = tensor(
    0.1991753333731910e3,
    -0.2975531228015052e2,
    0.2306654119098399e2,
    0.3145271365475927e2,
    0.2264249232082739e2,
    0.1161740700019673e2,
)
_M1, _M2, _M3, _M4, _M5, _M6, _M7 = 0.04325, 0.00365, 0.02373, 0.00706, 0.07050, 0.00706, 0.05498
_I1, _I2, _I3, _I4, _I5, _I6, _I7 = 2.194e-6, 4.410e-7, 5.255e-6, 5.667e-7, 1.169e-5, 5.667e-7, 1.912e-5
_D, _DA, _E, _EA, _RR, _RA = 28e-3, 115e-4, 2e-2, 1421e-5, 7e-3, 92e-5
_SS, _SA, _SB, _SC, _SD, _TA, _TB = 35e-3, 1874e-5, 1043e-5, 18e-3, 2e-2, 2308e-5, 916e-5
_U, _UA, _UB, _ZF, _ZT, _FA = 4e-2, 1228e-5, 449e-5, 2e-2, 4e-2, 1421e-5
_XA, _YA, _XB, _YB, _XC, _YC = -0.06934, -0.00227, -0.03635, 0.03273, 0.014, 0.072
_SPRING, _LENGTH, _MOMENT = 4530.0, 7785e-5, 33e-3


def squeezer_inertia(q):
    """(7,) -> (7, 7)."""
    _, th, _, ph, _, om, _ = q.unbind()
    e, f = _E - _EA, _ZF - _FA
    zero = torch.zeros_like(th)
    m00 = _M1 * _RA**2 + _M2 * (_RR**2 - 2 * _DA * _RR * torch.cos(th) + _DA**2) + _I1 + _I2
    m01 = _M2 * (_DA**2 - _DA * _RR * torch.cos(th)) + _I2
    m34 = _M4 * (e**2 + _ZT * e * torch.sin(ph)) + _I4
    m44 = _M4 * (_ZT**2 + 2 * _ZT * e * torch.sin(ph) + e**2) + _M5 * (_TA**2 + _TB**2) + _I4 + _I5
    m56 = _M6 * (f**2 - _U * f * torch.sin(om)) + _I6
    m66 = _M6 * (f**2 - 2 * _U * f * torch.sin(om) + _U**2) + _M7 * (_UA**2 + _UB**2) + _I6 + _I7
    rows = [[zero] * 7 for _ in range(7)]
    rows[0][0], rows[0][1], rows[1][0], rows[1][1] = m00, m01, m01, zero + _M2 * _DA**2 + _I2
    rows[2][2], rows[3][3] = zero + _M3 * (_SA**2 + _SB**2) + _I3, zero + _M4 * e**2 + _I4
    rows[3][4], rows[4][3], rows[4][4] = m34, m34, m44
    rows[5][5], rows[5][6], rows[6][5], rows[6][6] = zero + _M6 * f**2 + _I6, m56, m56, m66
    return torch.stack([torch.stack(row) for row in rows])


def squeezer_force(q, v):
    """(7,)"""
    _, th, ga, ph, _, om, _ = q.unbind()
    be1, th1, _, ph1, de1, om1, ep1 = v.unbind()
    x = _SD * torch.cos(ga) + _SC * torch.sin(ga) + _XB - _XC
    y = _SD * torch.sin(ga) - _SC * torch.cos(ga) + _YB - _YC
    length = torch.sqrt(x * x + y * y)
    pull = -_SPRING * (length - _LENGTH) / length
    of_spring = x * (_SC * torch.cos(ga) - _SD * torch.sin(ga)) + y * (_SD * torch.cos(ga) + _SC * torch.sin(ga))
    e, f = _M4 * _ZT * (_E - _EA), _M6 * _U * (_ZF - _FA)
    return torch.stack(
        [
            _MOMENT - _M2 * _DA * _RR * th1 * (th1 + 2 * be1) * torch.sin(th),
            _M2 * _DA * _RR * be1**2 * torch.sin(th),
            pull * of_spring,
            e * de1**2 * torch.cos(ph),
            -e * ph1 * (ph1 + 2 * de1) * torch.cos(ph),
            -f * ep1**2 * torch.cos(om),
            f * om1 * (om1 + 2 * ep1) * torch.cos(om),
        ]
    )


# The loops in the complex plane: R exp(i b) - d exp(i (b + th)) + i ss exp(i ga) is constant, and so on.
_ANGLES = torch.zeros(7, 7, dtype=F64)
for _i, _of in enumerate([[0], [0, 1], [2], [3, 4], [4], [5, 6], [6]]):
    _ANGLES[_i, _of] = 1.0
_K = torch.zeros(3, 7, dtype=torch.complex128)
_K[:, 0], _K[:, 1] = _RR, -_D
_K[0, 2], _K[1, 3], _K[1, 4], _K[2, 5], _K[2, 6] = 1j * _SS, 1j * _E, -_ZT, -_ZF, 1j * _U
_KR, _KI = _K.real.contiguous(), _K.imag.contiguous()
_CLOSED = tensor(_XB, _YB, _XA, _YA, _XA, _YA)


def _parts(real, imaginary):
    """Those of three complex numbers, one after the other."""
    return torch.stack([real, imaginary], 1).flatten(0, 1)


def squeezer_constraints(q):
    """(7,) -> (6,): three loops closed, in two dimensions."""
    c, s = torch.cos(_ANGLES @ q), torch.sin(_ANGLES @ q)
    return _parts(_KR @ c - _KI @ s, _KR @ s + _KI @ c) - _CLOSED


def squeezer(t, y):
    """Of index 1, the constraints differentiated twice: y = (q, q', q'', λ), with M = diag(I, I, 0, 0)."""
    q, v, w, force = y.split([7, 7, 7, 6])
    c, s, turning = torch.cos(_ANGLES @ q), torch.sin(_ANGLES @ q), _ANGLES @ v
    G = _parts(-_KR * s - _KI * c, _KR * c - _KI * s) @ _ANGLES
    square = turning * turning
    curved = _parts(_KI @ (s * square) - _KR @ (c * square), -_KR @ (s * square) - _KI @ (c * square))
    return torch.cat([v, w, squeezer_inertia(q) @ w - squeezer_force(q, v) + force @ G, G @ w + curved])


SQUEEZER_MASS = torch.diag(torch.cat([torch.ones(14, dtype=F64), torch.zeros(13, dtype=F64)]))
