"""The steps of independent systems taken again: under autograd, forward, or one by one backward.

The k-th accepted steps of all systems are taken together, so that nothing is taken again that was rejected. A system
without a k-th step rests at its start, where f is finite; no gradient passes through that.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import numbers
from ...derivatives import grad
from ...gradients import Gradients, other_function
from ...numbers import on_host
from ...parameters import graph_mark
from ...problem import ODEProblem
from ..sensitivity import Sum
from .dense import Dense
from .loop import AT_START, LAST, STOP, SystemsRecord, safe_start
from .steps import Maker, Spans, between, polynomial
from .tape import Tape


class Replay:
    """Takes the steps of a record again."""

    def __init__(self, p: ODEProblem, record: SystemsRecord, maker: Maker) -> None:
        assert p.rows is not None
        self.p, self.record, self.maker, self.rows = p, record, maker, p.rows
        self.B, self.trail = p.batch, record.trail
        self.d = p.y0.numel() // p.batch
        self.safe_t, self.safe_y = safe_start(p, record.failed, record.trail)
        self.safe_y = numbers.constant(self.safe_y)
        made = record.made.reshape(-1)
        self.order = np.argsort(made, kind="stable")  # outputs by the steps that they lie in
        self.bounds = np.searchsorted(made[self.order], np.arange(len(self.trail) + 1))
        # Whether the start of each system's k-th step moves with its t[0]: until a step ends at a stop.
        stopped = np.cumsum(self.trail.kind == STOP, axis=0) > 0
        self.moves = np.concatenate([np.ones((1, self.B), dtype=bool), ~stopped])

    def live(self, k: int) -> np.ndarray:
        return k < self.trail.count

    def spans(self, k: int) -> Spans:
        trail, live = self.trail, self.live(k)
        after = None if trail.after is None else trail.after[k] & live
        before = None if trail.before is None else trail.before[k] & live
        return Spans(np.where(live, trail.t0[k], self.safe_t), np.where(live, trail.dt[k], 0.0), after, before)

    def outputs(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The outputs (j, i) that lie in the k-th steps, and which of them are states at their ends."""
        here = self.order[self.bounds[k] : self.bounds[k + 1]]
        j, i = here // self.B, here % self.B
        return j, i, self.record.node[j, i]

    def mask(self, live: np.ndarray) -> Tensor | None:
        return None if live.all() else torch.from_numpy(live).to(self.p.y0.device)[:, None]

    def times(self, j: np.ndarray, i: np.ndarray) -> Tensor:
        return torch.from_numpy(self.rows.times[i, j])


# ----------------------------------------------------------------------------------------------------------------------
# forward: the solve as autograd, or a transform, sees it
# ----------------------------------------------------------------------------------------------------------------------


def forward(p: ODEProblem, record: SystemsRecord, maker: Maker, *, dense: bool) -> SystemsRecord:
    """Take the steps again from the start, recorded; of the record the outputs, events and dense output change."""
    r = Replay(p, record, maker)
    with contextlib.nullcontext() if p.transformed else torch.enable_grad():
        return _forward(r, dense)


