"""Every step of a reverse sweep on every backend, each by itself: what `choose` picks backends from.

    python -m benchmarks.gpu.steps [--dry-run] [--out FOLDER]

Writes steps.csv: ViT-B/16 in bfloat16 at batch 64, a row per operation, rules, shape and backend, each beside what the
cost model and the measured ceilings allow it (a roofline): what bounds it, and the share of that it reaches. Kernels
that span several steps are left out, so that operations compare.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.contenders import backends, engine_of, images, vit
from benchmarks.gpu.machine import Machine, machine_of, told
from relprop import execute
from relprop.cost import Ceilings, StepCost, predict

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


def ceilings_of(machine: Machine) -> Ceilings:
    """What `benchmarks.gpu.ceilings` measured, as the cost model takes it; NaN where it did not run."""
    found = machine.ceilings()
    rate, bandwidth = (found.get(name, float("nan")) for name in ("bf16_tflop_s", "copy_gb_s"))
    return Ceilings("this device, bfloat16", "measured in the same session", 1e12 * rate, 1e9 * bandwidth)


def roofline(steps: list[StepCost], ms: float, ceilings: Ceilings) -> dict[str, Any]:
    """What steps had to do, how fast they did it, and the share of what bounds them."""
    flops, nbytes = sum(step.flops for step in steps), sum(step.nbytes for step in steps)
    predicted = 1e3 * sum(step.seconds for step in steps)
    dearest = max(steps, key=lambda step: step.seconds)
    known = ceilings.flops == ceilings.flops and ceilings.bandwidth == ceilings.bandwidth
    rate, bandwidth = flops / ms / 1e9 if ms else 0.0, nbytes / ms / 1e6 if ms else 0.0
    return {
        "flop": flops,
        "bytes": nbytes,
        "predicted_ms": predicted,
        "bound": dearest.bound(ceilings) if known and predicted else "-",
        "tflop_s": rate,
        "gb_s": bandwidth,
        "share_of_matrix_rate": 1e12 * rate / ceilings.flops,
        "share_of_bandwidth": 1e9 * bandwidth / ceilings.bandwidth,
        "share_of_ceiling": predicted / ms if ms else 0.0,
    }


def rows_of(machine: Machine, engine: Any, given: torch.Tensor, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One per operation, rules and shape of an engine's sweep."""
    times = seconds_by_step(machine, engine, given)
    costs = [cost for cost in predict(engine.program, ceilings, len(given)) if cost.phase == "reverse"]
    groups: dict[tuple[str, str, str], list[tuple[StepCost, float]]] = defaultdict(list)
    for step, cost in zip(engine.program.reverse, costs, strict=True):
        rules = " + ".join(stream.rule.name for stream in step.streams)
        shape = "x".join(str(size) for size in step.node.outputs[0].shape[1:])
        groups[step.node.kind, rules, shape].append((cost, 1e3 * times.get(id(step), 0.0)))
    for (kind, rules, shape), found in groups.items():
        if rules:
            ms = sum(spent for _, spent in found)
            row = {"kind": kind, "rules": rules, "shape": shape, "steps": len(found), "ms": ms}
            yield {**row, **roofline([cost for cost, _ in found], ms, ceilings), "failed": ""}


def main(machine: Machine) -> int:
    """Rows of steps.csv; 1 where a backend's could not be measured."""
    machine.begin("steps")
    capability = "-" if machine.dry else ".".join(str(n) for n in torch.cuda.get_device_capability())
    model, given = vit(machine, dtype=torch.bfloat16), images(machine, machine.size(64, 1), dtype=torch.bfloat16)
    ceilings, status = ceilings_of(machine), 0
    for method, composite in METHODS:
        for backend in (*backends(machine), "torch"):
            head = {"capability": capability, "method": method, "composite": composite, "backend": backend}
            try:
                options = {"method": method, "composite": composite, "tape": False}  # a tape has no steps
                engine = engine_of(machine, model, given, False, backend=backend, **options)
                for row in rows_of(machine, engine, given, ceilings):
                    machine.add(**head, **row)
            except Exception as problem:
                machine.add(**head, failed=told(problem))
                status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
