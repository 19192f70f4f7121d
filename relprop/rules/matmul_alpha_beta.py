"""A product of two activations with z+ shares: only what supports the product's positive part counts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.linear_map import multiply
from relprop.rules.matmul_half import both
from relprop.rules.stabiliser import Stabiliser


@register_rule
class MatmulAlphaBeta(Rule):
    """s = R / stab(z+), z+ = A+ B+ + A- B-; R_A = (A+ * (s B+^T) + A- * (s B-^T)) / 2, R_B likewise.

    All shares are non-negative, so relevance does not grow where A B cancels. Unlike in a linear layer z+ is not
    formed as (A B + |A| |B|) / 2: a head has few channels, all products of a pair can be negative, and then that
    difference is rounding where the sum of signed parts is exactly 0. A pair with z+ = 0 absorbs its relevance.

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
        s = self.share(call, relevance, self.denominator(call, a, b, multiply(call, a, b)))
        left, right = self.back(call, s, a, b, call.wanted)
        return both(call, left, right)

    def share(self, call: Call, relevance: Tensor, z: Tensor) -> Tensor:
        """s = R / stab(z), 0 where nothing supports the product. [T, ..., M, N]"""
        return torch.where(z == 0, 0.0, call.share(self.stabiliser, relevance, z))

    def denominator(self, call: Call, a: Tensor, b: Tensor, product: Tensor) -> Tensor:
        """z of the share-out. [..., M, N]"""
        return multiply(call, a.clamp(min=0), b.clamp(min=0)) + multiply(call, a.clamp(max=0), b.clamp(max=0))

    def back(
        self, call: Call, s: Tensor, a: Tensor, b: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both operands' relevance from the shares s. [T, ..., M, N] -> [T, ..., M, K], [T, ..., K, N]"""
        left = right = None
        parts = [(a.clamp(min=0), b.clamp(min=0)), (a.clamp(max=0), b.clamp(max=0))]
        if wanted[0]:
            left = sum(p * multiply(call, s, q.mT) for p, q in parts) / 2
        if wanted[1]:
            right = sum(q * multiply(call, p.mT, s) for p, q in parts) / 2
        return left, right