def _forward(r: Replay, dense: bool) -> SystemsRecord:
    p, record, maker, trail, B = r.p, r.record, r.maker, r.trail, r.B
    y = p.y0.view(B, -1)
    tracked = p.moving
    last = at = p.t.new_zeros(())
    if tracked:
        t = p.t.to(torch.float64)
        t = t.reshape(-1, t.shape[-1]) if r.rows.own else t.expand(B, -1)
        at, last = t[:, 0], t.gather(1, _ends(r.rows, t))[:, 0]
    keeper = Dense(p, maker) if dense else None
    blocks: list[Tensor] = []
    places: list[np.ndarray] = []
    T = r.rows.times.shape[1]
    met: Any = None
    for k in range(len(trail)):
        live = r.live(k)
        mask, spans = r.mask(live), r.spans(k)
        if tracked:
            rest, reach = torch.from_numpy(r.safe_t).to(at), _reach(r, k, at, last)
            spans = spans._replace(at=torch.where(_host(live, at), at, rest), reach=reach)
        start = y if mask is None else torch.where(mask, y, r.safe_y)
        step = maker.again(spans, start.reshape(-1))
        if keeper is not None:
            keeper.add(step, live)
        if record.met is None:
            j, i, node = r.outputs(k)
            if node.any():
                index = torch.from_numpy(i[node]).to(y.device)
                blocks.append(step.y1.view(B, -1)[index])
                places.append(j[node] * B + i[node])
            if not node.all():
                inside = ~node
                times = _times(r, j[inside], i[inside], tracked)
                blocks.append(between(maker, step, i[inside], times))
                places.append(j[inside] * B + i[inside])
        elif (here := record.met.found & (trail.count == k + 1)).any():
            everyone = torch.arange(B, device=y.device)
            chosen = torch.from_numpy(here).to(y.device)
            parts = step.pieces(everyone)
            t0, dt = (torch.from_numpy(x) for x in (spans.t0, spans.dt))
            if spans.at is not None and spans.reach is not None:
                t0, dt = spans.at, spans.reach
            of_rows = chosen[:, None], chosen[:, None, None], _host(here, t0), _host(here, dt)
            new_met = start, parts, t0, dt
            met = new_met if met is None else tuple(map(torch.where, of_rows, new_met, met))
        y = step.y1.view(B, -1) if mask is None else torch.where(mask, step.y1.view(B, -1), y)
        if tracked:
            at = torch.where(_host(live, at), at + reach, at)
    new = replace(record)
    if keeper is not None:
        keeper.close(trail, record.failed)
        new.dense = keeper
    if record.met is not None:
        found = record.met.found

        def at_events(times: Tensor) -> Tensor:
            """(B,) times near the events, with their graph -> (B, d)."""
            if met is None:
                return p.y0.view(B, -1)
            met_y, met_pieces, met_t0, met_dt = met
            which = _host(found, met_t0)
            theta = torch.where(which, (times.to(met_t0.device) - met_t0) / torch.where(which, met_dt, 1.0), 0.0)
            states = polynomial(maker.P, met_y, met_pieces, theta)
            return torch.where(which.to(states.device)[:, None], states, p.y0.view(B, -1))

        new.at_events = at_events
        there = at_events(torch.from_numpy(np.where(found, record.met.times, r.rows.starts)))
        there = torch.where(torch.from_numpy(found).to(y.device)[:, None], there, math.nan)
        new.ys = torch.stack([p.y0, there.reshape(-1)])
        return new
    made = record.made
    j, i = np.nonzero(made == AT_START)
    blocks.append(p.y0.view(B, -1)[torch.from_numpy(i).to(y.device)])
    places.append(j * B + i)
    j, i = np.nonzero(made < AT_START)
    blocks.append(p.y0.detach().new_full((len(i), r.d), math.nan))
    places.append(j * B + i)
    back = torch.from_numpy(np.argsort(np.concatenate(places))).to(y.device)
    new.ys = torch.cat(blocks)[back].view(T, -1)
    return new


