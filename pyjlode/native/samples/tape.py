"""The graphs of the steps of a solve as it was made, each by itself: what a backward pass walks back through where the
memory for that is there, and no step needs to be taken again."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...derivatives import check_graph
from ...parameters import graph_mark
from ...problem import ODEProblem
from ..sensitivity import Sum, graph_steps
from .explicit import Explicit


class Piece(NamedTuple):
    """One attempt.

    Attributes:
        y, k0: (n,) leaves: the states and slopes at the starts. y1, k1: (n,) at the ends.
        accepted: (B,) where it counts.
        j, i: outputs within it, (P,), of value `inside` (P, d), and those that are y1, `at_end`.
    """

    y: Tensor
    k0: Tensor
    y1: Tensor
    k1: Tensor
    accepted: np.ndarray
    inside: Tensor | None
    j: np.ndarray
    i: np.ndarray
    at_end: tuple[np.ndarray, np.ndarray]


class Tape:
    """The graphs of the first attempts of a solve, as many as fit into the memory for that.

    Args:
        k0: the slope at the start, with its graph, of the leaf y0.
    """

    def __init__(self, p: ODEProblem, y0: Tensor, k0: Tensor, mark: int, room: int) -> None:
        self.p, self.y0, self.k0, self.mark, self.room = p, y0, k0, mark, room
        self.pieces: list[Piece] = []
        self.retain_graph = p.retain_graph

    @classmethod
    def of(cls, p: ODEProblem) -> Tape | None:
        """For a problem whose gradient will be asked for; None where steps are to be taken again."""
        room = 0 if p.moving or p.event_fn is not None or p.options.jump_t or p.transformed else graph_steps(p)
        if room < 2:
            return None
        mark = graph_mark()
        with torch.enable_grad():
            y0 = p.y0.detach().requires_grad_()
            k0 = p.f(p.start, y0)
        return cls(p, y0, k0, mark, room)

    def add(self, piece: Piece) -> bool:
        """Whether there is still room for more."""
        self.pieces.append(piece)
        return len(self.pieces) < self.room

    def close(self) -> None:
        """
        Raises:
            Discovered: f uses tensors whose gradient would be lost.
        """
        outputs, leaves = [self.k0], [self.y0]
        for piece in self.pieces:
            outputs += [piece.y1, piece.k1, *([] if piece.inside is None else [piece.inside])]
            leaves += [piece.y, piece.k0]
        self.retain_graph = check_graph(self.p, outputs, leaves, self.mark)

    def pull(self, a: Tensor, g: Tensor, params: Sum, again: bool) -> Tensor:
        """Cotangents a (B, d) of the states at the ends and g (T, B, d) of the outputs -> (n,) that of y0."""
        p, B = self.p, self.p.batch
        keep = again or self.retain_graph
        slope = torch.zeros_like(a)
        for piece in reversed(self.pieces):
            mask = None if piece.accepted.all() else torch.from_numpy(piece.accepted).to(a.device)[:, None]
            j, i = piece.at_end
            if len(i):
                a = a.index_add(0, _index(i, a), g[_index(j, a), _index(i, a)])
            ends = (a, slope) if mask is None else (torch.where(mask, a, 0.0), torch.where(mask, slope, 0.0))
            outputs, bars = [piece.y1, piece.k1], [x.reshape(-1) for x in ends]
            if piece.inside is not None:
                outputs.append(piece.inside)
                bars.append(g[_index(piece.j, a), _index(piece.i, a)])
            y_bar, k_bar, *rest = _grad(outputs, [piece.y, piece.k0, *p.params], bars, keep)
            params.add(rest)
            y_bar, k_bar = (torch.zeros_like(a) if x is None else x.view(B, -1) for x in (y_bar, k_bar))
            a = y_bar if mask is None else torch.where(mask, y_bar, a)
            slope = k_bar if mask is None else torch.where(mask, k_bar, slope)
        y_bar, *rest = _grad([self.k0], [self.y0, *p.params], [slope.reshape(-1)], keep)
        params.add(rest)
        return a if y_bar is None else a + y_bar.view(B, -1)


def _index(x: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(x).to(like.device)


def _grad(outputs: list[Tensor], inputs: list[Tensor], bars: list[Tensor], keep: bool) -> list[Tensor | None]:
    pairs = [(o, b) for o, b in zip(outputs, bars) if o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, bars = (list(x) for x in zip(*pairs))
    return list(torch.autograd.grad(outputs, inputs, bars, allow_unused=True, retain_graph=keep))


def taped(maker: Any) -> bool:
    """Whether the steps of a maker can be kept so."""
    return type(maker) is Explicit
