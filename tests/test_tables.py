"""The programs of the published tables: that they run on small parts, go on where they stopped, and print what they
found; and the laws that need no training."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from pyjlode.data import sets

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks" / "tables"))


def program(name: str):
    return importlib.import_module(name)


@pytest.fixture
def vowels(monkeypatch):
    """A small set of the same form: two classes that differ in sign."""
    torch.manual_seed(0)
    y = torch.arange(40) % 2
    x = [(2.0 * c - 1) + 0.3 * torch.randn(5 + i % 4, 12) for i, c in enumerate(y.tolist())]
    monkeypatch.setattr(sets, "japanese_vowels", lambda: sets.Recordings(x, y, ["a", "b"], 24))


def test_runs_go_on_where_they_stopped(tmp_path, capsys):
    common, called = program("common"), []

    def run(name: str, args: argparse.Namespace) -> dict[str, float]:
        called.append((name, args.seed))
        if len(called) == 3:
            raise KeyboardInterrupt
        return {"x": float(args.seed)}

    out = str(tmp_path / "x.json")
    args = common.arguments("Doc.", "x", ["--out", out, "--seeds", "2"])
    with pytest.raises(KeyboardInterrupt):
        common.Runs(args).all([("a",), ("b",)], run)
    args = common.arguments("Doc.", "x", ["--out", out, "--seeds", "2", "--resume"])
    found = common.Runs(args).all([("a",), ("b",)], run)
    assert called == [("a", 0), ("b", 0), ("a", 1), ("a", 1), ("b", 1)]
    assert [x["x"] for x in found["b",]] == [0.0, 1.0]
    told = json.loads(Path(out).read_text())
    assert set(told["runs"]) == {"a/0", "b/0", "a/1", "b/1"}
    assert torch.__version__ in told["machine"]


def test_mean_and_spread():
    common = program("common")
    assert common.pm([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], "x", ".1f") == "2.0 ± 1.0"
    assert common.pm([{"x": 1.25}], "x", ".2f", 2.0) == "2.50"


@pytest.mark.parametrize("name", ["cde", "densities", "ernode", "hopper", "mnist"])
def test_each_says_what_it_is_and_what_it_takes(name, capsys):
    with pytest.raises(SystemExit) as end:
        program(name).main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--quick", "--seed", "--seeds", "--out", "--resume"))
    assert program(name).__doc__.splitlines()[0][:40] in text


def test_the_neural_cde_table(vowels, tmp_path, capsys):
    cde = program("cde")
    found = cde.main(["--quick", "--out", str(tmp_path / "cde.json")])
    assert len(found) == len(cde.MODELS) * len(cde.DROPPED)
    assert "98.7 ± 0.8" in capsys.readouterr().out


@pytest.mark.parametrize(("data", "channels", "classes"), [("japanese_vowels", 12, 9), ("basic_motions", 6, 4)])
def test_classifiers_of_series_have_as_many_parameters(data, channels, classes):
    cde = program("cde")
    makes = {**cde.MODELS, "neural CDE": lambda *sizes: cde.ControlledODE(*sizes, width=cde.DATA[data][1])}
    counts = [sum(p.numel() for p in make(channels, classes).parameters()) for make in makes.values()]
    assert max(counts) < 1.1 * min(counts)


def test_what_is_dropped_is_dropped_and_the_rest_is_not(vowels):
    (trained, validated, tested), classes = program("cde").series("japanese_vowels", 0.5, seed=3)
    assert classes == 2
    assert (len(trained.y), len(validated.y), len(tested.y)) == (19, 5, 16)
    for batch in (trained, validated, tested):
        seen = ~batch.x.isnan()
        assert bool((seen.all(2) == seen.any(2)).all())  # whole times are dropped
        lengths = batch.last + 1
        assert torch.equal(seen[..., 0].sum(1), lengths - torch.round(lengths * 0.5).long())
        assert not bool((seen[..., 0] & (torch.arange(batch.x.shape[1]) > batch.last[:, None])).any())


def test_the_state_of_a_series_does_not_depend_on_what_comes_after_it(vowels):
    """Padding, and what other series of the batch have, change no output."""
    cde = program("cde")
    (batch, *_), _ = cde.series("japanese_vowels", 0.3, seed=0)
    for make in cde.MODELS.values():
        torch.manual_seed(0)
        model = make(12, 2)
        with torch.no_grad():
            whole = model(batch.x, batch.last)
            i = int(batch.last.argmin())
            alone = model(batch.x[i : i + 1, : int(batch.last[i]) + 1], batch.last[i : i + 1])
        assert torch.allclose(whole[i], alone[0], atol=1e-5)


def test_hopper_is_seen_where_it_may_be(monkeypatch):
    hopper = program("hopper")
    torch.manual_seed(0)
    monkeypatch.setattr(sets, "hopper", lambda: torch.randn(80, 200, 14).cumsum(1))
    for task, told in (("interpolation", 20), ("extrapolation", 10)):
        part, tested = hopper.falls(task, 0.5, hopper.QUICK, 0)
        assert part.x.shape == (60, 20, 14)
        assert tested.x.shape == (20, 20, 14)
        assert float(part.x.min()) == 0
        assert float(part.x.max()) == pytest.approx(1)
        assert int(part.told.sum()) == told
        assert bool((part.seen.sum(1) == told // 2).all())
        assert not (task == "extrapolation" and bool(part.seen[:, 10:].any()))


def test_a_hopper_that_is_not_seen_changes_nothing(monkeypatch):
    """What is masked is not read by any model's recognition."""
    hopper = program("hopper")
    monkeypatch.setattr(sets, "hopper", lambda: torch.randn(80, 200, 14))
    part, _ = hopper.falls("interpolation", 0.3, hopper.QUICK, 0)
    part = part.rows(torch.arange(3))
    hidden = part._replace(x=torch.where(part.seen[..., None], part.x, 9.0))
    for make in hopper.MODELS.values():
        torch.manual_seed(0)
        model = make(hopper.QUICK._replace(hidden=8, latent=4))
        with torch.no_grad():
            assert torch.allclose(hopper.predicted(model, part), hopper.predicted(model, hidden), atol=1e-6)


