"""The six scenes shipped with the package, and the command that made them: `python -m relprop.demo.bundle`.

They are test-split scenes (unseen digits, unseen photographs) of two digits each. They were chosen: for each pair of
digits, the first scene in which the shipped model finds both (sigmoid > 0.5) and no other digit, and in which the
explanation of either digit puts most of what it puts on ink on that digit's; under the seed that looked clearest of
five. They show how an explanation looks where model and method work; they are no sample to measure either on:
benchmarks/numerics/localisation.py takes every scene as it comes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from relprop.demo.bundled import TRUTH, bundled_scenes
from relprop.demo.digits import DigitScenes, Scene
from relprop.demo.model import IMAGES, load_model, preprocess
from relprop.engine import explain

__all__ = ["PAIRS", "bundled_scenes", "write_bundle"]

PAIRS = ((3, 7), (0, 4), (1, 8), (2, 6), (5, 9), (3, 8))
BUNDLE_SEED = 3001
_SEARCHED = 5000
_SHARE = 0.8  # of the relevance on ink that must lie on the asked digit's


def points(model: nn.Module, scene: Scene) -> bool:
    """Whether the explanation of each digit of a scene lies on that digit rather than on another."""
    digits = scene.labels.nonzero().flatten()
    heat = explain(model, preprocess(scene.image[None]), target=digits[None]).image_map()[0].clamp(min=0)
    on_ink = torch.einsum("thw,dhw->td", heat, scene.masks[digits].float())
    return bool((on_ink.diagonal() >= _SHARE * on_ink.sum(1)).all())


def write_bundle(folder: str | Path = IMAGES) -> list[Path]:
    """Choose and write one PNG per entry of `PAIRS` plus `truth.npz` (masks and backgrounds); returns the PNG paths.

    Raises RuntimeError where there is no such scene for a pair among the first 5000.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, scenes = load_model(), DigitScenes("test", BUNDLE_SEED, (2, 2))
    wanted = {frozenset(pair): f"scene_{pair[0]}_{pair[1]}" for pair in PAIRS}
    truth, written = {}, []
    for index in count():
        if not wanted or index == _SEARCHED:
            break
        scene = scenes.sample(index)
        present = frozenset(scene.labels.nonzero().flatten().tolist())
        if present not in wanted:
            continue
        with torch.inference_mode():
            found = model(preprocess(scene.image[None]))[0].sigmoid() > 0.5
        if frozenset(found.nonzero().flatten().tolist()) != present or not points(model, scene):
            continue
        name = wanted.pop(present)
        Image.fromarray(scene.image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png", optimize=True)
        truth[f"{name}.masks"], truth[f"{name}.background"] = scene.masks.numpy(), scene.background.numpy()
        written.append(folder / f"{name}.png")
    if wanted:
        raise RuntimeError(
            f"expected a scene found by the model for every pair, got none for {sorted(wanted.values())}"
        )
    np.savez_compressed(folder / TRUTH, **truth)
    return sorted(written)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m relprop.demo.bundle", description="Write the bundled scenes.")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the images")
    for path in write_bundle(parser.parse_args(arguments).out):
        print(path)


if __name__ == "__main__":
    main()
