"""What all tests share."""

import gc
import os
import warnings
from pathlib import Path

# What "auto" means in these tests: the native engine, with a Julia or without. Tests of the Julia engine name it.
os.environ["PYJLODE_ENGINE"] = "torch"
# One thread here, and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from pyjlode.bridge import runtime

torch.set_num_threads(1)
with warnings.catch_warnings():  # PyTorch says this once in a process, in whichever test that is
    warnings.simplefilter("ignore")
    float(torch.ones((), requires_grad=True))

# "Explain" traces every line of Python, which takes a compiler ten times as long.
_PHASES = [x for x in hypothesis.Phase if x is not hypothesis.Phase.explain]
for _name, _examples in (("laws", 10), ("many", 30)):  # `make test`, and `make test-slow`
    hypothesis.settings.register_profile(_name, deadline=None, derandomize=True, max_examples=_examples, phases=_PHASES)
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


NO_JLARRAYS, NO_CUDA = "no JLArrays.jl", "no CUDA device"


@pytest.fixture(scope="session")
def jlarrays(julia):
    """Asked for by tests of what is done on devices, as `julia` is."""
    if runtime.without("JLArrays"):
        pytest.skip(NO_JLARRAYS)


SLOW = tuple(
    line for line in Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=NO_CUDA))


def pytest_collection_finish():
    """The garbage collector need not look at the modules and the ten thousand tests each time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    """One line: what was left out, and how to have it run."""
    reports = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    left = []
    for reason, what in (
        (NO_JULIA, "of the Julia engine (make julia sets it up)"),
        (NO_JLARRAYS, 'of the Julia engine on arrays like a device\'s (Pkg.add("JLArrays") in its project)'),
        (NO_CUDA, "of a CUDA device, which torch does not see"),
    ):
        if skipped := [report for report in reports if reason in report]:
            left.append(f"{len(skipped)} {what}")
            reports = [report for report in reports if reason not in report]
    if reports:
        left.append(f"{len(reports)} for other reasons (pytest -rs names them)")
    if config.option.markexpr == "not slow":
        left.append("the slow ones (make test-slow)")
    if left:
        terminalreporter.write_line(f"Not run: {', '.join(left)}.")
