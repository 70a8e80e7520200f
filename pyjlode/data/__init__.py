"""Public records to fit, small enough to travel with the package."""

from __future__ import annotations

from importlib.resources import files

import torch
from torch import Tensor

__all__ = ["hare_lynx", "hudson_bay"]


def hare_lynx() -> tuple[Tensor, Tensor]:
    """Hare and lynx pelts in the area of the Hudson's Bay Company, 1845 to 1935.

    Nine turns of the ten-year cycle of a predator (the Canadian lynx) and its prey (the snowshoe hare). Pelts stand for
    populations: how many animals were trapped depends on prices and on weather, too, and the record was put together
    from several sources.

    Returns:
        `(years, pelts)`: shape (91,), the years 1845.0 to 1935.0; and shape (91, 2), thousands of pelts in that year,
        hare first and lynx second. Both float64.

    Source: MacLulich, Fluctuations in the numbers of the varying hare, 1937; Elton & Nicholson, The ten-year cycle in
    numbers of the lynx in Canada, 1942.
    """
    return _read("hare_lynx.csv")


def hudson_bay() -> tuple[Tensor, Tensor]:
    """Hare and lynx pelts traded by the Hudson's Bay Company, 1900 to 1920.

    Two turns of the cycle, in a record that many texts fit; `hare_lynx` is a longer one, of other sources.

    Returns:
        `(years, pelts)`: shape (21,), the years 1900.0 to 1920.0; and shape (21, 2), thousands of pelts in that year,
        hare first and lynx second. Both float64.

    Source: Odum, Fundamentals of Ecology, 1953; table of Howard, Modeling Basics, 2009; as in Carpenter, Predator-prey
    population dynamics: the Lotka-Volterra model in Stan, 2018.
    """
    return _read("hudson_bay.csv")


def _read(name: str) -> tuple[Tensor, Tensor]:
    text = files(__name__).joinpath(name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    table = torch.tensor([[float(x) for x in line.split(",")] for line in lines[1:]], dtype=torch.float64)
    return table[:, 0].clone(), table[:, 1:].clone()
