"""Attention as softmax(scale q k^T + mask) v: the rules of its two products and its softmax, composed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from relprop.graph import Node
from relprop.rules.add_epsilon import AddIdentity
from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.linear_map import multiply
from relprop.rules.matmul_half import MatmulHalf
from relprop.rules.modified_gradient import ModifiedGradient, scaled
from relprop.rules.softmax_identity import SoftmaxIdentity


@dataclass
class Heads:
    """One attention layer recomputed from its inputs, shared by the streams of a step."""

    q: Tensor  # [..., H, Nq, d]
    k: Tensor  # [..., H, Nk, d]
    v: Tensor  # [..., H, Nk, dv]
    dots: Tensor  # q k^T, unscaled. [..., H, Nq, Nk]
    logits: Tensor  # scale * dots + mask. [..., H, Nq, Nk]
    probabilities: Tensor  # [..., H, Nq, Nk]
    scale: float
    groups: int  # query heads per key head

    def fold(self, per_head: Tensor | None) -> Tensor | None:
        """Sum a key-side stream over the query heads that share a key head."""
        if per_head is None or self.groups == 1:
            return per_head
        shape = per_head.shape
        return per_head.reshape(*shape[:-3], shape[-3] // self.groups, self.groups, *shape[-2:]).sum(-3)


def heads(call: Call) -> Heads:
    """The attention layer's maps, computed once per step."""
    found = call.memo.get("heads")
    if found is None:
        found = call.memo["heads"] = _recompute(call)
        call.maps["attention"] = found.probabilities[None]
    return found


