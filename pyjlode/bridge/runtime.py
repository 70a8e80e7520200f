"""Julia itself: found without starting it, started once and late, and entered by one thread at a time."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import EngineUnavailable
from ..signals import of_a_signal, undisturbed
from .calls import Calls, Held

log = logging.getLogger("pyjlode")
Result = TypeVar("Result")


class Found(NamedTuple):
    """Where Julia is: its executable, the project that has the packages, and who says so."""

    executable: str
    project: str
    source: str


@dataclass
class Runtime:
    """What there is once of Julia in a process.

    Attributes:
        calls: the functions of PyJLODE.jl; None before the start.
        main: Julia's `Main`.
        pid, thread: where it was started.
        seconds: what loading took: "juliacall", "solvers" and, once the first gradient has asked for it, "sensitivity".
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    calls: Calls | None = None
    main: Any = None
    pid: int = 0
    thread: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    algorithms: dict[str, Held] = field(default_factory=dict)


_runtime = Runtime()

SETUP = "Run `pyjlode setup` once to install it (or set PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT)."


def find() -> Found | str:
    """Where Julia is set up for PyJLODE, or why it is not to be had, in words. Starts nothing and installs nothing."""
    return _FORKED if _is_fork() else _find()


_FORKED = (
    "Julia was started in the parent of this process and does not live on in a fork of it. Start the process by "
    "'spawn' (DataLoader: multiprocessing_context='spawn'), or use engine='torch' here."
)


def _is_fork() -> bool:
    """Whether this is a fork of the process that Julia was started in."""
    return _runtime.pid != 0 and os.getpid() != _runtime.pid


@functools.cache
def _find() -> Found | str:
    executable, project = os.getenv("PYTHON_JULIACALL_EXE"), os.getenv("PYTHON_JULIACALL_PROJECT")
    if executable and project:
        for path in (executable, project):
            if not os.path.exists(path):
                return f"PYTHON_JULIACALL_EXE or PYTHON_JULIACALL_PROJECT names {path}, which does not exist."
        return Found(executable, project, "PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT")
    if executable or project:
        return "PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT must both be set, and one is not."
    try:
        from juliapkg import deps, state
    except ImportError:
        return "juliacall is not installed: pip install juliacall."
    if not os.path.exists(state.STATE["meta"]):
        return f"no Julia is set up. {SETUP}"
    resolved = deps.can_skip_resolve()
    if not resolved:
        return f"Julia's packages are not up to date. {SETUP}"
    return Found(resolved["executable"], state.STATE["project"], "juliapkg")


IMAGE = "pyjlode-sysimage" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
# Beside the Python package in a checkout, in it where it was installed from a wheel.
_SOURCES = next(x / "julia" for x in Path(__file__).parents[1:3] if (x / "julia" / "Project.toml").exists())


def image(project: str) -> str | None:
    """The system image that `pyjlode setup --sysimage` left in a Julia project, if what it was made of is unchanged."""
    built = Path(project) / IMAGE
    if not built.exists():
        return None
    made_of = [Path(project) / "Manifest.toml", *_SOURCES.rglob("*.jl"), _SOURCES / "Project.toml"]
    if any(path.exists() and path.stat().st_mtime > built.stat().st_mtime for path in made_of):
        log.warning("the system image %s is older than Julia's packages and not used: pyjlode setup --sysimage", built)
        return None
    return str(built)


def started() -> bool:
    """Whether Julia runs in this process."""
    return _runtime.calls is not None and not _is_fork()


def seconds() -> dict[str, float]:
    """What loading took so far, in seconds."""
    return dict(_runtime.seconds)


@contextlib.contextmanager
def julia() -> Iterator[Calls]:
    """The functions of PyJLODE.jl, for as long as the block runs and for this thread alone; started if need be.

    Raises:
        EngineUnavailable: Julia is not set up or did not start, or this is a fork of the process that it started in.
    """
    if _is_fork():  # where another thread of the parent may have held the lock, and nobody will give it back
        raise EngineUnavailable(_FORKED)
    with _runtime.lock:
        if _runtime.calls is None:
            with undisturbed():  # a Julia that is half started can be neither used nor started again
                _start()
        calls = _runtime.calls
        assert calls is not None
        calls.release_dropped()
        if threading.get_ident() == _runtime.thread:
            yield calls
            return
        # Julia's collector waits for every thread that ran Julia to reach a safe point. The thread that started Julia
        # may be blocked in Python just now (in autograd, which runs this backward pass on another thread), and would
        # never reach one. A solve allocates little; what it leaves is collected when the first thread is back.
        collecting = calls.collect(False)
        try:
            yield calls
        finally:
            calls.collect(collecting)


def within(function: Callable[..., Result], *args: Any) -> Result:
    """`function(calls, *args)` within `julia()`, which as a context takes longer than some solves."""
    calls = _runtime.calls
    if calls is None or threading.get_ident() != _runtime.thread or _is_fork():
        with julia() as calls:
            return function(calls, *args)
    with _runtime.lock:
        calls.release_dropped()
        return function(calls, *args)


