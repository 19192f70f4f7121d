"""The pass as one graph: kernels are custom ops in it, nothing depends on values, and torch.compile runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import relprop
from relprop.lowering import PassFunction, lower
from relprop.weights import Derive
from tests.engine.models import vit

# What a recorded run cannot hold: numbers that come back to Python, sizes that depend on values, copies from Python.
NOT_FIXED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_assert_async", "unique")


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def graph_of(**options: Any) -> fx.GraphModule:
    """The pass of a small ViT for two samples and targets."""
    engine = relprop.compile(vit(depth=1), (images(2),), **options)
    function = PassFunction(engine.program, engine._indices, engine._dtype, engine._precision)
    given, index = [images(2), *engine._lasting()], torch.tensor([[[1], [2]], [[3], [4]]])
    with torch.no_grad():
        function(given, index, Derive())
        assert function.layout is not None
        return lower(function, given, index, {}, function.layout.explained_tokens, engine._weights.derived)[0]


def names(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("method", ["transformer_attribution", "attention_gradcam", "full"])
def test_nothing_depends_on_values(method: str) -> None:
    found = names(graph_of(method=method, backend="torch"))
    assert not [name for name in found if any(bad in name for bad in NOT_FIXED)]
    assert all(name.startswith(("aten.", "<built-in function getitem>")) for name in found)


def test_kernels_are_custom_ops() -> None:
    found = names(graph_of(backend="cpp"))
    assert any(name.startswith("relprop.step") for name in found)
    assert not any("aten.softmax" in name or "aten._softmax" in name for name in found)  # no map of the one layer


@pytest.mark.parametrize("backend", ["cpp", pytest.param("torch", marks=pytest.mark.full)])
def test_same_answers(backend: str) -> None:
    options = {"composite": "chefer_stable", "backend": backend}
    model = vit(depth=1)
    compiled = relprop.compile(model, (images(2),), compile=True, **options)
    plain = relprop.compile(model, (images(2),), **options)
    for batch, target in ((3, [1, 2, 3]), (3, [4, 5, 6])):
        found, want = compiled(images(batch), target=target), plain(images(batch), target=target)
        torch.testing.assert_close(found.relevance, want.relevance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.logits, want.logits, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.target, want.target)
    assert len(compiled._replays.shapes) == 1
