"""Attention relevance in tiles against the same step through whole maps, whose matrix products are torch's.

    python -m benchmarks.attention_relevance [--tokens 197 1024 4096] [--threads 1 2] [--rounds 5] [--out FILE]

Both streams and the walked row of one layer, rule half, float32, 12 heads of 64. The two take turns; reported are
medians of paired ratios; `share_of_rate` is of the rate of torch's matrix products on as many threads, measured in the
same run, which is the ceiling of both. Peak memory is what one call adds to a fresh process, its outputs included. No
time is written for a wrong answer: the row is compared first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.numerics.rows import RESULTS, write_rows
from benchmarks.timing import matrix_rate
from relprop import native
from relprop.rules import REFERENCE

HEADS, WIDTH = 12, 64
SCALE = WIDTH**-0.5


def inputs(tokens: int) -> dict[str, Tensor]:
    """One layer's tensors as a sweep has them: views of packed projections."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    output = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    gradient, relevance = (torch.randn(1, 1, tokens, HEADS, WIDTH).transpose(2, 3) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": v,
        "output": output,
        "gradient": gradient,
        "relevance": relevance * output,
        "row": torch.rand(1, 1, tokens),
    }


def tiles(q: Tensor, k: Tensor, v: Tensor, row: Tensor, **given: Tensor) -> list[Tensor]:
    """q, k, v: [B, H, N, d] -> the row and six streams"""
    found = native.attention_relevance(
        q,
        k,
        v,
        row=row,
        scale=SCALE,
        qk_stabiliser=REFERENCE.code,
        av_stabiliser=REFERENCE.code,
        edge="gradient_x_relevance",
        **given,
    )
    assert found.row is not None
    return [found.row, *(part for part in (*found.gradients, *found.relevances) if part is not None)]


def maps(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, gradient: Tensor, relevance: Tensor, row: Tensor
) -> list[Tensor]:
    """As the C++ backend runs the rules one stream after the other. q, k, v: [B, H, N, d] -> the row and six streams"""
    dots = q @ k.mT
    probabilities = torch.softmax(dots * SCALE, -1)
    to_map = gradient @ v.mT
    logits = torch.ops.aten._softmax_backward_data(to_map, probabilities.expand_as(to_map), -1, q.dtype)
    gradients = [SCALE * (logits @ k), SCALE * (logits.mT @ q), probabilities.mT @ gradient]
    s = native.share(relevance, output, stabiliser=REFERENCE.code)
    value = (probabilities.mT @ (s / 2)).mul_(v)
    shares, map_relevance = native.attention_shares(
        probabilities, s @ v.mT, dots, stabiliser=REFERENCE.code, want_relevance=True
    )
    assert map_relevance is not None
    relevances = [(shares @ (k / 2)).mul_(q), (shares.mT @ (q / 2)).mul_(k), value]
    edges = native.rollout_matrix(to_map, map_relevance)
    return [(row.unsqueeze(-2) @ edges).squeeze(-2), *gradients, *relevances]


CONTENDERS: dict[str, Callable[..., list[Tensor]]] = {"tiles": tiles, "maps": maps}


def peak(contender: str, tokens: int, threads: int) -> float:
    """MB that one call adds to a process that has made the inputs."""
    command = [sys.executable, "-m", "benchmarks.attention_relevance", "--peak", contender]
    done = subprocess.run(
        [*command, "--tokens", str(tokens), "--threads", str(threads)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def print_peak(contender: str, tokens: int) -> None:
    """Run once and print what it added."""
    given, small = inputs(tokens), inputs(16)
    CONTENDERS[contender](**small)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    made = CONTENDERS[contender](**given)
    after = resident("VmHWM")
    del made
    print((after - before) / 1024)


def resident(name: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in kB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(tokens: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """One row per contender."""
    torch.set_num_threads(threads)
    given = inputs(tokens)
    rows = {name: run(**given)[0] for name, run in CONTENDERS.items()}
    error = float((rows["tiles"] - rows["maps"]).norm() / rows["maps"].norm())
    if not error < 1e-4:
        raise SystemExit(f"{tokens} tokens: expected rows within 1e-4 of each other, got {error}; nothing is timed")
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, run in CONTENDERS.items():
            start = time.perf_counter()
            run(**given)
            seconds[name].append(time.perf_counter() - start)
    rate = matrix_rate(torch.float32)
    gflop = 9 * 2 * HEADS * tokens**2 * WIDTH / 1e9
    peaks = {name: peak(name, tokens, threads) for name in CONTENDERS}
    found = []
    for name, times in seconds.items():
        ordered = sorted(times)
        median = statistics.median(times)
        found.append(
            {
                "op": "attention_relevance",
                "contender": name,
                "dtype": "float32",
                "tokens": tokens,
                "heads": HEADS,
                "width": WIDTH,
                "ms_median": 1e3 * median,
                "ms_p20": 1e3 * ordered[len(ordered) // 5],
                "ms_p80": 1e3 * ordered[(4 * len(ordered)) // 5],
                "time_to_maps": statistics.median(t / m for t, m in zip(times, seconds["maps"], strict=True)),
                "peak_mb": peaks[name],
                "peak_to_maps": peaks[name] / peaks["maps"],
                "gflop": gflop,
                "gflop_per_s": gflop / median,
                "matrix_gflop_per_s": rate,
                "share_of_rate": gflop / median / rate,
                "rounds": rounds,
                "used_threads": threads,
            }
        )
    return found


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=(197, 1024, 4096))
    parser.add_argument("--threads", nargs="+", type=int, default=(1, torch.get_num_threads()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_relevance.csv")
    parser.add_argument("--peak", choices=CONTENDERS, help="only print the peak memory of one contender")
    options = parser.parse_args()
    if options.peak:
        torch.set_num_threads(options.threads[0])
        print_peak(options.peak, options.tokens[0])
        return
    rows: list[dict[str, Any]] = []
    for threads in dict.fromkeys(options.threads):
        for tokens in options.tokens:
            found = measure(tokens, threads, options.rounds)
            for row in found:
                print(
                    f"{tokens} tokens, {threads} thread(s), {row['contender']:<6} {row['ms_median']:>9.2f} ms"
                    f" x{row['time_to_maps']:.3f}  {row['peak_mb']:>8.1f} MB x{row['peak_to_maps']:.3f}"
                )
            rows += found
            write_rows(options.out, rows)


if __name__ == "__main__":
    main()
