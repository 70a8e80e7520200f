"""Vector-Jacobian products of a solve: the ways to the gradient.

Notation: a loss L of the states y_i = y(t_i) with cotangents g_i = dL/dy_i. The adjoint a(t) = dL/dy(t) obeys
a' = -a df/dy, jumps by g_i at t_i, and dL/dtheta is the integral of a df/dtheta from t_0 to t_N (Chen, Rubanova,
Bettencourt & Duvenaud 2018, appendix B; Pontryagin et al. 1962).
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import forward
from ..derivatives import grad, pull_back, vjp
from ..gradients import Gradients, other_function, reached, time_gradient
from ..methods.explicit import ExplicitTableau
from ..numbers import as_like, on_host
from ..parameters import graph_mark
from ..problem import Callbacks, Field, Layout, Norm, ODEProblem, like, max_rms_norm, not_negative
from ..solution import Stats
from . import dae, interpolation, loop, scipy_ivp
from .checkpoints import Kept
from .linear import Jacobian, Linear
from .loop import Head, Record
from .multistep import Past
from .step import Step


class Sum:
    """Accumulates gradients with respect to a list of tensors."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.total: list[Tensor | None] = [None] * len(params)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        both = [(total, grad) for total, grad in zip(self.total, grads) if total is not None and grad is not None]
        if both:
            torch._foreach_add_(*(list(x) for x in zip(*both)))
        if len(both) < len(grads):
            for i, (total, grad) in enumerate(zip(self.total, grads)):
                if total is None and grad is not None:
                    self.total[i] = grad.clone()


# ----------------------------------------------------------------------------------------------------------------------
# discrete: the exact gradient of the numbers that came out
# ----------------------------------------------------------------------------------------------------------------------


def discrete(p: ODEProblem, record: Record, g: Tensor, *, again: bool) -> Gradients:
    """Take each accepted step again, last one first, and pull the cotangent back through it.

    Step sizes are held as they were, except where a step starts or ends at a time of the user's. Memory: what
    `record.kept` keeps, and at most `GRAPH_BUDGET` for the first steps, whose graph is there already.
    """
    want_t = p.t.requires_grad
    replay = Replay(p) if p.compiled is None else p.compiled.replay(p)
    times = reached(p, record)
    event = len(times) - 1 if record.event_t is not None else None  # its place among the outputs
    moving = p.t
    if want_t and event is not None:
        with torch.enable_grad():
            moving = torch.cat([p.t[:event], p.t.new_tensor([record.event_t])])
    sign = p.direction
    params = Sum(p.params)
    a = torch.zeros_like(p.y0)
    i = len(times)  # outputs from i on are done
    head = record.head
    if not again:
        record.head = None  # its graph is freed as it is walked
    for kept in record.kept.last_first(head.steps if head else 0, again=again):
        t0, t1 = kept.interval.t0, kept.interval.t1
        if i > 1 and times[i - 1] == t1 and i - 1 != event and loop.is_node(p, i - 1, want_t):
            i -= 1
            a = a + g[i]
        j = i
        while j > 1 and sign * times[j - 1] > sign * t0:
            j -= 1
        inside: list[float] | Tensor = times[j:i]
        if want_t:
            with torch.enable_grad():
                inside = moving[j:i]
        a = replay.pull(kept, a, inside, g[j:i], params)
        i = j
    replay.finish(params)
    if head:
        a = replay.through(head, a, g[1:i], params, again)
    return Gradients(a + g[0], replay.time_gradient() if want_t else None, params.total)


# Bytes that a solve may keep of the graph of its first steps. A graph that is kept need not be made again, which is two
# fifths of the time of a backward pass through small networks. Solves that need more replay the rest.
GRAPH_BUDGET = 32 * 2**20
# As many nodes at most: PyTorch (2.13) frees a graph that Python has walked through, as `check_graph` does, in a
# recursion that takes 200 bytes of the stack a node. A thread has 8 MB.
GRAPH_NODES = 20_000


