"""The one table of solvers: name, order, kind and implementation of each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Literal

from .. import errors
from . import explicit as tb
from . import second as so
from . import stiff as st
from .explicit import ExplicitTableau
from .second import SecondTableau

Kind = Literal["adaptive", "fixed", "implicit", "stiff", "auto", "adams", "second", "reversible", "scipy", "julia"]
Tableau = (
    ExplicitTableau
    | tb.ImplicitTableau
    | st.RosenbrockTableau
    | st.EsdirkTableau
    | st.RadauTableau
    | st.NDFTableau
    | SecondTableau
)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: what the user writes in `method=`.
        order: order of convergence of the state at the end of a step.
        kind: `adaptive` (explicit Runge-Kutta with error control), `fixed` (explicit Runge-Kutta), `implicit`
            (Runge-Kutta whose stages need a nonlinear solve, fixed steps), `stiff` (implicit, with error control),
            `auto` (switches between an adaptive and a stiff one), `adams` (linear multistep, fixed steps), `second`
            (for systems of second order, fixed steps), `reversible` (explicit Runge-Kutta made reversible, fixed
            steps), `scipy` (`scipy.integrate.solve_ivp`) or `julia` (one that only
            Julia has).
        tableau: coefficients of the native engine; None where a method has none.
        pi: (beta1, beta2) of the step-size controller, see `native/controller.py`; unused by fixed steps, `radau5` and
            `bdf`.
        mass: whether it solves M h' = f with a singular M.
        about: one line for the table in the documentation.
        julia: the same method in DifferentialEquations.jl, as a Julia expression; None where it has none.
    """

    name: str
    order: int
    kind: Kind
    about: str
    tableau: Tableau | None = field(default=None, repr=False)
    pi: tuple[float, float] = field(default=(0.0, 0.0), repr=False)
    mass: bool = False
    julia: str | None = None

    @property
    def adaptive(self) -> bool:
        return self.kind in ("adaptive", "stiff", "auto", "scipy", "julia")

    @property
    def controlled(self) -> bool:
        """True where `native/stiff.py` makes the steps."""
        return self.kind in ("stiff", "auto")

    @property
    def stiff(self) -> bool:
        """True where stiffness does not limit the step size (A-stable)."""
        return self.kind in ("implicit", "stiff", "auto")

    @property
    def alone(self) -> bool:
        """True where a step follows from its start alone, and from nothing of earlier steps."""
        return self.kind in ("adaptive", "fixed", "implicit", "second") or isinstance(
            self.tableau, st.RosenbrockTableau
        )

    @property
    def imex(self) -> bool:
        """True where the parts of a field that is split are solved in two ways."""
        return isinstance(self.tableau, st.EsdirkTableau) and self.tableau.explicit is not None

    @property
    def reversible(self) -> bool:
        """True where a step can be undone by the same operations in reverse."""
        return self.kind == "reversible" or isinstance(self.tableau, so.SymplecticTableau)

    @property
    def start_order(self) -> int:
        """Order of the local error that the first step is chosen for."""
        if isinstance(self.tableau, st.NDFTableau):
            return 2
        return 5 if self.tableau is None else getattr(self.tableau, "error_order", self.order) + 1


def hairer(k: int) -> tuple[float, float]:
    """The PI controller of DOPRI5 (Hairer & Wanner, Solving ODEs II, IV.2: beta = 0.2 / k), for error order k."""
    return 0.85 / k, 0.2 / k


def _pi42(k: int) -> tuple[float, float]:
    """PI.4.2 (Söderlind, Digital filters in adaptive time-stepping, ACM TOMS 29, 2003), for error order k."""
    return 0.6 / k, 0.2 / k


def _adaptive(
    name: str, tableau: ExplicitTableau, pi: tuple[float, float], about: str, julia: str | None = None
) -> Method:
    return Method(name, tableau.order, "adaptive", about, tableau, pi, julia=julia)


def _fixed(name: str, tableau: ExplicitTableau, about: str, julia: str | None = None) -> Method:
    return Method(name, tableau.order, "fixed", about, tableau, julia=julia)


def _reversible(name: str, tableau: ExplicitTableau, about: str) -> Method:
    return Method(name, tableau.order, "reversible", f"{about}, made reversible (McCallum & Foster)", tableau)


def _implicit(name: str, tableau: tb.ImplicitTableau, about: str, julia: str | None = None) -> Method:
    return Method(name, tableau.order, "implicit", about, tableau, julia=julia)


def _second(tableau: SecondTableau, about: str, julia: str | None = None) -> Method:
    return Method(tableau.name, tableau.order, "second", about, tableau, julia=julia)


def _stiff(
    name: str,
    tableau: st.RosenbrockTableau | st.EsdirkTableau | st.RadauTableau | st.NDFTableau,
    about: str,
    julia: str | None = None,
) -> Method:
    pi = (0.0, 0.0) if isinstance(tableau, st.NDFTableau) else hairer(tableau.error_order + 1)
    mass = tableau in (st.RODAS5P, st.RADAU5, st.NDF)
    return Method(name, tableau.order, "stiff", about, tableau, pi, mass, julia)


