"""Irregular, partly observed series: one form for a batch of them, and the union of their times."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BadShape, BadTime


class Series(NamedTuple):
    """A batch of series.

    Attributes:
        x: shape (B, T, D), the values; zero where they were not observed.
        t: shape (B, T), their times, not decreasing along each row.
        mask: shape (B, T, D), bool: what was observed.
    """

    x: Tensor
    t: Tensor
    mask: Tensor

    @property
    def observed(self) -> Tensor:
        """Shape (B, T), bool: where anything was observed."""
        return self.mask.any(-1)


def series(x: Tensor, t: Tensor, mask: Tensor | None, t0: float) -> Series:
    """Check a batch of series and bring it into one form.

    Args:
        x: shape (B, T, D). What is masked may be anything, NaN too.
        t: shape (T,), the same for all, or (B, T); not decreasing, and not before `t0`. Rows that are shorter than
            others are filled up with their last time, and masked there.
        mask: shape (B, T, D) or (B, T), true where observed; None is everywhere.
        t0: the time that no series begins before.

    Raises:
        BadShape: shapes do not fit together.
        BadTime: times decrease, come before `t0`, or require grad (there is none here with respect to times).
    """
    if x.dim() != 3:
        raise BadShape(f"x must be of shape (batch, times, features); got {tuple(x.shape)}.")
    if t.shape not in (x.shape[:2], x.shape[1:2]):
        raise BadShape(f"t must be of shape {tuple(x.shape[1:2])} or {tuple(x.shape[:2])}; got {tuple(t.shape)}.")
    check_times(t, t0)
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    if mask.shape not in (x.shape, x.shape[:2]):
        raise BadShape(f"mask must be of shape {tuple(x.shape)} or {tuple(x.shape[:2])}; got {tuple(mask.shape)}.")
    if mask.dim() == 2:
        mask = mask[..., None]
    mask = mask.bool().expand(x.shape)
    return Series(torch.where(mask, x, 0), t.expand(x.shape[:2]), mask)


def check_times(t: Tensor, t0: float) -> None:
    """Raise BadTime unless there are times (..., T) that do not decrease or come before `t0`, and have no gradient."""
    if t.dim() == 0 or t.shape[-1] == 0:
        raise BadTime(f"there must be at least one time; t has shape {tuple(t.shape)}.")
    if t.requires_grad:
        raise BadTime("this model gives no gradient with respect to times; pass t.detach().")
    if t.numel() and bool((t.diff(dim=-1) < 0).any()):
        raise BadTime("times must not decrease along a series.")
    if t.numel() and float(t.min()) < t0:
        raise BadTime(f"times must not come before the latent state's, t0={t0:g}; the first is {float(t.min()):g}.")


def own_times(t: Tensor) -> tuple[Tensor, Tensor]:
    """The times of each row, each once.

    Args:
        t: shape (B, T), not decreasing along each row.

    Returns:
        `(times, index)`: shape (B, U), each row strictly increasing and then filled up with its last time; and where
        the times of t stand there, (B, T): `times.gather(1, index) == t`.
    """
    index = torch.cat([torch.zeros_like(t[:, :1]), (t.diff(dim=1) > 0).to(t)], 1).cumsum(1).long()
    times = t[:, -1:].repeat(1, int(index.max()) + 1)
    return times.scatter(1, index, t), index


def union_of_times(*t: Tensor) -> tuple[Tensor, list[Tensor]]:
    """All times of several tensors, each once.

    Args:
        t: tensors of any shapes, of one dtype and device.

    Returns:
        `(union, index)`: shape (U,), strictly increasing; and for each tensor where its times stand in the union, of
        its own shape: `union[index[i]] == t[i]`.
    """
    union, index = torch.unique(torch.cat([x.reshape(-1) for x in t]), return_inverse=True)
    parts = index.split([x.numel() for x in t])
    return union, [part.reshape(x.shape) for part, x in zip(parts, t)]
