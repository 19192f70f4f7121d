"""`python -m relprop.demo`: explain the bundled scenes with the bundled model and write the pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from relprop.cli.explain import stack_targets
from relprop.demo.bundled import bundled_scenes
from relprop.demo.command import draw_into_folder
from relprop.demo.model import CLASS_NAMES, load_model, preprocess
from relprop.engine import explain
from relprop.images import prepare_output
from relprop.pictures import enlarge, overlay, panel, save_png

__all__ = ["explain_scenes", "main"]

METHOD = "transformer_attribution"
_SIDE, _OVERVIEW_SIDE = 256, 152  # pixels of a tile


def explain_scenes(out: str | Path) -> list[Path]:
    """Explain each bundled scene for each digit in it; writes `<scene>.png` per scene and `overview.png`.

    Returns:
        the pictures, the overview last.
    Raises:
        WeightsError: weights or scenes are missing. OutputError, MissingDependencyError
    """
    model, scenes = load_model(), bundled_scenes()
    folder = prepare_output(out)
    inputs = preprocess(torch.stack([scene.image for scene in scenes.values()]))
    digits = [scene.labels.nonzero().flatten().tolist() for scene in scenes.values()]
    explanation = explain(model, inputs, target=stack_targets(digits), method=METHOD)
    probabilities, maps = explanation.logits.sigmoid(), explanation.image_map()
    written, rows = [], []
    for i, (name, scene) in enumerate(scenes.items()):
        picture = Image.fromarray(scene.image.permute(1, 2, 0).contiguous().numpy())
        titles = [f"{CLASS_NAMES[digit]}   p={float(probabilities[i, digit]):.2f}" for digit in digits[i]]
        for side in (_SIDE, _OVERVIEW_SIDE):
            large = enlarge(picture, side)
            tiles = [(title, overlay(large, maps[i, rank])) for rank, title in enumerate(titles)]
            row = panel([("image", large), *tiles])
            if side == _SIDE:
                written.append(save_png(row, folder / f"{name}.png"))
            else:
                rows.append(("", row))
    written.append(save_png(panel(rows, columns=2, gap=4), folder / "overview.png"))
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    says = "Explain the bundled scenes of two digits, digit by digit."
    return draw_into_folder(explain_scenes, arguments, prog="python -m relprop.demo", says=says, out="demo-output")


if __name__ == "__main__":
    sys.exit(main())
