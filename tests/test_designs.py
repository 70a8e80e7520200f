"""The designs that other tests take their cases from."""

import itertools

import pytest
from designs import covering, latin


@pytest.mark.parametrize("sizes", [(5, 4), (40, 6, 2, 2), (8, 3, 3), (2, 2, 2), (3, 3, 3), (4, 6, 2, 2, 3), (7, 1, 1)])
def test_any_two_values_meet(sizes):
    rows = [case.values for case in covering(*map(range, sizes))]
    assert len(rows) == len(set(rows)) <= 1.5 * sorted(sizes)[-1] * sorted(sizes)[-2]
    for (i, m), (k, n) in itertools.combinations(enumerate(sizes), 2):
        assert {(row[i], row[k]) for row in rows} == {*itertools.product(range(m), range(n))}


@pytest.mark.parametrize("sizes", [(3, 3), (7, 3), (4, 10), (1, 2)])
def test_each_value_has_its_turn_among_the_quick_ones(sizes):
    cases = latin(*map(range, sizes))
    assert {case.values for case in cases} == {*itertools.product(*map(range, sizes))}
    quick = [case.values for case in cases if not case.marks]
    assert len(quick) == max(sizes)
    for axis, size in enumerate(sizes):
        assert {values[axis] for values in quick} == {*range(size)}
