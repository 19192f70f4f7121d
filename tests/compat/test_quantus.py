"""Quantus's explain_func: shapes that its checks accept, and its metrics run with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import relprop
from relprop.compat.quantus import explain
from relprop.errors import OptionError, TargetError
from tests.engine.models import vit

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("method", ["transformer_attribution", "attnlrp"])
def test_images(method: str) -> None:
    model, images, labels = vit(), np.random.default_rng(0).normal(size=(3, 3, 32, 32)), np.array([1, 2, 3])
    found = explain(model, images, labels, method=method, device="cpu")
    assert isinstance(found, np.ndarray)
    assert found.shape == (3, 1, 32, 32)
    x = torch.tensor(images, dtype=torch.float32)
    expected = relprop.explain(model, x, target=torch.tensor(labels), method=method).image_map()
    assert np.array_equal(found[:, 0], expected.numpy())
    assert np.allclose(found, explain(model, x, torch.tensor(labels), method=method, batch_size=2), atol=1e-4)


def test_token_ids() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertForSequenceClassification(config).eval()
    assert explain(model, np.array([[1, 2, 3], [4, 5, 6]]), 1, method="attnlrp").shape == (2, 3)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (np.array([1, 2]), "expected an int or 3 of them, got \\[2\\]"),
        (np.ones(3), "got \\[3\\], torch.float64"),
        (None, "expected an int or 3 of them, got None"),
        ("a", "expected an int or 3 of them, got 'a'"),
        (["a", "b", "c"], "expected an int or 3 of them, got \\['a'"),
    ],
)
def test_bad_targets(targets: Any, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        explain(vit(), np.zeros((3, 3, 32, 32)), targets)
    with pytest.raises(OptionError, match="model: expected a torch.nn.Module, got str"):
        explain("vit", np.zeros((3, 3, 32, 32)), 1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="inputs: expected an array or a tensor, got str"):
        explain(vit(), "image", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="xai_lib"):
        explain(vit(), np.zeros((3, 3, 32, 32)), 1, xai_lib="captum")  # type: ignore[call-arg]


def test_its_metrics() -> None:
    """As in Quantus's README, with its explain_func replaced."""
    quantus = pytest.importorskip("quantus")
    model, rng = vit(), np.random.default_rng(0)
    x_batch, y_batch = rng.normal(size=(4, 3, 32, 32)).astype(np.float32), np.array([1, 2, 3, 4])
    a_batch = explain(model, x_batch, y_batch, method="attnlrp")
    quantus.helpers.asserts.assert_attributions(x_batch, a_batch)
    metric = quantus.PixelFlipping(features_in_step=64, perturb_baseline="black", disable_warnings=True)
    scores = metric(
        model=model,
        x_batch=x_batch,
        y_batch=y_batch,
        a_batch=None,
        explain_func=explain,
        explain_func_kwargs={"method": "attnlrp"},
        device="cpu",
    )
    assert len(scores) == 4
    assert np.isfinite(np.array(scores, dtype=float)).all()
