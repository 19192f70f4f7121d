"""A product of two activations with z+ shares: only what supports the product's positive part counts."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule, unbroadcast
from relprop.rules.linear_map import multiply
from relprop.rules.stabiliser import Stabiliser


@register_rule
class MatmulAlphaBeta(Rule):
    """s = R / stab(z+), z+ = (A B + |A| |B|) / 2; R_A = (A * (s B^T) + |A| * (s |B|^T)) / 4, R_B likewise.

    All shares are non-negative, so relevance does not grow where A B cancels.

    Args:
        stabiliser: of the share-out.
    Conservation:
        sum(R_A) + sum(R_B) = sum(R_out) - epsilon leak, per sample.
    Source: the z+ rule (Chefer et al., CVPR 2021, section 3) applied to both operands; see docs/design.md.
    """

    kind: ClassVar = "matmul"
    name: ClassVar = "alpha_beta"
    stabiliser: Stabiliser = Stabiliser()

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., M, N] -> ([T, ..., M, K], [T, ..., K, N])."""
        a, b = call.x, call.operand(1)
        assert b is not None
        z = self.denominator(call, a, b, multiply(call, a, b))
        left, right = self.back(call, call.share(self.stabiliser, relevance, z), a, b, call.wanted)
        return (
            None if left is None else unbroadcast(left, a.shape),
            None if right is None else unbroadcast(right, b.shape),
        )

    def denominator(self, call: Call, a: Tensor, b: Tensor, product: Tensor) -> Tensor:
        """z of the share-out, from the product A B. [..., M, N]"""
        return (product + multiply(call, a.abs(), b.abs())) / 2

    def back(
        self, call: Call, s: Tensor, a: Tensor, b: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both operands' relevance from the shares s. [T, ..., M, N] -> [T, ..., M, K], [T, ..., K, N]"""
        left = right = None
        if wanted[0]:
            left = (a * multiply(call, s, b.mT) + a.abs() * multiply(call, s, b.abs().mT)) / 4
        if wanted[1]:
            right = (b * multiply(call, a.mT, s) + b.abs() * multiply(call, a.abs().mT, s)) / 4
        return left, right
