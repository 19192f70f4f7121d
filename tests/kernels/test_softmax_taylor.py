"""The Triton kernel of the Taylor softmax against the rule in float64."""

from __future__ import annotations

import pytest
import torch

from relprop.errors import ShapeError
from relprop.kernels.softmax_taylor import softmax_taylor
from relprop.rules import SoftmaxTaylor
from tests.kernels.kernel_checks import DTYPES, assert_near, poisoned, random, spread_out


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("n", [1, 63, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_rule(dtype: torch.dtype, n: int, targets: int) -> None:
    x = random(2, 5, n, seed=1, dtype=dtype)
    x[0, :, n // 2 + 1 :] = -torch.inf
    p = torch.softmax(x.double(), -1).to(dtype)
    relevance = random(targets, 2, 5, n, seed=2)
    want = SoftmaxTaylor().through(x.double(), p.double(), relevance.double())
    assert want is not None
    got = softmax_taylor(relevance, x, p, out=poisoned(targets, 2, 5, n))
    assert_near(got, want, 1e-5)
    assert not got[:, 0, :, n // 2 + 1 :].any()


def test_strides() -> None:
    x, relevance = random(2, 5, 40, seed=1), random(2, 2, 5, 40, seed=2)
    p = torch.softmax(x, -1)
    got = softmax_taylor(spread_out(relevance), spread_out(x), spread_out(p))
    assert torch.equal(got, softmax_taylor(relevance, x, p))


def test_bad_input() -> None:
    x = random(2, 5, seed=1)
    with pytest.raises(ShapeError, match=r"p: expected shape \[2, 5\], got \[2, 4\]"):
        softmax_taylor(x[None], x, x[:, :4])
