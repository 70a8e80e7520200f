"""Public records to fit, small enough to travel with the package."""

from __future__ import annotations

from importlib.resources import files

import torch
from torch import Tensor

__all__ = ["hudson_bay"]


def hudson_bay() -> tuple[Tensor, Tensor]:
    """Hare and lynx pelts traded by the Hudson's Bay Company, 1900 to 1920.

    Two turns of the ten-year cycle of a predator (the Canadian lynx) and its prey (the snowshoe hare). Pelts stand for
    populations: how many animals were trapped depends on prices and on weather, too.

    Returns:
        `(years, pelts)`: shape (21,), the years 1900.0 to 1920.0; and shape (21, 2), thousands of pelts in that year,
        hare first and lynx second. Both float64.

    Source: Odum, Fundamentals of Ecology, 1953; table of Howard, Modeling Basics, 2009; as in Carpenter, Predator-prey
    population dynamics: the Lotka-Volterra model in Stan, 2018.
    """
    text = files(__name__).joinpath("hudson_bay.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    table = torch.tensor([[float(x) for x in line.split(",")] for line in lines[1:]], dtype=torch.float64)
    return table[:, 0].clone(), table[:, 1:].clone()
