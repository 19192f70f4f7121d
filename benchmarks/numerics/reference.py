"""The authors' own code (hila-chefer/Transformer-Explainability), imported from a checkout; none of it is kept here.

Tried with commit c3e578f. It needs the package `einops`, and is only right for one input at a time.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
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
        found_in(checkout)
        if model.norm.eps != 1e-5:
            raise ValueError(f"model.norm.eps: expected 1e-5, which the authors' final norm has, got {model.norm.eps}")
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
        self.generator = generator(built.to(model.norm.weight.device, dtype))

    def explain(self, images: Tensor, targets: Tensor, method: str) -> Tensor:
        """Relevance of the patches, or of the pixels for "full", one input after the other. [n, M] float64"""
        answers = []
        with _on_device_of(images), torch.enable_grad():
            for image, target in zip(images.to(self.dtype), targets, strict=True):
                found = self.generator.generate_LRP(image[None].clone().requires_grad_(), int(target), method=method)
                answers.append(found.detach().double().flatten())
        return torch.stack(answers)


class ReferenceBert:
    """The authors' BERT with the weights of a stock BertForSequenceClassification.

    It was written for transformers 3; what its files want of that version is put in place for this process: two
    methods of models, a setting, and a package of word vectors that a file imports and this does not use.

    Args:
        checkout: folder of their repository.
        model: of transformers; its weights' dtype and device are kept.
    Raises:
        FileNotFoundError: the folder is no checkout of theirs.
    """

    def __init__(self, checkout: Path, model: Any) -> None:
        found_in(checkout)
        transformers: Any = importlib.import_module("transformers")
        if "gensim" not in sys.modules and importlib.util.find_spec("gensim") is None:
            vectors: Any = sys.modules.setdefault("gensim.models", types.ModuleType("gensim.models"))
            vectors.KeyedVectors = object
            sys.modules.setdefault("gensim", types.ModuleType("gensim"))
        name = "BERT_explainability.modules.BERT"
        theirs = importlib.import_module(f"{name}.BertForSequenceClassification").BertForSequenceClassification
        base = transformers.PreTrainedModel
        base.init_weights = lambda self: None
        base.get_head_mask = lambda self, mask, layers, *rest: [None] * layers
        base.get_extended_attention_mask = _added_mask
        config = copy.deepcopy(model.config)
        config.return_dict = False
        built = theirs(config)
        built.load_state_dict(model.state_dict(), strict=False)  # a buffer of position numbers, which theirs has too
        weight = model.classifier.weight
        self.generator = importlib.import_module(f"{name}.ExplanationGenerator").Generator(
            built.eval().to(weight.device, weight.dtype)
        )

    def explain(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Relevance of the tokens, one input after the other; the first token's is not theirs. [n, N] float64"""
        answers = []
        with _on_device_of(ids), torch.enable_grad():
            for row, target in zip(ids, targets, strict=True):
                mask = torch.ones_like(row[None])
                found = self.generator.generate_LRP(row[None], mask, index=int(target), start_layer=0)
                answers.append(found.detach().double().flatten())
        return torch.stack(answers)


def found_in(checkout: Path) -> None:
    """Make their modules importable, or raise FileNotFoundError where the folder is no checkout of theirs."""
    if not (checkout / _NEEDED).is_file():
        raise FileNotFoundError(
            f"--reference: expected a checkout of Transformer-Explainability with {_NEEDED}, got {checkout}"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))


def _added_mask(self: Any, mask: Tensor, *rest: Any) -> Tensor:
    return (1 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min


@contextmanager
def _on_device_of(inputs: Tensor) -> Iterator[None]:
    """Their generator moves the target's one-hot vector to a GPU; without one it stays."""
    moved = torch.Tensor.cuda
    if inputs.device.type == "cpu":
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = moved  # type: ignore[method-assign]
