"""Embeddings end the pass: a token's relevance is the sum over its embedding."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule


@register_rule
class EmbeddingSum(Rule):
    """R_token = sum over channels of R_out.

    Conservation:
        exact.
    Source: common practice; Achtibat et al., ICML 2024, section 4.
    """

    kind: ClassVar = "embedding"
    name: ClassVar = "sum"
    needs_inputs: ClassVar = False
    needs_output: ClassVar = False

    def gradient_form(self, node: Node) -> Rule | None:
        """The plain gradient."""
        return plain_gradient()

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N, D] -> (None, [T, ..., N])."""
        return None, relevance.sum(-1)
