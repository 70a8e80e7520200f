"""The integration loop of independent systems: all step together, each with a step, an end and an event of its own.

An attempt is one batched step. What steers it is (B,) numbers on the host, read once a step. A system that has come to
its end rests, as a step of length zero: f may hold tensors with a part for each system, which must keep their places.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ends import too_many_steps, too_small
from ...errors import NonFiniteState, SolveError
from ...methods.explicit import ExplicitTableau
from ...notices import warn
from ...problem import ODEProblem, Rows
from ...solution import Stats, SystemStats
from .. import explicit
from . import events, narrow
from .dense import Dense
from .steps import Maker, Spans, between, host
from .tape import Piece, Tape, taped

# How the length of a step depends on the user's times: not at all; it ends at the last of them; it ends at a stop.
FREE, LAST, STOP = 0, 1, 2
# Where outputs lie that no step made: at the start; nowhere, the system failed before.
AT_START, NOWHERE = -1, -2


class Trail:
    """The accepted steps of all systems, the k-th of each in row k: what is needed to take them again.

    Args:
        states: keep the states at their starts. counted: keep nothing but their number.
    """

    def __init__(self, p: ODEProblem, *, states: bool, counted: bool = False) -> None:
        self.B, self.p, self.counted = p.batch, p, counted
        self.count = np.zeros(self.B, dtype=np.int64)
        self.t0, self.dt = np.zeros((16, self.B)), np.zeros((16, self.B))
        self.kind = np.zeros((16, self.B), dtype=np.int8)
        jumps = bool(p.options.jump_t)
        self.after = np.zeros((16, self.B), dtype=bool) if jumps else None
        self.before = np.zeros((16, self.B), dtype=bool) if jumps else None
        self.states: list[Tensor] | None = [] if states else None

    def __len__(self) -> int:
        return int(self.count.max(initial=0))

    def add(self, spans: Spans, kind: np.ndarray, y: Tensor, accepted: np.ndarray) -> None:
        if int(self.count.max()) == len(self.t0):
            for name in ("t0", "dt", "kind", "after", "before"):
                if (x := getattr(self, name)) is not None:
                    setattr(self, name, np.concatenate([x, np.zeros_like(x)]))
        systems = accepted.nonzero()[0]
        at = (self.count[systems], systems)
        self.t0[at], self.dt[at], self.kind[at] = spans.t0[systems], spans.dt[systems], kind[systems]
        if self.after is not None and self.before is not None:
            assert spans.after is not None
            assert spans.before is not None
            self.after[at], self.before[at] = spans.after[systems], spans.before[systems]
        if self.states is not None:
            self._keep(y.view(self.B, -1), at)
        self.count[systems] += 1

    def _keep(self, y: Tensor, at: tuple[np.ndarray, np.ndarray]) -> None:
        assert self.states is not None
        k, systems = at
        while k.max() // _CHUNK >= len(self.states):
            self.states.append(y.new_zeros(_CHUNK, *y.shape))
        for chunk in np.unique(k // _CHUNK):
            here = k // _CHUNK == chunk
            rows, columns = (torch.from_numpy(x[here]).to(y.device) for x in (k % _CHUNK, systems))
            self.states[chunk][rows, columns] = y[columns]

    def state(self, k: int) -> Tensor:
        """(B, d): the states at the starts of the k-th steps, anything where there is none."""
        assert self.states is not None
        return self.states[k // _CHUNK][k % _CHUNK]


_CHUNK = 32


@dataclass
class SystemsRecord:
    """What a solve of independent systems leaves behind; as `native.loop.Record` where that has the same names.

    Attributes:
        ys: (T, n) states at the output times; with events, at the start and at each system's own.
        trail: the accepted steps. tape: the graphs of the first of them, where these were kept. late: the others, and
            `made` of those alone.
        made: (T, B) which step an output lies in; node: (T, B) whether at its end, as its state.
        event_t: (B,) times of the events; NaN where there is none.
        met: the steps that the events lie in. at_events: times (B,) near them -> states (B, d), in a recorded solve.
        end: times (B,) and state (n,) at the ends, of systems that did not fail.
        failed: (B,) which did.
    """

    ys: Tensor
    trail: Trail
    made: np.ndarray
    node: np.ndarray
    end: tuple[Tensor, Tensor]
    failed: np.ndarray
    dense: Any = None
    tape: Tape | None = None
    late: tuple[Trail, np.ndarray] | None = None
    event_t: Any = None
    met: events.Met | None = None
    at_events: Any = None
    event: Tensor | None = None
    size: Tensor | None = None
    nodes: list[float] | None = None
    next_dt: float | None = None
    last: Any = None
    kept: list[Any] = field(default_factory=list)
    head: Any = None


class Crawl:
    """Says once in a solve that a method crawls, held by its stability, as `explicit.Crawl`."""

    def __init__(self, p: ODEProblem) -> None:
        assert isinstance(p.method.tableau, ExplicitTableau)
        self.name, self.near = p.method.name, explicit.NEAR * explicit.boundary(p.method.tableau)
        self.hits, self.said = np.zeros(p.batch, dtype=np.int64), False

    def look(self, n: int, step: Any, accepted: np.ndarray, end: np.ndarray, rows: Rows) -> None:
        """Look at attempt number n, from 1."""
        phase = (n - explicit.FIRST) % explicit.PERIOD
        if self.said or n < explicit.FIRST or phase >= explicit.LOOKED_AT:
            return
        with torch.no_grad():
            self.hits = (self.hits if phase else 0) + (accepted & (step.stretch() > self.near))
        spans = step.spans
        left = np.where(np.isfinite(end), (end - spans.t0) / spans.dt, n)
        crawling = (self.hits >= explicit.ON_BOUNDARY) & (left > explicit.CRAWL)
        if crawling.any():
            self.said = True
            i = int(crawling.argmax())
            warn(
                f"{self.name}: {rows.name(i)} of the batch is stiff at t={spans.t0[i]:.6g}. Steps of "
                f"dt={spans.dt[i]:.3g} are as long as the method is stable for, and not as the tolerance asks; there "
                f"are some {left[i]:.0f} more of them. Use method='rodas5p', which is for stiff systems."
            )


class Search:
    """One solve, without a graph.

    Args:
        steps: keep what the steps were. states: and the states at their starts. dense: keep the dense output.
        outputs: make the outputs.
    """

    def __init__(
        self, p: ODEProblem, stats: Stats, maker: Maker, *, steps: bool, states: bool, dense: bool, outputs: bool
    ) -> None:
        assert p.rows is not None
        self.p, self.stats, self.rows = p, stats, p.rows
        self.maker: Any = maker
        self.B, self.d, self.T = p.batch, p.y0.numel() // p.batch, p.rows.times.shape[1]
        self.sign, self.o = p.direction, p.options
        self.y = p.y0 if p.transformed else p.y0.detach()
        self.t = p.rows.starts.copy()
        self.finder = events.Finder(p, maker) if p.event_fn is not None else None
        self.end = np.full(self.B, self.sign * math.inf) if self.finder else p.rows.ends.copy()
        self.live = self.t != self.end
        self.failed = np.zeros(self.B, dtype=bool)
        self.why: dict[int, str] = {}
        self.nreject, self.tries, self.nfe = (np.zeros(self.B, dtype=np.int64) for _ in range(3))
        # Attempts, and calls of f in them, since a system left; those before; and which were under way then.
        self.tried, self.called, self.tries_before, self.under_way = 0, 0, 0, self.live.copy()
        self.trail = Trail(p, states=states, counted=not (steps or states or dense))
        self.made = np.full((self.T, self.B), NOWHERE, dtype=np.int64)
        self.node = np.zeros((self.T, self.B), dtype=bool)
        self.ys = self.y.new_full((self.T, self.B, self.d), math.nan) if outputs and not self.finder else None
        self.dense = Dense(p, maker) if dense else None
        self.tape = Tape.of(p) if states and not dense and taped(maker) else None
        self.inside: Tensor | None = None
        self.kept: Tape | None = None
        self.late: tuple[Trail, np.ndarray] | None = None
        self.whole: Any = maker
        self.crawl = Crawl(p) if p.method.kind == "adaptive" and not p.transformed else None
        self.narrows = self.tape is None and not dense and p.compiled is None and narrow.worth(p)
        self.size = self.y.abs() if p.adjoint else None
        inside = {t for t in (*self.o.step_t, *self.o.jump_t) if self.sign * t < self.sign * math.inf}
        self.stops = np.array(sorted(self.sign * t for t in inside))
        self.jumps = np.array(sorted(self.o.jump_t))
        self.previous = np.zeros(self.B)  # log of the error of the last accepted step
        self._start_outputs()

    # --- Outputs ------------------------------------------------------------------------------------------------------

    def _start_outputs(self) -> None:
        times = self.rows.times
        self.ordered = self.sign * times
        at_start = times == times[:, :1]
        self.next = at_start.sum(1)
        self.made[at_start.T] = AT_START
        if self.ys is not None:
            self.ys[0] = self.y.view(self.B, self.d)
            for j in range(1, self.T):  # rows of one time
                if not at_start[:, j].any():
                    break
                systems = torch.from_numpy(at_start[:, j].nonzero()[0]).to(self.y.device)
                self.ys[j, systems] = self.ys[0, systems]
        self._next_times()

    def _next_times(self) -> None:
        """The time of the next output of each system, in the order of integration."""
        padded = np.minimum(self.next, self.T - 1)
        found = self.ordered[np.arange(self.B), padded]
        self.next_time = np.where(self.next < self.T, found, math.inf)

    def _outputs(self, step: Any, t1: np.ndarray, accepted: np.ndarray) -> None:
        ordered = self.sign * t1
        hit = accepted & (ordered >= self.next_time)
        if not np.count_nonzero(hit):
            return
        systems = hit.nonzero()[0]
        if self.rows.own:
            until = (self.ordered[systems] <= ordered[systems, None]).sum(1)
        else:
            until = np.searchsorted(self.ordered[0], ordered[systems], side="right")
        first = self.next[systems]
        many = until - first
        i = np.repeat(systems, many)
        j = np.arange(len(i)) + np.repeat(first - np.concatenate([[0], np.cumsum(many)[:-1]]), many)
        times = self.rows.times[i, j]
        at_end = times == t1[i]
        if self.p.moving:  # an output moves past the end of a step, unless that is the end of all
            at_end &= times == self.end[i]
        self.made[j, i], self.node[j, i] = self.trail.count[i], at_end
        if self.late is not None:
            self.late[1][j, i] = self.late[0].count[i]
        self.next[systems] = until
        self._next_times()
        if self.ys is None:
            return
        inside = ~at_end
        self.places = j[inside], i[inside], (j[at_end], i[at_end])
        if inside.any():
            where, calls = (self._index(j[inside]), self._index(i[inside])), self.p.f.nfe
            with torch.enable_grad() if self.tape is not None else contextlib.nullcontext():
                values = between(self.maker, step, i[inside], torch.from_numpy(times[inside]))
            self.ys[where] = values.detach()
            self.inside = values
            self.nfe[np.unique(i[inside])] += self.p.f.nfe - calls
        if at_end.any():
            where = self._index(j[at_end]), self._index(i[at_end])
            self.ys[where] = step.y1.view(self.B, self.d)[where[1]]

    def _index(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.y.device)

    # --- Failures -----------------------------------------------------------------------------------------------------

    def fail(self, which: np.ndarray, error: Callable[[int], SolveError]) -> None:
        """Some systems cannot go on.

        Raises:
            SolveError: unless that was to be noted alone.
        """
        for i in which.nonzero()[0].tolist():
            said = error(i)
            if self.o.on_failure == "raise":
                if self.failed.size == 1:
                    raise said
                raise type(said)(
                    f"{self.rows.name(i)} of the batch: {said} (options={{'on_failure': 'nan'}} goes on with the "
                    "others.)",
                    t=said.t,
                    dt=said.dt,
                )
            self.why[i] = str(said)
        self.failed |= which
        self.live &= ~which

    # --- Steps --------------------------------------------------------------------------------------------------------

    def run(self) -> SystemsRecord:
        with np.errstate(all="ignore"):
            self._run()
        return self._record()

    def _begin(self) -> np.ndarray:
        """The slope at the start, and the sizes of the first steps."""
        p, before = self.p, self.p.f.nfe
        k0 = p.f0 if p.f0 is not None else p.f(p.start, self.y) if self.tape is None else self.tape.k0
        k0 = k0 if p.transformed else k0.detach()
        finite = host(torch.isfinite(torch.cat([k0.view(self.B, -1), self.y.view(self.B, -1)], 1)).all(1).to(k0)) > 0
        if not finite.all():
            self.fail(
                self.live & ~finite,
                lambda i: NonFiniteState(
                    f"h0 or f is NaN or infinity at the start, t={self.t[i]:.6g}.", t=float(self.t[i]), dt=0.0
                ),
            )
            self.failed |= ~finite
        self.maker.start(k0)
        self.nfe += 1
        limit = np.minimum(self.o.max_step, np.abs(self.end - self.t))
        if self.o.first_step:
            return np.minimum(self.o.first_step, limit)
        size = self._first_size(k0, limit)
        self.nfe += max(p.f.nfe - before - (p.f0 is None), 0)
        return size

    def _first_size(self, k0: Tensor, limit: np.ndarray) -> np.ndarray:
        """As `controller.initial_step`, for each system."""
        p, norms, y = self.p, self.maker.errors, self.y
        scale = p.atol + y.abs() * p.rtol
        d0, d1 = norms(y, scale), norms(k0, scale)
        first = self.rows.times[:, min(1, self.T - 1)]
        span = np.where(np.isfinite(limit), limit, np.abs(first - self.t))
        h0 = 1e-6 * span
        h0 = np.where(d1 * span > 1e-10, np.where(d0 >= 1e-5, 0.01 * d0 / d1, np.minimum(h0, 1e4 / d1)), h0)
        h0 = np.nan_to_num(np.minimum(h0, limit))
        dt = self.sign * h0
        ahead = y + (k0.view(self.B, -1) * p.moments(dt)[:, None]).view(-1)
        d2 = norms(p.f(p.moments(self.t + dt), ahead) - k0, scale) / h0
        unit = np.where(d2 > 0, np.minimum(100 * h0, np.maximum(d1 / d2, h0)), 100 * h0)
        d = np.maximum(d1 * unit, d2 * unit * unit)
        h1 = np.where(d > 1e-15, unit * (0.01 / d) ** (1 / self.maker.order), unit)
        size = np.minimum(np.minimum(100 * h0, h1), limit)
        return np.where(np.isfinite(d2), size, h0 * 1e-3)

    def _run(self) -> None:
        # What is done here for each step is small change, and a good part of a solve of small systems: sums over the
        # steps are kept for all systems that are still under way together, and added up when one leaves.
        p, o, sign, maker, B = self.p, self.o, self.sign, self.maker, self.B
        dt = self._begin() if self.live.any() else np.zeros(B)
        err, size = np.zeros(B), np.zeros(B)
        units = np.full(B, sign)
        rejected: np.ndarray | None = None  # where steps from here ended that were not accepted
        after = np.zeros(B, dtype=bool) if len(self.jumps) else None
        bounded = o.min_step > 0 or o.max_step < math.inf
        left = self._left()
        wide = left  # how many f is called with
        while left:
            if self.narrows and 2 * left <= wide and self._narrow():
                wide, maker = left, self.maker
            if self.tried + self.tries_before >= o.max_num_steps and self._late(dt):
                left = self._left()
                continue
            if bounded:
                dt = np.minimum(np.maximum(dt, o.min_step), o.max_step)
            t = self.t
            stop = self.end
            if len(self.stops):
                place = np.searchsorted(self.stops, sign * t, side="right")
                stop = sign * np.minimum(np.append(self.stops, math.inf)[place], sign * self.end)
            # A step that would end just short of a stop ends on it: no sliver is left over.
            ahead, room = (dt, stop - t) if sign > 0 else (-dt, t - stop)
            t1 = np.where(dt * (1 + 1e-10) >= room, stop, t + ahead)
            if left < B:
                t1 = np.where(self.live, t1, t)
            reach = t1 - t
            stuck = np.count_nonzero(reach) != left or (rejected is not None and (rejected == t1).any())
            if stuck or (self.finder is not None and np.isinf(reach).any()):
                known = t1 if rejected is None else rejected
                which = self.live & ((reach == 0) | np.isinf(t1) | ((known == t1) if rejected is not None else False))
                if which.any():
                    self._stuck(which, t1, dt, err)
                    left = self._left()
                    continue
            self.tried += 1
            before = None if after is None else np.isin(t1, self.jumps) & self.live
            spans, calls = Spans(t, reach, after, before), p.f.nfe
            try:
                step, err = maker.attempt(spans, self.y) if self.tape is None else self._recorded(spans)
            except Exception:
                if maker is self.whole:
                    raise
                # f does not take fewer systems everywhere: all come back.
                self.whole.start(self.maker.k0)
                maker = self.maker = self.whole
                self.narrows, self.tried = False, self.tried - 1
                continue
            self.called += p.f.nfe - calls
            size = np.abs(reach)
            accepted = err <= 1 if left == B else self.live & (err <= 1)
            if o.min_step:
                accepted = self.live & (accepted | ((size <= o.min_step) & np.isfinite(err)))
                if (small := self.live & ~accepted & (size <= o.min_step)).any():
                    self.tried -= 1
                    self._stuck(small, t1, size, err)
                    left = self._left()
                    continue
            good = np.count_nonzero(accepted)
            dt = size * self._factors(err, accepted, good == left)
            if good < left:
                rejected = np.where(accepted, math.nan, t1)
                self.nreject += self.live & ~accepted
            else:
                rejected = None
            if self.crawl is not None:
                self.crawl.look(self.tries_before + self.tried, step, accepted, self.end, self.rows)
            if good:
                # A system that rests is where it was after a step of no length, if f is finite there.
                everywhere = good == left and (left == B or np.count_nonzero(err == err) == B)
                if self._advance(step, spans, t1, stop, accepted, everywhere):
                    left = self._left()
                if self.tape is not None:
                    self._keep(step, accepted)
                if after is not None:
                    after = np.where(accepted, np.isin(self.t, self.jumps), after)
                mask = None if everywhere else self._index(accepted)[:, None]
                calls = p.f.nfe
                maker.accept(step, accepted, mask, Spans(self.t, units, after, before), self.y)
                if p.f.nfe > calls:
                    self.nfe += (p.f.nfe - calls) * accepted

    def _narrow(self) -> bool:
        """Whether the systems that have come to their end leave the batch that f is called with."""
        systems = self.live.nonzero()[0]
        some = narrow.Narrow(self.p, self.p.f.f, systems, self.maker.k0)
        self.p.f.nfe += 1
        if not some.agrees(self.t, self.y, self.maker.k0):
            self.narrows = False
            return False
        self.maker = some
        return True

    def _left(self) -> int:
        """How many systems are under way; what was counted for those that were is added up."""
        was = self.under_way
        self.tries += self.tried * was
        self.nfe += self.called * was
        self.tries_before += self.tried
        self.tried = self.called = 0
        self.under_way = self.live.copy()
        return int(np.count_nonzero(self.live))

    def _recorded(self, spans: Spans) -> tuple[Any, np.ndarray]:
        """An attempt with a graph of its own."""
        self.y = self.y.detach().requires_grad_()
        self.maker.start(self.maker.k0.detach().requires_grad_())
        self.leaves = self.y, self.maker.k0
        self.inside, nothing = None, np.zeros(0, dtype=np.int64)
        self.places = nothing, nothing, (nothing, nothing)
        with torch.enable_grad():
            return self.maker.attempt(spans, self.y, recorded=True)

    def _keep(self, step: Any, accepted: np.ndarray) -> None:
        assert self.tape is not None
        with torch.enable_grad():
            k1 = step.slope1().reshape(-1)
        j, i, at_end = self.places
        piece = Piece(*self.leaves, step.y1, k1, accepted, self.inside, j, i, at_end)
        if not self.tape.add(piece):  # the memory for graphs is full: later steps will be taken again
            self.kept, self.tape = self.tape, None
            self.late = Trail(self.p, states=True), np.full_like(self.made, NOWHERE)
        self.y = self.y.detach()

    def _advance(
        self, step: Any, spans: Spans, t1: np.ndarray, stop: np.ndarray, accepted: np.ndarray, everywhere: bool
    ) -> bool:
        """Go on from a step to t1, where it was accepted; whether a system has come to its end."""
        at_stop = accepted & (t1 == stop)
        stopped = np.count_nonzero(at_stop) > 0
        if self.dense is not None:
            self.dense.add(step, accepted)
        going = accepted
        if self.finder:
            calls = self.p.f.nfe
            met, bad = self.finder.look(step, accepted)
            self.nfe += (self.p.f.nfe - calls) * accepted
            if bad.any():
                self.fail(
                    bad,
                    lambda i: NonFiniteState(
                        f"event_fn returned NaN near t={self.t[i]:.6g}.", t=float(self.t[i]), dt=0.0
                    ),
                )
            out = met | bad
            if leaving := bool(out.any()):
                going, everywhere = accepted & ~out, False
                self.live = self.live & ~met
        else:
            leaving = False
            self._outputs(step, t1, accepted)
        if not self.trail.counted:
            kind = np.where(at_stop, np.where(t1 == self.end, LAST, STOP), FREE) if stopped else _free(self.B)
            self.trail.add(spans, kind, self.y, accepted)
            if self.late is not None:
                self.late[0].add(spans, kind, self.y, accepted)
        else:
            self.trail.count += accepted
        if self.size is not None:
            y1 = torch.where(self._index(accepted)[:, None], step.y1.view(self.B, -1).abs(), 0.0).view(-1)
            self.size = torch.maximum(self.size, y1)
        if everywhere:
            self.y, self.t = step.y1, t1
        else:
            going_on = self._index(going)[:, None]
            self.y = torch.where(going_on, step.y1.view(self.B, -1), self.y.view(self.B, -1)).view(-1)
            self.t = np.where(going, t1, self.t)
        if stopped:
            self.live = self.live & ~(at_stop & (t1 == self.end))
            leaving = True
        return leaving

    def _factors(self, err: np.ndarray, accepted: np.ndarray, all_good: bool) -> np.ndarray:
        """As `controller.next_factor`, for each system."""
        o, order, (beta1, beta2) = self.o, self.maker.order, self.p.method.pi
        size, safety = np.log(err), math.log(o.safety)
        far = safety - size / order
        near = safety * order * (beta1 - beta2) - beta1 * size
        near += beta2 * self.previous
        factor = np.exp(np.where(err > _FAR, near, far))
        least = np.maximum(size, _LEAST)
        if not all_good:
            down = np.where(np.isfinite(err), np.minimum(np.exp(far), 1.0), 0.0)
            factor, least = np.where(accepted, factor, down), np.where(accepted, least, self.previous)
        self.previous = least
        return np.minimum(np.maximum(factor, o.dfactor), o.ifactor)

    def _late(self, dt: np.ndarray) -> bool:
        """Whether some systems have had all the steps that they may have; they go no further."""
        self._left()
        late = self.live & (self.tries >= self.o.max_num_steps)
        if not late.any():
            return False
        if self.finder:
            self.live &= ~late
        else:
            self.fail(late, lambda i: too_many_steps(self.p, float(self.t[i]), float(dt[i]), float(self.end[i])))
        return True

    def _stuck(self, stuck: np.ndarray, t1: np.ndarray, dt: np.ndarray, err: np.ndarray) -> None:
        if self.finder and (away := stuck & np.isinf(t1)).any():
            self.live &= ~away
            return
        self.fail(stuck, lambda i: too_small(self.p, float(self.t[i]), self.sign * float(dt[i]), float(err[i])))

    def _record(self) -> SystemsRecord:
        p, s = self.p, self.stats
        self.naccept = self.tries - self.nreject
        s.naccept += int(self.naccept.sum())
        s.nreject += int(self.nreject.sum())
        shape = self.rows.shape
        nfe, naccept, nreject, failed = (
            torch.from_numpy(x.reshape(shape)) for x in (self.nfe, self.naccept, self.nreject, self.failed)
        )
        why = {_place(i, shape): said for i, said in self.why.items()}
        s.systems = SystemStats(nfe, naccept, nreject, failed, why)
        good = self._index(~self.failed)[:, None]
        end = torch.where(good, self.y.view(self.B, -1), self.safe())
        record = SystemsRecord(
            self.y, self.trail, self.made, self.node, (p.moments(self.t), end.view(-1)), self.failed, size=self.size
        )
        record.tape, record.late = self.tape or self.kept, self.late
        if record.tape is not None:
            record.tape.close()
        if self.dense is not None:
            self.dense.close(self.trail, self.failed)
            record.dense = self.dense
        if self.finder:
            record.met = self.finder.close()
            record.event_t = record.met.times
            found = torch.where(self._index(record.met.found)[:, None], record.met.states(self.maker), math.nan)
            record.ys = torch.stack([p.y0.detach(), found.view(-1)])
        elif self.ys is not None:
            record.ys = self.ys.view(self.T, -1)
        return record

    def safe(self) -> Tensor:
        """(B, d): for each system a state at which f was finite."""
        return safe_start(self.p, self.failed, self.trail)[1]


# As in `controller`.
_FAR, _LEAST = 0.1, math.log(1e-4)


@functools.lru_cache(maxsize=8)
def _free(count: int) -> np.ndarray:
    return np.full(count, FREE, dtype=np.int8)


def _place(i: int, shape: tuple[int, ...]) -> Any:
    place = tuple(int(x) for x in np.unravel_index(i, shape))
    return place[0] if len(place) == 1 else place


def safe_start(p: ODEProblem, failed: np.ndarray, trail: Trail) -> tuple[np.ndarray, Tensor]:
    """Times (B,) and states (B, d) at which a system rests where it has no step: its own start, or where f is not
    finite there that of another."""
    assert p.rows is not None
    y0, times = p.y0.view(p.batch, -1), p.rows.starts
    y0 = y0 if p.transformed else y0.detach()
    bad = failed & (trail.count == 0)
    if not bad.any() or bad.all():
        return times, y0 if not bad.all() else torch.zeros_like(y0)
    other = int((~bad).argmax())
    index = np.where(bad, other, np.arange(p.batch))
    return times[index], y0[torch.from_numpy(index).to(y0.device)]
