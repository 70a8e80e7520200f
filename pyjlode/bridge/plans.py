"""What was found out about a call holds for the next one that is like it: for fields that do the same, and solvers that
say the same.

A training loop makes the same call again and again, and making a problem of its arguments takes longer than Julia needs
for a small system. Only what is compiled has plans: a compiled field is known by what it reads (`pyjlode.capture`).
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import arguments, numbers
from ..capture.surroundings import surroundings
from ..gradients import first_only, other_function
from ..problem import Field, Layout, Prepared, flat_field, like
from ..solution import Solution, Stats
from . import engine, runtime
from .calls import Calls, Held
from .memory import Outcome, Replayed

if TYPE_CHECKING:
    from .codegen.field import Repeated

# Plans kept for one program: what they cost is a few small objects.
_KEPT = 64
_TENSORS, _STATES = (Tensor, nn.Parameter), (torch.float32, torch.float64)


@dataclass
class Quick:
    """What a call needs that makes no problem: it fills in the tensors and calls Julia.

    Attributes:
        name: of the solve that is repeated, "f", or "discrete" where there is a gradient.
        shapes: tensors of the shapes of the gradients that a replay gives; size: numbers in all of them.
        order: which of these are those by the state and the problem's `params`; None where all are, in this order.
        apart: how far apart steps and their replay may come out.
    """

    name: str
    shapes: list[Tensor]
    size: int
    order: list[int | None] | None
    apart: float


@dataclass
class Plan:
    """For one kind of call.

    Attributes:
        made: as made for one of them, without its tensors and its field.
        wrt: which of the tensors that the field holds are the problem's `params`.
        last: times of the last call, and what the engine keeps for calls at these times.
        quick: None where a problem must be made.
        uses: calls so far.
    """

    made: Prepared
    wrt: tuple[int, ...]
    last: tuple[list[float], dict[str, Any]]
    quick: Quick | None
    uses: int = 1


class Call:
    """A call for which there may be a plan.

    Args:
        plans: of the program of its field.
        key: what it says besides the values of its tensors.
        field: which knows its program.
        y0: the state: as it is, or flat where it is not one tensor.
        layout: how it lies in y0; None where it is y0.
    """

    def __init__(
        self, plans: dict[tuple[Any, ...], Plan], key: tuple[Any, ...], field: Field, y0: Tensor, layout: Layout | None
    ) -> None:
        self.plans, self.key, self.field, self.y0, self.layout = plans, key, field, y0, layout

    def solved(self, t: Any, start: float) -> Solution | None:
        """The solution, where the call is like the last ones in all but its numbers. None also where the solve fails:
        made anew, it says why.

        Args:
            start: when the call began.
        """
        plan = self.plans.get(self.key)
        if plan is None or plan.quick is None or plan.uses & (plan.uses + 1) == 0:
            return None
        quick, (times, repeats) = plan.quick, plan.last
        repeated: Repeated | None = repeats.get(quick.name)
        if repeated is None or type(t) is not Tensor or not t.is_floating_point() or t.tolist() != times:
            return None
        program, source = self.field.program
        tensors = program.read(source)
        recorded, y0 = torch.is_grad_enabled(), self.y0
        out = y0.new_empty((len(times), *y0.shape))
        try:
            if recorded:  # as `torch.no_grad()`, which takes a microsecond
                torch._C._set_grad_enabled(False)
            try:
                held, outcome = runtime.within(repeated.solve, tensors, y0, out)
            finally:
                if recorded:
                    torch._C._set_grad_enabled(True)
        except BaseException:
            repeats.pop(quick.name, None)
            raise
        if not outcome.succeeded:
            return None
        plan.uses += 1
        stats = like(
            plan.made.stats,
            switches=[],
            nfe=outcome.nf,
            naccept=outcome.naccept,
            nreject=outcome.nreject,
            njac=outcome.njac,
            nlu=outcome.nlu,
            nnewton=outcome.nnewton,
            compiled=program.mode,
        )
        if held is not None:
            if repeated.replay is None:
                repeated.replay = engine.replay_request(like(plan.made.problem, times=times))
            replay = _Replay(quick, repeated, tensors, held, outcome, stats, out)
            of = source.tensors
            out = _apply(replay, y0, *[of[i] for i in plan.wrt])
        stats.wall = time.perf_counter() - start
        return Solution(t, out if self.layout is None else self.layout.unflatten(out), stats)

    def _quick(self, made: Prepared, wrt: tuple[int, ...]) -> Quick | None:
        """What later calls need of one, if they need not make a problem."""
        p, (program, source) = made.problem, self.field.program
        pulls = made.needed and made.gradient == "discrete"
        plain = p.batch == 1 and p.rows is None and p.split is None and not p.options.progress
        if not plain or (made.needed and (not pulls or p.t.requires_grad)) or source.counters or program.trace.adds:
            return None
        places = program.trace.slots[: program.trace.trained]
        trained = [source.tensors[i] for i in places]
        if any(x.dtype != p.y0.dtype or x.device.type != "cpu" for x in trained):
            return None
        shapes = [
            torch.empty(p.f.shape or p.y0.shape, device="meta"),
            *(torch.empty_like(x, device="meta") for x in trained),
        ]
        order = [0, *(1 + places.index(i) if i in places else None for i in wrt)]
        rtol = p.rtol if isinstance(p.rtol, float) else float(torch.as_tensor(p.rtol).max())
        return Quick(
            "discrete" if pulls else "f",
            shapes,
            sum(x.numel() for x in shapes),
            None if order == list(range(len(shapes))) else order,
            rtol + engine.apart_by_rounding(p.y0.dtype),
        )

    def made(self, t: Any) -> Prepared | None:
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
            y0=arguments.finite(self.y0.reshape(-1)),
            layout=self.layout or plan.made.problem.layout,
            t=t,
            times=values,
            params=tuple([held[i] for i in plan.wrt]),
            repeats=repeats,
        )
        return like(plan.made, problem=p, stats=like(plan.made.stats, switches=[]))

    def keep(self, made: Prepared) -> None:
        """Have the next such call find what was made of this one."""
        p, before = made.problem, self.plans.pop(self.key, None)
        if p.split is not None:  # a plan is of one field
            return
        tensors = self.field.program[1].tensors
        places = {id(x): i for i, x in enumerate(tensors)}
        if len(places) < len(tensors):  # tied after f was captured: the next f like it may not be
            return
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
        wrt = tuple(places[id(x)] for x in params)
        plan = Plan(replace(made, problem=bare, stats=stats), wrt, (p.times, {}), self._quick(made, wrt))
        if before is not None:
            plan.uses = before.uses
            if before.last[0] == p.times:
                plan.last = before.last
        self.plans[self.key] = plan


class _Replay:
    """The product of a repeated solve, by its steps.

    Args:
        tensors: that f held, in the program's order.
        held: the solve with its steps.
        outcome: how it went, which stands for the values that Julia's field held in it.
        out: the states, until they are handed on.
    """

    def __init__(
        self,
        quick: Quick,
        repeated: Repeated,
        tensors: list[Tensor],
        held: Held,
        outcome: Outcome,
        stats: Stats,
        out: Tensor | None,
    ) -> None:
        self.quick, self.repeated, self.tensors, self.held = quick, repeated, tensors, held
        self.outcome, self.stats, self.out = outcome, stats, out

    def __call__(self, g: Tensor, again: bool) -> list[Tensor | None]:
        """Gradients of a loss with cotangents g of the states: by the first state, and by the problem's parameters."""
        start, quick = time.perf_counter(), self.quick
        both = g.new_empty(quick.size)
        replayed = runtime.within(self._pull, both, g.contiguous().resolve_neg())
        if not replayed.apart <= quick.apart:
            raise other_function()
        grads: list[Tensor | None] = unflatten(both, quick.shapes)
        self.stats.nfe_backward += replayed.nf
        self.stats.wall_backward += time.perf_counter() - start
        return grads if quick.order is None else [None if i is None else grads[i] for i in quick.order]

    def _pull(self, calls: Calls, both: Tensor, g: Tensor) -> Replayed:
        own, request = self.repeated.own, self.repeated.replay
        assert request is not None
        if own.filled is not self.outcome:  # another solve was made in between
            own.fill(self.tensors, self.outcome)
        return calls.replay(self.held, request, both, g, whole=True)


