"""The command line, as a process: what it prints where, and its exit status."""

import json
import platform
import subprocess
import sys

import pytest
import torch

import pyjlode
from pyjlode.bridge import runtime
from pyjlode.tools import cli, demo


def run(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "pyjlode", *arguments], capture_output=True, text=True, cwd=cwd)


def called(capsys, *arguments):
    """The same in this process, which spares the seconds of a start: the exit status, and what was printed."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as end:
        status = end.code
    return (status, *capsys.readouterr())


def test_version(capsys):
    assert called(capsys, "--version") == (0, f"pyjlode {pyjlode.__version__}\n", "")


def test_help_names_the_commands_and_their_options(capsys):
    assert "demo" in called(capsys, "--help")[1]
    text = called(capsys, "demo", "--help")[1]
    for option in ("--out", "--seed", "--adjoint", "--method", "--engine", "--quick"):
        assert option in text


def test_doctor_says_that_an_engine_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "find", lambda: f"no Julia is set up. {runtime.SETUP}")
    monkeypatch.setenv("JULIA_DEPOT_PATH", str(tmp_path / "depot"))
    status, out, _ = called(capsys, "doctor")
    assert status == 0  # what is there works
    assert out.endswith("The native engine works.\nThe Julia engine is not installed.\n")
    assert "All is well" not in out
    assert "pyjlode setup" in out
    for part in (pyjlode.__version__, torch.__version__, platform.platform(), "GB free", str(tmp_path), "CUDA"):
        assert part in out
    report = json.loads(called(capsys, "doctor", "--json")[1])
    assert report["engines"] == {"torch": "works", "julia": "is not installed"}
    assert report["disk"] > 0


def test_setup_tells_of_an_existing_julia_and_of_no_internet(capsys):
    text = called(capsys, "setup", "--help")[1]
    for word in ("PYTHON_JULIAPKG_EXE", "PYTHON_JULIACALL_PROJECT", "PYTHON_JULIAPKG_OFFLINE", "JULIA_PKG_SERVER"):
        assert word in text


@pytest.mark.parametrize("wrong", [["demo", "--qick"], ["dmeo"], [], ["demo", "--seed", "one"]], ids=str)
def test_wrong_usage_is_status_2_with_the_usage(wrong, capsys):
    status, out, err = called(capsys, *wrong)
    assert (status, out) == (2, "")
    assert err.startswith("usage: pyjlode")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "dorpi5"], "did you mean 'dopri5'"),
        (["--adjoint", "discreet"], "did you mean 'discrete'"),
        (["--engine", "fortran"], "engine must be"),
        (["--out", "nowhere/demo.png"], "nowhere"),
        (["--out", "demo.docx"], "docx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_status_1_and_its_message_on_stderr(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = called(capsys, "demo", "--quick", *wrong)
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("pyjlode: ")
    assert message in last
    assert "Traceback" not in err
    assert "100%" not in err  # nobody waits for a training whose outcome is lost
    assert not list(tmp_path.iterdir())


def test_a_process_ends_with_the_status(tmp_path):
    done = run("demo", "--quick", "--method", "dorpi5", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("pyjlode: ")
    assert "Traceback" not in done.stderr


def test_quick_demo_writes_the_picture_and_the_table(tmp_path, monkeypatch, capsys):
    train = demo.train
    monkeypatch.setattr(demo, "train", lambda *data, iterations: train(*data, iterations=iterations // 20))
    monkeypatch.chdir(tmp_path)
    status, out, err = called(capsys, "demo", "--quick", "--out", "wild.svg")
    assert not status
    assert "RMSE" in out
    assert out.endswith("picture     wild.svg\n")
    assert "<svg" in (tmp_path / "wild.svg").read_text()
    assert "loss" in err  # the progress bar does not mix with the table