def evaluate(expression: str) -> Any:
    """A Julia expression in Julia's `Main`, for a thread that is within `julia()`."""
    return _runtime.main.seval(expression)


def algorithm(calls: Calls, expression: str) -> Held:
    """The solver that a Julia expression makes; made once."""
    if expression not in _runtime.algorithms:
        _runtime.algorithms[expression] = calls.algorithm(expression)
    return _runtime.algorithms[expression]


def sensitivity() -> None:
    """Load SciMLSensitivity, if it is not loaded yet: it takes several times as long as the solvers."""
    if "sensitivity" in _runtime.seconds:
        return
    with julia():
        start = time.perf_counter()
        evaluate("import SciMLSensitivity")
        _runtime.seconds["sensitivity"] = time.perf_counter() - start


def load(package: str, into: str = "") -> None:
    """Load a Julia package that not every solve needs, if it is not loaded yet.

    Args:
        into: a module that is to have what it exports.

    Raises:
        EngineUnavailable: it is not there, or does not load.
    """
    if package in _runtime.seconds:
        return
    with julia():
        start = time.perf_counter()
        try:
            evaluate(f"import {package}")
            if into:
                # `using` there takes a package that is among the dependencies of the module's own.
                evaluate(
                    f"foreach(name -> isdefined({into}, name) || "
                    f"Core.eval({into}, :(const $name = $(getfield({package}, name)))), names({package}))"
                )
        except Exception as error:
            if of_a_signal(error):
                raise
            raise EngineUnavailable(f"engine='julia': {package}.jl does not load: {error}") from error
        _runtime.seconds[package] = time.perf_counter() - start


def cuda_memory() -> int:
    """Bytes that CUDA.jl has taken on the device for its pool."""
    load("CUDA")
    with julia():
        return int(evaluate("CUDA.cached_memory()"))


@functools.cache
def without(package: str) -> str | None:
    """That a package is not in the project, in words; None where it is."""
    found = find()
    manifest = None if isinstance(found, str) else Path(found.project) / "Manifest.toml"
    if manifest and manifest.exists() and f"[[deps.{package}]]" in manifest.read_text():
        return None
    return f"{package}.jl is not among Julia's packages. `pyjlode setup --{package.lower()}` adds it"


def _torch_blas() -> tuple[int, ...] | None:
    """Addresses of dgemm, dgemv, sgemm and sgemv (Fortran, 32-bit integers) in PyTorch's own library, if it has them.

    On Linux it carries MKL and exports it; elsewhere fields that are compiled multiply by Julia's OpenBLAS.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        blas = ctypes.CDLL(str(library))
        found = [getattr(blas, name) for name in ("dgemm_", "dgemv_", "sgemm_", "sgemv_")]
    except (AttributeError, OSError):
        return None
    return tuple(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in found)


def _start() -> None:
    found = find()
    if isinstance(found, str):
        raise EngineUnavailable(f"engine='julia': {found}")
    # One thread, and Julia's own signal handlers off. The handlers would take Ctrl-C away from Python, and without them
    # Julia must not run several threads: it stops threads for its garbage collector by a page fault that the handlers
    # catch. With them off Ctrl-C raises KeyboardInterrupt in the next call of f, as in any Python program; what is lost
    # is threads within Julia. A user who needs those sets both variables.
    os.environ.setdefault("PYTHON_JULIACALL_HANDLE_SIGNALS", "no")
    os.environ.setdefault("PYTHON_JULIACALL_THREADS", "1")
    os.environ.setdefault("PYTHON_JULIACALL_AUTOLOAD_IPYTHON_EXTENSION", "no")
    if built := image(found.project):
        os.environ.setdefault("PYTHON_JULIACALL_SYSIMAGE", built)
    start = time.perf_counter()
    _runtime.pid, _runtime.thread = os.getpid(), threading.get_ident()
    try:
        with warnings.catch_warnings():
            # It warns whenever torch was imported first, which here is always; the crash that it speaks of came of
            # two copies of libstdc++ and does not occur with a Julia that finds the system's.
            warnings.filterwarnings("ignore", message="torch was imported before juliacall")
            import juliacall
        loaded = time.perf_counter()
        main = juliacall.Main
        main.seval("import PyJLODE")
        addresses = dict(pair.split("=") for pair in main.seval("PyJLODE.addresses()").split())
    except Exception as error:
        _runtime.pid = 0
        raise EngineUnavailable(
            f"Julia ({found.executable}, found by {found.source}) did not start: {error}. `pyjlode doctor` says more."
        ) from error
    _runtime.main = main
    _runtime.calls = Calls({name: int(address) for name, address in addresses.items()})
    _runtime.seconds.update(juliacall=loaded - start, solvers=time.perf_counter() - loaded)
    # Loaded here: an import that a time limit interrupts in a solve may stay half done.
    from .codegen import field  # noqa: F401

    main.seval(f"PyJLODE.BLAS.set_num_threads({torch.get_num_threads()})")
    if blas := _torch_blas():
        main.seval(f"PyJLODE.borrow_blas{blas}")
    log.info("Julia started in %.1f s (%s)", sum(_runtime.seconds.values()), found.source)