_ROWS = [
    _adaptive("dopri5", tb.DOPRI5, hairer(5), "Dormand & Prince 5(4), the default", "DP5()"),
    _adaptive("tsit5", tb.TSIT5, hairer(5), "Tsitouras 5(4)", "Tsit5()"),
    _adaptive("dopri8", tb.DOPRI8, _pi42(8), "Dormand & Prince 8(5,3) as in Hairer's DOP853", "DP8()"),
    _adaptive("bosh3", tb.BOSH3, hairer(3), "Bogacki & Shampine 3(2)", "BS3()"),
    _adaptive("fehlberg2", tb.FEHLBERG2, hairer(2), "Fehlberg 2(1)"),
    _adaptive("adaptive_heun", tb.ADAPTIVE_HEUN, hairer(2), "Heun 2(1)"),
    _adaptive("vern7", tb.VERN7, _pi42(7), "Verner's efficient 7(6)", "Vern7()"),
    _adaptive("vern9", tb.VERN9, _pi42(9), "Verner's efficient 9(8)", "Vern9()"),
    _fixed("euler", tb.EULER, "Euler", "Euler()"),
    _fixed("midpoint", tb.MIDPOINT, "explicit midpoint", "Midpoint()"),
    _fixed("heun2", tb.HEUN2, "Heun, order 2 (explicit trapezoid)", "Heun()"),
    _fixed("heun3", tb.HEUN3, "Heun, order 3"),
    _fixed("rk4", tb.RK4, "Kutta's 3/8 rule"),
    _reversible("reversible_midpoint", tb.MIDPOINT, "explicit midpoint"),
    _reversible("reversible_rk4", tb.RK4, "Kutta's 3/8 rule"),
    _reversible("reversible_dopri5", tb.DOPRI5, "Dormand & Prince 5"),
    Method("explicit_adams", 12, "adams", "Adams-Bashforth, order up to `max_order`"),
    Method("implicit_adams", 12, "adams", "Adams-Bashforth-Moulton, order up to `max_order`"),
    _implicit("implicit_euler", tb.IMPLICIT_EULER, "implicit Euler", "ImplicitEuler()"),
    _implicit("implicit_midpoint", tb.IMPLICIT_MIDPOINT, "implicit midpoint (symplectic)", "ImplicitMidpoint()"),
    _implicit("trapezoid", tb.TRAPEZOID, "trapezoidal rule", "Trapezoid()"),
    _implicit("radauIIA3", tb.RADAU_IIA3, "Radau IIA, 2 stages (L-stable)", "RadauIIA3()"),
    _implicit("radauIIA5", tb.RADAU_IIA5, "Radau IIA, 3 stages (L-stable)", "RadauIIA5()"),
    _implicit("gl4", tb.GAUSS_LEGENDRE4, "Gauss-Legendre, 2 stages (symplectic)"),
    _implicit("gl6", tb.GAUSS_LEGENDRE6, "Gauss-Legendre, 3 stages (symplectic)"),
    _implicit("sdirk2", tb.SDIRK2, "SDIRK, 2 stages (L-stable)"),
    _implicit("trbdf2", tb.TRBDF2, "trapezoid then BDF2, one step (L-stable)"),
    _stiff("rodas5p", st.RODAS5P, "Rosenbrock 5(4), Steinebach (L-stable)", "Rodas5P()"),
    _stiff("rosenbrock23", st.ROSENBROCK23, "Rosenbrock 2(3), Shampine & Reichelt's ode23s", "Rosenbrock23()"),
    _stiff("radau5", st.RADAU5, "Radau IIA, 3 stages, Hairer & Wanner's RADAU5 (L-stable)", "RadauIIA5()"),
    _stiff("bdf", st.NDF, "numerical differentiation formulas of order 1 to 5", "FBDF()"),
    _stiff("kvaerno5", st.KVAERNO5, "ESDIRK 5(4), Kværnø (L-stable)", "Kvaerno5()"),
    _stiff("kencarp4", st.KENCARP4, "ESDIRK 4(3), Kennedy & Carpenter (L-stable)", "KenCarp4()"),
    _stiff("kencarp5", st.KENCARP5, "ESDIRK 5(4), Kennedy & Carpenter (L-stable)", "KenCarp5()"),
    _stiff("trbdf2_adaptive", st.TRBDF2, "trapezoid then BDF2, with error control (L-stable)", "TRBDF2()"),
    Method(
        "auto",
        5,
        "auto",
        "tsit5, and rodas5p or bdf while the problem is stiff",
        pi=hairer(5),
        julia="DefaultODEAlgorithm()",
    ),
    _second(so.SYMPLECTIC_EULER, "symplectic Euler: kick, drift"),
    _second(so.VELOCITY_VERLET, "velocity Verlet, also called leapfrog (symplectic)"),
    _second(so.YOSHIDA4, "Forest & Ruth, Yoshida (symplectic)"),
    _second(so.MCATE4, "McLachlan & Atela, small errors (symplectic)"),
    _second(so.KAHAN_LI6, "Kahan & Li, 9 stages (symplectic)"),
    _second(so.SUZUKI8, "Suzuki & Umeno, 15 stages (symplectic)"),
    _second(so.NYSTROM4, "Nyström, for q'' that depends on q' too"),
    Method("scipy_solver", 0, "scipy", "any method of `scipy.integrate.solve_ivp`, named by options['solver']"),
]


