"""Elementwise and row kernels of the CUDA backend, run by the host emulation, against float64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop import native_cuda
from relprop.errors import OptionError, ShapeError
from tests.csrc.cuda_checks import DTYPES, STABILISERS, TOLERANCE, assert_near, random, share, surrounded

SIZES = [1, 63, 1028]

pytestmark = pytest.mark.usefixtures("results")

each_dtype = pytest.mark.parametrize(("values", "streams"), DTYPES)
each_stabiliser = pytest.mark.parametrize("stabiliser", STABILISERS)
each_size = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(params=[0, 1], ids=["aligned", "misaligned"])
def shift(request: pytest.FixtureRequest, results: Any) -> int:
    results.shift = request.param
    return request.param


def branches(*shape: int, dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Two summands: of both signs, some sums 0 and one branch 0, but none that nearly cancels."""
    a, b = random(*shape, dtype=dtype, seed=1, shift=shift), random(*shape, dtype=dtype, seed=2, shift=shift)
    near = (a.double() + b.double()).abs() < 0.05 * a.double().abs()
    b[near] = a[near]
    a.view(-1)[3::50], b.view(-1)[5::50] = 0.0, 0.0
    b.view(-1)[7::50] = -a.view(-1)[7::50]
    return a, b


@each_stabiliser
@each_size
@each_dtype
def test_add_epsilon(
    values: torch.dtype, streams: torch.dtype, size: int, stabiliser: tuple[int, float], shift: int
) -> None:
    a, b = branches(2, size, dtype=values, shift=shift)
    r = random(3, 2, size, dtype=streams, seed=3, shift=shift)
    got = native_cuda.add_epsilon(r, a, b, stabiliser=stabiliser)
    s = share(r.double(), a.double() + b.double(), stabiliser)
    for part, branch in zip(got, (a, b), strict=True):
        assert_near(part, branch.double() * s, TOLERANCE[streams])


@pytest.mark.parametrize("gamma", [1.0, 0.25])
@each_stabiliser
@each_size
@each_dtype
def test_add_gamma(
    values: torch.dtype, streams: torch.dtype, size: int, stabiliser: tuple[int, float], gamma: float
) -> None:
    a, b = branches(2, size, dtype=values)
    r = random(3, 2, size, dtype=streams, seed=3)
    got = native_cuda.add_gamma(r, a, b, stabiliser=stabiliser, gamma=gamma)
    x, y, half = a.double(), b.double(), r.double() / 2
    preferred = [t * (1 + gamma * (t * (x + y) > 0)) for t in (x, y)]
    s = share(r.double(), preferred[0] + preferred[1], stabiliser)
    for part, weighted in zip(got, preferred, strict=True):
        assert_near(part, torch.where(x + y == 0, half, weighted * s), 2 * TOLERANCE[streams])


@pytest.mark.parametrize("shared", [False, True])
@each_stabiliser
@pytest.mark.parametrize("size", [1, 63, 4096, 9001])
@each_dtype
def test_add_normalised(
    values: torch.dtype, streams: torch.dtype, size: int, stabiliser: tuple[int, float], shared: bool
) -> None:
    batch = 2
    a = random(batch, size, dtype=values, seed=1).abs() + 0.1  # of one sign: the rule is well conditioned
    b = random(1 if shared else batch, size, dtype=values, seed=2).abs() + 0.1
    r = random(2, batch, size, dtype=streams, seed=3) + 1
    got = native_cuda.add_normalised(r, a, b, stabiliser=stabiliser)
    for ours, theirs in zip(got, add_formula(r.double(), a.double(), b.double(), stabiliser), strict=True):
        assert_near(ours, theirs, 4 * TOLERANCE[streams])


def add_formula(r: Tensor, a: Tensor, b: Tensor, stabiliser: tuple[int, float]) -> list[Tensor]:
    s = share(r, a + b, stabiliser)
    parts = [a * s, b.expand_as(a) * s]
    total = [part.sum(-1, keepdim=True) for part in parts]
    both = total[0].abs() + total[1].abs()
    wanted = [share(one.abs(), both, stabiliser) * r.sum(-1, keepdim=True) for one in total]
    return [part * share(want, one, stabiliser) for part, want, one in zip(parts, wanted, total, strict=True)]


