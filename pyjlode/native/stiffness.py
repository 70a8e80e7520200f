"""What the makers of adaptive implicit steps share with the loop."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .step import Interval


class Attempt(NamedTuple):
    """A step that was tried.

    Attributes:
        step: None where its equations were not solved, and `why` says why.
        err: norm of the local error over the tolerance.
    """

    step: Any
    err: float
    why: str = ""


def linked(data: Any, before: Any) -> Any:
    """`data` of a step whose `start` is what the recorded step before it left; where it has none, it made its own."""
    if getattr(data, "start", None) is None:
        return data
    return data._replace(start=before.left)


class Maker(Protocol):
    """Makes the steps of one method for one problem; what it keeps between steps is its own."""

    def attempt(self, interval: Interval, y: Tensor) -> Attempt:
        """Try a step; y (n,). Without graph."""
        ...

    def accept(self, err: float, size: float) -> float:
        """The last attempt counts: the factor from its `size` to the next one's."""
        ...

    def reject(self, err: float, size: float) -> float:
        """It does not: the factor to the size of the next attempt."""
        ...

    def again(self, interval: Interval, y: Tensor, data: Any, polish: int) -> Any:
        """A step that counts, once more under autograd, from its `data`."""
        ...
