"""Residual add with shares normalised by the branches' sums."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.rules.add_epsilon import hand_out, summands
from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.stabiliser import Stabiliser


@register_rule
class AddNormalised(Rule):
    """a' = a R / stab(a + b), b' likewise; a' is scaled to |sum a'| / (|sum a'| + |sum b'|) sum R, b' likewise.

    All sums run over one sample. A constant operand takes its share, which is absorbed.

    Args:
        stabiliser: of every division.
    Conservation:
        sum(R_a) + sum(R_b) = sum(R_out) - epsilon leak, per sample.
    Source: Chefer et al., CVPR 2021, section 3, eq. 8-9.
    """

    kind: ClassVar = "add"
    name: ClassVar = "normalised"
    needs_output: ClassVar = False
    stabiliser: Stabiliser = Stabiliser()

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> ([T, ...], [T, ...])."""
        return hand_out(call, *self.parts(call, relevance, *summands(call)))

    def parts(self, call: Call, relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What each summand gets, of any sum whose samples lie as in the node's output. [T, ...], [T, ...]"""
        value = call.node.outputs[0]
        s = self.stabiliser.share(relevance, a + b)
        a, b = a * s, b * s
        total, sum_a, sum_b = (call.per_sample(value, t).sum(-1) for t in (relevance, a, b))
        size = sum_a.abs() + sum_b.abs()
        share = self.stabiliser.share
        scale_a = share(share(sum_a.abs(), size) * total, sum_a)
        scale_b = share(share(sum_b.abs(), size) * total, sum_b)
        a, b = a * spread(scale_a, call), b * spread(scale_b, call)
        if call.absorbed is not None:
            kept = (total - scale_a * sum_a - scale_b * sum_b).double()
            call.absorbed.add("epsilon", kept)
        return a, b


def spread(per_sample: Tensor, call: Call) -> Tensor:
    """[T, B] to a shape that broadcasts over the output. [T, ..., B * factor, ...]"""
    value = call.node.outputs[0]
    assert value.sample is not None
    shape = [1] * (value.rank + 1)
    shape[0], shape[value.sample.axis + 1] = per_sample.shape[0], -1
    return per_sample.repeat_interleave(call.factor(value), dim=1).reshape(shape)
