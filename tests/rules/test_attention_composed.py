from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relprop.composites import Composite, entry
from relprop.rules import (
    EXACT,
    REFERENCE,
    AddEpsilon,
    AddIdentity,
    AddNormalised,
    AttentionComposed,
    MatmulAlphaBeta,
    MatmulHalf,
    SoftmaxDetached,
    SoftmaxTaylor,
    Stabiliser,
)
from relprop.rules.attention_composed import attention_gradient
from tests.rules.rule_checks import (
    SIZES,
    Op,
    Parts,
    assert_near,
    assert_parts,
    check_gradient,
    check_ledger,
    check_rule,
    divide,
    module_of,
    random,
)

MASK = torch.ones(5, 7, dtype=torch.bool)
MASK[1:, 2] = False
MASK[3] = False  # a query that sees no key: its output is 0, and its relevance goes nowhere


@dataclass(frozen=True)
class Case:
    """One way to call attention, on shapes of one sample's q, k and v."""

    shapes: tuple[tuple[int, ...], ...] = ((3, 5, 4), (3, 7, 4), (3, 7, 6))
    options: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None

    @property
    def scale(self) -> float:
        return self.options.get("scale", self.shapes[0][-1] ** -0.5)


CASES = {
    "plain": Case(),
    "one-token": Case(((1, 1, 1), (1, 1, 1), (1, 1, 1))),
    "no-heads": Case(((63, 4), (63, 4), (63, 4))),
    "scale": Case(options={"scale": 0.25}),
    "seen": Case(mask=MASK),
    "additive": Case(mask=random(5, 7, seed=9)),
    "additive-infinite": Case(mask=torch.where(MASK, 0.5, -torch.inf).double()),
    "causal": Case(((2, 6, 4), (2, 6, 4), (2, 6, 3)), {"is_causal": True}),
    "grouped": Case(((6, 5, 4), (2, 7, 4), (2, 7, 6)), {"enable_gqa": True}),
}
RULES = {
    "half": AttentionComposed(),
    "half-reference": AttentionComposed(qk=MatmulHalf(REFERENCE), av=MatmulHalf(REFERENCE)),
    "half-exact": AttentionComposed(qk=MatmulHalf(EXACT), av=MatmulHalf(EXACT)),
    "alpha-beta": AttentionComposed(qk=MatmulAlphaBeta()),
    "alpha-beta-both": AttentionComposed(qk=MatmulAlphaBeta(), av=MatmulAlphaBeta()),
    "taylor": AttentionComposed(softmax=SoftmaxTaylor()),
    "detached": AttentionComposed(softmax=SoftmaxDetached()),
    "mask-normalised": AttentionComposed(mask=AddNormalised(REFERENCE)),
    "mask-epsilon": AttentionComposed(mask=AddEpsilon(Stabiliser(0.01))),
}


@functools.cache
def attention_op(name: str) -> Op:
    case = CASES[name]

    def run(q: Tensor, k: Tensor, v: Tensor, **constants: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, constants.get("mask"), **case.options)

    constants = {} if case.mask is None else {"mask": case.mask.clone()}
    inputs = [random(2, *shape) for shape in case.shapes]
    return Op(module_of(run, 3, **constants), *inputs, kind="attention")


def operands(name: str, batch: int) -> list[Tensor]:
    return [random(batch, *shape, seed=batch + i) for i, shape in enumerate(CASES[name].shapes)]


