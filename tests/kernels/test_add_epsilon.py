"""The Triton kernel of the epsilon add against the rule in float64."""

from __future__ import annotations

import pytest
import torch

from relprop.errors import ShapeError
from relprop.kernels.add_epsilon import add_epsilon
from relprop.rules import AddEpsilon
from tests.kernels.add_cases import SIZES, by_rule, case, stabiliser_of, summed
from tests.kernels.kernel_checks import DTYPES, STABILISERS, assert_near, poisoned


@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_rule(dtype: torch.dtype, shape: tuple[int, ...], shared: bool, stabiliser: tuple[int, float]) -> None:
    relevance, a, b = case(dtype, 3, 2, shape, shared)
    a[:, 0], b[:, 0] = 0.0, 0.0
    out = (poisoned(*relevance.shape), poisoned(*relevance.shape))
    got = add_epsilon(relevance, a, b, stabiliser=stabiliser, out=out)
    want = by_rule(AddEpsilon(stabiliser_of(stabiliser)), relevance, a, b)
    assert_near(got[0], want[0], 1e-5)
    assert_near(summed(got[1], b), want[1], 1e-5)


def test_in_place() -> None:
    relevance, a, b = case(torch.float32, 2, 3, (70,))
    want = add_epsilon(relevance, a, b, stabiliser=(0, 1e-6))
    got = add_epsilon(relevance, a, b, stabiliser=(0, 1e-6), out=(relevance, torch.empty_like(relevance)))
    assert got[0] is relevance
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_bad_input() -> None:
    relevance, a, b = case(torch.float32, 2, 3, (8,))
    with pytest.raises(ShapeError, match=r"b: expected shape \[3, 8\], got \[3, 7\]"):
        add_epsilon(relevance, a, b[:, :7], stabiliser=(0, 1e-9))
