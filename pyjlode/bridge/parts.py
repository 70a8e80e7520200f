"""A field that is split: its parts as fields of their own, each compiled where it can be, and called back where not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NotCompiled
from ..gradients import look
from ..methods import METHODS, Method
from ..parameters import by_tensor
from ..problem import ODEProblem, like
from ..solution import Stats
from .calls import Calls
from .function import JuliaFunction
from .rhs import RHS, Callbacks


class Parts(Callbacks):
    """The parts of a problem's field, of which the first is solved implicitly.

    Args:
        gradient: whether a gradient will be asked for: the sum of those of the parts.
        field_of: makes the field of a part, given its problem.
        stats: will say that f is compiled where both parts are.

    Raises:
        NotCompiled: `compile=True`, and a part cannot be.
    """

    parts: list[Callbacks] = []  # noqa: RUF012

    def __init__(
        self, calls: Calls, p: ODEProblem, gradient: bool, field_of: Callable[[ODEProblem], Callbacks], stats: Stats
    ) -> None:
        super().__init__(calls, p)
        self.parts = [_made(q, field_of, stats) for q in _problems(p, gradient)]
        modes = [x.program.mode for x in self.parts if not isinstance(x, RHS)]  # type: ignore[attr-defined]
        stats.compiled = modes[0] if len(modes) == 2 else ""
        stiff, other = (x.field for x in self.parts)
        self.field = calls.parts(stiff, other, self.pointers.get("event", 0))
        self.functions |= {f"{name} {i}": f for i, x in enumerate(self.parts) for name, f in x.functions.items()}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        with super().listening(), self.parts[0].listening(), self.parts[1].listening():
            yield

    def raise_error(self) -> None:
        super().raise_error()
        for part in self.parts:
            part.raise_error()

    def look_back(self, times: Sequence[float], states: Tensor) -> None:
        for part in self.parts:
            part.look_back(times, states)

    def refill(self) -> None:
        for part in self.parts:
            part.refill()

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def parameter_gradients(self, theta: Tensor) -> list[Tensor | None]:
        """Of those of both parts, one after the other."""
        of_parts = theta.split([part.size for part in self.parts])
        grads = [g for part, of_part in zip(self.parts, of_parts) for g in part.parameter_gradients(of_part)]
        return by_tensor(self.p.params * 2, grads, self.p.params)


def _problems(p: ODEProblem, gradient: bool) -> Iterator[ODEProblem]:
    """Those of the parts, each with what that part alone depends on."""
    assert p.split is not None
    for f, method in zip(p.split, (p.method, METHODS["dopri5"])):  # the other part is asked for nothing but its values
        q: ODEProblem = like(
            p, f=f, method=method, event_fn=None, jac=None, f0=None, split=None, adjoint=None, repeats=None
        )
        if gradient:
            q.reached = frozenset(look(q, p.time(p.times[0]), p.y0)[1])
        yield q


def _made(p: ODEProblem, field_of: Callable[[ODEProblem], Callbacks], stats: Stats) -> Callbacks:
    """The field of a part. How often that is called is not told: one that counts its calls is called back."""
    part = field_of(p)
    if isinstance(part, RHS):
        return part
    program, source = p.f.program
    if not (source.counters or program.trace.adds):
        return part
    why = "a part of the Split counts its calls"
    if p.compile:
        raise NotCompiled(why)
    part = field_of(replace(p, compile=False))
    stats.not_compiled = why
    return part


def cannot_split(p: ODEProblem) -> str | None:
    """Why Julia does not solve the parts of `p` in two ways; None if it does."""
    assert p.split is not None
    if any(isinstance(x.f, JuliaFunction) for x in p.split):
        return "a part of the Split is a julia_function, which is not solved apart there"
    if p.batch > 1 or p.options.batch_dims:
        return "the parts of a Split are not solved apart for a batch of systems there"
    if p.y0.dtype != torch.float64:
        return f"the parts of a Split are solved apart in float64 there, and the state is of {p.y0.dtype}"
    if p.y0.device.type != "cpu":
        return f"the parts of a Split are not solved apart on {p.y0.device} there"
    return None


def for_parts(method: Method) -> Method:
    """The method as it solves parts: estimates are not damped (see `methods/table.py`), and the factors are those of
    the step's length. OrdinaryDiffEqNonlinearSolve 2.0 takes the first iterate for the solution where an iteration
    before converged at once, as it does where f is linear; with the factors of another length it is far from that.
    """
    name, _, _ = (method.julia or "").partition("(")
    newton = "OrdinaryDiffEqSDIRK.NLNewton(new_W_dt_cutoff=0//1)"
    return replace(method, julia=f"{name}(smooth_est=false, nlsolve={newton})")
