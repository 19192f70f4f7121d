from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.rules import MulDetachedGate
from relprop.rules.stabiliser import Stabiliser
from tests.rules.rule_checks import SIZES, Op, Parts, check_ledger, check_rule, module_of, random
from tests.rules.test_mul_half import CASES, handed_out, mul_op, operands


def _shared_gate(a: Tensor, b: Tensor) -> Tensor:
    gate = torch.sigmoid(a)
    return torch.cat([gate.unflatten(-1, (7, 1)).squeeze(-1) * b, gate], -1)


# Function of two inputs, and which factor is the gate.
GATES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "first": (lambda a, b: F.silu(a) * b, 0),
    "second": (lambda a, b: a * F.silu(b), 1),
    "softmax": (lambda a, b: a * b.softmax(-1), 1),
    "through-fanout-and-movement": (_shared_gate, 0),
    "none": (lambda a, b: a * b, 0),
    "both": (lambda a, b: torch.tanh(a) * torch.sigmoid(b), 0),
}


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("name", GATES)
def test_formula(name: str, batch: int, targets: int) -> None:
    function, gate = GATES[name]
    op = Op(module_of(function, 2), random(2, 3, 7), random(2, 3, 7), kind="mul")
    inputs = [random(batch, 3, 7, seed=i, zeros=True) for i in (1, 2)]

    def oracle(relevance: Tensor, *inputs: Tensor) -> Parts:
        parts = [relevance, relevance]
        parts[gate] = torch.zeros_like(relevance)
        return tuple(parts)

    check_rule(op, MulDetachedGate(), inputs, op.relevance(inputs, targets), oracle)


@pytest.mark.parametrize("name", [name for name, (_, _, carrying) in CASES.items() if sum(carrying) == 1])
def test_constant_factor_is_no_gate(name: str) -> None:
    op, inputs = mul_op(name), operands(name, 4)
    check_rule(op, MulDetachedGate(), inputs, op.relevance(inputs, 3), lambda r, *inputs: handed_out(name, [r], inputs))


@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str) -> None:
    op, inputs = mul_op(name), operands(name, 4)
    entry = check_ledger(op, MulDetachedGate(), inputs, op.relevance(inputs, 3), [])
    torch.testing.assert_close(entry.passed, entry.arriving, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stabiliser", [Stabiliser(0.1), Stabiliser(0.1, "reference")])
def test_stabiliser(stabiliser: Stabiliser) -> None:
    """With an epsilon the value gets y / (y + epsilon) of all, and the ledger has the rest."""
    rule = MulDetachedGate(stabiliser)
    op = Op(module_of(lambda a, b: F.silu(a) * b, 2), random(2, 3, 7), random(2, 3, 7), kind="mul")
    inputs = [random(4, 3, 7, seed=i) for i in (1, 2)]
    relevance = op.relevance(inputs, 3)
    y = F.silu(inputs[0]) * inputs[1]
    sign = y.sign() if stabiliser.kind == "signed" else 1.0
    check_rule(op, rule, inputs, relevance, lambda r, *_: (0 * r, r * y / (y + 0.1 * sign)))
    check_ledger(op, rule, inputs, relevance, ["epsilon"])
