"""The picture docs/speed.png, of the numbers in benchmarks/speed_chart.csv.

python benchmarks/speed_chart.py [--out docs/speed.png]

The numbers are copied from what the commands in the file's last column print; nothing is measured here.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from pyjlode.plot import figure

NUMBERS = Path(__file__).with_suffix(".csv")
COLORS = {
    "PyJLODE (Julia)": "#3949ab",
    "PyJLODE (native)": "#9fa8da",
    "diffrax": "#ef8a3c",
    "SciPy LSODA": "#7d9c6d",
    "torchdiffeq": "#9e9e9e",
}


def rows() -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by panel, problem and library, in the order of the file."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with NUMBERS.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            problems = found.setdefault(row["panel"], {})
            problems.setdefault(row["problem"], {})[row["library"]] = float(row["milliseconds"])
    return found


def chart(out: str) -> None:
    panels = rows()
    fig = figure(10.5, 5.4)
    axes = fig.subplots(1, len(panels), sharex=True)
    for ax, (panel, problems) in zip(axes, panels.items()):
        y, ticks, names = 0.0, [], []
        for problem, libraries in problems.items():
            for library, ms in libraries.items():
                ax.barh(y, ms, height=0.85, left=0, color=COLORS[library], zorder=2)
                ax.text(ms * 1.15, y, written(ms), va="center", fontsize=8, color="0.25", zorder=3)
                y += 1
            ticks.append(y - (len(libraries) + 1) / 2)
            names.append(problem.replace(", ", ",\n"))
            y += 0.9
        ax.set_xscale("log")
        ax.set_xlim(0.03, 3e4)
        ax.set_yticks(ticks, names, fontsize=9)
        ax.invert_yaxis()
        ax.set_title(f"one {panel}", fontsize=11, loc="left", weight="bold")
        ax.set_xlabel("milliseconds (logarithmic; shorter is better)", fontsize=9)
        ax.grid(axis="x", color="0.9", zorder=0)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
    used = {library for problems in panels.values() for x in problems.values() for library in x}
    handles = [axes[0].barh(0, 0, color=c, label=name) for name, c in COLORS.items() if name in used]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    fig.savefig(out, dpi=110)


def written(ms: float) -> str:
    return f"{ms / 1000:.2g} s" if ms >= 1000 else f"{ms:.2g} ms" if ms < 100 else f"{ms:.0f} ms"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/speed.png")
    chart(parser.parse_args().out)
