"""Types for those who write programs: the names of methods, gradients and engines, and the keywords of a solve.

Nothing here is read at run time. `tests/test_types.py` holds these against the tables that are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from .methods import Method

MethodName = Literal[
    "dopri5",
    "tsit5",
    "dopri8",
    "bosh3",
    "fehlberg2",
    "adaptive_heun",
    "vern7",
    "vern9",
    "euler",
    "midpoint",
    "heun2",
    "heun3",
    "rk4",
    "reversible_midpoint",
    "reversible_rk4",
    "reversible_dopri5",
    "explicit_adams",
    "implicit_adams",
    "fixed_adams",
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA3",
    "radauIIA5",
    "gl4",
    "gl6",
    "sdirk2",
    "trbdf2",
    "rodas5p",
    "rosenbrock23",
    "radau5",
    "bdf",
    "kvaerno5",
    "kencarp4",
    "kencarp5",
    "trbdf2_adaptive",
    "auto",
    "symplectic_euler",
    "velocity_verlet",
    "yoshida4",
    "mcate4",
    "kahan_li6",
    "suzuki8",
    "nystrom4",
    "scipy_solver",
]
GradientName = Literal[
    "discrete", "checkpointed", "reversible", "backsolve", "interpolating", "quadrature", "gauss", "forward"
]
EngineName = Literal["auto", "julia", "torch", "native"]
Times = float | Sequence[float] | Tensor


class KeywordOptions(TypedDict, total=False):
    """Options that may be written as keywords of a call too: `max_step=0.1` is `options={"max_step": 0.1}`.

    `pyjlode.problem.SolverOptions` says what each of them means.
    """

    first_step: float
    safety: float
    ifactor: float
    dfactor: float
    min_step: float
    max_step: float
    max_num_steps: int
    max_events: int
    step_t: Times
    jump_t: Times
    norm: Callable[[Any], Any]
    step_size: float
    grid_constructor: Callable[[Any, Any, Tensor], Tensor]
    interp: Literal["linear", "cubic"]
    perturb: bool
    max_order: int
    max_iters: int
    batch_dims: int
    batch_t: Literal["auto", "column", "batch", "vmap"]
    on_failure: Literal["raise", "nan"]
    consistent: Literal["check", "compute"]
    allow_unstable: bool
    specialize: Literal["auto", "full"]
    progress: bool
    estimates: bool


class Options(KeywordOptions, total=False):
    """What `options` of a solve may hold. `dtype` is torchdiffeq's and changes nothing here."""

    solver: Literal["RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA"]
    dtype: Any


class HowElse(KeywordOptions, total=False):
    """How to solve, but for the method."""

    rtol: Any
    atol: Any
    adjoint: bool | GradientName
    engine: EngineName
    options: Options | Mapping[str, Any] | None
    adjoint_rtol: Any
    adjoint_atol: Any
    adjoint_method: MethodName | Method | None
    adjoint_options: Mapping[str, Any] | None
    compile: bool | None


class How(HowElse, total=False):
    """How to solve: the keywords of `pyjlode.Solver`, and of every call that solves."""

    method: MethodName | Method | None


class What(TypedDict, total=False):
    """What is solved, beside `f`, `h0` and `t`: keywords of every call that solves."""

    args: tuple[Any, ...]
    mass_matrix: Any
    jac: Callable[..., Tensor] | None
    adjoint_params: Iterable[Tensor] | None


class Said(What, How, total=False):
    """All keywords of `odeint` but `event_fn`."""
