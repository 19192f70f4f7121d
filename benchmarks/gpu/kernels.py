"""Every Triton kernel on the device: first held to float64, then timed against the device's ceilings.

    python -m benchmarks.gpu.kernels [--dry-run] [--out FOLDER]

Writes checks.csv (small sizes, largest error) and kernels.csv (sizes of ViT-B/16 at batch 64). A kernel whose check
fails is not timed, and the exit status is 1.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.cases import Case, cases
from benchmarks.gpu.machine import Machine, machine_of

_CEILING = {"bf16": "bf16_tflop_s", "high": "tf32_tflop_s", "highest": "tf32_tflop_s", "ieee": "fp32_tflop_s"}


def error_of(case: Case) -> float:
    """Largest error of an element, relative to itself or to the root mean square of its tensor."""
    worst = 0.0
    for got, want in zip(case.run(), case.exact(), strict=True):
        want = want.double()
        size = torch.maximum(want.abs(), want.square().mean().sqrt()).clamp(min=1e-30)
        error = ((got.double() - want).abs() / size).max()
        worst = max(worst, float(error) if bool(error.isfinite()) else float("inf"))
    return worst


def check(machine: Machine) -> set[tuple[str, str]]:
    """Rows of checks.csv; the kernels that failed."""
    failed = set()
    for case in cases(machine, large=False):
        try:
            error = error_of(case)
        except Exception as problem:  # a kernel that does not compile or run must not hide the others
            print(f"{case.op} {case.dtype}: {type(problem).__name__}: {problem}")
            error = float("inf")
        right = error <= case.tolerance
        if not right:
            failed.add((case.op, case.dtype))
        machine.add(op=case.op, backend="triton", dtype=case.dtype, shape=case.shape, error=error, right=right)
    machine.write("checks")
    return failed


def measure(machine: Machine, failed: set[tuple[str, str]]) -> None:
    """Rows of kernels.csv."""
    machine.rows.clear()
    ceilings = machine.ceilings()
    for case in cases(machine, large=True):
        if (case.op, case.dtype) in failed:
            continue
        found = machine.time(case.run)
        rate, bandwidth = case.flops / found["ms"] / 1e9, case.nbytes / found["ms"] / 1e6
        of_rate = rate / ceilings.get(_CEILING.get(case.dtype, ""), float("nan"))
        of_bandwidth = bandwidth / ceilings.get("copy_gb_s", float("nan"))
        machine.add(
            op=case.op,
            backend="triton",
            dtype=case.dtype,
            shape=case.shape,
            flop=case.flops,
            bytes=case.nbytes,
            tflop_s=rate,
            gb_s=bandwidth,
            share_of_matrix_rate=of_rate,
            share_of_bandwidth=of_bandwidth,
            **found,
        )
        machine.write("kernels")


def main(machine: Machine) -> int:
    """Check, then measure."""
    failed = check(machine)
    measure(machine, failed)
    for op, dtype in sorted(failed):
        print(f"not right, not timed: {op} {dtype}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
