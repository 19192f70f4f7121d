"""The ledger layer by layer, as numbers and as bars."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import relprop
from relprop.errors import OptionError
from relprop.ledger import Ledger, LedgerEntry
from relprop.pictures import ledger as drawing
from relprop.pictures import ledger_picture
from tests.engine.models import vit


def entry(module: str, arriving: list[float], step: str = "step", **absorbed: list[float]) -> LedgerEntry:
    """Tensors [1 target, samples]."""
    kept = {cause: torch.tensor([amounts], dtype=torch.float64) for cause, amounts in absorbed.items()}
    came = torch.tensor([arriving], dtype=torch.float64)
    passed = came - sum(kept.values(), torch.zeros_like(came))
    return LedgerEntry(step, "linear", "rule", module, came, passed, kept, torch.ones_like(came))


def books() -> Ledger:
    return Ledger(
        torch.tensor([[8.0, 80.0]], dtype=torch.float64),
        torch.tensor([[1.0, 10.0]], dtype=torch.float64),
        [
            entry("head", [8, 80], bias=[2, 20]),
            entry("", [6, 60], step="select", epsilon=[0, 0]),
            entry("blocks.1.mlp.fc1", [6, 60], bias=[4, 40], rule=[-2, -20]),
            entry("", [2, 20], step="slice"),
            entry("blocks.1.attn", [2, 20], epsilon=[1, 10]),
            entry("", [3, 30], step="add", constant=[2, 20]),
            entry("embed.proj", [1, 10]),
        ],
    )


def numbers(tensor: Tensor) -> list[float]:
    return [float(x) for x in tensor[0]]


def test_by_layer() -> None:
    layers = books().by_layer()
    assert [layer.name for layer in layers] == ["head", "blocks.1", "add", "embed"]
    assert [numbers(layer.arriving) for layer in layers] == [[8, 80], [6, 60], [3, 30], [1, 10]]
    assert {cause: numbers(t) for cause, t in layers[1].absorbed.items()} == {
        "bias": [4, 40],
        "rule": [-2, -20],
        "epsilon": [1, 10],
    }


@pytest.mark.parametrize("method", ["full", "attnlrp"])
def test_by_layer_of_a_model_adds_up(method: str) -> None:
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = relprop.explain(vit().double(), x, target=[[1, 2]] * 3, method=method, ledger=True).ledger
    assert found is not None
    layers = found.by_layer()
    names = [layer.name for layer in layers]
    assert [name for name in names if name.startswith("blocks")] == ["blocks.2", "blocks.1", "blocks.0"]
    assert names[:2] == ["head", "norm"] and names[-1] == "patch_embed"
    total = sum(t for layer in layers for t in layer.absorbed.values())
    torch.testing.assert_close(found.seed - total, found.frontier, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layers[0].arriving, found.seed)


@pytest.mark.parametrize("method", ["transformer_attribution", "attnlrp"])
def test_branches_are_what_arrives_at_their_last_layers(method: str) -> None:
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = relprop.explain(vit().double(), x, target=[[1, 2]] * 3, method=method, ledger=True).ledger
    assert found is not None
    arriving = {e.module: e.arriving for e in found.entries if e.kind == "linear"}
    layers = [layer for layer in found.by_layer() if layer.name.startswith("blocks")]
    assert [list(layer.branches) for layer in layers] == [["mlp", "attn"]] * 3  # the last layer's has one token alone
    for layer in layers:
        for name, last in {"mlp": "mlp.fc2", "attn": "attn.proj"}.items():
            torch.testing.assert_close(layer.branches[name], arriving[f"{layer.name}.{last}"])


def test_branches_of_norms_after_the_adds() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=50)).eval().double()
    found = relprop.explain(model, torch.randint(1, 50, (2, 7)), target=1, method="attnlrp", ledger=True).ledger
    assert found is not None
    layers = {layer.name: layer.branches for layer in found.by_layer() if "layer." in layer.name}
    assert {name: list(branches) for name, branches in layers.items()} == {
        f"bert.encoder.layer.{i}": ["output", "attention"] for i in (1, 0)
    }
    arriving = {e.module: e.arriving for e in found.entries if e.kind == "linear"}
    for name, branches in layers.items():
        torch.testing.assert_close(branches["output"], arriving[f"{name}.output.dense"])
        torch.testing.assert_close(branches["attention"], arriving[f"{name}.attention.output.dense"])


def heights(ledger: Ledger, colour: str, **options: int) -> list[int]:
    """Of the bars of a colour, in pixels, from the left."""
    pixels = np.asarray(ledger_picture(ledger, **options)).astype(int)
    goal = (np.asarray(to_rgb(colour)) * 255).round()
    columns = (np.abs(pixels - goal).max(-1) <= 2).sum(0)
    runs = np.split(columns, np.flatnonzero(np.diff((columns > 0).astype(int))) + 1)
    return [int(np.median(run)) for run in runs if run[0] > 0]


@pytest.mark.parametrize("options", [{"sample": 0}, {"sample": 1, "target": 0}, {}])
def test_bars_are_as_high_as_what_arrives(options: dict[str, int]) -> None:
    found = heights(books(), drawing._FLOW, **options)
    assert np.asarray(found) / found[0] == pytest.approx(np.array([8, 6, 3, 1]) / 8, abs=0.04)
    (end,) = heights(books(), drawing._END, **options)
    assert end / found[0] == pytest.approx(1 / 8, abs=0.04)


def test_narrow_bars_of_branches() -> None:
    whole, part = entry("blocks.0", [8.0], step="add"), torch.tensor([[2.0]], dtype=torch.float64)
    found = Ledger(whole.arriving, whole.passed, [replace(whole, branch=part, branch_module="blocks.0.mlp.fc2")])
    (bar, _), (flow,) = heights(found, drawing._BRANCHES[0]), heights(found, drawing._END)
    assert bar / flow == pytest.approx(1 / 4, abs=0.04)


def test_absorbed_by_cause() -> None:
    bias = heights(books(), drawing._CAUSES["bias"])
    assert bias[1] / bias[0] == pytest.approx(2, abs=0.1)  # the third is its mark in the legend
    rule = heights(books(), drawing._CAUSES["rule"])
    assert rule[0] / bias[0] == pytest.approx(1, abs=0.1)
    assert not np.array_equal(np.asarray(ledger_picture(books())), np.asarray(ledger_picture(books(), dark=True)))


def test_nothing_absorbed_and_bad_input() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    ledger_picture(Ledger(one, one, [entry("head", [1.0])]))
    with pytest.raises(OptionError, match="sample: expected None or 0 to 1, got 2"):
        ledger_picture(books(), sample=2)
    with pytest.raises(OptionError, match="target: expected None or 0 to 0, got -1"):
        ledger_picture(books(), target=-1)
    with pytest.raises(OptionError, match="ledger: expected the ledger of a run with ledger=True, .*got NoneType"):
        ledger_picture(None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"ledgers\['vit'\]: expected the ledger of a run .*got NoneType"):
        drawing.conditioning_picture({"vit": None})  # type: ignore[dict-item]
