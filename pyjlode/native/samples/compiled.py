"""Explicit steps of many systems at once as code that PyTorch's compiler makes: one call for each, and its product.

As `native.compiled`, with a time and a length of step for each system. Where f is captured the times are a part of the
state, since what is captured otherwise has one time for all.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...arguments import system_norms
from ...problem import Field, Layout, ODEProblem
from ...solution import Stats
from .. import compiled
from ..compiled import Function, Program, deliver
from ..interpolation import powers
from ..sensitivity import Sum
from .explicit import Explicit
from .loop import SystemsRecord
from .replay import Backward
from .steps import Spans, host


def prepare(p: ODEProblem, stats: Stats, *, gradient: str | None, dense: bool) -> ODEProblem:
    """As `native.compiled.prepare`.

    Raises:
        NotCompiled: there are no compiled steps for this problem.
        Discovered: f uses tensors that require grad and were not known.
    """
    return compiled.prepare(p, stats, gradient=gradient, dense=dense, of=_of_systems)


def _timed(f: Any, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """f of systems, whose times (B,) are a part of their state."""
    times, h = state
    return torch.zeros_like(times), f(times, h)


def _of_systems(p: ODEProblem) -> tuple[Field, Any, Any]:
    """What is captured, how long its state is, and what makes a program of it; as `native.compiled` has them."""
    assert p.layout is not None
    h0 = p.layout.unflatten(p.y0.detach())
    times = p.y0.new_zeros(p.batch)
    field = Field(p.f.f, source=(functools.partial(_timed, p.f.f), Layout((times, h0))))
    return field, torch.cat([times, p.y0.detach()]), SystemsProgram


class SystemsProgram(Program):
    """The compiled functions of a method for such fields."""

    def __init__(self, p: ODEProblem, trace: Any, *, fused: bool) -> None:
        super().__init__(p, trace, fused=fused)
        self.d, self.norms = p.y0.numel() // p.batch, system_norms(p.layout, p.batch)
        count, value, product = p.batch, self.value, self.product
        self.value = lambda t, y, *lifted: value(t.new_zeros(()), torch.cat([t, y]), *lifted)[count:]
        if not isinstance(product, str):

            def pulled(t: Tensor, y: Tensor, v: Tensor, *lifted: Tensor) -> tuple[Tensor, ...]:
                both = torch.cat([torch.zeros_like(t), v])
                _, bar, *theta = product(t.new_zeros(()), torch.cat([t, y]), both, *lifted)
                return bar[:count], bar[count:], *theta

            self.product = pulled

    def clock(self, clock: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The lengths of the steps, (n,), and the times of the rows of K, (B,) each, of a clock (1 + rows, B)."""
        dt, *times = clock.to(self.dtype).unbind()
        return dt[:, None].expand(-1, self.d).reshape(-1), tuple(times)

    def make_step(self, slopes: bool, ahead: bool = False) -> Function:
        """(clock, y, k0, rtol, atol, *lifted) -> y1, f(t1, y1), verdict and, with `slopes`, K up to row s.

        verdict: (2, B) float64, the errors, and the stretches.
        """
        s = self.s

        def step(clock: Tensor, y: Tensor, k0: Tensor, rtol: Tensor, atol: Tensor, *lifted: Tensor) -> Any:
            dt, K, points = self.stages(clock, y, k0, *lifted)
            y1 = points[s]
            parts = self.errors(dt, K, y, y1, rtol, atol)
            errors = [self.norms(part.reshape(self.batch, -1)) for part in parts]
            stretch = self.stretches(points, K, atol + rtol * y.abs()) * clock[0].abs()
            verdict = torch.stack([self.combined(errors).to(torch.float64), stretch.to(torch.float64)])
            return (y1, K[s], verdict, torch.stack(K)) if slopes else (y1, K[s], verdict)

        return step


class Compiled(Explicit):
    """Compiled steps of an embedded pair; what is not compiled (under autograd) is as there."""

    def __init__(self, p: ODEProblem) -> None:
        super().__init__(p, keep=True)
        self.steps: compiled.Steps = p.compiled
        # Whether outputs may lie within steps.
        self.slopes = self.steps.slopes or p.event_fn is not None or p.moving or len(_times(p)) > 2

    def attempt(self, spans: Spans, y: Tensor, *, recorded: bool = False) -> tuple[Any, np.ndarray]:
        assert not recorded
        steps = self.steps
        clock = clock_of(steps, spans)
        changing = clock, y.detach(), self.k0.detach()
        y1, k1, verdict, *K = steps.run(("step", self.slopes), *changing, more=(steps.rtol, steps.atol))
        steps.count(self.s)
        errors, stretch = host_rows(verdict)
        step = CompiledStep(self, spans, clock, y, y1, k1, stretch, K[0] if K else self.k0.detach()[None])
        if not steps.program.checked:
            self.compare(step)
        return step, errors

    def compare(self, step: CompiledStep) -> None:
        """The first step of a program beside PyTorch's own.

        Raises:
            NotCompiled: they differ.
        """
        right = Explicit(self.p, keep=True)
        right.start(self.k0)
        with torch.no_grad():
            want, _ = right.attempt(step.spans, step.y)
            self.steps.agree(step.y, step.y1, want.y1)


