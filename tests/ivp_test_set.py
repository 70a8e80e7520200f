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

# --- Ring modulator: two transformers and four diodes; 15 equations, very stiff and oscillating (II-12) -------------

RING_START = torch.zeros(15, dtype=F64)
RING_END = (
    1e-3,
    tensor(
        -0.2339057358486745e-1,
        -0.7367485485540825e-2,
        0.2582956709291169,
        -0.4064465721283450,
        -0.4039455665149794,
        0.2607966765422943,
        0.1106761861269975,
        0.2939904342435596e-6,
        -0.2840029933642329e-7,
        0.7267198267264553e-3,
        0.7929487196960840e-3,
        -0.7255283495698965e-3,
        -0.7941401968526521e-3,
        0.7088495416976114e-4,
        0.2390059075236570e-4,
    ),
)
# Voltages at four nodes of the ring and at its load, seen by the diodes; and the currents that charge those nodes.
_DIODES = tensor(1, 0, -1, 0, -1, 0, -1, 0, 1, -1, 0, 1, 1, 0, 1, -1, 0, 0, -1, 1).view(4, 5)
_SIGNAL = tensor(-1, -1, 1, 1)


def ring_modulator(t, y):
    """(15,): the voltages y1 to y7, and the currents y8 to y15."""
    load, tap = y[:2], 0.5 * torch.stack([y[0], -y[0], y[1], -y[1]])
    nodes, rest, coils, ends = y[2:7], y[7:9], y[9:13], y[13:15]
    source = torch.stack([0.5 * torch.sin(2e3 * math.pi * t), torch.zeros_like(t)])
    across = _DIODES @ nodes + 2 * torch.sin(2e4 * math.pi * t) * _SIGNAL
    through = 40.67286402e-9 * (torch.exp(17.7493332 * across) - 1)
    charged = -(through @ _DIODES)
    wound = coils * _TURNS
    into = torch.cat([wound + charged[:4], (charged[4] - nodes[4] / 50)[None]])
    return torch.cat(
        [
            (rest - 0.5 * torch.stack([coils[0] - coils[1], coils[2] - coils[3]]) + ends - load / 25e3) / 1.6e-8,
            into / tensor(2e-12, 2e-12, 2e-12, 2e-12, 1e-8),
            -load / 4.45,
            (tap - _TURNS * nodes[:4] - 17.3 * coils) / 5e-4,
            (source - load - tensor(50 + 36.3, 600 + 36.3) * ends) / 2e-3,
        ]
    )


_TURNS = tensor(1, -1, 1, -1)


# --- Slider crank: a rigid crank that turns at a given speed, an elastic rod and a block (II-19; Simeon 1996) --------

# The test set computes with this number.
_PI = 3.1415927
_CRANK, _ROD, _DENSITY, _SPEED = 0.15, 0.30, 7870.0, 150.0
_M_ROD, _M_BLOCK, _J_CRANK, _J_ROD = 0.151104, 0.075552, 0.002727, 0.0045339259
_VOLUME, _STIFFNESS = 0.008**2 * _ROD, 0.2e12 * 0.008**2 / _ROD
# The rod: two sines across it, a quadratic along it.
_ROD_MASS = _DENSITY * _VOLUME * tensor(0.5, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 8, 1, 0, 0, 1, 2).view(4, 4)
_BEND = _PI**4 / 24 * (0.008 / _ROD) ** 2
_ROD_STIFF = tensor(_BEND, 0, 0, 0, 0, 16 * _BEND, 0, 0, 0, 0, 16 / 3, -8 / 3, 0, 0, -8 / 3, 7 / 3).view(4, 4)
_ROD_TURN = torch.zeros(4, 4, dtype=F64)
_ROD_TURN[0, 2:] = _VOLUME * tensor(-16 / _PI**3, 8 / _PI**3 - 1 / _PI)
_ROD_TURN[1, 3] = _VOLUME * 0.5 / _PI
_ROD_TURN -= _ROD_TURN.T.clone()
_ALONG, _ACROSS = _VOLUME * tensor(0, 0, 2 / 3, 1 / 6), _VOLUME * tensor(2 / _PI, 0, 0, 0)
_ALONG_X, _ACROSS_X = _ROD * _VOLUME * tensor(0, 0, 1 / 3, 1 / 6), _ROD * _VOLUME * tensor(1 / _PI, -0.5 / _PI, 0, 0)

