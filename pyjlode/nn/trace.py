"""The divergence of a vector field, tr(df/dh): exact, or estimated without the Jacobian."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BadOption

TRACES = ("exact", "hutchinson")
NOISES = ("rademacher", "gaussian")


class Divergence(NamedTuple):
    """tr(df/dh) and the squared Frobenius norm of df/dh, or estimates: shape (...) for `h` of shape (..., D)."""

    trace: Tensor
    frobenius: Tensor


def exact(dh: Tensor, h: Tensor, *, create_graph: bool) -> Divergence:
    """From the Jacobian, row by row: D products for `h` of shape (..., D).

    Args:
        dh: shape (..., D), with its graph from `h`. No element of the batch may depend on another.
        create_graph: whether the result is to be differentiated.
    """
    rows = [
        _vjp(dh, h, v.expand_as(dh), create_graph) for v in torch.eye(h.shape[-1], dtype=dh.dtype, device=dh.device)
    ]
    J = torch.stack(rows, -2)
    return Divergence(J.diagonal(dim1=-2, dim2=-1).sum(-1), J.square().sum((-2, -1)))


def hutchinson(dh: Tensor, h: Tensor, probes: Tensor, *, create_graph: bool) -> Divergence:
    """Estimates from products with random vectors e: E[e·Je] = tr J and E|Jᵀe|² = |J|² where E[e eᵀ] is the identity.

    Args:
        dh: shape (..., D), with its graph from `h`. No element of the batch may depend on another.
        probes: shape (P, ..., D); the result is the mean over the P of them.
        create_graph: whether the result is to be differentiated.

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines,
    1989; for flows Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, FFJORD, 2018, equation 7.
    """
    products = torch.stack([_vjp(dh, h, e.to(dh), create_graph) for e in probes])
    return Divergence((products * probes).sum(-1).mean(0), products.square().sum(-1).mean(0))


def draw(noise: str, probes: int, like: Tensor) -> Tensor:
    """Random vectors for `hutchinson`, of mean zero and of the identity as covariance: shape (probes, *like.shape).

    Raises:
        BadOption: no such noise.
    """
    shape = (probes, *like.shape)
    if noise == "rademacher":
        return torch.randint(0, 2, shape, device=like.device).to(like.dtype) * 2 - 1
    if noise == "gaussian":
        return torch.randn(shape, dtype=like.dtype, device=like.device)
    raise BadOption(f"noise must be one of {', '.join(NOISES)}; got {noise!r}.")


def _vjp(dh: Tensor, h: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    if not dh.requires_grad:  # f looks at nothing
        return torch.zeros_like(h)
    return torch.autograd.grad(dh, h, v, retain_graph=True, create_graph=create_graph, materialize_grads=True)[0]
