"""Parity with LXT: AttnLRP and CP-LRP of decoders, BERT and torchvision's ViT, at the input and at every layer."""

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
from relprop.composites import Composite, Entry, find_composite
from relprop.rules import Stabiliser
from tests.engine.models import GOLDEN, relative

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

MANIFEST = {c["case"]: c for c in json.loads((GOLDEN / "manifest_lxt.json").read_text())["cases"]}
DECODERS = [case for case in sorted(MANIFEST) if case.startswith(("gpt2", "llama"))]
BERTS = [case for case in sorted(MANIFEST) if case.startswith("lxtbert")]
VITS = [case for case in sorted(MANIFEST) if case.startswith("lxtvit")]
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}
METHODS = {"lxt_attnlrp": "attnlrp", "lxt_cplrp": "cp_lrp"}
EXPLICIT = {"lxt_explicit_attnlrp": "attnlrp", "lxt_explicit_cplrp": "cp_lrp"}
GAMMAS = {"conv0.25_lin0.05": (0.25, 0.05), "conv0.1_lin0": (0.1, 0.0), "conv100_lin1": (100.0, 1.0)}


@cache
def golden(case: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A golden case's model in float64 and its tensors."""
    tensors, kind = load_file(GOLDEN / f"{case}.safetensors"), MANIFEST[case]["model_class"].split(".")
    sizes = MANIFEST[case]["model_args"]
    if kind[0] == "torchvision":
        torchvision = pytest.importorskip("torchvision")
        model = torchvision.models.VisionTransformer(**sizes)
    else:
        stock = getattr(transformers, kind[-1])
        model = stock(stock.config_class(**sizes))
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied to the embedding
    if missing:
        model.tie_weights()
    return model.double().eval(), tensors


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the run that the data comes from; transformers computes Llama's norms in float32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def explained(case: str, method: str, target: int, latents: list[str], **options: Any) -> Any:
    """Of all inputs at once, the shorter ones padded: the logit of each one's last token."""
    model, tensors = golden(case)
    last, token = tensors["inputs/lengths"] - 1, tensors["inputs/targets"][:, target]
    rows = torch.arange(len(last))
    given = {name: tensors[f"inputs/{name}"] for name in ("input_ids", "attention_mask")}
    score = {"target": lambda logits: logits[rows, last, token]}
    return relprop.explain(model, method=method, latents=latents, use_cache=False, **given, **score, **options)


def test_every_golden_method_is_covered() -> None:
    layers = {f"{name}/layer_input_relevance" for name in METHODS}
    for case in DECODERS:
        explicit = {f"{name}/input_relevance" for name in EXPLICIT} if case.startswith("llama") else set()
        assert set(MANIFEST[case]["methods"]) == {f"{name}/input_relevance" for name in METHODS} | layers | explicit
    for case in BERTS:
        assert set(MANIFEST[case]["methods"]) == {
            "lxt_attnlrp/input_relevance",
            "lxt_attnlrp/hidden_state_relevance",
        }
    for case in VITS:
        gammas = {f"lxt_cplrp_gamma_{name}/input_relevance" for name in GAMMAS}
        assert set(MANIFEST[case]["methods"]) == {"lxt_cplrp/input_relevance"} | gammas
    assert {*DECODERS, *BERTS, *VITS} == set(MANIFEST)


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", DECODERS)
def test_decoders(case: str, name: str, target: int) -> None:
    """Padding gets exactly zero, here and in every layer."""
    _, tensors = golden(case)
    layers = LAYERS[case.split("_")[0]]
    found = explained(case, METHODS[name], target, [f"{layers}.?"])
    expected = tensors[f"expected/{name}/input_relevance"][:, target]
    inside = tensors[f"expected/{name}/layer_input_relevance"][:, target]  # [B, layer, N]
    for i, length in enumerate(tensors["inputs/lengths"].tolist()):
        answers = [(found.relevance[i], expected[i])]
        for layer in range(1, inside.shape[1]):  # what enters a layer is what left the one before
            answers.append((found.at(f"{layers}.{layer - 1}").per_token()[i], inside[i, layer]))
        for got, want in answers:
            assert relative(got[:length], want[:length]) < 1e-6
            assert torch.equal(got[length:], torch.zeros_like(got[length:]))
        logits = found.logits[i, length - 1]
        assert float((logits - tensors["expected/logits_last_token"][i]).abs().max()) < 1e-12


def explicit(name: str) -> Composite:
    """A method with the epsilons of LXT's explicit code, all of them without regard to a sign.

    Of scale q k it has two, of the product and, larger, of the mask's addition.
    """
    values, own = (1e-6, []) if name == "attnlrp" else (1e-8, [unsigned("mul", "detached_gate", 1e-8)])
    return find_composite(name).overridden(
        unsigned("linear", "epsilon", 1e-8),
        unsigned("add", "epsilon", 1e-8),
        unsigned("matmul", "half", 1e-8, role="qk", scaled=True),
        unsigned("matmul", "half", values, role="av"),
        *own,
        name=f"{name}, explicit",
    )


def unsigned(kind: str, rule: str, epsilon: float, **options: Any) -> Entry:
    return entry(kind, rule, stabiliser=Stabiliser(epsilon, "reference"), **options)


@pytest.mark.parametrize("name", EXPLICIT)
@pytest.mark.parametrize("case", [case for case in DECODERS if case.startswith("llama")])
def test_explicit_rules(case: str, name: str) -> None:
    """LXT's other code differs from its efficient one by its epsilons."""
    _, tensors = golden(case)
    for target in (0, 1):
        found = explained(case, "full", target, [], composite=explicit(EXPLICIT[name])).relevance
        for i, length in enumerate(tensors["inputs/lengths"].tolist()):
            want = tensors[f"expected/{name}/input_relevance"][i, target, :length]
            assert relative(found[i, :length], want) < 1e-6


@pytest.mark.parametrize("case", BERTS)
def test_bert(case: str) -> None:
    model, tensors = golden(case)
    given = {name: tensors[f"inputs/{name}"] for name in ("input_ids", "attention_mask")}
    latents = ["bert.embeddings", "bert.encoder.layer.?"]
    engine = relprop.compile(model, (), given, method="attnlrp", latents=latents)
    found = engine(**given, target=tensors["inputs/targets"])
    inside = tensors["expected/lxt_attnlrp/hidden_state_relevance"]  # [B, T, 1 + layers, N]
    names = ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(inside.shape[2] - 1))]
    answers = [(found.relevance, tensors["expected/lxt_attnlrp/input_relevance"])]
    answers += [(found.at(name).per_token(), inside[:, :, layer]) for layer, name in enumerate(names)]
    for got, want in answers:
        rows = got.shape[-1]  # of the last layer only the class token's is computed: the others carry nothing
        assert torch.equal(want[..., rows:], torch.zeros_like(want[..., rows:]))
        for i in range(want.shape[0]):
            for t in range(want.shape[1]):
                assert relative(got[i, t], want[i, t, :rows]) < 1e-6
    assert float((found.logits - tensors["expected/logits"]).abs().max()) < 1e-12