def graph_steps(p: ODEProblem) -> int:
    """How many steps' graphs fit into `GRAPH_BUDGET` and `GRAPH_NODES`."""
    tab = p.method.tableau
    if p.graph_bytes is None or not isinstance(tab, ExplicitTableau) or p.method.kind in ("adams", "reversible"):
        return 0
    # Beside what f keeps, each stage keeps the stack of the stages before it.
    stages = tab.stages + tab.fsal
    step = stages * p.graph_bytes + stages * (stages + 7) // 2 * p.y0.nbytes
    nodes = stages * (p.graph_nodes + 4)  # a stage is itself four operations
    return min(GRAPH_BUDGET // max(step, 4096), GRAPH_NODES // nodes)


class Replay:
    """The adjoint of a step: autograd through the step as it was taken."""

    def __init__(self, p: ODEProblem) -> None:
        self.p = p
        self.want_t = p.t.requires_grad
        self.step = loop.stepper(p, recorded=True)
        self.history: dict[int, Tensor] = {}  # cotangents of slopes that later Adams steps looked back at
        self.carried: Tensor | None = None  # cotangent of what a stiff method's step left to the next: `left`, `start`
        self.end: Tensor | None = None  # (n,): where the forward solve had the end of the step that is taken again
        self.apart: list[Tensor] = []  # 0-d: how far each step taken again ended from there ...
        self.sizes: list[Tensor] = []  # ... and how large the state is
        self.moved: list[Tensor] = []  # tensors that are functions of the user's t ...
        self.moved_bar: list[Tensor] = []  # ... and their cotangents

    def pull(self, kept: Kept, a: Tensor, times: list[float] | Tensor, g: Tensor, params: Sum) -> Tensor:
        """Cotangents a (n,) of the end and g (M, n) of outputs within -> (n,) that of the start; adds to `params`."""
        p, interval, past, mark = self.p, kept.interval, kept.past, graph_mark()
        p.own.clear()
        y = kept.y.detach().requires_grad_()
        moving: list[Tensor] = []  # originals of the time-like inputs
        slopes: list[Tensor] = list(past.slopes) if past else []
        if self.want_t:
            moving = [interval.at, interval.dt, *(past.times if past else ())]  # type: ignore[list-item]
            moving += [times] if isinstance(times, Tensor) and len(times) else []
        inputs = [x.detach().requires_grad_() for x in moving]
        if self.want_t:
            interval = interval._replace(at=inputs[0], dt=inputs[1])
            times = inputs[-1] if isinstance(times, Tensor) and len(times) else times
        old = [k.detach().requires_grad_() for k in slopes]
        data = kept.data
        linked = getattr(data, "start", None) is not None
        if linked:
            old = [data.start.detach().requires_grad_()]
            data = data._replace(start=old[0])
        if past:
            past = Past(tuple(inputs[2 : 2 + len(old)]) if self.want_t else past.times, tuple(old))
        with torch.enable_grad():
            step = self.step(interval, y, past if data is None else data)
            outputs, bars = [step.y1], [a]
            if self.carried is not None:
                outputs.append(step.left)  # type: ignore[attr-defined]
                bars.append(self.carried)
                self.carried = None
            if len(times):
                outputs.append(interpolation.output(p, step, times))
                bars.append(g)
            if kept.slope is not None and id(kept.slope) in self.history:
                outputs.append(step.f0)  # type: ignore[attr-defined]
                bars.append(self.history.pop(id(kept.slope)))
        pairs = [(o, b) for o, b in zip(outputs, bars) if o.requires_grad]
        self.compare(step)
        grads = grad(p, [o for o, _ in pairs], [y, *p.params, *inputs, *old], [b for _, b in pairs], mark)
        y_bar, rest = grads[0], grads[1:]
        params.add(rest[: len(p.params)])
        for tensor, bar in zip(moving, rest[len(p.params) :]):
            if bar is not None and tensor.requires_grad:
                self.moved.append(tensor)
                self.moved_bar.append(bar)
        if linked:
            self.carried = rest[-1]
            return torch.zeros_like(y) if y_bar is None else y_bar  # `bdf` knows its start by the differences
        for slope, bar in zip(slopes, rest[len(p.params) + len(inputs) :]):
            if bar is not None:
                known = self.history.get(id(slope))
                self.history[id(slope)] = bar if known is None else known + bar
        assert y_bar is not None
        return y_bar

    def compare(self, step: Step) -> None:
        """Note how far a step taken again ends from where it ended in the forward solve."""
        if self.end is not None and len(self.end):
            y = step.y1.detach()
            self.apart.append(torch.linalg.vector_norm(y - self.end, torch.inf))
            self.sizes.append(torch.linalg.vector_norm(y, torch.inf))
        self.end = step.y.detach()

    def finish(self, params: Sum) -> None:
        """All steps were taken again.

        Raises:
            GradientUnavailable: they were not those of the forward solve.
        """
        if self.apart:
            apart, size = torch.stack(self.apart), torch.stack(self.sizes)
            rtol, atol = (float(on_host(x).max()) for x in (self.p.rtol, self.p.atol))
            # What tolerance and rounding explain. A step whose equations are iterated is not taken again as loosely as
            # it was taken: Newton's iteration may believe it is there when it is a few tolerances away.
            slack = 30.0 if self.p.method.controlled else 1.0
            rtol, atol = slack * rtol, slack * atol
            if not bool((apart <= atol + (rtol + 1e4 * torch.finfo(size.dtype).eps) * size).all()):
                raise other_function()

    def through(self, head: Head, a: Tensor, g: Tensor, params: Sum, again: bool) -> Tensor:
        """Cotangents a (n,) of the end of the first steps and g (m, n) of the outputs within -> (n,) that of y0."""
        p = self.p
        inputs = [p.y0, *p.params, *([p.t] if self.want_t else [])]
        pairs = [(head.y1, a)] if head.ys is None else [(head.y1, a), (head.ys, g)]
        outputs, bars = zip(*pairs)
        # What its graph reaches was looked at when it was made.
        keep = p.retain_graph or again
        y_bar, *rest = torch.autograd.grad(outputs, inputs, bars, allow_unused=True, retain_graph=keep)
        params.add(rest[: len(p.params)])
        if self.want_t and rest[-1] is not None:
            self.moved.append(p.t)
            self.moved_bar.append(rest[-1])
        assert y_bar is not None
        return y_bar

    def time_gradient(self) -> Tensor:
        """dL/dt, shape (T,)."""
        t = self.p.t
        if not self.moved:
            return torch.zeros_like(t)
        return torch.autograd.grad(self.moved, t, self.moved_bar, retain_graph=True)[0]


# ----------------------------------------------------------------------------------------------------------------------
# continuous adjoints: differentiate, then discretise
# ----------------------------------------------------------------------------------------------------------------------


def continuous(p: ODEProblem, record: Record, g: Tensor, name: str) -> Gradients:
    """Solve the adjoint equation backward in time, from output to output.

    `backsolve` solves y backward beside it: no memory of the forward solve (Chen et al. 2018).
    `interpolating` reads y off the forward solve's dense output, the integral over theta being part of the solve.
    `quadrature` integrates a df/dtheta by adaptive Gauss-Kronrod quadrature within each step.
    `gauss` integrates it by a Gauss-Kronrod pair of few points within each step of a as that step is made; where the
    two do not agree, as at a kink of f, as `quadrature` does.
    A stiff method takes the integral of the first two within its steps too: states of the size of theta would only
    make its linear systems larger.
    The last three are those of Ma, Dixit, Innes, Guo & Rackauckas, A comparison of automatic differentiation and
    continuous sensitivity analysis for derivatives of differential equation solutions, 2021.
    """
    backward = _Backward(p, record, name)
    times = reached(p, record)
    a = torch.zeros_like(p.y0)
    for i in reversed(range(1, len(times))):
        a = backward.run(times[i], times[i - 1], a + g[i], record.ys[i])
    return Gradients(a + g[0], time_gradient(p, record, g, a, _slope(p)), backward.params())


def _slope(p: ODEProblem) -> Callable[[Tensor, Tensor], Tensor] | None:
    return None if p.mass is None else dae.Algebra(p).slope


class _Backward:
    """The backward solve of a continuous adjoint, over one interval between outputs after the other."""

    def __init__(self, p: ODEProblem, record: Record, name: str) -> None:
        assert p.adjoint is not None
        self.p, self.record, self.name, self.settings = p, record, name, p.adjoint
        self.n = p.y0.numel()
        self.layout = Layout(list(p.params))
        self.total = p.y0.new_zeros(self.layout.size)
        self.with_y = name == "backsolve"
        stiff = self.settings.method.controlled
        self.with_params = name in ("backsolve", "interpolating") and not stiff
        self.linear = Linear(p, Stats("", "", "")) if stiff else None
        self.algebra = dae.Algebra(p) if p.mass is not None else None
        self.by_mass = self.place_of_mass()
        self.first_step = self.settings.options.first_step
        self.pair = gauss_kronrod(max(1, (self.settings.method.order + 1) // 2))
        self.least = self.total  # that counts of the parameters' gradients, see `filled`
        if self.layout.size:
            largest = [q.detach().abs().amax().to(p.y0) if q.numel() else p.y0.new_zeros(()) for q in p.params]
            sizes = torch.stack(largest).repeat_interleave(torch.tensor(self.layout.sizes, device=p.y0.device))
            self.parameter_sizes = torch.where(sizes > 0, sizes, 1.0)
        known = record.size if record.size is not None else record.ys.detach().abs().amax(0)
        self.size = known.clamp_min(torch.finfo(known.dtype).tiny)

    def rhs(self, t: Tensor, z: Tensor) -> Tensor:
        """z = (y?, a, theta?) -> dz/dt."""
        n, p = self.n, self.p
        y = z[:n] if self.with_y else self.record.dense.at(float(t.detach()))
        a = z[n : 2 * n] if self.with_y else z[:n]
        k, (mu, *grads) = vjp(p, t, y, a, None if self.with_params else ())
        parts = [k] if self.with_y else []
        parts.append(torch.zeros_like(a) if mu is None else -mu)
        if self.with_params:
            parts.append(-self.flat(grads))
        return torch.cat(parts)

    def place_of_mass(self) -> slice | None:
        """Where the mass matrix is among the parameters, if it is."""
        start = 0
        for x, size in zip(self.p.params, self.layout.sizes):
            if x is self.p.mass:
                return slice(start, start + size)
            start += size
        return None

    def flat(self, grads: Sequence[Tensor | None]) -> Tensor:
        filled = [torch.zeros_like(q) if g is None else g for q, g in zip(self.p.params, grads)]
        return self.layout.flatten_leaves(filled).to(self.p.y0)

    def with_mass(self, value: Tensor, t: Tensor, y: Tensor, a: Tensor) -> Tensor:
        """a df/dtheta, (|theta|,), with -a y'ᵀ where theta is the mass matrix: a d(f - M y')/dtheta."""
        if self.by_mass is not None:
            assert self.algebra is not None
            rows = self.algebra.rows
            value[self.by_mass] -= (rows(a).T @ rows(self.algebra.slope(t, y))).reshape(-1)
        return value

    def run(self, t1: float, t0: float, a: Tensor, y: Tensor) -> Tensor:
        """a(t1) -> a(t0), with the integral over theta added up."""
        p, s, n = self.p, self.settings, self.n
        if self.algebra:
            a, mu = self.algebra.adjoint_start(p.time(t1), y, a)
            self.total -= self.with_mass(self.flat(vjp(p, p.time(t1), y, mu)[1][1:]), p.time(t1), y, mu)
        z = torch.cat([*([y] if self.with_y else []), a, *([self.total] if self.with_params else [])])
        start = like(p, options=s.options).asked(t1, t0)
        rate = self.rhs(start, z) if self.linear is None else None
        if n and self.layout.size:
            self.least = 1e-3 * (a.abs() * self.size).amax() / self.parameter_sizes
        problem = ODEProblem(
            f=Field(self.rhs),
            y0=z,
            t=torch.tensor([t1, t0], dtype=torch.float64, device="cpu"),
            times=[t1, t0],
            method=s.method,
            rtol=self.extend(s.rtol),
            atol=self.extend(s.atol) if s.absolute else self.scaled(a, rate, t1 - t0),
            options=replace(s.options, first_step=self.first_step, grid_constructor=self.grid(t1, t0)),
            norm=self.norm(),
            f0=rate,
            callbacks=self.callbacks(),
            blind_to_time=True,
            **self.implicit(),
        )
        inline = self.integrate if self.layout.size and not self.with_params else None
        if s.method.kind == "scipy":
            done = scipy_ivp.solve(problem, Stats("", "", ""), dense=False)
        else:
            done = loop.solve(problem, Stats("", "", ""), on_step=inline)
        self.first_step = done.next_dt or self.first_step
        z = done.ys[-1]
        if self.with_y:
            z = z[n:]
        if self.with_params:
            self.total = z[n:]
        return z[:n] if self.linear is None else self.linear.times_mass_transposed(z[:n])

    def grid(self, t1: float, t0: float) -> Callable[[Tensor], Tensor] | None:
        """The grid of a backward solve from t1 to t0: what its own options say, or the forward solve's."""
        o, nodes = self.settings.options, self.record.nodes
        if o.step_size is not None or o.grid_constructor or nodes is None:
            return o.grid_constructor
        sign = self.p.direction
        inside = nodes[
            bisect.bisect_right(nodes, sign * t0, key=lambda t: sign * t) : bisect.bisect_left(
                nodes, sign * t1, key=lambda t: sign * t
            )
        ]
        return lambda t: t.new_tensor([t1, *reversed(inside), t0])

    def scaled(self, a: Tensor, rate: Tensor | None, span: float) -> Tensor:
        """Absolute tolerances of an adjoint that starts as `a`, in proportion to it.

        The adjoint is linear in its cotangents, and its elements have the units of the loss over those of the state:
        one per element of the state that is small. `atol` is taken for what it is of the state, a part of its size, but
        not above rtol, which would leave the adjoint without any control, and not so far below that an element which
        passes zero is all that steps are made for. This part of |a|, at most of what the largest |a y| comes to in the
        element's own unit, is its tolerance.

        Args:
            rate: slope of the whole state at its start, where it has parameters.
            span: signed length of the solve.
        """
        s, n = self.settings, self.n
        tiny, part = torch.finfo(a.dtype).tiny, self.part()
        of_a = a.abs()
        if n:
            rows = of_a.view(self.p.batch, -1)
            largest = rows.amax(1, keepdim=True).expand_as(rows).reshape(-1)
            if self.p.mass is None:
                sizes = self.size.view_as(rows)
                weight = (rows * sizes).amax(1, keepdim=True) / sizes
                largest = torch.minimum(largest, weight.reshape(-1))
            of_a = (part * largest).clamp_min(tiny)
        parts = [torch.as_tensor(s.atol, dtype=a.dtype, device=a.device).expand(n), of_a] if self.with_y else [of_a]
        if self.with_params and self.layout.size:
            assert rate is not None
            of_theta = torch.maximum(self.total.abs(), rate[-self.layout.size :].abs() * abs(span))
            parts.append((self.smallest_part() * self.filled(of_theta)).clamp_min(tiny))
        return torch.cat(parts)

    def part(self) -> Tensor:
        """atol as a part of the state's size, (n,), see `scaled`."""
        eps = torch.finfo(self.size.dtype).eps
        rtol, atol = (as_like(x, self.size).expand_as(self.size) for x in (self.settings.rtol, self.settings.atol))
        limit = torch.where(rtol > 0, rtol, torch.inf)
        return torch.minimum(torch.maximum(atol / self.size, 1e-3 * rtol), limit).clamp_min(eps)

    def smallest_part(self) -> Tensor:
        """The same for the parameters' gradients, to which every element of the state adds: 0-d."""
        part = self.part()
        return part.amin() if self.n else part.new_tensor(torch.finfo(part.dtype).eps)

    def filled(self, sizes: Tensor) -> Tensor:
        """Sizes of the parameters' gradients, (|theta|,): no element counts as smaller than 1/1000 of its tensor's.

        Nor than 1/1000 of what makes a difference to the loss, of which |a y| is the measure, when the parameter is
        changed by its own size: parameters that have no effect are not all that steps are made for.
        """
        parts = [x for x in sizes.split(self.layout.sizes) if x.numel()]
        floors = torch._foreach_norm(parts, torch.inf)
        filled = torch.cat([torch.maximum(x, 1e-3 * floor) for x, floor in zip(parts, floors)])
        return torch.maximum(filled, self.least)

    def implicit(self) -> dict[str, Any]:
        """What a stiff method needs to know of the adjoint equation: Mᵀ λ' = -Jᵀ λ, and its Jacobian."""
        if self.linear is None:
            return {}
        linear, p = self.linear, self.p
        if self.with_y:
            return {"jac": self.jacobian_with_y}

        def at(t: Tensor) -> Jacobian:
            return linear.jacobian(t, self.record.dense.at(float(t.detach())))

        if linear.free:
            products = (lambda t, v: -linear.product_transposed(at(t), v), lambda t, v: -linear.product(at(t), v))
            return {"products": products, "batch": p.batch}

        def jac(t: Tensor, z: Tensor) -> Tensor:
            J = at(t).blocks
            assert J is not None
            return -J.mT

        return {"jac": jac, "batch": p.batch, "mass": None if p.mass is None else p.mass.T}

    def jacobian_with_y(self, t: Tensor, z: Tensor) -> Tensor:
        """Of (f, -Jᵀ a) by (y, a): (2 n, 2 n)."""
        n, p, mark = self.n, self.p, graph_mark()
        with torch.enable_grad():
            y = z[:n].detach().requires_grad_()
            k = p.f(t, y)
            J, _ = forward.jacobians(p, k, y, Layout([]), mark)
            out = z.new_zeros(2 * n, 2 * n)
            out[:n, :n], out[n:, n:] = J, -J.mT
            mu = torch.autograd.grad(k, y, z[n:], create_graph=True, allow_unused=True)[0] if k.requires_grad else None
            if mu is not None and mu.requires_grad:
                for i in range(n):
                    row = torch.autograd.grad(mu[i], y, retain_graph=True, allow_unused=True)[0]
                    if row is not None:
                        out[n + i, :n] = -row
        return out

    def integrate(self, step: Step) -> None:
        """Add the integral of a df/dtheta over one step of a."""
        t0, t1 = step.interval.t0, step.interval.t1
        if self.name != "quadrature":
            fine, enough = self.agree(step, t0, t1, self.pair)
            if enough:
                self.total += fine
                return
        self.total += self.kronrod(step, t0, t1)

    def agree(self, step: Step, t0: float, t1: float, pair: Pair) -> tuple[Tensor, bool]:
        """The integral over [t1, t0] (backward in time, so that the sign is that of the forward integral), (|theta|,),
        and whether the two rules of the pair agree on it to the adjoint's tolerances."""
        fine, coarse, size = self.samples(step, t0, t1, pair)
        x = (self.total + fine).abs()
        rtol, atol = (on_host(x).min() for x in (self.settings.rtol, self.settings.atol))
        # What rounding leaves of a sum is not to be refined.
        tol = rtol.to(x) * x + 50 * torch.finfo(x.dtype).eps * size
        tol += atol.to(x) if self.settings.absolute else self.smallest_part() * self.filled(x)
        wrong = (fine - coarse) / tol.clamp_min(torch.finfo(x.dtype).tiny)
        return fine, max_rms_norm(wrong.split(self.layout.sizes)) <= 1

    def samples(self, step: Step, t0: float, t1: float, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """The integral of a df/dtheta by both rules, and that of its absolute value: (|theta|,) each."""
        p = self.p
        times = (t0 + (t1 - t0) * pair.nodes).tolist()
        with torch.no_grad():
            z = step.interpolate(times)
            a = z[:, -self.n :]
            y = z[:, : self.n] if self.with_y else self.record.dense(on_host(times))
        fine, coarse, size = self.total.new_zeros(3, self.layout.size)
        weights = (pair.weights * (t0 - t1)).tolist(), (pair.embedded * (t0 - t1)).tolist()
        for i, t in enumerate(times):
            mark, point = graph_mark(), (p.time(t), y[i].detach().requires_grad_())
            with torch.enable_grad():
                k = p.f(*point)
            value = self.flat(pull_back(p, k, p.params, a[i], mark, point))
            value = self.with_mass(value, point[0], y[i], a[i])
            fine.add_(value, alpha=weights[0][i])
            if weights[1][i]:
                coarse.add_(value, alpha=weights[1][i])
            size.add_(value.abs_(), alpha=abs(weights[0][i]))
        return fine, coarse, size

    def kronrod(self, step: Step, t0: float, t1: float, depth: int = 0) -> Tensor:
        """Adaptive 15-point Gauss-Kronrod quadrature (Piessens et al., QUADPACK, 1983) to the adjoint's tolerances."""
        fine, enough = self.agree(step, t0, t1, gauss_kronrod(7))
        if depth == 10 or enough:
            return fine
        middle = t0 + (t1 - t0) / 2
        return self.kronrod(step, t0, middle, depth + 1) + self.kronrod(step, middle, t1, depth + 1)

    def extend(self, tol: float | Tensor) -> float | Tensor:
        """Per-element tolerances of y serve y and a; theta has the tightest of them."""
        if not isinstance(tol, Tensor):
            return tol
        parts = [tol] * (2 if self.with_y else 1)
        return torch.cat([*parts, tol.min().expand(self.layout.size)]) if self.with_params else torch.cat(parts)

    def norm(self) -> Norm:
        """Largest of the norms of y, a and each parameter's gradient; without the last as a seminorm (Kidger, Chen &
        Lyons, "Hey, that's not an ODE": faster ODE adjoints via seminorms, 2021)."""
        p, s, n = self.p, self.settings, self.n
        states = 2 if self.with_y else 1
        shapes = self.layout

        def norm(z: Tensor) -> float:
            values = [p.norm(part) for part in z[: states * n].split(n)] if n else [0.0]
            if self.with_params and not s.seminorm:
                values.append(max_rms_norm(z[states * n :].split(shapes.sizes)))
            return max(values) if all(v == v for v in values) else float("nan")

        own = s.norm
        return (lambda z: not_negative(own(self.as_tuple(z)))) if own else norm

    def as_tuple(self, z: Tensor) -> tuple[Tensor, ...]:
        """The state as torchdiffeq's users know it: (vjp_t, *y, *adj_y, *adj_params). What is not part of this solve
        is zero (vjp_t, which follows from the adjoint itself; y unless `backsolve`) or missing (the parameters of a
        quadrature)."""
        layout, n = self.p.layout, self.n
        assert layout is not None
        y, a = (z[:n], z[n : 2 * n]) if self.with_y else (torch.zeros_like(z[:n]), z[:n])
        params = self.layout.leaves(z[2 * n if self.with_y else n :]) if self.with_params else []
        return (z.new_zeros(()), *layout.leaves(y), *layout.leaves(a), *params)

    def callbacks(self) -> Callbacks:
        return self.settings.callbacks.on(self.as_tuple)

    def params(self) -> list[Tensor]:
        return [g.to(q.device) for g, q in zip(self.layout.leaves(self.total), self.p.params)]


class Pair(NamedTuple):
    """Nodes on [0, 1], weights of a Kronrod rule, and of the Gauss rule within it (0 where that has no node)."""

    nodes: np.ndarray
    weights: np.ndarray
    embedded: np.ndarray


@functools.cache
def gauss_kronrod(m: int) -> Pair:
    """The Gauss rule of m points and its extension to 2 m + 1, of degree 3 m + 1 (Kronrod 1965; Piessens et al.,
    QUADPACK, 1983).

    The m + 1 nodes that are added are the zeros of Stieltjes's polynomial: E of degree m + 1 with P_m E orthogonal to
    all polynomials up to degree m, for Legendre's polynomial P_m.
    """
    legendre = np.polynomial.legendre
    x, w = legendre.leggauss(2 * m + 2)  # exact for all products here
    P = legendre.legvander(x, m + 1)
    products = np.einsum("q,q,qk,qj->kj", w, P[:, m], P[:, : m + 1], P)
    E = np.append(np.linalg.lstsq(products[:, : m + 1], -products[:, m + 1], rcond=None)[0], 1.0)
    gauss, of_gauss = legendre.leggauss(m)
    nodes = np.concatenate([gauss, legendre.legroots(E).real])
    moments = np.zeros(2 * m + 1)
    moments[0] = 2
    weights = np.linalg.solve(legendre.legvander(nodes, 2 * m).T, moments)
    return Pair((nodes + 1) / 2, weights / 2, np.append(of_gauss, np.zeros(m + 1)) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# forward: the sensitivities beside the state
# ----------------------------------------------------------------------------------------------------------------------


def solve_forward(p: ODEProblem, stats: Stats, *, dense: bool = False) -> tuple[Record, Tensor]:
    """Solve y with its sensitivities S.

    Returns:
        The record of y, and S at the outputs: (T, n, n + |theta|).
    """
    problem = replace(forward.augment(p), atol=forward.sensitivity_atol(p))
    record = loop.solve(problem, stats, dense=dense)
    return record, forward.split(p, record)
