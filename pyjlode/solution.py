"""What a solve returns: the states, the dense output, and an account of the work."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import numbers
from .errors import BadOption, BadTime, GradientUnavailable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .problem import Layout, ODEProblem

State = TypeVar("State")


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same: tensors of equal numbers (NaN is equal to itself), shape, dtype and device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return torch.allclose(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)
    ours, spec = pytree.tree_flatten(a)
    theirs, other = pytree.tree_flatten(b)
    if spec != other:
        return False
    if spec.is_leaf():
        return type(a) is type(b) and bool(a == b)
    return all(map(same, ours, theirs))


class _Compared:
    """A dataclass whose fields may hold tensors, of which `==` gives no answer."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        names = [x.name for x in fields(self) if x.compare]  # type: ignore[arg-type]
        return self is other or all(same(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]


@dataclass(eq=False)
class SystemStats(_Compared):
    """An account of each system of a batch that was solved with steps of its own. All tensors have the shape of the
    batch, on the CPU.

    Attributes:
        nfe: evaluations of f that the system needed.
        naccept, nreject: its accepted and rejected steps.
        failed: whether its solve failed (`options={"on_failure": "nan"}`).
        why: the messages of those that failed, by their index in the batch.
    """

    nfe: Tensor
    naccept: Tensor
    nreject: Tensor
    failed: Tensor
    why: dict[Any, str] = field(default_factory=dict)


@dataclass(eq=False)
class Stats(_Compared):
    """An account of one solve.

    Attributes:
        engine: "torch" or "julia".
        reason: why this engine.
        method: name of the solver.
        copied: whether the initial state was copied for the solver: it is where it is not one contiguous real tensor.
        nfe: evaluations of f in the forward solve.
        naccept, nreject: accepted and rejected steps; of systems with steps of their own, all together.
        njac: Jacobians of f (implicit methods).
        nlu: LU factorisations; one of a batch of systems counts once (adaptive implicit methods).
        nnewton: Newton iterations, of all stages together (adaptive implicit methods with iterations).
        switches: `(t, name)` where `method="auto"` went over to another method.
        wall: seconds for the forward solve.
        nfe_backward: evaluations of f in backward passes through this solve so far (each with its product; where the
            Julia engine has kept the stages of a compiled f, those alone that are beside its products).
        wall_backward: seconds for these backward passes.
        compiled: "scalar" or "array", how f was compiled for the Julia engine; "steps" where the native engine's steps
            were compiled; "" where nothing was.
        not_compiled: why the Julia engine called f back; what of a compiled solve on the native engine is not compiled.
        systems: the same for each system of a batch, where each had steps of its own; else None.
        error_estimate: 0-d, with `options={"estimates": True}`, else None: the sum over the accepted steps of the
            estimated local error (its root mean square) times the length of the step. Differentiable.
        stiffness_estimate: 0-d, the same for the estimate of the largest |eigenvalue| of df/dh. Differentiable.
    """

    engine: str
    reason: str
    method: str
    copied: bool = False
    nfe: int = 0
    naccept: int = 0
    nreject: int = 0
    njac: int = 0
    nlu: int = 0
    nnewton: int = 0
    switches: list[tuple[float, str]] = field(default_factory=list)
    wall: float = 0.0
    nfe_backward: int = 0
    wall_backward: float = 0.0
    compiled: str = ""
    not_compiled: str = ""
    systems: SystemStats | None = None
    error_estimate: Tensor | None = None
    stiffness_estimate: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """To copy and to pickle: without graphs, which cannot be."""
        return {name: x.detach() if isinstance(x, Tensor) else x for name, x in vars(self).items()}


@dataclass
class Steps:
    """The steps of one solve, each as its start and its signed length.

    Attributes:
        accepted, rejected: in the order in which they were tried.
    """

    accepted: list[tuple[float, float]] = field(default_factory=list)
    rejected: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Occurrence(_Compared):
    """One event of a solve with `events`.

    Attributes:
        t: 0-d, when it happened; differentiable.
        index: which of `events` it was.
        before: the state just before, the pytree of `h0`; differentiable.
        after: what `affect` made of it; `before` itself where there is none.
    """

    t: Tensor
    index: int
    before: Any
    after: Any

    def map(self, f: Callable[[Tensor], Tensor]) -> Occurrence:
        """The same with f of each of its tensors."""
        before = pytree.tree_map(f, self.before)
        after = before if self.after is self.before else pytree.tree_map(f, self.after)
        return Occurrence(f(self.t), self.index, before, after)


@dataclass(eq=False, repr=False)
class Solution(_Compared, Generic[State]):
    """The solution of an initial value problem.

    Two solutions are equal if their times, states and events are, number for number; what it took to find them does not
    matter. A pickled solution has its numbers without their graph, and without the dense output, which needs the solver
    and `f`.

    Attributes:
        t: shape (T,), or (*batch, T) with a row for each system: the times asked for; with an event, `[t0, event_t]`;
            where a terminal one of `events` ended the solve, the times before it, and its own.
        h: the states there: the pytree of `h0` with (T, ...) in front of each leaf's shape.
        stats: the account of the work.
        event_t: 0-d time of the event, differentiable; None without one. Of systems with events of their own: of the
            batch's shape, NaN where there is none.
        steps: the steps that were tried; None where the dense output was not kept, or the solver does not tell.
        events: what happened of `events`, in the order in which it happened.
    """

    t: Tensor
    h: State
    stats: Stats = field(compare=False)
    event_t: Tensor | None = None
    _interpolant: Callable[[Tensor], Any] | None = field(default=None, compare=False)
    steps: Steps | None = field(default=None, compare=False)
    events: list[Occurrence] = field(default_factory=list)

    def __copy__(self) -> Solution[State]:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Solution[State]:
        # PyTorch copies no tensor that has a graph; a clone keeps it. The dense output is never written to.
        h = pytree.tree_map(Tensor.clone, self.h)
        event_t = None if self.event_t is None else self.event_t.clone()
        stats, steps = deepcopy(self.stats, memo), deepcopy(self.steps, memo)
        events = [x.map(Tensor.clone) for x in self.events]
        return Solution(self.t.clone(), h, stats, event_t, self._interpolant, steps, events)

    def __getstate__(self) -> dict[str, Any]:
        """To pickle: the numbers without their graph, which another process cannot follow, and without the dense
        output, which calls the solver and `f`."""
        bare = {"t": self.t.detach(), "h": pytree.tree_map(Tensor.detach, self.h)}
        events = [x.map(Tensor.detach) for x in self.events]
        event_t = None if self.event_t is None else self.event_t.detach()
        bare |= {"event_t": event_t, "events": events}
        return {**self.__dict__, **bare, "_interpolant": self._interpolant and _left_behind}

    def __repr__(self) -> str:
        leaves, s = pytree.tree_leaves(self.h), self.stats
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in leaves)
        ends = self.t.detach().reshape(-1, self.t.shape[-1])
        span = f"t={float(ends[0, 0]):.4g} ... {float(ends[0, -1]):.4g}"
        event = "" if self.event_t is None else ", ended by an event"
        steps = f"{s.naccept} steps ({s.nreject} rejected), {s.nfe} calls of f"
        return f"Solution(h: {shapes}, {span}{event}, {s.method} on {s.engine}: {steps})"

    def _repr_html_(self) -> str:
        """For notebooks: a small picture, where matplotlib is installed, and the account of the work."""
        import html
        import io

        text = f"<pre>{html.escape(repr(self))}</pre>"
        leaves = pytree.tree_leaves(self.h)
        if self.t.ndim > 1 or sum(x[0].numel() for x in leaves) > _LINES or len(self.t) < 2:
            return text
        try:
            from . import plot

            picture, figure = io.StringIO(), plot.figure(5, 2.6)
            if len(self.plot(figure.add_subplot()).lines) > 1:
                figure.legend(fontsize="small", loc="outside right upper")
            figure.savefig(picture, format="svg")
        except ImportError:
            return text
        drawn = picture.getvalue()
        return drawn[drawn.index("<svg") :] + text

    def interpolate(self, t: Tensor | float) -> State:
        """The state at other times within the span, from the solver's dense output.

        Args:
            t: a float, or a tensor of shape () or (M,), between the first and the last time of the solve. Of systems
                with steps of their own also (*batch, M), times for each.

        Returns:
            The pytree of `h0`; with (M, ...) in front of each leaf's shape where `t` has shape (M,).

        Raises:
            BadTime: `t` lies outside the span.
            BadOption: the solve was asked not to keep its dense output, or the solution was pickled.
            GradientUnavailable: the solve has an adjoint, which knows nothing of these times, and gradients are on.
        """
        if self._interpolant is None:
            raise BadOption("this solve kept no dense output; call solve(..., dense=True).")
        return self._interpolant(t if isinstance(t, Tensor) else torch.as_tensor(t, device="cpu"))

    def plot(self, ax: Axes | None = None, **line: Any) -> Axes:
        """Draw the states against time: the dense output as lines where it was kept, else the states at `t`.

        Args:
            ax: where to draw; by default the Axes of a new figure, `ax.figure.savefig(...)` writes it.
            line: for `ax.plot`.

        Returns:
            `ax`. Each component of each tensor of the state is a line with a label of its own.

        Raises:
            ImportError: matplotlib is not installed.
            BadOption: each system of a batch has times of its own.
        """
        from . import plot

        if self.t.ndim > 1:
            raise BadOption(
                "each system has times of its own here: draw them one by one, ax.plot(solution.t[i], solution.h[:, i])."
            )
        if ax is None:
            ax = plot.figure(7, 4).add_subplot()
        t, h = self.t.detach(), self.h
        if self._interpolant not in (None, _left_behind) and len(t) > 1:
            t = torch.linspace(float(t[0]), float(t[-1]), 400, dtype=torch.float64, device="cpu")
            with torch.no_grad():
                h = self.interpolate(t)
        leaves = pytree.tree_leaves(h)
        for i, leaf in enumerate(leaves):
            leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            name = "h" if len(leaves) == 1 else f"h{i}"
            n = leaf[0].numel()
            labels = [name] if n == 1 else [f"{name}[{k}]" for k in range(n)]
            plot.trajectory(ax, t, leaf, labels=labels, **line)
        ax.set_xlabel("t")
        return ax


