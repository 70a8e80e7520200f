"""`pyjlode setup`: install Julia and its packages, and compile them ahead."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from ..bridge.runtime import IMAGE, without
from ..errors import EngineUnavailable

# As julia/Project.toml has it.
_CUDA = {"uuid": "052768ef-5323-5732-b1bb-66c8b64840ba", "version": "5.11"}


def setup(*, cuda: bool = False, sysimage: bool = False) -> None:
    """Resolve the Julia environment with juliapkg, then load everything once so that it is compiled.

    Args:
        cuda: add CUDA.jl, by which the Julia engine solves where the state is: on a CUDA device.
        sysimage: then build one system image of all of it with PackageCompiler, which needs a C compiler; later starts
            use it for as long as the packages do not change.

    Raises:
        EngineUnavailable: something of this failed; the message says what.
    """
    executable, project = os.getenv("PYTHON_JULIACALL_EXE"), os.getenv("PYTHON_JULIACALL_PROJECT")
    if executable and project:
        print("PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT are set: their Julia is used as it is.")
        if cuda and without("CUDA"):
            raise EngineUnavailable(f"CUDA.jl is not in {project}: add it there, in Julia's package manager.")
    else:
        import juliapkg

        print("Resolving Julia and its packages (juliapkg); the first time downloads about 1 GB.", flush=True)
        try:
            if cuda:
                juliapkg.add("CUDA", **_CUDA)
            juliapkg.resolve()
            executable, project = juliapkg.executable(), juliapkg.project()
        except Exception as error:
            raise EngineUnavailable(
                f"juliapkg could not install Julia or its packages: {error}. It needs the internet; behind a proxy set "
                "JULIA_PKG_SERVER and HTTPS_PROXY."
            ) from error
    packages = "PyJLODE, SciMLSensitivity, PythonCall" + ", CUDA" * cuda
    _julia(executable, project, f"using {packages}", "Compiling the packages")
    if sysimage:
        target = Path(project) / IMAGE
        _julia(
            executable,
            project,
            'if isnothing(Base.find_package("PackageCompiler")) import Pkg; Pkg.activate(; temp=true); '
            'Pkg.add("PackageCompiler") end; import PackageCompiler; '
            "PackageCompiler.create_sysimage([:PythonCall, :PyJLODE, :SciMLSensitivity]; "
            f'sysimage_path=raw"{target}", project=raw"{project}")',
            "Building a system image (ten minutes or more)",
        )
    print("Done. `pyjlode doctor` shows what there is.")


def _julia(executable: str, project: str, code: str, what: str) -> None:
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    done = subprocess.run([executable, f"--project={project}", "--startup-file=no", "-e", code], check=False)
    if done.returncode:
        raise EngineUnavailable(f"{what} failed: Julia ended with status {done.returncode}; its output is above.")
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
