"""The C++ backend's kernel for a whole attention step: both streams and the read-out's row in tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from relprop import native
from relprop.backends.elementwise import stored
from relprop.graph import Node, Value
from relprop.native.attention import AttentionStreams
from relprop.program import JointKernel, JointStream
from relprop.rules import (
    AddIdentity,
    AttentionComposed,
    Call,
    Gradient,
    MatmulAlphaBeta,
    MatmulHalf,
    ModifiedGradient,
    Relevances,
    Rule,
    SoftmaxDetached,
    SoftmaxIdentity,
)
from relprop.rules.modified_gradient import scaled


def kernel_reasons(node: Node, rules: Mapping[str, Rule], edge: str | None) -> list[str]:
    """Why the kernel does not take this node with these rules by stream; empty where it does."""
    reasons = []
    if not rules and edge is None:
        reasons.append("nothing is asked of it")
    if not isinstance(rules.get("gradient", Gradient()), Gradient):
        reasons.append("the kernel's gradient stream is the gradient")
    rule: Any = rules.get("relevance", AttentionComposed())
    if isinstance(rule, ModifiedGradient) and "gradient" not in rules:
        pass  # the gradient stream's own products, with a factor each
    elif not isinstance(rule, AttentionComposed):
        reasons.append("the kernel is for the rule composed")
    else:
        if not isinstance(rule.qk, (MatmulHalf, MatmulAlphaBeta)) or not isinstance(rule.av, MatmulHalf):
            reasons.append("the kernel is for the rules half and alpha_beta of q and k, and half of A and v")
        if not isinstance(rule.softmax, (SoftmaxIdentity, SoftmaxDetached)):
            reasons.append("the kernel is for the softmax rules identity and detached")
        if not isinstance(rule.mask, AddIdentity):
            reasons.append("the kernel gives nothing to the mask")
    return reasons + _shape_reasons(node)


def _shape_reasons(node: Node) -> list[str]:
    q, k, v = (_sizes(value) for value in node.operands[:3])
    if len({len(q), len(k), len(v)}) > 1 or len(q) not in (3, 4):
        return [f"the kernel takes q, k, v of 3 or 4 axes, not {len(q)}, {len(k)}, {len(v)}"]
    grouped = node.args[6]
    alike = k[:-1] == v[:-1] and q[-1] == k[-1] and q[: 1 if grouped else -2] == k[: 1 if grouped else -2]
    if not alike or (grouped and len(q) == 3):
        return ["the kernel wants q, k and v of one batch and fitting heads"]
    return []


def _sizes(value: Value | None) -> list[str]:
    return [] if value is None else [str(size) for size in value.shape]


def attention(
    call: Call, streams: Mapping[str, JointStream], edge: str | None, row: Tensor | None
) -> tuple[dict[str, Relevances], Tensor | None]:
    """All streams through one attention layer, and row E; see `relprop.native.attention_relevance`."""
    relevance = streams.get("relevance")
    if relevance is not None and isinstance(relevance.rule, ModifiedGradient):
        return modified(attention, call, relevance, edge, row)
    q, k, v = (stored(call, value) for value in call.node.operands[:3])
    made = call.tensors.get(call.node.outputs[0].index)
    output = None if made is None else stored(call, call.node.outputs[0])
    exact = made is not None and made.dtype == call.dtype
    layer = (q, k, v, output)
    return through_layer(native.attention_relevance, call, layer, streams, edge, row, exact_output=exact)


def through_layer(
    kernel: Callable[..., AttentionStreams],
    call: Call,
    layer: tuple[Tensor, Tensor, Tensor, Tensor | None],
    streams: Mapping[str, JointStream],
    edge: str | None,
    row: Tensor | None,
    **options: Any,
) -> tuple[dict[str, Relevances], Tensor | None]:
    """A kernel's answer for an operation of the graph, whose heads may share the batch axis.

    Args:
        kernel: with the signature of `relprop.native.attention_relevance`.
        layer: q, k, v and the output as the kernel reads them.
    """
    node = call.node
    gradient, relevance = streams.get("gradient"), streams.get("relevance")
    rule: Any = AttentionComposed() if relevance is None else relevance.rule
    sample = node.outputs[0].sample
    heads = 1 if sample is None or sample.axis != 0 else call.factor(node.outputs[0])
    joined = layer[0].ndim == 3
    mask = _mask(call)

    def lifted(tensor: Tensor | None, axes: int) -> Tensor | None:
        """Heads that share the batch axis on an axis of their own."""
        return tensor if tensor is None or not joined else tensor.unflatten(axes - 3, (-1, heads))

    q, k, v, output = (lifted(t, 3) for t in layer)
    found = kernel(
        q,
        k,
        v,
        scale=node.args[4],
        output=output,
        mask=_lifted_mask(mask, heads) if joined else mask,
        causal=node.args[5],
        gradient=None if gradient is None else lifted(gradient.arrived, 4),
        relevance=None if relevance is None else lifted(relevance.arrived, 4),
        gradients_wanted=_wanted(gradient),
        relevances_wanted=_wanted(relevance),
        qk=_qk_rule(rule),
        qk_stabiliser=rule.qk.stabiliser.code,
        av_stabiliser=rule.av.stabiliser.code,
        edge=edge,
        row=row if edge is not None else None,
        **options,
    )
    made = {"gradient": found.gradients, "relevance": found.relevances}
    passed: dict[str, Relevances] = {}
    for name in streams:
        parts = (part if part is None or not joined else part.flatten(1, 2) for part in made[name])
        passed[name] = (*parts, None)
    return passed, found.row


def modified(
    kernel: JointKernel, call: Call, stream: JointStream, edge: str | None, row: Tensor | None
) -> tuple[dict[str, Relevances], Tensor | None]:
    """A modified gradient: the gradient stream's results times a factor each, none of them made where that is 0."""
    factors = stream.rule.factors  # type: ignore[attr-defined]
    wanted = tuple(want and factor != 0.0 for want, factor in zip(stream.wanted, (*factors, 0.0), strict=False))
    plain = JointStream(Gradient(), stream.arrived, wanted)
    passed, product = kernel(call, {"gradient": plain}, edge, row)
    return {"relevance": scaled(passed["gradient"], factors)}, product


def _mask(call: Call) -> Tensor | None:
    """The mask as it is where it is boolean, else in the streams' dtype."""
    value = call.node.operands[3]
    if value is not None and call.tensors[value.index].dtype == torch.bool:
        return call.tensors[value.index]
    return call.operand(3)


def _qk_rule(rule: AttentionComposed) -> str:
    if isinstance(rule.softmax, SoftmaxDetached):
        return "detached"
    return "positive" if isinstance(rule.qk, MatmulAlphaBeta) else "half"


def _wanted(stream: JointStream | None) -> tuple[bool, bool, bool]:
    if stream is None:
        return (False, False, False)
    return (stream.wanted[0], stream.wanted[1], stream.wanted[2])


def _lifted_mask(mask: Tensor | None, heads: int) -> Tensor | None:
    """A mask of [..., Nq, Nk] that broadcasts to [B * H, Nq, Nk] as one for [B, H, Nq, Nk]."""
    if mask is None or mask.ndim < 3 or mask.shape[0] == 1:
        return mask
    return mask.unflatten(0, (-1, heads))
