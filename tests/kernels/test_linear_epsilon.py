"""The Triton kernels of the epsilon rule against the rule in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.kernels.linear_epsilon import linear_epsilon_back, linear_epsilon_share_out
from relprop.rules import LinearEpsilon, Stabiliser
from tests.kernels.kernel_checks import DTYPES, STABILISERS, TOLERANCE, assert_near, poisoned, random, spread_out
from tests.kernels.linear_cases import by_rule, case, output_of


def settled(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Relevance only where z does not cancel: one float32 rounding of z is the whole of a z near 0."""
    z = output_of(given)
    plain = z - given["bias"].float()
    kept = torch.minimum(z.abs(), plain.abs()) > 0.1 * z.square().mean().sqrt()
    return {**given, "relevance": given["relevance"] * kept}


def by_kernels(rule: LinearEpsilon, given: dict[str, Tensor], with_y: bool) -> Tensor:
    x, w, relevance = given["x"], given["w"], given["relevance"]
    s = linear_epsilon_share_out(
        relevance,
        x,
        w,
        output_of(given).reshape(relevance.shape[1:]) if with_y else None,
        given["bias"],
        bias_share=rule.bias,
        stabiliser=rule.stabiliser.code,
        out=poisoned(*relevance.shape),
    )
    return linear_epsilon_back(s, x, w, out=poisoned(*relevance.shape[:-1], x.shape[-1]))[0]


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (5, 63, 130), (70, 100, 33)])
def test_equals_rule(dtype: torch.dtype, rows: int, n: int, k: int, targets: int) -> None:
    given = settled(case(dtype, targets, rows, n, k))
    for bias in (True, False):
        rule = LinearEpsilon(bias=bias)
        assert_near(by_kernels(rule, given, dtype == torch.float32), by_rule(rule, given), TOLERANCE[dtype])


@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize("with_y", [True, False])
def test_stabilisers(with_y: bool, stabiliser: tuple[int, float]) -> None:
    """Also where z is 0."""
    rule = LinearEpsilon(Stabiliser(stabiliser[1], ("signed", "reference")[stabiliser[0]]))
    given = settled(case(torch.float32, 2, 37, 41, 50, zeros=True))
    given["w"][3], given["bias"][3] = 0.0, 0.0
    given["relevance"][:, :, 3] = 1.0
    assert_near(by_kernels(rule, given, with_y), by_rule(rule, given), TOLERANCE[torch.float32])


def test_strides() -> None:
    given, rule = settled(case(torch.float32, 2, 24, 17, 23)), LinearEpsilon()
    want = by_kernels(rule, given, with_y=False)
    shaped = {**given, "x": spread_out(given["x"]).reshape(4, 6, 23), "w": spread_out(given["w"])}
    shaped["relevance"] = spread_out(given["relevance"]).reshape(2, 4, 6, 17)
    assert torch.equal(by_kernels(rule, shaped, with_y=False), want.reshape(2, 4, 6, 23))


def test_gradients_ride_along() -> None:
    given = case(torch.float32, 2, 21, 40, 35)
    x, w, s, g = given["x"], given["w"], given["relevance"], random(2, 21, 40, seed=9)
    back, passed = linear_epsilon_back(s, x, w, g)
    assert_near(back, x.double() * (s.double() @ w.double()), 2e-5)
    assert_near(passed, g.double() @ w.double(), 2e-5)
