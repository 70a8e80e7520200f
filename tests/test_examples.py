"""Each example runs, in a small setting, finds what it looks for, and leaves its picture."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.append(str(EXAMPLES))  # an example is a program: it imports its neighbours by their bare names


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


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
)
def test_every_example_takes_the_same_options(name):
    """It reads them by what all share, which has --quick, --resume, --seed, --out and --help; and the index has it."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f'arguments(__doc__, "{name}"' in text or f'parsed(options, "{name}"' in text
    row = index_row(name)
    assert f"| `{name}.py` |" in row
    if "docs/" in row:
        assert f"](../docs/{name}.png)" in row
        assert (EXAMPLES.parent / "docs" / f"{name}.png").stat().st_size > 5000


def index_row(name):
    lines = (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if f"`{name}.py`" in line), "")


@pytest.fixture(autouse=True)
def default_threads():
    assert torch.get_num_threads() == 1


def test_magnetic_pendulum(tmp_path):
    _, nearest = run("magnetic_pendulum", tmp_path, n=9, executor=None)
    assert nearest.unique().tolist() == [0, 1, 2]
    # The pendulum and its mirror image in the axis of the first magnet, which swaps the other two.
    mirrored = torch.tensor([0, 2, 1])[nearest.flip(1)]
    assert float((mirrored == nearest).double().mean()) > 0.9


def test_distributed_training(tmp_path):
    """Two processes train what one does; where one dies, the same command goes on and trains the same."""
    program = [str(EXAMPLES / "distributed_training.py"), "--steps", "12", "--every", "5"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def losses(name, *command):
        where = ["--checkpoints", str(tmp_path / name), "--out", str(tmp_path / f"{name}.png")]
        done = subprocess.run([*command, *where], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        kept = tmp_path / name / "distributed_training-0.pt"
        return done, torch.load(kept, weights_only=True)["losses"]

    alone, whole = losses("one", sys.executable, *program)
    assert alone.returncode == 0, alone.stderr
    died, part = losses("two", *torchrun, *program, "--die-at", "7")
    assert died.returncode != 0
    assert len(part) == 5
    again, rest = losses("two", *torchrun, *program, "--resume")
    assert again.returncode == 0, again.stderr
    assert len(whole) == len(rest) == 12
    assert rest == pytest.approx(whole, rel=1e-3)
