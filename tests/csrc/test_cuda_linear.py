"""CUDA kernels of the linear rules, run by the host emulation, against float64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from relprop import native_cuda
from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError
from relprop.native_cuda import Back
from tests.csrc.cuda_checks import BF16, FLOAT, FP16, STABILISERS, TOLERANCE, assert_near, random, share

# rows, n, k: smaller than a tile, no multiple of a chunk, and more than one tile each way.
SIZES = [(1, 1, 1), (5, 33, 63), (130, 17, 40), (3, 131, 72)]
FULL_SIZES = [(129, 130, 131), (257, 64, 96), (64, 300, 33)]
ALL_SIZES = [*SIZES, *(pytest.param(s, marks=pytest.mark.full) for s in FULL_SIZES)]

# Layer tensors, streams, product.
SHARE_OUTS = [
    (FLOAT, FLOAT, "float32"),
    (FLOAT, FLOAT, "tfloat32"),
    (FLOAT, FLOAT, "bfloat16"),
    (BF16, FLOAT, "bfloat16"),
    (BF16, BF16, "bfloat16"),
    (FP16, FLOAT, "float16"),
    (FP16, FP16, "float16"),
]
BACKS = [
    (FLOAT, FLOAT, "float32"),
    (FLOAT, FLOAT, "tfloat32"),
    (FLOAT, FLOAT, "bfloat16"),
    (BF16, FLOAT, "float32"),
    (BF16, FLOAT, "tfloat32"),
    (BF16, FLOAT, "bfloat16"),
    (BF16, BF16, "bfloat16"),
    (FP16, FLOAT, "float32"),
    (FP16, FLOAT, "tfloat32"),
    (FP16, FP16, "float16"),
]

# Sums of up to a few hundred terms in float32; with y, ½(y - b + |x||w|ᵀ) loses a few bits more.
SUM_TOLERANCE = 3e-5

pytestmark = pytest.mark.usefixtures("results")


def rounded(tensor: Tensor, product: str) -> Tensor:
    """A factor as the product reads it, in float64."""
    if product == "float32":
        return tensor.double()
    if product == "tfloat32":
        bits = tensor.float().contiguous().view(torch.int32)
        return (bits + 0x1000 & ~0x1FFF).view(FLOAT).double()
    return tensor.to(getattr(torch, product)).double()


class Case:
    """A linear layer on random inputs, some of them 0, with NaN around every tensor."""

    def __init__(self, values: torch.dtype, streams: torch.dtype, targets: int, size: tuple[int, int, int]) -> None:
        rows, n, k = size
        self.x, self.w = random(rows, k, dtype=values, seed=1), random(n, k, dtype=values, seed=2)
        if k > 1:
            self.x.view(-1)[::7] = 0.0
        self.bias = random(n, dtype=values, seed=3)
        self.y = random(rows, n, dtype=values)
        self.y.copy_(self.x.double() @ self.w.double().T + self.bias.double())
        self.relevance = random(targets, rows, n, dtype=streams, seed=4)

    def parts(self, product: str) -> tuple[Tensor, Tensor]:
        """z+ and z- of the factors that the product reads."""
        x, w = rounded(self.x, product), rounded(self.w, product)
        xp, xn, wp, wn = x.clamp(min=0), x.clamp(max=0), w.clamp(min=0), w.clamp(max=0)
        return xp @ wp.T + xn @ wn.T, xp @ wn.T + xn @ wp.T


def tolerance(product: str, streams: torch.dtype) -> float:
    return SUM_TOLERANCE + (TOLERANCE[streams] if streams is not FLOAT else 0)


@pytest.mark.parametrize(("targets", "beta"), [(1, 0.0), (2, 1.0), (2, 0.0)])
@pytest.mark.parametrize("size", ALL_SIZES)
@pytest.mark.parametrize(("values", "streams", "product"), SHARE_OUTS)
def test_alpha_beta_share_out(
    values: torch.dtype, streams: torch.dtype, product: str, size: tuple[int, int, int], targets: int, beta: float
) -> None:
    case = Case(values, streams, targets, size)
    alpha, stabiliser = 1.0 + beta, STABILISERS[targets]
    p1, p2 = native_cuda.linear_alpha_beta_share_out(
        case.relevance,
        case.x,
        case.w,
        case.y,
        case.bias,
        product=product,
        stabiliser=stabiliser,
        alpha=alpha,
        beta=beta,
    )
    plus, minus = case.parts(product)
    r = case.relevance.double()
    # y is rounded to float32: a z that nearly vanishes is known no better than that.
    known = (case.y.abs() + plus - minus).double() * 2e-7 if product == "float32" else torch.zeros_like(plus)
    clear = ((plus > 1e3 * known) | (plus == 0)) & ((-minus > 1e3 * known) | (minus == 0))
    s_plus, s_minus = share(r, plus, stabiliser) * (plus != 0), share(r, minus, stabiliser) * (minus != 0)
    one_term = product == "float32" and size == (1, 1, 1)  # z is all of |x||w|, or the rounding of y
    assert one_term or clear.double().mean() > 0.8
    near = 1e-3 if product == "float32" else tolerance(product, streams)
    assert_near(p1 * clear, (alpha * s_plus - beta * s_minus) * clear, near)
    assert_near(p2 * clear, (alpha * s_plus + beta * s_minus) * clear, near)
    assert not p1.isnan().any() and (p1 is p2) == (beta == 0)


@pytest.mark.parametrize(("size", "bias_takes_share"), [(SIZES[1], True), (SIZES[2], False)])
@pytest.mark.parametrize(("values", "streams", "product"), SHARE_OUTS)
def test_epsilon_share_out(
    values: torch.dtype, streams: torch.dtype, product: str, size: tuple[int, int, int], bias_takes_share: bool
) -> None:
    case = Case(values, streams, 2, size)
    stabiliser = (0, 0.05)
    s = native_cuda.linear_epsilon_share_out(
        case.relevance,
        case.x,
        case.w,
        case.y,
        case.bias,
        product=product,
        stabiliser=stabiliser,
        bias_takes_share=bias_takes_share,
    )
    z = sum(case.parts(product))
    if product == "float32":
        z = case.y.double() - case.bias.double()
    if bias_takes_share:
        z = z + case.bias.double()
    assert_near(s, share(case.relevance.double(), z, stabiliser), 3 * tolerance(product, streams))


@pytest.mark.parametrize(("size", "bias_takes_share"), [(SIZES[1], False), (SIZES[3], True)])
@pytest.mark.parametrize(("values", "streams", "product"), SHARE_OUTS)
def test_gamma_share_out(
    values: torch.dtype, streams: torch.dtype, product: str, size: tuple[int, int, int], bias_takes_share: bool
) -> None:
    case = Case(values, streams, 2, size)
    gamma, stabiliser = 0.25, (0, 0.05)
    p1, p2 = native_cuda.linear_gamma_share_out(
        case.relevance,
        case.x,
        case.w,
        case.y,
        case.bias,
        product=product,
        stabiliser=stabiliser,
        gamma=gamma,
        bias_takes_share=bias_takes_share,
    )
    plus, minus = case.parts(product)
    bias = case.bias.double()
    output = case.y.double() if product == "float32" else plus + minus + bias
    positive = output > 0
    z = plus + minus + gamma * torch.where(positive, plus, minus)
    if bias_takes_share:
        z = z + bias + gamma * torch.where(positive, bias.clamp(min=0), bias.clamp(max=0))
    s = share(case.relevance.double(), z, stabiliser)
    clear = output.abs() > 1e-4
    assert_near(p1 * clear, s * clear, 1e-3 if product == "float32" else 10 * tolerance(product, streams))
    assert clear.double().mean() > 0.8 and torch.equal(p2 * clear, p1 * torch.where(positive, 1, -1) * clear)


@pytest.mark.parametrize("targets", [3, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("size", ALL_SIZES)
@pytest.mark.parametrize(("values", "streams", "product"), BACKS)
def test_back(
    values: torch.dtype, streams: torch.dtype, product: str, size: tuple[int, int, int], targets: int
) -> None:
    """A gradient, a rule with one factor, and both kinds of rules with two, of unequal numbers of targets."""
    rows, n, k = size
    x, w = random(rows, k, dtype=values, seed=1), random(n, k, dtype=values, seed=2)
    p, q = random(targets, rows, n, dtype=streams, seed=3), random(targets, rows, n, dtype=streams, seed=4)
    g = random(1, rows, n, dtype=streams, seed=5)
    outs = native_cuda.linear_back(
        [Back(g), Back(p, p, 0.5, 0.5), Back(p, q, 1.125, 0.125), Back(p, None, 1.0)], x, w, product=product
    )
    weight, inputs = rounded(w, product), x.double()
    gradient, first = (rounded(t, product) @ weight for t in (g, p))
    same, other = (rounded(t, product) @ weight.abs() for t in (p, q))
    wants = [
        gradient,
        (inputs * first + inputs.abs() * same) / 2,
        1.125 * inputs * first + 0.125 * inputs.abs() * other,
        inputs * first,
    ]
    for got, want in zip(outs, wants, strict=True):
        assert_near(got, want, 10 * SUM_TOLERANCE + TOLERANCE[streams])


@pytest.mark.parametrize(("values", "streams", "product"), BACKS)
def test_back_in_any_order_of_threads(order: str, values: torch.dtype, streams: torch.dtype, product: str) -> None:
    x, w = random(33, 24, dtype=values, seed=1), random(100, 24, dtype=values, seed=2)
    p = random(1, 33, 100, dtype=streams, seed=3)
    (out,) = native_cuda.linear_back([Back(p, p, 0.5, 0.5)], x, w, product=product)
    plain, magnified = (rounded(p, product) @ part for part in (rounded(w, product), rounded(w, product).abs()))
    assert_near(out, (x.double() * plain + x.double().abs() * magnified) / 2, 10 * SUM_TOLERANCE + TOLERANCE[streams])


@pytest.mark.parametrize(("values", "product"), [(FLOAT, "float32"), (BF16, "bfloat16")])
def test_the_rule_is_the_published_formula(values: torch.dtype, product: str) -> None:
    """Share-out and way back together give x+ (s w+) + x- (s w-), and the sum of relevance stays."""
    case = Case(values, FLOAT, 2, (6, 33, 64))
    p1, p2 = native_cuda.linear_alpha_beta_share_out(
        case.relevance, case.x, case.w, case.y, case.bias, product=product, stabiliser=(0, 0.0)
    )
    (got,) = native_cuda.linear_back([Back(p1, p2, 0.5, 0.5)], case.x, case.w, product="float32")
    x, w, r = case.x.double(), case.w.double(), case.relevance.double()
    xp, xn, wp, wn = x.clamp(min=0), x.clamp(max=0), w.clamp(min=0), w.clamp(max=0)
    s = r / (xp @ wp.T + xn @ wn.T)
    assert_near(got, xp * (s @ wp) + xn * (s @ wn), 1e-4)
    torch.testing.assert_close(got.double().sum((1, 2)), r.sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_low_precision_denominators_never_cancel() -> None:
    """Where nearly all of |x||w| is negative, z+ in bfloat16 still has all its bits."""
    x, w = torch.ones(1, 512, dtype=BF16), -torch.ones(1, 512, dtype=BF16)
    x[0, 100], w[0, 100] = 2**-12, 2**-6
    p1, _ = native_cuda.linear_alpha_beta_share_out(
        torch.ones(1, 1, 1), x, w, None, None, product="bfloat16", stabiliser=(0, 0.0)
    )
    assert p1.item() == 2.0**18


def test_rounding_noise_has_no_share() -> None:
    x, w = random(4, 64, seed=1).abs(), -random(3, 64, seed=2).abs()  # z+ is exactly 0, its float32 form is not
    y = x @ w.T
    p1, _ = native_cuda.linear_alpha_beta_share_out(
        torch.ones(1, 4, 3), x, w, y, None, product="float32", stabiliser=(0, 0.0), tolerance=1e-6
    )
    assert torch.equal(p1, torch.zeros(1, 4, 3))


def test_strided_and_misaligned_inputs() -> None:
    case = Case(BF16, FLOAT, 2, (9, 33, 40))
    call: dict[str, Any] = {"product": "bfloat16", "stabiliser": (0, 1e-6)}
    want = native_cuda.linear_alpha_beta_share_out(case.relevance, case.x, case.w, None, None, **call)[0]
    for shift in (1, 4):
        x, w = random(9, 40, dtype=BF16, shift=shift), random(33, 40, dtype=BF16, shift=shift)
        x.copy_(case.x), w.copy_(case.w)
        assert torch.equal(native_cuda.linear_alpha_beta_share_out(case.relevance, x, w, None, None, **call)[0], want)
    strided = case.x.T.contiguous().T
    assert torch.equal(
        native_cuda.linear_alpha_beta_share_out(case.relevance, strided, case.w, None, None, **call)[0], want
    )


@pytest.mark.parametrize(("rows", "n", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty(rows: int, n: int, k: int) -> None:
    x, w, r = torch.ones(rows, k), torch.ones(n, k), torch.ones(2, rows, n)
    call: dict[str, Any] = {"product": "tfloat32", "stabiliser": (0, 1.0)}
    p1, _ = native_cuda.linear_alpha_beta_share_out(r, x, w, None, None, **call)
    assert torch.equal(p1, torch.zeros(2, rows, n))  # with no input there is no z, and no share
    (out,) = native_cuda.linear_back([Back(r, r, 0.5, 0.5)], x, w, product="tfloat32")
    assert torch.equal(out, torch.zeros(2, rows, k))
    assert native_cuda.linear_back([Back(r[:0])], x, w, product="tfloat32")[0].shape == (0, rows, k)


def test_nan_and_infinity_are_never_hidden() -> None:
    for value in (float("nan"), float("inf")):
        for product in ("float32", "tfloat32", "bfloat16"):
            case = Case(FLOAT, FLOAT, 1, (5, 7, 63))
            case.relevance[0, 2, 3] = value
            case.x[4, 5] = float("nan")
            p1, _ = native_cuda.linear_alpha_beta_share_out(
                case.relevance, case.x, case.w, case.y, None, product=product, stabiliser=(0, 1e-6)
            )
            assert not p1[0, 2, 3].isfinite()
            assert not p1[0, 4].isfinite().any()
            (out,) = native_cuda.linear_back([Back(p1, p1, 0.5, 0.5)], case.x, case.w, product=product)
            assert not out[0, 2].isfinite().any() and out[0, 0].isfinite().all()


def test_errors() -> None:
    x, w, r = torch.ones(3, 4), torch.ones(2, 4), torch.ones(1, 3, 2)

    def message(error: type[Exception], *tensors: Any, **changes: Any) -> str:
        options: dict[str, Any] = {"product": "tfloat32", "stabiliser": (0, 0.0)}
        with pytest.raises(error) as raised:
            native_cuda.linear_alpha_beta_share_out(*tensors, **{**options, **changes})
        return str(raised.value)

    assert message(DTypeError, r, x.double(), w, None, None) == (
        "x: expected torch.float32, torch.bfloat16, torch.float16, got torch.float64"
    )
    assert message(DTypeError, r.half(), x, w, None, None) == "relevance: expected torch.float32, got torch.float16"
    assert message(DTypeError, r, x, w.half(), None, None) == "weight: expected torch.float32, got torch.float16"
    assert message(ShapeError, r, x, w.T, None, None) == "relevance: expected shape [1, 3, 4], got [1, 3, 2]"
    assert message(ShapeError, r, x, w, None, torch.ones(3)) == "bias: expected shape [2], got [3]"
    assert message(DeviceError, r, x, w.to("meta"), None, None) == (
        "weight: expected a tensor on cpu as the others, got one on meta"
    )
    assert message(OptionError, r, x, w, None, None, product="float32") == (
        "y: expected the layer's output, from which float32 takes x w, got None"
    )
    assert message(OptionError, r, x, w, None, None, product="int8") == (
        "product: expected one of float32, tfloat32, bfloat16, float16, got 'int8'"
    )
    assert message(ValueError, r, x, w, None, None, product="float16") == (
        "linear share-out: no kernel for this product of this dtype"
    )
    assert message(ValueError, r, x, w, None, None, stabiliser=(0, -1.0)).startswith("epsilon: expected a finite")
    with pytest.raises(OptionError, match="backs: expected 1 to 8 streams, got 0"):
        native_cuda.linear_back([], x, w, product="tfloat32")
    with pytest.raises(OptionError, match=r"backs\[0\].factor1: expected a number where p2 is given, got None"):
        native_cuda.linear_back([Back(r, r)], x, w, product="tfloat32")
