"""The field of a batch of systems at times of their own: which shape of t it understands."""

from __future__ import annotations

import contextlib
import functools
import math
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import arguments, numbers
from ...errors import BadFunction, BadShape
from ...problem import Layout, ODEProblem, SystemsLayout

Read = Callable[..., Tensor]

# In the order in which they are tried.
SHAPES = ("column", "batch", "vmap")


def shaped(f: Any, how: str, batch: Sequence[int], leaves: Sequence[torch.Size]) -> Callable[[Tensor, Any], Any]:
    """f as a function of times of shape (B,), or of one 0-d time for all.

    Args:
        how: one of `SHAPES`. batch: the shape of the batch. leaves: shapes of the state's tensors.
    """
    # Partials, so that what f holds is found.
    if how == "vmap":
        return functools.partial(_mapped, f, tuple(batch))
    dims = max(len(shape) for shape in leaves) - len(batch) if how == "column" else 0
    return functools.partial(_at, f, (*batch, *(1,) * dims))


def _at(f: Any, shape: tuple[int, ...], t: Tensor, h: Any) -> Any:
    if t.shape != shape:
        t = t.reshape(shape) if t.dim() else t.expand(shape)
    return f(t, h)


def _mapped(f: Any, batch: tuple[int, ...], t: Tensor, h: Any) -> Any:
    """f, called for one system after the other as a batch of one, with a 0-d time."""
    n, count = len(batch), math.prod(batch)
    ones = (1,) * n
    one = pytree.tree_map(lambda x: x.reshape(count, *ones, *x.shape[n:]), h)
    out = torch.func.vmap(f, randomness="different")(t if t.dim() else t.expand(count), one)
    return pytree.tree_map(lambda x: x.reshape(*batch, *x.shape[n + 1 :]), out)


def fitted(p: ODEProblem, f: Any) -> Callable[[Tensor, Any], Any]:
    """The user's f as a function of times of shape (B,), as `options["batch_t"]` says, or as f itself shows.

    Of the shapes of t the first is taken for which f gives each system, among others at other times and in other
    states, what it gives it where all are at its own time.

    Raises:
        BadFunction: f can be called with one time for all, and with none of these shapes.
    """
    assert p.layout is not None
    assert p.rows is not None
    batch, leaves = p.rows.shape, p.layout.shapes
    made: Any = shaped(f, _how(p, f, _Probe.slope), batch, leaves)
    if made.func is _at:
        p.rows = replace(p.rows, asked=made.args[1])
    return made


