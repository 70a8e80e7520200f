"""Calls into PyJLODE.jl: C functions by address, Julia objects by number, failures as exceptions."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch

from ..errors import JuliaError
from .memory import (
    Abreast,
    AdjointRequest,
    CompiledFunctions,
    Functions,
    Outcome,
    PullRequest,
    Replayed,
    ReplayRequest,
    Request,
    Systems,
)

_I, _P = ctypes.c_int64, ctypes.c_void_p

# By name, as julia/src/calls.jl has them: result, arguments.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "failure": (ctypes.c_char_p,),
    "field": (_I, _I, _P),
    "stream": (_I, _I, _P),
    "compiled_field": (_I, _I, _P),
    "prepare": (_I, _I),
    "compile": (_I, _I, ctypes.c_char_p),
    "compile_packed": (_I, _I, ctypes.c_char_p),
    "abreast": (_I, _I, _P, _P, _P),
    "pull": (_I, _I, _P),
    "source": (_I, _I, _I, _I, _I, _I, _I),
    "parts": (_I, _I, _I, _I),
    "source_function": (_I, ctypes.c_char_p),
    "evaluate": (_I, _I, _I, _I, _I, _I, _I, _I, ctypes.c_double),
    "algorithm": (_I, ctypes.c_char_p),
    "solve": (_I, _I, _I, _P, _P),
    "repeated": (_I, _I, _I, _P),
    "again": (_I, _I, _I, _I, _P),
    "sweep": (_I, _I, _I, _P, _P, _P),
    "interpolate": (_I, _I, _I, _I, _I),
    "interpolate_all": (_I, _I, _I, _I, _I, _I),
    "adjoint": (_I, _I, ctypes.c_char_p, _I, _P, _P),
    "replay": (_I, _I, _P, _P, _P, _I, _P),
    "release": (_I, _P, _I),
    "collect": (_I, _I),
}


class _Ref(weakref.ref):
    """Says when a `Held` is gone, without a line of Python: an exception of a signal handler's that came there would be
    lost, and the object kept for ever."""

    __slots__ = ("number",)
    number: int


class Held:
    """A Julia object, which Julia keeps for as long as this lives.

    Attributes:
        number: what Julia knows it by.
        kept: what must live as long as the object, such as memory that it looks at.
    """

    def __init__(self, number: int, refs: set[_Ref], dropped: list[_Ref], kept: object = None) -> None:
        self.number, self.kept = number, kept
        # On whatever thread it goes, and perhaps within a solve: Julia hears of it at the next call.
        ref = _Ref(self, dropped.append)
        ref.number = number
        refs.add(ref)

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "what the Julia engine keeps of a solve (its dense output) lives in this process and cannot be pickled; "
            "save the states `h` and times `t`, or solve with engine='torch'."
        )


class Calls:
    """The functions of PyJLODE.jl, for a thread that is within `runtime.julia()`.

    Calls by ctypes take a few microseconds; through juliacall they take some hundred, and the first ones a second, for
    every argument is converted by what it is. The lock of Python stays held: the solver calls back f at once.

    Args:
        addresses: of each function, by name.

    Attributes:
        done: what a callback sets to 1 as its last act; else Julia takes it that it failed.

    Raises:
        JuliaError: of all methods, what Julia raised, by its text.
    """

    def __init__(self, addresses: dict[str, int]) -> None:
        self._c = {name: ctypes.PYFUNCTYPE(*types)(addresses[name]) for name, types in _SIGNATURES.items()}
        self.done = _I.from_address(addresses["done"])
        self._refs: set[_Ref] = set()
        self._dropped: list[_Ref] = []

    def release_dropped(self) -> None:
        """Let Julia let go of the objects whose `Held` is gone."""
        if dropped := self._dropped[:]:
            del self._dropped[: len(dropped)]
            self._refs.difference_update(dropped)
            self._c["release"]((_I * len(dropped))(*[ref.number for ref in dropped]), len(dropped))

    def field(self, dtype: torch.dtype, functions: Functions) -> Held:
        """A field behind C functions, which the caller keeps for as long as it is called."""
        return self._held(self._c["field"](_bits(dtype), functions.address))

    def stream(self, field: Held, stream: int | None) -> None:
        """Have the work of a field go to this CUDA stream, None being the default one."""
        self._check(self._c["stream"](field.number, stream))

    def compiled_field(self, dtype: torch.dtype, functions: CompiledFunctions) -> Held:
        """A field of compiled functions, which keeps what was lent."""
        return self._held(self._c["compiled_field"](_bits(dtype), functions.address), functions)

    def prepare(self, field: Held) -> None:
        """Have the functions of a compiled field, called by address, see the values that it now holds."""
        self._check(self._c["prepare"](field.number))

    def compile(self, dtype: torch.dtype, text: str) -> int:
        """The address of the C function of a generated Julia function: `compile` in julia/src/compiled.jl."""
        address = self._c["compile"](_bits(dtype), text.encode())
        self._check(address)
        return address

    def compile_packed(self, dtype: torch.dtype, text: str) -> int:
        """The same, of eight systems at once: `compile_packed` in julia/src/packs.jl."""
        address = self._c["compile_packed"](_bits(dtype), text.encode())
        self._check(address)
        return address

    def source(self, dtype: torch.dtype, n: int, function: Held, theta: torch.Tensor, event: int) -> Held:
        """A field that is Julia code, with parameters `theta`, shape (m,), which are copied."""
        return self._held(
            self._c["source"](_bits(dtype), n, function.number, theta.data_ptr(), theta.numel(), event), function
        )

    def parts(self, stiff: Held, other: Held, event: int) -> Held:
        """The field that is their sum, of which the first is solved implicitly."""
        return self._held(self._c["parts"](stiff.number, other.number, event), (stiff, other))

    def source_function(self, text: str) -> Held:
        """The function that Julia source text defines."""
        return self._held(self._c["source_function"](text.encode()))

    def evaluate(self, function: Held, out: torch.Tensor, u: torch.Tensor, p: torch.Tensor, t: float) -> None:
        """out, shape (n,), of such a function at u, shape (n,), with parameters p, shape (m,): of one dtype."""
        tensors = (out.data_ptr(), u.data_ptr(), u.numel(), p.data_ptr(), p.numel())
        self._check(self._c["evaluate"](_bits(u.dtype), function.number, *tensors, t))

    def algorithm(self, text: str) -> Held:
        """The solver that a Julia expression makes."""
        return self._held(self._c["algorithm"](text.encode()))

    def solve(self, field: Held, algorithm: Held, request: Request) -> tuple[Held, Outcome]:
        """Solve; the solution keeps what was lent."""
        outcome = Outcome()
        number = self._c["solve"](field.number, algorithm.number, request.address, ctypes.addressof(outcome))
        return self._held(number, (field, request)), outcome

    def repeated(self, field: Held, algorithm: Held, request: Request) -> Held:
        """A solve to be made again and again by a compiled field."""
        return self._held(self._c["repeated"](field.number, algorithm.number, request.address), field)

    def again(self, repeated: Held, y0: torch.Tensor, out: torch.Tensor, *, keep: bool) -> tuple[Held | None, Outcome]:
        """Make such a solve from y0, shape (n,), to out, shape (T, n); with its steps where it keeps them."""
        outcome = Outcome()
        number = self._c["again"](repeated.number, y0.data_ptr(), out.data_ptr(), ctypes.addressof(outcome))
        if keep:
            return self._held(number, repeated), outcome
        self._check(number)
        return None, outcome

    def sweep(self, field: Held, algorithm: Held, request: Request, systems: Systems) -> Outcome:
        """Solve independent systems, each by itself: the outcome of the first that failed, with the work of all."""
        outcome = Outcome()
        self._check(
            self._c["sweep"](
                field.number, algorithm.number, request.address, systems.address, ctypes.addressof(outcome)
            )
        )
        return outcome

    def abreast(self, field: Held, request: Request, systems: Abreast) -> tuple[Held | None, Outcome]:
        """Solve independent systems eight at a time; with their steps where these are kept."""
        outcome = Outcome()
        number = self._c["abreast"](field.number, request.address, systems.address, ctypes.addressof(outcome))
        if request.keep:
            return self._held(number), outcome
        self._check(number)
        return None, outcome

    def pull(self, swept: Held, request: PullRequest) -> int:
        """The gradient of such a sweep whose steps were kept; the calls of f that it took."""
        count = self._c["pull"](swept.number, request.address)
        self._check(count)
        return count - 1

    def interpolate(self, solution: Held, times: torch.Tensor, out: torch.Tensor) -> None:
        """States out (M, n) at times (M,), float64, of a solve that was dense."""
        self._check(self._c["interpolate"](solution.number, times.data_ptr(), out.data_ptr(), len(times)))

    def interpolate_all(self, swept: Held, times: torch.Tensor, out: torch.Tensor) -> None:
        """States out (M, n) of the systems of a sweep whose steps were kept at times (M,) of all or (B, M), float64; of
        systems that made no step nothing is written."""
        where = times.data_ptr(), times.numel(), out.data_ptr(), times.shape[-1]
        self._check(self._c["interpolate_all"](swept.number, *where))

    def adjoint(self, solution: Held, name: str, algorithm: Held, request: AdjointRequest) -> Outcome:
        """The gradient method `name` of SciMLSensitivity, which must be loaded; how its backward solve went."""
        outcome = Outcome()
        self._check(
            self._c["adjoint"](
                solution.number, name.encode(), algorithm.number, request.address, ctypes.addressof(outcome)
            )
        )
        return outcome

    def replay(
        self, solution: Held, request: ReplayRequest, both: torch.Tensor, g: torch.Tensor, *, whole: bool
    ) -> Replayed:
        """The discrete adjoint of a solve whose steps were kept; how that went.

        Args:
            both: shape (n + m,), for the gradient by the first state (without g there, if not the `whole` is asked
                for), and then that by the parameters.
            g: the cotangents at the output times, shape (T, ...), contiguous.
        """
        replayed = Replayed()
        self._check(
            self._c["replay"](
                solution.number, request.address, both.data_ptr(), g.data_ptr(), whole, ctypes.addressof(replayed)
            )
        )
        return replayed

    def collect(self, on: bool) -> bool:
        """Let Julia collect its garbage, or not, from now on. Returns whether it did."""
        return bool(self._c["collect"](on))

    def _held(self, number: int, kept: object = None) -> Held:
        self._check(number)
        return Held(number, self._refs, self._dropped, kept)

    def _check(self, result: int) -> None:
        if result == 0:
            raise JuliaError(self._c["failure"]().decode(errors="replace"))


def _bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize
