"""Softmax held constant: relevance flows through the values alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.modified_gradient import ModifiedGradient


@register_rule
class SoftmaxDetached(Rule):
    """R_in = 0; inside attention the values get all of the product's relevance.

    Conservation:
        inside attention exact; alone, everything is absorbed.
    Source: Ali et al., ICML 2022 (CP-LRP).
    """

    kind: ClassVar = "softmax"
    name: ClassVar = "detached"
    needs_inputs: ClassVar = False
    needs_output: ClassVar = False

    def gradient_form(self, node: Node) -> Rule | None:
        """No gradient."""
        return ModifiedGradient(self, lambda call, gradient: (torch.zeros_like(gradient),), inputs=False)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N] -> zeros."""
        call.absorb("constant", relevance)
        return (torch.zeros_like(relevance),)

    def through(self, logits: Tensor, probabilities: Tensor, relevance: Tensor) -> Tensor | None:
        """Nothing passes to the logits."""
        return None
