"""Residual add that prefers the summand of the sum's sign."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.graph import Node, Value
from relprop.rules.add_epsilon import hand_out, signed_factors, summands
from relprop.rules.base import Call, Relevances, Rule, register_rule, unbroadcast
from relprop.rules.modified_gradient import ModifiedGradient
from relprop.rules.stabiliser import EXACT, Stabiliser


@register_rule
class AddGamma(Rule):
    """R_a = a'' R / stab(a'' + b''), a'' = (1 + gamma [sign a = sign(a + b)]) a, b'' likewise.

    One add amplifies by at most 1 + 2 / gamma, where plain shares have no bound. Where a + b is exactly 0 each gets
    one half.

    Args:
        gamma: preference for the summand of the sum's sign.
        stabiliser: of the share-out.
    Conservation:
        sum(R_a) + sum(R_b) = sum(R_out) - epsilon leak, per sample.
    Source: Berend et al. 2026 (ResLRP), eq. 3.
    """

    kind: ClassVar = "add"
    name: ClassVar = "gamma"
    needs_output: ClassVar = False
    gamma: float = 1.0
    stabiliser: Stabiliser = Stabiliser()

    def gradient_form(self, node: Node) -> Rule | None:
        """The gradient times (a + b) / (a'' + b''), for a summand of the sum's sign also times 1 + gamma."""
        return ModifiedGradient(self, self._weighted) if self.stabiliser.is_exact else None

    def _weighted(self, call: Call, gradient: Tensor) -> Relevances:
        a, b = summands(call)
        total = a + b
        factors = [torch.where(part * total > 0, 1 + self.gamma, 1.0).to(total.dtype) for part in (a, b)]
        common = EXACT.share(total, factors[0] * a + factors[1] * b)
        results: list[Tensor | None] = []
        for argument, factor, sign in zip(call.node.args[:2], factors, signed_factors(call), strict=True):
            if isinstance(argument, Value):
                part = gradient * (sign * factor * common)
                results.append(unbroadcast(part, call.shapes[argument.index]) if argument.carrying else None)
        return tuple(results)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> ([T, ...], [T, ...])."""
        a, b = summands(call)
        total = a + b
        a = torch.where(a * total > 0, (1 + self.gamma) * a, a)
        b = torch.where(b * total > 0, (1 + self.gamma) * b, b)
        s = self.stabiliser.share(relevance, a + b)
        # The two one-sided limits of a sum of 0 mirror each other; their mean is one half each. Low precision is full
        # of sums that cancel to the bit.
        cancelled = total == 0
        a, b = (torch.where(cancelled, relevance / 2, part * s) for part in (a, b))
        call.absorb("epsilon", relevance - a - b)
        return hand_out(call, a, b)
