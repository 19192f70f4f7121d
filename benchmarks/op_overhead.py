"""Python time of one kernel call, as the engine makes it and as a custom op: python -m benchmarks.op_overhead.

The tensors are so small that what is timed is checks, dispatch and the call itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
    """Time of one call, by round."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return found


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per kernel and way to call it."""
    rows = []
    for name, given in examples().items():
        op = getattr(torch.ops.relprop, name).default
        ways = {"wrapper": lambda k=SPECS[name].kernel, g=given: k(*g), "op": lambda o=op, g=given: o(*g)}
        for way, run in ways.items():
            times = sorted(microseconds(run, rounds))
            rows.append(
                {
                    "kernel": name,
                    "call": way,
                    "us_median": round(statistics.median(times), 2),
                    "us_p20": round(times[len(times) // 5], 2),
                    "us_p80": round(times[len(times) * 4 // 5], 2),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "op_overhead.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = measure(given.rounds)
    write_rows(given.out, rows)
    for row in rows:
        print(f"{row['kernel']:<28} {row['call']:<8} {row['us_median']:>6.1f} us")


if __name__ == "__main__":
    main()
