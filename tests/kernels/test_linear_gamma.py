"""The Triton kernels of the gamma rule against the rule in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.kernels.linear_gamma import linear_gamma_back, linear_gamma_share_out
from relprop.rules import LinearGamma, Stabiliser
from tests.kernels.kernel_checks import DTYPES, STABILISERS, TOLERANCE, assert_near, poisoned
from tests.kernels.linear_cases import by_rule, case, output_of


def by_kernels(rule: LinearGamma, given: dict[str, Tensor], with_y: bool) -> Tensor:
    x, w, relevance = given["x"], given["w"], given["relevance"]
    shares = linear_gamma_share_out(
        relevance,
        x,
        w,
        output_of(given) if with_y else None,
        given["bias"],
        gamma=rule.gamma,
        bias_share=rule.bias,
        stabiliser=rule.stabiliser.code,
        out=(poisoned(*relevance.shape), poisoned(*relevance.shape)),
    )
    out = poisoned(*relevance.shape[:-1], x.shape[-1])
    return linear_gamma_back(*shares, x, w, gamma=rule.gamma, out=out)[0]


def settled(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Relevance only where the output's sign is beyond rounding."""
    y = output_of(given)
    return {**given, "relevance": given["relevance"] * (y.abs() > 0.1 * y.square().mean().sqrt())}


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (5, 63, 130), (70, 100, 33)])
def test_equals_rule(dtype: torch.dtype, rows: int, n: int, k: int, targets: int) -> None:
    given = settled(case(dtype, targets, rows, n, k))
    for bias in (True, False):
        rule = LinearGamma(0.5, bias=bias)
        assert_near(by_kernels(rule, given, dtype == torch.float32), by_rule(rule, given), TOLERANCE[dtype])


@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize("with_y", [True, False])
def test_stabilisers(with_y: bool, stabiliser: tuple[int, float]) -> None:
    """Also where an output is exactly 0, which has no share."""
    rule = LinearGamma(0.25, Stabiliser(stabiliser[1], ("signed", "reference")[stabiliser[0]]))
    given = settled(case(torch.float32, 2, 37, 41, 50, zeros=True))
    given["w"][3], given["bias"][3] = 0.0, 0.0
    given["relevance"][:, :, 3] = 1.0
    assert_near(by_kernels(rule, given, with_y), by_rule(rule, given), TOLERANCE[torch.float32])


def test_without_preference_it_is_epsilon() -> None:
    given = settled(case(torch.float32, 1, 20, 30, 40))
    p1, p2 = linear_gamma_share_out(given["relevance"], given["x"], given["w"], gamma=0.0, stabiliser=(0, 1e-6))
    back, passed = linear_gamma_back(p1, p2, given["x"], given["w"], given["relevance"], gamma=0.0)
    assert_near(back, given["x"].double() * (p1.double() @ given["w"].double()), 2e-5)
    assert_near(passed, given["relevance"].double() @ given["w"].double(), 2e-5)
