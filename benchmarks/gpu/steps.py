"""Every step of a reverse sweep on every backend, each by itself: what `choose` picks backends from.

    python -m benchmarks.gpu.steps [--dry-run] [--out FOLDER]

Writes steps.csv: a row per model, dtype, batch, operation, rules, shape and backend, each beside what the cost model
and the measured ceilings allow it (a roofline): what bounds it, and the share of that it reaches. ViT-B/16 in bfloat16
at batch 64 comes first, then a Llama-shaped model, then one image and float32, for which nothing else chooses. Kernels
that span several steps are left out of these rows, so that operations compare; rows with `fused` are of the steps as
they run, those of one kernel in one row.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.contenders import backends, engine_of, images, llama, token_ids, vit
from benchmarks.gpu.machine import Machine, machine_of, told
from relprop import execute
from relprop.cost import Ceilings, StepCost, predict, sizes

RUNS = 5


@dataclass(frozen=True)
class Sweep:
    """What is timed step by step: a model in a dtype, how many samples, a method, and whether fused kernels stay."""

    model: str
    dtype: torch.dtype
    batch: int
    method: str
    composite: str
    fused: bool = False

    def made(self, machine: Machine) -> tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """The model, its input, the call's other arguments and options of its engine."""
        model = _model(machine.dry, self.model, self.dtype)
        if self.model == "llama":
            ids = token_ids(machine, machine.size(4096, 6))
            return model, (ids,), {"use_cache": False, "logits_to_keep": 1}, {"output": "logits"}
        return model, (images(machine, machine.size(self.batch, min(self.batch, 2)), dtype=self.dtype),), {}, {}


@cache
def _model(dry: bool, name: str, dtype: torch.dtype) -> Any:
    """One for all sweeps, as what is captured of a model is kept with it."""
    return {"llama": llama, "vit": vit}[name](Machine(dry, Path()), dtype=dtype)


_HALF, _ATTRIBUTION = torch.bfloat16, "transformer_attribution"
# Between them they have every rule of an image model and of a language model that a kernel is for.
SWEEPS = (
    Sweep("vit", _HALF, 64, _ATTRIBUTION, "chefer"),
    Sweep("vit", _HALF, 64, _ATTRIBUTION, "chefer", fused=True),
    Sweep("llama", _HALF, 1, "attnlrp", "attnlrp"),
    Sweep("llama", _HALF, 1, "attnlrp", "attnlrp", fused=True),
    Sweep("vit", _HALF, 64, _ATTRIBUTION, "chefer_stable"),
    Sweep("vit", _HALF, 64, "attnlrp", "attnlrp"),
    Sweep("vit", _HALF, 64, "attnlrp", "attnlrp", fused=True),
    Sweep("vit", _HALF, 1, _ATTRIBUTION, "chefer"),
    Sweep("vit", torch.float32, 64, _ATTRIBUTION, "chefer"),
    Sweep("vit", torch.float32, 1, _ATTRIBUTION, "chefer"),
)


def seconds_by_step(machine: Machine, engine: Any, explain: Callable[[], Any]) -> dict[int, float]:
    """Median of every reverse step, the device waited for after each."""
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

    explain()
    try:
        execute.Sweep._step = timed  # type: ignore[method-assign]
        for _ in range(machine.size(RUNS, 1)):
            explain()
    finally:
        execute.Sweep._step = step_of  # type: ignore[method-assign]
    return {step: statistics.median(times) for step, times in found.items()}


def ceilings_of(machine: Machine, dtype: torch.dtype) -> Ceilings:
    """What `benchmarks.gpu.ceilings` measured, as the cost model takes it; NaN where it did not run."""
    found, name = machine.ceilings(), "bf16" if dtype == torch.bfloat16 else "tf32"
    rate, bandwidth = (found.get(key, float("nan")) for key in (f"{name}_tflop_s", "copy_gb_s"))
    return Ceilings(f"this device, {name}", "measured in the same session", 1e12 * rate, 1e9 * bandwidth)


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


def rows_of(engine: Any, times: dict[int, float], batch: int, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One per operation, rules and shape of an engine's sweep; steps of one kernel are one operation."""
    program = engine.program
    costs = [cost for cost in predict(program, ceilings, batch) if cost.phase == "reverse"]
    found = {step.node: (step, cost) for step, cost in zip(program.reverse, costs, strict=True)}
    inside = {node for step in program.reverse if step.fused is not None for node in step.fused.nodes[1:]}
    groups: dict[tuple[str, str, str], list[tuple[list[StepCost], float]]] = defaultdict(list)
    for step in program.reverse:
        if step.node in inside:
            continue
        parts = [found[node] for node in (step.fused.nodes if step.fused is not None else (step.node,))]
        rules = ", ".join(" + ".join(stream.rule.name for stream in part.streams) for part, _ in parts)
        shape = "x".join(str(size) for size in sizes(step.node.outputs[0], program.batch_symbols, 1)[1:])
        spent = sum(1e3 * times.get(id(part), 0.0) for part, _ in parts)
        groups[", ".join(part.node.kind for part, _ in parts), rules, shape].append(([c for _, c in parts], spent))
    for (kind, rules, shape), steps in groups.items():
        if rules:
            ms = sum(spent for _, spent in steps)
            row = {"kind": kind, "rules": rules, "shape": shape, "steps": len(steps), "ms": ms}
            yield {**row, **roofline([cost for parts, _ in steps for cost in parts], ms, ceilings), "failed": ""}


def measure(machine: Machine, sweep: Sweep, backend: str) -> Iterator[dict[str, Any]]:
    """Rows of one sweep on one backend."""
    model, args, kwargs, options = sweep.made(machine)
    options |= {"backend": backend, "method": sweep.method, "composite": sweep.composite, "tape": False}
    engine = engine_of(machine, model, (args, kwargs), False, **options)  # a tape has no steps
    if not sweep.fused:
        alone = tuple(replace(step, fused=None) for step in engine.program.reverse)
        engine.program = replace(engine.program, reverse=alone)
    target = (0, 7) if sweep.model == "llama" else 5
    times = seconds_by_step(machine, engine, lambda: engine(*args, target=target, **kwargs))
    yield from rows_of(engine, times, len(args[0]), ceilings_of(machine, sweep.dtype))


def main(machine: Machine) -> int:
    """Rows of steps.csv; 1 where a backend's could not be measured."""
    machine.begin("steps")
    capability, status = "-" if machine.dry else ".".join(str(n) for n in torch.cuda.get_device_capability()), 0
    for sweep in SWEEPS:
        # Triton's alone has kernels of several steps.
        for backend in ("triton",) if sweep.fused else (*backends(machine), "torch"):
            head: dict[str, Any] = {"capability": capability, "model": sweep.model, "batch": sweep.batch}
            head |= {"dtype": str(sweep.dtype).removeprefix("torch."), "method": sweep.method}
            head |= {"composite": sweep.composite, "fused": "yes" if sweep.fused else "", "backend": backend}
            try:
                for row in measure(machine, sweep, backend):
                    machine.add(**head, **row)
            except Exception as problem:
                machine.add(**head, failed=told(problem))
                status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
