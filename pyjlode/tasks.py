"""Many tasks on any executor of `concurrent.futures`: cut into spans, and done again where a worker dies.

Processes, Dask's `Client.get_executor()`, `mpi4py.futures.MPIPoolExecutor` and loky all have the one call that is
needed here, `submit`. What travels is bytes, pickled and read here, so that each of them carries the same.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import queue
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future
from typing import Any, NamedTuple

import torch

from .errors import BadOption, WorkerDied

_PROCESS = uuid.uuid4().hex  # of this process, beside its number: another machine may have the same, a fork has both
_AHEAD = 4  # spans that are handed over for each worker: it need not wait for the next
_UNKNOWN = 64  # and in all, to an executor that does not say how many workers it has
_LOST = 8  # tasks that no worker survived, and none survived any other: it is not the tasks


class Span(NamedTuple):
    """The tasks `start`, ..., `stop` - 1."""

    start: int
    stop: int

    def halves(self) -> tuple[Span, Span]:
        middle = (self.start + self.stop) // 2
        return Span(self.start, middle), Span(middle, self.stop)

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Attempt(NamedTuple):
    span: Span
    deaths: int = 0


class Raised(NamedTuple):
    """An exception of the work, from wherever it was done."""

    error: BaseException
    trace: str

    def again(self) -> BaseException:
        """The exception, with the lines of the worker as its cause."""
        self.error.__cause__ = _Trace(f"\n{self.trace}")
        return self.error


class _Trace(Exception):
    def __str__(self) -> str:
        return str(self.args[0])


def run(
    work: Callable[..., Any],
    piece: Callable[[Span], tuple[Any, ...]],
    spans: Iterable[Span],
    executor: Any,
    *,
    retries: int,
    done: Callable[[Span, Any], None],
    lost: Callable[[Span, str], None],
) -> None:
    """Do all spans, in any order.

    Args:
        work: `work(*piece(span))` is the result of a span. It is sent to a worker with each, and read there once.
        executor: None for this thread; a number of processes on this machine; an executor; or a function without
            arguments that makes one. Those made here are shut down at the end, and made anew where they break.
        retries: how often a span is tried again whose worker died. Then it is halved, and each half tried once more,
            down to the one task that is to blame.
        done: called here for each span with its result.
        lost: called here for a task that no worker survived, with the reason.

    Raises:
        What `work` raises, of the first span that came back with it.
        WorkerDied: no worker has survived any span.
    """
    if executor is None:
        for span in spans:
            done(span, work(*piece(span)))
        return
    shared = packed(work)
    pool = _Pool(executor)
    try:
        _Rounds(pool, shared, piece, retries, done, lost).run(spans)
    finally:
        pool.close()


class _Pool:
    """An executor, and how to have another one.

    Raises:
        BadOption: it is none.
    """

    def __init__(self, executor: Any) -> None:
        self.given = executor
        if isinstance(executor, int) and not isinstance(executor, bool) and executor > 0:
            self.make: Callable[[], Any] | None = functools.partial(_processes, executor)
        elif hasattr(executor, "submit"):
            self.make = None
        elif callable(executor):
            self.make = executor
        else:
            raise BadOption(
                f"executor={executor!r} is neither a positive number of processes, nor has it a method `submit` (as "
                "concurrent.futures' executors have, and Dask's client.get_executor()), nor does it make one that has."
            )
        self.executor = executor if self.make is None else self._made(self.make)

    def _made(self, make: Callable[[], Any]) -> Any:
        executor = make()
        if not hasattr(executor, "submit"):
            raise BadOption(f"executor() gave {type(executor).__name__}, which has no method `submit`.")
        return executor

    @property
    def window(self) -> int:
        """How many spans it is given at once."""
        workers = getattr(self.executor, "_max_workers", None)
        return _AHEAD * workers if isinstance(workers, int) else _UNKNOWN

    def submit(self, *args: Any) -> Future[Any]:
        return self.executor.submit(*args)

    def renew(self) -> bool:
        """Whether there is another one, after this one broke."""
        if self.make is None:
            return False
        self.executor.shutdown(wait=False)
        self.executor = self._made(self.make)
        return True

    def close(self) -> None:
        if self.make is not None:
            self.executor.shutdown(wait=True)  # what had not begun is cancelled by then


class _Rounds:
    """The spans that are still to be done, and those that are under way.

    Where one process of a pool dies, the pool fails every span it has. All that were under way are suspect then, and
    are tried one at a time, until each has come back or is found to be the one.
    """

    def __init__(
        self,
        pool: _Pool,
        shared: bytes,
        piece: Callable[[Span], tuple[Any, ...]],
        retries: int,
        done: Callable[[Span, Any], None],
        lost: Callable[[Span, str], None],
    ) -> None:
        self.pool, self.shared, self.piece, self.retries, self.done, self.lost = (
            pool,
            shared,
            piece,
            retries,
            done,
            lost,
        )
        self.waiting: deque[_Attempt] = deque()
        self.suspects: deque[_Attempt] = deque()
        self.flying: dict[Future[Any], _Attempt] = {}
        self.landed: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self.broken: BaseException | None = None
        self.alone = False
        self.survived = False
        self.losses = 0

    def run(self, spans: Iterable[Span]) -> None:
        self.waiting.extend(map(_Attempt, spans))
        try:
            while self.waiting or self.suspects or self.flying:
                if self.broken is not None and not self.flying:
                    self._renew()
                self._submit()
                with contextlib.suppress(queue.Empty):  # now and then, so that Ctrl-C is heard on Windows, too
                    self._land(self.landed.get(timeout=1.0 if self.flying else 0.0))
        finally:
            for future in self.flying:
                future.cancel()

    def _submit(self) -> None:
        if self.suspects and self.broken is None:
            if not self.flying:
                self.alone = True
                self._start(self.suspects.popleft())
            return
        while self.waiting and self.broken is None and len(self.flying) < self.pool.window:
            self.alone = False
            self._start(self.waiting.popleft())

    def _start(self, attempt: _Attempt) -> None:
        try:
            future = self.pool.submit(call, self.shared, pickle.dumps(self.piece(attempt.span)), _me())
        except BrokenExecutor as error:  # a worker died between two spans
            self.broken = error
            (self.suspects if self.alone else self.waiting).appendleft(attempt)
            return
        self.flying[future] = attempt
        future.add_done_callback(self.landed.put)

    def _land(self, future: Future[Any]) -> None:
        attempt = self.flying.pop(future)
        error = _error_of(future)
        if error is None:
            self.survived = True
            result = pickle.loads(future.result())
            if isinstance(result, Raised):
                raise result.again()
            self.done(attempt.span, result)
        elif isinstance(error, BrokenExecutor):
            self.broken = error
            if self.alone:
                self._died(attempt, error)
            else:
                self.suspects.append(attempt)
        else:  # of this span alone: Dask's KilledWorker, a lost connection, a result that cannot be pickled
            self._died(attempt, error)

    def _died(self, attempt: _Attempt, error: BaseException) -> None:
        span, deaths = attempt.span, attempt.deaths + 1
        if deaths <= self.retries:
            self.suspects.append(_Attempt(span, deaths))
        elif span.size > 1:
            self.suspects.extend(_Attempt(half, self.retries) for half in span.halves())
        else:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self.lost(span, f"the worker died {deaths} times, or did not send what it found ({why}).")
            self.losses += 1
            if self.losses >= _LOST and not self.survived:
                raise WorkerDied("no worker has survived any of the work: f ends its process, or memory is short.")

    def _renew(self) -> None:
        if self.pool.renew():
            if not self.survived and not self.losses:
                self._probe()
            self.broken = None
            return
        why = f"the executor broke ({self.broken}); executor=lambda: ... would let it be made anew."
        for attempt in (*self.suspects, *self.waiting):
            for i in range(*attempt.span):
                self.lost(Span(i, i + 1), why)
        self.suspects.clear()
        self.waiting.clear()

    def _probe(self) -> None:
        """Find out whether workers can start, before the work is blamed."""
        try:
            self.pool.submit(os.getpid).result()
        except BrokenExecutor as error:
            raise WorkerDied(
                "no worker could start. Processes of this machine read your script anew: what it does must stand under "
                '`if __name__ == "__main__":`.'
            ) from error


def _error_of(future: Future[Any]) -> BaseException | None:
    try:
        return future.exception()
    except BaseException as error:  # a future that was cancelled raises it
        return error


def _processes(number: int) -> Any:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Neither Julia nor the threads of PyTorch live on in a fork.
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))


def packed(work: Any) -> bytes:
    """What a worker reads with `pickle.loads`.

    Raises:
        BadOption: `work` cannot be pickled.
    """
    try:
        import cloudpickle as pickler  # functions of a script or a notebook, closures and lambdas
    except ImportError:
        pickler = pickle
    try:
        return pickler.dumps(work)
    except Exception as error:
        advice = "" if pickler is not pickle else " `pip install cloudpickle` lets closures and lambdas travel."
        raise BadOption(f"f cannot be sent to another process: {error}.{advice}") from error


@functools.lru_cache(maxsize=8)
def _read(shared: bytes) -> Any:
    """The work, the same object for every span: what was compiled for it stays compiled."""
    return pickle.loads(shared)


def _me() -> tuple[str, int]:
    return _PROCESS, os.getpid()


def call(shared: bytes, piece: bytes, caller: tuple[str, int]) -> bytes:
    """What a worker does for one span."""
    if _me() != caller:
        torch.set_num_threads(1)  # one worker for each core is what executors start
    try:
        result = _read(shared)(*pickle.loads(piece))
    except Exception as error:
        result = raised(error)
    return pickle.dumps(result)


def raised(error: Exception) -> Raised:
    """What is sent of an exception, from where it is caught."""
    return Raised(_sendable(error), traceback.format_exc())


def _sendable(error: Exception) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
