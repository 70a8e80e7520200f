"""Where the arrays of a solve are, on the host or on a device, and how memory there is looked at without a copy."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Kinds of devices, as `DEVICES` in julia/src/memory.jl has them, and the Julia package of each that is not the host.
HOST, CUDA = 0, 1
PACKAGES = {CUDA: "CUDA"}


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
    return Place(CUDA if x.device.type == "cuda" else HOST, x.device)
