"""Every exception that a user of PyJLODE can meet; each says what happened, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any


class PyJLODEError(Exception):
    """Base class of all errors that PyJLODE raises on purpose."""


class BadShape(PyJLODEError, ValueError):
    """The state, or what `f` returned for it, has the wrong structure, shape or device."""


class BadFunction(PyJLODEError, TypeError):
    """`f` cannot be called as `f(t, h)`; the message says how it can be."""


class BadDtype(PyJLODEError, TypeError):
    """The state, `t`, or what `f` returned has a dtype that cannot be integrated."""


class BadTime(PyJLODEError, ValueError):
    """`t` is empty, repeated, not monotone, not finite or not one-dimensional."""


class BadTolerance(PyJLODEError, ValueError):
    """`rtol` or `atol` is negative, not finite, both zero, or does not match the state."""


class BadOption(PyJLODEError, ValueError):
    """An entry of `options`, or a combination of arguments, that the chosen method cannot follow."""


class UnknownMethod(PyJLODEError, ValueError):
    """No solver or gradient method has this name; the message lists the near ones."""


class InconsistentStart(PyJLODEError, ValueError):
    """`h0` does not satisfy the algebraic equations of a system with a singular mass matrix."""


class HighIndex(PyJLODEError, ValueError):
    """A system with a singular mass matrix is not of index 1."""


class EngineUnavailable(PyJLODEError, RuntimeError):
    """The engine that was asked for is not there; the message says how to get it."""


class SolveError(PyJLODEError, RuntimeError):
    """A solve was started and could not be finished.

    Attributes:
        t: time at which it stopped (in the units of the user's `t`).
        dt: step size that was tried there, signed like the direction of integration.
    """

    def __init__(self, message: str, *, t: float, dt: float) -> None:
        super().__init__(message)
        self.t = t
        self.dt = dt

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception pickles as what makes it of its message alone, and that would be a TypeError in the process that
        # reads it: a multiprocessing.Pool then waits for ever.
        return partial(type(self), t=self.t, dt=self.dt), self.args, self.__dict__


class StepSizeTooSmall(SolveError):
    """The step size that the tolerance asks for is below the resolution of floating-point time."""


class NonFiniteState(SolveError):
    """NaN or infinity in `h0`, in what `f` returned, or in the state that a step produced."""


class MaxStepsReached(SolveError):
    """`max_num_steps` steps did not reach the end of the time span."""


class EventNotFound(SolveError):
    """Time ran to infinity, or out of steps, before `event_fn` crossed zero."""


class TooManyEvents(SolveError):
    """Events follow each other without end: `max_events` of them, or ever faster, so that time no longer advances."""


class NotConverged(SolveError):
    """The nonlinear equations of an implicit step were not solved in `max_iters` iterations."""


class WorkerDied(PyJLODEError, RuntimeError):
    """No process that was to share an ensemble's work has survived; the message says what may be the cause."""


class JuliaError(PyJLODEError, RuntimeError):
    """Julia raised an error that none of the others stands for; the message is Julia's own."""


class GradientUnavailable(PyJLODEError, RuntimeError):
    """The gradient asked for cannot be had this way; the message names the way that has it."""


class Discovered(GradientUnavailable):
    """f uses tensors requiring grad that were not known when the solve began.

    Attributes:
        tensors: these.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors[:3])
        super().__init__(
            f"f uses a tensor that requires grad, of shape {shapes}, which it did not use where its tensors are looked "
            "for, at the start and the end of the solve, and which lies where they are not found (not in f, a module, "
            "a closure or a global that f names). Its gradient would be lost. Name it, with the others to "
            "differentiate by, in adjoint_params, or solve with adjoint=False."
        )
        self.tensors = tensors

    def __reduce__(self) -> Any:
        return GradientUnavailable, self.args


class NotCompiled(PyJLODEError, RuntimeError):
    """`compile=True`, and `f` or a step of the solver cannot be compiled; the message says what stands in the way."""
