"""Memory that both sides look at: tensors for Julia, and Julia's arrays as tensors, without a copy."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .places import CUDA, Place


class Lent(ctypes.Structure):
    """`length` numbers at an address; the layout is that of `Lent` in julia/src/memory.jl."""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_int64))


class Shown(ctypes.Structure):
    """A structure that Julia reads or writes."""

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class Lender(Shown):
    """A structure of lent memory that Julia reads.

    Attributes:
        tensors, arrays: what was lent. Whatever Julia makes of it keeps this structure (`calls.Held`): there is no
            other way to lend, so nothing lent can be freed too early.
    """

    def __init__(self, **numbers: float) -> None:
        super().__init__(**numbers)
        self.tensors: dict[str, Tensor] = {}
        self.arrays: dict[str, Any] = {}

    def lend(self, **tensors: Tensor) -> None:
        """Lend the memory of tensors under the names of fields of type `Lent`.

        Args:
            tensors: any shape, contiguous, where Julia looks for them: states and cotangents where the field is, all
                else on the CPU. Row-major (a, b) is column-major (b, a) in Julia.
        """
        self.tensors |= tensors
        for name, x in tensors.items():
            assert x.is_contiguous()
            assert x.is_cpu or name in _STATES
            setattr(self, name, Lent(x.data_ptr(), x.numel()))

    def lend_numbers(self, **numbers: Sequence[float]) -> None:
        """Lend Python's numbers as float64; a tensor of a few of them would take ten times as long to make."""
        for name, values in numbers.items():
            if values:
                array = self.arrays[name] = (ctypes.c_double * len(values))(*values)
                setattr(self, name, Lent(ctypes.addressof(array), len(values)))

    def lend_tolerances(self, rtol: float | Tensor, atol: float | Tensor) -> None:
        """One number each, or one for each of the state."""
        for name, tol in (("rtol", rtol), ("atol", atol)):
            if isinstance(tol, Tensor):
                self.lend(**{name: tol.to("cpu", torch.float64).reshape(-1).contiguous()})
            else:
                self.lend_numbers(**{name: (tol,)})


# What is as large as a state, and lies where the field is.
_STATES = ("u0", "out", "du0", "dp", "g")

# How steps are chosen.
_STEPPING = ("first_step", "min_step", "max_step", "beta1", "beta2", "gamma", "qmin", "qmax")


class Request(Lender):
    """What a solve is asked for; `Request` in julia/src/memory.jl says what each field is."""

    _fields_ = (
        *((name, Lent) for name in ("u0", "out", "times", "offsets", "rtol", "atol", "stops", "jumps", "mass")),
        *((name, Lent) for name in ("a", "c", "p", "e")),
        *((name, ctypes.c_double) for name in _STEPPING),
        *((name, ctypes.c_int64) for name in ("max_steps", "fixed", "dense", "keep", "full")),
        *((name, ctypes.c_int64) for name in ("stages", "fsal", "order")),
    )


class AdjointRequest(Lender):
    """What an adjoint is asked for; `AdjointRequest` in julia/src/memory.jl."""

    _fields_ = (
        *((name, Lent) for name in ("du0", "dp", "g", "times", "rtol", "atol", "stops", "jumps", "slopes")),
        *((name, ctypes.c_double) for name in _STEPPING),
        ("max_steps", ctypes.c_int64),
    )


class ReplayRequest(Lender):
    """What a replay is asked for; `ReplayRequest` in julia/src/memory.jl."""

    # The first three are an argument of their own in each call.
    _fields_ = (
        *((name, Lent) for name in ("du0", "dp", "g", "times", "a", "c", "p")),
        ("stages", ctypes.c_int64),
        ("atol", ctypes.c_double),
    )


class Replayed(Shown):
    """How a replay went; `Replayed` in julia/src/memory.jl says what each field is."""

    _fields_ = (("apart", ctypes.c_double), ("nf", ctypes.c_int64))


