"""z-box rule for a first layer whose inputs lie between known bounds."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.errors import ShapeError
from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.linear_map import apply, transpose, weight_of
from relprop.rules.stabiliser import Stabiliser


@register_rule
class LinearZBox(Rule):
    """R_in = x (s w) - l (s w+) - h (s w-), s = R / stab(x w - l w+ - h w-).

    Computed as (x - l) w+ + (x - h) w- in both directions: no term is negative, so nothing cancels where the input
    lies at its bounds (a blank image).

    Args:
        low, high: bounds of the input, one or one for each channel; None takes each sample's own minimum and maximum.
        stabiliser: of the share-out.
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample; the bias takes no share.
    Source: Montavon et al., Pattern Recognition 2017; Chefer et al., CVPR 2021 (first convolution).
    """

    kind: ClassVar = ("linear", "conv")
    name: ClassVar = "z_box"
    needs_output: ClassVar = False
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    stabiliser: Stabiliser = Stabiliser()

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N] -> ([T, ..., K], None, None)."""
        x, positive, negative = call.x, weight_of(call, "positive"), weight_of(call, "negative")
        above = x - self._bound(call, x, self.low, "amin")
        below = x - self._bound(call, x, self.high, "amax")
        s = call.share(self.stabiliser, relevance, apply(call, above, positive) + apply(call, below, negative))
        return above * transpose(call, s, positive) + below * transpose(call, s, negative), None, None

    @staticmethod
    def _bound(call: Call, x: Tensor, bound: float | tuple[float, ...] | None, extreme: str) -> Tensor:
        if isinstance(bound, tuple):
            axis = 1 if call.node.kind == "conv" else x.ndim - 1
            if len(bound) != x.shape[axis]:
                raise ShapeError(f"z_box: expected bounds for {x.shape[axis]} channels, got {len(bound)}")
            sizes = [-1 if i == axis else 1 for i in range(x.ndim)]
            return x.new_tensor(bound).reshape(sizes).expand_as(x).contiguous()
        if bound is not None:
            return torch.full_like(x, bound)
        value = call.node.operands[0]
        assert value is not None
        flat = getattr(call.per_sample(value, x[None])[0], extreme)(-1)
        shape = [1] * x.ndim
        assert value.sample is not None
        shape[value.sample.axis] = -1
        return flat.repeat_interleave(call.factor(value)).reshape(shape).expand_as(x).contiguous()
