"""Laws of series and their times."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from pyjlode.errors import BadShape, BadTime
from pyjlode.nn.series import series, union_of_times


@hypothesis.given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4))
def test_union_has_every_time_once_in_order(rows):
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    union, index = union_of_times(*tensors)
    assert bool((union.diff() > 0).all())
    assert set(union.tolist()) == {float(x) for row in rows for x in row}
    for t, i in zip(tensors, index):
        assert torch.equal(union[i], t)


def test_shapes_are_one_form():
    x, t = torch.randn(3, 4, 2), torch.arange(4.0)
    s = series(x, t, None, 0.0)
    assert s.t.shape == (3, 4)
    assert bool(s.mask.all())
    rows = torch.rand(3, 4) < 0.5
    s = series(x, t.expand(3, 4), rows, 0.0)
    assert torch.equal(s.observed, rows)
    assert torch.equal(s.x, x * rows[..., None])


@pytest.mark.parametrize(
    ("x", "t", "mask", "error", "match"),
    [
        (torch.zeros(3, 4), torch.arange(4.0), None, BadShape, "features"),
        (torch.zeros(3, 4, 2), torch.arange(5.0), None, BadShape, "t must"),
        (torch.zeros(3, 4, 2), torch.arange(4.0), torch.ones(4), BadShape, "mask must"),
        (torch.zeros(3, 4, 2), -torch.arange(4.0), None, BadTime, "decrease"),
        (torch.zeros(3, 4, 2), torch.arange(4.0) - 1, None, BadTime, "first is -1"),
        (torch.zeros(3, 4, 2), torch.arange(4.0, requires_grad=True), None, BadTime, "gradient"),
    ],
)
def test_what_is_wrong_is_said(x, t, mask, error, match):
    with pytest.raises(error, match=match):
        series(x, t, mask, 0.0)
