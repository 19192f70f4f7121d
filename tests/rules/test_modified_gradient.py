"""Every rule with a gradient form: x times what the form makes of g is what the rule makes of R = y g."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relprop.rules import EXACT, AttentionComposed, MatmulHalf, Rule, SoftmaxDetached, SoftmaxTaylor, make_rule
from tests.rules.rule_checks import Op, assert_near, module_of, only_needed, random

TAYLOR = AttentionComposed(MatmulHalf(EXACT), SoftmaxTaylor(), MatmulHalf(EXACT))
DETACHED = AttentionComposed(MatmulHalf(EXACT), SoftmaxDetached(), MatmulHalf(EXACT))


def exact(kind: str, name: str, **parameters: float) -> Rule:
    return make_rule(kind, name, stabiliser=EXACT, **parameters)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def silu_gate(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


HEADS, PAIRS = ((4, 5, 3), (2, 5, 3), (2, 5, 3)), ((3, 7), (3, 7))
# Rule, module, kind of the node, shapes of one sample.
CASES: dict[str, tuple[Rule, Callable[[], nn.Module], str, tuple[tuple[int, ...], ...]]] = {
    "linear": (exact("linear", "epsilon"), lambda: nn.Linear(7, 5), "linear", ((3, 7),)),
    "conv": (exact("conv", "epsilon"), lambda: nn.Conv2d(2, 3, 2), "conv", ((2, 4, 4),)),
    "matmul": (exact("matmul", "half"), lambda: module_of(torch.matmul, 2), "matmul", ((3, 4), (4, 5))),
    "softmax": (SoftmaxTaylor(), lambda: module_of(lambda a: a.softmax(-1)), "softmax", ((3, 7),)),
    "softmax-detached": (SoftmaxDetached(), lambda: module_of(lambda a: a.softmax(-1)), "softmax", ((3, 7),)),
    "add": (exact("add", "epsilon"), lambda: module_of(torch.add, 2), "add", PAIRS),
    "difference": (exact("add", "epsilon"), lambda: module_of(torch.sub, 2), "add", PAIRS),
    "add-gamma": (exact("add", "gamma", gamma=1.0), lambda: module_of(torch.add, 2), "add", PAIRS),
    "difference-gamma": (exact("add", "gamma", gamma=0.5), lambda: module_of(torch.sub, 2), "add", PAIRS),
    "mul": (make_rule("mul", "half"), lambda: module_of(torch.mul, 2), "mul", PAIRS),
    "quotient": (make_rule("mul", "half"), lambda: module_of(torch.div, 2), "mul", PAIRS),
    "scale": (make_rule("mul", "half"), lambda: module_of(lambda a: a * 0.3), "mul", PAIRS[:1]),
    "gate": (make_rule("mul", "detached_gate"), lambda: module_of(silu_gate, 2), "mul", PAIRS),
    "layer-norm": (exact("norm", "sigma_constant"), lambda: nn.LayerNorm(7), "norm", ((3, 7),)),
    "rms-norm": (exact("norm", "sigma_constant"), lambda: nn.RMSNorm(7, eps=1e-6), "norm", ((3, 7),)),
    "gelu": (exact("activation", "slope"), lambda: nn.GELU(), "activation", ((3, 7),)),
    "sigmoid": (exact("activation", "slope"), lambda: nn.Sigmoid(), "activation", ((3, 7),)),
    "pool": (exact("pool", "epsilon"), lambda: module_of(lambda a: a.mean(1)), "pool", ((3, 7),)),
    "select": (exact("select", "epsilon"), lambda: module_of(lambda a: a[:, 1]), "select", ((3, 7),)),
    "movement": (make_rule("movement", "adjoint"), lambda: module_of(lambda a: a.flip(1)), "movement", ((3, 7),)),
    "attention": (TAYLOR, lambda: module_of(attention, 3), "attention", ((2, 5, 3),) * 3),
    "attention-grouped": (TAYLOR, lambda: module_of(grouped, 3), "attention", HEADS),
    "attention-detached": (DETACHED, lambda: module_of(attention, 3), "attention", ((2, 5, 3),) * 3),
}


@pytest.mark.parametrize("name", CASES)
def test_same_relevance(name: str) -> None:
    rule, build, kind, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [random(3, *shape, seed=i) for i, shape in enumerate(shapes)]
    op = Op(build(), *inputs, kind=kind)
    form = rule.gradient_form(op.node)
    assert form is not None
    call = op.call(inputs)
    g = random(2, *call.y.shape, seed=9)
    found, want = form.propagate(only_needed(op, form, inputs), g), rule.propagate(call, call.y * g)
    carrying = [i for i, value in enumerate(op.node.operands) if value is not None and value.carrying]
    for i in carrying:
        operand, part = call.operand(i), found[i]
        assert operand is not None
        expected = want[i] if want[i] is not None else torch.zeros(2, *operand.shape, dtype=torch.float64)
        assert_near(torch.zeros_like(expected) if part is None else operand * part, expected, 1e-9)
    assert form.describe()


def test_fanout() -> None:
    op = Op(module_of(lambda a: torch.cat([a, a.flip(1)], 1)), random(2, 3), kind="fanout")
    form = make_rule("fanout", "epsilon").gradient_form(op.node)
    assert form is not None
    parts = (random(1, 2, 3, seed=1), random(1, 2, 3, seed=2))
    assert torch.equal(form.propagate(op.call([random(2, 3)]), parts)[0], parts[0] + parts[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("linear", "epsilon"), ("linear", "alpha_beta"), ("add", "epsilon"), ("norm", "identity"), ("pool", "epsilon")],
)
def test_stabilised_rules_have_none(kind: str, name: str) -> None:
    op = Op(nn.Linear(7, 5), random(2, 7), kind="linear")
    assert make_rule(kind, name).gradient_form(op.node) is None
