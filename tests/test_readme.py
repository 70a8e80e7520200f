"""What the README says is so."""

import re
from pathlib import Path

import pytest

import pyjlode

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def section(title):
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def first_cells(title):
    """The names in the first column of a section's table."""
    rows = re.findall(r"^\| (`.*?) \|", section(title), re.MULTILINE)
    return {name.strip('"') for row in rows[1:] for name in re.findall(r"`(.*?)`", row)}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs_as_written(block, capsys, request):
    if "julia" in block:
        request.getfixturevalue("julia")
    exec(compile(block, "README.md", "exec"), {})
    if "print(" in block:
        assert capsys.readouterr().out.strip()


def test_there_is_code_to_run():
    assert BLOCKS


def test_method_table_is_complete():
    of_first_order = {name for name, row in pyjlode.METHODS.items() if row.kind != "second"}
    assert first_cells("Methods") == {*of_first_order, "fixed_adams"}


def test_the_table_of_methods_for_second_order_is_complete():
    text = (ROOT / "docs" / "second_order.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d)", text, re.MULTILINE)
    assert dict(rows) == {name: str(row.order) for name, row in pyjlode.METHODS.items() if row.kind == "second"}


def test_gradient_table_is_complete():
    """With the table of docs/gradients.md, of those that save memory."""
    text = (ROOT / "docs" / "gradients.md").read_text()
    saving = set(re.findall(r"^\| `(\w\w+)` \|", text, re.MULTILINE))
    assert first_cells("Gradients") | saving == {*pyjlode.GRADIENTS, "True", "False"}


@pytest.mark.parametrize("name", re.findall(r"\b((?:benchmarks|docs)/\w+\.\w+)", TEXT))
def test_files_that_it_names_are_there(name):
    assert (ROOT / name).is_file()
