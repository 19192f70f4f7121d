from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from relprop.rules import MulHalf
from tests.rules.rule_checks import SIZES, Op, Parts, check_ledger, check_rule, module_of, random

# Function, shapes of one sample, whether each operand of the node carries.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], tuple[bool, ...]]] = {
    "product": (lambda a, b: a * b, ((3, 63), (3, 63)), (True, True)),
    "one": (lambda a, b: a * b, ((1,), (1,)), (True, True)),
    "broadcast": (lambda a, b: a * b, ((3, 7), (1, 7)), (True, True)),
    "broadcast-both": (lambda a, b: a * b, ((3, 1), (1, 7)), (True, True)),
    "quotient": (lambda a, b: a / b, ((3, 7), (3, 7)), (True, True)),
    "scale": (lambda a: a * 0.5, ((3, 7),), (True,)),
    "divide": (lambda a: a / 3.0, ((3, 7),), (True,)),
    "negative": (lambda a: -a, ((3, 7),), (True,)),
    "layer-scale": (lambda a, scale: a * scale, ((3, 7),), (True, False)),
    "scale-first": (lambda a, scale: scale * a, ((3, 7),), (False, True)),
}
SCALE = random(7, seed=3)


@functools.cache
def mul_op(name: str) -> Op:
    function, shapes, carrying = CASES[name]
    constants = {} if all(carrying) else {"scale": SCALE.clone()}
    return Op(module_of(function, len(shapes), **constants), *[random(2, *s) for s in shapes], kind="mul")


def operands(name: str, batch: int) -> list[Tensor]:
    return [random(batch, *s, seed=i, zeros=name != "quotient") for i, s in enumerate(CASES[name][1])]


def handed_out(name: str, parts: list[Tensor], inputs: tuple[Tensor, ...]) -> Parts:
    """The parts of the carrying factors, summed over what was broadcast."""
    waiting = []
    for part, like in zip(parts, inputs, strict=True):
        for axis, size in enumerate(like.shape):
            if size == 1:
                part = part.sum(axis + 1, keepdim=True)
        waiting.append(part)
    return tuple(waiting.pop(0) if carries else None for carries in CASES[name][2])


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, *inputs: Tensor) -> Parts:
        return handed_out(name, [relevance / len(inputs)] * len(inputs), inputs)

    op, inputs = mul_op(name), operands(name, batch)
    check_rule(op, MulHalf(), inputs, op.relevance(inputs, targets), oracle)


@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str) -> None:
    op, inputs = mul_op(name), operands(name, 4)
    entry = check_ledger(op, MulHalf(), inputs, op.relevance(inputs, 3), [])
    torch.testing.assert_close(entry.passed, entry.arriving, rtol=1e-12, atol=1e-12)
