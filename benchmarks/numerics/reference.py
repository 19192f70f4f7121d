"""The authors' own code (hila-chefer/Transformer-Explainability), imported from a checkout; none of it is kept here.

Tried with commit c3e578f. It needs the package `einops`, and is only right for one input at a time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

COMMIT = "c3e578f"
_NEEDED = "baselines/ViT/ViT_LRP.py"


class Reference:
    """The authors' Vision Transformer with a timm model's weights.

    Args:
        checkout: folder of their repository.
        model: a stock timm model whose final norm has epsilon 1e-5, as theirs does.
        dtype: what it computes in.
    Raises:
        FileNotFoundError: the folder is no checkout of theirs. ValueError: another epsilon.
    """

    def __init__(self, checkout: Path, model: VisionTransformer, dtype: torch.dtype) -> None:
        if not (checkout / _NEEDED).is_file():
            raise FileNotFoundError(
                f"--reference: expected a checkout of Transformer-Explainability with {_NEEDED}, got {checkout}"
            )
        if model.norm.eps != 1e-5:
            raise ValueError(f"model.norm.eps: expected 1e-5, which the authors' final norm has, got {model.norm.eps}")
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        theirs = importlib.import_module("baselines.ViT.ViT_LRP").VisionTransformer
        generator = importlib.import_module("baselines.ViT.ViT_explanation_generator").LRP
        block: Any = model.blocks[0]
        built = theirs(
            img_size=model.patch_embed.img_size[0],
            patch_size=model.patch_embed.patch_size[0],
            num_classes=model.num_classes,
            embed_dim=model.embed_dim,
            depth=len(model.blocks),
            num_heads=block.attn.num_heads,
            mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
            qkv_bias=block.attn.qkv.bias is not None,
        )
        built.load_state_dict(model.state_dict())
        self.dtype = dtype
        self.generator = generator(built.to(dtype))

    def explain(self, images: Tensor, targets: Tensor, method: str) -> Tensor:
        """Relevance of the patches, or of the pixels for "full", one input after the other. [n, M] float64"""
        answers = []
        with _without_cuda(), torch.enable_grad():
            for image, target in zip(images.to(self.dtype), targets, strict=True):
                found = self.generator.generate_LRP(image[None].clone().requires_grad_(), int(target), method=method)
                answers.append(found.detach().double().flatten())
        return torch.stack(answers)


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Their generator moves the target's one-hot vector to a GPU; here it stays."""
    moved = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = moved  # type: ignore[method-assign]