# Components up to which a notebook shows a picture.
_LINES = 12


def _left_behind(t: Tensor) -> NoReturn:
    raise BadOption(
        "the dense output of this solution was not pickled: it needs the solver and f. Ask for all times in t, or "
        "interpolate before you pickle."
    )


def interpolant(
    record: Any, p: ODEProblem, layout: Layout, event_t: Tensor | None, blind: bool
) -> Callable[[Tensor], Any]:
    """The dense output as a function of time.

    Args:
        record: an engine's, of the solve of `p`.
        event_t: where that ended, if an event ended it.
        blind: the result carries a gradient, and the dense output does not.
    """
    if p.rows is not None or (p.swept is not None and p.batch > 1):
        return _of_systems(record, p, layout, event_t, blind)
    t0 = p.times[0]
    t1 = p.times[-1] if event_t is None else numbers.read(event_t)
    low, high = min(t0, t1), max(t0, t1)

    def interpolate(t: Tensor) -> Any:
        if not t.is_floating_point():
            t = t.to(torch.float64)
        values = numbers.listed(t.detach().to(torch.float64).reshape(-1))
        slack = 1e-12 * max(abs(low), abs(high))
        outside = [x for x in values if not low - slack <= x <= high + slack]
        if outside:
            raise BadTime(f"t={outside[0]:.9g} is outside the span of the solve, [{low:.9g}, {high:.9g}].")
        if blind and torch.is_grad_enabled():
            raise _blind()
        times = t.reshape(-1)
        ys = record.ys[:1].expand(len(values), -1) if record.dense is None else record.dense(times)
        return pytree.tree_map(lambda x: x.reshape(t.shape + x.shape[1:]), layout.unflatten(ys))

    return interpolate


