"""Models and inputs of the race: a stock model with random weights, explained from one floating-point input."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

TARGET = 5
PATCH = 16
PROOF_TOKENS = 65
PROOF_BATCH = 2


class Embedded(nn.Module):
    """A text model from its embeddings, [B, N, C], to one row of logits per sample."""

    def __init__(self, model: nn.Module, last: bool) -> None:
        super().__init__()
        self.model, self.options = model, {"use_cache": False, "logits_to_keep": 1} if last else {}

    def forward(self, embeddings: Tensor) -> Tensor:
        logits = self.model(inputs_embeds=embeddings, **self.options).logits
        return logits[:, -1] if self.options else logits


@dataclass(frozen=True)
class Point:
    """What a row is about.

    Attributes:
        tokens: length of the sequence that attention sees; of a Vision Transformer with its class token.
        dtype: "float32" or "bfloat16".
    """

    model: str
    batch: int = 1
    tokens: int = 197
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.tokens} tokens, {self.dtype}"


@dataclass(frozen=True)
class Case:
    """A point's model and inputs.

    Attributes:
        family: "timm", "torchvision", "bert" or "llama": whose classes the model is made of.
        model: from `inputs` to logits [B, classes], in evaluation mode.
        inputs: images [B, 3, H, W], or embeddings [B, N, C] of `ids` [B, N].
        note: what was cut.
    """

    point: Point
    family: str
    model: nn.Module
    inputs: Tensor
    ids: Tensor | None = None
    note: str = ""

    @property
    def device(self) -> str:
        return self.inputs.device.type

    @property
    def images(self) -> bool:
        return self.family in ("timm", "torchvision")

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same, in another dtype or on another device."""
        model = copy.deepcopy(self.model).to(device, dtype)
        ids = None if self.ids is None else self.ids.to(device)
        return replace(self, model=model, inputs=self.inputs.to(device, dtype), ids=ids)

    def patches(self) -> Tensor:
        """The token that each element of an input belongs to. [1, ...] int64"""
        _, *sizes = self.inputs.shape
        if not self.images:
            return torch.arange(sizes[0], device=self.inputs.device)[None, :, None].expand(1, *sizes)
        rows, columns = (torch.arange(size, device=self.inputs.device) // PATCH for size in sizes[1:])
        return (rows[:, None] * (sizes[2] // PATCH) + columns)[None, None].expand(1, *sizes)


def case_of(point: Point) -> Case:
    """A point's model and inputs, the same at every call.

    Raises:
        ValueError: a model that is not in MODELS, or a number of tokens that its images cannot have.
    """
    if point.model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {point.model!r}")
    torch.manual_seed(0)
    made, dtype = MODELS[point.model](point, None), getattr(torch, point.dtype)
    return replace(made, model=made.model.to(dtype), inputs=made.inputs.to(dtype))


def proof_of(point: Point) -> Case:
    """The same widths in two layers, in float64: what a contender's answer is checked on."""
    torch.manual_seed(1)
    tokens = min(PROOF_TOKENS, point.tokens)
    made = MODELS[point.model](replace(point, batch=PROOF_BATCH, tokens=tokens), 2)
    return made.to(getattr(torch, point.dtype)).to(torch.float64)  # the numbers that the dtype has


def side_of(point: Point) -> int:
    """Pixels along an image's side."""
    side = math.isqrt(point.tokens - 1)
    if side * side + 1 != point.tokens:
        raise ValueError(f"tokens: expected a square and one of {point.model}, such as 197 or 4097, got {point.tokens}")
    return side * PATCH


def _timm(point: Point, depth: int | None, **options: Any) -> Case:
    side = side_of(point)
    cut = {} if depth is None else {"depth": depth}
    name = "vit_tiny_patch16_224" if options else point.model
    model: Any = timm.create_model(name, pretrained=False, img_size=side, **{**options, **cut}).eval()
    model.norm.eps = 1e-5  # as the authors' final norm has it
    return Case(point, "timm", model, torch.randn(point.batch, 3, side, side))


def _torchvision(point: Point, depth: int | None) -> Case:
    side = side_of(point)
    model = torchvision.models.VisionTransformer(side, PATCH, depth or 12, 12, 768, 3072).eval()
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros as made, which leaves nothing to explain
    return Case(point, "torchvision", model, torch.randn(point.batch, 3, side, side))


def _text(point: Point, family: str, model: nn.Module, words: int, note: str = "") -> Case:
    ids = torch.randint(1, words, (point.batch, point.tokens))
    model.eval()
    embeddings = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    return Case(point, family, Embedded(model, family == "llama").eval(), embeddings, ids, note)


def _bert(point: Point, depth: int | None, **sizes: Any) -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**{"num_hidden_layers": depth or 12, "num_labels": 8, **sizes})
    if point.tokens > config.max_position_embeddings:
        raise ValueError(f"tokens: expected at most {config.max_position_embeddings} of BERT, got {point.tokens}")
    return _text(point, "bert", BertForSequenceClassification(config), config.vocab_size)


LLAMA_LAYERS = 2
LLAMA_WORDS = 8192


def _llama(point: Point, depth: int | None, **sizes: Any) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    given = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64)
    config = LlamaConfig(**{"num_hidden_layers": LLAMA_LAYERS, "vocab_size": LLAMA_WORDS, **given, **sizes})
    note = "" if sizes else f"{LLAMA_LAYERS} of 16 layers, {LLAMA_WORDS} of 128256 words"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _text(point, "llama", LlamaForCausalLM(config), config.vocab_size, note)


_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
_SMALL_LLAMA = {**_SMALL, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50}
MODELS: dict[str, Callable[[Point, int | None], Case]] = {
    "vit_tiny_patch16_224": _timm,
    "vit_base_patch16_224": _timm,
    "vit_large_patch16_224": _timm,
    "torchvision vit_b_16": _torchvision,
    "bert_base": _bert,
    "llama_1b": _llama,
    "small vit": lambda point, depth: _timm(point, depth or 2, embed_dim=32, num_heads=2, num_classes=8),
    "small bert": lambda point, depth: _bert(point, 2, **_SMALL, vocab_size=50),
    "small llama": lambda point, depth: _llama(point, 2, **_SMALL_LLAMA),
}


def _points(model: str, dtype: str, *sizes: tuple[int, int]) -> list[Point]:
    return [Point(model, batch, tokens, dtype) for batch, tokens in sizes]


QUICK = (*_points("small vit", "float32", (2, 17)), *_points("small llama", "float32", (1, 9)))
DEFAULT = (
    *_points("vit_base_patch16_224", "float32", (1, 197)),
    *_points("bert_base", "float32", (1, 197)),
    *_points("llama_1b", "float32", (1, 1024)),
    *_points("vit_tiny_patch16_224", "float32", (8, 197), (1, 1025)),
    *_points("torchvision vit_b_16", "float32", (1, 197)),
)
_VITS = ("vit_tiny_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
_GRID = tuple(  # every model at every batch, in float32 first
    Point(model, batch, 197, dtype)
    for dtype in ("float32", "bfloat16")
    for batch in (1, 8, 32)
    for model in (*_VITS, "bert_base", "llama_1b")
)
_LONG = (
    *(Point(model, 1, tokens) for tokens in (577, 1025, 4097) for model in _VITS),
    *_points("bert_base", "float32", (1, 512)),
    *_points("llama_1b", "float32", (1, 4096)),
    *_points("llama_1b", "bfloat16", (1, 1024), (1, 4096)),
    *_points("torchvision vit_b_16", "float32", (8, 197)),
)
ALL = tuple(dict.fromkeys((*DEFAULT, *_GRID, *_LONG)))
