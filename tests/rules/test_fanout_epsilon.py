from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from relprop.rules import EXACT, REFERENCE, FanoutEpsilon, Stabiliser
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

MODULES: dict[str, Callable[[Tensor], Tensor]] = {
    "two": lambda x: x.flip(-1) + x.roll(1, -1),
    "three": lambda x: x.flip(-1) + x.roll(1, -1) + x.roll(2, -1),
    "twice-in-one": lambda x: torch.cat([x, x], -1),
}
RULES = {
    "default": FanoutEpsilon(),
    "reference": FanoutEpsilon(REFERENCE),
    "coarse": FanoutEpsilon(Stabiliser(0.1)),
}


@functools.cache
def fanout_op(name: str, *shape: int) -> Op:
    return Op(module_of(MODULES[name]), random(2, *shape), kind="fanout")


def gathered(rule: FanoutEpsilon, relevance: tuple[Tensor | None, ...], x: Tensor) -> Parts:
    total = sum(part for part in relevance if part is not None)
    assert isinstance(total, Tensor)
    return (total if rule.stabiliser == EXACT else x * divide(total, x, rule.stabiliser),)


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", [(1,), (3, 63)])
@pytest.mark.parametrize("name", MODULES)
def test_formula(name: str, shape: tuple[int, ...], rule: FanoutEpsilon, batch: int, targets: int) -> None:
    op, x = fanout_op(name, *shape), random(batch, *shape, seed=1, zeros=True)
    assert len(op.node.outputs) == (3 if name == "three" else 2)
    check_rule(op, rule, [x], op.relevance([x], targets), functools.partial(gathered, rule))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_uses_that_nothing_arrived_from(rule: FanoutEpsilon) -> None:
    op, x = fanout_op("three", 7), random(4, 7, zeros=True)
    first, _, third = op.relevance([x], 3)
    for relevance in ((first, None, third), (None, None, third)):
        got = rule.propagate(op.call([x]), relevance)[0]
        want = gathered(rule, relevance, x)[0]
        assert got is not None and want is not None
        assert_near(got, want, 1e-12)


def test_ledger() -> None:
    op, x = fanout_op("three", 7), random(4, 7, zeros=True)
    relevance = op.relevance([x], 3)
    exact = check_ledger(op, FanoutEpsilon(), [x], relevance, [])
    assert_near(exact.passed, exact.arriving, 1e-12)
    entry = check_ledger(op, RULES["reference"], [x], relevance, ["epsilon"])
    lost = sum(r for r in relevance) * (x == 0)  # the reference drops what reaches an exact zero
    assert_near(entry.absorbed["epsilon"], lost.sum(-1), 1e-6)


def test_gradient() -> None:
    op, x = fanout_op("two", 7), random(2, 7)
    rule = RULES["coarse"]

    class Both(FanoutEpsilon):
        def propagate(self, call: object, relevance: Tensor) -> Parts:  # type: ignore[override]
            return rule.propagate(call, (relevance, 2 * relevance))  # type: ignore[arg-type]

    check_gradient(op, Both(), [x], op.relevance([x], 2)[0])
