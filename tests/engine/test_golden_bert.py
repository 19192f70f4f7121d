"""Parity with the authors' own code for BERT: every method of its generator, padding included."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import relprop
from relprop import entry
from relprop.composites import Composite, find_composite
from relprop.rules import REFERENCE
from tests.engine.models import GOLDEN, relative

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

MANIFEST = {c["case"]: c for c in json.loads((GOLDEN / "manifest_bert.json").read_text())["cases"]}
CASES = sorted(MANIFEST)
ORIGINAL = find_composite("chefer_original").overridden(
    entry("add", "epsilon", role="mask", stabiliser=REFERENCE), name="chefer_bert_original"
)
# As the authors' code has them: rows normalised, and the class token shows the smallest value, padding included.
GENERATE: dict[str, Any] = {"normalise": True, "read_tokens": "minimum", "count_padding": True}
ZERO = {"read_tokens": "zero"}

# golden name -> method, composite, options; where columns are dropped, the reference sets the class token's to 0.
METHODS: dict[str, tuple[str, str | Composite, dict[str, Any]]] = {
    "bert_lrp/generate_LRP_start0": ("transformer_attribution", "chefer_bert", GENERATE),
    "bert_lrp/generate_LRP_start1": ("transformer_attribution", "chefer_bert", {**GENERATE, "start_layer": 1}),
    "bert_lrp/generate_LRP_startlast": ("transformer_attribution", "chefer_bert", {**GENERATE, "start_layer": -1}),
    "bert_lrp/generate_LRP_last_layer": ("last_layer", "chefer_bert", {}),
    "bert_lrp/generate_full_lrp": ("full", "chefer_bert", {"at": "tokens"}),
    "bert_lrp/generate_attn_last_layer": ("last_layer_attention", "chefer_bert", {}),
    "bert_lrp/generate_rollout": ("attention_rollout", "chefer_bert", ZERO),
    "bert_lrp/generate_rollout_start1": ("attention_rollout", "chefer_bert", {**ZERO, "start_layer": 1}),
    "bert_lrp/generate_attn_gradcam": ("attention_gradcam", "chefer_bert", {"over": "matrix", "count_padding": True}),
    "bert_orig_lrp/generate_LRP_last_layer": ("last_layer", ORIGINAL, {}),
    "bert_orig_lrp/generate_full_lrp": ("full", ORIGINAL, {"at": "tokens"}),
}
WHOLE = {name for name, (_, _, options) in METHODS.items() if "read_tokens" in options}
INNER = {"bert_lrp_inter/attn_cam", "bert_lrp_inter/attn_grad", "bert_lrp_inter/layer_input_relevance"}


@cache
def golden(case: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A golden case's model in float64 and its tensors."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    config = transformers.BertConfig(**MANIFEST[case]["model_args"])
    model = transformers.BertForSequenceClassification(config)
    model.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    return model.double().eval(), tensors


def words(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[f"inputs/{name}"] for name in ("input_ids", "attention_mask")}


def test_every_golden_method_is_covered() -> None:
    for case in CASES:
        assert set(MANIFEST[case]["methods"]) == set(METHODS) | INNER


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("case", CASES)
def test_method(case: str, name: str, backend: str) -> None:
    model, tensors = golden(case)
    method, composite, options = METHODS[name]
    expected = tensors[f"expected/{name}"]
    engine = relprop.compile(
        model, (), words(tensors), method=method, composite=composite, method_options=options, backend=backend
    )
    found = engine(**words(tensors), target=tensors["inputs/targets"]).relevance[:, : expected.shape[1]]
    first = 0 if name in WHOLE else 1
    for i in range(expected.shape[0]):
        for t in range(expected.shape[1]):
            got, want = found[i, t, first:], expected[i, t, first:]
            if not torch.isfinite(want).all():
                # The reference divides 0 by 0 where its map is constant; here that map is zero.
                assert name == "bert_lrp/generate_attn_gradcam"
                assert torch.equal(got, torch.zeros_like(got))
            elif float(want.norm()) == 0.0:
                assert torch.equal(got, want)
            else:
                assert relative(got, want) < 1e-6


TRIMMED: dict[str, dict[str, Any]] = {
    "generate_LRP_start0": {**GENERATE, "count_padding": False},
    "generate_full_lrp": {"at": "tokens"},
    "generate_LRP_last_layer": {},
    "generate_attn_gradcam": {"over": "matrix"},
    "generate_rollout": ZERO,
}


@pytest.mark.parametrize("name", sorted(TRIMMED))
@pytest.mark.parametrize("case", CASES)
def test_padded_input_as_if_it_were_not(case: str, name: str) -> None:
    """What the reference gives for the text alone; padding gets exactly zero."""
    model, tensors = golden(case)
    method, composite, _ = METHODS[f"bert_lrp/{name}"]
    engine = relprop.compile(
        model, (), words(tensors), method=method, composite=composite, method_options=TRIMMED[name]
    )
    found = engine(**words(tensors), target=tensors["inputs/targets"][:, 0]).relevance
    prefix = f"expected_trimmed/bert_lrp/{name}/input"
    rows = [key for key in tensors if key.startswith(prefix)]
    assert len(rows) == 2
    for key in rows:
        expected, got = tensors[key], found[int(key.removeprefix(prefix))]
        assert torch.equal(got[len(expected) :], torch.zeros_like(got[len(expected) :]))
        first = 0 if f"bert_lrp/{name}" in WHOLE else 1
        got, expected = got[first : len(expected)], expected[first:]
        if not torch.isfinite(expected).all() or float(expected.norm()) == 0.0:
            assert torch.equal(got, torch.zeros_like(got))
        else:
            assert relative(got, expected) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_inside(case: str) -> None:
    """Per-layer attention relevance and gradient, and the relevance at the input of each layer."""
    model, tensors = golden(case)
    given, target = words(tensors), tensors["inputs/targets"][:, 0]
    traced = relprop.compile(model, (), given, composite="chefer_bert").trace(**given, target=target)
    for name, kind in (("attn_cam", "relevance"), ("attn_grad", "gradient")):
        expected = tensors[f"expected/bert_lrp_inter/{name}"][:, 0]  # [B, layer, H, N, N]
        for layer in range(expected.shape[1]):
            found = traced.maps[f"bert.encoder.layer.{layer}.attention.self", kind][0]
            for i in range(len(target)):
                assert relative(found[i], expected[i, layer, :, : found.shape[-2]]) < 1e-6
    engine = relprop.compile(model, (), given, method="full", composite="chefer_bert")
    streams = engine.trace(**given, target=target).streams
    expected = tensors["expected/bert_lrp_inter/layer_input_relevance"][:, 0]  # [B, layer, N, C]
    # Layer by layer the attention block and the MLP read one sequence each.
    normed = [node for node in engine.program.graph.nodes if node.kind == "norm"][::2][: expected.shape[1]]
    for layer, node in enumerate(normed):
        found = streams[node.outputs[0].name, "relevance"][0]
        for i in range(len(target)):
            assert relative(found[i], expected[i, layer]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str) -> None:
    model, tensors = golden(case)
    explanation = relprop.explain(model, **words(tensors))
    assert float((explanation.logits - tensors["expected/logits"]).abs().max()) < 1e-12
