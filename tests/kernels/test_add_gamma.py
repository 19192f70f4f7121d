"""The Triton kernel of the gamma add against the rule in float64."""

from __future__ import annotations

import pytest
import torch

from relprop.kernels.add_gamma import add_gamma
from relprop.rules import AddGamma
from tests.kernels.add_cases import SIZES, by_rule, case, stabiliser_of, summed
from tests.kernels.kernel_checks import DTYPES, STABILISERS, assert_near, poisoned


@pytest.mark.parametrize("gamma", [1.0, 0.25])
@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_equals_rule(shape: tuple[int, ...], shared: bool, stabiliser: tuple[int, float], gamma: float) -> None:
    relevance, a, b = case(torch.float32, 3, 2, shape, shared)
    out = (poisoned(*relevance.shape), poisoned(*relevance.shape))
    got = add_gamma(relevance, a, b, gamma=gamma, stabiliser=stabiliser, out=out)
    want = by_rule(AddGamma(gamma, stabiliser_of(stabiliser)), relevance, a, b)
    assert_near(got[0], want[0], 1e-5)
    assert_near(summed(got[1], b), want[1], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_that_cancel_to_the_bit(dtype: torch.dtype) -> None:
    """Common in 16 bits: each summand gets one half."""
    relevance, a, b = case(dtype, 2, 3, (40,))
    relevance = torch.ones_like(relevance)
    b[:, ::2] = -a[:, ::2]
    relevance[:, :, 1::2] = 0.0
    got = add_gamma(relevance, a, b, stabiliser=(0, 1e-9))
    assert torch.equal(got[0], relevance / 2) and torch.equal(got[1], relevance / 2)
    want = by_rule(AddGamma(), relevance, a, b)
    assert_near(got[0], want[0], 1e-6)
