"""Reads the scenes shipped with the package; `relprop.demo.bundle` says how they were chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from relprop.demo.digits import Scene
from relprop.demo.model import IMAGES
from relprop.errors import WeightsError

__all__ = ["TRUTH", "bundled_scenes"]

TRUTH = "truth.npz"  # per scene NAME.masks, bool [10, 64, 64], and NAME.background, uint8 [3, 64, 64]


def bundled_scenes(folder: str | Path = IMAGES) -> dict[str, Scene]:
    """The shipped scenes by name ("scene_3_7", ...); needs neither scikit-learn nor scikit-image.

    Raises WeightsError where the folder lacks the images or their masks.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("scene_*.png"))
    if not paths or not (folder / TRUTH).is_file():
        raise WeightsError(f"expected scene_*.png and {TRUTH} in {folder}, got neither or only one of them")
    scenes = {}
    with np.load(folder / TRUTH) as truth:
        for path in paths:
            name = path.stem
            with Image.open(path) as stored:
                image = torch.from_numpy(np.array(stored.convert("RGB"))).permute(2, 0, 1).contiguous()
            masks = torch.from_numpy(truth[f"{name}.masks"])
            labels = masks.flatten(1).any(1).float()
            scenes[name] = Scene(image, labels, masks, torch.from_numpy(truth[f"{name}.background"]))
    return scenes
