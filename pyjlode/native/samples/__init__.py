"""Independent systems in a batch, each with steps, times and an event of its own; `engine` is the front."""

from __future__ import annotations

from ...methods import METHODS
from ...methods.stiff import RosenbrockTableau
from ...problem import ODEProblem

# Names of the methods that give each system steps of its own: explicit pairs, and Rosenbrock methods.
OWN_STEPS = tuple(
    row.name
    for row in METHODS.values()
    if row.kind == "adaptive" or (row.kind == "stiff" and isinstance(row.tableau, RosenbrockTableau))
)
# The largest systems of which a step of a Rosenbrock method is recorded with its Jacobian.
_LARGEST = 32


def cannot(p: ODEProblem) -> str | None:
    """Why the systems of `p` cannot have steps of their own; None if they can."""
    if p.method.name not in OWN_STEPS:
        return f"{p.method.name} takes the same steps for all systems of a batch"
    if p.method.controlled and p.y0.numel() > _LARGEST * p.batch:
        return f"{p.method.name} takes the same steps for all systems where these have more than {_LARGEST} numbers"
    if p.compile and (p.method.controlled or p.layout is None or not p.layout.bare):
        return "compile=True makes steps of their own for explicit methods and states of one real tensor alone"
    if p.jac is not None:
        return "jac= is of all systems at one time, which makes them take the same steps"
    if p.mass is not None:
        return "a mass_matrix makes all systems of a batch take the same steps"
    if p.options.norm is not None:
        return "options['norm'] is of all systems together, which makes them take the same steps"
    return None
