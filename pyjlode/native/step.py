"""What all steps share: the interval of time that a step covers, and the products of its size with a method's
numbers."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..numbers import constant, on_host
from ..problem import ODEProblem

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Interval(NamedTuple):
    """One step in time, from `t0` to `t1`; time is float64 on the host whatever the state is.

    `at` and `dt` are the same start and (signed) length for arithmetic: Python floats, or 0-d float64 tensors where the
    solve is recorded and the user's `t` requires grad.
    """

    t0: float
    t1: float
    at: float | Tensor
    dt: float | Tensor
    after_jump: bool = False
    before_jump: bool = False


def length(p: ODEProblem, at: float | Tensor, t1: float, reach: float, end: float, stop: float) -> Tensor:
    """The length of a step to `t1` as a function of the user's times, 0-d.

    Steps that the controller chose move with t0. The last one ends at the user's own tensor; and one that ends at a
    time of `step_t` or `jump_t` ends there wherever it starts.
    """
    if t1 == end:
        return p.t[-1].to(torch.float64) - at
    size = torch.tensor(reach, dtype=torch.float64, device=p.t.device)
    return size - (at - at.detach()) if t1 == stop and isinstance(at, Tensor) else size


@runtime_checkable
class Step(Protocol):
    """One accepted step."""

    interval: Interval
    y: Tensor  # (n,) at t0
    y1: Tensor  # (n,) at t1

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        """Dense output at M times within the step: shape (M, n)."""
        ...


def numpy_dtype(like: Tensor) -> type:
    return _NUMPY[like.dtype]


# Numbers of the host's go to a device without a wait (`non_blocking`): CUDA takes them from pageable memory at once.


def stage_times(interval: Interval, C: np.ndarray, like: Tensor) -> tuple[Tensor, ...]:
    """Times `t0 + C dt` as f sees them: 0-d tensors of the state's dtype and device.

    Next to a jump of f the times at the step's ends move by one rounding unit into the step, so that f answers with the
    value of this side; a stage beyond the end (`kvaerno5` has one) is put there too.
    """
    dtype = numpy_dtype(like)
    if interval.before_jump:
        C = np.minimum(C, 1.0)
    if isinstance(interval.dt, Tensor):
        times = (interval.at + torch.from_numpy(C).to(interval.dt) * interval.dt).to(like)
        shift = times.new_zeros(len(C))
        if interval.after_jump or interval.before_jump:
            shift = torch.from_numpy(_inside(interval, C, dtype)).to(like) - constant(times)
        return (times + shift).unbind()
    if interval.after_jump or interval.before_jump:
        times = torch.from_numpy(_inside(interval, C, dtype))
    else:
        times = torch.from_numpy((C * interval.dt + interval.t0).astype(dtype, copy=False))
    return (times if like.device.type == "cpu" else times.to(like.device, non_blocking=True)).unbind()


def host_times(interval: Interval, C: np.ndarray, dtype: type) -> np.ndarray:
    """The same as numbers in float64, that `dtype` has too where the step is next to a jump."""
    if interval.before_jump:
        C = np.minimum(C, 1.0)
    if interval.after_jump or interval.before_jump:
        return _inside(interval, C, dtype)
    return C * (interval.t1 - interval.t0) + interval.t0


def _inside(interval: Interval, C: np.ndarray, dtype: type) -> np.ndarray:
    first, last = dtype(interval.t0), dtype(interval.t1)
    times: np.ndarray = (C * (interval.t1 - interval.t0) + interval.t0).astype(dtype)
    if interval.after_jump:
        times[C == 0] = np.nextafter(first, last)
    if interval.before_jump:
        times[C == 1] = np.nextafter(last, first)
    return times


def fraction(interval: Interval, times: list[float] | Tensor) -> Tensor:
    """Where `times` lie in the step, as float64 fractions of it: shape (M,)."""
    if not isinstance(times, Tensor):
        times = on_host(times)
    if isinstance(interval.dt, Tensor):
        times = times.to(interval.dt)
    return (times.to(torch.float64) - interval.at) / interval.dt
