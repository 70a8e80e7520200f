"""Solve and differentiate `h' = f(t, h)` from PyTorch."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import errors
from .bridge.function import julia_function
from .driven import CDE, Interpolation
from .ensembles import Ensemble, ensemble, ensemble_map
from .gradients import GRADIENTS
from .jumps import At, Event
from .methods import METHODS, julia_method
from .odeint import odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from .solution import Occurrence, Solution, Stats
from .solver import Solver
from .source import julia_source
from .steady import steady_state
from .systems import Implicit, SecondOrder, Split

if _TYPE_CHECKING:
    from . import nn, plot

__version__ = "0.1.0"
__all__ = [
    "CDE",
    "GRADIENTS",
    "METHODS",
    "At",
    "Ensemble",
    "Event",
    "Implicit",
    "Interpolation",
    "Occurrence",
    "SecondOrder",
    "Solution",
    "Solver",
    "Split",
    "Stats",
    "ensemble",
    "ensemble_map",
    "errors",
    "julia_function",
    "julia_method",
    "julia_source",
    "nn",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "plot",
    "solve",
    "steady_state",
]


def __getattr__(name: str) -> _Any:
    """`pyjlode.nn` and `pyjlode.plot`, loaded when they are first asked for."""
    if name in ("nn", "plot"):
        from importlib import import_module

        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
