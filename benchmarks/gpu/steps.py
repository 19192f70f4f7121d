"""Every step of a reverse sweep on every backend, each by itself: what `choose` picks backends from.

    python -m benchmarks.gpu.steps [--dry-run] [--out FOLDER]

Writes steps.csv: ViT-B/16 in bfloat16 at batch 64, a row per operation, rules and backend. Kernels that span several
steps are left out, so that operations compare.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.end_to_end import backends, engine_of, images, vit
from benchmarks.gpu.machine import Machine, machine_of
from relprop import execute

# Between them they have every rule of an image model that a kernel is for.
METHODS = (("transformer_attribution", "chefer"), ("transformer_attribution", "chefer_stable"), ("attnlrp", "attnlrp"))
RUNS = 5


def seconds_by_step(machine: Machine, engine: Any, given: torch.Tensor) -> dict[int, float]:
    """Median of every reverse step, the device waited for after each."""
    engine.program = replace(engine.program, reverse=tuple(replace(s, fused=None) for s in engine.program.reverse))
    found: dict[int, list[float]] = defaultdict(list)
    step_of = execute.Sweep._step

    def wait() -> float:
        if not machine.dry:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(sweep: execute.Sweep, step: Any) -> None:
        start = wait()
        step_of(sweep, step)
        found[id(step)].append(wait() - start)

    engine(given, target=5)
    try:
        execute.Sweep._step = timed  # type: ignore[method-assign]
        for _ in range(machine.size(RUNS, 1)):
            engine(given, target=5)
    finally:
        execute.Sweep._step = step_of  # type: ignore[method-assign]
    return {step: statistics.median(times) for step, times in found.items()}


def main(machine: Machine) -> int:
    """Rows of steps.csv."""
    machine.begin("steps")
    capability = "-" if machine.dry else ".".join(str(n) for n in torch.cuda.get_device_capability())
    model, given = vit(machine, dtype=torch.bfloat16), images(machine, machine.size(64, 1), dtype=torch.bfloat16)
    for method, composite in METHODS:
        for backend in ("torch", *backends(machine)):
            row = {"capability": capability, "method": method, "composite": composite, "backend": backend}
            try:
                engine = engine_of(machine, model, given, False, backend=backend, method=method, composite=composite)
                times = seconds_by_step(machine, engine, given)
            except Exception as problem:
                machine.add(**row, failed=f"{type(problem).__name__}: {problem}"[:300])
                continue
            sums: dict[tuple[str, str], list[float]] = defaultdict(list)
            for step in engine.program.reverse:
                rules = " + ".join(stream.rule.name for stream in step.streams)
                sums[step.node.kind, rules].append(1e3 * times.get(id(step), 0.0))
            for (kind, rules), spent in sums.items():
                if rules:
                    machine.add(**row, kind=kind, rules=rules, steps=len(spent), ms=sum(spent), failed="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
