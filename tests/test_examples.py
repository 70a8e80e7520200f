"""Each example runs, in a small setting, finds what it looks for, and leaves its picture."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, tmp_path, **settings):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = tmp_path / f"{name}.png"
    result = module.main(**settings, out=str(picture))
    assert picture.stat().st_size > 5000
    return module, result


def test_robertson_fit(tmp_path):
    module, k = run("robertson_fit", tmp_path, steps=12)
    assert float((k / module.TRUE).log().abs().max()) < 0.4


def test_vanderpol_auto(tmp_path):
    _, switches = run("vanderpol_auto", tmp_path, mu=200.0)
    assert [name for _, name in switches[:2]] == ["rodas5p", "tsit5"]


def test_three_body(tmp_path):
    _, gaps = run("three_body", tmp_path, tolerances=(1e-7, 1e-10))
    assert gaps[1] < 1e-4
    assert gaps[1] < gaps[0]


def test_double_pendulum(tmp_path):
    _, error = run("double_pendulum", tmp_path, warm_up=15, iterations=20)
    assert error < 0.5


def test_heat_rod(tmp_path):
    _, error = run("heat_rod", tmp_path, n=12, steps=8)
    assert error < 0.35


def test_every_example_is_run():
    """By a test of its name, here or in the module of the models' examples."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*examples.py"))
    programs = [path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()]
    assert len(programs) >= 10
    assert all(f"def test_{name}(" in text for name in programs)


@pytest.fixture(autouse=True)
def default_threads():
    assert torch.get_num_threads() == 1
