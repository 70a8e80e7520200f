"""What `torch.compile` must leave alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from torch import Tensor

Args = ParamSpec("Args")
Result = TypeVar("Result")

_REASON = (
    "a solve chooses its steps by the numbers that it meets; pyjlode runs it, and f, outside of the compiled graph"
)


def _compiles() -> bool:
    """Whether Dynamo looks at the calls that are made now; what it does otherwise takes some microseconds."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if not hasattr(frames, "set_eval_frame"):  # in another version of PyTorch
        return True
    before = frames.set_eval_frame(None)
    if before is not None:
        frames.set_eval_frame(before)
    return before is not None


def untraced(f: Callable[Args, Result]) -> Callable[Args, Result]:
    """`f` as `torch.compiler.disable` makes it, which would load Dynamo, a second or two, here and now: it is not
    asked before somebody else has loaded it."""
    disabled: list[Callable[Args, Result]] = []

    @functools.wraps(f)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return f(*args, **kwargs)
            disabled.append(torch.compiler.disable(f, reason=_REASON))
        return (disabled[0] if _compiles() else f)(*args, **kwargs)

    # What Dynamo looks for when it meets a call of this function.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
    return call


def compiled(x: Tensor) -> bool:
    """Whether the graph of x, the result of a call of f, runs through a function that `torch.compile` made: such a one
    has a first derivative only, taken once."""
    if "torch._dynamo" not in sys.modules or x.grad_fn is None:
        return False
    todo: list[Any] = [x.grad_fn]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.name() == "CompiledFunctionBackward":
            return True
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        todo.extend(following)
    return False
