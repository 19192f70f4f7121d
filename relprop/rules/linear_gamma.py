"""Gamma rule for linear layers and convolutions, for inputs and outputs of either sign."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.linear_map import apply, bias_of, preactivation, transpose, weight_of
from relprop.rules.stabiliser import Stabiliser


@register_rule
class LinearGamma(Rule):
    """Contributions that agree with the output's sign weigh 1 + gamma.

    For y > 0: z = y + gamma (z+ + b+), and for y < 0: z = y + gamma (z- + b-), with z+- = (x w +- |x| |w|) / 2.
    R_in = (1 + gamma/2) x (s w) + (gamma/2) |x| ((s sign(y)) |w|); outputs of exactly 0 get no share.

    Args:
        gamma: preference for contributions of the output's sign; 0 is the epsilon rule.
        stabiliser: of the share-out.
        bias: whether the bias takes a share.
    Conservation:
        sum(R_in) = sum(R_out) - bias share - epsilon leak, per sample.
    Source: Montavon et al. 2019, in the form for either sign of Anders et al. 2021 (zennit).
    """

    kind: ClassVar = ("linear", "conv")
    name: ClassVar = "gamma"
    gamma: float = 0.25
    stabiliser: Stabiliser = Stabiliser(1e-6)
    bias: bool = True

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N] -> ([T, ..., K], None, None)."""
        x, weight, magnitude, gamma = call.x, weight_of(call), weight_of(call, "abs"), self.gamma
        product, absolute, bias = preactivation(call), apply(call, call.x.abs(), magnitude), bias_of(call)
        sign = torch.sign(product if bias is None else product + bias)
        z = product + gamma / 2 * (product + sign * absolute)
        share = None
        if bias is not None and self.bias:
            share = bias + gamma * torch.where(sign > 0, bias.clamp(min=0), bias.clamp(max=0))
            z = z + share
        s = call.share(self.stabiliser, relevance * sign.abs(), z)
        if call.absorbed is not None:
            call.absorb("epsilon", relevance * (1 - sign.abs()))
            if share is not None:
                call.absorb("bias", s * share)
        back = (1 + gamma / 2) * x * transpose(call, s, weight)
        back = back + gamma / 2 * x.abs() * transpose(call, s * sign, magnitude)
        return back, None, None
