"""Every Triton and CUDA kernel on the device: first held to float64, then timed against the device's ceilings.

    python -m benchmarks.gpu.kernels [check] [measure] [--dry-run] [--tiny] [--out FOLDER]

check writes checks.csv (small sizes, largest error), measure kernels.csv (sizes of ViT-B/16 at batch 64). A kernel
whose check failed is not timed. The exit status is 1 where one failed.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.cases import Case, cases
from benchmarks.gpu.machine import Machine, machine_of
from relprop import native_cuda

_CEILING = {
    "bf16": "bf16_tflop_s",
    "fp16": "bf16_tflop_s",
    "high": "tf32_tflop_s",
    "highest": "tf32_tflop_s",
    "ieee": "fp32_tflop_s",
}


def error_of(case: Case, backend: str) -> float:
    """Largest error of an element, relative to itself or to the root mean square of its tensor."""
    worst = 0.0
    for got, want in zip(case.runs[backend](), case.exact(), strict=True):
        want = want.double()
        size = torch.maximum(want.abs(), want.square().mean().sqrt()).clamp(min=1e-30)
        error = ((got.double() - want).abs() / size).max()
        worst = max(worst, float(error) if bool(error.isfinite()) else float("inf"))
    return worst


def usable(machine: Machine) -> set[str]:
    """The backends whose kernels are there; a missing one is said."""
    found = {"triton"}
    right, reason = native_cuda.available()
    if right and native_cuda.device_type() == machine.device.type:
        found.add("cuda")
    else:
        print(f"no CUDA kernels: {reason or 'they run on ' + native_cuda.device_type()}", flush=True)
    return found


def check(machine: Machine) -> bool:
    """Rows of checks.csv; whether all are right."""
    machine.begin("checks")
    backends, right = usable(machine), True
    for case in cases(machine, large=False):
        for backend in sorted(backends & set(case.runs)):
            row = {"op": case.op, "backend": backend, "dtype": case.dtype, "shape": case.shape}
            try:
                error, failed = error_of(case, backend), ""
            except Exception as problem:  # a kernel that does not compile or run must not hide the others
                error, failed = float("inf"), f"{type(problem).__name__}: {problem}"[:300]
            machine.add(**row, error=error, tolerance=case.tolerance, right=error <= case.tolerance, failed=failed)
            right &= error <= case.tolerance
    return right


def measure(machine: Machine) -> bool:
    """Rows of kernels.csv."""
    wrong = {(r["op"], r["backend"], r["dtype"]) for r in machine.read("checks") if r["right"] != "True"}
    machine.begin("kernels")
    backends, ceilings = usable(machine), machine.ceilings()
    for case in cases(machine, large=True):
        for backend in sorted(backends & set(case.runs)):
            row = {"op": case.op, "backend": backend, "dtype": case.dtype, "shape": case.shape}
            if (case.op, backend, case.dtype) in wrong:
                machine.add(**row, failed="its check did")
                continue
            try:
                found = machine.time(case.runs[backend])
            except Exception as problem:
                machine.add(**row, failed=f"{type(problem).__name__}: {problem}"[:300])
                continue
            rate, bandwidth = case.flops / found["ms"] / 1e9, case.nbytes / found["ms"] / 1e6
            machine.add(
                **row,
                flop=case.flops,
                bytes=case.nbytes,
                tflop_s=rate,
                gb_s=bandwidth,
                share_of_matrix_rate=rate / ceilings.get(_CEILING.get(case.dtype, ""), float("nan")),
                share_of_bandwidth=bandwidth / ceilings.get("copy_gb_s", float("nan")),
                **found,
            )
    return not wrong


PARTS = {"check": check, "measure": measure}


def main(machine: Machine) -> int:
    """The parts asked for, both where none is."""
    return 0 if all([PARTS[name](machine) for name in machine.points or PARTS]) else 1


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