class CompiledStep:
    """A step of all systems, with its slopes K, of which the first row is known at least."""

    def __init__(
        self, rk: Compiled, spans: Spans, clock: Tensor, y: Tensor, y1: Tensor, k1: Tensor, stretch: Any, K: Tensor
    ) -> None:
        self.rk, self.spans, self.clock, self.y, self.y1, self.k1, self.K = rk, spans, clock, y, y1, k1, K
        self.stretched = stretch

    def slope1(self) -> Tensor:
        return self.k1

    def stretch(self) -> np.ndarray:
        return self.stretched

    def pieces(self, systems: Tensor) -> Tensor:
        steps = self.rk.steps
        if len(self.K) < steps.program.rows:
            with torch.no_grad():
                (K,) = steps.run(("slopes", len(self.K)), self.clock, self.y.detach(), self.K)
            steps.count(steps.program.rows - len(self.K))
            self.K = K
        dt = torch.from_numpy(self.spans.dt).to(self.K)[systems]
        return (self.K.view(len(self.K), self.rk.B, -1)[:, systems] * dt[:, None]).transpose(0, 1)


def _times(p: ODEProblem) -> Any:
    assert p.rows is not None
    return p.rows.times[0] if len(p.rows.times) else []


def clock_of(steps: compiled.Steps, spans: Spans) -> Tensor:
    """The lengths of steps, and the times of the rows of K: (1 + rows, B) float64."""
    C = steps.program.C
    clock = np.empty((len(C) + 1, len(spans.dt)))
    clock[0] = spans.dt
    np.multiply.outer(C, spans.dt, out=clock[1:])
    clock[1:] += spans.t0
    if spans.before is not None:
        values: Any = clock[1:].astype(steps.numpy)
        spans.inside(values, C, steps.numpy)
        clock[1:] = values
    on_cpu = torch.from_numpy(clock)
    y0 = steps.p.y0
    return on_cpu if y0.device.type == "cpu" else on_cpu.to(y0.device, non_blocking=True)


def host_rows(x: Tensor) -> np.ndarray:
    """(2, B) float64 on the host."""
    return x.numpy() if x.device.type == "cpu" else host(x)


class CompiledBackward(Backward):
    """The adjoint of a step of all systems in one call: the stages again, and the reverse mode through them."""

    def __init__(self, p: ODEProblem, record: SystemsRecord, maker: Any) -> None:
        super().__init__(p, record, maker)
        assert isinstance(maker, Compiled)
        self.code, self.slopes = maker.steps, maker.slopes
        self.code.check()
        program = self.code.program
        self.sums = Sum(self.code.originals[: program.trained])
        # Where outputs lie within steps one function serves all steps, if that costs no more than a call of f.
        self.always = program.rows if self.slopes and program.rows <= program.s + 1 else 0

    def pull(self, k: int, a: Tensor, g: Tensor) -> Tensor:
        steps, program, live = self.code, self.code.program, self.live(k)
        mask, spans = self.mask(live), self.spans(k)
        y = self.trail.state(k)
        y = y if mask is None else torch.where(mask, y, self.safe_y)
        a, j, i, times = self.ends(k, a, g)
        bar = a if mask is None else torch.where(mask, a, 0.0)
        changing = [clock_of(steps, spans), y.reshape(-1), bar.reshape(-1)]
        rows = program.rows if len(i) else self.always
        index = torch.from_numpy(i).to(a.device)
        if rows:
            K_bar = a.new_zeros(self.B, rows, a.shape[1])
            if len(i):
                of = g[torch.from_numpy(j).to(a.device), index]
                theta = spans.fraction(i, times)
                weights = powers(theta, program.P.shape[1]) @ torch.from_numpy(program.P.T)
                weights = weights * torch.from_numpy(spans.dt[i])[:, None]
                K_bar.index_add_(0, index, weights.to(a)[:, :, None] * of[:, None])
            changing.append(K_bar.transpose(0, 1).reshape(rows, -1))
        y_bar, *theta_bars = steps.run(("pull", False, rows), *changing)
        steps.count(max(program.s, rows))
        self.sums.add(theta_bars)
        y_bar = y_bar.view(self.B, -1)
        if len(i):
            y_bar = y_bar.index_add(0, index, of)
        return y_bar if mask is None else torch.where(mask, y_bar, a)

    def check(self) -> None:
        deliver(self.p, self.code, self.sums, self.params)
