"""Models as people load them to save memory: quantised weights, adapters, weights spread over devices."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

import relprop
from relprop.errors import DeviceError, ModelStateError, UnsupportedOpError
from tests.engine.models import relative
from tests.families.text_models import FAMILIES, VOCABULARY, build, inputs, made

pytestmark = [pytest.mark.filterwarnings("ignore")]

GIVEN = inputs("bert", 2)
METHODS = ("full", "transformer_attribution", "gradient_x_input")


def bert(dtype: torch.dtype = torch.float64) -> nn.Module:
    return deepcopy(build("bert")).to(dtype)


def explained(model: nn.Module, method: str, composite: str | None = None) -> torch.Tensor:
    engine = relprop.compile(model, (), GIVEN, method=method, composite=composite)
    found = engine(**GIVEN, target=1)
    with torch.no_grad():
        assert relative(found.logits, model(**GIVEN).logits) < 1e-6
    return found.relevance


@pytest.mark.full
def test_int8_weights_are_explained_as_the_numbers_they_stand_for() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, plain = bert(torch.float32), bert(torch.float32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for stored, module in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(module, nn.Linear):
            assert hasattr(stored.weight, "dequantize")
            module.weight.data = stored.weight.dequantize()
    for method in METHODS:
        found, expected = (explained(m, method, "chefer_stable") for m in (model, plain))
        assert relative(found, expected) < 1e-4
    books = relprop.compile(model, (), GIVEN, method="full", composite="chefer_stable")
    ledger = books(**GIVEN, target=1, ledger=True).ledger
    assert ledger is not None and ledger.imbalance.abs().max() < 1e-3


@pytest.mark.full
def test_adapters_are_branches_of_their_layers() -> None:
    """Methods that follow the function alone answer as for merged weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.1)
    model = peft.get_peft_model(bert(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.eval()
    merged = deepcopy(model).merge_and_unload()
    for method, composite in (("gradient_x_input", None), ("full", "attnlrp")):
        assert relative(explained(model, method, composite), explained(merged, method, composite)) < 1e-9
    assert relative(explained(model, "full", "attnlrp"), explained(bert(), "full", "attnlrp")) > 1e-3
    for method in METHODS[:2]:
        found = relprop.compile(model, (), GIVEN, method=method)(**GIVEN, target=1, ledger=True)
        assert found.relevance.isfinite().all() and found.ledger is not None
        assert found.ledger.imbalance.abs().max() < 1e-10


@pytest.mark.full
@pytest.mark.parametrize("kind", ["int8", "4-bit"])
def test_bitsandbytes_is_refused(kind: str) -> None:
    """Its layers compute outside of PyTorch; dequantised they are layers like others."""
    layers = pytest.importorskip("bitsandbytes").nn
    model = bert(torch.float32)
    query = model.bert.encoder.layer[0].attention.self
    if kind == "int8":
        query.query = layers.Linear8bitLt(48, 48, has_fp16_weights=False)
    else:
        query.query = layers.Linear4bit(48, 48)
    stored = "Int8Params" if kind == "int8" else "Params4bit"
    with pytest.raises(ModelStateError, match=rf"got 1 of bitsandbytes, the first .*query.weight' \({stored}\)"):
        relprop.compile(model.eval(), (), GIVEN)


def test_weights_that_only_bitsandbytes_reads_are_refused() -> None:
    """The same by a class that says it is from there, where the package is not installed."""
    stored = type("Params4bit", (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    model = bert()
    model.classifier.weight = stored(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelStateError, match=r"got 1 of bitsandbytes.*model.dequantize\(\), or quantise with torchao"):
        relprop.compile(model, (), GIVEN)


@pytest.mark.full
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_sorted_groups_are_refused(name: str) -> None:
    """What transformers 5 takes by default; the remedy that the refusal names is what the table of models has."""
    pytest.importorskip("transformers", "5.0")
    model = made(FAMILIES[name], {"vocab_size": VOCABULARY, **FAMILIES[name].sizes})
    given = inputs(name, 2)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(UnsupportedOpError, match=r'grouped_mm[^?]*set_experts_implementation\("batched_mm"\)'):
        relprop.compile(model, (), given, method="full")
    with torch.no_grad():
        expected = model(**given).logits
    model.set_experts_implementation("batched_mm")
    found = relprop.explain(model, method="full", target=FAMILIES[name].target(9), **given)
    assert relative(found.logits, expected) < 1e-5


def test_weights_on_several_devices_are_refused() -> None:
    model = bert()
    model.classifier.to("meta")
    with pytest.raises(DeviceError, match=r"expected all weights on one device, got cpu, meta.*device_map"):
        relprop.compile(model, (), GIVEN)


@pytest.mark.full
def test_dispatched_models() -> None:
    """accelerate's hooks are captured; what they leave on the host until it is used is refused."""
    accelerate = pytest.importorskip("accelerate")
    model = bert()
    places = {name: "cpu" for name, _ in model.named_children()}
    hooked = accelerate.dispatch_model(bert(), places, force_hooks=True)
    assert torch.equal(explained(hooked, "transformer_attribution"), explained(model, "transformer_attribution"))
    offloaded = accelerate.cpu_offload(bert(), torch.device("cpu"))
    with pytest.raises(DeviceError, match="device_map"):
        explained(offloaded, "full")
