"""Rosenbrock steps of many systems at once: a Jacobian and a factorisation for each (HW IV.7)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import numbers
from ...derivatives import REFUSALS, pulled
from ...methods.stiff import RosenbrockTableau
from ...notices import warn_once
from ...problem import ODEProblem
from ...solution import Stats
from ..linear import Linear
from .steps import Errors, Spans, host


class SystemsLinear(Linear):
    """Jacobians of systems at times of their own."""

    units: Tensor | None = None

    def tangents(self, y: Tensor) -> Tensor:
        if self.units is None:
            self.units = super().tangents(y)
        return self.units

    def in_time(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Any]:
        eps, at = torch.finfo(y.dtype).eps, t.detach()
        step = torch.clamp_min(64 * eps * at.abs(), eps ** (1 / 3) * self.reach)
        first, last = at - step, at + step
        gap = (last - first)[:, None].expand(self.B, self.d).reshape(-1)
        return self.p.f(first, y), self.p.f(last, y), gap

    def columns(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f (n,), df/dy (B, d, d) and df/dt (B, d), with a graph where autograd records."""
        if torch.is_inference_mode_enabled():  # where nothing has a graph
            with torch.inference_mode(False):
                return self.columns(t.clone(), y.clone())
        recorded = torch.is_grad_enabled() and not y.is_inference()
        self.stats.njac += 1
        try:
            return self._by_reverse(t, y, recorded)
        except REFUSALS as refusal:
            reason = str(refusal).split("\n")[0][:120]
        k = self.p.f(t, y)
        with torch.no_grad():
            blocks = self.difference_columns(t, y.detach())
            if numbers.anywhere(blocks):
                warn_once(
                    "finite differences",
                    f"autograd cannot differentiate f ({reason}); its Jacobian is taken by finite differences. Write f "
                    "in PyTorch's operations on its arguments, without .detach() and .item(). (This warning is shown "
                    "once.)",
                )
            return k, blocks, self.time_difference(t, y.detach()).view(self.B, self.d)

    def _by_reverse(self, t: Tensor, y: Tensor, recorded: bool) -> tuple[Tensor, Tensor, Tensor]:
        # As `Linear.reverse_columns`: `torch.func` does not walk through the graph behind y.
        if self.p.transformed or self.compiled or (recorded and not y.is_leaf):
            made: Any = torch.func.vjp(self.p.f, t, y)
            k, pull = made
            by_t, by_y = pulled(pull, self.tangents(y))
        else:
            k, at, point = self.graphed(t, y, recorded)
            if self.compiled:
                return self._by_reverse(t, y, recorded)
            rows, times = self.all_rows(k, [point, at], recorded)
            if rows is None:
                raise RuntimeError("no graph leads from its result to the state")
            by_y, by_t = rows, k.new_zeros(self.d, self.B) if times is None else times
        slope = by_t.reshape(self.d, self.B).T
        if not recorded and not self.p.transformed:
            k = k.detach()
            slope = self.seen(t, y, slope.reshape(-1)).view(self.B, self.d)
        return k, by_y.reshape(self.d, self.B, self.d).transpose(0, 1), slope


class Weights:
    """A tableau as the weights of sums over a state, dt² df/dt and the stages before.

    Attributes:
        stages: (2, 2 + i) of stage i: of the state that f is called with, and of what f is added to. ends: (2, s), of
            the stages alone: of what the end is more than the start, and of the error.
        P: (s, q) float64, dense output.
    """

    def __init__(self, tab: RosenbrockTableau, dtype: torch.dtype, device: torch.device) -> None:
        def tensor(*rows: Any) -> Tensor:
            return torch.tensor(np.array(rows), dtype=dtype, device=device)

        self.stages = [tensor([1, 0, *tab.A[i, :i]], [0, tab.gammas[i], *tab.C[i, :i]]) for i in range(tab.stages)]
        self.ends = tensor(tab.m, tab.E)
        self.P = torch.tensor(tab.P, dtype=torch.float64, device=device)


_weights = numbers.kept(maxsize=16)(Weights)


