"""The Triton kernels of attention against the composed rule and the gradient in float64."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.errors import DTypeError, OptionError, ShapeError
from relprop.kernels.attention_relevance import AttentionStreams, attention_relevance
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import Configuration
from relprop.rules import (
    AttentionComposed,
    MatmulAlphaBeta,
    MatmulHalf,
    SoftmaxDetached,
    SoftmaxIdentity,
    Stabiliser,
)
from relprop.rules.attention_composed import Heads, attention_gradient
from tests.kernels.kernel_checks import (
    DTYPES,
    STABILISERS,
    assert_near,
    distinct_architectures,
    random,
    spread_out,
)
from tests.rules.rule_checks import call_by_hand

# Shares of q k products near 0 amplify the rounding of those products; `settled` keeps them away.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}
EDGES = ["gradient_x_relevance", "gradient_x_attention", "relevance", "attention"]
KINDS = ("signed", "reference")


def settled(tensor: Tensor) -> Tensor:
    """Channels of one sign pattern: products q k have a size of their own, no pair cancels."""
    pattern = torch.tensor([1.0, -1.0, 1.0]).repeat(tensor.shape[-1] // 3 + 1)[: tensor.shape[-1]]
    return (tensor.abs() + 0.1) * pattern


def case(
    dtype: torch.dtype = torch.float32,
    targets: int = 2,
    batch: int = 2,
    heads: int = 2,
    key_heads: int = 2,
    nq: int = 37,
    nk: int = 37,
    d: int = 16,
    dv: int = 16,
) -> dict[str, Tensor]:
    made = {
        "q": settled(random(batch, heads, nq, d, seed=1)).to(dtype),
        "k": settled(random(batch, key_heads, nk, d, seed=2)).to(dtype),
        "v": random(batch, key_heads, nk, dv, seed=3, dtype=dtype),
        "gradient": random(targets, batch, heads, nq, dv, seed=4),
    }
    # Relevance of an output is proportional to it, as what comes from the layer above is.
    made["relevance"] = random(targets, batch, heads, nq, dv, seed=5)
    made["row"] = random(targets, batch, nq, seed=6).abs()
    return made


def rule_for(qk: str, qk_stabiliser: Stabiliser, av_stabiliser: Stabiliser) -> AttentionComposed:
    product = MatmulAlphaBeta(qk_stabiliser) if qk == "alpha_beta" else MatmulHalf(qk_stabiliser)
    softmax = SoftmaxDetached() if qk == "none" else SoftmaxIdentity()
    return AttentionComposed(qk=product, softmax=softmax, av=MatmulHalf(av_stabiliser))


def run(
    given: dict[str, Tensor],
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    qk: str = "half",
    stabiliser: tuple[int, float] = (0, 1e-9),
    edge: str | None = "gradient_x_relevance",
    **options: Any,
) -> tuple[AttentionStreams, AttentionStreams]:
    """What the kernels and what the rules in float64 make of a case; relevance stays where outputs do not cancel."""
    exact = {name: t.double() for name, t in given.items()}
    groups = given["q"].shape[1] // given["k"].shape[1]
    mask64 = mask if mask is None or mask.dtype == torch.bool else mask.double()
    output = F.scaled_dot_product_attention(
        exact["q"], exact["k"], exact["v"], mask64, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )
    stored = output.to(given["q"].dtype)
    exact["relevance"] = exact["relevance"] * stored.double()
    got = attention_relevance(
        given["q"],
        given["k"],
        given["v"],
        stored,
        given["gradient"],
        exact["relevance"].float(),
        mask=mask,
        causal=causal,
        scale=scale,
        qk=qk,
        qk_stabiliser=stabiliser,
        av_stabiliser=stabiliser,
        row=None if edge is None else given["row"],
        edge=edge,
        **options,
    )
    number = given["q"].shape[-1] ** -0.5 if scale is None else scale
    arguments = (exact["q"], exact["k"], exact["v"], mask64, number, causal, groups > 1)
    call = call_by_hand("attention", None, arguments, stored.double())
    if mask is None:
        call.node.operands = (*call.node.operands[:3], None)  # type: ignore[assignment]
    call.wanted = (True,) * 4
    used = Stabiliser(stabiliser[1], KINDS[stabiliser[0]])
    relevances = rule_for(qk, used, used).propagate(call, exact["relevance"])[:3]
    gradients = attention_gradient(call, exact["gradient"])[:3]
    heads: Heads = call.memo["heads"]
    row = None if edge is None else by_maps(edge, exact["row"], call.maps, heads.probabilities)
    return got, AttentionStreams(gradients, relevances, row)  # type: ignore[arg-type]


def by_maps(edge: str, row: Tensor, maps: dict[str, Tensor], attention: Tensor) -> Tensor:
    found = {"gradient": maps["gradient"], "relevance": maps["relevance"], "attention": attention[None]}
    parts = [found[name] for name in edge.split("_x_")]
    product = parts[0] if len(parts) == 1 else parts[0] * parts[1]
    matrix = product.mean(2) if edge == "attention" else product.clamp(min=0).mean(2)
    return torch.einsum("tbi,tbij->tbj", row, matrix.expand(len(row), *matrix.shape[1:]))


def assert_same(got: AttentionStreams, want: AttentionStreams, tolerance: float) -> None:
    for mine, theirs in ((got.gradients, want.gradients), (got.relevances, want.relevances)):
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert_near(one, other, tolerance)
    if want.row is not None:
        assert got.row is not None
        assert_near(got.row, want.row, tolerance)


@pytest.mark.parametrize("qk", ["half", "alpha_beta", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_rules(dtype: torch.dtype, qk: str) -> None:
    assert_same(*run(case(dtype), qk=qk), TOLERANCE[dtype])


@pytest.mark.parametrize("qk", ["half", "alpha_beta"])
def test_medium(qk: str) -> None:
    """Operands are rounded once: the same as of a bfloat16 model with the same numbers, in float32."""
    given = case()
    rounded = {name: t.bfloat16().float() if name in "qkv" else t for name, t in given.items()}
    output = F.scaled_dot_product_attention(rounded["q"], rounded["k"], rounded["v"])
    streams = (given["gradient"], given["relevance"] * output)
    options = {"qk": qk, "row": given["row"], "edge": "gradient_x_relevance"}
    medium = attention_relevance(*(given[name] for name in "qkv"), output, *streams, precision="medium", **options)
    halves = (rounded[name].bfloat16() for name in "qkv")
    assert_same(medium, attention_relevance(*halves, output, *streams, **options), 0.0)  # type: ignore[arg-type]
    assert {t.dtype for t in (*medium.gradients, *medium.relevances) if t is not None} == {torch.float32}


@pytest.mark.parametrize(
    "sizes",
    [
        {"nq": 1, "nk": 1, "d": 1, "dv": 1, "batch": 1, "heads": 1, "key_heads": 1, "targets": 1},
        {"nq": 1, "nk": 70, "targets": 3},
        {"nq": 70, "nk": 5, "d": 32, "dv": 8},
        {"heads": 6, "key_heads": 2, "nq": 33, "nk": 40},
        {"d": 72, "dv": 72, "nq": 40, "nk": 33, "batch": 1},
    ],
    ids=["one", "class_token", "cross", "grouped", "odd_head"],
)
def test_sizes(sizes: dict[str, int]) -> None:
    assert_same(*run(case(**sizes)), TOLERANCE[torch.float32])  # type: ignore[arg-type]


@pytest.mark.full
@pytest.mark.parametrize("qk", ["half", "alpha_beta"])
@pytest.mark.parametrize("d", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(dtype: torch.dtype, d: int, qk: str) -> None:
    assert_same(*run(case(dtype, d=d, dv=d, nq=70, nk=130, heads=1, key_heads=1), qk=qk), TOLERANCE[dtype])


@pytest.mark.parametrize("architecture", [90, 100])
def test_large_heads_on_other_architectures(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which streams share a launch depends on the architecture."""
    monkeypatch.setattr("relprop.kernels.attention_relevance.architecture_of", lambda device: architecture)
    sizes = {"d": 136, "dv": 136, "nq": 20, "nk": 33, "batch": 1, "heads": 1, "key_heads": 1}
    assert_same(*run(case(torch.bfloat16, **sizes)), TOLERANCE[torch.bfloat16])