def test_add_normalised_of_both_signs_and_of_an_empty_branch() -> None:
    r, a, b = random(2, 2, 700, seed=1), random(2, 700, seed=2), random(2, 700, seed=3)
    b[(a + b).abs() < 0.1] += 1.0
    b[1] = 0.0
    got = native_cuda.add_normalised(r, a, b, stabiliser=(1, 1e-9))
    for ours, theirs in zip(got, add_formula(r.double(), a.double(), b.double(), (1, 1e-9)), strict=True):
        assert_near(ours, theirs, 1e-3)  # sums of both signs cancel
    assert torch.equal(got[1][:, 1], torch.zeros(2, 700))


def test_add_normalised_is_the_same_alone_and_again(order: str) -> None:
    r, a, b = random(2, 3, 9001, seed=1), random(3, 9001, seed=2) + 3, random(3, 9001, seed=3)
    together = native_cuda.add_normalised(r, a, b, stabiliser=(0, 1e-9))
    for i in range(3):
        one = slice(i, i + 1)
        alone = native_cuda.add_normalised(r[:, one], a[one], b[one], stabiliser=(0, 1e-9))
        assert torch.equal(alone[0], together[0][:, one]) and torch.equal(alone[1], together[1][:, one])


@pytest.mark.parametrize("count", [1, 3])
@each_stabiliser
@each_size
@each_dtype
def test_fanout_epsilon(
    values: torch.dtype, streams: torch.dtype, size: int, stabiliser: tuple[int, float], count: int, shift: int
) -> None:
    x = random(2, size, dtype=values, seed=1, shift=shift)
    x[0, 0] = 0.0
    relevances = [random(3, 2, size, dtype=streams, seed=2 + i, shift=shift) for i in range(count)]
    out = native_cuda.fanout_epsilon(relevances, x, stabiliser=stabiliser)
    want = sum(x.double() * share(r.double(), x.double(), stabiliser) for r in relevances)
    assert_near(out, want, 4 * TOLERANCE[streams])


@each_stabiliser
@each_size
@each_dtype
def test_share_and_attention_shares(
    values: torch.dtype, streams: torch.dtype, size: int, stabiliser: tuple[int, float], shift: int
) -> None:
    dots = random(1, 2, 3, size, dtype=values, seed=1, shift=shift)
    dots[dots.abs() < 0.01] = 0.0
    attention = surrounded(dots.softmax(-1), shift)
    sv = random(2, 1, 2, 3, size, dtype=streams, seed=2, shift=shift)
    s_prime, relevance = native_cuda.attention_shares(attention, sv, dots, stabiliser=stabiliser, want_relevance=True)
    half = attention.double() * sv.double() / 2
    assert relevance is not None
    assert_near(relevance, half, TOLERANCE[streams])
    assert_near(s_prime, share(half, dots.double(), stabiliser), 2 * TOLERANCE[streams])
    alone, none = native_cuda.attention_shares(attention, sv, dots, stabiliser=stabiliser)
    assert none is None and torch.equal(alone, s_prime)
    s = native_cuda.share(sv, dots, stabiliser=stabiliser)
    assert_near(s, share(sv.double(), dots.double(), stabiliser), 2 * TOLERANCE[streams])


