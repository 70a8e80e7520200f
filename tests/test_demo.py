"""The main job from end to end, in its quick form."""

import re

import pytest
import torch
from matplotlib import image

from pyjlode import plot
from pyjlode.data import hudson_bay
from pyjlode.tools import demo


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A quick demo: its result, what it printed, and its picture."""
    patch = pytest.MonkeyPatch()
    lines = []
    patch.setattr("builtins.print", lambda *text: lines.extend(text))
    out = tmp_path_factory.mktemp("demo") / "demo.png"
    try:
        result = demo.run(out, quick=True)
    finally:
        patch.undo()
    return result, "\n".join(lines), out


def rmse_by_hand(curve, counts):
    return [
        (sum((a - b) ** 2 for a, b in zip(*c)) / len(c[0])) ** 0.5 for c in zip(curve.T.tolist(), counts.T.tolist())
    ]


def test_errors_are_those_of_the_curve_against_the_record(outcome):
    result, _, _ = outcome
    years, pelts = hudson_bay()
    with torch.no_grad():
        curve = result.model.pelts(result.model(years))
    assert result.fit.tolist() == pytest.approx(rmse_by_hand(curve[:16], pelts[:16]))
    assert result.forecast.tolist() == pytest.approx(rmse_by_hand(curve[16:], pelts[16:]))
    assert result.last_cycle.tolist() == pytest.approx(rmse_by_hand(pelts[6:11], pelts[16:]))
    assert result.last_value.tolist() == pytest.approx(rmse_by_hand(pelts[15:16].repeat(5, 1), pelts[16:]))
    # Half the range of 1900-1915: hare 77.4 - 18.1, lynx 59.4 - 4.0.
    assert result.amplitude.tolist() == pytest.approx([29.65, 27.7])


def test_it_learns_the_cycle(outcome):
    # A flat line through the mean misses the training years by 68 % (hare) and 65 % (lynx) of the amplitude.
    result, _, _ = outcome
    pelts = hudson_bay()[1]
    flat = (pelts[:16] - pelts[:16].mean(0)).square().mean(0).sqrt()
    assert bool((result.fit < 0.6 * flat).all())


def test_table_has_every_figure(outcome):
    result, text, out = outcome
    for i, name in enumerate(("hare", "lynx")):
        (row,) = re.findall(rf"^{name} .*$", text, re.MULTILINE)
        amplitude = float(result.amplitude[i])
        expected = [f"{amplitude:.2f}"]
        for error in (result.fit, result.forecast, result.last_cycle, result.last_value):
            expected += [f"{float(error[i]):.2f}", f"({float(error[i]) / amplitude:.0%})"]
        assert row.split()[1:] == expected
    stats, history = result.model.ode.stats, result.history
    weights = 2 * 32 + 32 + 32 * 2 + 2
    for line in [
        f"parameters  {weights} in the network, 2 for the state of 1900",
        f"training    100 iterations, last loss {history.loss[-1]:.4f}, {result.wall:.1f} s",
        f"nfe         {sum(history.nfe)} forward, ",
        "solver      dopri5, adjoint=True",
        f"engine      torch: {stats.reason}",
        f"picture     {out}",
    ]:
        assert line in text
    assert stats.reason


def test_history_has_an_entry_for_each_iteration(outcome):
    history = outcome[0].history
    assert {len(history.loss), len(history.nfe), len(history.nfe_backward), len(history.years)} == {100}
    assert min(history.nfe) > 0
    assert history.years == sorted(history.years)
    assert (history.years[0], history.years[-1]) == (4, 16)


def test_picture_is_not_blank(outcome):
    picture = image.imread(outcome[2])[..., :3]
    assert picture.shape[:2] == (1312, 1920)
    # Ink in every quarter: the fit above, the plane below on the left, the training below on the right.
    for rows in (slice(0, 656), slice(656, None)):
        for columns in (slice(0, 960), slice(960, None)):
            share = float((picture[rows, columns] < 0.95).any(-1).mean())
            assert 0.01 < share < 0.6
    # In the colours of the species.
    for color in ((0xD9, 0x73, 0x0D), (0x1B, 0x6C, 0xA8)):
        near = abs(picture * 255 - color).max(-1) < 3
        assert int(near.sum()) > 500


def test_panels_have_titles_labels_and_legends(outcome):
    years, pelts = hudson_bay()
    canvas = plot.figure(12, 8.2)
    demo.draw(canvas, outcome[0], years, pelts)
    fit, plane, loss, nfe = canvas.axes
    assert all(ax.get_ylabel() for ax in canvas.axes)
    assert (fit.get_xlabel(), nfe.get_xlabel()) == ("year", "iteration")
    assert ("hare" in plane.get_xlabel(), "lynx" in plane.get_ylabel()) == (True, True)
    assert loss.get_yscale() == "log"
    assert [len(ax.get_legend().get_texts()) for ax in (fit, plane, nfe)] == [4, 4, 2]
    canvas.draw_without_rendering()
    for ax in (fit, plane):  # a legend on the title's line does not run into the title
        legend, title = ax.get_legend().get_window_extent(), ax._left_title.get_window_extent()
        assert not legend.overlaps(title)
        assert legend.y0 >= ax.get_window_extent().y1 - 1


@pytest.fixture
def briefly(monkeypatch):
    """A training of a few iterations."""
    train = demo.train
    monkeypatch.setattr(demo, "train", lambda *data, iterations: train(*data, iterations=25))


def test_the_seed_decides_the_numbers_and_leaves_the_users_alone(tmp_path, briefly):
    before = torch.get_rng_state()
    one, again, other = (demo.run(tmp_path / "demo.svg", quick=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert again.history.loss == one.history.loss
    assert torch.equal(again.forecast, one.forecast)
    assert other.history.loss != one.history.loss


@pytest.mark.parametrize(("method", "adjoint"), [("rk4", "backsolve"), ("tsit5", False)])
def test_other_solvers_and_gradients(method, adjoint, tmp_path, capsys, briefly):
    result = demo.run(tmp_path / "demo.png", quick=True, method=method, adjoint=adjoint)
    assert f"solver      {method}, adjoint={adjoint}" in capsys.readouterr().out
    assert min(result.history.loss) < 0.7 * result.history.loss[0]
    assert (sum(result.history.nfe_backward) > 0) == (adjoint == "backsolve")
