"""The one table of solvers: name, order, kind and implementation of each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from .. import errors

if TYPE_CHECKING:  # the numbers of a method are read when it is first used
    from . import explicit as tb
    from . import stiff as st
    from .second import SecondTableau

    Tableau = (
        tb.ExplicitTableau
        | tb.ImplicitTableau
        | st.RosenbrockTableau
        | st.EsdirkTableau
        | st.RadauTableau
        | st.NDFTableau
        | SecondTableau
    )

Kind = Literal["adaptive", "fixed", "implicit", "stiff", "auto", "adams", "second", "reversible", "scipy", "julia"]


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
        coefficients: where its tableau is, as "explicit.DOPRI5"; "" where it has none.
        error_order: order of the embedded solution that a step is compared with; 0 for none.
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
    coefficients: str = field(default="", repr=False)
    error_order: int = field(default=0, repr=False)
    pi: tuple[float, float] = field(default=(0.0, 0.0), repr=False)
    mass: bool = False
    julia: str | None = None

    @cached_property
    def tableau(self) -> Tableau | None:
        """Coefficients of the native engine; None where a method has none."""
        if not self.coefficients:
            return None
        module, _, name = self.coefficients.partition(".")
        found: Tableau = getattr(import_module(f".{module}", __package__), name)
        return found

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
        return self.kind in ("adaptive", "fixed", "implicit", "second") or self.name in ("rodas5p", "rosenbrock23")

    @property
    def imex(self) -> bool:
        """True where the parts of a field that is split are solved in two ways."""
        return self.name in ("kencarp4", "kencarp5")

    @property
    def reversible(self) -> bool:
        """True where a step can be undone by the same operations in reverse."""
        return self.kind == "reversible" or (self.kind == "second" and self.name != "nystrom4")

    @property
    def start_order(self) -> int:
        """Order of the local error that the first step is chosen for."""
        if self.name == "bdf":
            return 2
        if not self.coefficients:
            return 5
        return (self.error_order if self.kind in ("adaptive", "fixed", "reversible", "stiff") else self.order) + 1


# OrdinaryDiffEqSDIRK 2.7 damps its estimates by (J - I / (gamma dt))^-1 without the factor 1 / (gamma dt). So they have
# another unit, and are too small where steps are short: on van der Pol's oscillator with mu = 1e3 KenCarp4 was off by
# 7000 tolerances. Those of KenCarp5 and Kvaerno5 are no better undamped.
_PLAIN = "smooth_est=false"


def hairer(k: int) -> tuple[float, float]:
    """The PI controller of DOPRI5 (Hairer & Wanner, Solving ODEs II, IV.2: beta = 0.2 / k), for error order k."""
    return 0.85 / k, 0.2 / k


def _pi42(k: int) -> tuple[float, float]:
    """PI.4.2 (Söderlind, Digital filters in adaptive time-stepping, ACM TOMS 29, 2003), for error order k."""
    return 0.6 / k, 0.2 / k


def _adaptive(
    name: str,
    tableau: str,
    orders: tuple[int, int],
    pi: tuple[float, float],
    about: str,
    julia: str | None = None,
) -> Method:
    return Method(name, orders[0], "adaptive", about, f"explicit.{tableau}", orders[1], pi, julia=julia)


def _fixed(name: str, tableau: str, order: int, about: str, julia: str | None = None) -> Method:
    return Method(name, order, "fixed", about, f"explicit.{tableau}", julia=julia)


def _reversible(name: str, tableau: str, orders: tuple[int, int], about: str) -> Method:
    about = f"{about}, made reversible (McCallum & Foster)"
    return Method(name, orders[0], "reversible", about, f"explicit.{tableau}", orders[1])


def _implicit(name: str, tableau: str, order: int, about: str, julia: str | None = None) -> Method:
    return Method(name, order, "implicit", about, f"explicit.{tableau}", julia=julia)


def _second(name: str, order: int, about: str) -> Method:
    return Method(name, order, "second", about, f"second.{name.upper()}")


def _stiff(
    name: str,
    tableau: str,
    orders: tuple[int, int],
    about: str,
    julia: str | None = None,
    *,
    mass: bool = False,
) -> Method:
    pi = hairer(orders[1] + 1) if orders[1] else (0.0, 0.0)
    return Method(name, orders[0], "stiff", about, f"stiff.{tableau}", orders[1], pi, mass, julia)


_ROWS = [
    _adaptive("dopri5", "DOPRI5", (5, 4), hairer(5), "Dormand & Prince 5(4), the default", "DP5()"),
    _adaptive("tsit5", "TSIT5", (5, 4), hairer(5), "Tsitouras 5(4)", "Tsit5()"),
    _adaptive("dopri8", "DOPRI8", (8, 7), _pi42(8), "Dormand & Prince 8(5,3) as in Hairer's DOP853", "DP8()"),
    _adaptive("bosh3", "BOSH3", (3, 2), hairer(3), "Bogacki & Shampine 3(2)", "BS3()"),
    _adaptive("fehlberg2", "FEHLBERG2", (2, 1), hairer(2), "Fehlberg 2(1)"),
    _adaptive("adaptive_heun", "ADAPTIVE_HEUN", (2, 1), hairer(2), "Heun 2(1)"),
    _adaptive("vern7", "VERN7", (7, 6), _pi42(7), "Verner's efficient 7(6)", "Vern7()"),
    _adaptive("vern9", "VERN9", (9, 8), _pi42(9), "Verner's efficient 9(8)", "Vern9()"),
    _fixed("euler", "EULER", 1, "Euler", "Euler()"),
    _fixed("midpoint", "MIDPOINT", 2, "explicit midpoint", "Midpoint()"),
    _fixed("heun2", "HEUN2", 2, "Heun, order 2 (explicit trapezoid)", "Heun()"),
    _fixed("heun3", "HEUN3", 3, "Heun, order 3"),
    _fixed("rk4", "RK4", 4, "Kutta's 3/8 rule"),
    _reversible("reversible_midpoint", "MIDPOINT", (2, 0), "explicit midpoint"),
    _reversible("reversible_rk4", "RK4", (4, 0), "Kutta's 3/8 rule"),
    _reversible("reversible_dopri5", "DOPRI5", (5, 4), "Dormand & Prince 5"),
    Method("explicit_adams", 12, "adams", "Adams-Bashforth, order up to `max_order`"),
    Method("implicit_adams", 12, "adams", "Adams-Bashforth-Moulton, order up to `max_order`"),
    _implicit("implicit_euler", "IMPLICIT_EULER", 1, "implicit Euler", "ImplicitEuler()"),
    _implicit("implicit_midpoint", "IMPLICIT_MIDPOINT", 2, "implicit midpoint (symplectic)", "ImplicitMidpoint()"),
    _implicit("trapezoid", "TRAPEZOID", 2, "trapezoidal rule", "Trapezoid()"),
    _implicit("radauIIA3", "RADAU_IIA3", 3, "Radau IIA, 2 stages (L-stable)", "RadauIIA3()"),
    _implicit("radauIIA5", "RADAU_IIA5", 5, "Radau IIA, 3 stages (L-stable)", "RadauIIA5()"),
    _implicit("gl4", "GAUSS_LEGENDRE4", 4, "Gauss-Legendre, 2 stages (symplectic)"),
    _implicit("gl6", "GAUSS_LEGENDRE6", 6, "Gauss-Legendre, 3 stages (symplectic)"),
    _implicit("sdirk2", "SDIRK2", 2, "SDIRK, 2 stages (L-stable)"),
    _implicit("trbdf2", "TRBDF2", 2, "trapezoid then BDF2, one step (L-stable)"),
    _stiff("rodas5p", "RODAS5P", (5, 4), "Rosenbrock 5(4), Steinebach (L-stable)", "Rodas5P()", mass=True),
    _stiff("rosenbrock23", "ROSENBROCK23", (2, 2), "Rosenbrock 2(3), Shampine & Reichelt's ode23s", "Rosenbrock23()"),
    _stiff(
        "radau5", "RADAU5", (5, 3), "Radau IIA, 3 stages, Hairer & Wanner's RADAU5 (L-stable)", "RadauIIA5()", mass=True
    ),
    _stiff("bdf", "NDF", (5, 0), "numerical differentiation formulas of order 1 to 5", "QNDF()", mass=True),
    _stiff("kvaerno5", "KVAERNO5", (5, 4), "ESDIRK 5(4), Kværnø (L-stable)", "Kvaerno5()"),
    _stiff("kencarp4", "KENCARP4", (4, 3), "ESDIRK 4(3), Kennedy & Carpenter (L-stable)", f"KenCarp4({_PLAIN})"),
    _stiff("kencarp5", "KENCARP5", (5, 4), "ESDIRK 5(4), Kennedy & Carpenter (L-stable)", "KenCarp5()"),
    _stiff(
        "trbdf2_adaptive",
        "TRBDF2",
        (2, 2),
        "trapezoid then BDF2, with error control (L-stable)",
        f"TRBDF2({_PLAIN})",
    ),
    Method(
        "auto",
        5,
        "auto",
        "tsit5, and rodas5p or bdf while the problem is stiff",
        pi=hairer(5),
        julia="DefaultODEAlgorithm()",
    ),
    _second("symplectic_euler", 1, "symplectic Euler: kick, drift"),
    _second("velocity_verlet", 2, "velocity Verlet, also called leapfrog (symplectic)"),
    _second("yoshida4", 4, "Forest & Ruth, Yoshida (symplectic)"),
    _second("mcate4", 4, "McLachlan & Atela, small errors (symplectic)"),
    _second("kahan_li6", 6, "Kahan & Li, 9 stages (symplectic)"),
    _second("suzuki8", 8, "Suzuki & Umeno, 15 stages (symplectic)"),
    _second("nystrom4", 4, "Nyström, for q'' that depends on q' too"),
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
    julia = {f"{row.julia.partition('(')[0]}()": row.name for row in reversed(METHODS.values()) if row.julia}
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
            dense output: for many implicit ones that is a cubic, and `adjoint="forward"` is better. Algorithms for
            fully implicit systems (DFBDF, DABDF2) solve a field as M y' - f(t, y) = 0, and `Implicit` fields.
    """
    return Method(expression, 0, "julia", "a solver of DifferentialEquations.jl", julia=expression, mass=True)


def unknown(name: object, what: str, names: list[str]) -> str:
    """Message for a name that is not among `names`: the near ones first, else all."""
    lowered = {n.lower(): n for n in names}
    near = [lowered[n] for n in difflib.get_close_matches(str(name).lower(), list(lowered), n=4, cutoff=0.5)]
    if near:
        return f"unknown {what} {name!r}; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {what} {name!r}; there are {', '.join(map(repr, names))}."
