"""Alpha-beta rule for linear layers and convolutions; alpha = 1, beta = 0 is the z+ rule."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.linear_map import apply, bias_of, preactivation, reduced_precision, transpose, weight_of
from relprop.rules.stabiliser import Stabiliser


@register_rule
class LinearAlphaBeta(Rule):
    """R_in = alpha [x+ (s+ w+) + x- (s+ w-)] - beta [x+ (s- w-) + x- (s- w+)], with s+- = R / stab(z+-).

    z+ = x+ w+ + x- w- and z- = x+ w- + x- w+ are not computed from four products: x w and |x| |w| give both,
    z+- = (x w +- |x| |w|) / 2, and x w = y - b is known from the forward pass. The way back is
    x ((alpha s+ - beta s-) w) / 2 + |x| ((alpha s+ + beta s-) |w|) / 2: two products that read one weight.

    Args:
        alpha, beta: weights of the supporting and the opposing part, alpha - beta = 1.
        stabiliser: of both share-outs.
        bias: whether the bias's positive (negative) part takes a share of z+ (z-).
        joint: False gives x+ w+ and x- w- a denominator each, as an older variant of the authors' code has it; it
            hands on up to twice the relevance and exists for parity.
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample, if no z+- vanishes; the bias takes no share by default.
        A z+ below the rounding of |x| |w| counts as 0: its relevance is absorbed.
    Source: Bach et al., PLoS ONE 2015, eq. 60; Chefer et al., CVPR 2021, section 3.
    """

    kind: ClassVar = ("linear", "conv")
    name: ClassVar = "alpha_beta"
    alpha: float = 1.0
    beta: float = 0.0
    stabiliser: Stabiliser = Stabiliser()
    bias: bool = False
    joint: bool = True

    @property
    def conserves(self) -> bool:  # type: ignore[override]
        return self.joint and self.beta == 0.0

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N] -> ([T, ..., K], None, None)."""
        if not self.joint:
            return self._separate(call, relevance), None, None
        x, weight, magnitude = call.x, weight_of(call), weight_of(call, "abs")
        product, absolute = self._terms(call)
        bias = bias_of(call) if self.bias else None
        s = self._share(call, relevance, (product + absolute) / 2, absolute, bias, positive=True)
        plain = magnified = self.alpha * s
        if self.beta:
            opposed = self.beta * self._share(call, relevance, (product - absolute) / 2, absolute, bias, positive=False)
            plain, magnified = plain - opposed, magnified + opposed
        back = x * transpose(call, plain, weight) + x.abs() * transpose(call, magnified, magnitude)
        return back / 2, None, None

    def _terms(self, call: Call) -> tuple[Tensor, Tensor]:
        """x w and |x| |w|, both at the precision of the streams: rounded factors are for the way back alone."""
        if not reduced_precision(call):
            return preactivation(call), apply(call, call.x.abs(), weight_of(call, "abs"))
        whole = call.at_precision("highest")  # the stored output may be of rounded factors
        return apply(whole, call.x, weight_of(whole)), apply(whole, call.x.abs(), weight_of(whole, "abs"))

    def _share(
        self, call: Call, relevance: Tensor, z: Tensor, absolute: Tensor, bias: Tensor | None, positive: bool
    ) -> Tensor:
        # Half a difference of nearly equal numbers is rounding, not signal: it has no share to give.
        tolerance = 4 * torch.finfo(z.dtype).eps * absolute
        z = torch.where(z <= tolerance if positive else z >= -tolerance, 0.0, z)
        if bias is not None:
            taken = bias.clamp(min=0) if positive else bias.clamp(max=0)
            z = z + taken
        s = torch.where(z == 0, 0.0, call.share(self.stabiliser, relevance, z))
        if bias is not None and call.absorbed is not None:
            call.absorb("bias", s * taken)
        return s

    def _separate(self, call: Call, relevance: Tensor) -> Tensor:
        x = call.x
        signs = {"positive": x.clamp(min=0), "negative": x.clamp(max=0)}
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for factor, pairs in (
            (self.alpha, (("positive", "positive"), ("negative", "negative"))),
            (-self.beta, (("positive", "negative"), ("negative", "positive"))),
        ):
            for side, part in pairs if factor else ():
                weight = weight_of(call, part)
                s = self.stabiliser.share(relevance, apply(call, signs[side], weight))
                total = total + factor * signs[side] * transpose(call, s, weight)
        return total
