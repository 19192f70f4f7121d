"""Softmax by its first-order Taylor expansion at the input."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule


@register_rule
class SoftmaxTaylor(Rule):
    """R_in = x * (R - p sum(R)), with p the softmax; the expansion's constant term is absorbed.

    Conservation:
        none: the bias term of the expansion keeps a part; the ledger books it under "rule".
    Source: Achtibat et al., ICML 2024, prop. 3.1.
    """

    kind: ClassVar = "softmax"
    name: ClassVar = "taylor"
    conserves: ClassVar = False

    def gradient_form(self, node: Node) -> Rule | None:
        """The plain gradient."""
        return plain_gradient()

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N] -> ([T, ..., N],)."""
        axis = call.node.args[1] if len(call.node.args) > 1 else call.node.kwargs.get("dim", -1)
        if axis not in (-1, call.x.ndim - 1):
            moved = self.through(
                call.x.movedim(axis, -1), call.y.movedim(axis, -1), relevance.movedim(axis % call.x.ndim + 1, -1)
            )
            assert moved is not None
            return (moved.movedim(-1, axis % call.x.ndim + 1),)
        return (self.through(call.x, call.y, relevance),)

    def through(self, logits: Tensor, probabilities: Tensor, relevance: Tensor) -> Tensor | None:
        """Relevance at the logits. Masked logits (-inf) get exactly 0. [T, ..., N]"""
        logits = torch.where(torch.isfinite(logits), logits, 0.0)
        return logits * (relevance - probabilities * relevance.sum(-1, keepdim=True))
