"""Handlers of signals (Ctrl-C, a time limit): when they may run, and whether it was one of them that raised."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within this context handlers of signals (Ctrl-C, a time limit) wait: they run at its end.

    For what must not be left half done by an exception of theirs. Python runs them on its main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []
    handlers = {int(i): handler for i in signal.valid_signals() if callable(handler := signal.getsignal(i))}
    try:
        for i in list(handlers):
            signal.signal(i, lambda number, frame: late.append(number))
        yield
    finally:
        _put_back(handlers)
        for number in dict.fromkeys(late):
            signal.raise_signal(number)


def _put_back(handlers: dict[int, Any]) -> None:
    try:
        while handlers:
            number = next(iter(handlers))
            signal.signal(number, handlers[number])
            del handlers[number]
    finally:
        if handlers:  # the first one raised
            _put_back(handlers)


def of_a_signal(error: BaseException) -> bool:
    """Whether a handler of a signal's raised it."""
    handlers = map(signal.getsignal, signal.valid_signals())
    codes = {getattr(getattr(x, "__func__", x), "__code__", None) for x in handlers} - {None}
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_code in codes:
            return True
        place = place.tb_next
    return False
