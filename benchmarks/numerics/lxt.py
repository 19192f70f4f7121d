"""LXT (Achtibat et al., ICML 2024) where it is installed: its patched classes for torchvision's ViT, BERT and Llama.

Tried with LXT 2.1 (which needs zennit) beside torchvision 0.29 and transformers 5.23.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PATCHED = (nn.GELU, nn.LayerNorm, nn.MultiheadAttention)


def available() -> bool:
    """Whether LXT can be imported."""
    return importlib.util.find_spec("lxt") is not None


class Lxt:
    """CP-LRP as LXT sets it up for torchvision's Vision Transformer.

    LXT replaces methods of classes for the whole process; here they are in place during an explanation alone.
    """

    def __init__(self) -> None:
        own = {kind: kind.forward for kind in _PATCHED}
        _import_lxt().monkey_patch(importlib.import_module("torchvision.models.vision_transformer"))
        self._methods = [(kind, own[kind], kind.forward) for kind in _PATCHED]
        self._put(1)

    def _put(self, which: int) -> None:
        for kind, *methods in self._methods:
            kind.forward = methods[which - 1]  # type: ignore[method-assign]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        self._put(2)
        try:
            yield
        finally:
            self._put(1)

    def explain(self, model: nn.Module, images: Tensor, target: int) -> Tensor:
        """Relevance of each pixel. images: [B, 3, H, W] -> [B, H, W]"""
        leaf = images.clone().requires_grad_()
        with self._in_place():
            model(leaf)[:, target].sum().backward()
        assert leaf.grad is not None
        return (leaf * leaf.grad).detach().sum(1)


class LxtText:
    """AttnLRP as LXT sets it up for a BERT, GPT-2 or Llama of transformers; its patches stay in this process.

    Three things it wants of transformers 4 are put in place: a setting, a method, and the way attention is looked up.

    Args:
        family: "bert", "gpt2" or "llama".
    """

    def __init__(self, family: str) -> None:
        lxt = _import_lxt()
        self.family, self.module = family, importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dropout is patched already, by its Llama
            lxt.monkey_patch(self.module)
        if family != "bert":
            kinds = type("Found", (dict,), {"get_interface": lambda self, name, default: self.get(name, default)})
            self.module.ALL_ATTENTION_FUNCTIONS = kinds(self.module.ALL_ATTENTION_FUNCTIONS)  # type: ignore[attr-defined]

    def patched(self, model: Any) -> Any:
        """A model made before, with LXT's classes: itself, or for BERT one of them with its weights."""
        if self.family != "bert":
            return model
        config = copy.deepcopy(model.config)
        config.position_embedding_type = "absolute"
        importlib.import_module("transformers").PreTrainedModel.get_head_mask = lambda self, mask, n, *rest: [None] * n
        built = self.module.BertForSequenceClassification(config).eval()  # type: ignore[attr-defined]
        built.load_state_dict(model.state_dict())
        weight = model.classifier.weight
        return built.to(weight.device, weight.dtype)


def _import_lxt() -> Any:
    """Its modules for all models are imported at once; two names for its BERT are gone from transformers 5."""
    if importlib.util.find_spec("transformers") is not None:
        utils = importlib.import_module("transformers.pytorch_utils")
        for name in ("find_pruneable_heads_and_indices", "prune_linear_layer"):
            if not hasattr(utils, name):
                setattr(utils, name, None)
    return importlib.import_module("lxt.efficient")


@contextmanager
def exact_slopes() -> Iterator[None]:
    """LXT's slopes f(x) / (x + 1e-10) of activations without their epsilon."""
    forward = importlib.import_module("lxt.efficient.rules").identity_rule_implicit_fn.forward
    own = forward.__defaults__
    forward.__defaults__ = (0.0,)
    try:
        yield
    finally:
        forward.__defaults__ = own


def error_to(relevance: Tensor, theirs: Tensor) -> float:
    """Relative error of one answer, [B, H, W] both."""
    return float(torch.linalg.vector_norm(relevance - theirs) / torch.linalg.vector_norm(theirs))