@pytest.mark.parametrize("n", [1, 63, 197, 1500])
@each_dtype
def test_softmax_taylor(values: torch.dtype, streams: torch.dtype, n: int) -> None:
    logits = random(2, 5, n, dtype=values, seed=1)
    if n > 1:
        logits[..., n // 2] = -torch.inf
    p = surrounded(logits.softmax(-1))
    r = random(3, 2, 5, n, dtype=streams, seed=2)
    out = native_cuda.softmax_taylor(r, logits, p)
    x, wide = torch.where(logits.isfinite(), logits.double(), 0.0), r.double()
    assert_near(out, x * (wide - p.double() * wide.sum(-1, keepdim=True)), 2 * TOLERANCE[streams])
    if n > 1:
        assert (out[..., n // 2] == 0).all()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("n", [2, 63, 768, 1500])
@each_dtype
def test_norm_gradient(values: torch.dtype, streams: torch.dtype, n: int, weighted: bool, kind: str) -> None:
    x = random(2, 5, n, dtype=values, seed=1) + 2
    weight = random(n, dtype=values, seed=2) if weighted else None
    g = random(2, 2, 5, n, dtype=streams, seed=3)
    out = native_cuda.norm_gradient(g, x, weight, epsilon=1e-5, norm=kind)
    leaf, scale = x.double().requires_grad_(), None if weight is None else weight.double()
    norm = F.layer_norm(leaf, (n,), scale, None, 1e-5) if kind == "layer" else F.rms_norm(leaf, (n,), scale, 1e-5)
    want = torch.stack([torch.autograd.grad(norm, leaf, t.double(), retain_graph=True)[0] for t in g])
    assert_near(out, want, 5e-5 + TOLERANCE[streams])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@each_size
@each_dtype
def test_activation_gradient(values: torch.dtype, streams: torch.dtype, size: int, activation: str, shift: int) -> None:
    x = random(2, size, dtype=values, seed=1, shift=shift)
    x.view(-1)[::5] *= 10
    g = random(3, 2, size, dtype=streams, seed=2, shift=shift)
    out = native_cuda.activation_gradient(g, x, activation=activation)
    leaf = x.double().requires_grad_()
    y = {
        "gelu": lambda t: F.gelu(t),
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
    }[activation](leaf)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    assert_near(out, g.double() * slope, 2 * TOLERANCE[streams])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activation_gradient_of_large_inputs(activation: str) -> None:
    x = torch.tensor([-1e30, -300.0, -90.0, 90.0, 300.0, 1e30])
    out = native_cuda.activation_gradient(torch.ones(1, 6), x, activation=activation)
    assert out[0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1])


def test_empty() -> None:
    x, r = torch.empty(0, 4), torch.empty(2, 0, 4)
    kept: dict[str, Any] = {"stabiliser": (0, 0.0)}
    for got in (
        *native_cuda.add_epsilon(r, x, x, **kept),
        *native_cuda.add_gamma(r, x, x, **kept),
        *native_cuda.add_normalised(r, x, x, **kept),
        native_cuda.fanout_epsilon([r], x, **kept),
        native_cuda.share(r, x, **kept),
        native_cuda.softmax_taylor(r, x, x),
        native_cuda.norm_gradient(r, x, None, epsilon=1e-5, norm="rms"),
        native_cuda.activation_gradient(r, x, activation="gelu"),
    ):
        assert got.shape == r.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_stabiliser
def test_bad_relevance_is_never_hidden(stabiliser: tuple[int, float], value: float) -> None:
    r, x = torch.ones(1, 1, 40), torch.ones(1, 40)
    r[0, 0, 20] = value
    results = [
        *native_cuda.add_epsilon(r, x, x, stabiliser=stabiliser),
        *native_cuda.add_gamma(r, x, x, stabiliser=stabiliser),
        *native_cuda.add_normalised(r, x, x, stabiliser=stabiliser),
        native_cuda.fanout_epsilon([r], x, stabiliser=stabiliser),
        native_cuda.share(r, x, stabiliser=stabiliser),
        native_cuda.softmax_taylor(r, x, x),
        native_cuda.activation_gradient(r, x, activation="silu"),
    ]
    for got in results:
        assert not got.flatten()[20].isfinite()


def test_errors() -> None:
    x, r = torch.ones(3, 4), torch.ones(2, 3, 4)
    with pytest.raises(ShapeError, match=r"b: expected shape \[3, 4\], got \[2, 4\]"):
        native_cuda.add_normalised(r, x, x[:2], stabiliser=(0, 0.0))
    with pytest.raises(ShapeError, match=r"relevance: expected shape \[3, 3, 4\], got \[3, 4\]"):
        native_cuda.add_gamma(r[0], x, x, stabiliser=(0, 0.0))
    with pytest.raises(OptionError, match="relevances: expected 1 to 16 tensors, got 17"):
        native_cuda.fanout_epsilon([r] * 17, x, stabiliser=(0, 0.0))
    with pytest.raises(OptionError, match="activation: expected one of gelu, gelu_tanh, silu, got 'relu'"):
        native_cuda.activation_gradient(r, x, activation="relu")
    with pytest.raises(ValueError, match=r"stabiliser_kind: expected 0 \(signed\) or 1 \(reference\), got 7"):
        native_cuda.share(r, x, stabiliser=(7, 0.0))