TABLED = {
    "half": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "highest"),
    "ieee": (torch.float32, "ieee"),
}
TABLED_CASES = [
    (k, a, d) for k in TABLED for d in (64, 128, 256) for a in distinct_architectures("attention", k, f"d{d}")
]
FEW = (("fp16", 90, 64), ("tf32x3", 80, 64))


def at_tabled_tiles(kind: str, architecture: int, d: int, qk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relprop.kernels.attention_relevance.interpreted", False)
    monkeypatch.setattr("relprop.kernels.attention_relevance.architecture_of", lambda device: architecture)
    asked = []

    def recorded(table: str, *key: Any) -> Configuration:
        asked.append((table, *key))
        return configuration(table, *key)

    monkeypatch.setattr("relprop.kernels.attention_relevance.configuration", recorded)
    dtype, precision = TABLED[kind]
    given = case(dtype, targets=1, batch=1, heads=2, key_heads=1, nq=70, nk=130, d=d, dv=d)
    assert_same(*run(given, qk=qk, precision=precision), TOLERANCE[dtype])
    assert {key[1:] for key in asked} == {(architecture, kind, f"d{d}")}


@pytest.mark.parametrize(("kind", "architecture", "d"), FEW)
def test_some_tabled_tiles(kind: str, architecture: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_tabled_tiles(kind, architecture, d, "half", monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("qk", ["half", "alpha_beta"])
@pytest.mark.parametrize(("kind", "architecture", "d"), TABLED_CASES)
def test_tabled_tiles(kind: str, architecture: int, d: int, qk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter runs by itself are the tiles of 16-bit operands on sm_80."""
    at_tabled_tiles(kind, architecture, d, qk, monkeypatch)


@pytest.mark.parametrize("qk", ["half", "alpha_beta"])
@pytest.mark.parametrize("nq", [37, 80])
def test_causal(nq: int, qk: str) -> None:
    assert_same(*run(case(nq=nq, nk=nq), causal=True, qk=qk), TOLERANCE[torch.float32])


@pytest.mark.parametrize("qk", ["half", "alpha_beta"])
@pytest.mark.parametrize(("nq", "nk"), [(80, 80), (80, 50), (50, 80)], ids=["square", "fewer_keys", "more_keys"])
def test_causal_grouped(nq: int, nk: int, qk: str) -> None:
    """Heads that share keys, each over several tiles of queries that begin at the first one that sees a tile."""
    given = case(targets=1, batch=1, heads=6, key_heads=2, nq=nq, nk=nk)
    assert_same(*run(given, causal=True, qk=qk), TOLERANCE[torch.float32])


def padding(batch: int, nk: int) -> Tensor:
    """The last keys of each sample are padding. [B, 1, 1, Nk]"""
    lengths = torch.tensor([nk - 3 * i for i in range(batch)])
    return (torch.arange(nk) < lengths[:, None])[:, None, None, :]


@pytest.mark.parametrize("kind", ["padding", "bias", "per_head", "half_bias"])
def test_masks(kind: str) -> None:
    mask = {
        "padding": padding(2, 37),
        "bias": random(1, 1, 37, 37, seed=8),
        "per_head": random(2, 2, 37, 37, seed=8).masked_fill(~padding(2, 37), -torch.inf),
        "half_bias": random(2, 37, 37, seed=8).bfloat16(),
    }[kind]
    assert_same(*run(case(), mask=mask), TOLERANCE[torch.float32])


def test_mask_whose_keys_lie_far_apart() -> None:
    """Past 2^31 elements, as in the transpose of a mask of 46,341 queries and as many keys."""
    stride, nq, nk = 2**31 // 64, 5, 70
    room = torch.from_numpy(numpy.zeros((nk - 1) * stride + nq, dtype=numpy.uint8))  # what is not touched takes none
    mask = room.as_strided((nq, nk), (1, stride)).view(torch.bool)
    mask.copy_(random(nq, nk, seed=8) > 0)
    given = case(batch=1, heads=1, key_heads=1, targets=1, nq=nq, nk=nk)
    assert_same(*run(given, mask=mask), TOLERANCE[torch.float32])


def test_query_that_sees_nothing() -> None:
    mask = padding(2, 37).expand(2, 1, 37, 37).clone()
    mask[0, :, 5] = False
    got, want = run(case(), mask=mask)
    assert_same(got, want, TOLERANCE[torch.float32])
    assert got.relevances[0] is not None and not got.relevances[0][:, 0, :, 5].any()


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str) -> None:
    assert_same(*run(case(), edge=edge), TOLERANCE[torch.float32])


@pytest.mark.parametrize("stabiliser", STABILISERS.values(), ids=STABILISERS)
@pytest.mark.parametrize("qk", ["half", "alpha_beta"])
def test_stabilisers_and_products_of_zero(qk: str, stabiliser: tuple[int, float]) -> None:
    given = case()
    given["q"][:, :, 3] = 0.0
    given["k"][:, :, 7] = 0.0
    given["v"][..., 2] = 0.0
    assert_same(*run(given, qk=qk, stabiliser=stabiliser), TOLERANCE[torch.float32])


def test_nothing_supports_a_pair() -> None:
    """All products of a pair negative: no z+ share, exactly."""
    given = case()
    given["k"] = -given["k"]
    got, want = run(given, qk="alpha_beta")
    assert_same(got, want, TOLERANCE[torch.float32])
    assert got.relevances[0] is not None and not got.relevances[0].any()


def test_scale() -> None:
    assert_same(*run(case(), scale=0.5), TOLERANCE[torch.float32])


def test_views_as_models_make_them() -> None:
    """q, k, v as slices of one projection and gradients as they leave a transpose: strided, not copied."""
    given = case()
    packed = torch.stack([given[name].transpose(1, 2) for name in "qkv"], 2)  # [B, N, 3, H, d]
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    rows = given["gradient"].transpose(2, 3).contiguous().transpose(2, 3)  # [T, B, H, N, dv], as [T, B, N, H, dv] lies
    columns = given["gradient"].mT.contiguous().mT  # channels are not next to each other
    relevance = given["relevance"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(t.is_contiguous() for t in (q, k, v, rows, columns, relevance))
    want, _ = run(given)
    for gradient in (rows, columns, spread_out(given["gradient"])):
        views = {"q": q, "k": k, "v": v, "gradient": gradient, "relevance": relevance}
        assert_same(run({**given, **views})[0], want, 1e-7)


def test_only_what_is_wanted() -> None:
    given = case()
    whole, _ = run(given)
    got, _ = run(given, gradients_wanted=(False, False, True), relevances_wanted=(False, False, True))
    assert got.gradients[:2] == (None, None) and got.relevances[:2] == (None, None)
    assert_near(got.relevances[2], whole.relevances[2], 1e-6)  # type: ignore[arg-type]
    got, _ = run(given, gradients_wanted=(True, False, False), relevances_wanted=(False, True, False))
    assert [p is not None for p in (*got.gradients, *got.relevances)] == [True, False, False, False, True, False]
    assert_near(got.gradients[0], whole.gradients[0], 1e-6)  # type: ignore[arg-type]
    assert_near(got.relevances[1], whole.relevances[1], 1e-6)  # type: ignore[arg-type]
    got, _ = run(given, gradients_wanted=(False, False, False), relevances_wanted=(False, False, False))
    assert got.gradients == got.relevances == (None, None, None)
    assert_near(got.row, whole.row, 1e-6)  # type: ignore[arg-type]


def test_one_stream() -> None:
    given = case()
    whole, _ = run(given)
    output = F.scaled_dot_product_attention(given["q"], given["k"], given["v"])
    one = attention_relevance(given["q"], given["k"], given["v"], output, given["gradient"])
    assert one.relevances == (None, None, None) and one.row is None
    for got, want in zip(one.gradients, whole.gradients, strict=True):
        assert_near(got, want, 1e-5)  # type: ignore[arg-type]
    other = attention_relevance(
        given["q"],
        given["k"],
        given["v"],
        output,
        relevance=given["relevance"] * output,
        row=given["row"],
        edge="relevance",
    )
    assert other.gradients == (None, None, None)
    for got, want in zip(other.relevances, whole.relevances, strict=True):
        assert_near(got, want, 1e-4)  # type: ignore[arg-type]


def test_conserves() -> None:
    got, _ = run(case(batch=1, targets=1))
    output = F.scaled_dot_product_attention(*(case(batch=1)[name] for name in "qkv"))
    arrived = (case(batch=1, targets=1)["relevance"] * output).sum()
    passed = sum(part.sum() for part in got.relevances if part is not None)
    assert_near(passed, arrived, 1e-4)  # type: ignore[arg-type]


def test_bad_input() -> None:
    given = case()
    q, k, v = (given[name] for name in "qkv")
    o = F.scaled_dot_product_attention(q, k, v)
    with pytest.raises(ShapeError, match=r"q, k, v: expected shapes .*, got \[2, 2, 37, 16\], \[2, 37, 16\]"):
        attention_relevance(q, k[:, 0], v, o)
    with pytest.raises(ShapeError, match=r"output: expected shape \[2, 2, 37, 16\], got \[2, 2, 36, 16\]"):
        attention_relevance(q, k, v, o[:, :, 1:])
    with pytest.raises(ShapeError, match=r"mask: expected a shape that broadcasts to \[2, 2, 37, 37\], got \[36\]"):
        attention_relevance(q, k, v, o, mask=torch.ones(36, dtype=torch.bool))
    with pytest.raises(DTypeError, match=r"mask: expected torch.bool or a floating-point dtype, got torch.int64"):
        attention_relevance(q, k, v, o, mask=torch.ones(37, dtype=torch.int64))
    with pytest.raises(DTypeError, match=r"k: expected torch.float32, got torch.float16"):
        attention_relevance(q, k.half(), v, o)
    with pytest.raises(OptionError, match=r"qk: expected one of half, alpha_beta, none, got 'flat'"):
        attention_relevance(q, k, v, o, qk="flat")
    with pytest.raises(OptionError, match=r"edge: expected one of .* and a row with it, got 'relevance'"):
        attention_relevance(q, k, v, o, edge="relevance")
    with pytest.raises(OptionError, match=r"edge gradient_x_relevance: expected a gradient stream, got None"):
        attention_relevance(q, k, v, o, row=given["row"], edge="gradient_x_relevance")
    with pytest.raises(ShapeError, match=r"q, v: expected heads of 1 to 256 channels, got 257 and 257"):
        wide = torch.zeros(1, 1, 2, 257)
        attention_relevance(wide, wide, wide, wide)
