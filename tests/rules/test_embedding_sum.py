from __future__ import annotations

import pytest
import torch
from torch import nn

from relprop.rules import EmbeddingSum
from tests.rules.rule_checks import SIZES, Op, assert_near, random


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("size", [1, 63])
def test_formula(size: int, batch: int, targets: int) -> None:
    ids = torch.arange(batch * 7).reshape(batch, 7) % 11
    op = Op(nn.Embedding(11, size), ids, kind="embedding")
    relevance = random(targets, batch, 7, size)
    table, tokens = EmbeddingSum().propagate(op.call([ids]), relevance)
    assert table is None and tokens is not None
    want = torch.zeros(targets, batch, 7, dtype=torch.float64)
    for channel in range(size):
        want += relevance[..., channel]
    assert_near(tokens, want, 1e-12)
    assert_near(tokens.sum(-1), relevance.sum((-1, -2)), 1e-11)  # all of it, per sample


def test_needs_no_tensors() -> None:
    op = Op(nn.Embedding(11, 3), torch.ones(2, 7, dtype=torch.long), kind="embedding")
    assert EmbeddingSum().needs(op.node) == (False, False)
