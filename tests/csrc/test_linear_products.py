"""Linear layers with their products in csrc/, against float64: sizes around every blocking, all dtypes, all ISAs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from relprop import native
from relprop.errors import DTypeError, OptionError, ShapeError

# rows, n, k: one element, odd sizes, more than a tile of 14 rows or 32 columns, more than a chunk of 256 or 512 steps.
SIZES = ((1, 1, 1), (13, 33, 17), (29, 70, 300), (15, 64, 1030), (200, 31, 45))
STORED = (torch.float32, torch.bfloat16, torch.float16)
OPERANDS = (torch.float32, torch.bfloat16)
EXACT = (native.SIGNED, 0.0)


@pytest.fixture(params=native.info().get("isas_supported", []))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native._C.set_isa(request.param)
    yield request.param
    native._C.set_isa("")


def made_of(tensor: Tensor, operands: torch.dtype) -> Tensor:
    """What is multiplied, as float64."""
    return tensor.to(operands).double() if tensor.dtype != operands else tensor.double()


def layer(size: tuple[int, int, int], stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, n, k = size
    return torch.randn(rows, k).to(stored), torch.randn(n, k).to(stored), torch.randn(n)


def close(found: Tensor, truth: Tensor, scale: Tensor, depth: int) -> None:
    """Within float32 rounding of sums of `depth` products whose magnitudes add up to `scale`."""
    bound = (4 + depth**0.5) * torch.finfo(torch.float32).eps * scale + 1e-30
    assert found.dtype == torch.float32
    assert ((found.double() - truth).abs() <= bound).all(), ((found.double() - truth).abs() / bound).max()


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("size", SIZES)
def test_apply_and_transpose(size: tuple[int, int, int], stored: torch.dtype, operands: torch.dtype, isa: str) -> None:
    x, weight, bias = layer(size, stored)
    left, right = made_of(x, operands), made_of(weight, operands)
    found = native.linear_apply(x, weight, bias, operands=operands)
    close(found, left @ right.mT + bias, left.abs() @ right.abs().mT + bias.abs(), size[2])
    stream = torch.randn(3, size[0], size[1])
    left = made_of(stream, operands)
    found = native.linear_transpose(stream, weight, operands=operands)
    close(found, left @ right, left.abs() @ right.abs(), size[1])


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_apply_rounded(size: tuple[int, int, int], biased: bool, operands: torch.dtype, isa: str) -> None:
    """The sums are those of the products alone; the output is rounded once, from the sums with the bias."""
    x, weight, bias = layer(size, torch.bfloat16)
    added = bias if biased else None
    found, sums = native.linear_apply_rounded(x, weight, added, operands=operands)
    assert torch.equal(sums, native.linear_apply(x, weight, None, operands=operands))
    assert torch.equal(found, (sums + bias if biased else sums).bfloat16())
    packed = native.pack_weight(weight, transpose=True, operands=operands)
    again = native.linear_apply_rounded(x, weight, added, operands=operands, packed=packed)
    assert torch.equal(again[0], found) and torch.equal(again[1], sums)


@pytest.mark.parametrize("stabiliser", [EXACT, (native.SIGNED, 1e-2), (native.REFERENCE, 1e-9)])
@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("size", SIZES)
def test_alpha_beta(
    size: tuple[int, int, int],
    stored: torch.dtype,
    operands: torch.dtype,
    stabiliser: tuple[int, float],
    isa: str,
) -> None:
    x, weight, bias = layer(size, stored)
    relevance = torch.randn(2, size[0], size[1])
    left, right = made_of(x, operands), made_of(weight, operands)
    absolute = left.abs() @ right.abs().mT
    z = (left @ right.mT + absolute) / 2
    denominator = torch.where(z > 1e-6 * absolute, z + stabiliser[1], torch.inf)
    # A z+ that nearly vanishes is known to rounding of |x||w| only.
    slack = 8 * size[2] ** 0.5 * torch.finfo(torch.float32).eps * absolute
    stored_y = native.linear_apply(x, weight, bias, operands=operands)
    for y in (stored_y, None):
        shares = native.share_out_product(
            relevance,
            x,
            weight,
            y,
            bias,
            operands=operands,
            stabiliser=stabiliser,
            tolerance=1e-6,
            alpha=2.0,
        )
        truth = 2 * relevance / denominator
        bound = truth.abs() * (1e-5 + (slack + 1e-6 * bias.abs()) / z.clamp(min=1e-30)) + 1e-12
        wrong = (shares - truth).abs() > bound
        assert not (wrong & (z > 10 * slack)).any()
        assert torch.isfinite(shares).all()
    shares = torch.randn_like(relevance)
    found = native.back_product(shares, x, weight, operands=operands)
    s, kept = made_of(shares, operands), x.double()
    truth = (kept * (s @ right) + kept.abs() * (s @ right.abs())) / 2
    close(found, truth, kept.abs() * (s.abs() @ right.abs()), size[1])


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("size", SIZES)
def test_a_packed_weight_gives_the_same_bits(
    size: tuple[int, int, int], stored: torch.dtype, operands: torch.dtype, isa: str
) -> None:
    x, weight, bias = layer(size, stored)
    relevance = torch.randn(2, size[0], size[1])
    options = {"operands": operands, "stabiliser": EXACT, "tolerance": 1e-6}
    forward = native.pack_weight(weight, transpose=True, operands=operands)
    back = native.pack_weight(weight.mT.contiguous().mT, transpose=False, operands=operands)

    def answers(forward: Tensor | None, back: Tensor | None) -> list[Tensor]:
        y = native.linear_apply(x, weight, bias, operands=operands, packed=forward)
        return [
            y,
            *(native.share_out_product(relevance, x, weight, z, bias, packed=forward, **options) for z in (y, None)),  # type: ignore[arg-type]
            native.linear_transpose(relevance, weight, operands=operands, packed=back),
            native.back_product(relevance, x, weight, operands=operands, packed=back),
        ]

    for ready, plain in zip(answers(forward, back), answers(None, None), strict=True):
        assert torch.equal(ready, plain)


def test_a_packed_weight_must_fit() -> None:
    x, weight, bias = layer((13, 33, 17), torch.float32)
    packed = native.pack_weight(weight, transpose=False, operands=torch.float32)
    with pytest.raises(ShapeError, match=r"packed: expected shape \[4352\], got \[4224\]"):
        native.linear_apply(x, weight, bias, operands=torch.float32, packed=packed)
    with pytest.raises(DTypeError, match="packed: expected torch.uint8"):
        native.linear_transpose(torch.randn(13, 33), weight, operands=torch.float32, packed=packed.view(torch.int8))
    shifted = torch.empty(len(packed) + 8, dtype=torch.uint8)[8:]
    with pytest.raises(ShapeError, match="packed: expected memory on a 64-byte boundary"):
        native.linear_transpose(torch.randn(13, 33), weight, operands=torch.float32, packed=shifted)


def test_vanishing_denominators_get_no_share(isa: str) -> None:
    x, weight = torch.ones(14, 40), -torch.ones(33, 40)
    shares = native.share_out_product(
        torch.ones(1, 14, 33), x, weight, None, None, operands=torch.float32, stabiliser=EXACT, tolerance=1e-6
    )
    assert (shares == 0).all()


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("operands", OPERANDS)
def test_zeros_on_the_way_back_are_left_out(operands: torch.dtype, ready: bool, isa: str) -> None:
    """Where queries and keys hand nothing on, their part of a joint projection costs nothing, and no bit changes."""
    zeros, rows, n, k = 512, 43, 700, 70  # whole chunks of the sums over n; tiles of 11 rows
    x, weight, relevance = torch.randn(rows, k), torch.randn(n, k), torch.randn(2, rows, n)
    relevance[..., :zeros] = 0.0
    relevance[..., 0] = -0.0
    hidden = weight.clone()
    hidden[:zeros] = torch.nan  # shows where it is read
    packed = {t: native.pack_weight(hidden, transpose=t, operands=operands) if ready else None for t in (True, False)}
    options = {"operands": operands, "stabiliser": EXACT, "tolerance": 1e-6}
    part = (x, weight[zeros:])

    shares = native.share_out_product(relevance, x, hidden, None, None, packed=packed[True], **options)  # type: ignore[arg-type]
    assert (shares[..., :zeros] == 0).all()
    assert torch.equal(
        shares[..., zeros:],
        native.share_out_product(relevance[..., zeros:].contiguous(), *part, None, None, **options),  # type: ignore[arg-type]
    )
    back = native.back_product(shares, x, hidden, operands=operands, packed=packed[False])
    assert torch.equal(back, native.back_product(shares[..., zeros:].contiguous(), *part, operands=operands))
    passed = native.linear_transpose(relevance, hidden, operands=operands, packed=packed[False])
    plain = native.linear_transpose(relevance[..., zeros:].contiguous(), part[1], operands=operands)
    assert torch.equal(passed, plain)


@pytest.mark.parametrize("operands", OPERANDS)
def test_a_row_is_the_same_beside_rows_of_zeros(operands: torch.dtype, isa: str) -> None:
    weight, stream = torch.randn(600, 70), torch.randn(43, 600)
    whole = native.linear_transpose(stream, weight, operands=operands)
    for first in (1, 21, 22, 42):
        some = stream.clone()
        some[:first] = 0.0
        found = native.linear_transpose(some, weight, operands=operands)
        assert (found[:first] == 0).all() and torch.equal(found[first:], whole[first:])


def test_same_bits_on_any_number_of_threads() -> None:
    x, weight, bias = layer((301, 97, 700), torch.float32)
    relevance = torch.randn(2, 301, 97)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y = native.linear_apply(x, weight, bias, operands=torch.float32)
            s = native.share_out_product(
                relevance, x, weight, y, bias, operands=torch.float32, stabiliser=EXACT, tolerance=1e-6
            )
            found.append((y, s, native.back_product(s, x, weight, operands=torch.float32)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_blocks_of_rows_larger_than_the_packing_buffer() -> None:
    x, weight, bias = layer((2500, 40, 600), torch.float32)
    close(
        native.linear_apply(x, weight, bias, operands=torch.float32),
        x.double() @ weight.double().mT + bias,
        x.double().abs() @ weight.double().abs().mT + bias.abs(),
        600,
    )


def test_weights_stored_by_columns_and_views_of_inputs() -> None:
    weight, x = torch.randn(45, 33).mT, torch.randn(20, 90)[:, ::2]
    found = native.linear_apply(x, weight, None, operands=torch.float32)
    torch.testing.assert_close(found, x @ weight.mT, rtol=1e-5, atol=1e-5)
    stream = torch.randn(1, 20, 33)
    found = native.linear_transpose(stream, weight, operands=torch.float32)
    torch.testing.assert_close(found, stream @ weight, rtol=1e-5, atol=1e-5)


def test_nothing_to_add_up() -> None:
    operands = torch.float32
    bias = torch.randn(3)
    assert native.linear_apply(torch.randn(0, 5), torch.randn(3, 5), None, operands=operands).shape == (0, 3)
    assert torch.equal(
        native.linear_apply(torch.randn(4, 0), torch.randn(3, 0), bias, operands=operands), bias.expand(4, 3)
    )
    assert torch.equal(
        native.linear_transpose(torch.randn(4, 0), torch.randn(0, 5), operands=operands), torch.zeros(4, 5)
    )
    shares = native.share_out_product(
        torch.ones(1, 4, 3),
        torch.randn(4, 0),
        torch.randn(3, 0),
        None,
        None,
        operands=operands,
        stabiliser=EXACT,
        tolerance=0.0,
    )
    assert torch.equal(shares, torch.zeros(1, 4, 3))
    found = native.back_product(torch.ones(1, 4, 0), torch.randn(4, 5), torch.randn(0, 5), operands=operands)
    assert torch.equal(found, torch.zeros(1, 4, 5))


def test_nan_is_not_hidden() -> None:
    x, weight = torch.randn(15, 20), torch.randn(8, 20)
    x[3, 4] = torch.nan
    for operands in OPERANDS:
        y = native.linear_apply(x, weight, None, operands=operands)
        assert torch.isnan(y[3]).all()
        assert torch.isfinite(y[:3]).all() and torch.isfinite(y[4:]).all()


def test_bad_input() -> None:
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    with pytest.raises(ShapeError, match=r"weight: expected shape \[N, K\], got \[5\]"):
        native.linear_apply(x, weight[0], None, operands=torch.float32)
    with pytest.raises(ShapeError, match=r"x: expected shape \[4, 6\], got \[4, 5\]"):
        native.linear_apply(x, torch.randn(3, 6), None, operands=torch.float32)
    with pytest.raises(DTypeError, match=r"x: expected torch.float32, .* got torch.float64"):
        native.linear_apply(x.double(), weight, None, operands=torch.float32)
    with pytest.raises(OptionError, match=r"operands: expected torch.float32 or torch.bfloat16, got torch.float16"):
        native.linear_apply(x, weight, None, operands=torch.float16)
    with pytest.raises(ShapeError, match=r"relevance: expected shape \[1, 4, 3\], got \[1, 4, 4\]"):
        native.share_out_product(
            torch.randn(1, 4, 4), x, weight, None, None, operands=torch.float32, stabiliser=EXACT, tolerance=0.0
        )
