"""Half precision through the C++ kernels: conversions to the bit, operands and streams in bfloat16 and float16."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from relprop import native

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

from relprop import _C  # type: ignore[attr-defined]
from relprop.errors import DTypeError

HALF = [torch.bfloat16, torch.float16]
ISAS: list[str] = _C.build_info()["isas_supported"]
SIZES = [1, 63, 1023, 2500]  # the last spans blocks and pieces
STABILISER = (native.SIGNED, 1e-6)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def every_half(dtype: torch.dtype) -> Tensor:
    """All 65,536 bit patterns: zeros, subnormals, infinities and NaN included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    missing = a.isnan()
    return torch.equal(missing, b.isnan()) and torch.equal(a[~missing], b[~missing]) and signs_agree(a, b, missing)


def signs_agree(a: Tensor, b: Tensor, missing: Tensor) -> bool:
    return torch.equal(a[~missing].signbit(), b[~missing].signbit())


def passed_through(relevance: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A kernel that changes no bit of its stream: 1/2 (1 c + 1 c)."""
    return native.select(torch.ones(relevance.shape[1:]), relevance, relevance, dtype=dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_every_half_is_widened_exactly(isa: str, dtype: torch.dtype) -> None:
    halves = every_half(dtype)
    assert same_numbers(passed_through(halves[None] / 2, torch.float32)[0], (halves / 2).float())
    halves = halves[halves.isfinite() & (halves != 0)]  # whose product with 0 is 0
    ones = torch.ones(1, len(halves))
    # In an operand too, and widened to float64.
    assert same_numbers(native.select(halves, ones, 0 * ones, dtype=torch.float32)[0], halves.float() / 2)
    assert same_numbers(native.select(halves, ones.double(), 0 * ones.double())[0], halves.double() / 2)


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_to_half_is_torchs(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).to(torch.int32).view(torch.float32)
    around = every_half(dtype).float()
    ties = torch.cat([around * factor for factor in (1.0, 1 + 2**-9, 1 + 2**-12, 1 + 2**-11, 1 - 2**-12)])
    numbers = torch.cat([bits[bits.abs() < 1e38], bits[~bits.isfinite()], ties[ties.abs() < 1e38], -ties[:100]])
    assert same_numbers(passed_through(numbers[None], dtype)[0], numbers.to(dtype))


Case = tuple[Callable[..., tuple[Tensor, ...]], int, int]  # kernel, streams, operands


def _flat(*found: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(t for t in found if t is not None)


def _maps(stream: Tensor) -> Tensor:
    return stream.unsqueeze(-2).unsqueeze(-2)


CASES: dict[str, Case] = {
    "share_out": (lambda r, y, z: native.share_out(r, y, None, z.abs(), stabiliser=STABILISER)[:1], 1, 2),
    "share_out with bias": (
        lambda r, y, z: native.share_out(r, y, z[0], z.abs(), alpha=2, beta=1, stabiliser=STABILISER),
        1,
        2,
    ),
    "select": (lambda c1, c2, x: (native.select(x, c1, c2),), 2, 1),
    "add_normalised": (lambda r, a, b: native.add_normalised(r, a, b, stabiliser=STABILISER), 1, 2),
    "add_normalised, shared": (lambda r, a, b: native.add_normalised(r, a, b[:1], stabiliser=STABILISER), 1, 2),
    "fanout_epsilon": (lambda r, q, x: (native.fanout_epsilon([r, q], x, stabiliser=STABILISER),), 2, 1),
    "share": (lambda r, z: (native.share(r, z, stabiliser=STABILISER),), 1, 1),
    "attention_shares": (
        lambda sv, a, d: _flat(
            *native.attention_shares(_maps(a), _maps(sv), _maps(d), stabiliser=STABILISER, want_relevance=True)
        ),
        1,
        2,
    ),
    "rollout_matrix": (lambda g, r: (native.rollout_matrix(g[:, :, None, None], r[:, :, None, None]),), 2, 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_operands_as_if_cast_before(dtype: torch.dtype, half: torch.dtype, size: int, case: str) -> None:
    """To the bit: the conversion is exact, the rest is the same arithmetic."""
    kernel, streams, operands = CASES[case]
    given = [random(2, 3, size, dtype=dtype, seed=i) for i in range(streams)]
    halves = [random(3, size, dtype=half, seed=10 + i) for i in range(operands)]
    want = kernel(*given, *(t.to(dtype) for t in halves))
    for got, wanted in zip(kernel(*given, *halves), want, strict=True):
        assert got.dtype is dtype and torch.equal(got, wanted)
    if operands == 2:
        mixed = kernel(*given, halves[0], halves[1].to(dtype))
        assert all(torch.equal(got, wanted) for got, wanted in zip(mixed, want, strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("half", HALF)
def test_half_streams_are_rounded_once(half: torch.dtype, size: int, case: str) -> None:
    """A result in half precision is the float32 result, rounded at the end."""
    kernel, streams, operands = CASES[case]
    given = [random(2, 3, size, dtype=half, seed=i) for i in range(streams)]
    halves = [random(3, size, dtype=half, seed=10 + i) for i in range(operands)]
    want = kernel(*(t.float() for t in given), *(t.float() for t in halves))
    for got, wanted in zip(kernel(*given, *halves), want, strict=True):
        assert got.dtype is half and torch.equal(got, wanted.to(half))


@pytest.mark.parametrize("half", HALF)
def test_half_results_in_place(half: torch.dtype) -> None:
    r, a, b = (random(*shape, dtype=half, seed=i) for i, shape in enumerate([(2, 3, 2500), (3, 2500), (3, 2500)]))
    want = native.add_normalised(r, a, b, stabiliser=STABILISER)
    relevance = r.clone()
    got = native.add_normalised(relevance, a, b, stabiliser=STABILISER, out=(relevance, torch.empty_like(r)))
    assert got[0] is relevance and torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    selected = native.select(a, r, r)
    assert native.select(a, r, r, out=r) is r and torch.equal(r, selected)


def test_a_float64_stream_is_not_rounded_to_half() -> None:
    r, x = torch.ones(1, 4, dtype=torch.float64), torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(DTypeError) as raised:
        native.select(x, r, r, dtype=torch.float16)
    assert str(raised.value) == "out: expected torch.float64, got torch.float16"
