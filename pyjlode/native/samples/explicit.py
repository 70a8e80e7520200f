"""Explicit Runge-Kutta steps of many systems at once."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...methods.explicit import ExplicitTableau
from ...problem import ODEProblem
from ..explicit import coefficients
from .steps import Errors, Spans, host


class Explicit:
    """Steps of an embedded explicit Runge-Kutta pair.

    Args:
        keep: steps are kept after the next one is made, so each needs stages of its own.
    """

    def __init__(self, p: ODEProblem, *, keep: bool = False, functional: bool = False) -> None:
        tab = p.method.tableau
        assert isinstance(tab, ExplicitTableau)
        self.p, self.tab, self.B = p, tab, p.batch
        self.c = coefficients(tab, p.y0.dtype, p.y0.device)
        assert self.c.P is not None
        self.P, self.order = self.c.P, tab.error_order + 1
        self.s, self.fsal, self.rows = tab.stages, bool(tab.fsal), len(self.c.rows)
        self.C = self.c.C[: self.s + 1]
        self.errors = Errors(p)
        self.functional = functional or p.transformed
        self.buffer = None if keep or self.functional else Buffer(self.rows, p)
        self.k0 = p.y0
        self.asked = p.rows.asked if p.rows else None

    def stages(self, functional: bool) -> Buffer | Listed:
        return Listed(self.B) if functional else self.buffer or Buffer(self.rows, self.p)

    def start(self, k0: Tensor) -> None:
        """The slope at the starts, (n,)."""
        self.k0 = k0

    def attempt(self, spans: Spans, y: Tensor, *, recorded: bool = False) -> tuple[ExplicitStep, np.ndarray]:
        """One step of each system (HNW II.1), and the norms of its error."""
        functional = self.functional or recorded
        f, K, rows, s = self.p.f.shaped, self.stages(functional), self.c.rows, self.s
        t, dt = spans.times(self.C, y, self.asked)
        K.put(0, self.k0, dt)
        for i in range(1, s):
            K.put(i, f(t[i], K.add_to(y, i, rows[i])), dt)
        y1 = K.advance(y, s, rows[s])
        step = ExplicitStep(self, spans, y, y1, K, s, dt, t[s])
        if self.fsal:
            step.finish()
        with torch.no_grad() if functional and not self.p.transformed else contextlib.nullcontext():
            head = K.head(s + self.fsal)
            errors = self.errors.of_step([torch.mv(head, row) for row in self.c.E], y, y1)
        if len(errors) == 1:
            return step, errors[0]
        # DOP853: the fifth-order error damped by the third-order one (HNW II.10).
        fifth, third = errors
        return step, np.where(fifth > 0, fifth * (fifth / np.hypot(fifth, 0.1 * third)), fifth)

    def accept(self, step: ExplicitStep, accepted: np.ndarray | None, mask: Tensor | None, t: Spans, y: Tensor) -> None:
        """Go on from a step that some systems accepted (None: all), at starts `t` and states `y`."""
        k1 = step.slope1().reshape(-1)
        k1 = k1 if self.p.transformed else k1.detach()
        self.k0 = k1 if mask is None else torch.where(mask, k1.view(self.B, -1), self.k0.view(self.B, -1)).view(-1)
        if t.after is not None and accepted is not None and t.after.any():
            (at,), _ = t.times(np.zeros(1), y)
            fresh = self.p.f(at, y).view(self.B, -1)
            jumped = torch.from_numpy(t.after).to(y.device)[:, None]
            self.k0 = torch.where(jumped, fresh, self.k0.view(self.B, -1)).view(-1)

    def again(self, spans: Spans, y: Tensor) -> ExplicitStep:
        """The step under autograd."""
        f, K, rows, s = self.p.f, Listed(self.B), self.c.rows, self.s
        t, dt = spans.times(self.C, y)
        K.put(0, f(t[0], y), dt)
        for i in range(1, s):
            K.put(i, f(t[i], K.add_to(y, i, rows[i])), dt)
        return ExplicitStep(self, spans, y, K.advance(y, s, rows[s]), K, s, dt, t[s])


class ExplicitStep:
    """A step of all systems and its stages; those that only dense output needs are evaluated when asked for."""

    def __init__(
        self, rk: Explicit, spans: Spans, y: Tensor, y1: Tensor, K: Any, done: int, dt: Tensor, t1: Tensor
    ) -> None:
        self.rk, self.spans, self.y, self.y1, self.K, self.done, self.dt, self.t1 = rk, spans, y, y1, K, done, dt, t1
        self.k1: Tensor | None = None

    def finish(self) -> None:
        """Evaluate the slope at the end."""
        if self.done == self.rk.s:
            self.k1 = self.rk.p.f.shaped(self.t1, self.y1)
            self.K.put(self.rk.s, self.k1, self.dt)
            self.done += 1

    def slope1(self) -> Tensor:
        self.finish()
        assert self.k1 is not None
        return self.k1

    def stretch(self) -> np.ndarray:
        """|λ dt| of each system, as `explicit.ExplicitStep.stretch`: (B,)."""
        rk, last = self.rk, self.rk.s - 1
        self.finish()
        rise = self.K.each[rk.s] - self.K.each[last]
        run = self.y1 - self.K.add_to(self.y, last, rk.c.rows[last])
        scale = rk.p.atol + rk.p.rtol * self.y.abs()
        rise, run = ((x.reshape(-1) / scale).view(rk.B, -1).square().sum(1) for x in (rise, run))
        return host(torch.where(run > 0, rise / run, 0.0).sqrt())

    def pieces(self, systems: Tensor) -> Tensor:
        # Of a solve without a graph nothing has one, wherever its dense output is asked for.
        with torch.no_grad() if isinstance(self.K, Buffer) else contextlib.nullcontext():
            self.complete()
        return self.K.of(systems)

    def complete(self) -> None:
        """Evaluate what dense output needs beyond the step's own stages."""
        self.finish()
        rk = self.rk
        if self.done < rk.rows:
            times, _ = self.spans.times(rk.c.C[self.done :], self.y)
            for i, t in enumerate(times, self.done):
                self.K.put(i, rk.p.f.shaped(t, self.K.add_to(self.y, i, rk.c.rows[i])), self.dt)
            self.done = rk.rows


