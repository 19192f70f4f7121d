"""Selecting one row: its relevance goes to that row."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule
from relprop.rules.stabiliser import EXACT, Stabiliser


@register_rule
class SelectEpsilon(Rule):
    """R_in = x * R / stab(x) on the selected row (the others were cut off before it).

    Args:
        stabiliser: of the share-out; the authors' code of Chefer et al. has an epsilon here ("IndexSelect").
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample.
    Source: Chefer et al., CVPR 2021, code.
    """

    kind: ClassVar = "select"
    name: ClassVar = "epsilon"
    needs_output: ClassVar = False
    stabiliser: Stabiliser = EXACT

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        return not self.stabiliser.is_exact

    def gradient_form(self, node: Node) -> Rule | None:
        """The plain gradient, where nothing is stabilised."""
        return plain_gradient() if self.stabiliser.is_exact else None

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> ([T, ..., 1, ...],)."""
        value = call.node.operands[0]
        relevance = relevance.reshape(relevance.shape[0], *call.shape(0))
        if self.stabiliser.is_exact:
            return (relevance,)
        x = call.x
        return (x * call.share(self.stabiliser, relevance, x, value),)
