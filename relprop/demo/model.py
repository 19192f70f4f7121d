"""The small Vision Transformer of the demo and its shipped weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from relprop.errors import WeightsError

__all__ = ["CLASS_NAMES", "IMAGES", "MEAN", "STD", "WEIGHTS", "build_model", "load_model", "preprocess"]

CLASS_NAMES = tuple(str(digit) for digit in range(10))
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")
IMAGES = Path(__file__).with_name("images")
_SIZE = 64


def build_model() -> VisionTransformer:
    """The untrained architecture: stock timm, images [B, 3, 64, 64], 64 patches of 8 px, logits [B, 10], 1.2 M weights.

    The logits are independent (multi-label): apply a sigmoid, not a softmax.
    """
    return VisionTransformer(
        img_size=_SIZE, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=len(CLASS_NAMES), qkv_bias=True
    )


def load_model(path: str | Path | None = None) -> VisionTransformer:
    """The trained model in eval mode, float32 on the CPU; `path` defaults to the weights shipped with the package.

    Raises WeightsError where the file is missing, is no safetensors file or does not fit `build_model()`.
    """
    path = WEIGHTS if path is None else Path(path)
    if not path.is_file():
        raise WeightsError(
            f"expected the demo weights at {path}, got no such file; train them anew with: "
            f"python -m relprop.demo.train --out {path.parent}"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"expected a safetensors file at {path}, got something else: {error}") from error
    model = build_model()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"expected the weights of relprop.demo.build_model() in {path}, got others: {error}"
        ) from error
    return model.eval()


def preprocess(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """Model input, float32: a PIL image (any size and mode) gives [3, 64, 64], uint8 [..., 3, 64, 64] the same shape.

    Raises TypeError for anything else than a PIL image or a uint8 tensor, ValueError for a tensor of another shape.
    """
    if isinstance(image, Image.Image):
        rgb = image.convert("RGB")
        if rgb.size != (_SIZE, _SIZE):
            rgb = rgb.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
        image = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8:
        got = image.dtype if isinstance(image, torch.Tensor) else type(image).__name__
        raise TypeError(f"expected a PIL image or a uint8 tensor, got {got}")
    if image.ndim < 3 or image.shape[-3:] != (3, _SIZE, _SIZE):
        raise ValueError(f"expected a tensor [..., 3, {_SIZE}, {_SIZE}], got {list(image.shape)}")
    mean = torch.tensor(MEAN, device=image.device)[:, None, None]
    std = torch.tensor(STD, device=image.device)[:, None, None]
    return (image.float() / 255 - mean) / std
