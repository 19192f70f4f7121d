"""Predicted time of every kind of step of ViT-B/16 and of a Llama-shaped 1B model, on an H200 and on this CPU.

    python -m benchmarks.cost_model [--out FILE] [--tiny]

The H200's ceilings are assumed, and its products are those of the Triton kernels. The CPU's ceilings are measured
first, and every step beside its prediction. Steps of one kind, shape and set of streams are one row. Needs timm and
transformers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import relprop
from benchmarks.numerics.rows import RESULTS, write_rows
from relprop import execute
from relprop.cost import H200, Ceilings, StepCost, predict, sizes
from relprop.engine import Engine
from relprop.graph import Node
from relprop.program import ForwardStep

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_TINY = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 100}
LLAMA_METHOD = "attnlrp"


def vit(tiny: bool, dtype: torch.dtype) -> Engine:
    """ViT-B/16 with random weights."""
    torch.manual_seed(0)
    small = {"embed_dim": 48, "depth": 1, "num_heads": 4} if tiny else {}
    model = timm.models.VisionTransformer(**small).eval().to(dtype)
    return relprop.compile(model, (torch.randn(2, 3, 224, 224, dtype=dtype),))


def llama(tiny: bool, tokens: int) -> Engine:
    """A Llama-shaped model of 1.2 billion weights, which are never made; logits at the last position."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig(**(LLAMA_TINY if tiny else LLAMA), head_dim=16 if tiny else 64)
        model: nn.Module = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    return relprop.compile(
        model, (ids,), {"use_cache": False, "logits_to_keep": 1}, method=LLAMA_METHOD, output="logits", backend="torch"
    )


def rows(
    model: str, engine: Engine, ceilings: Ceilings, batch: int, measured: dict[Any, float], kernels: str | None = None
) -> Iterator[dict[str, Any]]:
    """One per kind of step, the dearest first, then the whole pass.

    Args:
        kernels: the backend whose kernels take attention layers; the plan's own by default.
        measured: seconds by phase and operation; empty where there was no device to measure on.
    """
    groups: dict[tuple[str, str, str, str], list[StepCost]] = {}
    for step in predict(engine.program, ceilings, batch, kernels=kernels):
        shape = "x".join(str(size) for size in sizes(step.node.outputs[0], engine.program.batch_symbols)[1:])
        groups.setdefault((step.phase, step.node.kind, step.streams, shape), []).append(step)
    whole = {"ms": 0.0, "flop": 0.0, "executed": 0.0, "bytes": 0.0, "measured": 0.0}
    found = []
    for (phase, kind, streams, shape), steps in groups.items():
        sums = {
            "ms": 1e3 * sum(step.seconds for step in steps),
            "flop": sum(step.flops for step in steps),
            "executed": sum(step.executed for step in steps),
            "bytes": sum(step.nbytes for step in steps),
            "measured": 1e3 * sum(measured.get((step.phase, step.node), 0.0) for step in steps),
        }
        whole = {name: whole[name] + sums[name] for name in whole}
        head = {"phase": phase, "op": kind, "streams": streams or "-", "shape": shape or "-", "steps": len(steps)}
        found.append((sums, {**head, "bound": max(steps, key=lambda s: s.seconds).bound(ceilings)}))
    found.sort(key=lambda item: -item[0]["ms"])
    total = {"phase": "both", "op": "all", "streams": "-", "shape": "-", "steps": sum(map(len, groups.values()))}
    for sums, head in [*found, (whole, {**total, "bound": "-"})]:
        if not sums["ms"] and not sums["measured"]:
            continue
        yield {
            "model": model,
            "ceilings": ceilings.name,
            "method": engine.program.method.name,
            "batch": batch,
            **head,
            "flop": sums["flop"],
            "executed_flop": sums["executed"],
            "bytes": sums["bytes"],
            "predicted_ms": sums["ms"],
            "measured_ms": sums["measured"] if measured else "not measured",
            "tflop_s_ceiling": ceilings.flops / 1e12,
            "gb_s_ceiling": ceilings.bandwidth / 1e9,
        }


def cpu_ceilings(tiny: bool) -> Ceilings:
    """Of this CPU: a float32 product of 1,024 rows and columns, and a copy that no cache holds."""
    n = 64 if tiny else 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    source = torch.empty(2**16 if tiny else 2**27, dtype=torch.int8)
    target = torch.empty_like(source)
    rate = 2 * n**3 / _time(lambda: a @ b)
    bandwidth = 2 * source.numel() / _time(lambda: target.copy_(source))
    return Ceilings(f"CPU, float32, {torch.get_num_threads()} thread(s)", "measured in the same run", rate, bandwidth)


def _time(run: Callable[[], Any], runs: int = 9) -> float:
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(engine: Engine, images: torch.Tensor, runs: int) -> dict[tuple[str, Node], float]:
    """Median seconds of every step."""
    found: dict[tuple[str, Node], list[float]] = {}
    step_of = execute.Sweep._step

    def timed(sweep: execute.Sweep, step: Any) -> None:
        start = time.perf_counter()
        step_of(sweep, step)
        found.setdefault(("reverse", step.node), []).append(time.perf_counter() - start)

    def clocked(step: ForwardStep) -> ForwardStep:
        def run(node: Node, derive: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            kernel = step.kernel
            result = node.target(*args, **kwargs) if kernel is None else kernel(node, derive, *args, **kwargs)
            found.setdefault(("forward", node), []).append(time.perf_counter() - start)
            return result

        return step if step.node.kind in ("fanout", "movement") else replace(step, kernel=run)

    program = engine.program
    engine(images)
    try:
        execute.Sweep._step = timed  # type: ignore[method-assign]
        engine.program = replace(program, forward=tuple(clocked(step) for step in program.forward))
        for _ in range(runs):
            engine(images)
    finally:
        execute.Sweep._step = step_of  # type: ignore[method-assign]
        engine.program = program
    return {key: statistics.median(times) for key, times in found.items()}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS / "cost_model.csv")
    parser.add_argument("--tiny", action="store_true", help="small models, to see that it runs")
    given = parser.parse_args()
    tiny = given.tiny
    found = list(rows("ViT-B/16", vit(tiny, torch.bfloat16), H200, 2 if tiny else 64, {}, "triton"))
    tokens = 32 if tiny else 4096
    found += rows(f"Llama 1B, {tokens} tokens", llama(tiny, tokens), H200, 1, {}, "triton")
    engine, batch = vit(tiny, torch.float32), 2
    measured = measure(engine, torch.randn(batch, 3, 224, 224), 1 if tiny else 5)
    found += rows("ViT-B/16", engine, cpu_ceilings(tiny), batch, measured)
    write_rows(given.out, found)


if __name__ == "__main__":
    main()
