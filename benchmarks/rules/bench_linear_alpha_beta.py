"""The z+ rule of one linear layer, backend by backend: python -m benchmarks.rules.bench_linear_alpha_beta."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import relprop
from benchmarks.numerics.rows import RESULTS, write_rows
from benchmarks.timing import matrix_rate

# Rows (tokens), inputs, outputs: the four linear layers of ViT-B/16 and of ViT-Ti/16 at 224 x 224.
SHAPES = (
    *((197, 768, 2304), (197, 768, 768), (197, 768, 3072), (197, 3072, 768)),
    *((197, 192, 576), (197, 192, 192), (197, 192, 768), (197, 768, 192)),
)
BACKENDS = ("torch", "cpp")


class _Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def measure(tokens: int, inputs: int, outputs: int, rounds: int, ceiling: float) -> list[dict[str, Any]]:
    """Rows of one shape: the layer's forward pass, and forward with the rule on every backend, in turn."""
    torch.manual_seed(0)
    model, x = _Layer(inputs, outputs).eval(), torch.randn(2, tokens, inputs)[:1]
    engines = {b: relprop.compile(model, (x,), method="full", backend=b) for b in BACKENDS}

    def forward() -> None:
        with torch.no_grad():
            model(x)

    runs: dict[str, Any] = {"forward": forward}
    runs |= {name: (lambda e=engine: e(x, target=_everything)) for name, engine in engines.items()}
    truth = relprop.explain(model.double(), x.double(), target=_everything, method="full").relevance
    model.float()
    for name, engine in engines.items():
        error = float((engine(x, target=_everything).relevance.double() - truth).norm() / truth.norm())
        if not error < 1e-3:
            raise SystemExit(f"backend {name}: expected an error below 1e-3, got {error:.3g}; nothing is timed")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    flop = 2 * tokens * inputs * outputs
    rows = []
    for name, seconds in times.items():
        ordered, products = sorted(seconds), 1 if name == "forward" else 4
        median = statistics.median(seconds)
        rows.append(
            {
                "op": "linear",
                "rule": "alpha_beta",
                "backend": name,
                "dtype": "float32",
                "shape": f"{tokens}x{inputs}x{outputs}",
                "mode": "forward" if name == "forward" else "forward and relevance, per call",
                "ms_median": round(1e3 * median, 3),
                "ms_p20": round(1e3 * ordered[len(ordered) // 5], 3),
                "ms_p80": round(1e3 * ordered[(4 * len(ordered)) // 5], 3),
                "mflop": round(products * flop / 1e6, 1),
                "mbytes": round(4 * (inputs * outputs + tokens * (inputs + outputs)) * products / 1e6, 2),
                "share_of_matrix_rate": round(products * flop / median / 1e9 / ceiling, 3),
            }
        )
    return rows


def _everything(output: torch.Tensor) -> torch.Tensor:
    """Explain the sum of all outputs: every row carries relevance."""
    return output.sum((1, 2))


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_linear_alpha_beta.csv")
    options = parser.parse_args()
    ceiling = matrix_rate()
    rows = [row for shape in SHAPES for row in measure(*shape, options.rounds, ceiling)]
    for row in rows:
        share = row["share_of_matrix_rate"]
        print(f"{row['shape']:<14} {row['backend']:<8} {row['ms_median']:>8} ms, {share} of the matrix rate")
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
