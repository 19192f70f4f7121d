"""Every kernel once, at tiny sizes, under NVIDIA's compute-sanitizer: memory errors, then races in shared memory.

    python -m benchmarks.gpu.sanitized [--dry-run] [--out FOLDER]

Writes sanitizer.csv, a row per tool and backend: the CUDA kernels, which need no compiler, then Triton's, which
`benchmarks.gpu.compiled_first` has compiled. A tool that is missing, that refuses the device or that is not done within
its share of $LIMIT seconds (the part's limit) is a row that failed, and the exit status is 1.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.machine import Machine, machine_of

RUNS = [("memcheck", "cuda"), ("racecheck", "cuda"), ("memcheck", "triton"), ("racecheck", "triton")]
SECONDS = 120  # all of them, where $LIMIT says nothing
SPARE = 3  # to write the rows


def found_tool() -> str | None:
    """compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def examine(machine: Machine, sanitizer: str | None, tool: str, backend: str, seconds: float) -> bool:
    """One row; whether it ran to its end and no error was found."""
    row = {"tool": tool, "backend": backend}
    if machine.dry:
        machine.add(**row, errors="-", kernels=0, failed="a dry run")
        return True
    if sanitizer is None:
        machine.add(**row, errors="-", kernels=0, failed="compute-sanitizer is not installed")
        return False
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        said, failed = _watched([sanitizer, "--tool", tool, "--error-exitcode", "9"], backend, scratch, seconds)
        runs = Path(scratch) / "runs.csv"
        run = len(runs.read_text().splitlines()) - 1 if runs.is_file() else 0
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", said)
    errors = int(summary[1] or summary[2]) if summary else None
    if not failed and errors is None:
        failed = said[-300:]
    if not failed and not run:
        failed = "no kernel ran"
    if failed or errors:
        print(said[:8000])
    spent = time.monotonic() - start
    machine.add(**row, errors="-" if errors is None else errors, kernels=run, seconds=spent, failed=failed)
    return not failed and errors == 0


def _watched(tool: list[str], backend: str, scratch: str, seconds: float) -> tuple[str, str]:
    """What was said under a tool, and why it did not come to its end."""
    kernels = ["-m", "benchmarks.gpu.kernels", "run", "--tiny", "--backend", backend, "--out", scratch]
    # Without torch's pool a tensor ends where its memory does.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        [*tool, sys.executable, *kernels],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            said, _ = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # what runs under the tool has the GPU
            said, _ = running.communicate()
            return said, f"not done in {seconds:.0f} s"
    return said, "" if running.returncode in (0, 9) else f"exit status {running.returncode}"


def main(machine: Machine) -> int:
    """All of them; one that is done early leaves its time to the next."""
    machine.begin("sanitizer")
    sanitizer, right = found_tool(), True
    end = time.monotonic() + float(os.environ.get("LIMIT") or SECONDS) - SPARE
    for number, (tool, backend) in enumerate(RUNS):
        share = max(1.0, (end - time.monotonic()) / (len(RUNS) - number))
        right &= examine(machine, sanitizer, tool, backend, share)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
