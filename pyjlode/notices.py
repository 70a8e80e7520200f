"""What a user is told besides errors: warnings that point at the user's own line, and log lines that do not repeat."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from types import FrameType

import torch

log = logging.getLogger("pyjlode")

# Frames of these are not the user's: this package, and PyTorch, through which modules and backward passes are called.
_OURS = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, torch.__file__))
_warned: set[str] = set()
_logged: set[tuple[str, ...]] = set()
_LOGGED_MOST = 1000  # reasons may hold numbers


def warn(message: str, *, depth: int = 1) -> None:
    """Warn, as from the first line outside of this package that led here.

    Args:
        depth: how many frames above this one are certain to be the package's.
    """
    frame, level = sys._getframe(depth), depth + 1
    while frame.f_back is not None and _ours(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _ours(frame: FrameType) -> bool:
    # What `dataclasses` writes for one of ours is in no file, and `replace` calls it.
    name = frame.f_globals.get("__name__", "")
    return frame.f_code.co_filename.startswith(_OURS) or name.startswith("pyjlode.") or name == "dataclasses"


def warn_once(key: str, message: str) -> None:
    """Warn, the first time that there is this `key` in the process."""
    if key not in _warned:
        _warned.add(key)
        warn(message, depth=2)


def log_once(*decision: str) -> None:
    """Log which engine was chosen, why, with which method and gradient: once for each, not in each training step."""
    if decision not in _logged and log.isEnabledFor(logging.INFO):
        if len(_logged) >= _LOGGED_MOST:
            _logged.clear()
        _logged.add(decision)
        log.info("engine %s (%s), method %s, gradient %s", *decision)
