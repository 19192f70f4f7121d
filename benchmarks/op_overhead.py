"""Processor time of calls where there is next to no work: python -m benchmarks.op_overhead.

Of one kernel, as the engine calls it and as a custom op: what is timed is checks, dispatch and the call itself.

Of one Transformer block in a whole explanation, as the difference between two depths of a model of width 16. `engine`
is the engine as it comes, which takes the plan at the first call of a shape, records a tape at the second and replays
it from the third on; `plan` the engine with tape=False, step by step, at every call; `calls` the tape's own calls of
torch's and our kernels in a bare loop, inputs and answer not counted. `engine - calls` and `plan - calls`, differences
of the same round, are Python's share; beside them what the model's forward pass and forward with autograd's backward
take in plain PyTorch. `first call` and `second call` are those of an engine that was just compiled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import relprop
from benchmarks.numerics.rows import RESULTS, write_rows
from relprop import native
from relprop.ops.registry import SPECS


def examples() -> dict[str, tuple[Any, ...]]:
    """Arguments of each op, as the engine has them."""
    r, x, y, bias = torch.randn(1, 2, 8), torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)
    return {
        "linear_alpha_beta_select": (x, r, r),
        "add_normalised": (r, x, y, native.SIGNED, 1e-6),
        "add_gamma": (r, x, y, 1.0, native.SIGNED, 1e-6),
        "fanout_epsilon": ([r, r], x, native.SIGNED, 1e-6),
        "norm_gradient": (r, x, bias, "layer", 1e-6),
    }


def microseconds(run: Callable[[], Any], rounds: int, calls: int = 200) -> list[float]:
    """Processor time of one call, by round."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            run()
        found.append((time.thread_time() - start) / calls * 1e6)
    return found


def summary(what: str, call: str, times: list[float]) -> dict[str, Any]:
    """One row of times in microseconds."""
    times = sorted(times)
    return {
        "what": what,
        "call": call,
        "us_median": round(statistics.median(times), 2),
        "us_p20": round(times[len(times) // 5], 2),
        "us_p80": round(times[len(times) * 4 // 5], 2),
    }


def kernels(rounds: int) -> list[dict[str, Any]]:
    """One row per kernel and way to call it."""
    rows = []
    for name, given in examples().items():
        op = getattr(torch.ops.relprop, name).default
        ways = {"wrapper": lambda k=SPECS[name].kernel, g=given: k(*g), "op": lambda o=op, g=given: o(*g)}
        rows += [summary(name, way, microseconds(run, rounds)) for way, run in ways.items()]
    return rows


def tiny(depth: int) -> nn.Module:
    """A ViT with next to no work in it."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=10
    )
    return model.eval()


def ways_through(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Everything that is timed on one model."""
    x, target = torch.randn(1, 3, 16, 16), torch.tensor([3])
    plan, engine = (relprop.compile(model, (x,), tape=taped) for taped in (False, None))
    for _ in range(2):
        plan(x, target=target)
        engine(x, target=target)
    (calls,) = engine.recordings

    def autograd() -> None:
        with torch.enable_grad():
            model(x.clone().requires_grad_())[0, 3].backward()

    def bare() -> None:
        with calls.turn():
            calls.replay()

    return {
        "forward": lambda: model(x),
        "forward and backward": autograd,
        "plan": lambda: plan(x, target=target),
        "engine": lambda: engine(x, target=target),
        "calls": bare,
    }


def blocks(rounds: int, shallow: int = 4, deep: int = 12) -> list[dict[str, Any]]:
    """One row per way through a model: microseconds of a block."""
    ways = [ways_through(tiny(depth)) for depth in (shallow, deep)]
    times: dict[str, list[float]] = {name: [] for name in ways[0]}
    for _ in range(rounds):  # in turns, so that what else the machine does meets all of them
        for name, found in times.items():
            less, more = (microseconds(way[name], 1, calls=5)[0] for way in ways)
            found.append((more - less) / (deep - shallow))
    for way in ("engine", "plan"):
        times[f"{way} - calls"] = [a - b for a, b in zip(times[way], times["calls"], strict=True)]
    return [summary("block", name, found) for name, found in times.items()]


def new_engines(rounds: int, shallow: int = 4, deep: int = 12) -> list[dict[str, Any]]:
    """One row per call of an engine that was just compiled: microseconds of a block."""
    x, target = torch.randn(1, 3, 16, 16), torch.tensor([3])
    times: dict[str, list[float]] = {"first call": [], "second call": []}
    for _ in range(rounds):
        engines = [relprop.compile(tiny(depth), (x,)) for depth in (shallow, deep)]
        for found in times.values():
            less, more = (microseconds(lambda e=e: e(x, target=target), 1, calls=1)[0] for e in engines)  # type: ignore[misc]
            found.append((more - less) / (deep - shallow))
    return [summary("block", name, found) for name, found in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "op_overhead.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = kernels(given.rounds) + blocks(5 * given.rounds) + new_engines(given.rounds)
    write_rows(given.out, rows)
    for row in rows:
        print(f"{row['what']:<28} {row['call']:<20} {row['us_median']:>7.1f} us")


if __name__ == "__main__":
    main()
