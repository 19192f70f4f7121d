from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from relprop.demo.model import build_model

PRESENT = (7, 3)  # digits that `digits_model` finds in everything, likeliest first


@pytest.fixture(scope="session")
def digits_model() -> VisionTransformer:
    """The demo's architecture with random weights; one object, so that the engine compiles it once."""
    torch.manual_seed(0)
    model = build_model().eval()
    with torch.no_grad():
        model.head.weight.mul_(0.1)
        model.head.bias.fill_(-3.0)
        for rank, digit in enumerate(PRESENT):
            model.head.bias[digit] = 3.0 - rank
    return model


@pytest.fixture
def digits(digits_model: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> VisionTransformer:
    """`digits_model` in place of the bundled weights."""
    monkeypatch.setattr("relprop.demo.model.load_model", lambda path=None: digits_model)
    return digits_model


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "scan.png"
    noise().save(path)
    return path