def _host(which: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(which).to(like.device)


def _ends(rows: Any, t: Tensor) -> Tensor:
    """Where the last time of each row first stands: (B, 1)."""
    return torch.from_numpy((rows.times == rows.times[:, -1:]).argmax(1)[:, None]).to(t.device)


def _reach(r: Replay, k: int, at: Tensor, last: Tensor) -> Tensor:
    """The lengths of the k-th steps as functions of the user's times, as `step.length`: (B,)."""
    kind, live = r.trail.kind[k], r.live(k)
    size = torch.from_numpy(np.where(live, r.trail.dt[k], 0.0)).to(at)
    shift = numbers.constant(at) - at
    size = torch.where(_host(live & (kind == STOP), at), size + shift, size)
    return torch.where(_host(live & (kind == LAST), at), last - at, size)


def _times(r: Replay, j: np.ndarray, i: np.ndarray, tracked: bool) -> Tensor:
    if not tracked:
        return r.times(j, i)
    t = r.p.t.reshape(-1, r.p.t.shape[-1])
    row = i if r.rows.own else np.zeros_like(i)
    return t[torch.from_numpy(row).to(t.device), torch.from_numpy(j).to(t.device)]


# ----------------------------------------------------------------------------------------------------------------------
# discrete: the exact gradient of the numbers that came out
# ----------------------------------------------------------------------------------------------------------------------


def discrete(p: ODEProblem, record: SystemsRecord, g: Tensor, maker: Maker, *, again: bool) -> Gradients:
    """Pull the cotangents back through each step, last one first: through its graph, where that was kept, else it is
    taken again, which needs the memory of one state a step.

    Args:
        g: (T, n), or (2, n) with events. again: this record will be used once more.
    """
    if p.compiled is not None and not p.t.requires_grad:
        from .compiled import CompiledBackward  # loads PyTorch's compiler

        return CompiledBackward(p, record, maker).run(g)
    if record.tape is None:
        return Backward(p, record, maker).run(g)
    grads = _through(p, record, record.tape, g.view(len(g), p.batch, -1), maker, again)
    # What a step makes of its cotangent has no part in what does not count in it, but for infinite derivatives there.
    if bool(torch.isfinite(torch.stack([x.sum() for x in (grads.y0, *grads.params) if x is not None])).all()):
        return grads
    return Backward(p, record, maker).run(g)


def _through(p: ODEProblem, record: SystemsRecord, tape: Tape, g: Tensor, make: Maker, again: bool) -> Gradients:
    params, a = Sum(p.params), torch.zeros_like(g[0])
    if record.late is not None:
        trail, made = record.late
        later = Backward(p, replace(record, trail=trail, made=made), make)
        a, params = later.steps(a, g), later.params
    a = tape.pull(a, g, params, again)
    j, i = np.nonzero(record.made == AT_START)
    index = torch.from_numpy(i).to(a.device)
    a = a.index_add(0, index, g[torch.from_numpy(j).to(a.device), index])
    return Gradients(a.reshape(-1), None, params.total)


class Backward(Replay):
    def __init__(self, p: ODEProblem, record: SystemsRecord, maker: Maker) -> None:
        super().__init__(p, record, maker)
        self.params = Sum(p.params)
        self.want_t = p.t.requires_grad
        self.first, self.last = np.zeros(self.B), np.zeros(self.B)  # dL/dt of the start and of the end of each system
        self.inner = np.zeros(self.rows.times.shape)  # and of outputs within steps
        self.end: Tensor | None = None
        self.apart: list[Tensor] = []
        self.sizes: list[Tensor] = []

    def run(self, g: Tensor) -> Gradients:
        g = g.view(len(g), self.B, -1)
        a = torch.zeros_like(g[0])
        if self.record.met is not None:
            found = torch.from_numpy(self.record.met.found).to(g.device)
            g = torch.where(found[:, None], g, torch.stack([g[0], torch.zeros_like(g[1])]))
        a = self.steps(a, g)
        if self.record.met is not None:
            start = a + g[0]
        else:
            j, i = np.nonzero(self.record.made == AT_START)
            index = torch.from_numpy(i).to(a.device)
            start = a.index_add(0, index, g[torch.from_numpy(j).to(a.device), index])
        return Gradients(start.reshape(-1), self.time_gradient() if self.want_t else None, self.params.total)

    def steps(self, a: Tensor, g: Tensor) -> Tensor:
        """Cotangents a (B, d) of the states at the ends -> (B, d) at the starts of the first steps."""
        for k in reversed(range(len(self.trail))):
            a = self.pull(k, a, g)
        self.check()
        return a

    def ends(self, k: int, a: Tensor, g: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray, Tensor]:
        """Cotangents a (B, d) of the states after the k-th steps with those of the outputs that they are; and the
        outputs (j, i) that lie within these steps, and their times."""
        met = self.record.met
        if met is None:
            j, i, node = self.outputs(k)
        else:
            i = (met.found & (self.trail.count == k + 1)).nonzero()[0]
            j, node = np.ones_like(i), np.zeros(len(i), dtype=bool)
        if node.any():
            rows, columns = (torch.from_numpy(x[node]).to(a.device) for x in (j, i))
            a = a.index_add(0, columns, g[rows, columns])
        j, i = j[~node], i[~node]
        return a, j, i, self.times(j, i) if met is None else torch.from_numpy(met.times[i])

    def pull(self, k: int, a: Tensor, g: Tensor) -> Tensor:
        """Cotangents a (B, d) of the states after the k-th steps -> (B, d) before; adds to the rest."""
        p, live, mark = self.p, self.live(k), graph_mark()
        p.own.clear()
        mask, spans = self.mask(live), self.spans(k)
        y = self.trail.state(k)
        y = (y.clone() if mask is None else torch.where(mask, y, self.safe_y)).reshape(-1).requires_grad_()
        a, j, i, times = self.ends(k, a, g)
        inputs: list[Tensor] = []
        if self.want_t:
            inputs = [torch.from_numpy(x.copy()).requires_grad_() for x in (spans.t0, spans.dt)]
            spans = spans._replace(at=inputs[0], reach=inputs[1])
            if len(i):
                times = times.requires_grad_()
                inputs.append(times)
        with torch.enable_grad():
            step = self.maker.again(spans, y)
            outputs = [step.y1]
            bars = [(a if mask is None else torch.where(mask, a, 0.0)).reshape(-1)]
            if len(i):
                outputs.append(between(self.maker, step, i, times))
                bars.append(g[torch.from_numpy(j).to(a.device), torch.from_numpy(i).to(a.device)])
        self.compare(k, step)
        pairs = [(o, b) for o, b in zip(outputs, bars) if o.requires_grad]
        y_bar, *rest = grad(p, [o for o, _ in pairs], [y, *p.params, *inputs], [b for _, b in pairs], mark)
        self.params.add(rest[: len(p.params)])
        if self.want_t:
            self.add_times(k, live, j, i, rest[len(p.params) :])
        assert y_bar is not None
        y_bar = y_bar.view(self.B, -1)
        return y_bar if mask is None else torch.where(mask, y_bar, a)

    def add_times(self, k: int, live: np.ndarray, j: np.ndarray, i: np.ndarray, bars: list[Tensor | None]) -> None:
        at, reach, *times = [np.zeros(self.B) if x is None else x.numpy() for x in bars]
        kind, moves = self.trail.kind[k], self.moves[k] & live
        self.first += np.where(moves, at, 0.0)
        self.first -= np.where(moves & ((kind == LAST) | (kind == STOP)), reach, 0.0)
        self.last += np.where(live & (kind == LAST), reach, 0.0)
        if times and self.record.met is None:
            np.add.at(self.inner, (i, j), times[0])

    def time_gradient(self) -> Tensor:
        """dL/dt, of the shape of t."""
        total, rows = self.inner, self.rows
        total[:, 0] += self.first
        if self.record.met is None:
            end = (rows.times == rows.times[:, -1:]).argmax(1)
            total[np.arange(self.B), end] += self.last
        total = total if rows.own else total.sum(0)
        return torch.from_numpy(total).reshape(self.p.t.shape)

    def compare(self, k: int, step: Any) -> None:
        """Note how far the steps taken again end from where they ended in the forward solve."""
        if self.end is not None and self.end.numel():
            going = self.mask(self.live(k + 1))
            y = step.y1.detach().view(self.B, -1)
            gap = y - self.end
            self.apart.append((gap if going is None else torch.where(going, gap, 0.0)).abs().amax(1))
            self.sizes.append((y if going is None else torch.where(going, y, 0.0)).abs().amax(1))
        self.end = self.trail.state(k)

    def check(self) -> None:
        """
        Raises:
            GradientUnavailable: the steps taken again were not those of the forward solve.
        """
        if self.apart:
            apart, size = torch.stack(self.apart), torch.stack(self.sizes)
            slack = 30.0 if self.p.method.controlled else 1.0
            rtol, atol = (slack * float(on_host(x).max()) for x in (self.p.rtol, self.p.atol))
            if not bool((apart <= atol + (rtol + 1e4 * torch.finfo(size.dtype).eps) * size).all()):
                raise other_function()
