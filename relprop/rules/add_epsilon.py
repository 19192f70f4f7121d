"""Add in proportion to the summands; and what all add rules share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.graph import Node, Value
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule, unbroadcast
from relprop.rules.stabiliser import Stabiliser

aten = torch.ops.aten


@register_rule
class AddEpsilon(Rule):
    """R_a = a R / stab(a + b), R_b likewise; a constant summand absorbs its share.

    Args:
        stabiliser: of the share-out.
    Conservation:
        sum(R_a) + sum(R_b) = sum(R_out) - epsilon leak, per sample.
    Source: Achtibat et al., ICML 2024, eq. 8.
    """

    kind: ClassVar = "add"
    name: ClassVar = "epsilon"
    needs_output: ClassVar = False
    stabiliser: Stabiliser = Stabiliser(1e-6)

    def gradient_form(self, node: Node) -> Rule | None:
        """The plain gradient, where nothing is stabilised."""
        return plain_gradient() if self.stabiliser.is_exact else None

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> ([T, ...], [T, ...])."""
        return hand_out(call, *self.parts(call, relevance, *summands(call)))

    def parts(self, call: Call, relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What each summand gets. [T, ...], [T, ...]"""
        s = call.share(self.stabiliser, relevance, a + b)
        return a * s, b * s


@register_rule
class AddIdentity(Rule):
    """All relevance to the one summand that carries any: constants take no share.

    Conservation:
        exact.
    Source: the authors' code of Chefer et al., CVPR 2021 (biases and masks).
    """

    kind: ClassVar = "add"
    name: ClassVar = "identity"
    needs_inputs: ClassVar = False
    needs_output: ClassVar = False

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> [T, ...] at the carrying operand; equal parts if there are two."""
        carrying = [v is not None and v.carrying for v in call.node.operands]
        part = relevance / sum(carrying)
        return tuple(unbroadcast(part, call.shape(i)) if c else None for i, c in enumerate(carrying))


def signed_factors(call: Call) -> tuple[float, float]:
    """Factors of the two summands in a + alpha b and a - alpha b."""
    node = call.node
    alpha = float(node.kwargs.get("alpha", 1.0))
    return 1.0, -alpha if node.target is aten.sub.Tensor else alpha


def summands(call: Call) -> tuple[Tensor, Tensor]:
    """Both summands with their signs, in the streams' dtype; a Python number becomes a tensor."""
    parts = []
    for argument, factor in zip(call.node.args[:2], signed_factors(call), strict=True):
        if isinstance(argument, Value):
            tensor = call.tensor(argument)
            parts.append(tensor if factor == 1.0 else tensor * factor)
        else:
            first = next(a for a in call.node.args[:2] if isinstance(a, Value))
            device = call.tensors[first.index].device
            parts.append(torch.full((), float(argument) * factor, dtype=call.dtype, device=device))
    return parts[0], parts[1]


def hand_out(call: Call, a: Tensor, b: Tensor) -> Relevances:
    """Parts [T, *output shape] to the operands: broadcasting summed away, a constant's part absorbed."""
    results: list[Tensor | None] = []
    for argument, part in zip(call.node.args[:2], (a, b), strict=True):
        if isinstance(argument, Value) and argument.carrying:
            results.append(unbroadcast(part, call.shapes[argument.index]))
            continue
        call.absorb("constant", part)
        if isinstance(argument, Value):
            results.append(None)
    return tuple(results)
