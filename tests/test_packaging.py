"""What is published is complete, and works outside of a checkout."""

import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import pyjlode
from pyjlode.bridge import runtime

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys, torch, pyjlode
from pathlib import Path
from pyjlode.bridge import runtime

package = Path(pyjlode.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert runtime._SOURCES == package / "julia", runtime._SOURCES
data = ("data/hare_lynx.csv", "data/hudson_bay.csv")
for name in ("py.typed", *data, "julia/Project.toml", "julia/src/PyJLODE.jl", "juliapkg.json"):
    assert (package / name).exists(), name
model = pyjlode.nn.NeuralODE(pyjlode.nn.TimeMLP([2, 8, 2]), engine="native")
model(torch.ones(3, 2)).sum().backward()
assert all(p.grad is not None for p in model.parameters())
print(len(pyjlode.nn.__all__))
"""


def test_what_is_published_has_absolute_links():
    """Where PyPI shows the README there are no files beside it."""
    made = runpy.run_path(str(ROOT / ".ci/published.py"))
    where = ("https://example.org/me/pyjlode", "v9.8.7")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    published = made["absolute"](text, *where)
    links = re.findall(r"\]\(([^)\s]+)\)", published)
    assert len(links) == len(re.findall(r"\]\(([^)\s]+)\)", text)) > 30
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert f"({where[0]}/raw/{where[1]}/docs/speed.png)" in published
    assert f"({where[0]}/blob/{where[1]}/docs/speed.md)" in published
    project = made["addressed"]((ROOT / "pyproject.toml").read_text(encoding="utf-8"), *where)
    section = project.split("[project.urls]\n")[1].split("\n\n")[0]
    assert [line.split(" = ")[0] for line in section.splitlines()] == [
        "Repository",
        "Documentation",
        "Changelog",
        "Issues",
    ]


def test_the_julia_package_is_found():
    for file, folder in ((ROOT / "pyjlode/juliapkg.json", ROOT / "pyjlode"), (ROOT / "packaging/juliapkg.json", ROOT)):
        path = json.loads(file.read_text())["packages"]["PyJLODE"]["path"]
        assert (folder / path / "Project.toml").exists()  # in a wheel `julia` lies in the package
    assert (runtime._SOURCES / "src" / "PyJLODE.jl").exists()


def test_a_wheels_juliapkg_differs_in_the_path_alone():
    ours, theirs = (json.loads((ROOT / x / "juliapkg.json").read_text()) for x in ("pyjlode", "packaging"))
    assert ours["packages"]["PyJLODE"].pop("path") != theirs["packages"]["PyJLODE"].pop("path")
    assert ours == theirs


def test_no_symbolic_links():
    """They are text files on Windows."""
    tracked = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in tracked.stdout.splitlines() if line.startswith("120000")]


def test_versions_agree():
    julia = re.search(r'^version = "(.+)"', (ROOT / "julia/Project.toml").read_text(), re.MULTILINE)[1]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert julia == cited == pyjlode.__version__


def compat():
    """The bounds that the Julia package sets, by name."""
    section = (ROOT / "julia/Project.toml").read_text().split("[compat]\n")[1].split("\n[")[0]
    return dict(re.findall(r'^(\w+) = "(.+)"', section, re.MULTILINE))


def within(version, bounds):
    """Whether a version is within bounds such as "3.80, 4": the first number that is not zero stays the same (Pkg)."""
    numbers = [int(x) for x in re.match(r"[\d.]+", version)[0].split(".")]
    for bound in bounds.split(","):
        least = [int(x) for x in bound.strip().lstrip("^").split(".")]
        fixed = next((i for i, x in enumerate(least) if x), len(least) - 1) + 1
        if numbers >= least and numbers[:fixed] == least[:fixed]:
            return True
    return False


def test_bounds_are_read_as_pkg_reads_them():
    assert within("1.10.2", "1.10")
    assert within("4.1.0", "3.80, 4")
    assert not within("3.79.9", "3.80, 4")
    assert not within("2.0.0", "1.10")
    assert not within("0.3.0", "0.2")


def test_bounds_of_julias_packages_agree():
    """juliapkg.json asks for what the Julia package asks for."""
    asked = json.loads((ROOT / "pyjlode/juliapkg.json").read_text())
    assert asked["packages"]["SciMLSensitivity"]["version"].lstrip("^") == compat()["SciMLSensitivity"]
    assert within(asked["julia"].lstrip("^"), compat()["julia"])


def test_the_versions_in_use_are_within_the_bounds(julia):
    """Of the packages and of Julia with which these tests run. That other versions resolve too takes the registry."""
    manifest = (Path(julia.project) / "Manifest.toml").read_text()
    used = dict(re.findall(r'^\[\[deps\.(\w+)\]\](?:\n(?!\[).*)*?\nversion = "(.+)"', manifest, re.MULTILINE))
    used["julia"] = re.search(r'^julia_version = "(.+)"', manifest, re.MULTILINE)[1]
    known = {name: bounds for name, bounds in compat().items() if name in used}
    assert {"julia", "OrdinaryDiffEqCore", "SciMLBase", "SciMLSensitivity"} <= set(known)
    assert [(name, used[name], bounds) for name, bounds in known.items() if not within(used[name], bounds)] == []


def resolved(julia, root):
    """Pkg's resolver on the bounds in `root`, with the versions in use as all that there is."""
    env = {**os.environ, "JULIA_LOAD_PATH": "@stdlib"}
    call = [julia.executable, "--startup-file=no", str(root / ".ci/resolve.jl"), str(julia.project)]
    return subprocess.run(call, capture_output=True, text=True, env=env, timeout=300)


def test_pkg_resolves_the_bounds(julia, tmp_path):
    """And sees bounds that cannot be met. Whether the general registry has what they allow is not asked."""
    done = resolved(julia, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^resolved: \d\d\d? packages, SciMLSensitivity 7\.", done.stdout, re.MULTILINE), done.stdout
    assert "left out: PyJLODE" not in done.stdout
    for name in (".ci/resolve.jl", "julia/Project.toml", "pyjlode/juliapkg.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            re.sub(r'^SciMLBase = ".+"', 'SciMLBase = "99"', (ROOT / name).read_text(), flags=re.M)
        )
    done = resolved(julia, tmp_path)
    assert done.returncode != 0
    assert "SciMLBase" in done.stderr


@pytest.mark.slow
def test_an_installed_wheel_works_outside_of_the_checkout(tmp_path):
    """`pip install .` in an environment of its own. The dependencies are this environment's, of which torch alone would
    take minutes; PyJLODE is not, as the program checks."""
    env = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(ROOT)]
    done = subprocess.run(install, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    # A folder that a .pth file names is searched; .pth files in it, such as that of an editable install, are not read.
    (Path(place) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    command = python.parent / "pyjlode"
    for call in ([python, "-c", PROGRAM], [command, "--version"], [python, "-m", "pyjlode", "doctor"]):
        done = subprocess.run([str(x) for x in call], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip()
