"""Linear layers and convolutions for the tests of their rules, as dense matrices built from basis vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relprop.rules import Rule
from tests.rules.rule_checks import Op, Parts, check_rule, random


@dataclass(frozen=True)
class Case:
    """A layer and the shape of one sample."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    "linear": Case(lambda: nn.Linear(63, 7), (5, 63)),
    "linear-no-bias": Case(lambda: nn.Linear(7, 63, bias=False), (7,)),
    "linear-one": Case(lambda: nn.Linear(1, 3), (1, 1)),
    "linear-one-no-bias": Case(lambda: nn.Linear(1, 1, bias=False), (7, 1)),
    "conv1d": Case(lambda: nn.Conv1d(3, 5, 3, padding=1), (3, 7)),
    "conv2d-patches": Case(lambda: nn.Conv2d(3, 7, 4, stride=4), (3, 9, 8)),
    "conv2d-groups": Case(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False), (4, 7, 6)),
    "conv2d-same": Case(lambda: nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(1, 2)), (2, 5, 7)),
    "conv2d-valid": Case(lambda: nn.Conv2d(1, 2, 2, padding="valid"), (1, 3, 4)),
    "conv3d": Case(lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 3, 4, 3)),
}


@functools.cache
def linear_op(name: str) -> Op:
    torch.manual_seed(len(name))
    module = CASES[name].make()
    with torch.no_grad():
        module.weight.view(-1)[::7].zero_()  # weights that are exactly 0
        if module.weight.numel() < 4:
            module.weight.copy_(torch.tensor([[-1.5], [0.5], [0.75]])[: len(module.weight)])
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    return Op(module, random(2, *CASES[name].shape), kind=kind)


@dataclass(frozen=True)
class Dense:
    """A layer of one sample as y = W x + b over flattened samples."""

    contributions: Tensor  # x[k] W[n, k] for every pair. [B, N, K]
    x: Tensor  # [B, K]
    matrix: Tensor  # [N, K]
    reach: Tensor  # 1 where input k reaches output n, whatever the weight. [N, K]
    bias: Tensor | None  # [N]

    @property
    def z(self) -> Tensor:
        """W x. [B, N]"""
        return self.contributions.sum(-1)

    @property
    def y(self) -> Tensor:
        """W x + b. [B, N]"""
        return self.z if self.bias is None else self.z + self.bias


def dense(op: Op, x: Tensor) -> Dense:
    """One basis vector at a time through the module itself."""
    shape, size = x.shape[1:], x[0].numel()
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    weight: Any = op.module.weight.detach()

    def columns(of: Tensor) -> Tensor:
        given = {"weight": of}
        if op.module.bias is not None:
            given["bias"] = torch.zeros_like(op.module.bias)
        return torch.func.functional_call(op.module, given, (basis,)).reshape(size, -1).T

    bias = None
    if op.module.bias is not None:
        given = {"weight": torch.zeros_like(weight), "bias": op.module.bias.detach()}
        bias = torch.func.functional_call(op.module, given, (basis[:1],)).reshape(-1)
    matrix, flat = columns(weight), x.reshape(len(x), size)
    return Dense(flat[:, None, :] * matrix, flat, matrix, columns(torch.ones_like(weight)), bias)


def check_linear_rule(
    name: str, rule: Rule, formula: Callable[[Dense, Tensor], Tensor], batch: int, targets: int
) -> None:
    """Hold a rule to a formula over the dense contributions.

    Args:
        formula: relevance at the input [T, B, K] from the layer and the relevance at its output [T, B, N].
    """
    op = linear_op(name)
    x = random(batch, *CASES[name].shape, seed=batch + targets, zeros=True)

    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        back = formula(dense(op, x), relevance.flatten(2))
        return back.reshape(len(relevance), *x.shape), None, None

    def settled(x: Tensor) -> Tensor:
        layer = dense(op, x)
        size = layer.contributions.abs().sum(-1) / 50
        parts = (layer.contributions.clamp(min=0).sum(-1), -layer.contributions.clamp(max=0).sum(-1))
        keeps = [(z.abs() > size) | (z == 0) for z in (layer.z, layer.y, *parts)]
        return torch.stack(keeps).all(0).reshape(op.output([x]).shape)

    check_rule(op, rule, [x], op.relevance([x], targets), oracle, settled)
