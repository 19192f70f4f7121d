"""The closed forms of every kind against automatic differentiation of the operation itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relprop
from relprop.rules import Gradient
from relprop.rules.gradient import _FORMS, _NEEDS
from tests.engine.models import vit
from tests.rules import add_checks, linear_checks, test_attention_composed, test_matmul_half, test_mul_half
from tests.rules.rule_checks import (
    SIZES,
    Op,
    Parts,
    assert_near,
    by_autograd,
    check_gradient,
    check_ledger,
    check_rule,
    module_of,
    random,
)

# Kind, how to capture one, shapes of one sample's inputs.
Made = tuple[str, Callable[[], Op], tuple[tuple[int, ...], ...]]


def made(kind: str, function: Callable[..., Tensor] | nn.Module, *shapes: tuple[int, ...]) -> Made:
    def op() -> Op:
        module = function if isinstance(function, nn.Module) else module_of(function, len(shapes))
        return Op(module, *[random(2, *shape) for shape in shapes], kind=kind)

    return kind, op, shapes


CASES: dict[str, Made] = {
    **{
        f"linear-map-{name}": (
            "linear" if name.startswith("linear") else "conv",
            functools.partial(linear_checks.linear_op, name),
            (case.shape,),
        )
        for name, case in linear_checks.CASES.items()
    },
    **{
        f"add-{name}": ("add", functools.partial(add_checks.add_op, name), case.shapes)
        for name, case in add_checks.CASES.items()
    },
    **{
        f"mul-{name}": ("mul", functools.partial(test_mul_half.mul_op, name), case[1])
        for name, case in test_mul_half.CASES.items()
    },
    **{
        f"matmul-{name}": ("matmul", functools.partial(test_matmul_half.matmul_op, name), shapes)
        for name, shapes in test_matmul_half.SHAPES.items()
    },
    **{
        f"attention-{name}": ("attention", functools.partial(test_attention_composed.attention_op, name), case.shapes)
        for name, case in test_attention_composed.CASES.items()
    },
    "softmax": made("softmax", lambda x: x.softmax(-1), (3, 63)),
    "softmax-axis": made("softmax", lambda x: x.softmax(1), (3, 7)),
    "layer-norm": made("norm", nn.LayerNorm(63), (7, 63)),
    "layer-norm-plain": made("norm", nn.LayerNorm(7, elementwise_affine=False), (7,)),
    "layer-norm-short": made("norm", lambda x: torch.layer_norm(x, (7,)), (3, 7)),
    "layer-norm-two-axes": made("norm", nn.LayerNorm((3, 7), eps=1e-2), (3, 7)),
    "rms-norm": made("norm", nn.RMSNorm(7), (3, 7)),
    "group-norm": made("norm", nn.GroupNorm(2, 4), (4, 3, 3)),
    "batch-norm": made("norm", nn.BatchNorm2d(3), (3, 5, 5)),
    "gelu": made("activation", F.gelu, (3, 7)),
    "gelu-tanh": made("activation", lambda x: F.gelu(x, approximate="tanh"), (3, 7)),
    "relu": made("activation", F.relu, (3, 7)),
    "silu": made("activation", F.silu, (3, 7)),
    "quick-gelu": made("activation", lambda x: x * torch.sigmoid(1.702 * x), (3, 7)),
    "mean": made("pool", lambda x: x.mean(1), (7, 5)),
    "maximum": made("pool", lambda x: F.max_pool2d(x, 2), (3, 4, 6)),
    "fanout": made("fanout", lambda x: x.flip(-1) + x.roll(1, -1), (3, 7)),
    "select": made("select", lambda x: x[:, 0], (7, 5)),
    "transpose": made("movement", lambda x: x.transpose(1, 2), (3, 7)),
}


@functools.cache
def op_of(name: str) -> Op:
    return CASES[name][1]()


def inputs_of(name: str, batch: int) -> list[Tensor]:
    """Numbers at least 0.1 away from the kinks and poles at 0."""
    made = [random(batch, *shape, seed=batch + i) for i, shape in enumerate(CASES[name][2])]
    return [torch.where(x < 0, x.clamp(max=-0.1), x.clamp(min=0.1)) for x in made]


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, batch: int, targets: int) -> None:
    op, inputs = op_of(name), inputs_of(name, batch)

    def oracle(relevance: Any, *inputs: Tensor) -> Parts:
        return by_autograd(op, relevance, inputs)

    check_rule(op, Gradient(), inputs, op.relevance(inputs, targets), oracle)


def test_every_kind_with_a_closed_form_is_covered() -> None:
    assert set(_FORMS) - {kind for kind, _, _ in CASES.values()} == {"embedding"}  # which ends the pass
    assert set(_FORMS) | {"pool"} == set(_NEEDS)


def test_embedding_ends_the_pass() -> None:
    op = Op(nn.Embedding(11, 3), torch.ones(2, 7, dtype=torch.long), kind="embedding")
    assert Gradient().propagate(op.call([torch.ones(4, 7, dtype=torch.long)]), random(3, 4, 7, 3)) == (None, None)


@pytest.mark.parametrize("name", ["linear-map-linear", "layer-norm", "gelu", "softmax"])
def test_ledger(name: str) -> None:
    op, inputs = op_of(name), inputs_of(name, 4)
    entry = check_ledger(op, Gradient(), inputs, op.relevance(inputs, 3), ["rule"])
    assert_near(entry.absorbed["rule"], entry.arriving - entry.passed, 1e-12)


@pytest.mark.parametrize("name", ["linear-map-linear-one", "softmax-axis", "mul-quotient", "gelu", "layer-norm-plain"])
def test_second_derivative(name: str) -> None:
    op, inputs = op_of(name), inputs_of(name, 2)
    check_gradient(op, Gradient(), inputs, op.relevance(inputs, 1))


def test_whole_model() -> None:
    """The composite "gradient" down to the pixels is the gradient of the logits, every target and sample."""
    model, images = vit(depth=2).double(), random(2, 3, 32, 32)
    target = torch.tensor([[1, 7], [4, 0]])
    found = relprop.compile(model, (images,), method="full", composite="gradient")(images, target=target).relevance
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    for column in range(2):
        chosen = logits[torch.arange(2), target[:, column]].sum()
        gradient = torch.autograd.grad(chosen, leaf, retain_graph=True)[0]
        assert_near(found[:, column], gradient.sum(1), 1e-11)
