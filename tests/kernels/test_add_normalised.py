"""The Triton kernels of the normalised add against the rule in float64."""

from __future__ import annotations

import pytest
import torch

from relprop.errors import OptionError, ShapeError
from relprop.kernels.add_normalised import add_normalised
from relprop.rules import AddNormalised
from tests.kernels.add_cases import SIZES, by_rule, case, stabiliser_of, summed
from tests.kernels.kernel_checks import DTYPES, STABILISERS, assert_near, poisoned, spread_out

TOLERANCE = 1e-5


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_rule(dtype: torch.dtype, shape: tuple[int, ...], targets: int, shared: bool) -> None:
    relevance, a, b = case(dtype, targets, 3, shape, shared)
    out = (poisoned(*relevance.shape), poisoned(*relevance.shape))
    got = add_normalised(relevance, a, b, stabiliser=(0, 1e-9), out=out)
    want = by_rule(AddNormalised(), relevance, a, b)
    assert_near(got[0], want[0], TOLERANCE)
    assert_near(summed(got[1], b), want[1], TOLERANCE)
    assert got[2] is None


@pytest.mark.parametrize("deferred", [False, True])
def test_many_pieces(deferred: bool) -> None:
    """A sample of several pieces, the last one short."""
    relevance, a, b = case(torch.float32, 1, 2, (9, 1031))
    part_a, part_b, scales = add_normalised(relevance, a, b, stabiliser=(0, 1e-9), deferred=deferred)
    want = by_rule(AddNormalised(), relevance, a, b)
    if scales is not None:
        part_a, part_b = part_a * scales[..., 0, None, None], part_b * scales[..., 1, None, None]
    assert_near(part_a, want[0], TOLERANCE)
    assert_near(part_b, want[1], TOLERANCE)


@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
def test_stabilisers_and_zeros(stabiliser: tuple[int, float]) -> None:
    """Summands that are 0, cancel to the bit, or carry nothing."""
    relevance, a, b = case(torch.float32, 2, 3, (8, 9))
    relevance[:, :, 0], a[:, 0], b[:, 0] = 1e-3, 0.0, 0.0
    relevance[:, 1] = 0.0
    got = add_normalised(relevance, a, b, stabiliser=stabiliser)
    want = by_rule(AddNormalised(stabiliser_of(stabiliser)), relevance, a, b)
    for one, other in zip(got[:2], want, strict=True):
        assert_near(one, other, TOLERANCE)


def test_same_bits_in_any_batch() -> None:
    relevance, a, b = case(torch.float32, 2, 4, (9, 1031))
    whole = add_normalised(relevance, a, b, stabiliser=(1, 1e-9))
    again = add_normalised(relevance, a, b, stabiliser=(1, 1e-9))
    alone = add_normalised(relevance[1:, 2:3], a[2:3], b[2:3], stabiliser=(1, 1e-9))
    for one, same, part in zip(whole[:2], again[:2], alone[:2], strict=True):
        assert torch.equal(one, same) and torch.equal(one[1:, 2:3], part)


def test_strides_and_bfloat16_relevance() -> None:
    relevance, a, b = case(torch.float32, 2, 3, (8, 9))
    want = add_normalised(relevance, a, b, stabiliser=(0, 1e-9))
    got = add_normalised(spread_out(relevance), spread_out(a), spread_out(b), stabiliser=(0, 1e-9))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    low = add_normalised(relevance.bfloat16(), a, b, stabiliser=(0, 1e-9))
    exact = by_rule(AddNormalised(), relevance.bfloat16(), a, b)
    assert low[0].dtype == torch.bfloat16
    assert_near(low[0], exact[0], 1e-2)


def test_empty() -> None:
    relevance, a, b = case(torch.float32, 2, 0, (8,))
    assert add_normalised(relevance, a, b, stabiliser=(0, 1e-9))[0].shape == (2, 0, 8)


def test_bad_input() -> None:
    relevance, a, b = case(torch.float32, 2, 3, (8,))
    with pytest.raises(ShapeError, match=r"b: expected shape \[3, 8\], got \[2, 8\]"):
        add_normalised(relevance, a, b[:2], stabiliser=(0, 1e-9))
    with pytest.raises(ShapeError, match=r"relevance: expected shape \[2, 3, 8\], got \[2, 2, 8\]"):
        add_normalised(relevance[:, :2], a, b, stabiliser=(0, 1e-9))
    with pytest.raises(OptionError, match="epsilon of at least 0"):
        add_normalised(relevance, a, b, stabiliser=(0, -1.0))
