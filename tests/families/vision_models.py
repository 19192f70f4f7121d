"""Image models of timm and torchvision, built small with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from tests.families.catalogue import OF_ONE_SEQUENCE, Family, Inputs, images, randomised

SMALL: dict[str, Any] = {"img_size": 32, "num_classes": 7, "embed_dim": 48, "depth": 3, "num_heads": 4}


def timm_small(name: str, **options: Any) -> nn.Module:
    """A registered timm model, shrunk: 16 patches of 8 x 8 pixels unless the options say otherwise."""
    given = {**SMALL, "patch_size": 8, **options}
    model = timm.create_model(name, **{k: v for k, v in given.items() if v is not None})
    return randomised(model)


def timm_full(name: str, **options: Any) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """A registered timm model at its own size, and its inputs."""
    model = timm.create_model(name, **options).eval()
    return model, images(model.default_cfg["input_size"][-1])


def swin(name: str, **options: Any) -> nn.Module:
    """Two stages of two blocks, the second shifted: 8 x 8 tokens in windows of 4 x 4, then 4 x 4 tokens."""
    sizes: dict[str, Any] = {"img_size": 32, "num_classes": 7, "patch_size": 4, "window_size": 4, "embed_dim": 24}
    return randomised(timm.create_model(name, **sizes, depths=(2, 2), num_heads=(2, 4), **options))


def sam() -> nn.Module:
    """4 x 4 tokens in padded windows of 3 x 3, then all together; relative positions by einsum."""
    sizes: dict[str, Any] = {**SMALL, "patch_size": 8, "depth": 2, "window_size": 3, "global_attn_indexes": (1,)}
    return randomised(timm.create_model("samvit_base_patch16", **sizes, neck_chans=16))


def hybrid(name: str = "vit_tiny_r_s16_p8_224") -> nn.Module:
    """timm's hybrid of a ResNetV2 stem (weight-standardised convolutions, group norm, max pool) and a ViT."""
    return randomised(timm.create_model(name, **SMALL, patch_size=2))


