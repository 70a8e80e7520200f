"""What the README and docs/ say is so: their code runs, their tables are complete, their links lead somewhere."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest
import torch

import pyjlode
from pyjlode import errors

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path):
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def name(path):
    return path.relative_to(ROOT).as_posix()


def plain(code):
    """Code without comments."""
    return re.sub(r"#.*", "", code)


def of_julia(code):
    return re.search(r'"julia"|julia_method|julia_function', plain(code))


def needs(code):
    """The marks of a page's code."""
    code = plain(code)
    marks = [pytest.mark.slow] if "compile=True" in code else []
    if 'device="cuda"' in code or ".cuda()" in code:
        marks.append(pytest.mark.cuda)
    return marks


def run(code, where, namespace):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, where, "exec"), namespace)
    return printed.getvalue()


README_BLOCKS = [pytest.param(code, id=str(i)) for i, code in enumerate(blocks(README))]
CODED = [pytest.param(path, id=name(path), marks=needs("".join(blocks(path)))) for path in PAGES if blocks(path)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Code of the pages writes pictures where it runs, and may set the default dtype."""
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("code", README_BLOCKS)
def test_each_block_of_the_readme_runs_by_itself(code):
    assert bool(run(code, "README.md", {})) == ("print(" in code)


@pytest.mark.parametrize("path", CODED)
def test_the_blocks_of_a_page_run_one_after_the_other(path, request):
    code = blocks(path)
    if any(of_julia(block) for block in code):
        request.getfixturevalue("julia")
    namespace = {}
    for block in code:
        assert bool(run(block, name(path), namespace)) == ("print(" in block)


def test_there_is_code_to_run():
    assert len(README_BLOCKS) >= 2
    assert len(CODED) >= 15


def first_cells(path, title):
    """The names in the first column of the table that begins with this header."""
    table = path.read_text(encoding="utf-8").split(f"| {title} |", 1)[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {name.strip('"') for row in rows for name in re.findall(r"`(.*?)`", row)}


def test_method_table_is_complete():
    of_first_order = {name for name, row in pyjlode.METHODS.items() if row.kind != "second"}
    assert first_cells(ROOT / "docs/methods.md", "`method`") == {*of_first_order, "fixed_adams"}


def test_the_table_of_methods_for_second_order_is_complete():
    text = (ROOT / "docs/second_order.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d)", text, re.MULTILINE)
    assert dict(rows) == {name: str(row.order) for name, row in pyjlode.METHODS.items() if row.kind == "second"}


def test_gradient_table_is_complete():
    assert first_cells(ROOT / "docs/adjoints.md", "`adjoint`") == {*pyjlode.GRADIENTS, "True", "False"}


def test_every_error_has_a_row():
    mine = {x for x, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.PyJLODEError)}
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/failures.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert told == mine - {"PyJLODEError", "SolveError"}


def test_every_public_name_has_its_place_in_the_reference():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    told = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    assert set(pyjlode.__all__) - {"METHODS", "GRADIENTS", "nn"} <= told
    assert set(pyjlode.nn.__all__) <= told
    assert {"METHODS", "GRADIENTS"} <= set(re.findall(r"`pyjlode\.(\w+)`", text))


@pytest.mark.parametrize("path", [README, ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *PAGES], ids=name)
def test_files_that_it_names_are_there(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link
    for file in re.findall(r"\b((?:benchmarks|docs|examples|tests|pyjlode)/[\w/]+\.\w+)", text):
        assert (ROOT / file).exists(), file


def test_external_links_are_well_formed():
    """Whether they lead somewhere, `make links` asks. An identifier that the bibliography shows is the one it links."""
    found = runpy.run_path(str(ROOT / ".ci/links.py"))["external"]()
    assert len(found) >= 20
    for file, address in found:
        assert address.startswith("https://"), (file, address)
        if "doi.org" in address:
            assert re.fullmatch(r"https://doi\.org/10\.\d{4,9}/[-.;()/:\w]+", address), (file, address)
            assert address.count("(") == address.count(")"), (file, address)
    text = (ROOT / "docs/about/bibliography.md").read_text(encoding="utf-8")
    shown = re.findall(r"\[(10\.\S+?)\]\(https://doi\.org/(\S+)\)", text)
    assert len(shown) >= 20
    assert [pair for pair in shown if pair[0] != pair[1]] == []


def test_the_readme_can_be_read_in_two_minutes():
    text = re.sub(r"```.*?```", "", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130
    assert len(re.findall(r"[A-Za-z]{2,}", text)) < 900
