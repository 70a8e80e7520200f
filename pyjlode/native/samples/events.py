"""The event of each system: where the first of its event functions crosses zero.

Within a step it is looked for at a few points. The crossing itself is found afterwards, of all systems at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...gradients import undifferentiable
from ...problem import ODEProblem, Rows
from ..events import LOOKS
from .steps import Maker, between, host, polynomial, slopes


class Met(NamedTuple):
    """The steps in which events lie.

    Attributes:
        times: (B,) of the events, NaN where there is none. found: (B,) where there is one.
        y: (B, d), pieces: (B, rows, d), t0, dt: (B,): the steps, as in `steps`.
    """

    times: np.ndarray
    found: np.ndarray
    y: Tensor
    pieces: Tensor
    t0: np.ndarray
    dt: np.ndarray

    def states(self, maker: Maker) -> Tensor:
        """(B, d) at the events."""
        theta = np.where(self.found, (self.times - self.t0) / self.dt, 0.0)
        return polynomial(maker.P, self.y, self.pieces, torch.from_numpy(theta))


class Margins:
    """As `events.Margin`, for each system."""

    def __init__(self, p: ODEProblem) -> None:
        assert p.event_fn is not None
        assert p.rows is not None
        self.p, self.event_fn, self.B = p, p.event_fn, p.batch
        self.signs: np.ndarray | None = None
        everywhere = np.ones(self.B, dtype=bool)
        self(p.rows.starts, p.y0.detach(), everywhere)

    @torch.no_grad()
    def __call__(self, t: np.ndarray, y: Tensor, which: np.ndarray) -> np.ndarray:
        """(B,) at times (B,) and states (n,): infinite where no function has a sign yet. Signs are taken of the systems
        that `which` names, which meet these points."""
        value = self.event_fn(self.p.moments(t), y).reshape(self.B, -1)
        values = value.detach().to("cpu", torch.float64).numpy()
        signs = np.zeros_like(values) if self.signs is None else self.signs
        self.signs = np.where((signs == 0) & which[:, None], np.sign(np.nan_to_num(values)), signs)
        margins = np.where(self.signs == 0, math.inf, self.signs * values)
        return np.where(np.isnan(values).any(1), math.nan, margins.min(1, initial=math.inf))


class Finder:
    """Watches the event functions from step to step."""

    def __init__(self, p: ODEProblem, maker: Maker) -> None:
        assert p.rows is not None
        self.p, self.maker, self.B = p, maker, p.batch
        self.margins = Margins(p)
        d = p.y0.numel() // p.batch
        self.found = np.zeros(self.B, dtype=bool)
        self.y = p.y0.detach().view(self.B, d).clone()
        self.pieces = self.y.new_zeros(self.B, maker.P.shape[0], d)
        self.t0, self.dt = p.rows.starts.copy(), np.ones(self.B)
        self.a, self.b, self.ga, self.gb = (np.zeros(self.B) for _ in range(4))

    def look(self, step: Any, accepted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The systems that meet their event in a step that they accepted; and those whose event function is NaN."""
        spans, systems = step.spans, accepted.nonzero()[0]
        met, bad = np.zeros(self.B, dtype=bool), np.zeros(self.B, dtype=bool)
        before, good = spans.t0, np.full(self.B, math.nan)
        looking = accepted.copy()
        index = torch.from_numpy(systems).to(step.y.device)
        for i in range(1, LOOKS + 1):
            t = spans.t0 + spans.dt * (i / LOOKS)
            y = step.y1
            if i < LOOKS:
                inside = between(self.maker, step, systems, torch.from_numpy(t[systems]))
                y = y.view(self.B, -1).index_copy(0, index, inside).view(-1)
            margin = self.margins(t, y, looking)
            bad |= looking & np.isnan(margin)
            here = looking & (margin <= 0) & ~bad
            self.a, self.b = np.where(here, before, self.a), np.where(here, t, self.b)
            self.ga, self.gb = np.where(here, good, self.ga), np.where(here, margin, self.gb)
            met |= here
            looking &= ~here & ~bad
            before, good = t, np.where(np.isfinite(margin), margin, math.nan)
        if met.any():
            self._keep(step, met)
        return met, bad

    def _keep(self, step: Any, met: np.ndarray) -> None:
        which = torch.from_numpy(met.nonzero()[0]).to(step.y.device)
        self.y[which] = step.y.view(self.B, -1)[which]
        self.pieces[which] = step.pieces(which)
        self.t0, self.dt = np.where(met, step.spans.t0, self.t0), np.where(met, step.spans.dt, self.dt)
        self.found |= met

    def close(self) -> Met:
        times = self._crossings() if self.found.any() else np.zeros(self.B)
        return Met(np.where(self.found, times, math.nan), self.found, self.y, self.pieces, self.t0, self.dt)

    def _margin(self, t: np.ndarray) -> np.ndarray:
        theta = np.where(self.found, (t - self.t0) / self.dt, 0.0)
        y = polynomial(self.maker.P, self.y, self.pieces, torch.from_numpy(theta))
        return self.margins(np.where(self.found, t, self.t0), y.view(-1), self.found)

    @torch.no_grad()
    def _crossings(self) -> np.ndarray:
        """As `EventFinder.crossing`, of all systems at once: (B,)."""
        a, b, ga, gb = self.a.copy(), self.b.copy(), self.ga.copy(), self.gb.copy()
        eps = sys.float_info.epsilon
        going = self.found.copy()
        if (unknown := going & np.isnan(ga)).any():
            ga = np.where(unknown, self._margin(np.where(unknown, a, self.t0)), ga)
            going &= ~(unknown & (ga <= 0))  # it left zero on this side already
        wa, wb = np.ones(self.B), np.ones(self.B)
        answer = a.copy()
        for i in range(200):
            going = going & (np.abs(b - a) > 2 * eps * np.maximum(np.abs(a), np.abs(b)))
            if not going.any():
                break
            flat = going & (gb == 0)  # is that the zero itself, or is it flat from the zero on, as relu is?
            if flat.any():
                x = b + 4 * eps * np.maximum(np.abs(a), np.abs(b)) * np.where(a > b, 1.0, -1.0)
                ends = flat & (self._margin(np.where(flat, x, a)) > 0)
                answer, going = np.where(ends, x, answer), going & ~ends
                a = np.where(ends, x, a)
            with np.errstate(all="ignore"):
                x = (wb * gb * a - wa * ga * b) / (wb * gb - wa * ga)
            halved = a + (b - a) / 2
            low, high = np.minimum(a, b), np.maximum(a, b)
            bisect = flat | ~((low < x) & (x < high)) | (i % 4 == 3)
            x = np.where(bisect, halved, x)
            going = going & ~(bisect & ((x == a) | (x == b)))
            g = self._margin(np.where(going, x, a))
            near, far = going & (g > 0), going & ~(g > 0)
            wb = np.where(near, wb / 2, np.where(far, 1.0, wb))
            wa = np.where(far, wa / 2, np.where(near, 1.0, wa))
            a, ga = np.where(near, x, a), np.where(near, g, ga)
            b, gb = np.where(far, x, b), np.where(far, g, gb)
        return a


