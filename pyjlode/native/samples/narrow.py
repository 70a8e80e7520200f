"""Fewer systems: those that have come to their end leave the batch that f is called with.

That is right only where f knows its systems by nothing but their times and states. An f that holds a tensor with a part
for each fails with fewer, or gives them other slopes: then nobody leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...parameters import Held
from ...problem import Field, ODEProblem, Rows, flat_field, like
from .explicit import Explicit, ExplicitStep
from .field import _at, _mapped, narrowed
from .steps import Spans

# Products of numbers in a call of f from which on rows that are in vain cost more than leaving them out.
_WORTH = 1_000_000


class Narrow:
    """Steps of some systems of a batch, as steps of all.

    Args:
        p: of all. systems: the numbers of those that are under way. k0: the slopes of all at the starts, (n,).
    """

    def __init__(self, p: ODEProblem, f: Callable[[Tensor, Any], Any], systems: np.ndarray, k0: Tensor) -> None:
        assert p.layout is not None
        assert p.rows is not None
        self.p, self.B, self.systems, count = p, p.batch, systems, len(systems)
        self.index = torch.from_numpy(systems).to(p.y0.device)
        self.place = np.zeros(self.B, dtype=np.int64)  # where a system stands among those
        self.place[systems] = np.arange(count)
        layout = narrowed(p.layout, count)
        asked = p.rows.asked and (count, *p.rows.asked[1:])
        some: Field = flat_field(_of(f, count), layout, False)
        some.watched, some.differentiates, some.source = p.f.watched, p.f.differentiates, None
        tolerances = {"rtol": p.rtol, "atol": p.atol}
        of_some = {name: self.part(x) if isinstance(x, Tensor) else x for name, x in tolerances.items()}
        rows = Rows((count,), p.rows.times[systems], p.rows.own, asked)
        self.some = like(p, f=some, y0=self.part(p.y0), f0=None, layout=layout, batch=count, rows=rows, **of_some)
        self.maker = Explicit(self.some)
        self.P, self.order, self.errors = self.maker.P, self.maker.order, self.maker.errors
        self.maker.start(self.part(k0))

    @property
    def k0(self) -> Tensor:
        """The slopes of all, anything for those that rest."""
        whole = self.p.y0.new_zeros(self.B, self.p.y0.numel() // self.B)
        return whole.index_copy(0, self.index, self.maker.k0.view(len(self.systems), -1)).view(-1)

    def part(self, x: Tensor) -> Tensor:
        """(n,) of all -> of some."""
        x = x.detach()
        return x if x.ndim == 0 else x.view(self.B, -1)[self.index].view(-1)

    def spans(self, spans: Spans) -> Spans:
        after, before = (None if x is None else x[self.systems] for x in (spans.after, spans.before))
        return Spans(spans.t0[self.systems], spans.dt[self.systems], after, before)

    def agrees(self, t: np.ndarray, y: Tensor, k0: Tensor) -> bool:
        """Whether f gives some of them the slopes that it gives them beside the rest, at times (B,)."""
        try:
            k = self.some.f(self.some.moments(t[self.systems]), self.part(y))
        except Exception:
            return False
        want = self.part(k0)
        near = torch.finfo(k.dtype).eps ** 0.5 * want.abs().amax()
        return bool(((k - want).abs() <= near).all())

    def attempt(self, spans: Spans, y: Tensor, *, recorded: bool = False) -> tuple[Part, np.ndarray]:
        before = self.some.f.nfe
        try:
            step, err = self.maker.attempt(self.spans(spans), self.part(y))
        finally:
            self.p.f.nfe += self.some.f.nfe - before
        errors = np.zeros(self.B)
        errors[self.systems] = err
        return Part(self, step, spans, y), errors

    def accept(self, step: Part, accepted: np.ndarray, mask: Tensor | None, t: Spans, y: Tensor) -> None:
        before = self.some.f.nfe
        here = accepted[self.systems]
        of_some = None if here.all() else torch.from_numpy(here).to(y.device)[:, None]
        self.maker.accept(step.step, here, of_some, self.spans(t), self.part(y))
        self.p.f.nfe += self.some.f.nfe - before


class Part:
    """A step of some systems as one of all, in which the others rest."""

    def __init__(self, of: Narrow, step: ExplicitStep, spans: Spans, y: Tensor) -> None:
        self.of, self.step, self.spans, self.y = of, step, spans, y
        self.y1 = y.view(of.B, -1).index_copy(0, of.index, step.y1.view(len(of.systems), -1)).view(-1)

    def stretch(self) -> np.ndarray:
        found = np.zeros(self.of.B)
        found[self.of.systems] = self.step.stretch()
        return found

    def pieces(self, systems: Tensor) -> Tensor:
        field = self.of.some.f
        before = field.nfe
        found = self.step.pieces(torch.from_numpy(self.of.place).to(systems.device)[systems])
        self.of.p.f.nfe += field.nfe - before
        return found


def _of(f: Callable[[Tensor, Any], Any], count: int) -> Callable[[Tensor, Any], Any]:
    """f, as `field.shaped` made it, for so many systems."""
    assert isinstance(f, functools.partial)
    own, batch = f.args
    return functools.partial(f.func, own, (count, *batch[1:]))


def worth(p: ODEProblem) -> bool:
    """Whether it may be worth it that systems leave the batch, for what is known without a look at f."""
    if p.rows is None or len(p.rows.shape) != 1 or p.transformed or not isinstance(p.f.f, functools.partial):
        return False
    if p.f.f.func not in (_at, _mapped) or p.method.kind != "adaptive":
        return False
    weights = sum(x.numel() for x in Held(p.f.f).wanted) or sum(b.tensor.numel() for b in Held(p.f.f).bindings)
    return p.batch * max(weights, p.y0.numel() // p.batch) >= _WORTH
