"""The command `pyjlode`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import GRADIENTS, __version__
from .errors import PyJLODEError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        argv: the arguments after the name of the program; by default those of the process.
    """
    args = _parser().parse_args(argv)
    # Imported here: `pyjlode --version` and a mistyped option should not wait for what the demo needs.
    from . import demo

    try:
        demo.run(
            out=args.out, seed=args.seed, adjoint=args.adjoint, method=args.method, engine=args.engine, quick=args.quick
        )
    except (PyJLODEError, ImportError, OSError) as error:
        print(f"pyjlode: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyjlode", description="Solve and train differential equations from PyTorch.")
    parser.add_argument("--version", action="version", version=f"pyjlode {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="fit a neural ODE to a real record; print a table, write a picture",
        description="Fit a neural ODE to the Hudson's Bay Company's hare and lynx pelts of 1900-1915, and let it "
        "foretell 1916-1920. Prints a table and writes a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="demo.png", metavar="FILE", help="the picture; its ending picks the format")
    demo.add_argument("--seed", type=int, default=0, help="for the network's first weights")
    demo.add_argument(
        "--adjoint", type=_adjoint, default=True, metavar="NAME", help=f"true, false, {', '.join(GRADIENTS)}"
    )
    demo.add_argument("--method", default="dopri5", metavar="NAME", help="the solver, one of pyjlode.METHODS")
    demo.add_argument("--engine", default="auto", metavar="NAME", help="auto, torch or julia")
    demo.add_argument("--quick", action="store_true", help="a few seconds of training, for a rougher fit")
    return parser


def _adjoint(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)
