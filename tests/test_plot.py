"""Each function draws on the Axes that it is given, what it is given."""

import io
import sys

import numpy as np
import pytest
import torch
from matplotlib import image

from pyjlode import plot

F64 = torch.float64
T = torch.linspace(0, 6, 50, dtype=F64)
H = torch.stack([T.cos(), -T.sin()], -1)


def rotation(t, h):
    return torch.stack([h[..., 1], -h[..., 0]], -1)


@pytest.fixture
def ax():
    return plot.figure(4, 3).add_subplot()


def ink(ax):
    """How many pixels of the figure are not white."""
    stream = io.BytesIO()
    ax.figure.savefig(stream, format="png", dpi=50)
    stream.seek(0)
    return int((image.imread(stream)[..., :3] < 1).any(-1).sum())


def draw_trajectory(ax):
    return plot.trajectory(ax, T, H, labels=["position", "speed"])


def draw_portrait(ax):
    return plot.phase_portrait(ax, H, label="orbit")


def draw_field(ax):
    return plot.vector_field(ax, rotation, xlim=(-1, 2), ylim=(-3, 1), points=12)


@pytest.mark.parametrize("draw", [draw_trajectory, draw_portrait, draw_field])
def test_draws_on_the_axes_given_and_returns_it(ax, draw):
    empty = ink(ax)
    assert draw(ax) is ax
    assert ax.figure.axes == [ax]
    assert ink(ax) > empty + 100


@pytest.mark.parametrize(
    ("draw", "labels"), [(draw_trajectory, ["position", "speed"]), (draw_portrait, ["orbit"])], ids=["time", "plane"]
)
def test_labels_stand_in_the_legend(ax, draw, labels):
    draw(ax)
    assert [text.get_text() for text in ax.legend().get_texts()] == labels


def test_lines_of_a_trajectory_are_its_components(ax):
    plot.trajectory(ax, T, H, colors=["red", "blue"], lw=3)
    for i, (line, color) in enumerate(zip(ax.lines, ["red", "blue"])):
        assert np.array_equal(line.get_xdata(), T.numpy())
        assert np.array_equal(line.get_ydata(), H[:, i].numpy())
        assert (line.get_color(), line.get_linewidth()) == (color, 3)


@pytest.mark.parametrize(("shape", "lines"), [((50,), 1), ((50, 1), 1), ((50, 2, 3), 6)], ids=str)
def test_a_trajectory_of_any_shape_has_a_line_for_each_component(ax, shape, lines):
    plot.trajectory(ax, T, torch.rand(shape))
    assert len(ax.lines) == lines


def test_phase_portrait_has_a_line_for_each_trajectory(ax):
    batch = torch.stack([H, 2 * H, 3 * H], 1)
    plot.phase_portrait(ax, batch, dims=(1, 0))
    assert len(ax.lines) == 3
    for k, line in enumerate(ax.lines, 1):
        assert np.array_equal(line.get_xdata(), (k * H[:, 1]).numpy())
        assert np.array_equal(line.get_ydata(), (k * H[:, 0]).numpy())


def test_vector_field_covers_its_rectangle_and_asks_for_states_in_it(ax):
    asked = []

    def f(t, h):
        asked.append((float(t), h))
        return rotation(t, h)

    plot.vector_field(ax, f, xlim=(-1, 2), ylim=(-3, 1), t=0.5, points=12, dtype=torch.float32)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 2), (-3, 1))
    ((t, h),) = asked
    assert t == 0.5
    assert h.shape == (144, 2)
    assert h.dtype == torch.float32
    assert [h.amin(0).tolist(), h.amax(0).tolist()] == [[-1, -3], [2, 1]]


def test_streamlines_point_along_the_field(ax):
    # h' = (1, 2): every piece of every streamline has the slope 2.
    plot.vector_field(ax, lambda t, h: torch.tensor([1.0, 2.0]).expand_as(h), xlim=(0, 1), ylim=(0, 1), points=8)
    d = np.concatenate([np.diff(piece, axis=0) for piece in ax.collections[0].get_segments()])
    d = d[np.abs(d[:, 0]) > 1e-9]
    assert len(d) > 10
    assert np.allclose(d[:, 1] / d[:, 0], 2, atol=1e-3)


def test_tensors_with_a_graph_can_be_drawn(ax):
    a = torch.tensor(2.0, requires_grad=True)
    plot.trajectory(ax, T.clone().requires_grad_(), a * H)
    plot.phase_portrait(ax, a * H)
    plot.vector_field(ax, lambda t, h: a * rotation(t, h), xlim=(-1, 1), ylim=(-1, 1), points=8)


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pyjlode\[plot\]"):
        plot.figure(4, 3)
