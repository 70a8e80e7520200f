"""Explicit Runge-Kutta steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..problem import ODEProblem
from . import interpolation
from .step import Interval, fraction, numpy_dtype, scaled, stage_times
from .tableaus import ExplicitTableau


class Buffered:
    """Stage derivatives of a step in one preallocated (rows, n) buffer: a stage sum is one matrix-vector product.

    For solves that autograd does not record.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self.K = torch.empty(rows, like.numel(), dtype=like.dtype, device=like.device)
        self.rows = self.K.unbind(0)
        self.heads = [self.K[:i].T for i in range(rows + 1)]

    def put(self, i: int, k: Tensor) -> None:
        self.rows[i].copy_(k)

    def get(self, i: int) -> Tensor:
        return self.rows[i]

    def head(self, i: int) -> Tensor:
        """Shape (n, i): the first i stages."""
        return self.heads[i]


class Recorded:
    """The same for solves that autograd records: the stages stay the tensors that f returned."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def put(self, i: int, k: Tensor) -> None:
        self.rows[i:] = [k]

    def get(self, i: int) -> Tensor:
        return self.rows[i]

    def head(self, i: int) -> Tensor:
        return torch.stack(self.rows[:i], 1)


class ExplicitRK:
    """Makes the steps of one explicit Runge-Kutta method for one problem.

    Args:
        recorded: autograd follows the solve.
        keep: steps are kept after the next one is made (dense output), so each needs stages of its own.
        tableau: the method, where it is not that of the problem.
    """

    def __init__(
        self, p: ODEProblem, *, recorded: bool = False, keep: bool = False, tableau: ExplicitTableau | None = None
    ) -> None:
        tab = tableau or p.method.tableau
        assert isinstance(tab, ExplicitTableau)
        self.p, self.tab, self.recorded, self.keep = p, tab, recorded, keep
        self.s = tab.stages
        self.rows = self.s + 1 + len(tab.C_extra)
        # All numbers that a step multiplies by dt, in one vector: one product and one split a step.
        error = [] if tab.E is None else [row if tab.fsal else row[: self.s] for row in tab.E]
        vectors = [*(tab.A[i, :i] for i in range(1, self.s)), tab.B, *error]
        self.sizes = [len(v) for v in vectors]
        self.packed = np.concatenate(vectors).astype(numpy_dtype(p.y0))
        self.C = np.append(tab.C, 1.0) if tab.fsal else tab.C
        self.buffer = None if recorded or keep else Buffered(self.rows, p.y0)

    def stages(self) -> Buffered | Recorded:
        if self.recorded:
            return Recorded()
        return self.buffer or Buffered(self.rows, self.p.y0)

    def step(self, interval: Interval, y: Tensor, k0: Tensor | None) -> ExplicitStep:
        """Take one step (Hairer, Nørsett & Wanner II.1): shapes (n,).

        Args:
            k0: f at the start of the step, where it is known.
        """
        f, K = self.p.f, self.stages()
        w = scaled(self.packed, interval.dt, y).split(self.sizes)
        t = stage_times(interval, self.C, y)
        K.put(0, f(t[0], y) if k0 is None else k0)
        for i in range(1, self.s):
            K.put(i, f(t[i], torch.addmv(y, K.head(i), w[i - 1])))
        y1 = torch.addmv(y, K.head(self.s), w[self.s - 1])
        if self.tab.fsal:
            K.put(self.s, f(t[self.s], y1))
        return ExplicitStep(self, interval, y, y1, K, w[self.s :])


class ExplicitStep:
    """A step and its stages; the end's slope and the extra stages of dense output are evaluated when asked for."""

    __slots__ = ("E", "K", "done", "interval", "rk", "y", "y1")

    def __init__(
        self, rk: ExplicitRK, interval: Interval, y: Tensor, y1: Tensor, K: Any, E: tuple[Tensor, ...]
    ) -> None:
        self.rk, self.interval, self.y, self.y1, self.K, self.E = rk, interval, y, y1, K, E
        self.done = rk.s + rk.tab.fsal  # rows of K that are filled

    @property
    def f0(self) -> Tensor:
        return self.K.get(0)

    @property
    def f1(self) -> Tensor:
        """f at the end of the step, shape (n,)."""
        if self.done == self.rk.s:
            (t1,) = stage_times(self.interval, _ONE, self.y)
            self.K.put(self.rk.s, self.rk.p.f(t1, self.y1))
            self.done += 1
        return self.K.get(self.rk.s)

    def error(self, rtol: float | Tensor, atol: float | Tensor, abs_y: Tensor, abs_y1: Tensor) -> float:
        """Norm of the local error over the tolerance; the step is good if it is at most 1."""
        K, norm = self.K.head(self.rk.s + self.rk.tab.fsal), self.rk.p.norm
        scale = torch.maximum(abs_y, abs_y1).mul_(rtol).add_(atol)
        errors = [norm(torch.mv(K, row).div_(scale)) for row in self.E]
        if len(errors) == 1:
            return errors[0]
        # DOP853: the fifth-order error damped by the third-order one (Hairer, Nørsett & Wanner II.10).
        fifth, third = errors
        return fifth * fifth / math.sqrt(fifth * fifth + 0.01 * third * third) if fifth else fifth

    def complete(self) -> None:
        """Evaluate what dense output needs beyond the step's own stages."""
        tab = self.rk.tab
        _ = self.f1
        if self.done < self.rk.rows:
            times = stage_times(self.interval, tab.C_extra, self.y)
            for j, t in enumerate(times):
                i = self.rk.s + 1 + j
                w = scaled(tab.A_extra[j, :i].astype(numpy_dtype(self.y)), self.interval.dt, self.y)
                self.K.put(i, self.rk.p.f(t, torch.addmv(self.y, self.K.head(i), w)))
            self.done = self.rk.rows

    def weights(self, times: list[float] | Tensor) -> Tensor:
        """(M, rows): y(times) = y + weights @ K."""
        P = torch.from_numpy(self.rk.tab.P)
        theta = fraction(self.interval, times)
        return (interpolation.powers(theta, P.shape[1]) @ P.T.to(theta) * self.interval.dt).to(self.y)

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        if self.rk.tab.P is None:
            theta = fraction(self.interval, times)
            return interpolation.hermite(theta, self.interval.dt, self.y, self.y1, self.f0, self.f1)
        self.complete()
        return torch.addmm(self.y, self.weights(times), self.K.head(self.rk.rows).T)


_ONE = np.ones(1)
