"""Which of SciML's packages a solver of OrdinaryDiffEq is in, where that is loaded on demand."""

from __future__ import annotations

import re

# What PyJLODE.jl itself loads is not here. Source: DifferentialEquations.jl's documentation, ODE solvers.
ALGORITHMS = {
    "OrdinaryDiffEqAdamsBashforthMoulton": "AB3 AB4 AB5 ABM32 ABM43 ABM54 VCAB3 VCAB4 VCAB5 VCABM3 VCABM4 VCABM5 VCABM",
    "OrdinaryDiffEqExplicitRK": "ExplicitRK",
    "OrdinaryDiffEqExponentialRK": "LawsonEuler NorsettEuler ETD1 ETD2 ETDRK2 ETDRK3 ETDRK4 HochOst4 Exp4 EPIRK4s3A "
    "EPIRK4s3B EPIRK5s3 EXPRB53s3 EPIRK5P1 EPIRK5P2 Exprb32 Exprb43",
    "OrdinaryDiffEqExtrapolation": "AitkenNeville ExtrapolationMidpointDeuflhard ExtrapolationMidpointHairerWanner "
    "ImplicitEulerExtrapolation ImplicitDeuflhardExtrapolation ImplicitHairerWannerExtrapolation "
    "ImplicitEulerBarycentricExtrapolation",
    "OrdinaryDiffEqFeagin": "Feagin10 Feagin12 Feagin14",
    "OrdinaryDiffEqIMEXMultistep": "CNAB2 CNLF2",
    "OrdinaryDiffEqLinear": "LinearExponential MagnusMidpoint MagnusLeapfrog MagnusGauss4 MagnusGL6 MagnusGL8",
    "OrdinaryDiffEqLowStorageRK": "ORK256 CarpenterKennedy2N54 DGLDDRK73_C DGLDDRK84_C DGLDDRK84_F NDBLSRK124 "
    "NDBLSRK134 NDBLSRK144 CFRLDDRK64 TSLDDRK74 CKLLSRK43_2 CKLLSRK54_3C CKLLSRK95_4S ParsaniKetchesonDeconinck3S32 "
    "RDPK3Sp35 RDPK3SpFSAL35 RDPK3Sp49 RDPK3SpFSAL49 RDPK3Sp510 RDPK3SpFSAL510",
    "OrdinaryDiffEqNordsieck": "AN5 JVODE JVODE_Adams JVODE_BDF",
    "OrdinaryDiffEqPDIRK": "PDIRK44",
    "OrdinaryDiffEqPRK": "KuttaPRK2p5",
    "OrdinaryDiffEqQPRK": "QPRK98",
    "OrdinaryDiffEqRKN": "Nystrom4 FineRKN4 FineRKN5 Nystrom4VelocityIndependent Nystrom5VelocityIndependent IRKN3 "
    "IRKN4 DPRKN4 DPRKN5 DPRKN6 DPRKN6FM DPRKN8 DPRKN12 ERKN4 ERKN5 ERKN7 RKN4",
    "OrdinaryDiffEqSSPRK": "SSPRK22 SSPRK33 SSPRK43 SSPRK432 SSPRK53 SSPRK53_2N1 SSPRK53_2N2 SSPRK53_H SSPRK54 SSPRK63 "
    "SSPRK73 SSPRK83 SSPRK932 SSPRK104 SSPRKMSVS32 SSPRKMSVS43 SHLDDRK52 SHLDDRK_2N KYKSSPRK42",
    "OrdinaryDiffEqStabilizedIRK": "IRKC",
    "OrdinaryDiffEqStabilizedRK": "ROCK2 ROCK4 RKC ESERK4 ESERK5 SERK2 TSRKC3",
    "OrdinaryDiffEqSymplecticRK": "SymplecticEuler VelocityVerlet VerletLeapfrog LeapfrogDriftKickDrift "
    "PseudoVerletLeapfrog McAte2 Ruth3 McAte3 CandyRoz4 McAte4 McAte42 McAte5 CalvoSanz4 Yoshida6 KahanLi6 McAte8 "
    "KahanLi8 SofSpa10",
    "OrdinaryDiffEqTaylorSeries": "ExplicitTaylor ExplicitTaylor2",
    "Sundials": "CVODE_BDF CVODE_Adams ARKODE IDA",
}
# They want a problem of second order, which the Julia engine does not make.
SECOND_ORDER = ("OrdinaryDiffEqRKN", "OrdinaryDiffEqSymplecticRK")

# They solve F(t, y, y') = 0, and an adjoint is no such system.
FULLY_IMPLICIT = ("DFBDF", "DABDF2", "DImplicitEuler", "IDA")

_OF = {name: package for package, names in ALGORITHMS.items() for name in names.split()}


def of(expression: str) -> dict[str, str]:
    """The algorithms that a Julia expression names and that are loaded on demand, each with its package."""
    return {name: _OF[name] for name in re.findall(r"\w+", expression) if name in _OF}


def fully_implicit(expression: str) -> str | None:
    """The algorithm for fully implicit systems that a Julia expression names."""
    return next((name for name in re.findall(r"\w+", expression) if name in FULLY_IMPLICIT), None)
