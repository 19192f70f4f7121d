"""The C++ kernels of the element-wise and row-wise rules against the rules, on captured operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relprop
from relprop import native
from relprop.backends.cpp import KERNELS, kernel_reasons
from relprop.rules import (
    EXACT,
    REFERENCE,
    ActivationSlope,
    AddEpsilon,
    AddGamma,
    Gradient,
    LinearEpsilon,
    LinearGamma,
    NormSigmaConstant,
    Rule,
    SoftmaxTaylor,
    Stabiliser,
)
from tests.engine.models import vit
from tests.rules.rule_checks import Op, assert_parts, module_of, random

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

# The same formulas, sums in another order; denominators are those of random inputs, some of which nearly cancel.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


@dataclass(frozen=True)
class Case:
    """A module with one operation of a kind, the shapes of its inputs, and the rules to try."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    kind: str
    rules: tuple[Rule, ...]


LINEAR = (
    LinearEpsilon(),
    LinearEpsilon(REFERENCE, bias=False),
    LinearGamma(),
    LinearGamma(0.5, EXACT, bias=False),
    Gradient(),
)
ADD = (AddEpsilon(), AddEpsilon(REFERENCE), AddGamma(), AddGamma(2.0, EXACT))
NORM = (NormSigmaConstant(), NormSigmaConstant(Stabiliser(1e-3)), Gradient())
ACTIVATION = (ActivationSlope(), ActivationSlope(REFERENCE), Gradient())
POSITION = random(1, 3, 7, seed=5)

CASES = {
    "linear": Case(lambda: nn.Linear(63, 7), ((5, 63),), "linear", LINEAR),
    "linear without bias": Case(lambda: nn.Linear(7, 63, bias=False), ((5, 7),), "linear", LINEAR),
    "add": Case(lambda: module_of(lambda a, b: a + b, 2), ((3, 63), (3, 63)), "add", ADD),
    "positional": Case(lambda: module_of(lambda a, p: a + p, 1, p=POSITION.clone()), ((3, 7),), "add", ADD),
    "positional, first": Case(lambda: module_of(lambda a, p: p + a, 1, p=POSITION.clone()), ((3, 7),), "add", ADD),
    "softmax": Case(lambda: module_of(lambda a: a.softmax(-1)), ((3, 7),), "softmax", (SoftmaxTaylor(),)),
    "layer norm": Case(lambda: nn.LayerNorm(63), ((3, 63),), "norm", NORM),
    "layer norm of two axes": Case(lambda: nn.LayerNorm((3, 7)), ((2, 3, 7),), "norm", NORM),
    "plain layer norm": Case(lambda: nn.LayerNorm(7, elementwise_affine=False), ((3, 7),), "norm", NORM),
    "rms norm": Case(lambda: nn.RMSNorm(63), ((3, 63),), "norm", NORM),
    "rms norm, epsilon": Case(lambda: nn.RMSNorm(7, eps=0.1), ((3, 7),), "norm", NORM),
    "gelu": Case(nn.GELU, ((3, 63),), "activation", ACTIVATION),
    "gelu, tanh": Case(lambda: nn.GELU("tanh"), ((3, 63),), "activation", ACTIVATION),
    "silu": Case(nn.SiLU, ((3, 63),), "activation", ACTIVATION),
}
PAIRS = [(name, rule) for name, case in CASES.items() for rule in case.rules]
NAMES = [f"{name} {type(rule).__name__} {i}" for i, (name, rule) in enumerate(PAIRS)]


@functools.cache
def op_of(name: str) -> Op:
    torch.manual_seed(0)
    case = CASES[name]
    return Op(case.make(), *[random(2, *shape, seed=i) for i, shape in enumerate(case.shapes)], kind=case.kind)


def inputs_of(name: str, batch: int) -> list[Tensor]:
    return [random(batch, *shape, seed=batch + i) for i, shape in enumerate(CASES[name].shapes)]


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "rule"), PAIRS, ids=NAMES)
def test_kernel_equals_rule(name: str, rule: Rule, dtype: torch.dtype, targets: int) -> None:
    op, inputs = op_of(name), inputs_of(name, 4)
    assert kernel_reasons(op.node, rule) == []
    relevance = op.relevance(inputs, targets).to(dtype)
    got = KERNELS[type(rule)](rule, op.call(inputs, dtype), relevance)
    want = rule.propagate(op.call(inputs, dtype), relevance)
    assert_parts(got, want, TOLERANCE[dtype])
    assert all(part is None or part.dtype is dtype for part in got)
    one = KERNELS[type(rule)](rule, op.call(inputs_of(name, 1), dtype), relevance[:, :1])
    assert all(part is None or part.shape[1] == 1 for part in one)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "rule"), PAIRS, ids=NAMES)
def test_half_precision_models(name: str, rule: Rule, half: torch.dtype) -> None:
    op, inputs = op_of(name), inputs_of(name, 4)
    calls = [op.call(inputs, half) for _ in range(2)]
    for call in calls:
        call.dtype = torch.float32
    relevance = op.relevance(inputs, 2).float()
    got, want = KERNELS[type(rule)](rule, calls[0], relevance), rule.propagate(calls[1], relevance)
    assert_parts(got, want, 5e-3 if name == "linear" else TOLERANCE[torch.float32])  # z near 0, summed twice


@pytest.mark.parametrize(("name", "rule"), [p for p in PAIRS if p[0].startswith("linear")])
def test_medium_precision(name: str, rule: Rule) -> None:
    """Products of bfloat16 numbers: the kernels hold what the rule rounds."""
    op, inputs = op_of(name), inputs_of(name, 4)
    calls = [op.call(inputs, torch.float32) for _ in range(2)]
    for call in calls:
        call.precision = "medium"
    relevance = op.relevance(inputs, 2).float()
    got, want = KERNELS[type(rule)](rule, calls[0], relevance), rule.propagate(calls[1], relevance)
    assert got[0] is not None and want[0] is not None and got[0].dtype is torch.float32
    cosine = F.cosine_similarity(got[0].flatten(), want[0].flatten(), 0)
    assert cosine > 0.999


def test_reasons() -> None:
    softmax = Op(module_of(lambda a: a.softmax(1)), random(2, 3, 7), kind="softmax")
    assert kernel_reasons(softmax.node, SoftmaxTaylor()) == ["the kernel is for a softmax over the last axis"]
    group = Op(nn.GroupNorm(1, 3), random(2, 3, 7), kind="norm")
    assert kernel_reasons(group.node, NormSigmaConstant()) == ["the kernel is for layer norms and RMS norms"]
    assert kernel_reasons(group.node, Gradient()) == [
        "the kernels are for linear layers, layer norms, RMS norms, GELU and SiLU"
    ]
    scaled = Op(module_of(lambda a, b: torch.add(a, b, alpha=2), 2), random(2, 3), random(2, 3), kind="add")
    assert kernel_reasons(scaled.node, AddGamma()) == ["the kernel adds without a factor"]
    assert kernel_reasons(vit_conv(), LinearEpsilon()) == ["the kernel is for linear layers"]


def vit_conv() -> relprop.graph.Node:
    return Op(vit(depth=1), random(2, 3, 32, 32), kind="conv").node
