"""Solve and differentiate `h' = f(t, h)` from PyTorch."""

from . import errors
from .bridge.function import julia_function
from .driven import CDE, Interpolation
from .gradients import GRADIENTS
from .jumps import At, Event
from .methods import METHODS, julia_method
from .odeint import odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from .solution import Occurrence, Solution, Stats
from .solver import Solver
from .source import julia_source

__version__ = "0.1.0"
__all__ = [
    "CDE",
    "GRADIENTS",
    "METHODS",
    "At",
    "Event",
    "Interpolation",
    "Occurrence",
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