class Buffer:
    """Stage slopes times the steps' lengths in one preallocated (rows, n) buffer."""

    def __init__(self, rows: int, p: ODEProblem) -> None:
        self.all = torch.zeros(rows, p.y0.numel(), dtype=p.y0.dtype, device=p.y0.device)
        self.blocks = self.all.view(rows, p.batch, -1)
        self.each = self.blocks.unbind(0)
        columns = self.all.T
        self.heads = [columns.narrow(1, 0, i) for i in range(rows + 1)]
        self.shape = self.each[0].shape
        # As f returns them, where that is one real tensor.
        self.shaped = self.each if p.f.shape is None else self.all.view(rows, *p.f.shape).unbind(0)
        self.own = self.shaped[0].shape
        self.dt = (*p.rows.shape, *(1,) * (len(self.own) - len(p.rows.shape))) if p.rows and p.f.shape else (p.batch, 1)
        self.viewed = self.dt != (p.batch, 1)

    def put(self, i: int, k: Tensor, dt: Tensor) -> None:
        """Stage i as f returned it."""
        if k.requires_grad:
            k = k.detach()
        if k.shape == self.own:
            torch.mul(k, dt.view(self.dt) if self.viewed else dt, out=self.shaped[i])
        else:
            torch.mul(k.reshape(self.shape), dt, out=self.each[i])

    def head(self, i: int) -> Tensor:
        """Shape (n, i): the first i stages."""
        return self.heads[i]

    def add_to(self, y: Tensor, i: int, row: Tensor) -> Tensor:
        return torch.addmv(y, self.heads[i], row)

    def advance(self, y: Tensor, i: int, row: Tensor) -> Tensor:
        """As `add_to`, for the state at the end: in float32 the increment is summed first, as in `explicit`."""
        return y + torch.mv(self.heads[i], row) if y.dtype == torch.float32 else self.add_to(y, i, row)

    def of(self, systems: Tensor) -> Tensor:
        return self.blocks[:, systems].transpose(0, 1)


class Listed:
    """The same for solves that autograd, or a transform, follows."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.each: list[Tensor] = []

    def put(self, i: int, k: Tensor, dt: Tensor) -> None:
        self.each[i:] = [(k.reshape(self.count, -1) * dt).reshape(-1)]

    def head(self, i: int) -> Tensor:
        return torch.stack(self.each[:i]).T

    def add_to(self, y: Tensor, i: int, row: Tensor) -> Tensor:
        return torch.addmm(y[None], row[None], torch.stack(self.each[:i])).reshape(-1)

    def advance(self, y: Tensor, i: int, row: Tensor) -> Tensor:
        if y.dtype != torch.float32:
            return self.add_to(y, i, row)
        return y + torch.mm(row[None], torch.stack(self.each[:i])).reshape(-1)

    def of(self, systems: Tensor) -> Tensor:
        return torch.stack(self.each, 0).view(len(self.each), self.count, -1)[:, systems].transpose(0, 1)
