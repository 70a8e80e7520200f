"""Fewer cases than a whole product, in which any two values still meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def latin(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """All pairs as arguments of `parametrize`. Those in which each row and each column has its turn are quick, as many
    as the longer of the two has values; the others are slow.
    """
    rows, columns = list(rows), list(columns)
    quick = {(k % len(rows), k % len(columns)) for k in range(max(len(rows), len(columns)))}
    return [
        pytest.param(row, column, marks=() if (i, j) in quick else pytest.mark.slow)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def covering(*axes: Iterable[Any]) -> list[Any]:
    """Rows of a product of axes in which any two values of different axes stand together at least once, as arguments
    of `parametrize`: what goes wrong by two of the parameters shows in one of them (Kuhn, Kacker & Lei 2010, Practical
    Combinatorial Testing, NIST SP 800-142). All pairs of the two longest axes, each with values of the others that
    meet the most that they have not met.
    """
    values = [list(axis) for axis in axes]
    long = sorted(range(len(values)), key=lambda k: (-len(values[k]), k))
    sizes = [len(values[k]) for k in long]
    met: set[tuple[int, int, int, int]] = set()

    def pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}

    rows: list[tuple[int, ...]] = []
    others = list(itertools.product(*map(range, sizes[2:])))
    for number, start in enumerate(itertools.product(*map(range, sizes[:2]))):
        turned = [start + others[(number + k) % len(others)] for k in range(len(others))]
        rows.append(max(turned, key=lambda row: len(pairs(row) - met)))
        met |= pairs(rows[-1])
    for row in itertools.product(*map(range, sizes)):  # what the shorter axes have left
        if pairs(row) - met:
            rows.append(row)
            met |= pairs(row)
    back = [long.index(k) for k in range(len(values))]
    return [pytest.param(*(values[k][row[at]] for k, at in enumerate(back))) for row in sorted(rows)]
