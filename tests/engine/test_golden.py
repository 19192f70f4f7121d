"""Parity with the authors' own code: every method of the ViT golden cases, one input at a time and batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import relprop
from tests.engine.models import golden, manifest, relative

CASES = sorted(manifest())
BACKENDS = ["torch", "cpp"]

# golden name -> method, composite, options; the reference drops the class token's column.
METHODS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "vit_lrp/transformer_attribution": ("transformer_attribution", None, {}),
    "vit_lrp/transformer_attribution_start1": ("transformer_attribution", None, {"start_layer": 1}),
    "vit_lrp/rollout": ("relevance_rollout", None, {}),
    "vit_lrp/rollout_start1": ("relevance_rollout", None, {"start_layer": 1}),
    "vit_lrp/full": ("full", None, {}),
    "vit_lrp/last_layer": ("last_layer", None, {}),
    "vit_lrp/last_layer_ablation": ("last_layer", None, {"gradient_weighted": True}),
    "vit_lrp/last_layer_attn": ("last_layer_attention", None, {}),
    "vit_lrp/second_layer": ("second_layer", None, {}),
    "vit_lrp/second_layer_ablation": ("second_layer", None, {"gradient_weighted": True}),
    "vit_orig_lrp/full": ("full", "chefer_original", {}),
    "vit_orig_lrp/last_layer": ("last_layer", "chefer_original", {}),
    "vit_orig_lrp/last_layer_ablation": ("last_layer", "chefer_original", {"gradient_weighted": True}),
    "vit_orig_lrp/rollout_start1": ("relevance_rollout", "chefer_original", {"start_layer": 1}),
    "vit_orig_lrp/grad": ("transformer_attribution", "chefer_original", {}),
    "vit_baseline/rollout": ("attention_rollout", None, {}),
    "vit_baseline/rollout_start1": ("attention_rollout", None, {"start_layer": 1}),
    "vit_baseline/cam_attn": ("attention_gradcam", None, {}),
    "mm_vit/generate_relevance": ("generic_attention", None, {}),
}
INNER = {"vit_lrp_inter/attn_cam", "vit_lrp_inter/attn_grad", "vit_lrp_inter/block_input_relevance"}


def test_every_golden_method_is_covered() -> None:
    for case in CASES:
        assert set(manifest()[case]["methods"]) == set(METHODS) | INNER


def _answers(case: str, name: str, backend: str, batched: bool) -> tuple[Tensor, Tensor]:
    model, tensors = golden(case)
    x, targets = tensors["inputs/x"].double(), tensors["inputs/targets"]
    expected = tensors[f"expected/{name}"]
    method, composite, options = METHODS[name]
    engine = relprop.compile(model, (x,), method=method, composite=composite, method_options=options, backend=backend)
    if batched:
        found = engine(x, target=targets).relevance
    else:
        found = torch.cat([engine(x[i : i + 1], target=targets[i : i + 1]).relevance for i in range(len(x))])
    if engine.program.method.output == "tokens":
        found = found[..., 1:]
    return found[:, : expected.shape[1]].reshape(expected.shape), expected


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "alone"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("case", CASES)
def test_method(case: str, name: str, backend: str, batched: bool) -> None:
    found, expected = _answers(case, name, backend, batched)
    for i in range(expected.shape[0]):
        for t in range(expected.shape[1]):
            if not torch.isfinite(expected[i, t]).all():
                # The reference divides 0 by 0 where its map is constant; here that map is zero.
                assert name == "vit_baseline/cam_attn"
                assert torch.equal(found[i, t], torch.zeros_like(found[i, t]))
                continue
            assert relative(found[i, t], expected[i, t]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_inside(case: str, backend: str) -> None:
    """Per-block attention relevance and gradient, and the relevance at the input of each block."""
    model, tensors = golden(case)
    x, targets = tensors["inputs/x"].double(), tensors["inputs/targets"]
    engine = relprop.compile(model, (x,), method="full", backend=backend)
    walked = relprop.compile(model, (x,), backend=backend).trace(x, target=targets[:, 0])
    depth = manifest()[case]["model_args"]["depth"]
    for name, kind in (("attn_cam", "relevance"), ("attn_grad", "gradient")):
        expected = tensors[f"expected/vit_lrp_inter/{name}"][:, 0]  # [B, block, H, N, N]
        for block in range(depth):
            found = walked.maps[f"blocks.{block}.attn", kind][0]
            if block == depth - 1:  # only the class token's row is computed: the others carry nothing
                assert found.shape[-2] == 1
                assert float(expected[:, block, :, 1:].abs().max()) == 0.0
            else:
                assert found.shape == expected[:, block].shape
            rows = expected[:, block, :, : found.shape[-2]]
            for i in range(len(x)):
                assert relative(found[i], rows[i]) < 1e-6
    traced = engine.trace(x, target=targets[:, 0])
    expected = tensors["expected/vit_lrp_inter/block_input_relevance"][:, 0]  # [B, block, N, C]
    gathered = [node.operands[0] for node in engine.program.graph.nodes if node.kind == "fanout" and node.operands[0]]
    entries = [v for v in gathered if v.rank == 3 and v.shape[1] == expected.shape[2]][::2]
    assert len(entries) == depth
    for block, value in enumerate(entries):
        found = traced.streams[value.name, "relevance"][0]
        for i in range(len(x)):
            assert relative(found[i], expected[i, block]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str) -> None:
    model, tensors = golden(case)
    x = tensors["inputs/x"].double()
    explanation = relprop.explain(model, x)
    assert float((explanation.logits - tensors["expected/logits"]).abs().max()) < 1e-12
    assert torch.equal(explanation.target, tensors["expected/logits"].argmax(-1))
