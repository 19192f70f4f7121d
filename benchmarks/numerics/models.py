"""The models the tables are measured on: random small Vision Transformers, and the demo's trained one.

A model fresh from timm's initialisation is a poor test: its weights are so small (standard deviation 0.02) that every
attention map is uniform and every residual branch a whisper. The weights here are Gaussian with standard deviation
gain / sqrt(fan-in), biases 0.05, norm weights 1 +- 0.1, class token and position embedding 0.3. `spread` tells how far
the attention maps then are from uniform.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import relprop
from relprop.demo.model import WEIGHTS, load_model, preprocess

CLASSES = 10
WORDS = 97
TRAINED = "digits_vit"


@dataclass(frozen=True)
class Shape:
    """Sizes of a random model and the gain of its weights."""

    dim: int
    depth: int
    heads: int
    gain: float

    def __str__(self) -> str:
        return f"d{self.dim}-l{self.depth}-h{self.heads}-g{self.gain:g}"


SHAPES = (
    Shape(48, 3, 3, 0.7),
    Shape(48, 4, 4, 1.0),
    Shape(64, 3, 4, 1.5),
    Shape(64, 4, 4, 0.7),
    Shape(48, 4, 3, 1.0),
    Shape(64, 4, 8, 1.5),
    Shape(48, 3, 4, 1.0),
    Shape(64, 4, 2, 1.5),
)


@dataclass(frozen=True)
class Case:
    """A model with inputs and targets. `images` [n, 3, H, W] float32, `targets` [n]"""

    name: str
    seed: int
    model: nn.Module
    images: Tensor
    targets: Tensor

    @property
    def trained(self) -> bool:
        return self.name == TRAINED


@dataclass(frozen=True)
class TextCase:
    """A text classifier of transformers with texts and targets. `ids` [n, N], `targets` [n]"""

    name: str
    seed: int
    model: nn.Module
    ids: Tensor
    targets: Tensor

    @property
    def words(self) -> dict[str, Tensor]:
        """As the model takes them."""
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}


def random_vit(shape: Shape, seed: int) -> VisionTransformer:
    """A random model; see above. Its final norm has the epsilon of the authors' model, 1e-5."""
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=shape.dim,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=CLASSES,
    ).eval()
    model.norm.eps = 1e-5
    return drawn(model, shape.gain, seed)


def drawn(model: Any, gain: float, seed: int) -> Any:
    """The model with random weights; see above."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name in ("cls_token", "pos_embed") or "embeddings.weight" in name:
                p.copy_(0.3 * noise)
            elif p.ndim > 1:
                p.copy_(noise * gain / p[0].numel() ** 0.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.05 * noise)
    return model.requires_grad_(False)


def random_case(seed: int, inputs: int) -> Case:
    """The random model of a seed with Gaussian images and random targets."""
    shape = SHAPES[seed % len(SHAPES)]
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    images = torch.randn(inputs, 3, 32, 32, generator=generator)
    targets = torch.randint(CLASSES, (inputs,), generator=generator)
    return Case(str(shape), seed, random_vit(shape, seed), images, targets)


def random_text_case(seed: int, inputs: int) -> TextCase:
    """A random BERT of a seed's shape, with texts of random words, all of one length that the seed draws."""
    import transformers

    shape = SHAPES[seed % len(SHAPES)]
    generator = torch.Generator().manual_seed(2_000_000 + seed)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=shape.dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.dim,
        max_position_embeddings=32,
        num_labels=CLASSES,
    )
    model = drawn(transformers.BertForSequenceClassification(config).eval(), shape.gain, seed)
    length = int(torch.randint(9, 25, (), generator=generator))
    ids = torch.randint(1, WORDS, (inputs, length), generator=generator)
    targets = torch.randint(CLASSES, (inputs,), generator=generator)
    return TextCase(f"bert-{shape}", seed, model, ids, targets)


def trained_available() -> bool:
    """Whether the demo's weights are there."""
    return WEIGHTS.is_file()


def trained_case(scenes: int, seed: int) -> Case:
    """The demo's model on test scenes of two digits, each digit asked in turn: two inputs per scene."""
    from relprop.demo.digits import DigitScenes

    batch = DigitScenes("test", seed, (2, 2)).batch(range(scenes))
    targets = batch.labels.nonzero()[:, 1]
    images = preprocess(batch.images).repeat_interleave(2, 0)
    return Case(TRAINED, seed, load_model().requires_grad_(False), images, targets)


def doubled(model: nn.Module) -> nn.Module:
    """A float64 copy."""
    return copy.deepcopy(model).double()


def spread(model: nn.Module, *images: Tensor, **words: Tensor) -> float:
    """Mean over layers of 1 - entropy / log N of the class token's attention: 0 is uniform, 1 is one token."""
    engine = relprop.compile(model, images, words, method="attention_rollout", backend="torch")
    maps = [m for (_, name), m in engine.trace(*images, **words).maps.items() if name == "attention"]
    rows = torch.stack([m[0, :, :, 0].double() for m in maps])
    entropy = -(rows * rows.clamp(min=1e-30).log()).sum(-1)
    return float(1 - (entropy / torch.tensor(float(rows.shape[-1])).log()).mean())


def patches(relevance: Tensor) -> Tensor:
    """Relevance without the class token, or of all pixels, flattened. [n, ...] -> [n, M] float64"""
    return (relevance[:, 1:] if relevance.ndim == 2 else relevance.flatten(1)).double()


def relative_error(answer: Tensor, truth: Tensor) -> Tensor:
    """|answer - truth| / |truth| per input; inf where the answer is not finite. [n, M] -> [n]"""
    error = (answer - truth).norm(dim=1) / truth.norm(dim=1)
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf)


def batches(case: Case, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, targets) in parts."""
    yield from zip(case.images.split(size), case.targets.split(size), strict=True)
