from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import REFERENCE, AddNormalised, Stabiliser
from tests.rules.add_checks import CASES, add_op, handed_out, operands, settled
from tests.rules.rule_checks import (
    SIZES,
    Op,
    Parts,
    assert_near,
    check_gradient,
    check_ledger,
    check_rule,
    divide,
    module_of,
    random,
)

RULES = {
    "default": AddNormalised(),
    "coarse": AddNormalised(Stabiliser(0.01)),
    "reference": AddNormalised(REFERENCE),
}


def one_sample(rule: AddNormalised, relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rule for one target and one sample, as the paper has it."""
    s = divide(relevance, a + b, rule.stabiliser)
    a, b = a * s, b * s
    size = a.sum().abs() + b.sum().abs()
    keep_a = divide(a.sum().abs(), size, rule.stabiliser) * relevance.sum()
    keep_b = divide(b.sum().abs(), size, rule.stabiliser) * relevance.sum()
    return a * divide(keep_a, a.sum(), rule.stabiliser), b * divide(keep_b, b.sum(), rule.stabiliser)


def expected(name: str, rule: AddNormalised, relevance: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    a, b = CASES[name].summands(*inputs)
    rows = [[one_sample(rule, r, a[i], b[i]) for i, r in enumerate(target)] for target in relevance]
    first, second = (torch.stack([torch.stack([pair[at] for pair in row]) for row in rows]) for at in (0, 1))
    return first, second


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: AddNormalised, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, *inputs: Tensor) -> Parts:
        return handed_out(name, expected(name, rule, relevance, *inputs), inputs)

    op, inputs = add_op(name), operands(name, batch)
    check_rule(op, rule, inputs, op.relevance(inputs, targets), oracle, settled(name))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str, rule: AddNormalised) -> None:
    op, inputs = add_op(name), operands(name, 4)
    relevance = op.relevance(inputs, 3)
    constant = CASES[name].carrying == 1
    entry = check_ledger(op, rule, inputs, relevance, ["epsilon", "constant"] if constant else ["epsilon"])
    parts = expected(name, rule, relevance, *inputs)
    leak = relevance.flatten(2).sum(-1) - sum(part.flatten(2).sum(-1) for part in parts)
    torch.testing.assert_close(entry.absorbed["epsilon"], leak, rtol=1e-8, atol=1e-10)
    if constant:
        assert_near(entry.absorbed["constant"], parts[0 if name == "bias" else 1].flatten(2).sum(-1), 1e-10)


def test_branches_of_opposite_sums() -> None:
    """What each branch gets sums to its share of the size of both, and both together to all of R."""
    op, a = add_op("one"), torch.tensor([[3.0], [-3.0]], dtype=torch.float64)
    relevance = torch.tensor([[[2.0], [5.0]]], dtype=torch.float64)
    first, second = AddNormalised().propagate(op.call([a, -a / 3]), relevance)
    assert first is not None and second is not None
    assert_near(first, relevance * 0.75, 1e-7)
    assert_near(second, relevance * 0.25, 1e-7)


def test_samples_inside_another_axis() -> None:
    """Windows: two per sample on the first axis, whose sums belong to one sample."""
    windowed = Op(
        module_of(lambda a, b: a.reshape(-1, 3) + b.reshape(-1, 3), 2), random(2, 6), random(2, 6), kind="add"
    )
    plain = Op(module_of(lambda a, b: a + b, 2), random(2, 6), random(2, 6), kind="add")
    inputs, relevance = [random(4, 6, seed=1), random(4, 6, seed=2)], random(3, 4, 6, seed=3)
    found = AddNormalised().propagate(windowed.call(inputs), relevance.reshape(3, 8, 3))
    want = AddNormalised().propagate(plain.call(inputs), relevance)
    for one, other in zip(found, want, strict=True):
        assert one is not None and other is not None
        assert_near(one.reshape(3, 4, 6), other, 1e-12)


def test_samples_on_another_axis() -> None:
    moved = Op(module_of(lambda a, b: a.mT + b.mT, 2), random(2, 5, 1), random(2, 5, 1), kind="add")
    assert moved.node.outputs[0].sample is not None and moved.node.outputs[0].sample.axis == 0
    turned = Op(
        module_of(lambda a, b: a.transpose(0, 1) + b.transpose(0, 1), 2), random(2, 5, 3), random(2, 5, 3), kind="add"
    )
    plain = Op(module_of(lambda a, b: a + b, 2), random(2, 5, 3), random(2, 5, 3), kind="add")
    assert turned.node.outputs[0].sample is not None and turned.node.outputs[0].sample.axis == 1
    inputs, relevance = [random(4, 5, 3, seed=1), random(4, 5, 3, seed=2)], random(3, 4, 5, 3, seed=3)
    found = AddNormalised().propagate(turned.call(inputs), relevance.transpose(1, 2))
    want = AddNormalised().propagate(plain.call(inputs), relevance)
    for one, other in zip(found, want, strict=True):
        assert one is not None and other is not None
        assert_near(one.transpose(1, 2), other, 1e-12)


def test_gradient() -> None:
    op, inputs = add_op("broadcast"), operands("broadcast", 2, zeros=False)
    check_gradient(op, AddNormalised(Stabiliser(0.1)), inputs, op.relevance(inputs, 2))