# Angles of crank and rod, place of the block, the rod's shape; and their velocities. The rest is computed.
CRANK_START = tensor(
    0,
    0,
    0.450016933,
    0,
    0,
    0.103339863e-4,
    0.169327969e-4,
    150,
    -0.749957670e2,
    -0.268938672e-5,
    0.444896105,
    0.463434311e-2,
    -0.178591076e-5,
    -0.268938672e-5,
)
CRANK_END = (
    0.1,
    tensor(
        0.1500000000000104e2,
        -0.3311734988256260,
        0.1697373328427860,
        0.1893192899613509e-3,
        0.2375751249879174e-4,
        -0.5323896770569702e-5,
        -0.8363313279112129e-5,
    ),
)
# The velocities there; and the accelerations and the forces in the joints, at the start and there.
CRANK_END_VELOCITIES = tensor(
    0.1500000000000000e3,
    0.6025346755138369e2,
    -0.8753116326670527e1,
    -0.3005541400289738e-1,
    -0.5500431812571696e-2,
    0.4974111734266989e-3,
    0.1105560003626645e-2,
)
CRANK_FORCES = (
    tensor(
        0,
        -1.344541576008661e-3,
        -5.062194923138079e3,
        -6.833142732779555e-5,
        1.449382650173157e-8,
        -4.268463211410861,
        2.098334687947376e-1,
        -6.397251492537153e-8,
        3.824589508329281e2,
        -4.376060460948886e-9,
    ),
    tensor(
        0,
        0.6488737541276957e4,
        0.2167938629509884e4,
        0.3391137060286523e2,
        0.1715134772216488,
        -0.1422449408912512e1,
        0.1003946428124810e1,
        -0.6232935833287916e2,
        -0.1637920993367306e3,
        0.2529857947066878e2,
    ),
)


def crank_inertia(x):
    """(7,) -> (7, 7)."""
    q, c, s = x[3:], torch.cos(x[0] - x[1]), torch.sin(x[0] - x[1])
    zero = torch.zeros_like(c)
    both = 0.5 * _CRANK * _ROD * _M_ROD * c + _DENSITY * _CRANK * (s * (_ACROSS @ q) + c * (_ALONG @ q))
    rod = _J_ROD + q @ _ROD_MASS @ q + 2 * _DENSITY * (_ALONG_X @ q)
    rigid = torch.stack(
        [zero + _J_CRANK + _M_ROD * _CRANK**2, both, zero, both, rod, zero, zero, zero, zero + _M_BLOCK]
    ).view(3, 3)
    of_crank = _DENSITY * _CRANK * (c * _ACROSS - s * _ALONG)
    side = torch.stack([of_crank, _DENSITY * (_ACROSS_X + q @ _ROD_TURN), torch.zeros_like(q)])
    return torch.cat([torch.cat([rigid, side], 1), torch.cat([side.T, _ROD_MASS], 1)])


def crank_force(x, v):
    """(7,): what the motion gives, and the rod's springs; there is no gravity."""
    q, w, c, s = x[3:], v[3:], torch.cos(x[0] - x[1]), torch.sin(x[0] - x[1])
    first, second = v[0], v[1]
    across, along = _ACROSS @ q, _ALONG @ q
    turn, arm = 0.5 * _CRANK * _ROD * _M_ROD * s, _DENSITY * _CRANK
    on_crank = second**2 * (arm * (c * across - s * along) - turn) - 2 * arm * second * (
        c * (_ALONG @ w) + s * (_ACROSS @ w)
    )
    on_rod = first**2 * (turn + arm * (s * along - c * across)) - 2 * second * (
        _DENSITY * (_ALONG_X @ w) + w @ _ROD_MASS @ q
    )
    within = second**2 * (_ROD_MASS @ q + _DENSITY * _ALONG_X) - _STIFFNESS * (_ROD_STIFF @ q)
    within = within + arm * first**2 * (c * _ALONG + s * _ACROSS) + 2 * _DENSITY * second * (_ROD_TURN @ w)
    return torch.cat([torch.stack([on_crank, on_rod, torch.zeros_like(c)]), within])


def crank_constraints(t, x):
    """(7,) -> (3,): the block slides on a line, the rod ends in it, the crank turns."""
    (c1, c2), (s1, s2), rod = torch.cos(x[:2]), torch.sin(x[:2]), _ROD + x[6]
    return torch.stack([_CRANK * s1 + rod * s2, x[2] - _CRANK * c1 - rod * c2, x[0] - _SPEED * t])


def slider_crank(t, y):
    """Of index 1, the constraints differentiated twice: y = (x, v, w, λ), with M = diag(I, I, 0, 0)."""
    x, v, w, force = y.split([7, 7, 7, 3])
    (c1, c2), (s1, s2), rod = torch.cos(x[:2]), torch.sin(x[:2]), _ROD + x[6]
    zero, one = torch.zeros_like(c1), torch.ones_like(c1)
    G = torch.stack(
        [
            torch.stack([_CRANK * c1, rod * c2, zero, zero, zero, zero, s2]),
            torch.stack([_CRANK * s1, rod * s2, one, zero, zero, zero, -c2]),
            torch.stack([one, zero, zero, zero, zero, zero, zero]),
        ]
    )
    first, second, longer = v[0] ** 2, v[1] ** 2, 2 * v[1] * v[6]
    curved = torch.stack(
        [
            longer * c2 - _CRANK * first * s1 - rod * second * s2,
            longer * s2 + _CRANK * first * c1 + rod * second * c2,
            zero,
        ]
    )
    return torch.cat([v, w, crank_inertia(x) @ w - crank_force(x, v) + force @ G, G @ w + curved])


CRANK_MASS = torch.diag(torch.cat([torch.ones(14, dtype=F64), torch.zeros(10, dtype=F64)]))
