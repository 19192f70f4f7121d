"""Every Triton and CUDA kernel, and a linear layer's rules with the library's products, on the device: first held to
float64, then timed against the device's ceilings.

    python -m benchmarks.gpu.kernels [check] [measure] [run] [--backend NAME] [--dry-run] [--tiny] [--out FOLDER]

check writes checks.csv (small sizes, largest error), measure kernels.csv (sizes of models). What has no passing check
is not timed. run calls each kernel once and looks at no answer, which is what a sanitizer watches; it writes runs.csv.
The exit status is 1 where a kernel failed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.case import Case
from benchmarks.gpu.cases import cases
from benchmarks.gpu.machine import Machine, machine_of, told
from relprop import native_cuda

_CEILING = {
    "bf16": "bf16_tflop_s",
    "fp16": "bf16_tflop_s",
    "high": "tf32_tflop_s",
    "highest": "tf32_tflop_s",
    "ieee": "fp32_tflop_s",
    "medium": "bf16_tflop_s",
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
    found = {"triton", "library"}
    right, reason = native_cuda.available()
    if right and native_cuda.device_type() == machine.device.type:
        found.add("cuda")
    else:
        print(f"no CUDA kernels: {reason or 'they run on ' + native_cuda.device_type()}", flush=True)
    return found


def chosen(machine: Machine, *, large: bool) -> Iterator[tuple[Case, str]]:
    """Every case on every backend that is there and asked for."""
    backends = usable(machine) & (set(machine.backends) or {"triton", "cuda", "library"})
    for case in cases(machine, large=large):
        for backend in sorted(backends & set(case.runs)):
            if backend == "cuda" or not machine.tiny or in_brief(case):
                yield case, backend


def in_brief(case: Case) -> bool:
    """Whether Triton compiles a case for its tiny sizes, too: one of each kernel and form."""
    return case.dtype == "bf16" or (case.dtype == "float32" and not case.variant.endswith("targets"))


def check(machine: Machine) -> bool:
    """Rows of checks.csv; whether all are right."""
    machine.begin("checks")
    right = True
    for case, backend in chosen(machine, large=False):
        try:
            error, failed = error_of(case, backend), ""
        except Exception as problem:  # a kernel that does not compile or run must not hide the others
            error, failed = float("inf"), told(problem)
        passed = error <= case.tolerance
        machine.add(**case.row(backend), error=error, tolerance=case.tolerance, right=passed, failed=failed)
        right &= passed
    return right


def run(machine: Machine) -> bool:
    """Rows of runs.csv; whether all ran."""
    machine.begin("runs")
    right = True
    for case, backend in chosen(machine, large=False):
        try:
            case.runs[backend]()
            machine.wait()
            failed = ""
        except Exception as problem:
            failed, right = told(problem), False
        machine.add(**case.row(backend), failed=failed)
    return right


def measure(machine: Machine) -> bool:
    """Rows of kernels.csv; whether every kernel has a time."""
    columns = ("op", "variant", "backend", "dtype")
    checked = {tuple(row[name] for name in columns) for row in machine.read("checks") if row["right"] == "True"}
    machine.begin("kernels")
    ceilings, right = machine.ceilings(), True
    for case, backend in chosen(machine, large=True):
        row = case.row(backend)
        if case.key(backend) not in checked:
            machine.add(**row, failed="no check of it passed")
            right = False
            continue
        try:
            found = machine.time(case.runs[backend])
        except Exception as problem:
            machine.add(**row, failed=told(problem))
            right = False
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
    return right


PARTS = {"check": check, "measure": measure, "run": run}


def main(machine: Machine) -> int:
    """The parts asked for, check and measure where none is."""
    return 0 if all([PARTS[name](machine) for name in machine.points or ("check", "measure")]) else 1


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
