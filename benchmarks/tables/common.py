"""What the tables share: arguments, runs that are kept and gone on with, and the printing of mean and spread."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))

import shared  # noqa: E402  # of the examples
from shared import fit, table  # noqa: E402  # training with checkpoints, and rows under a head

__all__ = ["ROOT", "Numbers", "Runs", "arguments", "example", "fit", "pm", "table"]

Numbers = dict[str, float]


def example(name: str) -> Any:
    """One of the examples, as a module."""
    return importlib.import_module(name)


def arguments(doc: str | None, name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments that every table has.

    Args:
        doc: of the program; its first line is the description.
        name: of the table, and of its results.
        argv: as typed; None is the command line.
    """
    parser = shared.parser(doc, Path(f"{name}.json"), "the results")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on; one with --quick")
    args = shared.parsed(parser, name, argv)
    if args.quick:
        args.seeds = 1
    return args


class Runs:
    """The numbers of each run, in a file that is written after each of them.

    Args:
        args: of `arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.out
        self.runs: dict[str, Numbers] = {}
        if args.resume and self.path.exists():
            self.runs = json.loads(self.path.read_text(encoding="utf-8"))["runs"]

    def all(self, settings: Iterable[tuple[str, ...]], run: Callable[..., Numbers]) -> dict[tuple[str, ...], list[Any]]:
        """Call `run(*setting, args)` for each setting and seed, seed by seed, unless its numbers are there.

        Args:
            run: seeds itself by `args.seed`, and gives numbers by name. The CPU seconds that it took are added.

        Returns:
            For each setting the numbers of its seeds.
        """
        settings = list(settings)
        found: dict[tuple[str, ...], list[Any]] = {setting: [] for setting in settings}
        for seed in range(self.args.seed, self.args.seed + self.args.seeds):
            for setting in settings:
                key = "/".join([*setting, str(seed)])
                if key not in self.runs:
                    args = argparse.Namespace(**{**vars(self.args), "seed": seed})
                    torch.manual_seed(seed)
                    start = time.process_time()
                    numbers = run(*setting, args)
                    # A training that went on from a checkpoint knows itself how long all of it took.
                    self.runs[key] = {"cpu_seconds": time.process_time() - start, **numbers}
                    self._write()
                    print(key, {name: float(f"{x:.4g}") for name, x in self.runs[key].items()}, flush=True)
                found[setting].append(self.runs[key])
        return found

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = {"table": self.args.name, "machine": machine(), "quick": self.args.quick, "runs": self.runs}
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.path)


def machine() -> str:
    """The processor, and what runs on it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (x.partition(":") for x in cpuinfo.read_text(encoding="utf-8").splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores, one thread, torch {torch.__version__}"


def pm(numbers: Sequence[Mapping[str, float]], key: str, form: str = ".3g", scale: float = 1.0) -> str:
    """Mean and standard deviation over the seeds of one number; the number alone where there is one seed."""
    x = [scale * run[key] for run in numbers]
    mean = format(statistics.fmean(x), form)
    return f"{mean} ± {format(statistics.stdev(x), form)}" if len(x) > 1 else mean
