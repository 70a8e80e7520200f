"""Independent systems in one call: each solved by itself within Julia, with steps of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import NotCompiled
from ..problem import Field, Layout, ODEProblem
from .calls import Calls, Held
from .memory import Outcome, Request, Systems


class _Parts(TorchFunctionMode):
    """Within this context PyTorch computes with other tensors in the place of some.

    Args:
        parts: by the `id` of a tensor, what stands for it.
    """

    def __init__(self, parts: dict[int, Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def part(x: Tensor) -> Tensor:
            return self.parts.get(id(x), x)

        args, kwargs = pytree.tree_map_only(Tensor, part, (args, kwargs or {}))
        return func(*args, **kwargs)


class Sweep:
    """Systems that lie in a batch.

    A tensor that f holds and that has the batch's shape in front holds a part for each system, and so the field of one
    system is f with these parts: f is called for a batch of one.

    Args:
        p: with a `batch` of systems.

    Attributes:
        first: the problem of the first of them.

    Raises:
        NotCompiled: f holds what cannot be looked through.
    """

    def __init__(self, p: ODEProblem) -> None:
        from .codegen.capture import held_by  # half the cost of importing this package

        assert p.layout is not None
        self.p = p
        shape, dims = p.layout.shapes[0], p.options.batch_dims
        batch, one = shape[:dims], (slice(0, 1),) * dims
        tensors = held_by(p.f).tensors
        self.held = [x.detach() for x in tensors]
        self.varying = [x.shape[:dims] == batch for x in tensors]
        parts = {id(x): y[one] if varying else y for x, y, varying in zip(tensors, self.held, self.varying)}
        f = p.f.f

        def of_one(t: Tensor, h: Tensor) -> Tensor:
            with _Parts(parts):
                return f(t, h)

        size = p.y0.numel() // p.batch
        y0 = p.y0.detach()[:size]
        self.first = replace(
            p,
            f=Field(of_one, torch.Size((1,) * dims + shape[dims:]), p.f.source, parts),
            y0=y0,
            f0=None if p.f0 is None else p.f0[:size],
            layout=Layout(y0),
            batch=1,
        )

    def solve(self, calls: Calls, compiled: Any, algorithm: Held, request: Request) -> Outcome:
        """Solve them all.

        Args:
            compiled: the field of the first.

        Raises:
            NotCompiled: the field of some system differs from f.
        """
        p, dtype = self.p, self.p.y0.dtype
        places, values, start = [torch.empty(0, dtype=torch.int64)], [], 1
        for slot in compiled.program.trace.slots:
            x = self.held[slot]
            size = x.numel() // p.batch if self.varying[slot] else x.numel()
            if self.varying[slot]:
                places.append(torch.arange(start, start + size))
                values.append(x.reshape(p.batch, size).to("cpu", dtype))
            start += size
        slopes = torch.empty_like(p.y0.detach(), memory_format=torch.contiguous_format)
        systems = Systems(count=p.batch)
        systems.lend(places=torch.cat(places), slopes=slopes)
        if values:
            systems.lend(values=torch.cat(values, dim=1))
        outcome = calls.sweep(compiled.field, algorithm, request, systems)
        if p.f0 is not None:
            self._compare(compiled, slopes)
        return outcome

    def _compare(self, compiled: Any, slopes: Tensor) -> None:
        p, shape = self.p, (self.p.batch, -1)
        assert p.f0 is not None
        try:
            compiled.compare("f", slopes, p.f0.detach(), p.y0.detach())
        except NotCompiled as error:
            differ = (slopes - p.f0.detach()).abs().view(shape).amax(1)
            worst = int(differ.nan_to_num(math.inf).argmax())
            raise NotCompiled(
                f"the systems are not each f with its own part of what f holds (see system {worst}): a tensor counts "
                f"as one part for each system where its shape begins with the batch's. {error}"
            ) from error