def _blind() -> GradientUnavailable:
    return GradientUnavailable(
        "the dense output of a solve with an adjoint carries no gradient: ask for these times in t, solve with "
        "adjoint=False (and without compile=True), or interpolate under torch.no_grad()."
    )


def _of_systems(
    record: Any, p: ODEProblem, layout: Layout, event_t: Tensor | None, blind: bool
) -> Callable[[Tensor], Any]:
    """As `interpolant`, of systems with times of their own."""
    rows = p.rows or p.swept
    assert rows is not None
    ends = rows.ends if event_t is None else event_t.detach().cpu().double().numpy().reshape(-1)
    low, high = np.fmin(rows.starts, ends)[:, None], np.fmax(rows.starts, ends)[:, None]

    def interpolate(t: Tensor) -> Any:
        if not t.is_floating_point():
            t = t.to(torch.float64)
        each = t.ndim > 1 and tuple(t.shape[:-1]) == rows.shape
        times = t.reshape(-1, t.shape[-1]) if each else t.reshape(-1)
        if not each and t.ndim > 1:
            raise BadTime(f"t has shape {tuple(t.shape)}; it must be (), (M,) or {rows.shape} with the times of each.")
        values = times.detach().cpu().double().numpy()
        values = values if each else np.broadcast_to(values, (len(low), len(values)))
        slack = 1e-12 * np.maximum(np.abs(low), np.abs(high))
        outside = ~((low - slack <= values) & (values <= high + slack))
        if outside.any():
            i, j = (int(x[0]) for x in outside.nonzero())
            raise BadTime(
                f"t={values[i, j]:.9g} is outside the span of {rows.name(i)}, [{low[i, 0]:.9g}, {high[i, 0]:.9g}]."
            )
        if blind and torch.is_grad_enabled():
            raise _blind()
        count = times.shape[-1]
        ys = layout.unflatten(record.ys[:1].expand(count, -1) if record.dense is None else record.dense(times))
        return ys if t.ndim else pytree.tree_map(lambda x: x[0], ys)

    return interpolate