def grouped(case: Case, *tensors: Tensor) -> list[Tensor]:
    """Keys and values once per query head."""
    if not case.options.get("enable_gqa"):
        return list(tensors)
    return [t[:, [h // 3 for h in range(6)]] for t in tensors]


def gathered(case: Case, part: Tensor) -> Tensor:
    if not case.options.get("enable_gqa"):
        return part
    return torch.stack([part[:, :, :3].sum(2), part[:, :, 3:].sum(2)], 2)


def logits_of(case: Case, dots: Tensor) -> Tensor:
    logits = dots * case.scale
    if case.mask is not None:
        bias = torch.zeros(5, 7).double().masked_fill(~case.mask, -torch.inf) if case.mask is MASK else case.mask
        logits = logits + bias
    if case.options.get("is_causal"):
        rows, columns = logits.shape[-2:]
        for i in range(rows):
            for j in range(i + 1, columns):
                logits[..., i, j] = -torch.inf
    return logits


def summands_of(case: Case, dots: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled scores and the mask that is added to them, 0 where nothing is seen."""
    mask = logits_of(case, dots) - dots * case.scale
    return dots * case.scale, torch.where(torch.isinf(mask), 0.0, mask)


def at_scores(rule: Any, relevance: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """What the mask's addition leaves to the scores."""
    if isinstance(rule, AddIdentity):
        return relevance
    s = divide(relevance, scores + mask, rule.stabiliser)
    a, b = scores * s, mask * s
    if isinstance(rule, AddEpsilon):
        return a
    axes = tuple(range(2, a.ndim))  # of one sample
    sum_a, sum_b, total = (part.sum(axes, keepdim=True) for part in (a, b, relevance))
    kept = divide(sum_a.abs(), sum_a.abs() + sum_b.abs(), rule.stabiliser) * total
    return a * divide(kept, sum_a, rule.stabiliser)


def products(left: Tensor, right: Tensor, rule: Any) -> Tensor:
    """left[i, k] right[k, j] as the rule counts them. [..., M, K, N]"""
    z = left[..., :, :, None] * right[..., None, :, :]
    return z.clamp(min=0) if isinstance(rule, MatmulAlphaBeta) else z


def expected(case: Case, rule: AttentionComposed, relevance: Tensor, *inputs: Tensor) -> Parts:
    q, (k, v) = inputs[0], grouped(case, *inputs[1:])
    av, qk = rule.av, rule.qk
    assert isinstance(av, (MatmulHalf, MatmulAlphaBeta)) and isinstance(qk, (MatmulHalf, MatmulAlphaBeta))
    logits = logits_of(case, q @ k.mT)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True).clamp(min=1e-300)
    through_values = products(p, v, av)
    shares = through_values * divide(relevance, through_values.sum(-2), av.stabiliser)[..., :, None, :]
    at_map, at_values = shares.sum(-1) / 2, shares.sum(-3) / 2
    if isinstance(rule.softmax, SoftmaxDetached):
        return None, None, gathered(case, 2 * at_values), None
    if isinstance(rule.softmax, SoftmaxTaylor):
        # What a mask adds to a logit is its share of it, and stays there.
        at_map = case.scale * (q @ k.mT) * (at_map - p * at_map.sum(-1, keepdim=True))
    at_map = at_scores(rule.mask, at_map, *summands_of(case, q @ k.mT))
    through_scores = products(q, k.mT, qk)
    scores = divide(at_map, through_scores.sum(-2), qk.stabiliser)[..., :, None, :] * through_scores
    at_keys = gathered(case, scores.sum(-3).mT / 2)
    return scores.sum(-1) / 2, at_keys, gathered(case, at_values), None


def settled(case: Case, rule: AttentionComposed) -> Callable[..., Tensor]:
    """Queries none of whose products cancels, in either product."""

    def of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = grouped(case, k, v)
        p = logits_of(case, q @ k.mT).softmax(-1)
        keeps = []
        for left, right, part in ((p, v, rule.av), (q, k.mT, rule.qk)):
            z, size = products(left, right, part).sum(-2), products(left.abs(), right.abs(), part).sum(-2)
            keeps.append(((z.abs() > size / 100) | isinstance(part, MatmulAlphaBeta)).all(-1, keepdim=True))
        if not isinstance(rule.mask, AddIdentity):
            scores, mask = summands_of(case, q @ k.mT)
            settles = (scores + mask).abs() > (scores.abs() + mask.abs()) / 100
            keeps[0] = keeps[0] & settles.all(tuple(range(1, p.ndim)), keepdim=True)  # one sum serves the whole sample
        return keeps[0] & keeps[1]

    return of


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: AttentionComposed, batch: int, targets: int) -> None:
    op, inputs = attention_op(name), operands(name, batch)

    def oracle(relevance: Tensor, *inputs: Tensor) -> Parts:
        want = expected(CASES[name], rule, relevance, *inputs)
        return want if len(op.node.operands) == 4 else want[:3]

    check_rule(op, rule, inputs, op.relevance(inputs, targets), oracle, settled(CASES[name], rule))


@pytest.mark.parametrize("stabiliser", [Stabiliser(), Stabiliser(0.1), EXACT, REFERENCE])
def test_query_and_key_that_cancel_to_the_bit(stabiliser: Stabiliser) -> None:
    """A product of exactly 0 from parts that are not: the stabiliser alone says what its share is."""
    q = torch.tensor([[[[1.0, 1.0], [1.0, 2.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[1.0, -1.0], [0.5, 1.0]]]], dtype=torch.float64)
    inputs = [q, k, random(1, 1, 2, 2)]
    op = Op(module_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 3), *inputs, kind="attention")
    rule = AttentionComposed(qk=MatmulHalf(stabiliser), av=MatmulHalf(stabiliser))
    relevance = op.relevance(inputs, 3)
    want = expected(Case(((1, 2, 2),) * 3), rule, relevance, *inputs)
    assert_parts(rule.propagate(op.call(inputs), relevance), want[: len(op.node.operands)], 1e-10)


def test_epsilon_in_units_of_the_scaled_product() -> None:
    """As in code that scales the queries first; the layer's node knows by how much."""
    op, inputs = attention_op("scale"), operands("scale", 2)
    q, k, _ = inputs
    relevance, coarse = op.relevance(inputs, 2), Stabiliser(0.1)
    found = {}
    for scaled in (True, False):
        composite = Composite(
            "own",
            (
                entry("matmul", "half", role="qk", stabiliser=coarse, scaled=scaled),
                entry("matmul", "half"),
                entry("softmax", "identity"),
            ),
        )
        rule, call = composite._attention(op.node), op.call(inputs)
        assert rule is not None
        part = rule.propagate(call, relevance)[0]
        assert part is not None
        found[scaled] = part
    scaled_q = 0.25 * q
    s = divide(call.maps["relevance"], scaled_q @ k.mT, coarse)  # the map's own rule is the same in both
    assert_near(found[True], scaled_q * (s @ k) / 2, 1e-12)
    assert (found[True] - found[False]).norm() > 1e-2 * found[True].norm()


def test_map_is_left_for_the_read_out() -> None:
    op, inputs = attention_op("plain"), operands("plain", 4)
    call, relevance = op.call(inputs), op.relevance(inputs, 3)
    AttentionComposed().propagate(call, relevance)
    p = (inputs[0] @ inputs[1].mT / 2).softmax(-1)
    z = products(p, inputs[2], MatmulHalf())
    at_map = (z * divide(relevance, z.sum(-2), Stabiliser())[..., :, None, :]).sum(-1) / 2
    assert_near(call.maps["attention"], p[None], 1e-12)
    assert_near(call.maps["relevance"], at_map, 1e-10)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["plain", "seen", "causal", "grouped"])
def test_ledger(name: str, rule: AttentionComposed) -> None:
    op, inputs = attention_op(name), operands(name, 4)
    causes = ["epsilon", "rule"] if isinstance(rule.softmax, SoftmaxTaylor) else ["epsilon"]
    if not isinstance(rule.mask, AddIdentity):
        causes.append("constant")
    entry = check_ledger(op, rule, inputs, op.relevance(inputs, 3), causes)
    if name == "plain" and rule in (RULES["half"], RULES["detached"]):
        assert_near(entry.passed, entry.arriving, 1e-5)


class LearnedQueries(nn.Module):
    """Attention pooling: the queries are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(random(1, 3, 5, 4))

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q.expand(k.shape[0], -1, -1, -1), k, v)


def test_learned_queries_absorb_their_part() -> None:
    inputs = [random(4, 3, 7, 4, seed=1), random(4, 3, 7, 6, seed=2)]
    module = LearnedQueries()
    op = Op(module, *inputs, kind="attention")
    relevance = op.relevance(inputs, 3)
    entry = check_ledger(op, AttentionComposed(), inputs, relevance, ["constant", "epsilon"])
    want = expected(CASES["plain"], AttentionComposed(), relevance, module.q.detach().expand(4, -1, -1, -1), *inputs)
    assert want[0] is not None
    assert_near(entry.absorbed["constant"], want[0].flatten(2).sum(-1), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_gradient_in_closed_form(name: str) -> None:
    op, inputs = attention_op(name), operands(name, 4)
    relevance = op.relevance(inputs, 3)
    call = op.call(inputs)
    found = attention_gradient(call, relevance)
    leaves = [x.clone().requires_grad_() for x in inputs]
    rows = [torch.autograd.grad(op.module(*leaves), leaves, g) for g in relevance]
    assert_parts(found[:3], tuple(torch.stack(row) for row in zip(*rows, strict=True)), 1e-11)


@pytest.mark.parametrize(
    "rule",
    [
        AttentionComposed(MatmulHalf(Stabiliser(0.1)), av=MatmulHalf(Stabiliser(0.1))),
        AttentionComposed(MatmulHalf(Stabiliser(0.1)), SoftmaxTaylor(), MatmulHalf(Stabiliser(0.1))),
        AttentionComposed(softmax=SoftmaxDetached(), av=MatmulHalf(Stabiliser(0.1))),
    ],
    ids=["half", "taylor", "detached"],
)
def test_gradient(rule: AttentionComposed) -> None:
    inputs = [random(1, 2, n, 3, seed=i) for i, n in enumerate((2, 3, 3))]
    op = Op(module_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 3), *inputs, kind="attention")
    check_gradient(op, rule, inputs, op.relevance(inputs, 2))
