"""Solves under `torch.func` and forward mode: what is done there that is not done elsewhere.

The solve itself is the native engine's own operations, of which every transform knows what to make. What steers it
(error norms, events, whether a number is finite) is read by `numbers`: common to all samples of a `vmap`, it is that of
the hardest of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import numbers
from .errors import BadOption, BadTime
from .methods import Method
from .numbers import on_host
from .problem import Equation

REASON = "a transform of torch.func, or forward mode, is at work, which follows PyTorch's operations"


def shared_times(e: Equation, method: Method, options: Mapping[str, Any]) -> tuple[Equation, dict[str, Any]]:
    """The same equation for times that `vmap` makes others for each sample, in a time s that all samples share.

    Sample by sample t runs from t[k] to t[k + 1] while s runs from k to k + 1: h' = (t[k + 1] - t[k]) f(t(s), h).

    Args:
        options: of the solver.

    Returns:
        The equation over s, and options that say that its field jumps between the intervals.

    Raises:
        BadOption, BadTime: what was said of times (an option, an event) does not carry over to s.
    """
    f, t = e.f, e.t
    if e.event_fn is not None:
        raise BadTime("with event_fn, torch.func.vmap over t is not possible: shift the time inside f instead.")
    names = [f"callback_{when}" for when in ("step", "accept_step", "reject_step")]
    called = [name for name in names if getattr(f, name, None) is not None]
    of_time = {"step_size", "grid_constructor", "first_step", "max_step", "min_step", "step_t", "jump_t"}
    if options.get("batch_dims"):
        raise BadOption("batch_dims: torch.func.vmap makes t another for each sample. Give t a row for each system.")
    said = sorted({name for name in options if name in of_time} | set(called))
    if said:
        raise BadOption(f"{', '.join(said)}: these speak of one time, and torch.func.vmap gives each sample its own t.")
    if method.kind in ("adams", "scipy"):
        raise BadOption(f"{method.name} does not take a t that torch.func.vmap makes another for each sample.")
    if t.ndim != 1 or not t.is_floating_point():
        return e, {}  # what is wrong with it is said elsewhere
    if len(t) == 0 or not bool(torch.isfinite(rows := numbers.rows(t)).all()):
        raise BadTime("t is empty, or holds NaN or infinity in a sample of torch.func.vmap.")
    with numbers.outside():
        steps = rows.diff(dim=1)
        if not bool(((steps > 0).all(1) | (steps < 0).all(1)).all()):
            raise BadTime("t must be strictly increasing or decreasing in each sample of torch.func.vmap.")
    last = max(len(t) - 2, 0)

    def field(s: Tensor, h: Any) -> Any:
        k = min(max(math.floor(numbers.read(s)), 0), last)
        width = t[k + 1] - t[k]
        out = f((t[k] + (s.to(t.dtype) - k) * width).to(s.dtype), h)
        return pytree.tree_map(lambda x: x * width.to(x.real.dtype) if isinstance(x, Tensor) else x, out)

    if len(t) == 1:
        return e._replace(t=on_host([0.0])), {}
    jumps: dict[str, Any] = {"jump_t": list(range(1, len(t) - 1))} if method.adaptive else {"perturb": True}
    return e._replace(f=field, t=on_host(range(len(t)))), jumps