def fitted_event(p: ODEProblem, event_fn: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The same of an event function, on the flat state: times (B,), states (n,) -> (B, m)."""
    assert p.layout is not None
    assert p.rows is not None
    layout, count = p.layout, p.batch
    made = shaped(event_fn, _how(p, event_fn, _Probe.event), p.rows.shape, layout.shapes)

    def flat(t: Tensor, y: Tensor) -> Tensor:
        return of_each(arguments.event_value(made(t, layout.unflatten(y))), count)

    return flat


def of_each(value: Tensor, count: int) -> Tensor:
    """What an event function returned, by systems: (B, m)."""
    if value.numel() % count or not value.numel():
        raise BadShape(
            f"event_fn must return numbers for each of the {count} systems of the batch; it returned a tensor of shape "
            f"{tuple(value.shape)}."
        )
    return value.reshape(count, -1)


def _how(p: ODEProblem, f: Any, read: Read) -> str:
    how = p.options.batch_t
    if how != "auto":
        return how
    assert p.layout is not None
    assert p.rows is not None
    # In training a module may do what it does not do otherwise: mix systems, draw numbers.
    training = getattr(f, "training", None)
    known, key = _kept(f), (_code(f), training, tuple(p.rows.shape), tuple(p.layout.shapes), p.y0.dtype)
    if key not in known:
        known[key] = _found(p, f, read)
    return known[key]


_by_f: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()


def _kept(f: Any) -> dict[Any, str]:
    """What was found out about f before; it lives as long as f."""
    owner = f.__self__ if isinstance(f, types.MethodType) else f
    try:
        return _by_f.setdefault(owner, {})
    except TypeError:  # it cannot be hashed, or not be referred to weakly
        return {}


def _code(f: Any) -> Any:
    return f.__func__ if isinstance(f, types.MethodType) else None


class _Probe:
    """A point at which f is looked at: each system at a time of its own, in a state near its start."""

    def __init__(self, p: ODEProblem, read: Read) -> None:
        assert p.rows is not None
        assert p.layout is not None
        self.p, self.layout, self.count, self.read = p, p.layout, p.batch, functools.partial(read, self)
        rows = p.rows
        part = (0.5 + 0.618034 * np.arange(self.count)) % 1.0
        self.times = p.moments(rows.starts + part * (rows.ends - rows.starts))
        y = p.y0 if p.transformed else p.y0.detach()
        y = torch.nan_to_num(y, 0.0, 0.0, 0.0)
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal(y.numel())).to(y)
        self.y, self.moved = y, y + 0.01 * (y.abs() + y.abs().mean()) * noise

    def call(self, f: Callable[[Tensor, Any], Any], t: Tensor, y: Tensor) -> Tensor:
        """f there: (B, d)."""
        try:
            out = f(t, self.layout.unflatten(y))
        except RuntimeError as error:
            if not self.p.f.wants_graph(error, y):
                raise
            with torch.enable_grad():  # f differentiates by its own h
                out = f(t, self.layout.unflatten(y.detach().requires_grad_()))
            out = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out)
        return self.read(t, out)

    def slope(self, t: Tensor, out: Any) -> Tensor:
        arguments.check_output(out, self.layout, True)
        return self.layout.flatten_result(t, out).reshape(self.count, -1)

    def event(self, t: Tensor, out: Any) -> Tensor:
        return of_each(arguments.event_value(out), self.count)

    def near(self, f: Callable[[Tensor, Any], Any]) -> Tensor:
        """A state at which f is finite, if there is one near by."""
        k = numbers.rows(self.call(f, self.times, self.moved))
        with numbers.lasting():
            return self.moved if bool(torch.isfinite(k).all()) else self.y

    def agree(self, f: Callable[[Tensor, Any], Any], one: Callable[[Tensor, Any], Any], how: str) -> bool:
        """Whether f treats some systems as it does where all are at the same time.

        Args:
            one: the user's f, with one time for all.
        """
        y = self.near(f)
        k = self.call(f, self.times, y)
        for i in {0, self.count - 1}:
            t = self.times[i]
            other = torch.where(self.row(i), y, self.moved if y is self.y else self.y)
            if how == "vmap" or self.count == 1:
                try:
                    want = self.call(one, t, other)
                except Exception:  # it takes no 0-d time
                    continue
            else:
                want = self.call(f, t.expand(self.count), other)
            if not _same(k[i], want[i]):
                return False
        return True

    def row(self, i: int) -> Tensor:
        mask = torch.zeros(self.count, 1, dtype=torch.bool, device=self.y.device)
        mask[i] = True
        return mask.expand(self.count, self.y.numel() // self.count).reshape(-1)


def _found(p: ODEProblem, f: Any, read: Read) -> str:
    assert p.layout is not None
    assert p.rows is not None
    probe, refused = _Probe(p, read), {}
    with _quiet(p):
        for how in SHAPES:
            g = shaped(f, how, p.rows.shape, p.layout.shapes)
            try:
                if probe.agree(g, f, how):
                    return how
                refused[how] = "gives a system another slope beside systems at other times"
            except OSError:  # a time limit, a file: nothing that another shape would mend
                raise
            except Exception as error:
                refused[how] = "fails (" + f"{type(error).__name__}: {error}".split("\n")[0][:120] + ")"
        try:
            probe.call(f, probe.times[0], probe.y)
        except Exception:
            return "column"  # what is wrong is not the shape of t; the first look at f says what it is
    one = tuple(p.rows.shape)
    raise BadFunction(
        "options['batch_dims'] solves each system at times of its own, and "
        f"{'f' if read is _Probe.slope else 'event_fn'} takes only one time for all. With t of "
        f"shape {(*one, *(1,) * (max(map(len, p.layout.shapes)) - len(one)))} it {refused['column']}. With t of shape "
        f"{one} it {refused['batch']}. Mapped by torch.func.vmap it {refused['vmap']}. Write f so that t broadcasts "
        "with h, and so that no system has a part in another's slope (no batch normalisation, no dropout); or leave "
        "batch_dims out, for common steps."
    )


@contextlib.contextmanager
def _quiet(p: ODEProblem) -> Iterator[None]:
    with contextlib.nullcontext() if p.transformed else torch.no_grad():
        yield


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = numbers.rows(a), numbers.rows(b)
    with numbers.lasting():
        size = torch.maximum(a.abs().nan_to_num().amax(), b.abs().nan_to_num().amax()) if a.numel() else 0.0
        near = (a - b).abs() <= torch.finfo(a.dtype).eps ** 0.5 * size
        return bool((near | (a == b) | (a.isnan() & b.isnan())).all())


def narrowed(layout: Layout, count: int) -> Layout:
    """The layout of so many of the systems of a batch that has one dimension."""
    some = Layout.__new__(type(layout))
    some.__dict__.update(vars(layout))
    before = layout.shapes[0][0]
    some.shapes = [torch.Size((count, *shape[1:])) for shape in layout.shapes]
    some.sizes = [size // before * count for size in layout.sizes]
    some.size = sum(some.sizes)
    if isinstance(some, SystemsLayout):
        some.count = count
    return some
