"""Laws of all pictures: they are not empty, in any style, and their labels can be read; and those of the steps that a
solve made and of the density that a flow has."""

import itertools
import math

import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import pyjlode
from pyjlode import plot
from pyjlode.errors import BadOption
from pyjlode.nn import CNF, TimeMLP

T = torch.linspace(0, 6, 40)
H = torch.stack([torch.cos(T), -torch.sin(T)], -1)


def turn(t, h):
    return h @ torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=h.dtype)


def bumpy(t, h):
    """A kink that the solver meets unprepared: some steps are rejected."""
    return -h + 40 * torch.exp(-((t - 3) ** 2) * 200)


def solution(**kwargs):
    return pyjlode.solve(bumpy, torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 6.0]), **kwargs)


def trajectory(ax):
    return plot.trajectory(ax, T, H, labels=["cos", "-sin"])


def phase_portrait(ax):
    return plot.phase_portrait(ax, H, label="orbit")


def vector_field(ax):
    return plot.vector_field(ax, turn, xlim=(-2, 2), ylim=(-1, 1), points=12)


def density_flow(ax):
    flow = CNF(TimeMLP([2, 8, 2]), 2, rtol=1e-3, atol=1e-3)
    return plot.density_flow(ax, flow, xlim=(-3, 3), ylim=(-2, 2), t=0.5, points=24)


def steps(ax):
    return plot.steps(ax, solution())


def of_solution(ax):
    h0 = (torch.tensor([1.0, 0.0]), torch.tensor(2.0))
    return pyjlode.solve(lambda t, h: (turn(t, h[0]), -h[1]), h0, T, rtol=1e-5).plot(ax)


PICTURES = [trajectory, phase_portrait, vector_field, density_flow, steps, of_solution]


def rendered(ax):
    """What the figure looks like, as numbers, and the renderer that drew it."""
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()), canvas.get_renderer()


@pytest.mark.parametrize("style", ["default", "ggplot", "dark_background"])
@pytest.mark.parametrize("draw", PICTURES)
def test_draws_on_the_axes_that_it_is_given(draw, style):
    """In any style; the picture is not that of empty Axes with the same limits."""
    with matplotlib.style.context(style):
        ax, empty = (plot.figure(4, 3).add_subplot() for _ in range(2))
        assert draw(ax) is ax
        empty.set(xlim=ax.get_xlim(), ylim=ax.get_ylim(), xlabel=ax.get_xlabel())
        different = (rendered(ax)[0] != rendered(empty)[0]).any(-1)
    assert different.mean() > 0.002


UNLABELLED = [vector_field, density_flow]  # one field, one image: nothing that a legend would tell apart


@pytest.mark.parametrize("draw", PICTURES)
def test_labels_stand_apart(draw):
    """Title, labels, ticks and legend are inside the figure, and no two of them overlap."""
    ax = draw(plot.figure(5, 4).add_subplot())
    ax.set(title="Title", xlabel="time", ylabel="state")
    handles, labels = ax.get_legend_handles_labels()
    assert bool(labels) == (draw not in UNLABELLED)
    assert len(set(labels)) == len(labels)
    assert all(labels)
    legends = [ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.12))] if labels else []
    _, renderer = rendered(ax)
    texts = [ax.title, ax.xaxis.label, ax.yaxis.label]
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        # Matplotlib has ticks beyond the limits, too, and does not draw them.
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [x.get_window_extent(renderer) for x in (*texts, *legends)]
    assert len(boxes) > 6
    assert all(len(legend.get_texts()) == len(labels) for legend in legends)
    inside = ax.figure.bbox
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 and b.y1 <= inside.y1 for b in boxes)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.shrunk(0.95, 0.95).overlaps(b)]


def test_density_is_the_flow_s():
    ax = density_flow(plot.figure(4, 3).add_subplot())
    image = ax.images[0]
    assert (ax.get_xlim(), ax.get_ylim()) == ((-3, 3), (-2, 2))
    side = 6 / 23 * 4 / 23
    assert 0.5 < float(image.get_array().sum()) * side < 1.0
    flow = CNF(lambda t, h: h, torch.distributions.Normal(torch.zeros(2), 0.3))
    image = plot.density_flow(plot.figure(4, 3).add_subplot(), flow, xlim=(-3, 3), ylim=(-2, 2), points=25).images[0]
    assert float(image.get_array()[12, 12]) == pytest.approx(math.exp(-2) / (2 * math.pi * 0.09), rel=1e-3)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "implicit_adams"])
def test_steps_are_those_that_were_made(method):
    """As many as the account says, end to end over the whole span."""
    options = {} if method in ("dopri5", "bosh3") else {"options": {"step_size": 0.02}, "rtol": 1e-3, "atol": 1e-3}
    solved = solution(method=method, **options)
    accepted, rejected = solved.steps.accepted, solved.steps.rejected
    assert (len(accepted), len(rejected)) == (solved.stats.naccept, solved.stats.nreject)
    assert bool(rejected) == (method in ("dopri5", "bosh3"))
    assert accepted[0][0] == 0.0
    ends = [t + dt for t, dt in accepted]
    assert ends == pytest.approx([*(t for t, _ in accepted[1:]), 6.0])


def test_steps_draws_a_mark_for_each():
    solved = solution()
    *_, accepted, rejected = plot.steps(plot.figure(4, 3).add_subplot(), solved).lines
    assert len(accepted.get_xdata()) == solved.stats.naccept
    assert len(rejected.get_xdata()) == solved.stats.nreject


def test_own_callbacks_are_still_called():
    def f(t, h):
        return bumpy(t, h)

    seen = []
    f.callback_accept_step = lambda t0, y0, dt: seen.append((float(t0), float(dt)))
    solved = pyjlode.solve(f, torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 6.0]))
    assert seen == solved.steps.accepted


def test_no_account_of_steps_is_said():
    for solved in (solution(dense=False), solution(method="scipy_solver")):
        with pytest.raises(BadOption, match="account of its steps"):
            plot.steps(plot.figure(4, 3).add_subplot(), solved)


def test_solution_draws_its_dense_output():
    ax = solution().plot()
    assert len(ax.lines[0].get_xdata()) > 100
    assert len(solution(dense=False).plot().lines[0].get_xdata()) == 2
    complex_state = pyjlode.solve(lambda t, h: 1j * h, torch.ones(1, dtype=torch.complex128), T.double())
    assert len(complex_state.plot().lines) == 2