def _recompute(call: Call) -> Heads:
    node = call.node
    q, k, v = (call.operand(i) for i in range(3))
    assert q is not None and k is not None and v is not None
    mask, (scale, causal, _grouped) = call.operand(3), node.args[4:7]
    if isinstance(mask, Tensor) and call.tensors[node.operands[3].index].dtype == torch.bool:  # type: ignore[union-attr]
        mask = call.tensors[node.operands[3].index]  # type: ignore[union-attr]
    groups = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    if groups > 1:
        k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
    dots = multiply(call, q, k.mT)
    logits = dots * scale
    if causal:
        seen = torch.ones(dots.shape[-2:], dtype=torch.bool, device=dots.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    probabilities = torch.softmax(logits, -1)
    if causal or mask is not None:
        # A row that sees nothing is 0 / 0; scaled dot-product attention answers 0 there.
        probabilities = torch.where(torch.isneginf(logits), 0.0, probabilities)
    return Heads(q, k, v, dots, logits, probabilities, scale, groups)


@register_rule
class AttentionComposed(Rule):
    """The product's rule for A V, the softmax's rule, the add's rule for the mask, the product's rule for Q K^T.

    Q K^T is unscaled. An additive mask is a constant: what its add's rule gives to it is absorbed.

    Args:
        qk: rule of the product of queries and keys.
        softmax: rule of the softmax; "detached" sends nothing to queries and keys and all to the values.
        av: rule of the product of attention and values.
        mask: rule of the addition of the mask to the scores; "identity" gives nothing to the mask.
    Conservation:
        sum(R_q) + sum(R_k) + sum(R_v) = sum(R_out) - epsilon leaks, per sample, if the parts conserve.
    Source: Chefer et al., CVPR 2021, section 3; Achtibat et al., ICML 2024, section 3.3.
    """

    kind: ClassVar = "attention"
    name: ClassVar = "composed"
    qk: Rule = MatmulHalf()
    softmax: Rule = SoftmaxIdentity()
    av: Rule = MatmulHalf()
    mask: Rule = AddIdentity()

    @property
    def conserves(self) -> bool:  # type: ignore[override]
        return self.qk.conserves and self.softmax.conserves and self.av.conserves

    def describe(self) -> str:
        """The three parts."""
        return f"{self.qk.describe()} | {self.softmax.describe()} | {self.av.describe()}"

    def gradient_form(self, node: Node) -> Rule | None:
        """A quarter of the gradient for q and k and half for v; all of it for v where the softmax is detached."""
        halves = isinstance(self.qk, MatmulHalf) and isinstance(self.av, MatmulHalf)
        if not (halves and self.qk.stabiliser.is_exact and self.av.stabiliser.is_exact):  # type: ignore[attr-defined]
            return None
        if self.softmax.name == "detached":
            return ModifiedGradient(self, _value_gradient, factors=(0.0, 0.0, 1.0))
        if self.softmax.name == "taylor":
            factors = (0.25, 0.25, 0.5)
            return ModifiedGradient(self, lambda call, g: scaled(attention_gradient(call, g), factors), factors=factors)
        return None

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., H, Nq, dv] -> q, k, v: [T, ..., H, N, d]."""
        at = heads(call)
        qk: Any = self.qk
        av: Any = self.av
        softmax: Any = self.softmax
        booked = call.absorbed is not None
        wanted = tuple(want or booked for want in call.wanted[:3])
        # The stored output, also where it was rounded: what arrives is proportional to it, element by element, and a
        # product computed anew may differ in sign where it nearly vanishes.
        s = av.share(call, relevance, av.denominator(call, at.probabilities, at.v, call.y))
        map_relevance, value_relevance = av.back(call, s, at.probabilities, at.v, (True, wanted[2]))
        assert map_relevance is not None
        call.maps["relevance"] = map_relevance
        # A mask that adds to the logits takes its share of them, and keeps it.
        passed = softmax.through(at.dots * at.scale, at.probabilities, map_relevance)
        query = key = None
        if passed is None:
            value_relevance = None if value_relevance is None else 2 * value_relevance
        elif wanted[0] or wanted[1]:
            if passed is not map_relevance:
                call.absorb("rule", map_relevance - passed)
            passed = self._without_mask(call, at, passed)
            s = qk.share(call, passed, qk.denominator(call, at.q, at.k.mT, at.dots))
            query, transposed = qk.back(call, s, at.q, at.k.mT, wanted[:2])
            key = None if transposed is None else transposed.mT
        return self._hand_out(call, (query, at.fold(key), at.fold(value_relevance)))

    def _without_mask(self, call: Call, at: Heads, relevance: Tensor) -> Tensor:
        """What the mask's addition leaves to the scores. [T, ..., H, Nq, Nk]"""
        add: Any = self.mask
        if isinstance(add, AddIdentity):
            return relevance
        scores = at.dots * at.scale
        # Where nothing is seen relevance is 0, whatever its share.
        mask = torch.where(torch.isfinite(at.logits), at.logits - scores, 0.0)
        scores, mask = add.parts(call, relevance, scores, mask)
        call.absorb("constant", mask)
        return scores

    @staticmethod
    def _hand_out(call: Call, parts: tuple[Tensor | None, ...]) -> Relevances:
        results: list[Tensor | None] = []
        for value, part in zip(call.node.operands, parts, strict=False):
            carries = value is not None and value.carrying
            if part is not None and not carries and call.absorbed is not None:
                call.absorb("constant", part)
            results.append(part if carries else None)
        return (*results, None)


def attention_gradient(call: Call, gradient: Tensor) -> Relevances:
    """Gradients of attention and of its map A: dA = g v^T, dS = A (dA - sum(A dA)), dq = scale dS k, dk = scale dS^T q.

    Args:
        gradient: at the output. [T, ..., H, Nq, dv]
    Returns:
        gradients at q, k, v, None. The map's gradient is left in `call.maps["gradient"]`. [T, ..., H, Nq, Nk]
    """
    at = heads(call)
    map_gradient = multiply(call, gradient, at.v.mT)
    call.maps["gradient"] = map_gradient
    query = key = value = None
    if call.wanted[0] or call.wanted[1]:
        p = at.probabilities.expand_as(map_gradient)
        logits = torch.ops.aten._softmax_backward_data(map_gradient, p, -1, p.dtype)
        query = at.scale * multiply(call, logits, at.k) if call.wanted[0] else None
        key = at.fold(at.scale * multiply(call, logits.mT, at.q)) if call.wanted[1] else None
    if call.wanted[2]:
        value = at.fold(multiply(call, at.probabilities.mT, gradient))
    return query, key, value, None


def _value_gradient(call: Call, gradient: Tensor) -> Relevances:
    at = heads(call)
    return None, None, at.fold(multiply(call, at.probabilities.mT, gradient)), None
