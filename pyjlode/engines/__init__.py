"""What engines share, and which of them solves a problem."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..signals import undisturbed

if TYPE_CHECKING:
    from . import choice, crossing

__all__ = ["choice", "crossing"]


def __getattr__(name: str) -> Any:
    """Both import the engines, half the cost of importing this package: they are loaded when first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with undisturbed():  # what a handler of a signal's raises would leave the import half done
        return importlib.import_module(f".{name}", __name__)
