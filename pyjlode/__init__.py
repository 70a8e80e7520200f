"""Solve and differentiate `h' = f(t, h)` from PyTorch."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import errors
from .bridge.function import julia_function
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
    from .driven import CDE, Interpolation
    from .ensembles import Ensemble, ensemble, ensemble_map

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


# What few programs need, by the module that it is in: loaded when it is first asked for.
_LATER = {
    **dict.fromkeys(("CDE", "Interpolation"), "driven"),
    **dict.fromkeys(("Ensemble", "ensemble", "ensemble_map"), "ensembles"),
    **dict.fromkeys(("nn", "plot"), ""),
}


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f".{_LATER[name] or name}", __name__)
    return getattr(module, name) if _LATER[name] else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