class Table(dict[str, Method]):
    """Methods by their names; a line for each where it is shown."""

    def __repr__(self) -> str:
        lines = [f"  {m.name:18} {m.kind:9} {f'order {m.order}' if m.order else '':9} {m.about}" for m in self.values()]
        return "\n".join([f"{len(self)} methods:", *lines])


METHODS: dict[str, Method] = Table((row.name, row) for row in _ROWS)
ALIASES = {"fixed_adams": "implicit_adams"}
# What others call the same, or the nearest: SciPy, MATLAB, Julia beside the table's last column. Lower case.
ELSEWHERE = {
    "rk45": "dopri5",
    "rk23": "bosh3",
    "dop853": "dopri8",
    "radau": "radau5",
    "lsoda": "auto",
    "vode": "auto",
    "zvode": "auto",
    "odeint": "auto",
    "ode45": "dopri5",
    "ode23": "bosh3",
    "ode89": "vern9",
    "ode78": "vern7",
    "ode15s": "bdf",
    "ode23s": "rosenbrock23",
    "ode23tb": "trbdf2_adaptive",
    "cvode": "bdf",
    "cvode_bdf": "bdf",
    "qndf": "bdf",
    "rodas5": "rodas5p",
    "rodas4": "rodas5p",
    "dormand_prince": "dopri5",
    "dormandprince": "dopri5",
    "runge_kutta": "rk4",
    "heun": "heun2",
    "forward_euler": "euler",
    "backward_euler": "implicit_euler",
    "crank_nicolson": "trapezoid",
    "adams": "implicit_adams",
    "leapfrog": "velocity_verlet",
    "verlet": "velocity_verlet",
    "stormer_verlet": "velocity_verlet",
    "leapfrogmidpoint": "velocity_verlet",
    "velocityverlet": "velocity_verlet",
    "verletleapfrog": "velocity_verlet",
    "semi_implicit_euler": "symplectic_euler",
    "semiimpliciteuler": "symplectic_euler",
    "symplecticeuler": "symplectic_euler",
    "candyroz4": "yoshida4",
    "forest_ruth": "yoshida4",
    "kahanli6": "kahan_li6",
}
DEFAULT = "dopri5"


def find(name: str | None) -> Method:
    """The row of the table for `name` (None is the default).

    Raises:
        UnknownMethod: no such row; the message lists the near names.
    """
    if name is None:
        name = DEFAULT
    key = ALIASES.get(name, name)
    if key not in METHODS:
        meant = elsewhere(name)
        near = unknown(name, "method", [*METHODS, *ALIASES])
        raise errors.UnknownMethod(f"unknown method {name!r}; here it is {meant!r}." if meant else near)
    return METHODS[key]


def elsewhere(name: str) -> str | None:
    """The row for what other libraries call `name`."""
    julia = {row.julia: row.name for row in reversed(METHODS.values()) if row.julia}
    key = name.strip().removesuffix("()").lower()
    others = {expression.removesuffix("()").lower(): row for expression, row in julia.items()}
    return julia.get(name) or (key if key in METHODS else ELSEWHERE.get(key) or others.get(key))


def julia_method(expression: str) -> Method:
    """Any solver of DifferentialEquations.jl, for `method=` with the Julia engine.

    Args:
        expression: Julia code that makes the algorithm, e.g. `"KenCarp47(linsolve=KrylovJL_GMRES())"`; everything that
            the solver packages of OrdinaryDiffEq and LinearSolve export is in scope. Those that PyJLODE.jl does not
            need itself (ROCK2, VCABM, SSPRK43, Feagin14 ...) are loaded when they are first named, if they are
            installed; the error for one that is not names its package. It is evaluated at the first solve,
            which raises BadOption if Julia does not take it. The gradient of an adjoint is as good as the algorithm's
            dense output: for many implicit ones that is a cubic, and `adjoint="forward"` is better.
    """
    return Method(expression, 0, "julia", "a solver of DifferentialEquations.jl", julia=expression, mass=True)


def unknown(name: object, what: str, names: list[str]) -> str:
    """Message for a name that is not among `names`: the near ones first, else all."""
    lowered = {n.lower(): n for n in names}
    near = [lowered[n] for n in difflib.get_close_matches(str(name).lower(), list(lowered), n=4, cutoff=0.5)]
    if near:
        return f"unknown {what} {name!r}; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {what} {name!r}; there are {', '.join(map(repr, names))}."
