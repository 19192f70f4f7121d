"""Flat rule: every input of a linear layer or convolution gets the same share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.linear_map import apply, transpose, weight_of
from relprop.rules.stabiliser import Stabiliser


@register_rule
class LinearFlat(Rule):
    """R_in = 1^T s, s = R / stab(number of inputs that reach the output).

    Args:
        stabiliser: of the share-out.
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample.
    Source: Bach et al., PLoS ONE 2015 (as "flat" in zennit).
    """

    kind: ClassVar = ("linear", "conv")
    name: ClassVar = "flat"
    stabiliser: Stabiliser = Stabiliser()

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N] -> ([T, ..., K], None, None)."""
        ones = torch.ones_like(weight_of(call))
        z = apply(call, torch.ones_like(call.x), ones)
        return transpose(call, call.share(self.stabiliser, relevance, z), ones), None, None
