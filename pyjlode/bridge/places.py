"""Where the arrays of a solve are, on the host or on a device, and how memory there is looked at without a copy."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Kinds of devices, as `DEVICES` in julia/src/memory.jl has them.
HOST, CUDA, STAND_IN = 0, 1, 2

# The Julia package of each kind that is not the host's.
PACKAGES = {CUDA: "CUDA", STAND_IN: "JLArrays"}

_standing_in = False


class Place(NamedTuple):
    """A device of one kind."""

    kind: int
    device: torch.device

    def stream(self) -> int | None:
        """PyTorch's current stream there, as CUDA knows it."""
        return torch.cuda.current_stream(self.device).cuda_stream or None if self.kind == CUDA else None

    def look(self, address: int, n: int, dtype: torch.dtype, owner: object = None) -> Tensor:
        """Shape (n,): a tensor that looks at memory there.

        Args:
            owner: kept for as long as the tensor, or what shares its memory.
        """
        if n == 0:
            return torch.empty(0, dtype=dtype, device=self.device)
        if self.kind == CUDA:
            return torch.as_tensor(_OnDevice(address, n, dtype, owner), device=self.device)
        buffer = (ctypes.c_char * (n * dtype.itemsize)).from_address(address)
        buffer.owner = owner  # type: ignore[attr-defined]  # the tensor holds the buffer
        return torch.frombuffer(buffer, dtype=dtype)


class _OnDevice:
    """An array on a CUDA device: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 2."""

    def __init__(self, address: int, n: int, dtype: torch.dtype, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (n,),
            "typestr": f"<f{dtype.itemsize}",
            "data": (address, False),
            "version": 2,
        }


def of(x: Tensor) -> Place:
    """Where a tensor's memory is."""
    if x.device.type == "cuda":
        return Place(CUDA, x.device)
    return Place(STAND_IN if _standing_in else HOST, x.device)


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Within this context states on the host are given to Julia as arrays that behave as a device's (JLArrays.jl): for
    tests of what is done on devices, without one."""
    global _standing_in
    _standing_in = True
    try:
        yield
    finally:
        _standing_in = False