@pytest.mark.parametrize("gamma", [None, *GAMMAS])
@pytest.mark.parametrize("case", VITS)
def test_torchvision_vit(case: str, gamma: str | None) -> None:
    """CP-LRP alone, and with zennit's gamma rule at the layers that it sees: the convolution, the MLPs and the head."""
    model, tensors = golden(case)
    composite, name = find_composite("cp_lrp"), "lxt_cplrp"
    if gamma is not None:
        of_conv, of_linear = ({"gamma": g, "stabiliser": Stabiliser(1e-6)} for g in GAMMAS[gamma])
        rules = [entry("linear", "gamma", module=pattern, **of_linear) for pattern in ("*mlp*", "heads*")]
        composite = composite.overridden(entry("conv", "gamma", **of_conv), *rules, name=f"cp_lrp, {gamma}")
        name = f"lxt_cplrp_gamma_{gamma}"
    x, targets = tensors["inputs/x"].double(), tensors["inputs/targets"]
    found = relprop.explain(model, x, method="full", composite=composite, target=targets)
    expected = tensors[f"expected/{name}/input_relevance"]
    for i in range(expected.shape[0]):
        for t in range(expected.shape[1]):
            assert relative(found.relevance[i, t], expected[i, t]) < 1e-6
    assert float((found.logits - tensors["expected/logits"]).abs().max()) < 1e-12
