"""The Triton kernels of the alpha-beta rule against the rule in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError
from relprop.kernels.linear_alpha_beta import linear_alpha_beta_back, linear_alpha_beta_share_out
from relprop.kernels.linear_back import linear_back
from relprop.rules import LinearAlphaBeta, Stabiliser
from tests.kernels.kernel_checks import (
    DTYPES,
    STABILISERS,
    TOLERANCE,
    assert_near,
    poisoned,
    random,
    spread_out,
)
from tests.kernels.linear_cases import by_rule, case, output_of


def by_kernels(rule: LinearAlphaBeta, given: dict[str, Tensor], with_y: bool, **options: Any) -> Tensor:
    x, w, relevance = given["x"], given["w"], given["relevance"]
    y = None
    if with_y:
        y = output_of(given)
    shape = relevance.shape
    p1, p2 = linear_alpha_beta_share_out(
        relevance,
        x,
        w,
        y,
        given["bias"],
        alpha=rule.alpha,
        beta=rule.beta,
        bias_share=rule.bias,
        stabiliser=rule.stabiliser.code,
        out=(poisoned(*shape), poisoned(*shape)),
        **options,
    )
    assert (p1 is p2) == (rule.beta == 0)
    back, _ = linear_alpha_beta_back(p1, p2, x, w, out=poisoned(*shape[:-1], x.shape[-1]), **options)
    assert back is not None
    return back


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (5, 63, 130), (70, 100, 33), (130, 48, 64)])
def test_equals_rule(dtype: torch.dtype, rows: int, n: int, k: int, targets: int) -> None:
    given, rule = case(dtype, targets, rows, n, k), LinearAlphaBeta()
    assert_near(by_kernels(rule, given, with_y=dtype == torch.float32), by_rule(rule, given), TOLERANCE[dtype])


@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize(
    "rule", [LinearAlphaBeta(2.0, 1.0), LinearAlphaBeta(bias=True), LinearAlphaBeta(2.0, 1.0, bias=True)], ids=str
)
@pytest.mark.parametrize("with_y", [True, False])
def test_parameters(rule: LinearAlphaBeta, stabiliser: tuple[int, float], with_y: bool) -> None:
    kinds = ("signed", "reference")
    rule = replace(rule, stabiliser=Stabiliser(stabiliser[1], kinds[stabiliser[0]]))
    given = case(torch.float32, 2, 37, 41, 50, zeros=True)
    assert_near(by_kernels(rule, given, with_y), by_rule(rule, given), TOLERANCE[torch.float32])


def test_bias_that_is_left_out() -> None:
    given = case(torch.float32, 1, 20, 30, 40)
    x, w, stabiliser = given["x"], given["w"], (0, 1e-9)
    with_bias = linear_alpha_beta_share_out(
        given["relevance"], x, w, x @ w.T + given["bias"], given["bias"], stabiliser=stabiliser
    )[0]
    without = linear_alpha_beta_share_out(given["relevance"], x, w, x @ w.T, stabiliser=stabiliser)[0]
    computed = linear_alpha_beta_share_out(given["relevance"], x, w, stabiliser=stabiliser)[0]
    assert_near(with_bias, computed, 2e-5)
    assert_near(without, computed, 2e-5)


@pytest.mark.parametrize("with_y", [True, False])
def test_nothing_supports_an_output(with_y: bool) -> None:
    """All products negative: z+ is rounding, whatever its sign, and its share is exactly 0."""
    given = case(torch.float32, 2, 9, 11, 200)
    given["x"], given["w"] = given["x"].abs(), -given["w"].abs()
    given["bias"].zero_()
    assert not by_kernels(LinearAlphaBeta(), given, with_y).any()
    assert not by_rule(LinearAlphaBeta(), given).any()


def test_strides_and_leading_axes() -> None:
    """Batches of sequences, spread out in memory, are the same rows."""
    given, rule = case(torch.float32, 2, 24, 17, 23), LinearAlphaBeta()
    want = by_kernels(rule, given, with_y=True)
    shaped = {
        "x": spread_out(given["x"]).reshape(4, 6, 23),
        "w": spread_out(given["w"]),
        "bias": spread_out(given["bias"]),
        "relevance": given["relevance"].reshape(2, 4, 6, 17).transpose(1, 2).contiguous().transpose(1, 2),
    }
    got = by_kernels(rule, shaped, with_y=True)
    assert torch.equal(got, want.reshape(2, 4, 6, 23))


def test_rows_one_at_a_time() -> None:
    given, rule = case(torch.float32, 3, 40, 20, 30), LinearAlphaBeta()
    want = by_kernels(rule, given, with_y=False)
    for at in (0, 17, 39):
        alone = {**given, "x": given["x"][at : at + 1], "relevance": given["relevance"][1:2, at : at + 1]}
        assert_near(by_kernels(rule, alone, with_y=False)[0, 0], want[1, at], 1e-6)


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (3, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_ride_along(dtype: torch.dtype, counts: tuple[int, int]) -> None:
    """Any number of plain left operands beside any number of targets."""
    targets, gradients = counts
    given = case(dtype, targets, 21, 40, 35)
    x, w, p = given["x"], given["w"], given["relevance"] if targets else None
    g = random(gradients, 21, 40, seed=9) if gradients else None
    back, passed = linear_alpha_beta_back(p, p, x, w, g)
    if p is None:
        assert back is None
    else:
        x64, w64 = x.double(), w.double()
        want = (x64 * (p.double() @ w64) + x64.abs() * (p.double() @ w64.abs())) / 2
        assert_near(back, want, TOLERANCE[dtype])
    if g is None:
        assert passed is None
    else:
        assert_near(passed, g.double() @ w.double(), TOLERANCE[dtype])
        assert_near(linear_back(None, None, None, w, g)[1], passed, 1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_gradients_through_the_activation_below(activation: str) -> None:
    given = case(torch.float32, 2, 21, 40, 35)
    h = random(21, 35, seed=11).requires_grad_()
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
    }
    x = functions[activation](h)
    g = random(2, 21, 40, seed=9)
    want = torch.stack([torch.autograd.grad(x, h, one @ given["w"], retain_graph=True)[0] for one in g])
    p = given["relevance"]
    back, passed = linear_alpha_beta_back(
        p, p, x.detach(), given["w"], g, activation=activation, preactivation=h.detach()
    )
    assert_near(passed, want, 1e-5)
    alone, _ = linear_alpha_beta_back(p, p, x.detach(), given["w"])
    assert_near(back, alone, 1e-5)


@pytest.mark.parametrize("precision", ["highest", "high", "ieee", "tf32x3", "medium"])
def test_precision(precision: str) -> None:
    """The interpreter computes every float32 product exactly; only operands cast to bfloat16 differ."""
    given, rule = case(torch.float32, 1, 33, 20, 40), LinearAlphaBeta()
    tolerance = 3e-2 if precision == "medium" else 2e-5
    loose = {"tolerance": 0.0} if precision in ("medium", "high") else {}
    shares = linear_alpha_beta_share_out(
        given["relevance"], given["x"], given["w"], stabiliser=rule.stabiliser.code, precision=precision, **loose
    )
    got, _ = linear_alpha_beta_back(*shares, given["x"], given["w"], precision=precision)
    assert got is not None
    assert_near(got, by_rule(rule, given), tolerance)


def test_empty() -> None:
    given = case(torch.float32, 2, 0, 5, 7)
    assert by_kernels(LinearAlphaBeta(), given, with_y=True).shape == (2, 0, 7)


def test_bad_input() -> None:
    given = case(torch.float32, 2, 3, 5, 7)
    r, x, w, b = given["relevance"], given["x"], given["w"], given["bias"]
    options: dict[str, Any] = {"stabiliser": (0, 1e-9)}
    with pytest.raises(ShapeError, match=r"x, w: expected shapes \[..., K\] and \[N, K\], got \[3, 7\] and \[5, 6\]"):
        linear_alpha_beta_share_out(r, x, w[:, :6], **options)
    with pytest.raises(ShapeError, match=r"relevance: expected shape \[2, 3, 5\], got \[2, 3, 4\]"):
        linear_alpha_beta_share_out(r[..., :4], x, w, **options)
    with pytest.raises(DTypeError, match=r"w: expected torch.float32, got torch.bfloat16"):
        linear_alpha_beta_share_out(r, x, w.bfloat16(), **options)
    with pytest.raises(
        DTypeError, match=r"x: expected torch.float32, torch.bfloat16, torch.float16, got torch.float64"
    ):
        linear_alpha_beta_share_out(r, x.double(), w.double(), **options)
    with pytest.raises(ShapeError, match=r"bias: expected shape \[5\], got \[4\]"):
        linear_alpha_beta_share_out(r, x, w, bias=b[:4], **options)
    with pytest.raises(DeviceError, match=r"bias: expected a tensor on cpu as the others, got one on meta"):
        linear_alpha_beta_share_out(r, x, w, bias=b.to("meta"), **options)
    with pytest.raises(OptionError, match=r"precision: expected one of highest, .*, got 'fast'"):
        linear_alpha_beta_share_out(r, x, w, precision="fast", **options)
    with pytest.raises(OptionError, match=r"stabiliser: expected kind 0 or 1 .*, got \(2, 1e-09\)"):
        linear_alpha_beta_share_out(r, x, w, stabiliser=(2, 1e-9))
    with pytest.raises(ShapeError, match=r"out: expected a contiguous tensor to write to, got strides \[1, 14, 2\]"):
        linear_alpha_beta_back(r, r, x, w, out=torch.empty(3, 7, 2).permute(2, 0, 1))
    with pytest.raises(
        OptionError, match=r"activation: expected one of None, gelu, .* and its input with it, got 'gelu'"
    ):
        linear_alpha_beta_back(r, r, x, w, activation="gelu")
