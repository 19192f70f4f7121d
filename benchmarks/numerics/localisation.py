"""Do the maps point at the truth? Scenes of two digits, each digit asked in turn, against where its ink is.

Mass: the share of a map's positive part that lies on the asked digit's ink. Pointing: whether the map's largest pixel
lies within 4 pixels, half a patch, of that ink. A map without a positive part counts as a uniform one. Standard errors
are over scenes, whose two maps are no independent trials. Run: `python -m benchmarks.numerics.localisation`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import relprop
from benchmarks.numerics.intervals import mean
from benchmarks.numerics.models import trained_available
from benchmarks.numerics.rows import RESULTS, markdown, write_rows
from relprop.demo.model import WEIGHTS, load_model, preprocess
from relprop.errors import WeightsError

SCENES_SEED = 4000
TOLERANCE = 4  # pixels
BATCH = 64
RANDOM = "random map"


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    method: str
    composite: str | None = None
    dtype: str = "float32"

    @property
    def composite_name(self) -> str:
        return self.composite or ("chefer" if self.method in ("transformer_attribution", "full") else "")


ENTRIES = (
    Entry("transformer_attribution"),
    Entry("transformer_attribution", "chefer_stable"),
    Entry("transformer_attribution", dtype="bfloat16"),
    Entry("transformer_attribution", "chefer_stable", "bfloat16"),
    Entry("full"),
    Entry("full", "chefer_stable"),
    Entry("relevance_rollout"),
    Entry("attention_rollout"),
    Entry("raw_attention"),
    Entry("attention_gradcam"),
    Entry("gradient_x_input"),
    Entry("generic_attention"),
    Entry(RANDOM),
)
PAIRS = (
    (ENTRIES[1], ENTRIES[0]),
    (ENTRIES[2], ENTRIES[0]),
    (ENTRIES[3], ENTRIES[1]),
    (ENTRIES[3], ENTRIES[2]),
    (ENTRIES[5], ENTRIES[4]),
)


@dataclass(frozen=True)
class Truth:
    """Inputs, asked digits and where their ink is; two neighbouring inputs share a scene.

    `images` [n, 3, 64, 64], `targets` [n], `masks` [n, 64, 64] bool
    """

    images: Tensor
    targets: Tensor
    masks: Tensor


def truth(scenes: int, seed: int = SCENES_SEED) -> Truth:
    """Test scenes of two different digits, each digit asked in turn."""
    from relprop.demo.digits import DigitScenes

    batch = DigitScenes("test", seed, (2, 2)).batch(range(scenes))
    scene, digit = batch.labels.nonzero().unbind(1)
    return Truth(preprocess(batch.images)[scene], digit, batch.masks[scene, digit])


def maps(model: nn.Module, entry: Entry, data: Truth, batch: int = BATCH) -> Tensor:
    """One map per input. [n, 64, 64]"""
    if entry.method == RANDOM:
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(len(data.targets), 1, 8, 8, generator=generator)
        return F.interpolate(noise, size=data.masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    dtype = getattr(torch, entry.dtype)
    model, images = model.to(dtype), data.images.to(dtype)
    engine = relprop.compile(model, (images[:2],), method=entry.method, composite=entry.composite)
    parts = zip(images.split(batch), data.targets.split(batch), strict=True)
    return torch.cat([engine(x, target=t).image_map().float() for x, t in parts])


def mass(found: Tensor, masks: Tensor) -> NDArray[np.float64]:
    """Share of the positive part on the ink. [n]"""
    positive = found.double().clamp(min=0)
    total = positive.sum((1, 2), keepdim=True)
    positive = torch.where(total > 0, positive / total.clamp(min=1e-300), 1 / masks[0].numel())
    return (positive * masks).sum((1, 2)).numpy()


def pointing(found: Tensor, masks: Tensor, tolerance: int = TOLERANCE) -> NDArray[np.float64]:
    """1 where the largest pixel lies on the ink or within `tolerance` pixels of it (in a disc), else 0. [n]"""
    top = found.flatten(1).argmax(1)
    rows, columns = (torch.arange(size) for size in masks.shape[-2:])
    y, x = top // len(columns), top % len(columns)
    distance = (rows[:, None] - y[:, None, None]) ** 2 + (columns - x[:, None, None]) ** 2
    return (masks & (distance <= tolerance**2)).flatten(1).any(1).double().numpy()


def per_scene(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the two inputs of every scene."""
    return values.reshape(-1, 2).mean(1)


def measure(scenes: int) -> dict[Entry, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Mass and pointing per input, for every entry.

    Raises:
        WeightsError: the demo's weights are not there.
    """
    if not trained_available():
        raise WeightsError(f"expected the demo weights at {WEIGHTS}, got no such file")
    data, scores = truth(scenes), {}
    for entry in ENTRIES:
        found = maps(load_model(), entry, data)
        scores[entry] = (mass(found, data.masks), pointing(found, data.masks))
    return scores


def rows(scores: dict[Entry, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> list[dict[str, Any]]:
    """One row per entry, then one per pair with the differences."""
    table = []
    subjects: list[tuple[Entry, Entry | None]] = [(entry, None) for entry in scores]
    subjects += [pair for pair in PAIRS if pair[0] in scores and pair[1] in scores]
    for entry, other in subjects:
        row: dict[str, Any] = {
            "method": entry.method,
            "composite": entry.composite_name,
            "dtype": entry.dtype,
            "minus": "" if other is None else f"{other.composite_name} {other.dtype}",
            "scenes": len(scores[entry][0]) // 2,
            "inputs": len(scores[entry][0]),
        }
        for position, name in enumerate(("mass", "pointing")):
            values = scores[entry][position] - (0 if other is None else scores[other][position])
            found = mean(per_scene(values))
            error = float(per_scene(values).std(ddof=1) / np.sqrt(len(values) // 2))
            row |= {name: found.estimate, f"{name}_se": error, f"{name}_low": found.low, f"{name}_high": found.high}
        table.append({**row, "tolerance_px": TOLERANCE})
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics.localisation", description=__doc__)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS / "localisation.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = rows(measure(options.scenes))
    write_rows(options.out, table)
    print(markdown(table))


if __name__ == "__main__":
    main()
