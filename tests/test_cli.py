"""The command line, as a process: what it prints where, and its exit status."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import pyjlode


def run(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "pyjlode", *arguments], capture_output=True, text=True, cwd=cwd)


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pyjlode {pyjlode.__version__}\n", "")


def test_help_names_the_commands_and_their_options():
    assert "demo" in run("--help").stdout
    text = run("demo", "--help").stdout
    for option in ("--out", "--seed", "--adjoint", "--method", "--engine", "--quick"):
        assert option in text


def test_doctor_says_that_an_engine_is_missing(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON_JULIA", "JULIA_"))}
    env |= {"PYTHON_JULIAPKG_PROJECT": str(tmp_path / "none"), "JULIA_DEPOT_PATH": str(tmp_path)}
    command = [sys.executable, "-m", "pyjlode", "doctor"]
    told = subprocess.run(command, capture_output=True, text=True, env=env)
    assert told.returncode == 0  # what is there works
    assert told.stdout.endswith("The native engine works.\nThe Julia engine is not installed.\n")
    assert "pyjlode setup" in told.stdout
    for part in (pyjlode.__version__, torch.__version__, platform.platform(), "GB free", str(tmp_path), "CUDA"):
        assert part in told.stdout
    report = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, env=env).stdout)
    assert report["engines"] == {"torch": "works", "julia": "is not installed"}
    assert report["disk"] > 0


def test_setup_tells_of_an_existing_julia_and_of_no_internet():
    text = run("setup", "--help").stdout
    for word in ("PYTHON_JULIAPKG_EXE", "PYTHON_JULIACALL_PROJECT", "PYTHON_JULIAPKG_OFFLINE", "JULIA_PKG_SERVER"):
        assert word in text


@pytest.mark.parametrize("wrong", [["demo", "--qick"], ["dmeo"], [], ["demo", "--seed", "one"]], ids=str)
def test_wrong_usage_is_status_2_with_the_usage(wrong):
    done = run(*wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: pyjlode")


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
def test_an_error_is_status_1_and_its_message_on_stderr(tmp_path, wrong, message):
    done = run("demo", "--quick", *wrong, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pyjlode: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert "100%" not in done.stderr  # nobody waits for a training whose outcome is lost
    assert not list(tmp_path.iterdir())


def test_quick_demo_writes_the_picture_and_the_table(tmp_path):
    done = run("demo", "--quick", "--out", "wild.svg", cwd=tmp_path)
    assert done.returncode == 0
    assert "RMSE" in done.stdout
    assert done.stdout.endswith("picture     wild.svg\n")
    assert "<svg" in (tmp_path / "wild.svg").read_text()
    assert "loss" in done.stderr  # the progress bar does not mix with the table
    assert "Traceback" not in done.stderr
