"""`pyjlode doctor`: what is found, whether it works, and what to do about what does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..bridge import runtime
from ..hints import EngineName
from ..odeint import odeint

MISSING = "is not installed"
NAMES = {"torch": "native", "julia": "Julia"}
# What Julia, its packages and what is compiled of them take on disk.
JULIA_BYTES = 5 * 10**9
# What `engine="julia"` is made of, in the order in which it is loaded.
PACKAGES = ("PythonCall", "PyJLODE", "SciMLBase", "OrdinaryDiffEqCore", "SciMLSensitivity")


@dataclass
class Trial:
    """One solve and one gradient: the oscillator h'' = -h over two periods, at rtol 1e-8.

    Attributes:
        solution: the last state; gradient: of its first element with respect to the initial state and the frequency.
        first, second: seconds for both together, the first time and again.
    """

    solution: list[float]
    gradient: list[float]
    first: float
    second: float


@dataclass
class Report:
    """What `pyjlode doctor` found; `problems` is empty where all that is there works.

    Attributes:
        versions: of PyJLODE, Python, torch, juliacall, Julia and its packages; None for what is not there.
        platform: the operating system and the processor's kind; with the number of its cores.
        disk: bytes that are free where Julia's packages are kept, or would be.
        engines: what can be said of each engine in a few words.
        julia: where Julia was found, or why not.
        seconds: what loading each part of Julia took.
        trials: by engine, and by engine and device where that is not the CPU.
        difference: largest difference of the trials; None where there is one.
        cuda: what torch says of the GPU.
        memory: of the GPU, in bytes: what is free, what there is, and what the pools of torch and CUDA.jl hold.
        problems: what is wrong, each with what to do about it.
        notes: what is as it should be, but worth knowing.
    """

    versions: dict[str, str | None]
    julia: str
    cuda: str
    platform: str = ""
    disk: int = 0
    engines: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    difference: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine() -> Report:
    """Look at everything, and solve a small problem on each engine that is there."""
    found = runtime.find()
    report = Report(
        versions={
            "PyJLODE": __version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "matplotlib": _version("matplotlib"),
            "juliacall": _version("juliacall"),
        },
        platform=f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch",
        disk=shutil.disk_usage(_depot()).free,
        julia=found if isinstance(found, str) else f"{found.executable}, found by {found.source}",
        cuda=_cuda(),
    )
    report.trials["torch"] = trial("torch")
    report.engines["torch"] = "works"
    _try_cuda(report, "torch")
    if isinstance(found, str):
        report.engines["julia"] = MISSING
        report.notes.append(f"The Julia engine is not there: {found}")
        if report.disk < JULIA_BYTES:
            report.notes.append(
                f"It would take about {_gb(JULIA_BYTES)} in {_depot()}, where {_gb(report.disk)} are free; "
                "JULIA_DEPOT_PATH names another place."
            )
        _compare(report)
        return report
    try:
        report.trials["julia"] = trial("julia")
        with runtime.julia():
            report.versions["Julia"] = runtime.evaluate("string(VERSION)")
            for name in PACKAGES:
                report.versions[name] = runtime.evaluate(_VERSION_OF)(name) or None
        report.engines["julia"] = "works"
    except Exception as error:
        report.engines["julia"] = "does not work"
        report.problems.append(
            f"The Julia engine was found and does not work: {error}\nRun `pyjlode setup` to install its packages anew."
        )
        return report
    if torch.cuda.is_available() and (why := runtime.without("CUDA")):
        report.notes.append(f"The Julia engine does not solve on the GPU: {why}.")
    else:
        _try_cuda(report, "julia")
    report.seconds = runtime.seconds()
    _compare(report)
    return report


def _try_cuda(report: Report, engine: EngineName) -> None:
    """Solve on the GPU too, where there is one."""
    if not torch.cuda.is_available():
        return
    try:
        report.trials[f"{engine} on cuda"] = trial(engine, "cuda")
        free, total = torch.cuda.mem_get_info()
        report.memory |= {"free": free, "total": total, "torch": torch.cuda.memory_reserved()}
        if engine == "julia":
            report.memory["CUDA.jl"] = runtime.cuda_memory()
    except Exception as error:
        report.problems.append(f"The engine {engine!r} does not solve on the GPU: {type(error).__name__}: {error}")


def _compare(report: Report) -> None:
    first, *others = ([*x.solution, *x.gradient] for x in report.trials.values())
    if not others:
        return
    report.difference = max(abs(a - b) for other in others for a, b in zip(first, other))
    if report.difference > 1e-5:
        report.problems.append(
            f"The trials disagree by {report.difference:.1e} on a problem that is solved to 1e-8. Please report this "
            "with the output of `pyjlode doctor --json`."
        )


_VERSION_OF = """
name -> begin
    loaded = [m for (id, m) in Base.loaded_modules if id.name == name]
    isempty(loaded) ? "" : string(something(pkgversion(only(loaded)), "?"))
end
"""


def trial(engine: EngineName, device: str = "cpu") -> Trial:
    """Solve and differentiate the oscillator twice on one engine."""
    walls = []
    for _ in range(2):
        start = time.perf_counter()
        h0 = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device, requires_grad=True)
        frequency = torch.tensor(1.0, dtype=torch.float64, device=device, requires_grad=True)
        t = torch.tensor([0.0, 4 * torch.pi], dtype=torch.float64)

        def f(t: Any, h: torch.Tensor, w: torch.Tensor = frequency) -> torch.Tensor:
            return torch.stack([h[1], -w * w * h[0]])

        h = odeint(f, h0, t, engine=engine, adjoint="gauss", method="tsit5", rtol=1e-8, atol=1e-8)[-1]
        grads = torch.autograd.grad(h[0], [h0, frequency])
        walls.append(time.perf_counter() - start)
    return Trial(h.tolist(), [*grads[0].tolist(), float(grads[1])], *walls)


def _depot() -> Path:
    """Where Julia's packages are kept, or the nearest folder above that exists."""
    said = os.environ.get("JULIA_DEPOT_PATH", "").split(os.pathsep)[0]
    folder = Path(said) if said else Path.home() / ".julia"
    return next(x for x in (folder, *folder.absolute().parents) if x.exists())


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"


def _version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def _cuda() -> str:
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def render(report: Report) -> str:
    """The report for a person."""
    lines = [f"{name:20s} {version or 'not there'}" for name, version in report.versions.items()]
    lines += [
        f"{'platform':20s} {report.platform}",
        f"{'disk':20s} {_gb(report.disk)} free for Julia in {_depot()}",
        f"{'Julia at':20s} {'-' if report.engines.get('julia') == MISSING else report.julia}",
        f"{'CUDA':20s} {report.cuda}",
        "",
    ]
    if report.seconds:
        lines += [f"{'load ' + name:20s} {seconds:.1f} s" for name, seconds in report.seconds.items()]
    for engine, done in report.trials.items():
        lines.append(
            f"{'engine ' + engine:20s} solve and gradient {done.first:.2f} s the first time, {done.second:.3f} s after"
        )
    if report.difference is not None:
        lines.append(f"{'difference':20s} {report.difference:.1e} between them at rtol 1e-8")
    if report.memory:
        lines.append(f"{'GPU memory, MiB':20s} " + ", ".join(f"{k} {v >> 20}" for k, v in report.memory.items()))
    lines += ["", *report.notes, *report.problems] if report.notes or report.problems else []
    lines += ["", *(f"The {NAMES[name]} engine {state}." for name, state in report.engines.items())]
    return "\n".join(lines)


def to_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2)
