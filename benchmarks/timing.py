"""Times of contenders that run in turn, their medians and spread, and a rate of the machine to hold them to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], Any]
Clock = Callable[[], float]


def seconds_of(run: Run, device: str = "cpu", clock: Clock = time.perf_counter) -> float:
    """One run, until its answer is there."""
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def in_turn(runs: Mapping[str, Run], rounds: int, clock: Clock = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of every contender, each run once a round.

    Two runs of each before do not count: an engine of relprop's records a shape when it comes a second time.

    Args:
        clock: `time.process_time` for the processor's seconds, which a busy machine does not stretch.
    """
    for run in (*runs.values(), *runs.values()):
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run, clock=clock))
    return times


def spread(seconds: Sequence[float], forward: Sequence[float]) -> dict[str, float]:
    """Columns of a row: milliseconds and ratios to the forward pass of the same round, median, p20 and p80.

    Args:
        seconds: of a contender, one for each round.
        forward: of the forward pass in the same rounds, or in more.
    """
    ratios = sorted(t / f for t, f in zip(seconds, forward, strict=False))
    ordered = sorted(seconds)
    low, high = len(ordered) // 5, (4 * len(ordered)) // 5
    return {
        "ms_median": round(1e3 * statistics.median(seconds), 2),
        "ms_p20": round(1e3 * ordered[low], 2),
        "ms_p80": round(1e3 * ordered[high], 2),
        "ratio_to_forward": round(statistics.median(ratios), 3),
        "ratio_p20": round(ratios[low], 3),
        "ratio_p80": round(ratios[high], 3),
    }


def matrix_rate(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Best rate of a matrix product by the platform's library on this machine, in GFLOP/s."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start) / 1e9)
    return best
