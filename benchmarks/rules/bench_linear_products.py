"""A linear layer's products in csrc against torch's: python -m benchmarks.rules.bench_linear_products.

Each product is timed with what surrounds it: `apply` is x wᵀ + b, `share_out` R / stab(z⁺) from x, w, y, `back` is
½(x ⊙ (s w) + |x| ⊙ (s |w|)), `transpose` s w. torch's side uses the library's product and the fused element-wise
kernels (with |w| made beforehand; in bfloat16, weights cast beforehand). Every call has other weights, as in a model.
Contenders take turns; the rate is of the multiplications alone, over the whole time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.numerics.rows import RESULTS, write_rows
from relprop import native

# Rows (tokens), inputs, outputs: the linear layers of ViT-B/16 and two of ViT-Ti/16 at 224 x 224.
SHAPES = (
    *((197, 768, 2304), (197, 768, 768), (197, 768, 3072), (197, 3072, 768)),
    *((197, 192, 768), (197, 768, 192)),
)
EXACT = (native.SIGNED, 0.0)
WEIGHT_BYTES = 160 << 20

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders(x: Tensor, y: Tensor, r: Tensor, operands: torch.dtype) -> dict[str, dict[str, Run]]:
    """By product and contender: functions of w, |w| and w in the operands' dtype (|w| likewise)."""
    tolerance = 4 * torch.finfo(torch.float32).eps

    def torch_product(left: Tensor, right: Tensor) -> Tensor:
        return (left.to(operands) @ right).float()

    def share_out(w: Tensor, cast: Tensor, magnitude: Tensor) -> Tensor:
        absolute = torch_product(x.abs(), magnitude.mT)
        return native.share_out(r, y, None, absolute, stabiliser=EXACT, tolerance=tolerance)[0]

    def share_out_product(w: Tensor, cast: Tensor, magnitude: Tensor) -> Tensor:
        return native.share_out_product(r, x, w, y, None, operands=operands, stabiliser=EXACT, tolerance=tolerance)

    return {
        "apply": {
            "torch": lambda w, cast, magnitude: torch_product(x, cast.mT),
            "relprop": lambda w, cast, magnitude: native.linear_apply(x, w, None, operands=operands),
        },
        "share_out": {"torch": share_out, "relprop": share_out_product},
        "back": {
            "torch": lambda w, cast, magnitude: native.select(x, torch_product(r, cast), torch_product(r, magnitude)),
            "relprop": lambda w, cast, magnitude: native.back_product(r, x, w, operands=operands),
        },
        "transpose": {
            "torch": lambda w, cast, magnitude: torch_product(r, cast),
            "relprop": lambda w, cast, magnitude: native.linear_transpose(r, w, operands=operands),
        },
    }


def difference(product: str, theirs: Tensor, ours: Tensor, x: Tensor, w: Tensor, y: Tensor) -> float:
    """Relative L2 difference of two answers.

    Shares divide by denominators that operand rounding moves: they are compared where z+ is more than a tenth of
    |x||w|ᵀ, where nothing nearly vanishes.
    """
    if product == "share_out":
        absolute = x.abs() @ w.abs().mT
        settled = (y + absolute) / 2 > 0.1 * absolute
        theirs, ours = theirs * settled, ours * settled
    return float((theirs - ours).norm() / ours.norm())


def measure(rows: int, inputs: int, outputs: int, operands: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Rows of one shape and operand dtype."""
    copies = max(2, min(24, WEIGHT_BYTES // (4 * inputs * outputs)))
    weights = [torch.randn(outputs, inputs) for _ in range(copies)]
    casts = [w.to(operands) for w in weights]
    magnitudes = [w.abs() for w in casts]
    x, r = torch.randn(rows, inputs), torch.randn(1, rows, outputs)
    y = x @ weights[0].mT
    found = []
    for product, runs in contenders(x, y, r, operands).items():
        answers = [run(weights[0], casts[0], magnitudes[0]) for run in runs.values()]
        apart = difference(product, answers[0], answers[1], x, weights[0], y)
        if not apart < (1e-5 if operands == torch.float32 else 2e-2):
            raise SystemExit(
                f"{product} of {rows} x {inputs} x {outputs}: answers differ by {apart:.3g}; nothing is timed"
            )
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                for w, cast, magnitude in zip(weights, casts, magnitudes, strict=True):
                    run(w, cast, magnitude)
                times[name].append((time.perf_counter() - start) / copies)
        flop = 2 * rows * inputs * outputs * (2 if product == "back" else 1)
        ratio = statistics.median(a / b for a, b in zip(times["torch"], times["relprop"], strict=True))
        for name, seconds in times.items():
            median = statistics.median(seconds)
            found.append(
                {
                    "product": product,
                    "rows": rows,
                    "inputs": inputs,
                    "outputs": outputs,
                    "operands": str(operands).removeprefix("torch."),
                    "contender": name,
                    "milliseconds": median * 1e3,
                    "gflop_per_second": flop / median / 1e9,
                    "speedup": ratio if name == "relprop" else 1.0,
                    "rounds": rounds,
                }
            )
            print(
                product, rows, inputs, outputs, operands, name, f"{median * 1e3:.2f} ms {flop / median / 1e9:.0f} GF/s"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "linear_products_cpu.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    kinds = [kind for kind in (torch.float32, torch.bfloat16) if native.products_fast(kind)]
    if not kinds:
        raise SystemExit(f"expected a CPU with AVX-512, and RELPROP_ISA not below it, got {native.info().get('isa')}")
    rows = [row for kind in kinds for shape in SHAPES for row in measure(*shape, operands=kind, rounds=options.rounds)]
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
