"""Every Triton kernel that the session's cases and engines launch, compiled by many processes at once; nothing runs.

    python -m benchmarks.gpu.compiled_first [--dry-run] [--jobs N] [--out FOLDER]

Triton keeps what it compiles on disk, where the parts that follow find it. A launch is compiled as its first run would
do it (`JITFunction.warmup`), on tensors of the meta device. Writes compiled.csv: launches, kernels, seconds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import outlined_passes
from benchmarks.gpu.kernels import chosen
from benchmarks.gpu.machine import Machine, machine_of, told
from benchmarks.gpu.tiles_timed import tried
from relprop.kernels import launch as kernels
from relprop.kernels.launch import Launch, recording

# Beside what `tiles_timed` tries: sizes of the checks, of the timings and of the sanitizer's run.
PASSES = ({"large": False}, {"large": True}, {"large": False, "tiny": True})


@dataclass
class Outline(Machine):
    """A machine whose tensors have no numbers."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")


def launches(architecture: int, dry: bool) -> Iterator[Launch]:
    """One of each kernel that would be compiled, in an order that does not change."""
    seen: set[Any] = set()
    for launch in itertools.chain(
        of_cases(architecture, dry), outlined_passes.launches(Machine(dry, Path()), architecture)
    ):
        if (key := _key(launch)) not in seen:
            seen.add(key)
            yield launch


def of_cases(architecture: int, dry: bool) -> Iterator[Launch]:
    """Of kernels by themselves."""
    with recording(architecture) as recorded:
        for sizes in PASSES:
            machine = Outline(dry, Path(), tiny=sizes.get("tiny", False), backends=("triton", "library"))
            for case, backend in chosen(machine, large=sizes["large"]):
                case.runs[backend]()
        for case, *_ in tried(Outline(dry, Path(), backends=("triton",)), architecture):
            case.runs["triton"]()
    yield from recorded


def _key(launch: Launch) -> Any:
    """What Triton compiles anew for: types, constants, and which numbers are 1 or multiples of 16."""
    given = tuple(
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else (type(a), a == 1, a % 16 == 0, abs(a) < 2**31)
        for a in launch.arguments
    )
    return launch.kernel, given, tuple(sorted(launch.constants.items(), key=lambda c: c[0])), _options(launch)


def _options(launch: Launch) -> tuple[int, int]:
    return launch.configuration.warps, launch.configuration.stages


@dataclass(frozen=True)
class Order:
    """A launch as another process gets it, with its kernel by name."""

    module: str
    kernel: str
    launch: Launch

    @classmethod
    def of(cls, launch: Launch) -> Order:
        return cls(launch.kernel.__module__, launch.kernel.__name__, replace(launch, kernel=None))


def compile_one(order: Order) -> tuple[str, float, str]:
    """Name, seconds and what went wrong."""
    launch, start, failed = order.launch, time.perf_counter(), ""
    warps, stages = _options(launch)
    try:
        kernel = getattr(importlib.import_module(order.module), order.kernel)
        kernel.warmup(*launch.arguments, grid=launch.grid, num_warps=warps, num_stages=stages, **launch.constants)
    except Exception as problem:  # its check will fail and say so, too
        failed = told(problem)
    return order.kernel, time.perf_counter() - start, failed


def main(machine: Machine, jobs: int) -> int:
    """Compile all; 1 where one cannot be."""
    machine.begin("compiled")
    if machine.dry or kernels.interpreted:
        machine.add(kernels=sum(1 for _ in launches(90, dry=True)), failed="a dry run compiles nothing")
        return 0
    major, minor = torch.cuda.get_device_capability()
    start, status, orders = time.perf_counter(), 0, []
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        try:  # the first are compiled while engines are made
            for launch in launches(10 * major + minor, dry=False):
                orders.append(pool.submit(compile_one, Order.of(launch)))
        except Exception as problem:  # its point will fail and say so, too
            machine.add(kernel="-", seconds=time.perf_counter() - start, failed=told(problem))
            status = 1
        for order in orders:
            name, seconds, failed = order.result()
            if failed or seconds > 10:
                machine.add(kernel=name, seconds=seconds, failed=failed)
            status |= bool(failed)
    machine.add(kernel="all", kernels=len(orders), jobs=jobs, seconds=time.perf_counter() - start, failed="")
    return status


def arguments_of(given: Iterable[str] | None = None) -> tuple[Machine, int]:
    """The machine, and how many processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    found, rest = parser.parse_known_args(None if given is None else list(given))
    return machine_of(rest), found.jobs


if __name__ == "__main__":
    raise SystemExit(main(*arguments_of()))
