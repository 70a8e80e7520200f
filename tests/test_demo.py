"""The main job from end to end, in its quick form."""

import re

import pytest
import torch
from matplotlib import image

from pyjlode import plot
from pyjlode.data import hare_lynx
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


def test_errors_are_those_of_the_forecasts_against_the_record(outcome):
    """By a loop over the 27 first years and the years ahead of each."""
    result, _, _ = outcome
    pelts = hare_lynx()[1]
    for k in range(1, 6):
        wrong = {"neural ODE": [], "last cycle": [], "last year": []}
        for origin in range(59, 86):
            told = pelts[origin + k]
            forecast = result.model.forecast(pelts[origin], torch.tensor([0.0, float(k)], dtype=torch.float64))[-1]
            wrong["neural ODE"].append(forecast - told)
            wrong["last cycle"].append(pelts[origin + k - 10] - told)
            wrong["last year"].append(pelts[origin] - told)
        for name, errors in wrong.items():
            right = torch.stack(errors).square().mean(0).sqrt()
            # One solve of all has other steps than one of each, at rtol=atol=1e-3.
            torch.testing.assert_close(result.errors[name][k - 1], right, rtol=1e-2, atol=0)
    # Half the range of 1845-1904: hare 152.65 - 2.18, lynx 79.35 - 4.08.
    assert result.amplitude.tolist() == pytest.approx([75.235, 37.635])


def test_the_linear_model_is_the_best_of_its_kind(outcome):
    """On a record that is linear in the logarithms it makes no error."""
    model = outcome[0].model
    A = torch.tensor([[0.8, 0.5], [-0.5, 0.8]], dtype=torch.float64)
    h = [torch.tensor([1.0, 0.3], dtype=torch.float64)]
    for _ in range(90):
        h.append(A @ h[-1] + 0.1)
    found = demo.judged(model, model.pelts(torch.stack(h)))
    assert float(found["linear model"].max()) < 1e-6
    assert float(found["last cycle"].min()) > 0.1


def test_the_forecast_is_better_than_all_others_for_both_species(outcome):
    """A quick fit of one seed already; nothing of the years forecast was seen in training."""
    result, _, _ = outcome
    for name in ("linear model", "last cycle", "last year"):
        assert bool((result.error("neural ODE") < 0.85 * result.error(name)).all())


def test_training_sees_nothing_of_the_years_held_back(outcome):
    result, _, _ = outcome
    pelts = hare_lynx()[1]
    torch.manual_seed(0)
    model = demo.Populations(pelts[:60], method="dopri5", adjoint=True, engine="torch", rtol=1e-3, atol=1e-3)
    pelts[60:] = float("nan")
    history = demo.train(model, pelts[:60], iterations=100)
    assert history.loss == result.history.loss


def test_table_has_every_figure(outcome):
    result, text, out = outcome
    for i, name in enumerate(("hare", "lynx")):
        (row,) = re.findall(rf"^{name} .*$", text, re.MULTILINE)
        amplitude = float(result.amplitude[i])
        expected = [f"{amplitude:.2f}"]
        for error in (result.fit, *map(result.error, result.errors)):
            expected += [f"{float(error[i]):.2f}", f"({float(error[i]) / amplitude:.0%})"]
        assert row.split()[1:] == expected
    stats, history = result.model.ode.stats, result.history
    weights = 2 * 32 + 32 + 32 * 2 + 2
    for line in [
        "trained on 1845-1904; then 27 forecasts of 5 years each in 1905-1935, which training never saw",
        f"parameters  {weights} in the network",
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
    assert (history.years[0], history.years[-1]) == (2, 5)


def test_picture_is_not_blank(outcome):
    picture = image.imread(outcome[2])[..., :3]
    assert picture.shape[:2] == (1312, 1920)
    # Ink in every quarter: the record above, the plane below on the left, the errors below on the right.
    for rows in (slice(0, 656), slice(656, None)):
        for columns in (slice(0, 960), slice(960, None)):
            share = float((picture[rows, columns] < 0.95).any(-1).mean())
            assert 0.01 < share < 0.6
    # In the colours of the species.
    for color in ((0xD9, 0x73, 0x0D), (0x1B, 0x6C, 0xA8)):
        near = abs(picture * 255 - color).max(-1) < 3
        assert int(near.sum()) > 500


def test_panels_have_titles_labels_and_legends(outcome):
    years, pelts = hare_lynx()
    canvas = plot.figure(12, 8.2)
    demo.draw(canvas, outcome[0], years, pelts)
    record, plane, hare, lynx = canvas.axes
    assert "less error than the last cycle" in canvas.get_suptitle()
    assert all(ax.get_ylabel() for ax in (record, plane, hare))
    assert all(ax.get_xlabel() for ax in (plane, hare, lynx))
    assert ("hare" in plane.get_xlabel(), "lynx" in plane.get_ylabel()) == (True, True)
    assert [len(ax.get_legend().get_texts()) for ax in (record, plane, hare)] == [4, 2, 4]
    canvas.draw_without_rendering()
    for ax in (record, plane):  # a legend on the title's line does not run into the title
        legend, title = ax.get_legend().get_window_extent(), ax._left_title.get_window_extent()
        assert not legend.overlaps(title)
        assert legend.y0 >= ax.get_window_extent().y1 - 1


@pytest.fixture
def briefly(monkeypatch):
    """A training of a few iterations."""
    train = demo.train
    monkeypatch.setattr(demo, "train", lambda *data, iterations: train(*data, iterations=12))


def test_the_seed_decides_the_numbers_and_leaves_the_users_alone(tmp_path, briefly):
    before = torch.get_rng_state()
    one, again, other = (demo.run(tmp_path / "demo.svg", quick=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert again.history.loss == one.history.loss
    assert torch.equal(again.error("neural ODE"), one.error("neural ODE"))
    assert other.history.loss != one.history.loss


@pytest.mark.parametrize(("method", "adjoint"), [("rk4", "backsolve"), ("tsit5", False)])
def test_other_solvers_and_gradients(method, adjoint, tmp_path, capsys, briefly):
    result = demo.run(tmp_path / "demo.png", quick=True, method=method, adjoint=adjoint)
    assert f"solver      {method}, adjoint={adjoint}" in capsys.readouterr().out
    assert min(result.history.loss) < 0.9 * result.history.loss[0]
    assert (sum(result.history.nfe_backward) > 0) == (adjoint == "backsolve")
