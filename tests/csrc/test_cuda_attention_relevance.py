"""The CUDA kernel of attention relevance, run by the host emulation, against the rules in float64 with whole maps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from relprop import native_cuda
from relprop.errors import DTypeError, OptionError, ShapeError
from relprop.methods.attention_maps import EDGES
from relprop.native_cuda.attention_relevance import largest_head
from relprop.rules import EXACT, REFERENCE, Stabiliser
from tests.csrc.attention_checks import (
    ROUGH,
    RULES,
    Case,
    answers,
    case_tensors,
    expected,
    options_of,
    oracle_call,
    reference_output,
)
from tests.csrc.cuda_checks import BF16, FLOAT, FP16, assert_near, surrounded
from tests.ops.cases import misaligned

pytestmark = pytest.mark.usefixtures("results")

CASES = {
    "one": Case(1, 1, 1, 1, 1, 1, 1, 1),
    "plain": Case(targets=1),
    "several targets": Case(37, 35, 2, 2, 2, 16, 20),
    "heads of 64": Case(70, 33, 1, 1, 1, 64, 64, 1, scale=0.125),
    "grouped": Case(35, 40, 1, 4, 2, 8, 24, 1),
    "causal": Case(67, 67, 1, 1, 1, 16, 16, 1, causal=True),
    "causal cross": Case(20, 70, 1, 2, 1, 8, 8, 1, causal=True),
    "seen": Case(mask="seen", targets=1),
    "padding": Case(40, 40, 2, 2, 2, 8, 8, 1, mask="padding"),
    "bias": Case(33, 20, 2, 2, 2, 16, 16, 1, mask="bias"),
}
# Layer, streams, products; how near: three tf32 products keep float32's 24 bits but for sums of rounded halves, tf32
# keeps 11, and bfloat16 rounds A, dS and the shares to 8 on the way.
KINDS = {
    "float32": (FLOAT, FLOAT, "float32", 5e-5),
    "tfloat32": (FLOAT, FLOAT, "tfloat32", 2e-2),
    "bfloat16": (BF16, FLOAT, "float32", 1e-1),
    "bfloat16 streams": (BF16, BF16, "float32", 1e-1),
    "float16": (FP16, FLOAT, "float32", 2e-2),
    "float16 streams": (FP16, FP16, "float32", 2e-2),
}


def prepared(case: Case, values: torch.dtype, streams: torch.dtype) -> dict[str, Tensor]:
    """The case's tensors in the kernel's dtypes, NaN around each; output and relevance fit the rounded layer."""
    layer = {name: t.to(values) for name, t in case.tensors().items() if name in "qkv"}
    output = reference_output(case, *(layer[name].double() for name in "qkv")).to(values)
    made = case.tensors()
    rounded = {
        **layer,
        "output": output,
        "gradient": made["gradient"].to(streams),
        "relevance": (made["relevance"] * output.double()).to(streams),
        "row": made["row"].float(),
    }
    return {name: surrounded(t) for name, t in rounded.items()}


def run(tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor | None]:
    return answers(native_cuda.attention_relevance, tensors, **options)


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, part in want.items():
        ours = got[name]
        assert (ours is None) == (part is None), name
        if ours is not None and part is not None:
            assert_near(ours, part, tolerance)


def compare(case: Case, qk: str, kind: str, edge: str, stabiliser: Stabiliser = ROUGH) -> None:
    values, streams, product, tolerance = KINDS[kind]
    rule, tensors = RULES[qk](stabiliser), prepared(case, values, streams)
    options = options_of(case, rule, torch.float32, qk)
    want = expected(case, rule, tensors, edge)
    assert_same(run(tensors, edge=edge, product=product, **options), want, tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qk", RULES)
@pytest.mark.parametrize("name", ["plain", "heads of 64"])
def test_dtypes(name: str, qk: str, kind: str) -> None:
    compare(CASES[name], qk, kind, "gradient_x_relevance")


@pytest.mark.parametrize("qk", RULES)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("plain", "heads of 64")])
def test_equals_the_rules(name: str, qk: str) -> None:
    compare(CASES[name], qk, "float32", "gradient_x_relevance")


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ["several targets", "grouped", "seen"])
def test_edges(name: str, edge: str) -> None:
    compare(CASES[name], "half", "float32", edge)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [32, 96, 128, 256])
def test_head_sizes(d: int, kind: str) -> None:
    compare(Case(34, 33, 1, 1, 1, d, d, 1, scale=d**-0.5), "half", kind, "relevance")


# The largest heads for which a block of 128 threads has room there, the next larger, and the largest of all.
@pytest.mark.parametrize(
    ("kind", "d"), [("float32", 80), ("float32", 96), ("float16", 144), ("bfloat16", 192), ("bfloat16", 256)]
)
def test_little_shared_memory(d: int, kind: str, little_memory: None) -> None:
    compare(Case(34, 33, 1, 1, 1, d, d, 1, scale=d**-0.5), "half", kind, "relevance")


def test_largest_head(little_memory: None) -> None:
    cpu = torch.device("cpu")
    assert [largest_head(dtype, cpu) for dtype in (FLOAT, BF16, FP16)] == [144, 256, 144]
    wide = torch.zeros(1, 1, 2, 160)
    with pytest.raises(
        ValueError, match="^d, dv: expected heads of at most 144 channels on this device, got 160 and 4"
    ):
        native_cuda.attention_relevance(
            wide, wide, wide[..., :4], scale=1.0, edge="attention", row=torch.zeros(1, 1, 2)
        )


def test_largest_head_where_there_is_more() -> None:
    assert {largest_head(dtype, torch.device("cpu")) for dtype in (FLOAT, BF16, FP16)} == {256}


@pytest.mark.parametrize("stabiliser", [Stabiliser(), EXACT, REFERENCE], ids=["signed", "exact", "reference"])
@pytest.mark.parametrize("qk", RULES)
def test_stabilisers_where_products_cancel(qk: str, stabiliser: Stabiliser) -> None:
    """Products of small integers, which every kind of product holds exactly, cancel to the bit."""
    case = Case(34, 20, 1, 2, 2, 4, 4, 1)
    tensors = {name: t.mul(1.5).round() if name in "qkv" else t for name, t in case.tensors().items()}
    tensors["output"] = reference_output(case, *(tensors[name] for name in "qkv"))
    tensors["relevance"] = tensors["relevance"] * tensors["output"]
    single = {name: t.float() for name, t in tensors.items()}
    rule = RULES[qk](stabiliser)
    want = expected(case, rule, single, None)
    call = oracle_call(case, *(single[name].double() for name in "qkv"))
    call.tensors[4] = single["output"].double()
    relevances = rule.propagate(call, single["relevance"].double())
    want |= {f"relevance_{n}": part for n, part in zip("qkv", relevances, strict=False)}
    assert_same(run(single, **options_of(case, rule, torch.float32, qk)), want, 1e-3)


def test_rounded_output() -> None:
    """A gradient that is not told of an exact output makes its own."""
    case, rule = CASES["causal"], RULES["half"](ROUGH)
    tensors, options = prepared(case, FLOAT, FLOAT), options_of(case, rule, torch.float32, "half")
    want = expected(case, rule, tensors, None)
    alone = {n: t for n, t in tensors.items() if n not in ("relevance", "output")}
    got = run(alone, **options)
    assert_same(got, {n: p if "gradient" in n else None for n, p in want.items()}, 5e-5)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_wanted(wanted: tuple[bool, bool, bool]) -> None:
    case, rule = CASES["grouped"], RULES["positive"](ROUGH)
    tensors, options = prepared(case, FLOAT, FLOAT), options_of(case, rule, torch.float32, "positive")
    whole = run(tensors, **options)
    part = run(tensors, gradients_wanted=wanted, relevances_wanted=wanted, **options)
    for stream in ("gradient", "relevance"):
        for name, want in zip("qkv", wanted, strict=True):
            ours, all_of_it = part[f"{stream}_{name}"], whole[f"{stream}_{name}"]
            assert (ours is not None) == want
            assert ours is None or (all_of_it is not None and torch.equal(ours, all_of_it))


def test_the_order_of_threads_does_not_matter(order: str) -> None:
    compare(CASES["several targets"], "positive", "float32", "gradient_x_relevance")
    compare(CASES["plain"], "half", "bfloat16", "attention")


def test_strided_inputs() -> None:
    case, rule = Case(33, 33, 1, 2, 2, 16, 16, 1), RULES["half"](ROUGH)
    tensors, options = prepared(case, BF16, FLOAT), options_of(case, rule, torch.float32, "half")
    want = run(tensors, **options)
    packed = torch.stack([tensors[n].transpose(1, 2) for n in "qkv"], 2)
    views = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4).unbind(0), strict=True))
    for given in (views, {n: misaligned(tensors[n]) for n in ("q", "v", "gradient")}):
        got = run({**tensors, **given}, **options)
        for name, part in want.items():
            ours = got[name]
            assert part is not None and ours is not None and torch.equal(ours, part)


def test_strides_beyond_an_int32() -> None:
    """Views over 8 GiB of which a few pages are touched: batch, head and row offsets are 64 bits wide."""
    case, rule = Case(3, 5, 2, 2, 2, 16, 16, 1), RULES["half"](ROUGH)
    tensors, options = prepared(case, FLOAT, FLOAT), options_of(case, rule, torch.float32, "half")
    want, room = run(tensors, **options), torch.empty(2**31 + 2**16)
    for name, axis in itertools.product("qkv", (0, 1, 2)):
        tensor = tensors[name]
        step = 2**31 // (tensor.shape[axis] - 1)
        strides = [step if i == axis else stride for i, stride in enumerate(tensor.stride())]
        got = run({**tensors, name: room.as_strided(tensor.shape, strides).copy_(tensor)}, **options)
        for key, part in want.items():
            ours = got[key]
            assert (part is None) == (ours is None), key
            assert part is None or (ours is not None and torch.equal(ours, part)), (name, axis, key)


@pytest.mark.parametrize("change", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"targets": 0}])
def test_nothing_to_do(change: dict[str, int]) -> None:
    case, rule = replace(CASES["plain"], **change), RULES["half"](ROUGH)  # type: ignore[arg-type]
    tensors = {n: t.float() for n, t in case_tensors(case).items()}
    for part in run(tensors, edge="relevance", **options_of(case, rule, torch.float32, "half")).values():
        assert part is not None and torch.equal(part, torch.zeros_like(part))


def message(error: type[Exception], **changes: Any) -> str:
    case, rule = CASES["plain"], RULES["half"](ROUGH)
    tensors = {**prepared(case, BF16, FLOAT), **{n: t for n, t in changes.items() if n in ("q", "k", "v")}}
    rest = {n: t for n, t in changes.items() if n not in tensors}
    with pytest.raises(error) as raised:
        run(tensors, **{**options_of(case, rule, torch.float32, "half"), **rest})
    return str(raised.value)


def test_errors() -> None:
    wide = torch.zeros(2, 3, 7, 300, dtype=BF16)
    assert message(DTypeError, q=torch.zeros(2, 3, 5, 4).double()).startswith("q: expected torch.float32, ")
    assert message(DTypeError, k=torch.zeros(2, 3, 7, 4)) == "k: expected torch.bfloat16, got torch.float32"
    assert message(ShapeError, k=wide) == "k: expected shape [2, 3, 7, 4], got [2, 3, 7, 300]"
    assert message(ShapeError, mask=torch.ones(4, 7)) == (
        "mask: expected a shape that broadcasts to [2, 3, 5, 7], got [4, 7]"
    )
    assert message(OptionError, qk="whole") == "qk: expected one of half, positive, detached, got 'whole'"
    assert message(OptionError, product="float16") == "product: expected one of float32, tfloat32, got 'float16'"
    both = {"q": torch.zeros(2, 3, 5, 300, dtype=BF16), "k": wide}
    assert message(ValueError, **both) == "d, dv: expected heads of at most 256 channels on this device, got 300 and 6"


def test_more_rows_than_are_counted() -> None:
    """The kernels count the rows of one head in 32 bits."""
    one, many = torch.zeros(1, 1, 1, 1), torch.zeros(()).expand(1, 1, 2**30 + 1, 1)
    with pytest.raises(ValueError, match="^queries: expected at most 1073741824, got 1073741825$"):
        native_cuda.attention_relevance(many, one, one, scale=1.0, edge="attention", row=many[..., 0])
