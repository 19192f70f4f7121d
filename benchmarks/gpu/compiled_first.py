"""Every Triton kernel that the session's cases launch, compiled by many processes at once; nothing is launched.

    python -m benchmarks.gpu.compiled_first [--dry-run] [--jobs N] [--out FOLDER]

Triton keeps what it compiles on disk, where the parts that follow find it. A launch is compiled as its first run would
do it (`JITFunction.warmup`), on tensors of the meta device. Writes compiled.csv: launches, kernels, seconds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def launches(architecture: int, dry: bool) -> list[Launch]:
    """One of each kernel that would be compiled, in an order that does not change."""
    found: dict[Any, Launch] = {}
    with recording(architecture) as recorded:
        for sizes in PASSES:
            machine = Outline(dry, Path(), tiny=sizes.get("tiny", False), backends=("triton", "library"))
            for case, backend in chosen(machine, large=sizes["large"]):
                case.runs[backend]()
        for case, *_ in tried(Outline(dry, Path(), backends=("triton",)), architecture):
            case.runs["triton"]()
    for launch in recorded:
        found.setdefault(_key(launch), launch)
    return list(found.values())


def _key(launch: Launch) -> Any:
    """What Triton compiles anew for: types, constants, and which numbers are 1 or multiples of 16."""
    given = tuple(
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else (type(a), a == 1, a % 16 == 0, abs(a) < 2**31)
        for a in launch.arguments
    )
    return launch.kernel, given, tuple(sorted(launch.constants.items(), key=lambda c: c[0])), _options(launch)


def _options(launch: Launch) -> tuple[int, int]:
    return launch.configuration.warps, launch.configuration.stages


_LAUNCHES: list[Launch] = []


def _begin(architecture: int) -> None:
    _LAUNCHES[:] = launches(architecture, dry=False)


def compile_one(index: int) -> tuple[str, float, str]:
    """Name, seconds and what went wrong."""
    launch = _LAUNCHES[index]
    warps, stages = _options(launch)
    start, failed = time.perf_counter(), ""
    try:
        launch.kernel.warmup(
            *launch.arguments, grid=launch.grid, num_warps=warps, num_stages=stages, **launch.constants
        )
    except Exception as problem:  # its check will fail and say so, too
        failed = told(problem)
    return launch.kernel.__name__, time.perf_counter() - start, failed


def main(machine: Machine, jobs: int) -> int:
    """Compile all; 1 where one cannot be."""
    machine.begin("compiled")
    if machine.dry or kernels.interpreted:
        machine.add(kernels=len(launches(90, dry=True)), failed="a dry run compiles nothing")
        return 0
    major, minor = torch.cuda.get_device_capability()
    _begin(10 * major + minor)
    start, status = time.perf_counter(), 0
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (10 * major + minor,)) as pool:
        for name, seconds, failed in pool.map(compile_one, range(len(_LAUNCHES))):
            if failed or seconds > 10:
                machine.add(kernel=name, seconds=seconds, failed=failed)
            status |= bool(failed)
    machine.add(kernel="all", kernels=len(_LAUNCHES), jobs=jobs, seconds=time.perf_counter() - start, failed="")
    return status


def arguments_of(given: Iterable[str] | None = None) -> tuple[Machine, int]:
    """The machine, and how many processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    found, rest = parser.parse_known_args(None if given is None else list(given))
    return machine_of(rest), found.jobs


if __name__ == "__main__":
    raise SystemExit(main(*arguments_of()))