class _Replayed(torch.autograd.Function):
    """The states of a repeated solve as a function of the first state and the parameters: as `gradients.solve` makes
    them."""

    @staticmethod
    def forward(ctx: Any, replay: _Replay, y0: Tensor, *params: Tensor) -> Tensor:
        ctx.replay = replay
        ctx.save_for_backward(y0, *params)  # autograd's own check that nothing was changed in place in between
        out, replay.out = replay.out, None
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise first_only("discrete")
        _ = ctx.saved_tensors
        return None, *numbers.for_each(ctx.replay, g, True)


# As `_Replayed.apply`, without its looking for transforms of `torch.func`, of which there are none here.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Replayed).apply

unflatten: Callable[[Tensor, list[Tensor]], list[Any]] = torch._C._nn.unflatten_dense_tensors


@functools.cache
def _known() -> Callable[[Field, Tensor], Any]:
    from .codegen.program import known  # half the cost of importing this package

    return known


def call(f: Any, h0: Any, t: Any, how: tuple[Any, ...]) -> Call | None:
    """The call, where it is one that there may be a plan for.

    Args:
        how: to solve: the `Solver`, and whatever else decides.
    """
    if torch.is_autocast_enabled("cpu") or surroundings() or _has_callbacks(f):
        return None
    y0, layout = h0, None
    if type(h0) in _TENSORS:
        if h0.dtype not in _STATES or h0.device.type != "cpu" or not h0.is_contiguous() or h0.is_neg():
            return None
        of = Field(f, h0.shape, (f, h0.shape))
    else:
        layout = how[0].layout_of(h0)
        if type(layout) is not Layout or layout.bare or layout.device.type != "cpu" or any(layout.complex):
            return None
        of, y0 = flat_field(f, layout, False), layout.flatten(h0)
    program = _known()(of, y0)
    if program is None:
        return None
    grad = torch.is_grad_enabled()
    by = grad and y0.requires_grad, grad and isinstance(t, Tensor) and t.requires_grad
    return Call(program.plans, (grad, *by, *how), of, y0, layout)


_CALLBACKS = frozenset(
    f"callback_{name}{of}" for name in ("step", "accept_step", "reject_step") for of in ("", "_adjoint")
)
_PLAIN: set[type] = {types.FunctionType, types.BuiltinFunctionType}  # what they carry they carry themselves


def _has_callbacks(f: Any) -> bool:
    """Whether the solver is to call something that f carries."""
    kind, own = type(f), getattr(f, "__dict__", ())
    if not _CALLBACKS.isdisjoint(own):
        return True
    if kind in _PLAIN:
        return False
    if kind.__dict__.get("forward") is None or not isinstance(f, nn.Module):
        return any(hasattr(f, name) for name in _CALLBACKS)
    # What is not there a module looks for in many places.
    return not _CALLBACKS.isdisjoint(f._modules) or any(hasattr(kind, name) for name in _CALLBACKS)
