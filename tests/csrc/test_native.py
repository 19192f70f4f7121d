"""The C++ kernels against formulas written out here in float64 numpy, which share no code with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from relprop import native
from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

from relprop import _C  # type: ignore[attr-defined]

ISAS: list[str] = _C.build_info()["isas_supported"]
DTYPES = [torch.float32, torch.float64]
SIZES = [1, 63, 1023]
TARGETS = [1, 3]
STABILISERS = [(native.SIGNED, 1e-6), (native.SIGNED, 0.0), (native.REFERENCE, 1e-9)]

# Elementwise kernels round a handful of times; a denominator that cancels is computed from the same rounded inputs.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 5e-15}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def share(relevance: np.ndarray, z: np.ndarray, stabiliser: tuple[int, float], eps_dtype: type = float) -> np.ndarray:
    kind, epsilon = stabiliser
    epsilon = float(eps_dtype(epsilon))
    if kind == native.SIGNED and epsilon > 0:
        return relevance / (z + np.where(z < 0, -epsilon, epsilon))
    denominator = z + epsilon
    denominator = np.where(denominator == 0, epsilon, denominator)
    return np.where(z == 0, 0.0, relevance / np.where(z == 0, 1.0, denominator))


def assert_near(got: Tensor, want: np.ndarray, tolerance: float) -> None:
    """Every element within tolerance of it or of the tensor's root mean square, and no NaN left over."""
    assert got.shape == want.shape
    if want.size == 0:
        return
    scale = np.maximum(np.abs(want), np.sqrt(np.mean(want**2)))
    error = np.abs(exact(got) - want)
    assert np.isfinite(error).all()
    assert (error <= tolerance * scale).all(), f"worst error {(error / np.maximum(scale, 1e-300)).max():.3g}"


# --------------------------------------------------------------------------------------------------------------------
# linear_alpha_beta


def linear_case(targets: int, rows: int, n: int, dtype: torch.dtype, k: int = 7) -> dict[str, Tensor]:
    x, w = random(rows, k, dtype=dtype, seed=1).double(), random(n, k, dtype=dtype, seed=2).double()
    bias = random(n, dtype=dtype, seed=3)
    return {
        "x": x,
        "w": w,
        "bias": bias,
        "y": (x @ w.T + bias.double()).to(dtype),
        "absz": (x.abs() @ w.abs().T).to(dtype),
        "relevance": random(targets, rows, n, dtype=dtype, seed=4),
    }


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_share_out_elementwise(
    isa: str,
    dtype: torch.dtype,
    n: int,
    targets: int,
    with_bias: bool,
    alpha: float,
    beta: float,
    stabiliser: tuple[int, float],
) -> None:
    case = linear_case(targets, 5, n, dtype)
    bias = case["bias"] if with_bias else None
    out = (poisoned(targets, 5, n, dtype=dtype), poisoned(targets, 5, n, dtype=dtype))
    p1, p2 = native.share_out(
        case["relevance"], case["y"], bias, case["absz"], alpha=alpha, beta=beta, stabiliser=stabiliser, out=out
    )
    # z± at the kernel's own precision: cancellation in y - b is the input's, not the kernel's.
    y, absz = case["y"].numpy(), case["absz"].numpy()
    product = y - bias.numpy() if bias is not None else y
    half = y.dtype.type(0.5)
    plus, minus = half * (absz + product), half * (product - absz)
    noise = 4 * np.finfo(y.dtype).eps * absz.astype(np.float64)
    r = exact(case["relevance"])
    with np.errstate(divide="ignore", invalid="ignore"):
        s_plus = np.where(plus <= noise, 0.0, share(r, plus.astype(np.float64), stabiliser))
        s_minus = np.where(-minus <= noise, 0.0, share(r, minus.astype(np.float64), stabiliser))
    assert_near(p1, alpha * s_plus - beta * s_minus, TOLERANCE[dtype])
    assert_near(p2, alpha * s_plus + beta * s_minus, TOLERANCE[dtype])
    assert (p1 is p2) == (beta == 0)
    if beta == 0:
        assert out[1].isnan().all()  # p2 was not needed and not touched


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (2.0, 1.0), (0.0, -1.0)])
def test_the_linear_rule_is_the_published_formula(isa: str, alpha: float, beta: float) -> None:
    """Shares and selection around plain products give x⁺(s⁺w⁺) + x⁻(s⁺w⁻) and its β part, from split x and w."""
    case = linear_case(3, 6, 33, torch.float64, k=40)  # enough terms that no z± is 0
    x, w, r = exact(case["x"]), exact(case["w"]), exact(case["relevance"])
    p1, p2 = native.share_out(
        case["relevance"], case["y"], case["bias"], case["absz"], alpha=alpha, beta=beta, stabiliser=(0, 0.0)
    )
    got = native.select(case["x"], p1 @ case["w"], p2 @ case["w"].abs())

    xp, xn, wp, wn = x.clip(min=0), x.clip(max=0), w.clip(min=0), w.clip(max=0)
    s_plus = r / (xp @ wp.T + xn @ wn.T)
    s_minus = r / (xp @ wn.T + xn @ wp.T)
    active = xp * (s_plus @ wp) + xn * (s_plus @ wn)
    inhibiting = xp * (s_minus @ wn) + xn * (s_minus @ wp)
    assert_near(got, alpha * active - beta * inhibiting, 1e-12)
    np.testing.assert_allclose(exact(got).sum((1, 2)), (alpha - beta) * r.sum((1, 2)), rtol=1e-10)


