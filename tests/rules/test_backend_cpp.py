"""The C++ kernel of every rule that has one against the rule, on the operations of a small ViT."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import relprop
from relprop import native
from relprop.backends.cpp import KERNELS, kernel_reasons
from relprop.composites import Composite, find_composite
from relprop.rules import (
    EXACT,
    REFERENCE,
    AddNormalised,
    AttentionComposed,
    FanoutEpsilon,
    Gradient,
    LinearAlphaBeta,
    MatmulAlphaBeta,
    MatmulHalf,
    Rule,
    SoftmaxDetached,
    Stabiliser,
    make_rule,
)
from tests.engine.models import vit
from tests.rules.rule_checks import Op, assert_near, assert_parts, each, module_of, random

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

# The same formulas in another order of additions. float32: denominators that nearly cancel (random relevance meets
# them all) are the same numbers on both sides but for the rounding of the products that lead to them.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10}
SETTINGS = {
    "reference": REFERENCE,
    "signed": Stabiliser(1e-6),
}


@functools.cache
def vit_op() -> Op:
    return Op(vit(depth=2), random(2, 3, 32, 32), kind="conv")


def with_stabiliser(rule: Rule, stabiliser: Stabiliser) -> Rule:
    """A rule of the composite with another stabiliser."""
    if isinstance(rule, AttentionComposed):
        return AttentionComposed(qk=MatmulHalf(stabiliser), av=MatmulHalf(stabiliser))
    return replace(rule, stabiliser=stabiliser) if hasattr(rule, "stabiliser") else rule  # type: ignore[type-var]


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stabiliser", SETTINGS.values(), ids=SETTINGS)
def test_kernel_equals_rule(stabiliser: Stabiliser, dtype: torch.dtype, targets: int) -> None:
    op, images = vit_op(), random(3, 3, 32, 32, seed=1)
    seen: Counter[type[Rule]] = Counter()
    rules = find_composite("chefer").assign(op.graph)
    pairs = [(node, with_stabiliser(rule, stabiliser)) for node, rule in rules.items()]
    pairs += [(node, make_rule("linear", "gradient")) for node in rules if node.kind == "linear"]
    for node, rule in pairs:
        kernel = KERNELS.get(type(rule))
        if kernel is None or kernel_reasons(node, rule):
            continue
        shapes = op.call([images], dtype, node=node).shapes
        made = tuple(random(targets, *shapes[v.index], seed=i) for i, v in enumerate(node.outputs))
        relevance = each(lambda r: r.to(dtype), made if len(made) > 1 else made[0])
        calls = [op.call([images], dtype, node=node) for _ in range(2)]
        got, want = kernel(rule, calls[0], relevance), rule.propagate(calls[1], relevance)
        assert_parts(got, want, TOLERANCE[dtype])
        assert calls[0].maps.keys() == calls[1].maps.keys()
        for name, found in calls[0].maps.items():
            assert_near(found, calls[1].maps[name], TOLERANCE[dtype])
        seen[type(rule)] += 1
    assert set(seen) == {LinearAlphaBeta, Gradient, AddNormalised, FanoutEpsilon, AttentionComposed}
    assert seen[LinearAlphaBeta] >= 8 and seen[AddNormalised] >= 4 and seen[FanoutEpsilon] >= 4


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_kernels_read_half_precision(half: torch.dtype) -> None:
    """A half precision model: its saved tensors as they are, streams in float32, results as of the rule on casts."""
    op, images = vit_op(), random(3, 3, 32, 32, seed=1)
    for node, rule in find_composite("chefer").assign(op.graph).items():
        kernel = KERNELS.get(type(rule))
        if kernel is None or kernel_reasons(node, rule):
            continue
        calls = [op.call([images], half, node=node) for _ in range(2)]
        for call in calls:
            call.dtype = torch.float32
        shapes = calls[0].shapes
        made = tuple(random(2, *shapes[v.index], seed=i).float() for i, v in enumerate(node.outputs))
        relevance = made if len(made) > 1 else made[0]
        assert_parts(kernel(rule, calls[0], relevance), rule.propagate(calls[1], relevance), TOLERANCE[torch.float32])


@pytest.mark.parametrize("rule", [LinearAlphaBeta(2.0, 1.0, REFERENCE), LinearAlphaBeta(stabiliser=EXACT)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_parameters(rule: LinearAlphaBeta, dtype: torch.dtype) -> None:
    op, images = vit_op(), random(3, 3, 32, 32, seed=1)
    for node in [n for n in op.graph.nodes if n.kind == "linear"]:
        calls = [op.call([images], dtype, node=node) for _ in range(2)]
        relevance = random(3, *calls[0].y.shape).to(dtype)
        got, want = KERNELS[LinearAlphaBeta](rule, calls[0], relevance), rule.propagate(calls[1], relevance)
        assert_parts(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "wanted", [(True, True, True, False), (False, False, True, False), (True, False, False, False)]
)
def test_attention_only_what_is_wanted(wanted: tuple[bool, ...]) -> None:
    op, images, rule = vit_op(), random(2, 3, 32, 32), AttentionComposed()
    node = op.graph.attention_sites()[0]
    calls = [op.call([images], node=node) for _ in range(2)]
    for call in calls:
        call.wanted = wanted
    relevance = random(2, *calls[0].y.shape)
    got, want = KERNELS[AttentionComposed](rule, calls[0], relevance), rule.propagate(calls[1], relevance)
    assert_parts(got, want, 1e-10)
    assert [part is not None for part in got] == list(wanted)
    assert_near(calls[0].maps["relevance"], calls[1].maps["relevance"], 1e-10)


@pytest.mark.parametrize("stabiliser", [Stabiliser(), EXACT, REFERENCE])
def test_attention_where_products_cancel_to_the_bit(stabiliser: Stabiliser) -> None:
    q = torch.tensor([[[[1.0, 1.0], [1.0, 2.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[1.0, -1.0], [0.5, 1.0]]]], dtype=torch.float64)
    inputs = [q, k, random(1, 1, 2, 2)]
    op = Op(module_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 3), *inputs, kind="attention")
    rule, relevance = with_stabiliser(AttentionComposed(), stabiliser), op.relevance(inputs, 3)
    got, want = KERNELS[AttentionComposed](rule, op.call(inputs), relevance), rule.propagate(op.call(inputs), relevance)
    assert_parts(got[:3], want[:3], 1e-12)


@pytest.mark.parametrize("composite", ["chefer", "chefer_stable"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_whole_explanation(composite: str, dtype: torch.dtype) -> None:
    """Both backends on one model. Forty steps that each may amplify what the step above rounded."""
    model, images = vit(depth=2).to(dtype), random(3, 3, 32, 32, seed=2).to(dtype)
    found = {}
    for backend in ("cpp", "torch"):
        engine = relprop.compile(model, (images,), composite=composite, backend=backend)
        used = {stream.backend for step in engine.program.reverse for stream in step.streams}
        assert used == ({"cpp", "torch"} if backend == "cpp" else {"torch"})
        found[backend] = engine(images, target=torch.tensor([[0, 9]] * 3)).relevance
    assert_near(found["cpp"], found["torch"], 2e-2 if dtype == torch.float32 else 1e-9)


def test_reasons_against_a_node() -> None:
    """Where the kernel does not take a node, it says all the reasons."""
    op = vit_op()
    conv = op.node
    linear = next(n for n in op.graph.nodes if n.kind == "linear")
    attention = op.graph.attention_sites()[0]
    fanout = next(n for n in op.graph.nodes if n.kind == "fanout")
    assert kernel_reasons(linear, LinearAlphaBeta()) == []
    assert kernel_reasons(conv, LinearAlphaBeta(bias=True)) == [
        "the kernel is for linear layers",
        "the kernel has no bias share and one denominator",
    ]
    assert kernel_reasons(fanout, FanoutEpsilon(EXACT)) == ["a plain sum needs no kernel"]
    composed = AttentionComposed(qk=MatmulAlphaBeta(), softmax=SoftmaxDetached())
    assert kernel_reasons(attention, composed) == [
        "the kernel is for the rule half in both products",
        "the kernel is for the softmax rule identity",
    ]


def test_what_the_kernel_does_not_take_runs_in_torch() -> None:
    model, images = vit(depth=1), random(2, 3, 32, 32).float()
    rules = find_composite("chefer").overridden(relprop.entry("linear", "alpha_beta", bias=True), name="with-bias")
    assert isinstance(rules, Composite)
    engine = relprop.compile(model, (images,), composite=rules, backend="cpp")
    steps = [(s.node, stream) for s in engine.program.reverse for stream in s.streams if stream.stream == "relevance"]
    assert {stream.backend for node, stream in steps if node.kind == "linear"} == {"torch"}
    assert {stream.backend for node, stream in steps if node.kind == "attention"} == {"cpp"}
