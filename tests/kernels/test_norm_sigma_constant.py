"""The Triton kernel of the norm rule sigma_constant against the rule in float64."""

from __future__ import annotations

import pytest
import torch

from relprop.kernels.norm_sigma_constant import norm_sigma_constant
from relprop.rules import NormSigmaConstant
from tests.kernels.add_cases import stabiliser_of
from tests.kernels.kernel_checks import DTYPES, STABILISERS, assert_near, poisoned, random
from tests.rules.rule_checks import call_by_hand

aten = torch.ops.aten


@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("n", [1, 63, 1023])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_rule(dtype: torch.dtype, n: int, kind: str, stabiliser: tuple[int, float]) -> None:
    x, weight, bias = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(2, 5, n), (n,), (n,)]))
    weight[n // 2 :: 9], bias[n // 2 :: 9] = 0.0, 0.0  # outputs of exactly 0
    exact, rule = [t.double() for t in (x, weight, bias)], NormSigmaConstant(stabiliser_of(stabiliser))
    if kind == "layer":
        y = torch.nn.functional.layer_norm(exact[0], (n,), exact[1], exact[2], 1e-5)
        arguments = ("layer", aten.layer_norm.default, (exact[0], (n,), exact[1], exact[2], 1e-5))
    else:
        y = torch.nn.functional.rms_norm(exact[0], (n,), exact[1], 1e-5)
        arguments = ("rms", aten.rms_norm.default, (exact[0], (n,), exact[1], 1e-5))
    y = y.to(dtype).double()
    relevance = random(3, 2, 5, n, seed=3).double() * y
    call = call_by_hand("norm", arguments[1], arguments[2], y)
    want = rule.propagate(call, relevance)[0]
    got = norm_sigma_constant(
        relevance.float(), x, y.to(dtype), weight, kind=kind, stabiliser=stabiliser, out=poisoned(3, 2, 5, n)
    )
    assert want is not None
    # With one channel a layer norm's centred shares are the rounding of 0.
    if n == 1 and kind == "layer":
        assert not want.any() and not got.any()
    else:
        assert_near(got, want, 2e-5)
