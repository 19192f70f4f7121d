"""Every kernel once, at tiny sizes, under NVIDIA's compute-sanitizer: memory errors, then races in shared memory.

    python -m benchmarks.gpu.sanitized [--dry-run] [--out FOLDER]

Writes sanitizer.csv. A tool that is missing or refuses the device is a row that says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.machine import Machine, machine_of

TOOLS = ("memcheck", "racecheck")
SECONDS = 20


def examine(machine: Machine, tool: str) -> bool:
    """One row; whether no error was found."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if machine.dry or sanitizer is None:
        machine.add(tool=tool, errors="-", failed="a dry run" if machine.dry else "compute-sanitizer is not installed")
        return True
    with tempfile.TemporaryDirectory() as scratch:
        kernels = [sys.executable, "-m", "benchmarks.gpu.kernels", "check", "--tiny", "--out", scratch]
        # Without torch's pool a tensor ends where its memory does.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                [sanitizer, "--tool", tool, "--error-exitcode", "9", *kernels],
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired as late:
            ended = late.stdout or b""
            machine.add(tool=tool, errors="-", failed=f"not done in {SECONDS} s")
            print((ended.decode() if isinstance(ended, bytes) else ended)[-2000:])
            return True
        checks = Path(scratch) / "checks.csv"
        run = len(checks.read_text().splitlines()) - 1 if checks.is_file() else 0
    told = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", done.stdout)
    if told is None:
        machine.add(tool=tool, errors="-", kernels=run, failed=(done.stdout + done.stderr)[-300:])
        return False
    errors = int(told[1] or told[2])
    if errors:
        print(done.stdout[:8000])
    machine.add(tool=tool, errors=errors, kernels=run, failed="")
    return errors == 0


def main(machine: Machine) -> int:
    """All tools."""
    machine.begin("sanitizer")
    return 0 if all([examine(machine, tool) for tool in TOOLS]) else 1


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
