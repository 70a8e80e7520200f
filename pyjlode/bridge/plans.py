"""What was found out about a call holds for the next one that is like it: for fields that do the same, and solvers that
say the same.

A training loop makes the same call again and again, and making a problem of its arguments takes longer than Julia needs
for a small system. Only what is compiled has plans: a compiled field is known by what it reads (`pyjlode.capture`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..capture.surroundings import surroundings
from ..problem import Field, Prepared, like
from ..solution import Stats

# Plans kept for one program: what they cost is a few small objects.
_KEPT = 64
_TENSORS, _STATES = (Tensor, nn.Parameter), (torch.float32, torch.float64)


@dataclass
class Plan:
    """For one kind of call.

    Attributes:
        made: as made for one of them, without its tensors and its field.
        wrt: which of the tensors that the field holds are the problem's `params`.
        last: times of the last call, and what the engine keeps for calls at these times.
        uses: calls so far.
    """

    made: Prepared
    wrt: tuple[int, ...]
    last: tuple[list[float], dict[str, Any]]
    uses: int = 1


class Call:
    """A call for which there may be a plan.

    Args:
        plans: of the program of its field.
        key: what it says besides the values of its tensors.
        field: which knows its program.
    """

    def __init__(self, plans: dict[tuple[Any, ...], Plan], key: tuple[Any, ...], field: Field) -> None:
        self.plans, self.key, self.field = plans, key, field

    def made(self, h0: Tensor, t: Any) -> Prepared | None:
        """What would be made of the call, if that is known.

        At uses whose count is a power of two it is not: then it is made anew, with a call of f, and what is compiled is
        compared with that. It would find what no guard sees, such as a state that an extension keeps in C.

        Raises:
            BadTime, BadDtype, NonFiniteState: as where it is made.
        """
        plan = self.plans.get(self.key)
        if plan is None:
            return None
        plan.uses += 1
        if plan.uses & (plan.uses - 1) == 0:
            return None
        repeats: dict[str, Any] | None
        values, repeats = plan.last
        if type(t) is not Tensor or not t.is_floating_point() or t.tolist() != values:
            t, times = arguments.times(t)
            if times != values:
                values, repeats = times, None
                plan.last = values, {}
        held = self.field.program[1].tensors
        p = like(
            plan.made.problem,
            f=self.field,
            y0=arguments.finite(h0 if h0.ndim == 1 else h0.reshape(-1)),
            t=t,
            times=values,
            params=tuple([held[i] for i in plan.wrt]),
            repeats=repeats,
        )
        return like(plan.made, problem=p, stats=like(plan.made.stats, switches=[]))

    def keep(self, made: Prepared) -> None:
        """Have the next such call find what was made of this one."""
        p, before = made.problem, self.plans.pop(self.key, None)
        places = {id(x): i for i, x in enumerate(self.field.program[1].tensors)}
        # What f holds and a compiled f does not read has no gradient.
        params = [x for x in p.params if id(x) in places]
        if not all(x.is_leaf for x in params):
            return
        if len(self.plans) >= _KEPT:
            self.plans.clear()
        nothing: Any = None
        bare = replace(
            p, f=nothing, y0=nothing, t=nothing, times=[], f0=None, params=(), bindings=(), strange={}, own={}
        )
        stats = Stats(made.stats.engine, made.stats.reason, made.stats.method)
        plan = Plan(replace(made, problem=bare, stats=stats), tuple(places[id(x)] for x in params), (p.times, {}))
        if before is not None:
            plan.uses = before.uses
            if before.last[0] == p.times:
                plan.last = before.last
        self.plans[self.key] = plan


@functools.cache
def _known() -> Callable[[Field, Tensor], Any]:
    from .codegen.program import known  # half the cost of importing this package

    return known


def call(f: Any, h0: Any, t: Any, how: tuple[Any, ...]) -> Call | None:
    """The call, where it is one that there may be a plan for.

    Args:
        how: to solve: the `Solver`, and whatever else decides.
    """
    if type(h0) not in _TENSORS or h0.dtype not in _STATES or h0.device.type != "cpu":
        return None
    if not h0.is_contiguous() or h0.is_neg() or torch.is_autocast_enabled("cpu"):
        return None
    if surroundings():
        return None
    known = _known()
    of = Field(f, h0.shape, (f, h0.shape))
    program = known(of, h0)
    if program is None:
        return None
    grad = torch.is_grad_enabled()
    by = grad and h0.requires_grad, grad and isinstance(t, Tensor) and t.requires_grad
    return Call(program.plans, (grad, *by, *how), of)
