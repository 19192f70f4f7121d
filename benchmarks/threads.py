"""Thread scaling of the CPU kernels, alone and between torch's matrix products: python -m benchmarks.threads.

Both share one pool of threads (`csrc/parallel.h`). Two pools would show in the rows `between products`: there a kernel
would find the cores taken by threads of the other pool that still spin, and gain nothing from its own.

torch's copy of the same tensor is the ceiling of whatever does little but read and write. Products with weights,
attention in tiles, and a whole explanation of ViT-B/16 and of its forward pass are what a user waits for.
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

import relprop
from benchmarks.attention_relevance import inputs, tiles
from benchmarks.numerics.rows import RESULTS, write_rows
from relprop import native

STABILISER = (native.SIGNED, 1e-6)
Run = Callable[[], Any]


def kernels(rows: int = 4 * 197, n: int = 3072) -> dict[str, Run]:
    """Kernels of the hot path on the largest layer of ViT-B/16, batch 4."""
    r, q = torch.randn(1, 4, rows // 4, n), torch.randn(1, 4, rows // 4, n)
    x, y = torch.randn(4, rows // 4, n), torch.randn(4, rows // 4, n)
    absz, out = y.abs() + 1, torch.empty_like(r)
    pair = (out, torch.empty_like(r))
    weight, small, layer = torch.randn(n, 768), torch.randn(4, rows // 4, 768), inputs(1024)
    return {
        "copy (torch)": lambda: out.copy_(x),
        "linear_apply": lambda: native.linear_apply(small, weight, None, operands=torch.float32),
        "linear_share_out_product": lambda: native.share_out_product(
            r, small, weight, y, None, operands=torch.float32, stabiliser=STABILISER, tolerance=1e-6
        ),
        "linear_back_product": lambda: native.back_product(r, small, weight, operands=torch.float32),
        "attention_relevance (1024)": lambda: tiles(**layer),
        "linear_alpha_beta_share_out": lambda: native.share_out(r, y, None, absz, stabiliser=STABILISER, out=pair),
        "linear_alpha_beta_select": lambda: native.select(x, r, q, out=out),
        "add_normalised": lambda: native.add_normalised(r, x, y, stabiliser=STABILISER, out=pair),
        "add_gamma": lambda: native.add_gamma(r, x, y, gamma=1.0, stabiliser=STABILISER, out=pair),
        "fanout_epsilon": lambda: native.fanout_epsilon([r, q], x, stabiliser=STABILISER, out=out),
        "norm_gradient": lambda: native.norm_gradient(r, x, None, norm="layer", epsilon=1e-6, out=out),
        "activation_gradient": lambda: native.activation_gradient(r, x, activation="gelu", out=out),
    }


def whole() -> dict[str, Run]:
    """A pass over one image, and its explanation."""
    model: Any = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    image = torch.randn(1, 3, 224, 224)
    engine = relprop.compile(model, (image,))

    def forward() -> None:
        with torch.no_grad():
            model(image)

    return {"ViT-B/16 forward (torch)": forward, "ViT-B/16 explanation": lambda: engine(image, target=5)}


def seconds_of(run: Run, product: Run | None) -> float:
    """Time of the kernel alone; a product before it leaves torch's threads as a sweep leaves them."""
    if product is not None:
        product()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(threads: int, rounds: int) -> list[dict[str, Any]]:
    """One row per kernel and setting: medians on one thread and on several, measured in turn."""
    a, b = torch.randn(788, 768), torch.randn(768, 768)
    settings: dict[str, Run | None] = {"alone": None, "between products": lambda: a @ b}
    found = []
    cases = [(name, run, setting) for name, run in kernels().items() for setting in settings]
    cases += [(name, run, "alone") for name, run in whole().items()]
    for name, run, setting in cases:
        product = settings[setting]
        times: dict[int, list[float]] = {1: [], threads: []}
        for _ in range(rounds):
            for count, taken in times.items():
                torch.set_num_threads(count)
                seconds_of(run, product)  # the first after a change of the number starts or ends threads
                taken.append(seconds_of(run, product))
        one, several = (statistics.median(taken) for taken in times.values())
        found.append(
            {
                "kernel": name,
                "setting": setting,
                "threads": threads,
                "ms_one": round(one * 1e3, 3),
                "ms_several": round(several * 1e3, 3),
                "speedup": round(one / several, 2),
                "openmp": native.info()["openmp"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "threads.csv")
    given = parser.parse_args()
    rows = measure(given.threads, given.rounds)
    write_rows(given.out, rows)
    for row in rows:
        print(f"{row['kernel']:<28} {row['setting']:<17} 1 -> {row['threads']}: {row['speedup']:.2f}x")


if __name__ == "__main__":
    main()
