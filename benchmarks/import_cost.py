"""What `import pyjlode` adds to `import torch`.

    python benchmarks/import_cost.py [--rounds N]

Each round imports torch alone, and torch with pyjlode, in two fresh processes that take turns at going first. Printed
are the medians over the rounds, and the median over the rounds of the ratio within a round. One round before the first
is not counted: it writes bytecode and fills the disk's cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

TORCH, BOTH = "import torch", "import torch, pyjlode"
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """The time of an import in a process of its own, without the start of Python."""
    done = subprocess.run([sys.executable, "-c", TIMED.format(statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {TORCH: [], BOTH: []}
    for i in range(rounds + 1):
        for statement in (TORCH, BOTH) if i % 2 else (BOTH, TORCH):
            took = seconds(statement)
            if i:
                times[statement].append(took)
    for statement, took in times.items():
        print(f"{statement:24s}{statistics.median(took):8.3f} s")
    ratios = [both / torch for torch, both in zip(times[TORCH], times[BOTH])]
    print(f"ratio{statistics.median(ratios):27.3f}   (target: below 1.05)")


if __name__ == "__main__":
    main()