def test_networks_of_the_digits_have_the_papers_sizes():
    mnist = program("mnist")
    sizes = {name: sum(p.numel() for p in mnist.network(name).parameters()) for name in mnist.REPORTED}
    assert sizes["ResNet"] / 1e6 == pytest.approx(0.60, abs=0.03)
    assert sizes["ODE-Net"] == sizes["RK-Net"]
    assert sizes["ODE-Net"] / 1e6 == pytest.approx(0.22, abs=0.015)


def test_memory_grows_with_depth_but_for_the_adjoint(monkeypatch):
    mnist = program("mnist")
    monkeypatch.setattr(mnist, "BATCH", 4)
    assert mnist.saved("ResNet", 4) == pytest.approx(2 * mnist.saved("ResNet", 2), rel=0.1)
    assert mnist.saved("RK-Net", 4) == pytest.approx(2 * mnist.saved("RK-Net", 2), rel=0.1)
    assert mnist.saved("ODE-Net", 8) == mnist.saved("ODE-Net", 2)


def test_a_digit_is_moved_whole():
    mnist = program("mnist")
    torch.manual_seed(0)
    x = torch.zeros(50, 1, 28, 28)
    x[:, :, 14, 14] = 1
    moved = mnist.shifted(x)
    assert moved.shape == x.shape
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(50))
    places = moved[:, 0].flatten(1).argmax(1)
    rows, columns = places // 28, places % 28
    assert (int(rows.min()), int(rows.max())) == (10, 18)
    assert (int(columns.min()), int(columns.max())) == (10, 18)


RESULTS = ROOT / "benchmarks" / "tables" / "results"


SPARSE = ["--seen", "10,30", "--models", "RNN with time deltas", "latent ODE, ODE-RNN"]
OPTIONS = {"cde_basic_motions": [["--data", "basic_motions"]], "hopper": [[], SPARSE]}


@pytest.mark.parametrize(
    ("name", "options"),
    [(x.stem, options) for x in sorted(RESULTS.glob("*.json")) for options in OPTIONS.get(x.stem, [[]])],
)
def test_the_page_has_what_the_programs_print(name, options, tmp_path, capsys):
    """From the runs that are kept, the program prints the numbers of docs/tables.md, and trains nothing."""
    told = json.loads((RESULTS / f"{name}.json").read_text())
    assert not told["quick"]
    out = tmp_path / "results.json"
    out.write_text(json.dumps(told))
    seeds = {key.rpartition("/")[2] for key in told["runs"]}
    program(told["table"]).main(["--resume", "--out", str(out), "--seeds", str(len(seeds)), *options])
    assert json.loads(out.read_text()) == told
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    rows = {line.split("  ")[0].strip(): line for line in printed.splitlines() if "±" in line}
    assert len(rows) > 1
    for first, line in rows.items():
        # Two tables of one program have rows of the same name.
        same = [x.strip("|").split("|")[1:] for x in page.splitlines() if x.startswith(f"| {first} |") and "±" in x]
        assert any(all(cell.strip() in line for cell in cells if "±" in cell) for cells in same), first
