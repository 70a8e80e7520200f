"""Memory that both sides look at: tensors for Julia, and Julia's arrays as tensors, without a copy."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

JULIA_TYPES = {torch.float32: "Float32", torch.float64: "Float64", torch.int64: "Int64"}


def borrow(jl: Any, x: Tensor) -> Any:
    """A tensor as Julia's `Borrowed`: its memory, and the tensor itself, which Julia keeps for as long as it.

    Args:
        x: any shape, contiguous, on the CPU; float32, float64 or int64. Row-major (a, b) is column-major (b, a).
    """
    assert x.is_contiguous()
    assert x.device.type == "cpu"
    return jl.Borrowed(x.data_ptr(), x.numel(), x, getattr(jl, JULIA_TYPES[x.dtype]))


class Views(dict[int, Tensor]):
    """Address -> tensor that looks at Julia's array there; made when first asked for.

    Args:
        shape, dtype: of every array.
        owner: what keeps the arrays alive. Each tensor, and whatever shares its memory, holds it: a tensor that the
            user kept is never left looking at memory that Julia has taken back.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.nbytes = shape.numel() * dtype.itemsize
        self.owner: Any = None

    def __missing__(self, address: int) -> Tensor:
        buffer = (ctypes.c_char * self.nbytes).from_address(address)
        buffer.owner = self.owner  # type: ignore[attr-defined]  # the tensor holds the buffer
        x = torch.frombuffer(buffer, dtype=self.dtype).view(self.shape)
        self[address] = x
        return x


def look(address: int, n: int, dtype: torch.dtype) -> Tensor:
    """Shape (n,): a tensor that looks at memory for the duration of a callback; never to be given to the user."""
    return torch.frombuffer((ctypes.c_char * (n * dtype.itemsize)).from_address(address), dtype=dtype)