class Rosenbrock:
    """Steps of a Rosenbrock method."""

    def __init__(self, p: ODEProblem, stats: Stats) -> None:
        tab = p.method.tableau
        assert isinstance(tab, RosenbrockTableau)
        self.p, self.tab, self.B = p, tab, p.batch
        self.d = p.y0.numel() // p.batch
        self.weights = _weights(tab, p.y0.dtype, p.y0.device)
        self.unit = torch.eye(self.d, dtype=p.y0.dtype, device=p.y0.device) / tab.gamma
        self.P, self.order = self.weights.P, tab.error_order + 1
        self.alpha = np.asarray(tab.alpha)
        self.linear = SystemsLinear(p, stats)
        self.stats = stats
        self.errors = Errors(p)
        self.f0: Tensor | None = None  # at the starts of the next steps, where it is known
        self.at: tuple[Tensor, Tensor, Tensor] | None = None  # f, df/dy and df/dt there

    def start(self, k0: Tensor) -> None:
        """The slope at the starts, (n,), is found again with the Jacobian."""

    def moving(self, spans: Spans) -> Spans:
        """The same with a length for systems that rest, which is next to nothing."""
        still = spans.dt == 0
        if not still.any():
            return spans
        least = np.abs(spans.dt[~still]).min(initial=math.inf)
        small = 1e-6 * (least if math.isfinite(least) else 1.0) * self.p.direction
        reach = spans.reach
        if reach is not None:
            reach = torch.where(torch.from_numpy(still).to(reach.device), small, reach)
        return spans._replace(dt=np.where(still, small, spans.dt), reach=reach)

    def attempt(self, spans: Spans, y: Tensor, *, recorded: bool = False) -> tuple[RosenbrockStep, np.ndarray]:
        """One step of each system, and the norms of its error."""
        moving = self.moving(spans)
        t, dt = moving.times(self.alpha, y)
        if self.at is None:
            self.linear.reach = float(np.abs(moving.dt).min())
            self.at = self.linear.columns(t[0], y)
        step, error, singular = self.step(moving, t, dt, y, self.at, spans.dt == 0)
        (err,) = self.errors.of_step([error], y, step.y1)
        return step, np.where(singular, math.inf, err)

    def step(
        self, spans: Spans, t: tuple[Tensor, ...], dt: Tensor, y: Tensor, at: Any, still: np.ndarray
    ) -> tuple[RosenbrockStep, Tensor, np.ndarray]:
        """A step, the estimate of its error, (n,), and where its matrix is singular."""
        # A stage times dt is (I / gamma - dt J) u = dt f(Y) + C U + gamma_i dt² df/dt: so Y, and what dt f is added to,
        # are two sums over y, dt² df/dt and the stages before.
        B, d = self.B, self.d
        k, J, rate = at
        if still.any():
            rests = torch.from_numpy(still).to(y.device)
            J, rate = torch.where(rests[:, None, None], 0.0, J), torch.where(rests[:, None], 0.0, rate)
        solve = Blocks(torch.addcmul(self.unit, dt[:, :, None], J, value=-1), self.p.transformed)
        self.stats.nlu += 1
        known = [y, (rate * dt * dt).reshape(-1)]
        for i, weights in enumerate(self.weights.stages):
            Y, rest = torch.mm(weights, torch.stack(known)).unbind()
            if i:
                k = self.p.f.shaped(t[i], Y)
            known.append(solve(torch.addcmul(rest.view(B, d), k.reshape(B, d), dt)).reshape(-1))
        U = torch.stack(known[2:])
        increment, error = torch.mm(self.weights.ends, U).unbind()
        return RosenbrockStep(spans, y, y + increment, U, B), error, solve.singular()

    def accept(self, step: Any, accepted: np.ndarray | None, mask: Tensor | None, t: Spans, y: Tensor) -> None:
        """Go on from a step: f and its derivatives are asked for anew."""
        self.at = None
        if t.after is not None and t.after.any():
            (at,), _ = t.times(np.zeros(1), y)
            self.at = self.linear.columns(at, y)

    def again(self, spans: Spans, y: Tensor) -> RosenbrockStep:
        """The step under autograd."""
        moving = self.moving(spans)
        t, dt = moving.times(self.alpha, y)
        return self.step(moving, t, dt, y, self.linear.columns(t[0], y), spans.dt == 0)[0]


class RosenbrockStep:
    """A step and its stages U, (s, n)."""

    def __init__(self, spans: Spans, y: Tensor, y1: Tensor, U: Tensor, count: int) -> None:
        self.spans, self.y, self.y1, self.U, self.count = spans, y, y1, U, count

    def pieces(self, systems: Tensor) -> Tensor:
        return self.U.view(len(self.U), self.count, -1)[:, systems].transpose(0, 1)


class Blocks:
    """Linear systems with a block for each, (B, d, d). Under a transform by their inverses, as in `linear`."""

    def __init__(self, W: Tensor, transformed: bool) -> None:
        self.inverse: Tensor | None = None
        if transformed:
            self.inverse, info = torch.linalg.inv_ex(W)
        else:
            self.lu, self.pivots, info = torch.linalg.lu_factor_ex(W)
        self.info, self.dtype = info, W.dtype

    def __call__(self, rhs: Tensor) -> Tensor:
        """(B, d) -> (B, d)."""
        column = rhs[:, :, None]
        if self.inverse is not None:
            return torch.bmm(self.inverse, column)[:, :, 0]
        return torch.linalg.lu_solve(self.lu, self.pivots, column)[:, :, 0]

    def singular(self) -> np.ndarray:
        """(B,)"""
        return host(self.info.to(self.dtype)) != 0