def test_share_out_in_place(isa: str) -> None:
    case = linear_case(3, 5, 63, torch.float32)
    inputs = (case["y"], case["bias"], case["absz"])
    p1, p2 = native.share_out(case["relevance"], *inputs, alpha=2, beta=1, stabiliser=(0, 1e-6))
    for place in (0, 1):
        relevance = case["relevance"].clone()
        out = [torch.empty_like(p1), torch.empty_like(p2)]
        out[place] = relevance
        q1, q2 = native.share_out(relevance, *inputs, alpha=2, beta=1, stabiliser=(0, 1e-6), out=(out[0], out[1]))
        assert torch.equal(p1, q1) and torch.equal(p2, q2)


def test_shares_of_rounding_noise_are_zero(isa: str) -> None:
    eps = torch.finfo(torch.float32).eps
    absz = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    y = torch.tensor([[-1.0 + 2 * eps, -1.0 + 64 * eps, 0.0, 1.0]])
    relevance = torch.ones(1, 1, 4)
    p1, _ = native.share_out(relevance, y, None, absz, stabiliser=(0, 0.0))
    assert p1[0, 0, 0] == 0 and p1[0, 0, 2] == 0
    assert p1[0, 0, 1] == pytest.approx(1 / (32 * eps)) and p1[0, 0, 3] == 1
    wide, _ = native.share_out(relevance, y, None, absz, stabiliser=(0, 0.0), tolerance=1e-3)
    assert wide[0, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_select(isa: str, dtype: torch.dtype, size: int, targets: int) -> None:
    x = random(2, size, dtype=dtype, seed=1)
    c1, c2 = random(targets, 2, size, dtype=dtype, seed=2), random(targets, 2, size, dtype=dtype, seed=3)
    out = native.select(x, c1, c2, out=poisoned(targets, 2, size, dtype=dtype))
    assert_near(out, 0.5 * (exact(x) * exact(c1) + np.abs(exact(x)) * exact(c2)), TOLERANCE[dtype])
    assert torch.equal(native.select(x, c1.clone(), c2, out=c1), out)
    assert c1 is not out and torch.equal(c1, out)


# --------------------------------------------------------------------------------------------------------------------
# add_normalised


def add_formula(r: np.ndarray, a: np.ndarray, b: np.ndarray, stabiliser: tuple[int, float]) -> list[np.ndarray]:
    s = share(r, a + b, stabiliser)
    parts = [a * s, np.broadcast_to(b, a.shape) * s]
    axes = tuple(range(2, r.ndim))
    total = [part.sum(axes, keepdims=True) for part in parts]
    both = np.abs(total[0]) + np.abs(total[1])
    wanted = [share(np.abs(one), both, stabiliser) * r.sum(axes, keepdims=True) for one in total]
    return [part * share(want, one, stabiliser) for part, want, one in zip(parts, wanted, total, strict=True)]


def branch(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return random(*shape, dtype=dtype, seed=seed).abs() + 0.1  # of one sign: the rule is well conditioned


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("size", [*SIZES, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_normalised(
    isa: str, dtype: torch.dtype, size: int, targets: int, shared: bool, stabiliser: tuple[int, float]
) -> None:
    batch = 3
    r = random(targets, batch, size, dtype=dtype, seed=1) + 1
    a = branch(batch, size, dtype=dtype, seed=2)
    b = branch(1 if shared else batch, size, dtype=dtype, seed=3)
    out = (poisoned(targets, batch, size, dtype=dtype), poisoned(targets, batch, size, dtype=dtype))
    got = native.add_normalised(r, a, b, stabiliser=stabiliser, out=out)
    want = add_formula(exact(r), exact(a), exact(b), stabiliser)
    for ours, theirs in zip(got, want, strict=True):
        assert_near(ours, theirs, 4 * TOLERANCE[dtype])
    np.testing.assert_allclose(exact(got[0] + got[1]).sum(2), exact(r).sum(2), rtol=2e-4, atol=2e-4)
    for place in (0, 1):
        relevance = r.clone()
        into = [torch.empty_like(r), torch.empty_like(r)]
        into[place] = relevance
        again = native.add_normalised(relevance, a, b, stabiliser=stabiliser, out=(into[0], into[1]))
        assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1])


@pytest.mark.parametrize("stabiliser", STABILISERS)
def test_add_normalised_with_mixed_signs(isa: str, stabiliser: tuple[int, float]) -> None:
    r = random(2, 2, 4, 700, dtype=torch.float64, seed=1)
    a, b = (random(2, 4, 700, dtype=torch.float64, seed=seed) for seed in (2, 3))
    a[0, 0, :5], b[0, 0, :5] = 0.0, 0.0
    a[1, 0, 0], b[1, 0, 0] = 1.0, -1.0
    got = native.add_normalised(r, a, b, stabiliser=stabiliser)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = add_formula(exact(r), exact(a), exact(b), stabiliser)
    for ours, theirs in zip(got, want, strict=True):
        assert_near(ours, theirs, 1e-9)  # sums of both signs cancel; float64 of another order


def test_add_normalised_with_one_empty_branch(isa: str) -> None:
    r, a = random(1, 1, 63, dtype=torch.float64, seed=1), random(1, 63, dtype=torch.float64, seed=2)
    ra, rb = native.add_normalised(r, a, torch.zeros_like(a), stabiliser=(native.REFERENCE, 1e-9))
    assert torch.equal(rb, torch.zeros_like(rb))
    assert_near(ra, add_formula(exact(r), exact(a), np.zeros((1, 63)), (native.REFERENCE, 1e-9))[0], 1e-9)


# --------------------------------------------------------------------------------------------------------------------
# fanout_epsilon, matmul_half


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fanout_epsilon(
    isa: str, dtype: torch.dtype, size: int, targets: int, count: int, stabiliser: tuple[int, float]
) -> None:
    x = random(2, size, dtype=dtype, seed=1)
    x[0, 0] = 0.0
    relevances = [random(targets, 2, size, dtype=dtype, seed=2 + i) for i in range(count)]
    out = native.fanout_epsilon(relevances, x, stabiliser=stabiliser, out=poisoned(targets, 2, size, dtype=dtype))
    want = exact(x) * sum(share(exact(r), exact(x), stabiliser) for r in relevances)
    assert_near(out, want, 4 * TOLERANCE[dtype])
    assert torch.equal(native.fanout_epsilon(relevances, x, stabiliser=stabiliser, out=relevances[-1]), out)


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize("want_relevance", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("keys", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_shares(
    isa: str, dtype: torch.dtype, keys: int, targets: int, want_relevance: bool, stabiliser: tuple[int, float]
) -> None:
    shape = (2, 3, 5, keys)
    dots = random(*shape, dtype=dtype, seed=1)
    attention = dots.softmax(-1)
    sv = random(targets, *shape, dtype=dtype, seed=2)
    dots[0, 0, 0, 0] = 0.0
    out = poisoned(targets, *shape, dtype=dtype)
    s_prime, relevance = native.attention_shares(
        attention, sv, dots, stabiliser=stabiliser, want_relevance=want_relevance, out=out
    )
    half = 0.5 * exact(attention) * exact(sv)
    assert_near(s_prime, share(half, exact(dots), stabiliser, np.float32 if dtype is torch.float32 else float), 1e-5)
    assert (relevance is not None) == want_relevance
    if relevance is not None:
        assert_near(relevance, half, TOLERANCE[dtype])
    in_place, _ = native.attention_shares(attention, sv, dots, stabiliser=stabiliser, out=sv)
    assert in_place is sv and torch.equal(sv, s_prime)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("keys", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rollout_matrix(isa: str, dtype: torch.dtype, keys: int, targets: int) -> None:
    shape = (targets, 2, 3, 5, keys)
    grad, relevance = random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, seed=2)
    e = native.rollout_matrix(grad, relevance, out=poisoned(targets, 2, 5, keys, dtype=dtype))
    assert_near(e, (exact(grad) * exact(relevance)).clip(min=0).mean(2), TOLERANCE[dtype])
    assert (e >= 0).all()


# --------------------------------------------------------------------------------------------------------------------
# All kernels


def every_kernel(dtype: torch.dtype, rows: int = 3, n: int = 63, targets: int = 2) -> dict[str, Tensor]:
    """The outputs of all kernels for seeded inputs of [targets, rows, n]."""
    r = [random(targets, rows, n, dtype=dtype, seed=i) for i in range(3)]
    x = [random(rows, n, dtype=dtype, seed=10 + i) for i in range(2)]
    absz = x[0].abs() + 0.5
    maps = (targets, 1, rows, 1, n)
    stabiliser = (native.SIGNED, 1e-6)
    p1, p2 = native.share_out(r[0], x[0], x[1][0], absz, alpha=2, beta=1, stabiliser=stabiliser)
    ra, rb = native.add_normalised(r[0], x[0], x[1], stabiliser=stabiliser)
    s_prime, relevance = native.attention_shares(
        absz.view(maps[1:]), r[0].view(maps), x[0].view(maps[1:]), stabiliser=stabiliser, want_relevance=True
    )
    assert relevance is not None
    return {
        "p1": p1,
        "p2": p2,
        "select": native.select(x[0], r[0], r[1]),
        "add a": ra,
        "add b": rb,
        "fanout": native.fanout_epsilon(r, x[0], stabiliser=stabiliser),
        "s_prime": s_prime,
        "relevance": relevance,
        "rollout": native.rollout_matrix(r[0].view(maps), r[1].view(maps)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), [(3, 63), (7, 30_011)])
def test_same_bits_for_every_thread_count_and_instruction_set(
    threads: Callable[[int], None], dtype: torch.dtype, rows: int, n: int
) -> None:
    threads(1)
    _C.set_isa("baseline")
    first = every_kernel(dtype, rows, n)
    try:
        for name in ISAS:
            _C.set_isa(name)
            for count in (1, 2, 3, 5):
                threads(count)
                for key, value in every_kernel(dtype, rows, n).items():
                    assert torch.equal(value, first[key]), f"{key} differs: {name}, {count} threads"
    finally:
        _C.set_isa("")


def test_a_sample_in_a_batch_is_as_if_alone(threads: Callable[[int], None]) -> None:
    threads(2)
    r, a, b = (random(*shape, 9001, dtype=torch.float32, seed=7) for shape in ((2, 5), (5,), (5,)))
    a = a + 3
    together = native.add_normalised(r, a, b, stabiliser=(native.SIGNED, 1e-9))
    for i in range(5):
        one = slice(i, i + 1)
        alone = native.add_normalised(r[:, one], a[one], b[one], stabiliser=(native.SIGNED, 1e-9))
        assert torch.equal(alone[0], together[0][:, one]) and torch.equal(alone[1], together[1][:, one])


@pytest.mark.parametrize(("rows", "n", "targets"), [(0, 63, 2), (3, 0, 2), (3, 63, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(isa: str, dtype: torch.dtype, rows: int, n: int, targets: int) -> None:
    r, x = torch.empty(targets, rows, n, dtype=dtype), torch.empty(rows, n, dtype=dtype)
    p1, p2 = native.share_out(r, x, torch.empty(n, dtype=dtype), x, alpha=2, beta=1, stabiliser=(0, 0.0))
    ra, rb = native.add_normalised(r, x, x, stabiliser=(0, 0.0))
    for got in (p1, p2, ra, rb, native.select(x, r, r), native.fanout_epsilon([r], x, stabiliser=(0, 0.0))):
        assert got.shape == r.shape and got.dtype is dtype
    maps = torch.empty(targets, rows, 2, 4, n, dtype=dtype)
    assert native.rollout_matrix(maps, maps).shape == (targets, rows, 4, n)
    one = torch.empty(rows, 2, 4, n, dtype=dtype)
    s_prime, none = native.attention_shares(one, maps, one, stabiliser=(0, 0.0))
    assert s_prime.shape == maps.shape and none is None


def test_non_contiguous_inputs_are_copied(isa: str) -> None:
    r, a, b = (random(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate([(2, 9, 8), (9, 8), (9, 8)]))
    strided = [t.mT.contiguous().mT for t in (r, a, b)]
    assert not any(t.is_contiguous() for t in strided)
    for got, want in zip(
        native.add_normalised(*strided, stabiliser=(0, 1e-9)),
        native.add_normalised(r, a, b, stabiliser=(0, 1e-9)),
        strict=True,
    ):
        assert torch.equal(got, want)
    negated = torch._neg_view(-a)
    assert negated.is_neg() and torch.equal(native.select(negated, r, r), native.select(a, r, r))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stabiliser", STABILISERS)
def test_bad_relevance_is_never_hidden(isa: str, stabiliser: tuple[int, float], value: float) -> None:
    """Also where the share would be 0: a zero denominator does not swallow a NaN (x = 0 in a fan-out included)."""
    r, x = torch.ones(1, 1, 40), torch.ones(1, 40)
    r[0, 0, 3] = r[0, 0, 20] = value
    x[0, 3] = 0.0
    p1, _ = native.share_out(r, x, None, x, stabiliser=stabiliser)
    s_prime, _ = native.attention_shares(
        x.view(1, 1, 1, 40), r.view(1, 1, 1, 1, 40), x.view(1, 1, 1, 40), stabiliser=stabiliser
    )
    fanout = native.fanout_epsilon([r], x, stabiliser=stabiliser)
    rollout = native.rollout_matrix(r.view(1, 1, 1, 1, 40), torch.zeros(1, 1, 1, 1, 40))
    added = native.add_normalised(r, x, x, stabiliser=stabiliser)
    for got in (p1, fanout, rollout):
        assert not got.flatten()[[3, 20]].isfinite().any()
    assert not s_prime.flatten()[20].isfinite()
    assert not added[0].flatten()[20].isfinite() and not added[1].flatten()[20].isfinite()


# --------------------------------------------------------------------------------------------------------------------
# Errors and the module itself


def test_errors_of_tensors() -> None:
    r, x = torch.ones(2, 3, 4), torch.ones(3, 4)

    def message(error: type[Exception], function: Callable[[], object]) -> str:
        with pytest.raises(error) as raised:
            function()
        return str(raised.value)

    stabiliser = (0, 0.0)
    assert message(DTypeError, lambda: native.share_out(r.int(), x, None, x, stabiliser=stabiliser)) == (
        "relevance: expected torch.float32, torch.bfloat16, torch.float16 or torch.float64, got torch.int32"
    )
    assert message(DTypeError, lambda: native.share_out(r, x.double(), None, x, stabiliser=stabiliser)) == (
        "y: expected torch.float32, torch.bfloat16 or torch.float16, got torch.float64"
    )
    assert message(ShapeError, lambda: native.share_out(r[0], x, None, x, stabiliser=stabiliser)) == (
        "relevance: expected shape [3, 3, 4], got [3, 4]"
    )
    assert message(ShapeError, lambda: native.share_out(r, x, torch.ones(3), x, stabiliser=stabiliser)) == (
        "bias: expected shape [4], got [3]"
    )
    assert message(ShapeError, lambda: native.select(x, r, r, out=torch.ones(2, 4, 3).mT)) == (
        "out: expected a contiguous tensor to write to, got strides [12, 1, 3]"
    )
    assert message(ShapeError, lambda: native.add_normalised(r, x, x[:2], stabiliser=stabiliser)) == (
        "b: expected shape [3, 4], got [2, 4]"
    )
    assert message(ShapeError, lambda: native.rollout_matrix(r, r)) == (
        "grad: expected shape [T, B, H, Nq, Nk] with at least one head, got [2, 3, 4]"
    )
    assert message(DeviceError, lambda: native.select(x, r.to("meta"), r)) == (
        "c1: expected a tensor on the cpu, got one on meta"
    )
    assert message(OptionError, lambda: native.fanout_epsilon([], x, stabiliser=stabiliser)) == (
        "relevances: expected at least one tensor, got none"
    )
    assert message(OptionError, lambda: native.add_normalised(r, x, x, stabiliser=stabiliser, out=(r, r))) == (
        "out: expected two different tensors, got the same one twice"
    )
    assert message(ValueError, lambda: native.fanout_epsilon([r], x, stabiliser=(7, 0.0))) == (
        "stabiliser_kind: expected 0 (signed) or 1 (reference), got 7"
    )
    assert "epsilon: expected a finite number >= 0, got -1" in message(
        ValueError, lambda: native.fanout_epsilon([r], x, stabiliser=(0, -1.0))
    )


def test_errors_of_the_module() -> None:
    one, none, double = (torch.ones(8).data_ptr(), 0), (0, 0), (torch.ones(8).double().data_ptr(), 3)
    half, unknown = (one[0], 1), (one[0], 7)
    for arguments, text in [
        ((none, one, one, one, 1, 8, 1), "out: expected a pointer, got null"),
        ((one, one, one, none, 1, 8, 1), "c2: expected a pointer, got null"),
        ((one, one, one, one, 1, -8, 1), "size: expected a size >= 0, got -8"),
        ((one, one, one, one, -1, 0, 1), "targets: expected a size >= 0, got -1"),
        ((one, unknown, one, one, 1, 8, 1), "x: expected the dtype 0 (float32), 1 (bfloat16), 2 (float16)"),
        ((one, double, one, one, 1, 8, 1), "x: expected the stream's dtype or a half precision, got float64 with"),
        ((half, double, double, double, 1, 8, 1), "out: expected float64 as the stream, got a half precision"),
        ((one, one, one, one, 1, 8, 0), "threads: expected at least 1, got 0"),
        ((one, one, one, one, 2**40, 2**40, 1), "fewer than 2^63 elements"),
    ]:
        with pytest.raises(ValueError) as raised:
            _C.linear_alpha_beta_select(*arguments)
        assert text in str(raised.value)
    _C.linear_alpha_beta_select(none, none, none, none, 3, 0, 1)  # nothing to do, so nothing to point at


def alone(statement: str, **environment: str) -> str:
    """What a new process prints that loads the compiled module `m` by itself, without torch."""
    program = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('relprop._C', {_C.__file__!r}); m = u.module_from_spec(spec)\n"
        f"spec.loader.exec_module(m)\n{statement}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_the_instruction_set_can_be_chosen() -> None:
    for name in ISAS:
        assert alone("print(m.build_info()['isa'])", RELPROP_ISA=name) == name
    assert alone("print(m.build_info()['isa'])", RELPROP_ISA="") == ISAS[-1]
    for first_call in ("m.build_info()", "m.linear_alpha_beta_select(*[(8, 0)] * 4, 1, 1, 1)"):
        assert alone(first_call, RELPROP_ISA="sse9") == (
            "ValueError: RELPROP_ISA: expected one of baseline, avx2, avx512, got 'sse9'"
        )
    with pytest.raises(ValueError, match="set_isa: expected one of baseline, avx2, avx512, got 'mmx'"):
        _C.set_isa("mmx")


def test_info() -> None:
    found = native.info()
    assert found["available"] and found["reason"] == ""
    assert found["isa"] in found["isas_supported"] and set(found["isas_supported"]) <= set(found["isas_built"])
    assert found["cuda"] is (found["cuda_reason"] == "")
    if sys.platform == "linux":
        assert "omp" in found["openmp"], "torch has loaded an OpenMP runtime; it was not found"


def test_a_missing_module_says_why() -> None:
    program = (
        "import sys; sys.modules['relprop._C'] = None\n"
        "import torch; from relprop import errors, native; print(native.available())\n"
        "try: native.select(torch.ones(2), torch.ones(1, 2), torch.ones(1, 2))\n"
        "except errors.BackendError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(False, 'the compiled module relprop._C cannot be used: an import error")
    assert "backend cpp: expected the compiled module relprop._C, got an import error" in done.stdout


def test_no_second_openmp_runtime() -> None:
    """The module itself brings none: importing it alone loads none, and it then runs serially."""
    assert alone("print(repr(m.build_info()['openmp']))") == "''"
