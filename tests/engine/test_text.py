"""Stock Hugging Face models over token ids: captured as they are, any batch and length, padding without a trace."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from tests.engine.models import relative

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    ),
}


@cache
def model(name: str) -> nn.Module:
    config, kind, sizes = SMALL[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=100, **sizes))
    for parameter in built.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return built.double().eval()


def inputs(name: str, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (batch, length), generator=generator)
    extra = {} if name == "bert" else {"use_cache": False}
    return {"input_ids": ids, "attention_mask": torch.ones(batch, length, dtype=torch.long), **extra}


def target(name: str, length: int) -> Any:
    return 1 if name == "bert" else (length - 1, 7)


def embedded_gradient(name: str, given: dict[str, Any], length: int) -> Tensor:
    """Gradient times embedding, summed over channels, by autograd on the stock model."""
    leaf = model(name).get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    others = {k: v for k, v in given.items() if k != "input_ids"}
    logits = model(name)(inputs_embeds=leaf, **others).logits
    score = logits[:, 1] if name == "bert" else logits[:, length - 1, 7]
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    return (gradient * leaf).sum(-1).detach()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_gradient_is_the_models_own(name: str) -> None:
    engine = relprop.compile(model(name), (), inputs(name, 1, 7), method="gradient_x_input")
    for batch, length in ((1, 7), (3, 11)):
        given = inputs(name, batch, length)
        found = engine(**given, target=target(name, length)).relevance
        # Llama computes its norms in float32 even in a float64 model.
        assert relative(found, embedded_gradient(name, given, length)) < (1e-5 if name == "llama" else 1e-10)


@pytest.mark.parametrize("method", ["transformer_attribution", "full", "attention_rollout"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_padding_leaves_no_trace(name: str, method: str) -> None:
    given = inputs(name, 2, 10)
    engine = relprop.compile(model(name), (), given, method=method)
    given["attention_mask"][0, 6:] = 0
    padded = engine(**given, target=target(name, 6)).relevance[0]
    alone = {k: v[:1, :6] if isinstance(v, Tensor) else v for k, v in given.items()}
    expected = engine(**alone, target=target(name, 6)).relevance[0]
    assert torch.equal(padded[6:], torch.zeros_like(padded[6:]))
    assert relative(padded[:6], expected) < (1e-4 if name == "llama" else 1e-9)


def test_causal_models_look_back_only() -> None:
    given = inputs("llama", 1, 9)
    found = relprop.explain(model("llama"), **given, target=(4, 7), method="transformer_attribution").relevance[0]
    assert torch.equal(found[5:], torch.zeros(4, dtype=found.dtype))
    assert float(found[4]) >= 1.0
    several = relprop.explain(model("llama"), **given, target=[[[4, 7], [8, 2]]]).relevance
    assert several.shape == (1, 2, 9)
    assert relative(several[0, 0], found) < 1e-9
