"""A product of two activations: each operand gets half, in proportion to the elementwise products."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule, unbroadcast
from relprop.rules.linear_map import multiply
from relprop.rules.modified_gradient import ModifiedGradient, scaled
from relprop.rules.stabiliser import Stabiliser


@register_rule
class MatmulHalf(Rule):
    """s = R / stab(A B); R_A = A * (s B^T) / 2, R_B = B * (A^T s) / 2. With a constant the other operand gets all.

    Args:
        stabiliser: of the share-out.
        scaled: in an attention layer, whether the stabiliser's epsilon is in units of scale q k, as in code that scales
            the queries first; else in those of q k.
    Conservation:
        sum(R_A) + sum(R_B) = sum(R_out) - epsilon leak, per sample.
    Source: Chefer et al., CVPR 2021, section 3; Achtibat et al., ICML 2024, prop. 3.3.
    """

    kind: ClassVar = "matmul"
    name: ClassVar = "half"
    stabiliser: Stabiliser = Stabiliser()
    scaled: bool = False

    def at_scale(self, scale: float) -> MatmulHalf:
        """This rule for the product q k of an attention layer: epsilon in its units."""
        if not self.scaled:
            return self
        return MatmulHalf(replace(self.stabiliser, epsilon=self.stabiliser.epsilon / scale))

    def gradient_form(self, node: Node) -> Rule | None:
        """Half the gradient for each of two activations, the gradient for one."""
        if not self.stabiliser.is_exact:
            return None
        one = sum(v is not None and v.carrying for v in node.operands) < 2
        return plain_gradient() if one else ModifiedGradient(self, _half_gradient)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., M, N] -> ([T, ..., M, K], [T, ..., K, N])."""
        a, b = call.x, call.operand(1)
        assert b is not None
        s = call.share(self.stabiliser, relevance, call.y)
        left, right = self.back(call, s, a, b, call.wanted)
        return both(call, left, right)

    def share(self, call: Call, relevance: Tensor, z: Tensor) -> Tensor:
        """s = R / stab(z). [T, ..., M, N]"""
        return call.share(self.stabiliser, relevance, z)

    def denominator(self, call: Call, a: Tensor, b: Tensor, product: Tensor) -> Tensor:
        """z of the share-out, from the product A B. [..., M, N]"""
        return product

    def back(
        self, call: Call, s: Tensor, a: Tensor, b: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both operands' relevance from the shares s. [T, ..., M, N] -> [T, ..., M, K], [T, ..., K, N]"""
        left = a * multiply(call, s, b.mT) / 2 if wanted[0] else None
        right = b * multiply(call, a.mT, s) / 2 if wanted[1] else None
        return left, right


def _half_gradient(call: Call, gradient: Tensor) -> Relevances:
    return scaled(plain_gradient().propagate(call, gradient), (0.5, 0.5))


def both(call: Call, left: Tensor | None, right: Tensor | None) -> Relevances:
    """The halves as relevance of the operands; a constant leaves its half to the other operand."""
    operands = call.node.operands[:2]
    whole = 1 if all(value is not None and value.carrying for value in operands) else 2
    return tuple(
        unbroadcast(whole * part, call.shapes[value.index])
        if part is not None and value is not None and value.carrying
        else None
        for part, value in zip((left, right), operands, strict=True)
    )