class HandWritten(nn.Module):
    """A classifier as people write one in an afternoon, around nn.MultiheadAttention."""

    class Block(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.attention = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm1(x)
            mixed, _ = self.attention(h, h, h)
            x = x + mixed
            return x + self.mlp(self.norm2(x))

    def __init__(self, patch: int = 8, side: int = 4, dim: int = 48, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, dim)
        self.start = nn.Parameter(torch.zeros(1, 1, dim))
        self.place = nn.Parameter(torch.zeros(1, side * side + 1, dim))
        self.blocks = nn.ModuleList(self.Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 7)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        p = self.patch
        grid = images.reshape(batch, channels, height // p, p, width // p, p)
        x = self.embed(grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        x = torch.cat([self.start.expand(batch, -1, -1), x], dim=1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class Encoder(nn.Module):
    """nn.TransformerEncoder over patches, with a mean over them."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 4, 96, activation="gelu", batch_first=True)
        self.embed = nn.Conv2d(3, dim, 8, 8)
        self.place = nn.Parameter(torch.zeros(16, dim))
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 7)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.place
        return self.head(self.encoder(x).mean(1))


def torchvision_vit() -> nn.Module:
    """torchvision's VisionTransformer, which vit_b_16 builds."""
    return randomised(torchvision.models.VisionTransformer(32, 8, 3, 4, 48, 96, num_classes=7))


def torchvision_swin() -> nn.Module:
    """torchvision's SwinTransformer, which swin_t builds."""
    return randomised(torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=7))


def torchvision_full(name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """A torchvision model at its own size."""
    model = torchvision.models.get_model(name).eval()
    for parameter in model.parameters():  # its ViT's head starts at zero, and with it every explanation
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model, images(224)


WINDOWS = "windows of each sample"
ACROSS_WINDOWS: dict[str, Any] = {
    "refusal": WINDOWS,
    "refuses": OF_ONE_SEQUENCE | {"generic_attention"},
    "why": "no common tokens across windows",
}
# The output reads a token that joins after the second layer.
READ_LATER: dict[str, Any] = {"refuses": frozenset({"second_layer"}), "why": "a token that is read joins later"}
# Its masks are made from the queries, so its attention is spelled out, with heads and samples on one axis.
NO_MAPS: dict[str, Any] = {
    "refusal": "got none that torch.export shows as attention",
    "refuses": OF_ONE_SEQUENCE | {"generic_attention"},
    "why": "heads lie on the axis of the samples",
}
PIXELS = images(32, "images")
SWIN = "timm.models.swin_transformer"
HYBRID = "timm.models.vision_transformer_hybrid"
VIT = "timm.models.vision_transformer.VisionTransformer"
DEIT = "timm.models.deit.VisionTransformerDistilled"
SAM = "timm.models.vision_transformer_sam.VisionTransformerSAM"
EVA = "timm.models.eva.Eva"
CAIT = "timm.models.cait.Cait"


def _timm(
    name: str,
    title: str,
    stock: str,
    arch: str,
    *,
    quick: bool = False,
    refusal: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Family:
    small = partial(timm_small, arch, **options)
    structure = {key: value for key, value in options.items() if key != "ref_feat_shape"}  # that is a size
    full = partial(timm_full, arch, **structure)
    return Family(name, title, stock, small, images(32), quick=quick, full=full, **refusal)


def _swin(name: str, title: str, stock: str, arch: str, *, quick: bool = False) -> Family:
    full = partial(timm_full, arch)
    return Family(name, title, stock, partial(swin, arch), images(32), quick=quick, full=full, **ACROSS_WINDOWS)


def _torchvision(
    name: str, title: str, stock: str, small: Callable[[], nn.Module], arch: str, **refusal: Any
) -> Family:
    full = partial(torchvision_full, arch)
    return Family(name, title, f"torchvision.models.{stock}", small, images(32), full=full, **refusal)


VISION: list[Family] = [
    _timm("vit", "ViT, class token", VIT, "vit_base_patch16_224", quick=True),
    _timm("vit_gap", "ViT, mean over patches", VIT, "vit_base_patch16_224", global_pool="avg", class_token=False),
    _timm("vit_reg", "ViT, registers", VIT, "vit_base_patch16_reg4_gap_256"),
    _timm("deit", "DeiT", VIT, "deit_tiny_patch16_224"),
    _timm("deit_distilled", "DeiT, distilled", DEIT, "deit_tiny_distilled_patch16_224", quick=True),
    _timm("deit3", "DeiT III (LayerScale)", VIT, "deit3_small_patch16_224"),
    _timm("beit", "BEiT v2 (relative positions)", "timm.models.beit.Beit", "beitv2_base_patch16_224"),
    _timm("eva02_tiny", "EVA-02, tiny (RoPE, SwiGLU)", EVA, "eva02_tiny_patch14_224", ref_feat_shape=(4, 4)),
    _timm("eva02_base", "EVA-02, base (norm inside the MLP)", EVA, "eva02_base_patch14_224", ref_feat_shape=(4, 4)),
    _timm("dinov2", "DINOv2", VIT, "vit_small_patch14_dinov2"),
    _timm("dinov2_reg", "DINOv2, registers", VIT, "vit_small_patch14_reg4_dinov2"),
    _timm("dinov3", "DINOv3", EVA, "vit_small_patch16_dinov3"),
    _timm("siglip", "SigLIP (attention pooling)", VIT, "vit_base_patch16_siglip_224", quick=True, refusal=READ_LATER),
    _timm(
        "cait",
        "CaiT (talking heads, class attention)",
        "timm.models.cait.Cait",
        "cait_xxs24_224",
        quick=True,
        refusal=READ_LATER,
    ),
    _swin("swin", "Swin (windows, shifts)", SWIN + ".SwinTransformer", "swin_tiny_patch4_window7_224", quick=True),
    _swin("swin_v2", "Swin v2 (cosine attention)", SWIN + "_v2.SwinTransformerV2", "swinv2_tiny_window8_256"),
    Family("sam", "SAM's encoder (einsum)", SAM, sam, images(32), **NO_MAPS),
    Family("hybrid", "ResNet-ViT hybrid", HYBRID, hybrid, images(32), full=partial(timm_full, "vit_tiny_r_s16_p8_224")),
    _torchvision("tv_vit", "torchvision `vit_b_16`", "VisionTransformer", torchvision_vit, "vit_b_16"),
    _torchvision("tv_swin", "torchvision `swin_t`", "SwinTransformer", torchvision_swin, "swin_t", **ACROSS_WINDOWS),
    Family(
        "hand_written",
        "hand-written, 60 lines",
        "torch.nn.MultiheadAttention",
        lambda: randomised(HandWritten()),
        PIXELS,
        quick=True,
    ),
    Family("encoder", "encoder and mean", "torch.nn.TransformerEncoder", lambda: randomised(Encoder()), PIXELS),
]
