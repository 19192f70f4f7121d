"""Parity with RobustViT: its relevance of an image, alone and scaled up, and its losses of it.

The data's gradients of those losses are not covered: relevance is computed apart from autograd.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import relprop
from tests.engine.models import GOLDEN, relative

MANIFEST = {c["case"]: c for c in json.loads((GOLDEN / "manifest_robustvit.json").read_text())["cases"]}
CASES = pytest.mark.parametrize("case", sorted(MANIFEST))


@cache
def golden(case: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A golden case's model and its tensors, in float64."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    model = timm.models.vision_transformer.VisionTransformer(**MANIFEST[case]["model_args"])
    model.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    return model.double().eval(), {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


@CASES
def test_relevance(case: str) -> None:
    model, tensors = golden(case)
    engine = relprop.compile(model, (tensors["inputs/x"],), method="generic_attention")
    for name, target in (("relevance_raw", tensors["inputs/class_name"]), ("relevance_raw_index_none", None)):
        found = engine(tensors["inputs/x"], target=target)
        for got, want in zip(found.relevance[:, 1:], tensors[f"expected/robustvit/{name}"], strict=True):
            assert relative(got, want) < 1e-12
        assert float((found.logits - tensors["expected/logits"]).abs().max()) < 1e-12


@CASES
def test_losses(case: str) -> None:
    """As its training computes them, from a map that was scaled up in float32."""
    model, tensors = golden(case)
    found = relprop.explain(model, tensors["inputs/x"], method="generic_attention", target=tensors["inputs/class_name"])
    low, high = (edge(found.image_map(), (1, 2), keepdim=True) for edge in (torch.amin, torch.amax))
    relevance, inside = ((found.image_map() - low) / (high - low)).unsqueeze(1), tensors["inputs/seg_map"]
    assert relative(relevance, tensors["expected/robustvit/relevance_upscaled"]) < 1e-6
    outside = torch.where(inside == 1, 0.0, torch.where(inside == 0, 1.0, inside))
    weights = MANIFEST[case]["loss_settings"]
    losses = {
        "background_loss": (relevance * outside).square().mean(),
        "foreground_loss": (relevance * inside - inside).square().mean(),
        "classification_loss": nn.functional.cross_entropy(found.logits, found.logits.argmax(-1)),
    }
    of_map = sum(weights[f"lambda_{part}"] * losses[f"{part}_loss"] for part in ("background", "foreground"))
    losses["segmentation_loss"] = torch.as_tensor(of_map)
    losses["loss"] = weights["lambda_seg"] * of_map + weights["lambda_acc"] * losses["classification_loss"]
    for name, value in losses.items():
        assert relative(value, tensors[f"expected/robustvit/{name}"]) < 1e-6, name
    told = {f"robustvit/{name}" for name in (*losses, "relevance_upscaled", "relevance_raw")}
    untold = set(MANIFEST[case]["methods"]) - told - {"robustvit/relevance_raw_index_none"}
    assert all("grad" in name for name in untold)
