"""zennit's EpsilonPlus on random Vision Transformers, by epsilon and depth: how large relevance gets, and how exact.

    PYTHONPATH=... python -m benchmarks.numerics.zennit_epsilon [--out FILE]

zennit and `relprop.compat.zennit` explain the same images in float64 and in float32. `difference` is ours to zennit's,
the errors are to zennit's in float64; each the largest relative L2 error of an image.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.numerics.rows import RESULTS, markdown, write_rows
from relprop.compat.zennit import EpsilonPlus, Gradient

EPSILONS = (1e-6, 0.25)
DEPTHS = (1, 2, 4, 12)


def model(depth: int) -> nn.Module:
    """A Vision Transformer of ViT-Ti's width on images of 64 x 64, ten classes, random weights."""
    torch.manual_seed(depth)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=depth, num_classes=10).eval()


def answers(network: nn.Module, images: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """zennit's and ours, [B, 3, H, W] each."""
    attribution, composites = (importlib.import_module(f"zennit.{name}") for name in ("attribution", "composites"))
    network, images = network.to(dtype), images.to(dtype)
    one_hot = torch.eye(10, dtype=dtype)[[5] * len(images)]
    with attribution.Gradient(network, composites.EpsilonPlus(epsilon=epsilon)) as attributor:
        _, theirs = attributor(images.clone(), one_hot)
    _, ours = Gradient(network, EpsilonPlus(epsilon))(images, one_hot)
    return theirs.double(), ours.double()


def error(found: Tensor, truth: Tensor) -> float:
    """The largest of an image; infinite where an answer is not finite."""
    each = (found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    return float(each.nan_to_num(nan=float("inf")).max())


def row(epsilon: float, depth: int, count: int = 4) -> dict[str, Any]:
    """One setting's numbers."""
    network = model(depth)
    images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    truth, ours = answers(network, images, epsilon, torch.float64)
    theirs_low, ours_low = answers(network, images, epsilon, torch.float32)
    return {
        "epsilon": epsilon,
        "layers": depth,
        "images": count,
        "largest": float(truth.abs().max()),
        "difference_float64": error(ours, truth),
        "difference_float32": error(ours_low, theirs_low),
        "zennit_float32": error(theirs_low, truth),
        "relprop_float32": error(ours_low, truth),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "zennit_epsilon.csv")
    given = parser.parse_args()
    rows = [row(epsilon, depth) for epsilon in EPSILONS for depth in DEPTHS]
    write_rows(given.out, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
