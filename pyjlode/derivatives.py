"""Products of a vector field's Jacobians, by autograd: what both engines ask of f besides its value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import GradientUnavailable
from .problem import ODEProblem


def vjp(
    p: ODEProblem, t: Tensor, y: Tensor, cotangent: Tensor, wrt: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """f and the products of `cotangent` with its Jacobians.

    Args:
        t: 0-d. y, cotangent: (n,).
        wrt: what to differentiate by besides y; the parameters if None.

    Returns:
        f(t, y) without graph, and the products with respect to (y, *wrt); None where f does not depend on one.
    """
    wrt = p.params if wrt is None else wrt
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        k = p.f(t, y)
    return k.detach(), pull_back(p, k, (y, *wrt), cotangent)


def pull_back(p: ODEProblem, k: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    """The product of `cotangent` with dk/dinputs; a k without graph depends on nothing."""
    if not k.requires_grad:
        return [None] * len(inputs)
    return grad(p, [k], inputs, [cotangent])


def grad(
    p: ODEProblem, outputs: Sequence[Tensor], inputs: Sequence[Tensor], bars: Sequence[Tensor], **kwargs: bool
) -> list[Tensor | None]:
    """`torch.autograd.grad` for a graph that f is part of.

    Raises:
        GradientUnavailable: f uses a tensor whose gradient would be lost.
    """
    hidden = [x for x in (ref() for ref in p.suspects) if x is not None]
    kwargs = {"retain_graph": p.retain_graph, **kwargs}
    grads = torch.autograd.grad(outputs, [*inputs, *hidden], bars, allow_unused=True, **kwargs)
    for x, g in zip(hidden, grads[len(inputs) :]):
        if g is not None:
            raise GradientUnavailable(
                f"f uses the result of an earlier operation, of shape {tuple(x.shape)}, that it did not use at t[0], "
                "where its tensors are found. Name it, with the others to differentiate by, in adjoint_params, or use "
                "it at t[0] too (times 0, say)."
            )
    return list(grads[: len(inputs)])


def jacobian(p: ODEProblem, t: Tensor, y: Tensor) -> Tensor:
    """df/dy at one point: y (n,) -> (n, n), without graph."""

    def f(y: Tensor) -> Tensor:
        return p.f(t.detach(), y)

    y = y.detach()
    if y.numel() == 0:
        return y.new_zeros(0, 0)
    with torch.enable_grad():
        try:
            J = torch.autograd.functional.jacobian(f, y, vectorize=True)
        except RuntimeError:  # something in f has no batching rule: one backward pass a row
            J = torch.autograd.functional.jacobian(f, y)
    assert isinstance(J, Tensor)
    return J
