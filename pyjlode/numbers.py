"""Plain numbers of tensors: what steers a solve is read here, through all that `torch.func` and forward mode put around
them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .errors import BadTime

_functorch: Any = torch._C._functorch
# Asked in every step of every solve: 40 ns.
_level: Callable[[], int | None] = _functorch.maybe_current_level


def transformed() -> bool:
    """Whether a transform of `torch.func`, or forward mode, is at work: tensors may then be wrapped, or dual."""
    return _level() is not None or forward_ad._current_level >= 0


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Within this context no transform is at work, and no inference mode: tensors made here are plain, and may be
    kept."""
    with torch.inference_mode(False):
        if _level() is None:
            yield
        else:
            with pyfunctorch.temporarily_clear_interpreter_stack():
                yield


def lasting() -> contextlib.AbstractContextManager[None]:
    """As `outside`, and no cost where there is nothing to be outside of."""
    return outside() if transformed() or torch.is_inference_mode_enabled() else contextlib.nullcontext()


def on_host(values: Any) -> Tensor:
    """Numbers that are no tensor as one: float64, on the CPU whatever torch.set_default_device says."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def as_like(x: float | Tensor, y: Tensor) -> Tensor:
    """x as a tensor of y's dtype, on its device."""
    return x.to(y) if isinstance(x, Tensor) else torch.tensor(x, dtype=y.dtype, device=y.device)


Made = TypeVar("Made")


def kept(maxsize: int) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """A cache for what is made of tensors. They must not be wrapped by the transform that first asked for them."""

    def decorate(make: Callable[..., Made]) -> Callable[..., Made]:
        def made(*args: Any) -> Made:
            with outside():
                return make(*args)

        return functools.lru_cache(maxsize)(made)

    return decorate


def wrapped(x: Tensor) -> bool:
    """Whether x itself is wrapped, or has a tangent."""
    if _functorch.is_functorch_wrapped_tensor(x):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def rows(x: Tensor) -> Tensor:
    """The numbers of x, as a plain tensor of shape (samples, *x.shape): one sample for each that `vmap` hides.

    What is computed of it is plain only where that is done `outside`.
    """
    with outside():
        values, levels = _unwrapped(x)
        return values.reshape(-1, *values.shape[len(levels) :])


def _unwrapped(x: Tensor) -> tuple[Tensor, list[int]]:
    """A plain tensor, the dimensions that `vmap` hides in front, and their levels, the outermost first."""
    if not _functorch.is_functorch_wrapped_tensor(x):
        return x.detach(), []
    values, levels = _unwrapped(_functorch.get_unwrapped(x))
    if not _functorch.is_batchedtensor(x):
        return values, levels
    n = len(levels)
    return values.movedim(n + _functorch.maybe_get_bdim(x), n), [*levels, _functorch.maybe_get_level(x)]


