"""A call in pieces answers as the whole call does, whatever the target's form, or says why it is not cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop import memory
from relprop.errors import OptionError, TargetError
from relprop.targets import count_targets
from tests.engine.models import relative, vit

BATCH = 5
FORMS: dict[str, Any] = {
    "largest": None,
    "int": 4,
    "negative": -3,
    "index": (4,),
    "list": [1, 2, 3, 4, 5],
    "tensor": torch.tensor([1, 2, 3, 4, 5]),
    "array": np.array([1, 2, 3, 4, 5]),
    "range": range(1, 6),
    "no axis": torch.tensor(4),
    "several": [[1, 2], [3, 4], [5, 6], [7, 8], [9, 0]],
    "tuples": ([1, 2], [3, 4], [5, 6], [7, 8], [9, 0]),
    "several, tensor": torch.arange(15).reshape(5, 3) % 10,
    "callable": lambda output: output[:, 2] - output[:, 3],
    "contrast": relprop.contrast([1, 2, 3, 4, 5], against=0),
    "contrast, both": relprop.contrast(torch.tensor([1, 2, 3, 4, 5]), against=[5, 4, 2, 1, 0]),
    "contrast, mean": relprop.contrast([1, 2, 3, 4, 5]),
    "contrast, ints": relprop.contrast(3, against=7),
}


@pytest.fixture(scope="module")
def engine() -> relprop.Engine:
    example = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    return relprop.compile(vit().double(), (example,), composite="chefer_stable", latents=["blocks.1.mlp"])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_target(engine: relprop.Engine, form: str, size: int) -> None:
    x = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64)
    whole, found = (engine(x, target=FORMS[form], check=True, batch_size=given) for given in (None, size))
    for name in ("relevance", "logits", "target", "disagreement"):
        expected, got = getattr(whole, name), getattr(found, name)
        assert (expected is None) == (got is None), name
        assert expected is None or (got.shape == expected.shape and relative(got, expected) < 1e-6), name
    assert relative(found.at("blocks.1.mlp").relevance, whole.at("blocks.1.mlp").relevance) < 1e-9
    assert found.token_kinds == whole.token_kinds and found.several == whole.several
    assert found.kinds is not None and whole.kinds is not None
    assert found.kinds.profile.shape == whole.kinds.profile.shape


class _Queries(nn.Module):
    """An output with two axes per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vit(num_classes=12)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).view(-1, 3, 4)


QUERIES: dict[str, Any] = {
    "index": (2, 1),
    "several": [[[0, 0], [2, 3]], [[1, 1], [0, 2]], [[2, 2], [1, 0]]],
    "contrast": relprop.contrast((2, 1), against=(0, 3)),
}


@pytest.mark.parametrize("form", QUERIES)
def test_index_tuples(form: str) -> None:
    model, x = _Queries().double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    engine = relprop.compile(model, (x,), method="attnlrp")
    whole, found = (engine(x, target=QUERIES[form], batch_size=size) for size in (None, 2))
    assert found.relevance.shape == whole.relevance.shape
    assert relative(found.relevance, whole.relevance) < 1e-9


@pytest.mark.parametrize("wrong", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], relprop.contrast([1, 2, 3, 4], against=0)])
def test_entries_for_other_samples(engine: relprop.Engine, wrong: Any) -> None:
    """Too many would go unnoticed: the pieces end with the batch."""
    for size in (2, 4):
        with pytest.raises(TargetError, match=r"expected one entry for each of 5 samples, got [46]"):
            engine(torch.randn(BATCH, 3, 32, 32, dtype=torch.float64), target=wrong, batch_size=size)


def test_number_of_targets() -> None:
    counts = {form: count_targets(target) for form, target in {**FORMS, **QUERIES}.items()}
    assert {form for form, count in counts.items() if count != 1} == {"several", "tuples", "several, tensor"}
    assert counts["several"] == counts["tuples"] == 2 and counts["several, tensor"] == 3


class _Similar(nn.Module):
    """Scores every image with every other one, as CLIP does with texts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vit(num_classes=12)

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(x)
        return found @ found.flip(-1).T


def _budget(monkeypatch: pytest.MonkeyPatch, budget: Callable[[], float]) -> None:
    monkeypatch.setattr(memory, "available", lambda device: int(budget() / memory.SHARE) + 1)


def test_scores_between_samples_want_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _Similar().double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    engine = relprop.compile(model, (x,), method="attnlrp")
    whole = engine(x)
    for size in (1, 2):
        with pytest.raises(OptionError, match=rf"expected a batch in one piece.*got batch_size {size}, which takes"):
            engine(x, batch_size=size)
    for fitting in (3, 8, "auto"):
        assert torch.equal(engine(x, batch_size=fitting).relevance, whole.relevance)
    _budget(monkeypatch, lambda: engine.memory(2) - engine.derived_memory)
    with pytest.raises(OptionError, match=r"got batch_size 'auto', which takes 2 of 3 samples at a time"):
        engine(x, batch_size="auto")
