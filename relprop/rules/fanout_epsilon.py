"""A value used several times gathers the relevance of its uses."""

from __future__ import annotations

from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule
from relprop.rules.stabiliser import EXACT, Stabiliser


@register_rule
class FanoutEpsilon(Rule):
    """R_in = x * sum_i R_i / stab(x); with an exact stabiliser the plain sum.

    Args:
        stabiliser: of the share-out; the authors' code of Chefer et al. has an epsilon here ("Clone").
    Conservation:
        sum(R_in) = sum_i sum(R_i) - epsilon leak, per sample.
    Source: Chefer et al., CVPR 2021, code.
    """

    kind: ClassVar = "fanout"
    name: ClassVar = "epsilon"
    needs_output: ClassVar = False
    stabiliser: Stabiliser = EXACT

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        return not self.stabiliser.is_exact

    def gradient_form(self, node: Node) -> Rule | None:
        """The plain gradient, where nothing is stabilised."""
        return plain_gradient() if self.stabiliser.is_exact else None

    def propagate(self, call: Call, relevance: Tensor | tuple[Tensor | None, ...]) -> Relevances:
        """relevance: one [T, ...] per use, None where nothing arrived -> ([T, ...],)."""
        parts = relevance if isinstance(relevance, tuple) else (relevance,)
        total = reduce(torch.add, [part for part in parts if part is not None])
        if self.stabiliser.is_exact:
            return (total,)
        x = call.x
        return (x * call.share(self.stabiliser, total, x, call.node.operands[0]),)