def hidden(x: Tensor) -> bool:
    """Whether x has a dimension that `vmap` hides."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def read(x: Tensor) -> float:
    """The number of a tensor of one element: where `vmap` hides several, the largest, or NaN if one is."""
    if _level() is None and forward_ad._current_level < 0:  # `transformed`, here without a call
        return float(x)
    values = rows(x)
    with outside():
        return float(values.amax())


def first(x: Tensor) -> float:
    """The first number of a tensor, for a message."""
    return read(x.reshape(-1)[0]) if x.numel() else math.nan


def listed(x: Tensor) -> list[float]:
    """The numbers of times x, shape (T,), which must be the same in all samples of a `vmap`.

    Raises:
        BadTime: they are not.
    """
    if not transformed():
        return x.tolist()
    samples = rows(x).tolist()
    if any(sample != samples[0] for sample in samples):
        raise BadTime("the times differ between the samples of torch.func.vmap here, and one solution is asked for.")
    return samples[0]


def anywhere(x: Tensor) -> bool:
    """Whether an element of x, in any sample, is not zero."""
    if not transformed():
        return bool(x.any())
    values = rows(x)
    with outside():
        return bool(values.any())


# Linear systems are solved by the inverse under a transform: `lu_solve`, and with it `linalg.solve`, is wrong without
# a word where one `vmap` lies in another and the right-hand side or its tangent alone shows both (PyTorch 2.13).
def solve(A: Tensor, b: Tensor) -> Tensor:
    """A⁻¹ b: A (*batch, n, n), b (*batch, n)."""
    return (torch.linalg.inv_ex(A)[0] @ b[..., None])[..., 0] if transformed() else torch.linalg.solve(A, b)


def factored(A: Tensor) -> Callable[[Tensor], Tensor]:
    """b -> A⁻¹ b, for several b: A (n, n), b (n, m)."""
    if transformed():
        inverse = torch.linalg.inv_ex(A)[0]
        return lambda b: inverse @ b
    lu, pivots, _ = torch.linalg.lu_factor_ex(A)
    return lambda b: torch.linalg.lu_solve(lu, pivots, b)


class Samples:
    """All samples of the `vmap`s that are at work, of a tensor that may show some of them or none.

    Attributes:
        levels: (level, size) of each.
        count: their product, 1 without `vmap`.
    """

    def __init__(self) -> None:
        stack = _functorch.get_interpreter_stack() or []
        vmaps = [i for i in stack if i.key() == _functorch.TransformType.Vmap]
        self.levels = [(i.level(), _functorch.CVmapInterpreterPtr(i).batchSize()) for i in vmaps]
        self.sizes = [size for _, size in self.levels]
        self.count = math.prod(self.sizes)

    def rows(self, x: Tensor) -> Tensor:
        """The numbers of x, plain, (count, *x.shape)."""
        with outside():
            values, levels = _unwrapped(x)
            shape = values.shape[len(levels) :]
            for i, (level, _) in enumerate(self.levels):
                if level not in levels:
                    values, levels = values.unsqueeze(i), [*levels[:i], level, *levels[i:]]
            return values.expand((*self.sizes, *shape)).reshape((self.count, *shape))

    def array(self, x: Tensor) -> np.ndarray:
        """The same, in float64."""
        values = self.rows(x)
        with outside():
            return values.cpu().numpy().astype(np.float64)

    def wrap(self, values: np.ndarray) -> Tensor:
        """(count, *shape) -> (*shape,) on the CPU as the transforms see it, a constant."""
        with outside():
            return self.wrapped(torch.from_numpy(values.copy()))

    def wrapped(self, values: Tensor) -> Tensor:
        """The same for a plain tensor."""
        with outside():
            x = values.reshape((*self.sizes, *values.shape[1:]))
            for level, _ in self.levels:
                x = _functorch._add_batch_dim(x, 0, level)
            return x


def constant(x: Tensor) -> Tensor:
    """x, of which no derivative is taken at any level; `vmap` still sees its samples.

    `detach` is for the innermost level alone: a derivative of a derivative would still see what it cuts off.
    """
    if not transformed():
        return x.detach()
    with outside():
        return _constant(x)


def _constant(x: Tensor) -> Tensor:
    if not _functorch.is_functorch_wrapped_tensor(x):
        return x.detach()
    inner = _constant(_functorch.get_unwrapped(x))
    if not _functorch.is_batchedtensor(x):
        return inner
    return _functorch._add_batch_dim(inner, _functorch.maybe_get_bdim(x), _functorch.maybe_get_level(x))


def derivatives() -> int:
    """The order of derivative that is asked for at most, as far as the transforms tell; autograd counts as one."""
    stack = _functorch.get_interpreter_stack() or []
    kinds = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    levels = sum(interpreter.key() in kinds for interpreter in stack)
    dual = forward_ad._current_level >= 0 and all(i.key() != _functorch.TransformType.Jvp for i in stack)
    return levels + dual + torch.is_grad_enabled()


def for_each(product: Callable[[Tensor, bool], Any], g: Tensor, again: bool) -> Any:
    """`product(g, again)`, tensors in a pytree; where a batched backward pass (`is_grads_batched`, a Jacobian of
    `torch.autograd.functional` with `vectorize`, `vmap`) gives many g at once, one after the other.

    Args:
        again: what is needed for it must be kept.
    """
    if _functorch.is_legacy_batchedtensor(g):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        rows = torch._remove_batch_dim(g, level, 1, 0)
        wrap: Callable[[Tensor], Tensor] = functools.partial(torch._add_batch_dim, batch_dim=0, level=level)
    elif hidden(g):
        samples = Samples()
        rows, wrap = samples.rows(g), samples.wrapped
    else:
        return product(g, again)
    with outside():
        results = [pytree.tree_flatten(product(row, True)) for row in rows.unbind()]
        columns = zip(*[leaves for leaves, _ in results])
        return pytree.tree_unflatten([x[0] if x[0] is None else wrap(torch.stack(x)) for x in columns], results[0][1])


class Null(NamedTuple):
    """Bases N and V of the left and right null space of a matrix: Nᵀ M = 0 and M V = 0, (d, m) each."""

    left: Tensor
    right: Tensor


def null_spaces(M: Tensor) -> Null:
    U, sizes, Vh = torch.linalg.svd(M)
    rank = int((sizes > len(M) * torch.finfo(M.dtype).eps * sizes.amax()).sum()) if len(M) else 0
    return Null(U[:, rank:], Vh[rank:].T)
