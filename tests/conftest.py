"""What all tests share."""

import os

# What "auto" means in these tests: the native engine, with a Julia or without. Tests of the Julia engine name it.
os.environ["PYJLODE_ENGINE"] = "torch"

import hypothesis
import pytest
import torch

from pyjlode.bridge import runtime

torch.set_num_threads(1)

# "Explain" traces every line of Python, which takes a compiler ten times as long.
_PHASES = [x for x in hypothesis.Phase if x is not hypothesis.Phase.explain]
hypothesis.settings.register_profile("laws", deadline=None, derandomize=True, max_examples=40, phases=_PHASES)
hypothesis.settings.load_profile("laws")


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whichever tests run before it."""
    torch.manual_seed(0)


NO_JULIA = "no Julia"


@pytest.fixture(scope="session")
def julia():
    """Asked for by tests that need Julia: they are skipped where there is none, and one line at the end says so."""
    found = runtime.find()
    if isinstance(found, str):
        pytest.skip(NO_JULIA)
    return found


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_JULIA in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests of the Julia engine were skipped: {runtime.find()}")
