"""What every kernel uses, compiled ahead of time at its tabled configurations; no GPU is needed.

    python -m benchmarks.gpu.ahead_of_time [--architectures 80,90,100] [--rows FILE...] [--keep] [--out FILE]

--rows takes what `python -m tests.kernels.compile_cases ARCHITECTURE` wrote before; else everything is compiled, which
takes about ten minutes for each architecture on one core. With --keep, cases that were not compiled again stay.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.numerics.rows import RESULTS, write_rows
from relprop.kernels.configurations import SHARED_MEMORY, tabled_architecture
from relprop.kernels.launch import triton

ROOT = Path(__file__).parents[2]


def compiled(architectures: str) -> list[str]:
    """One line of JSON per kernel, from a process that has no interpreter."""
    command = [sys.executable, "-m", "tests.kernels.compile_cases", architectures]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def toolchain(architecture: int) -> dict[str, str]:
    """Versions of the compiler and of its assembler for an architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return {"triton": triton.__version__, "ptxas": get_ptxas(architecture).version}


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """A line as a row."""
    architecture = found["architecture"]
    limit = SHARED_MEMORY[tabled_architecture(architecture)]
    instruction = "wgmma" if found["wgmma"] else "tcgen05" if found["tcgen05"] else "-"
    return {
        "case": found["case"],
        "kernel": found["kernel"].strip("_").removesuffix("_kernel"),
        "architecture": f"sm_{architecture}",
        "tiles": " ".join(f"{name}={size}" for name, size in found["tiles"].items()),
        "warps": found["warps"],
        "stages": found["stages"],
        "registers": found["registers"],
        "spilled_bytes": found["stack"],
        "shared_bytes": found["shared"],
        "shared_limit": limit,
        "instruction": instruction,
        **toolchain(architecture),
    }


def main(arguments: Iterable[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--architectures", default="80,90,100")
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "ahead_of_time.csv")
    given = parser.parse_args(None if arguments is None else list(arguments))
    lines = [line for path in given.rows for line in path.read_text().splitlines()] or compiled(given.architectures)
    made = [row_of(json.loads(line)) for line in lines]
    again = {(row["case"], row["architecture"]) for row in made}
    kept = []
    if given.keep:
        with given.out.open() as file:
            kept = [row for row in csv.DictReader(file) if (row["case"], row["architecture"]) not in again]
    write_rows(given.out, made, kept)


if __name__ == "__main__":
    main()
