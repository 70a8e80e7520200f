"""Solve and differentiate `h' = f(t, h)` from PyTorch."""

from . import errors
from .bridge.function import julia_function
from .gradients import GRADIENTS
from .methods import METHODS, julia_method
from .odeint import odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from .solution import Solution, Stats
from .solver import Solver
from .source import julia_source
from .systems import SecondOrder

__version__ = "0.1.0"
__all__ = [
    "GRADIENTS",
    "METHODS",
    "SecondOrder",
    "Solution",
    "Solver",
    "Stats",
    "errors",
    "julia_function",
    "julia_method",
    "julia_source",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve",
]
