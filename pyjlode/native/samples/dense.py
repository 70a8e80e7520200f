"""Dense output of independent systems: each is interpolated within its own steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...problem import ODEProblem
from .steps import Maker, between

if TYPE_CHECKING:
    from .loop import Trail


class Dense:
    """The solution as a function of time, of one for all systems or of one for each.

    Steps are added as they are made, whichever systems accepted them.
    """

    def __init__(self, p: ODEProblem, maker: Maker) -> None:
        assert p.rows is not None
        self.p, self.maker, self.sign, self.B = p, maker, p.direction, p.batch
        self.steps: list[Any] = []
        self.owners: list[np.ndarray] = []

    def add(self, step: Any, accepted: np.ndarray) -> None:
        self.steps.append(step)
        self.owners.append(accepted)

    def close(self, trail: Trail, failed: np.ndarray) -> None:
        """No more steps come."""
        self.failed = failed
        self.count = trail.count
        n = max(len(trail), 1)
        self.owner = np.zeros((n, self.B), dtype=np.int64)  # the number of each system's k-th step
        self.ends = np.full((n, self.B), math.inf)
        place = np.zeros(self.B, dtype=np.int64)
        for number, accepted in enumerate(self.owners):
            systems = accepted.nonzero()[0]
            self.owner[place[systems], systems] = number
            place[systems] += 1
        made = np.arange(n)[:, None] < self.count
        self.ends[made] = (self.sign * (trail.t0 + trail.dt))[:n][made]

    def at(self, t: float) -> Tensor:
        """The states at one time, (n,)."""
        return self(torch.tensor([t], dtype=torch.float64, device="cpu"))[0]

    def __call__(self, times: Tensor) -> Tensor:
        """States at `times` of shape (M,), or (B, M) -> (M, n). Before the start and beyond the end they are those of
        the first and the last step of a system."""
        B, p = self.B, self.p
        rows = times.expand(B, -1) if times.ndim == 1 else times
        values = self.sign * rows.detach().cpu().double().numpy()
        M = rows.shape[1]
        k = np.stack([np.searchsorted(self.ends[:, i], values[i]) for i in range(B)]) if M else np.zeros((B, 0), int)
        k = np.minimum(k, np.maximum(self.count - 1, 0)[:, None])
        stepped = np.broadcast_to((self.count > 0)[:, None], k.shape)
        number = self.owner[k, np.arange(B)[:, None]]
        systems, columns = (x.reshape(-1) for x in np.meshgrid(np.arange(B), np.arange(M), indexing="ij"))
        number, moved = number.reshape(-1), stepped.reshape(-1)
        order: list[np.ndarray] = []
        parts: list[Tensor] = []
        for one in np.unique(number[moved]):
            here = (moved & (number == one)).nonzero()[0]
            asked = rows[torch.from_numpy(systems[here]), torch.from_numpy(columns[here])]
            parts.append(between(self.maker, self.steps[one], systems[here], asked))
            order.append(here)
        if (~moved).any():
            here = (~moved).nonzero()[0]
            parts.append(p.y0.view(B, -1)[torch.from_numpy(systems[here]).to(p.y0.device)])
            order.append(here)
        if not parts:
            return p.y0.new_zeros(M, p.y0.numel())
        back = np.argsort(np.concatenate(order))
        flat = torch.cat(parts)[torch.from_numpy(back).to(p.y0.device)]
        if self.failed.any():
            last = np.where(self.count > 0, self.ends[np.maximum(self.count - 1, 0), np.arange(B)], -math.inf)
            lost = (self.failed[:, None] & (values > last[:, None])).reshape(-1)
            flat = torch.where(torch.from_numpy(lost).to(flat.device)[:, None], math.nan, flat)
        return flat.view(B, M, -1).transpose(0, 1).reshape(M, -1)
