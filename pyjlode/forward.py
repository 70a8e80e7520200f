"""Forward sensitivities: a problem whose state is the state and its derivatives, for either engine to solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .derivatives import grad
from .errors import GradientUnavailable
from .gradients import Gradients, time_gradient
from .numbers import as_like, null_spaces
from .parameters import graph_mark
from .problem import Field, Layout, ODEProblem, rms_norm


class _Record(Protocol):
    ys: Tensor
    dense: Any
    event_t: float | None


def augment(p: ODEProblem) -> ODEProblem:
    """The problem of y with S = dy/d(y0, theta): S' = df/dy S + (0, df/dtheta) (Hairer, Nørsett & Wanner I.14).

    With a mass matrix M it is M S' = df/dy S + (0, df/dtheta), and the algebraic part of S is at the start what the
    derivative of the algebraic equations says.

    Returns:
        `p` with the flat state (y, S), S of shape (n, n + |theta|) row by row, its Jacobian and its mass matrix.
    """
    n, layout = p.y0.numel(), Layout(list(p.params))
    width = n + layout.size
    M = None if p.mass is None else torch.block_diag(*[p.mass.detach().to(p.y0)] * p.batch)

    def rhs(t: Tensor, z: Tensor) -> Tensor:
        mark = graph_mark()
        with torch.enable_grad():
            y = z[:n].detach().requires_grad_()
            k = p.f(t, y)
        J, rows = jacobians(p, k, y, layout, mark)
        S = J @ z[n:].view(n, width)
        S[:, n:] += rows
        return torch.cat([k.detach(), S.reshape(-1)])

    def norm(z: Tensor) -> float:
        return max(p.norm(z[:n]), rms_norm(z[n:]))

    def extend(tol: float | Tensor) -> float | Tensor:
        return torch.cat([tol, tol[:, None].expand(n, width).reshape(-1)]) if isinstance(tol, Tensor) else tol

    S0 = torch.eye(n, width, dtype=p.y0.dtype, device=p.y0.device)
    if M is not None:
        S0 = consistent(p, M, S0, layout)
    event = p.event_fn
    return replace(
        p,
        f=Field(rhs),
        y0=torch.cat([p.y0, S0.reshape(-1)]),
        f0=None,
        split=None,
        jac=Jacobian(p, rhs) if p.method.controlled or p.method.kind == "julia" else None,
        mass=None
        if M is None
        else torch.block_diag(M, torch.kron(M, torch.eye(width, dtype=M.dtype, device=M.device))),
        batch=1,
        norm=norm,
        rtol=extend(p.rtol),
        atol=extend(p.atol),
        event_fn=(lambda t, z: event(t, z[:n])) if event else None,
        callbacks=p.callbacks.on(lambda z: z[:n]),
    )


def consistent(p: ODEProblem, M: Tensor, S: Tensor, layout: Layout) -> Tensor:
    """S with its algebraic part as the derivative of the algebraic equations has it: (n, n + |theta|).

    Args:
        M: the mass matrix of the whole state, (n, n).
    """
    N, V = null_spaces(M)
    if not N.shape[1]:
        return S
    n, mark = len(S), graph_mark()
    with torch.enable_grad():
        y = p.y0.detach().requires_grad_()
        k = p.f(p.time(p.times[0]), y)
    J, rows = jacobians(p, k, y, layout, mark)
    change = J @ S
    change[:, n:] += rows
    return S - V @ torch.linalg.solve(N.T @ J @ V, N.T @ change)


def sensitivity_atol(p: ODEProblem) -> Tensor:
    """atol of (y, S), flat. dy/dx has the unit of y over that of x: the size of x, which for a start below what the
    tolerances resolve is atol / rtol, and for a parameter that is zero the largest in its tensor, or 1."""
    n, y0, rtol = p.y0.numel(), p.y0.detach(), as_like(p.rtol, p.y0)
    atol = as_like(p.atol, y0).expand(n)
    resolved = torch.where(rtol > 0, atol / rtol, atol)
    sizes = [torch.maximum(y0.abs(), resolved)]
    layout = Layout(list(p.params))
    for x in layout.flatten_leaves([q.detach() for q in p.params]).to(y0).abs().split(layout.sizes) if p.params else ():
        sizes.append(torch.where(x > 0, x, x.amax() if x.numel() and bool(x.any()) else torch.ones_like(x)))
    return torch.cat([atol, (atol[:, None] / torch.cat(sizes)).reshape(-1)])


def split(p: ODEProblem, record: _Record) -> Tensor:
    """Leave of the record of the augmented problem that of y; return S at the outputs, (T, n, n + |theta|)."""
    n = p.y0.numel()
    if whole := record.dense:
        record.dense = lambda times: whole(times)[:, :n]
    width = record.ys.shape[1] // n - 1 if n else Layout(list(p.params)).size
    S = record.ys[:, n:].reshape(len(record.ys), n, width)
    S[0] = torch.eye(*S.shape[1:], dtype=S.dtype, device=S.device)  # y(t0) is y0 itself
    record.ys = record.ys[:, :n].clone()
    return S


def contract(
    p: ODEProblem, record: _Record, S: Tensor, g: Tensor, slope: Callable[[Tensor, Tensor], Tensor] | None
) -> Gradients:
    """The gradients, from the sensitivities S (T, n, n + |theta|) and the cotangents g (T, n) at the outputs.

    Args:
        slope: (t, y) -> y', where it is not f.
    """
    n, layout = p.y0.numel(), Layout(list(p.params))
    flat = g.reshape(-1) @ S.reshape(g.numel(), S.shape[2])
    t = None
    if p.t.requires_grad:
        a = g[1:].reshape(-1) @ S[1:, :, :n].reshape(g[1:].numel(), n)
        t = time_gradient(p, record, g, a, slope)
    return Gradients(flat[:n], t, [x.to(q.device, q.dtype) for x, q in zip(layout.leaves(flat[n:]), p.params)])


class Jacobian:
    """The Jacobian of `(y, S) -> (f, J S + (0, df/dtheta))`, with that of its second half by y, which has second
    derivatives of f, by central differences."""

    def __init__(self, p: ODEProblem, rhs: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.p, self.rhs = p, rhs

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        n, mark = self.p.y0.numel(), graph_mark()
        with torch.enable_grad():
            y = z[:n].detach().requires_grad_()
            k = self.p.f(t, y)
        J, _ = jacobians(self.p, k, y, Layout([]), mark)
        width = len(z) // n - 1
        out = torch.block_diag(J, torch.kron(J, torch.eye(width, dtype=J.dtype, device=J.device)))
        size = z[:n].abs()
        floor = 1e-4 * (size.amax() if n and bool(size.any()) else torch.ones_like(z[0]))
        steps = torch.finfo(z.dtype).eps ** (1 / 3) * torch.maximum(size, floor)
        for i, step in enumerate(steps.tolist()):
            e = torch.zeros_like(z)
            e[i] = step
            out[n:, i] = ((self.rhs(t, z + e) - self.rhs(t, z - e)) / (2 * step))[n:]
        return out

    def rate(self, t: Tensor, z: Tensor) -> Tensor:
        """The derivative of the right-hand side by time, (n + n (n + |theta|),), by a difference within the solve."""
        ends = self.p.times[0], self.p.times[-1]
        step = torch.finfo(z.dtype).eps ** (1 / 3) * max(1e-3, abs(ends[1] - ends[0]))
        a, b = max(min(ends), float(t) - step), min(max(ends), float(t) + step)
        return (self.rhs(self.p.time(b), z) - self.rhs(self.p.time(a), z)) / (b - a)


def jacobians(p: ODEProblem, k: Tensor, y: Tensor, layout: Layout, mark: int) -> tuple[Tensor, Tensor]:
    """dk/dy (n, n) and dk/dtheta (n, |theta|).

    Args:
        mark: `graph_mark()` from before k was made.
    """
    n = len(k)
    inputs = (y, *p.params)
    if not k.requires_grad or n == 0:
        return y.new_zeros(n, n), y.new_zeros(n, layout.size)
    eye = torch.eye(n, dtype=k.dtype, device=k.device)
    rows: list[Tensor] = []
    try:
        batch = grad(p, [k], inputs, [eye], mark, is_grads_batched=True, retain_graph=True)
        J, *rest = (x.new_zeros(n, *x.shape) if b is None else b for x, b in zip(inputs, batch))
        per_row: list[list[Tensor]] = [[x[i] for x in rest] for i in range(n)]
    except GradientUnavailable:
        raise
    except RuntimeError:  # something in f has no batching rule
        each = [grad(p, [k], inputs, [e], mark, retain_graph=True) for e in eye]
        full = [[torch.zeros_like(x) if b is None else b for x, b in zip(inputs, grads)] for grads in each]
        J, per_row = torch.stack([grads[0] for grads in full]), [grads[1:] for grads in full]
    rows = [layout.flatten_leaves(grads).to(y) for grads in per_row]
    return J, torch.stack(rows)