class Functions(Shown):
    """Addresses of the C functions of a vector field, 0 for none; `Functions` in julia/src/memory.jl."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "parameters", "kind", "device")),
        *((name, ctypes.c_void_p) for name in ("stream", "f", "jac", "tgrad", "jvp", "vjp", "vjp_p", "event")),
    )


class CompiledFunctions(Lender):
    """A field of compiled functions; `CompiledFunctions` in julia/src/compiled.jl says what each field is."""

    _fields_ = (
        ("n", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("f", "jac", "tgrad", "jvp", "vjp", "vjp_p", "event", "keep")),
        ("kept", ctypes.c_int64),
        *((name, Lent) for name in ("theta", "constants", "work", "columns", "rows", "layers")),
    )


class Outcome(Shown):
    """How a solve went; `Outcome` in julia/src/memory.jl says what each field is."""

    _fields_ = (
        ("code", ctypes.c_char_p),
        *((name, ctypes.c_double) for name in ("t", "dt", "event_time")),
        *(
            (name, ctypes.c_int64)
            for name in ("naccept", "nreject", "njac", "nlu", "nnewton", "nf", "system", "finite")
        ),
    )

    @property
    def succeeded(self) -> bool:
        return self.code in (b"Success", b"Terminated", b"Default") and bool(self.finite)


class Systems(Lender):
    """The independent systems of a sweep; `Systems` in julia/src/memory.jl says what each field is."""

    _fields_ = (("count", ctypes.c_int64), *((name, Lent) for name in ("places", "values", "slopes")))


class Abreast(Lender):
    """The systems of a sweep of eight at a time; `Abreast` in julia/src/abreast.jl says what each field is."""

    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, Lent) for name in ("places", "values", "slopes")),
        ("f", ctypes.c_void_p),
        *((name, Lent) for name in ("a", "c", "p", "e")),
        *((name, ctypes.c_int64) for name in ("stages", "fsal", "order", "own", "go_on")),
        *((name, Lent) for name in ("naccept", "nreject", "codes", "ends", "b", "d", "gammas")),
        ("gamma", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("jac", "tgrad", "event")),
        *((name, ctypes.c_int64) for name in ("margins", "event_parameters", "event_work", "direction")),
        *((name, Lent) for name in ("event_numbers", "event_places", "event_values")),
        *((name, Lent) for name in ("event_times", "event_slopes", "event_margins")),
    )


class PullRequest(Lender):
    """What the gradient of such a sweep is asked for; `PullRequest` in julia/src/abreast.jl."""

    _fields_ = (
        *((name, Lent) for name in ("du0", "dp", "dv", "g", "dt", "states")),
        *((name, ctypes.c_void_p) for name in ("pull", "bend")),
    )


class Views(dict[int, Tensor]):
    """Address -> tensor that looks at Julia's array there; made when first asked for.

    Args:
        place, shape, dtype: of every array.
        owner: kept by each tensor and by whatever shares its memory: a tensor that the user kept is never left looking
            at memory that Julia has taken back.
    """

    def __init__(self, place: Place, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.place, self.shape, self.dtype = place, shape, dtype
        self.owner: object = None

    def __missing__(self, address: int) -> Tensor:
        x = self[address] = self.place.look(address, self.shape.numel(), self.dtype, self.owner).view(self.shape)
        return x

    def kept(self) -> bool:
        """Whether somebody besides these views holds one of the tensors, or another tensor of its memory."""
        # References here: the dictionary, the loop, and the call that counts; of the memory: the tensor, the storage
        # that is asked, and that which Python holds of it.
        return any(
            sys.getrefcount(x) > 3 or torch._C._storage_Use_Count(x.untyped_storage()._cdata) > 3 for x in self.values()
        )


class Clock:
    """The time as a tensor that is not made anew for each call of f, but set.

    Attributes:
        cell: set its `value`.
        tensor: 0-d, looks at it.
    """

    def __init__(self, place: Place, dtype: torch.dtype) -> None:
        self.cell: Any
        if place.kind == CUDA:
            self.tensor = torch.zeros((), dtype=dtype, device=place.device)
            self.cell = _Filled(self.tensor)
        else:
            self.cell = ctypes.c_float() if dtype == torch.float32 else ctypes.c_double()
            self.tensor = torch.frombuffer(self.cell, dtype=dtype).view(())
        self.storage = self.tensor.untyped_storage()._cdata
        self.references, self.uses = sys.getrefcount(self.tensor), torch._C._storage_Use_Count(self.storage)

    def kept(self) -> bool:
        """Whether somebody else holds the tensor, or another one of its memory: it must not be set any more."""
        return sys.getrefcount(self.tensor) > self.references or torch._C._storage_Use_Count(self.storage) > self.uses


class _Filled:
    """A tensor on a device as a cell: a number goes there with the launch that sets it, and nothing waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "value":
            self.tensor.fill_(value)
        else:
            super().__setattr__(name, value)
