"""Small models that the engine's tests share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent.parent / "golden"


@cache
def manifest() -> dict[str, dict[str, Any]]:
    """The golden cases by name."""
    return {case["case"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}


@cache
def golden(case: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A golden case's model in float64 and its tensors."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    model = timm.models.vision_transformer.VisionTransformer(**manifest()[case]["model_args"])
    model.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    model.norm.eps = 1e-5  # as the reference's final norm has it
    return model.double().eval(), tensors


def vit(seed: int = 0, **changes: Any) -> nn.Module:
    """A stock timm ViT over 32 x 32 images, 16 patches of 8 x 8, in evaluation mode."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "num_classes": 10,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 4,
    }
    model = timm.models.vision_transformer.VisionTransformer(**{**options, **changes})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.12)
        else:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.eval()


class Block(nn.Module):
    """One pre-norm block with attention spelled as `spelling` says."""

    def __init__(self, spelling: str, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.spelling, self.heads, self.size = spelling, heads, dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(0.1)

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = (f(x).view(batch, tokens, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.spelling == "sdpa":
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "matmul":
            out = self.drop((q @ k.transpose(-2, -1) / self.size**0.5).softmax(-1)) @ v
        elif self.spelling == "bmm":
            flat = [t.reshape(-1, tokens, self.size) for t in (q, k, v)]
            scores = torch.bmm(flat[0], flat[1].transpose(1, 2)) * self.size**-0.5
            out = torch.bmm(torch.softmax(scores, dim=-1), flat[2]).view(batch, self.heads, tokens, self.size)
        else:
            raise ValueError(self.spelling)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)))))


class Spelled(nn.Module):
    """A hand-written classifier over 16 patches; the same function for every spelling of its attention."""

    def __init__(self, spelling: str = "sdpa", depth: int = 2, dim: int = 32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Conv2d(3, dim, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 17, dim))
        self.blocks = nn.Sequential(*(Block(spelling, dim) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
