"""Trajectories per second of many Lorenz systems: one after the other, a batch, a sweep, and executors.

    python benchmarks/ensembles.py [--number N] [--processes P]

Lorenz systems with rho from 10 to 28, from (1, 1, 1) to t = 5, tsit5, rtol 1e-6, atol 1e-9, one thread in each process.
Wall-clock time, the best of three, with the workers already started. The sweep needs Julia.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import pyjlode

HOW: dict[str, Any] = {"method": "tsit5", "rtol": 1e-6, "atol": 1e-9}
T = [0.0, 5.0]


def lorenz(t: Any, h: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
    x, y, z = h.unbind(-1)
    return torch.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z], -1)


def best(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main(number: int, processes: int) -> None:
    torch.set_num_threads(1)
    h0 = torch.ones(number, 3, dtype=torch.float64)
    rho = torch.linspace(10, 28, number, dtype=torch.float64)

    def one_by_one() -> None:
        for i in range(20):
            pyjlode.odeint(lambda t, h, i=i: lorenz(t, h, rho[i]), h0[i], T, engine="torch", **HOW)

    def batch(engine: str, options: Any = None) -> Callable[[], Any]:
        options = {"batch_dims": 1} if options is None else options
        return lambda: pyjlode.odeint(lambda t, h: lorenz(t, h, rho), h0, T, engine=engine, options=options, **HOW)

    def shared(executor: Any, engine: str) -> Callable[[], Any]:
        return lambda: pyjlode.ensemble(lorenz, h0, T, params=rho, executor=executor, engine=engine, **HOW)

    engines = ["torch"]
    try:
        pyjlode.odeint(lambda t, h: -h, h0[0], T, engine="julia")
        engines.append("julia")
    except pyjlode.errors.EngineUnavailable as error:
        print(f"without Julia: {error}")
    rows = [
        ("one after the other, native", 20 / best(one_by_one)),
        ("a batch with common steps, native", number / best(batch("torch", {}))),
    ]
    for engine in engines:
        name = "a batch with steps of their own, native" if engine == "torch" else "a sweep, Julia"
        rows.append((name, number / best(batch(engine))))
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append((f"an ensemble on {processes} processes, {engine}", number / best(shared(pool, engine))))
    print("| | trajectories a second |\n| --- | --- |")
    for name, rate in rows:
        print(f"| {name} | {rate:,.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    main(args.number, args.processes)
