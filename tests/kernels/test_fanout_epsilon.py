"""The Triton kernel of the epsilon fan-out against the rule in float64."""

from __future__ import annotations

import pytest
import torch

from relprop.errors import DTypeError, OptionError, ShapeError
from relprop.kernels.fanout_epsilon import fanout_epsilon
from relprop.rules import FanoutEpsilon
from tests.kernels.add_cases import stabiliser_of
from tests.kernels.kernel_checks import DTYPES, STABILISERS, assert_near, poisoned, random, spread_out
from tests.rules.rule_checks import call_by_hand


@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_rule(dtype: torch.dtype, count: int, stabiliser: tuple[int, float]) -> None:
    x = random(3, 5, 71, seed=1, dtype=dtype, zeros=True)
    relevances = [random(2, 3, 5, 71, seed=2 + i) for i in range(count)]
    call = call_by_hand("fanout", None, (x.double(),), x.double())
    want = FanoutEpsilon(stabiliser_of(stabiliser)).propagate(call, tuple(r.double() for r in relevances))[0]
    if stabiliser[1] == 0:  # the rule is a plain sum there, also where x is 0
        assert want is not None
        want = want * (x != 0)
    got = fanout_epsilon(relevances, x, stabiliser=stabiliser, out=poisoned(2, 3, 5, 71))
    assert want is not None
    assert_near(got, want, 1e-5)


def test_strides() -> None:
    x, relevances = random(3, 71, seed=1), [random(2, 3, 71, seed=2 + i) for i in range(3)]
    want = fanout_epsilon(relevances, x, stabiliser=(1, 1e-9))
    got = fanout_epsilon([spread_out(r) for r in relevances], spread_out(x), stabiliser=(1, 1e-9))
    assert torch.equal(got, want)


def test_bad_input() -> None:
    x = random(3, 4, seed=1)
    with pytest.raises(OptionError, match="relevances: expected at least one tensor, got none"):
        fanout_epsilon([], x, stabiliser=(0, 0.0))
    with pytest.raises(ShapeError, match=r"relevances\[1\]: expected shape \[1, 3, 4\], got \[1, 3, 3\]"):
        fanout_epsilon([x[None], x[None, :, :3]], x, stabiliser=(0, 0.0))
    with pytest.raises(DTypeError, match=r"relevances\[1\]: expected torch.float32, got torch.float16"):
        fanout_epsilon([x[None], x[None].half()], x, stabiliser=(0, 0.0))