def _near(maker: Maker, met: Met, at: Tensor) -> Tensor:
    """(B, d) at times (B,) near the events, in a solve without a graph."""
    found, t0, dt = (torch.from_numpy(x) for x in (met.found, met.t0, met.dt))
    return polynomial(maker.P, met.y, met.pieces, torch.where(found, (at - t0) / dt, 0.0))


def crossing(p: ODEProblem, record: Any, maker: Maker, recorded: bool) -> tuple[Tensor, Tensor]:
    """Times (B,) and states (n,) of the events, with gradients by the implicit function theorem, as in
    `engines.crossing`; NaN, and without a gradient, where there is none.

    Args:
        recorded: autograd follows the solve; else its result is the state at a time that is held.
    """
    assert p.rows is not None
    met = record.met

    def slope() -> Tensor:
        theta = torch.from_numpy(np.where(met.found, (met.times - met.t0) / met.dt, 0.0))
        return slopes(maker.P, met.pieces, theta, torch.from_numpy(met.dt))

    def state(at: Tensor) -> Tensor:
        return record.at_events(at) if record.at_events else _near(maker, met, at)

    return moved(p, p.rows, met.times, record.ys[1], slope, state if recorded else None)


def moved(
    p: ODEProblem,
    rows: Rows,
    times: np.ndarray,
    y: Tensor,
    slope_of: Callable[[], Tensor],
    recorded: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The same.

    Args:
        times: (B,) of the events, NaN where there is none. y: (n,), the states there, with the graph of a solve to
            times that are held. slope_of: gives dy/dt there, (B, d).
        recorded: the states at other times (B,), with the graph of the solve; None where there are no others.
    """
    assert p.event_fn is not None
    B, found_there = p.batch, ~np.isnan(times)
    t = torch.from_numpy(times).to(p.t)
    if not torch.is_grad_enabled() or not found_there.any():
        return t, y
    found = torch.from_numpy(found_there).to(y.device)
    mask = found[:, None]
    # Where there is no event, the start stands for it in what follows.
    held = torch.from_numpy(np.where(found_there, times, rows.starts))
    with torch.no_grad():
        slope = slope_of()
    start = p.y0.detach().view(B, -1)
    y = torch.where(mask, y.view(B, -1), start)
    at, state = held, y
    grazing = None
    for _ in range(2 if recorded else 1):
        value = p.event_fn(at.to(y), state.reshape(-1)).reshape(B, -1)
        with torch.enable_grad():
            point, moment = y.detach().requires_grad_(), held.to(y).clone().requires_grad_()
            c = p.event_fn(moment, point.reshape(-1)).reshape(B, -1)
            which = c.detach().abs().argmin(1, keepdim=True)
            chosen = c.gather(1, which).sum()
            by_t, by_y = (
                torch.autograd.grad(chosen, (moment, point), allow_unused=True) if c.requires_grad else (None, None)
            )
        rate = torch.zeros_like(held)
        rate = rate if by_t is None else rate + by_t.to(rate)
        rate = rate if by_y is None else rate + (by_y * slope).sum(1).to(rate)
        if not value.requires_grad and not (y.requires_grad and bool((rate == 0).any())):
            break
        still = torch.from_numpy(host(rate) == 0) & torch.from_numpy(found_there)
        if bool(still.any()):
            grazing = rows.name(int(still.int().argmax()))
        rate = torch.where(rate == 0, 1.0, rate)
        residual = value.gather(1, which)[:, 0].to(torch.float64).cpu()
        at = at - (residual - residual.detach()) / rate.cpu()
        state = recorded(at) if recorded else y + slope * (at - at.detach()).to(y)[:, None]
    event_t, states = torch.where(found.cpu(), at, math.nan).to(p.t), torch.where(mask, state, math.nan).view(-1)
    if grazing:
        event_t, states = undifferentiable(
            f"event_fn does not change along the solution at the event of {grazing}: the event's time has no "
            "derivative there (it grazes zero, or event_fn is not differentiable).",
            event_t.detach(),
            states.detach(),
            of=(value, y),
        )
    return event_t, states
