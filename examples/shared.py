"""What the examples share: arguments, training that goes on where it stopped, tables, and the look of pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pyjlode.tools.demo import FAINT, INK, SHADE, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "FAINT", "INK", "SHADE", "STYLE", "arguments", "fit", "headline", "parsed", "parser", "table"]

COLORS = ("#1b6ca8", "#d9730d", "#2e8b57", "#6b4c9a", "#c2334d", "#8a8f99")


def arguments(doc: str | None, name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments that every example has.

    Args:
        doc: of the example; its first line is the description.
        name: of the example, and of its picture.
        argv: as typed; None is the command line.
    """
    return parsed(parser(doc, Path(f"{name}.png"), "the picture"), name, argv)


def parser(doc: str | None, out: Path, made: str) -> argparse.ArgumentParser:
    """Of the arguments that examples and tables have.

    Args:
        doc: of the program; its first line is the description.
        out: where it writes what is `made`.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds of training, for a rougher result")
    parser.add_argument("--resume", action="store_true", help="go on from what an earlier run has kept")
    parser.add_argument("--seed", type=int, default=0, help="for data, first weights and batches")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=made)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR", help="where training is kept"
    )
    return parser


def parsed(parser: argparse.ArgumentParser, name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """What was typed, with the name of the program; and PyTorch told to use one thread."""
    args = parser.parse_args(argv)
    args.name = name
    torch.set_num_threads(1)  # these networks are too small to be shared out
    return args


def fit(
    what: str,
    parts: Mapping[str, Any],
    step: Callable[[int], dict[str, float]],
    steps: int,
    args: argparse.Namespace,
    *,
    every: int = 100,
) -> list[dict[str, float]]:
    """Call `step(i)` for i from 0 to `steps`, with a bar and checkpoints.

    A run that was stopped and resumed makes the same numbers as one that was not: the checkpoint holds the state of the
    random numbers, too.

    Args:
        what: name of this training, for the bar and the checkpoint.
        parts: what has a state: model, optimizer, schedule ... by name; each has `state_dict` and `load_state_dict`.
        step: trains once, and returns the numbers to show and to keep.
        every: steps between checkpoints.

    Returns:
        What each step returned.
    """
    path = args.checkpoints / f"{args.name}-{what}-{args.seed}{'-quick' if args.quick else ''}.pt"
    history: list[dict[str, float]] = []
    if args.resume and path.exists():
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
        torch.set_rng_state(saved["random"])
        history = saved["history"]
    bar = tqdm(range(len(history), steps), desc=what, initial=len(history), total=steps, dynamic_ncols=True)
    for i in bar:
        history.append(step(i))
        bar.set_postfix({key: f"{value:.4g}" for key, value in history[-1].items()}, refresh=False)
        if (i + 1) % every == 0 or i + 1 == steps:
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {name: part.state_dict() for name, part in parts.items()}
            fresh = path.with_suffix(".new")  # a run that is stopped while it writes must leave the old one whole
            torch.save({"parts": state, "random": torch.get_rng_state(), "history": history}, fresh)
            fresh.replace(path)
    return history


def headline(canvas: Figure, words: str) -> None:
    """The finding, in one line above all panels."""
    canvas.suptitle(words, fontsize=16, fontweight="bold", x=0.012, ha="left", color=INK)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> str:
    """Rows under a head, for a terminal: the first column to the left, numbers to the right."""
    cells = [[x if isinstance(x, str) else f"{x:.4g}" for x in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))) for row in cells
    ]
    return "\n".join(["", *([title] if title else []), lines[0], "-" * len(lines[0]), *lines[1:]])
