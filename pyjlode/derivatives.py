"""Products of a vector field's Jacobians, by autograd: what both engines ask of f besides its value."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import Discovered
from .parameters import graph_mark, strangers
from .problem import ODEProblem

# What torch.func says of an f that it cannot differentiate; an error of the user's own comes again in the next call.
REFUSALS = (RuntimeError, TypeError)


def vjp(
    p: ODEProblem, t: Tensor, y: Tensor, cotangent: Tensor, wrt: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """f and the products of `cotangent` with its Jacobians.

    Args:
        t: 0-d. y, cotangent: (n,).
        wrt: what to differentiate by besides y; the parameters if None, and then whether these are all is looked at.

    Returns:
        f(t, y) without graph, and the products with respect to (y, *wrt); None where f does not depend on one.
    """
    mark = graph_mark() if wrt is None else None
    wrt = p.params if wrt is None else wrt
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        k = p.f(t, y)
    return k.detach(), pull_back(p, k, (y, *wrt), cotangent, mark, (t,))


def pull_back(
    p: ODEProblem,
    k: Tensor,
    inputs: Sequence[Tensor],
    cotangent: Tensor,
    mark: int | None,
    point: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """The product of `cotangent` with dk/dinputs; a k without graph depends on nothing.

    Args:
        point: t and y that f was called with, where they are not among the inputs: f may have asked for their gradient.
    """
    if not k.requires_grad:
        return [None] * len(inputs)
    return grad(p, [k], inputs, [cotangent], mark, point)


def grad(
    p: ODEProblem,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor],
    mark: int | None,
    point: Sequence[Tensor] = (),
    **kwargs: bool,
) -> list[Tensor | None]:
    """`torch.autograd.grad` for a graph that f is part of.

    Args:
        mark: `graph_mark()` from before that graph was made; None where it is not to be looked at.

    Raises:
        Discovered: f uses a tensor whose gradient would be lost.
    """
    kept = p.retain_graph if mark is None else check_graph(p, outputs, (*inputs, *point), mark)
    kwargs["retain_graph"] = kwargs.get("retain_graph", False) or kept
    if not inputs:
        return []
    return list(torch.autograd.grad(outputs, inputs, bars, allow_unused=True, **kwargs))


def check_graph(p: ODEProblem, outputs: Sequence[Tensor], inputs: Sequence[Tensor], mark: int) -> bool:
    """Whether a graph that f is part of must be kept, since parts of it were there before `mark`.

    Raises:
        Discovered: it reaches tensors that require grad and are neither among `inputs` nor the problem's parameters.
    """
    known = {id(x) for x in (*inputs, *p.params)} | p.own.keys()
    found, outside = strangers(outputs, known, p.cuts, mark)
    if found and not p.named:
        lost = found if not p.makes_leaves else [x for x in found if id(x) in p.strange]
        if lost:
            raise Discovered(lost)
        p.strange.update((id(x), x) for x in found)  # held, so that no other tensor gets the id
    return outside or p.retain_graph


def jacobian(p: ODEProblem, t: Tensor, y: Tensor) -> Tensor:
    """df/dy at one point: y (n,) -> (n, n), without graph."""
    if torch.is_inference_mode_enabled():  # where nothing has a graph
        with torch.inference_mode(False):
            return jacobian(p, t.clone(), y.clone())

    def f(y: Tensor) -> Tensor:
        return p.f(t.detach(), y)

    y = y.detach()
    if y.numel() == 0:
        return y.new_zeros(0, 0)
    if p.transformed:
        return pulled(torch.func.vjp(f, y)[1], torch.eye(y.numel(), dtype=y.dtype, device=y.device))[0]
    with torch.enable_grad():
        try:
            J = torch.autograd.functional.jacobian(f, y, vectorize=True)
        except RuntimeError:  # something in f has no batching rule: one backward pass a row
            J = torch.autograd.functional.jacobian(f, y)
    assert isinstance(J, Tensor)
    return J


def pulled(pull: Callable[[Tensor], tuple[Tensor, ...]], bars: Tensor) -> tuple[Tensor, ...]:
    """The products of a Jacobian with each row of bars (m, n), by what `torch.func.vjp` returned: (m, ...) each.

    It nests in transforms, as autograd with leaves of our own does not.
    """
    try:
        return torch.func.vmap(pull)(bars)
    except RuntimeError:  # something in f has no batching rule: one backward pass a row
        return tuple(torch.stack(rows) for rows in zip(*map(pull, bars)))


@functools.cache
def load_forward_mode() -> None:
    """What torch loads at the first use of its forward mode; it warns of a deprecation of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def directional(p: ODEProblem, t: Tensor, y: Tensor, dt: Tensor | None, dy: Tensor) -> Tensor:
    """Derivative of f along (dt, dy), None being zero: shape (n,). With a graph, where autograd records."""
    load_forward_mode()
    try:
        if dt is None:
            return torch.func.jvp(lambda y: p.f(t, y), (y,), (dy,))[1]
        return torch.func.jvp(p.f, (t, y), (dt.to(t), dy))[1]
    except REFUSALS:
        return directional_by_reverse(p, t, y, dt, dy)


def directional_by_reverse(p: ODEProblem, t: Tensor, y: Tensor, dt: Tensor | None, dy: Tensor | None) -> Tensor:
    """The same by the reverse mode taken twice: the product with v is linear in v, and its derivative is the answer."""
    if p.transformed:
        return nested(p, t, y, dt, dy)
    recorded = torch.is_grad_enabled()
    t, y = p.leaf(t), p.leaf(y)
    with torch.enable_grad():
        k = p.f(t, y)
        if not k.requires_grad:
            return torch.zeros_like(k)
        v = torch.zeros_like(k, requires_grad=True)
        if recorded:
            p.own[id(v)] = v
        pairs = [(x, dx.to(x)) for x, dx in ((t, dt), (y, dy)) if dx is not None]
        back = torch.autograd.grad(k, [x for x, _ in pairs], v, create_graph=True, allow_unused=True)
        terms = [(g * dx).sum() for g, (_, dx) in zip(back, pairs) if g is not None and g.requires_grad]
        if not terms:
            return torch.zeros_like(k)
        out = torch.autograd.grad(torch.stack(terms).sum(), v, create_graph=recorded, allow_unused=True)[0]
    return torch.zeros_like(k) if out is None else out


def nested(p: ODEProblem, t: Tensor, y: Tensor, dt: Tensor | None, dy: Tensor | None) -> Tensor:
    """The same under a transform."""
    dt = torch.zeros_like(t) if dt is None else dt.to(t)
    dy = torch.zeros_like(y) if dy is None else dy.to(y)
    k, pull, *_ = torch.func.vjp(p.f, t, y)
    return torch.func.vjp(pull, torch.zeros_like(k))[1]((dt, dy))[0]
