"""A progress bar for one solve: where in time f is being evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .bridge.function import JuliaFunction
from .errors import BadOption
from .problem import ODEProblem


@contextlib.contextmanager
def shown(p: ODEProblem) -> Iterator[None]:
    """Show a bar on standard error while the block solves `p`, on whichever engine: it watches the calls of f.

    Raises:
        BadOption: f is a `julia_function`, of whose calls Python hears nothing.
    """
    f, t0, last = p.f.f, p.times[0], p.times[-1]
    if isinstance(f, JuliaFunction):
        raise BadOption("options['progress'] watches the calls of f, and a julia_function is called by Julia alone.")
    from tqdm import tqdm

    # Of an event the end is not known.
    whole = None if p.event_fn is not None else abs(last - t0)
    starts: Any = t0
    if p.rows is not None:  # the mean of what each system has behind it
        starts, whole = p.moments(p.rows.starts), whole and float(abs(p.rows.ends - p.rows.starts).mean())
    form = (
        "t - t0 = {n:.4g} [{elapsed}]" if whole is None else "{l_bar}{bar}| {n:.4g}/{total:.4g} [{elapsed}<{remaining}]"
    )
    with tqdm(total=whole, desc=f"{p.method.name}", bar_format=form) as bar:

        def watched(t: Tensor, h: Any) -> Any:
            if (passed := float((t.detach() - starts).abs().mean())) > bar.n:
                bar.update(passed - bar.n)
            return f(t, h)

        source = p.f.source
        p.f.f, p.f.source = watched, None  # compiled, f would not be called
        try:
            yield
        finally:
            p.f.f, p.f.source = f, source
