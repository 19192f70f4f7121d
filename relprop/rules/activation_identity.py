"""Elementwise non-linearities pass relevance through."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule


@register_rule
class ActivationIdentity(Rule):
    """R_in = R_out, literally.

    Conservation:
        exact.
    Source: the authors' code of Chefer et al., CVPR 2021; Achtibat et al., ICML 2024, eq. 9.
    """

    kind: ClassVar = "activation"
    name: ClassVar = "identity"
    needs_inputs: ClassVar = False
    needs_output: ClassVar = False

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> ([T, ...], None, ...)."""
        return (relevance, *[None] * (len(call.node.operands) - 1))
