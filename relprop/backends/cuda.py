"""The CUDA backend: fused kernels for the rules on the hot path, with the products of linear layers and attention.

All streams of a linear layer go back in one launch, which reads the weight once for them together. Attention runs in
tiles; where the maps themselves are read out, its products are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relprop import native_cuda
from relprop.backends import cpp, cpp_attention, elementwise
from relprop.backends.elementwise import ACTIVATIONS, NORMS, Rows, only_first
from relprop.graph import Node, Value
from relprop.native_cuda import Back
from relprop.native_cuda.attention_relevance import largest_head
from relprop.program import JointKernel, JointStream
from relprop.rules import (
    AddEpsilon,
    AddGamma,
    AddNormalised,
    AttentionComposed,
    Call,
    FanoutEpsilon,
    Gradient,
    LinearAlphaBeta,
    LinearEpsilon,
    LinearGamma,
    ModifiedGradient,
    Relevances,
    Rule,
    SoftmaxTaylor,
)
from relprop.rules.attention_composed import heads
from relprop.rules.base import unbroadcast
from relprop.rules.linear_map import multiply

DTYPES = (torch.float32,)

# What the factors of a product are rounded to: by the layer's dtype for what the forward pass multiplied as well, by
# the precision for streams, which are float32.
_SHARE_OUT = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SINGLE = {"highest": "float32", "high": "tfloat32", "medium": "bfloat16"}
_HALF = {torch.bfloat16: {**_SINGLE}, torch.float16: {**_SINGLE, "medium": "tfloat32"}}


def available() -> tuple[bool, str]:
    """Whether the compiled kernels can be used here, and why not."""
    return native_cuda.available()


def reasons_against(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason why no kernel of this backend can run streams of a dtype on a device."""
    usable, reason = available()
    reasons = [] if usable else [reason]
    if device.type != native_cuda.device_type():
        reasons.append(f"its kernels run on a GPU, not on {device}")
    if dtype not in DTYPES:
        reasons.append(f"its kernels take streams in {', '.join(str(d) for d in DTYPES)}, not {dtype}")
    return reasons


def kernel_reasons(node: Node, rule: Rule) -> list[str]:
    """Why the kernel for a rule does not take this node; empty where it does."""
    if isinstance(rule, Gradient):
        return elementwise.gradient_reasons(node)
    if isinstance(rule, FanoutEpsilon) and len(node.outputs) > (most := native_cuda.most_readers()):
        return [f"the kernel is for at most {most} uses of a value, got {len(node.outputs)}"]
    return cpp.kernel_reasons(node, rule)


def alike(call: Call, *values: Any) -> list[Tensor]:
    """Saved tensors in one dtype: as they are where they have one that kernels read, else in the streams'."""
    tensors = [call.tensors[value.index] for value in values]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and dtypes <= set(native_cuda.DTYPES):
        return tensors
    return [call.tensor(value) for value in values]


def share_out_product(values: torch.dtype, precision: str) -> str:
    """What a share-out's factors are rounded to; those of a half precision are exact as they are."""
    return _SHARE_OUT.get(values) or _SINGLE[precision]


def back_product(values: torch.dtype, precision: str) -> str:
    """What the factors of a float32 stream's way back are rounded to."""
    return _HALF.get(values, _SINGLE)[precision]


class _Layer:
    """A linear layer's tensors as its kernels take them."""

    def __init__(self, call: Call) -> None:
        node = call.node
        bias = node.operands[2] if len(node.operands) > 2 else None
        found = alike(call, *node.operands[:2], *([] if bias is None else [bias]))
        self.x, self.weight = found[:2]
        self.bias = found[2] if len(found) > 2 else None
        self.precision = call.precision
        self.product = share_out_product(self.x.dtype, call.precision)
        self.y = call.tensors.get(node.outputs[0].index)
        if self.product == "float32" and (self.y is None or self.y.dtype != self.x.dtype):
            self.y = F.linear(self.x, self.weight, self.bias)

    def arguments(self, relevance: Tensor) -> tuple[Tensor | None, ...]:
        return relevance, self.x, self.weight, self.y, self.bias

    def back(self, *backs: Back) -> list[Tensor]:
        product = back_product(self.x.dtype, self.precision)
        return native_cuda.linear_back(backs, self.x, self.weight, product=product)


def _prepared(rule: Any, layer: _Layer, arrived: Tensor) -> Back:
    """The share-out of one stream. arrived: [T, ..., N]"""
    if isinstance(rule, Gradient):
        return Back(arrived)
    given: tuple[Any, ...] = layer.arguments(arrived)
    options = {"product": layer.product, "stabiliser": rule.stabiliser.code}
    if isinstance(rule, LinearEpsilon):
        s = native_cuda.linear_epsilon_share_out(*given, bias_takes_share=rule.bias, **options)
        return Back(s, None, 1.0)
    if isinstance(rule, LinearGamma):
        p1, p2 = native_cuda.linear_gamma_share_out(*given, gamma=rule.gamma, bias_takes_share=rule.bias, **options)
        return Back(p1, p2, 1 + rule.gamma / 2, rule.gamma / 2)
    p1, p2 = native_cuda.linear_alpha_beta_share_out(*given, alpha=rule.alpha, beta=rule.beta, **options)
    return Back(p1, p2, 0.5, 0.5)


def linear(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Any rule of a linear layer: denominators formed in registers. relevance: [T, ..., N] -> [T, ..., K]"""
    if not call.wanted[0]:
        return rule.propagate(call, relevance)
    if isinstance(rule, Gradient):  # the layer's input may not have been kept for it
        (weight,) = alike(call, call.node.operands[1])
        product = back_product(weight.dtype, call.precision)
        return only_first(call, native_cuda.linear_back([Back(relevance)], None, weight, product=product)[0])
    layer = _Layer(call)
    return only_first(call, layer.back(_prepared(rule, layer, relevance))[0])


def joint_kernel(node: Node, rules: Mapping[str, Rule], edge: str | None, device: torch.device) -> JointKernel | None:
    """The kernel that takes all streams of a step at once, None where there is none."""
    if joint_reasons(node, rules, edge, device):
        return None
    return attention if node.kind == "attention" else joint_linear


def joint_reasons(node: Node, rules: Mapping[str, Rule], edge: str | None, device: torch.device) -> list[str]:
    """Why no joint kernel takes this node with these rules by stream on a device; empty where one does."""
    if node.kind == "attention":
        return cpp_attention.kernel_reasons(node, rules, edge) + _head_reasons(node, device)
    if node.kind != "linear" or edge is not None or len(rules) < 2:
        return ["the joint kernels are for attention and for several streams of a linear layer"]
    lacking = [rule for rule in rules.values() if KERNELS.get(type(rule)) not in (linear, gradient)]
    reasons = [f"the joint kernel has no rule {rule.name}" for rule in lacking]
    return reasons + [reason for rule in rules.values() for reason in kernel_reasons(node, rule)]


def _head_reasons(node: Node, device: torch.device) -> list[str]:
    values = [value for value in node.operands[:3] if value is not None]
    widths, dtypes = [value.shape[-1] for value in values], {value.dtype for value in (*values, node.outputs[0])}
    as_they_are = len(dtypes) == 1 and dtypes <= set(native_cuda.DTYPES)  # as `alike` will find them
    largest = largest_head(dtypes.pop() if as_they_are else torch.float32, device)
    if all(isinstance(width, int) and width <= largest for width in widths):
        return []
    return [f"the joint kernel takes heads of at most {largest} channels on {device}, not {max(map(str, widths))}"]


def attention(
    call: Call, streams: Mapping[str, JointStream], edge: str | None, row: Tensor | None
) -> tuple[dict[str, Relevances], Tensor | None]:
    """All streams through one attention layer, and row E; see `relprop.native_cuda.attention_relevance`."""
    relevance = streams.get("relevance")
    if relevance is not None and isinstance(relevance.rule, ModifiedGradient):
        return cpp_attention.modified(attention, call, relevance, edge, row)
    output = call.node.outputs[0]
    stored = [] if call.tensors.get(output.index) is None else [output]
    q, k, v, *o = alike(call, *call.node.operands[:3], *stored)
    exact = bool(stored) and call.tensors[output.index].dtype == torch.float32
    layer = (q, k, v, o[0] if o else None)
    product = "float32" if call.precision == "highest" else "tfloat32"
    kernel = native_cuda.attention_relevance
    return cpp_attention.through_layer(kernel, call, layer, streams, edge, row, exact_output=exact, product=product)


def joint_linear(
    call: Call, streams: Mapping[str, JointStream], edge: str | None, row: Tensor | None
) -> tuple[dict[str, Relevances], Tensor | None]:
    """All streams through one linear layer, whose weight is read once for their ways back."""
    layer = _Layer(call)
    outs = layer.back(*(_prepared(stream.rule, layer, stream.arrived) for stream in streams.values()))
    return {name: only_first(call, out) for name, out in zip(streams, outs, strict=True)}, None


def gradient(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """The gradient of linear layers, norms and activations. relevance: [T, ...]"""
    node = call.node
    if node.kind == "linear":
        return linear(rule, call, relevance)
    if node.target in NORMS:
        rows = Rows(call)
        weight = next((a for a in node.args[2:3] if isinstance(a, Value)), None)
        x, *scale = alike(call, node.operands[0], *([] if weight is None else [weight]))
        passed = native_cuda.norm_gradient(
            rows.flat(relevance),
            rows.flat(x),
            scale[0].reshape(-1) if scale else None,
            norm=rows.norm,
            epsilon=rows.epsilon,
        )
        return only_first(call, passed.reshape(relevance.shape))
    name = ACTIVATIONS[node.target]
    if name == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    (x,) = alike(call, node.operands[0])
    return only_first(call, native_cuda.activation_gradient(relevance, x, activation=name))


def add_normalised(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Sums and shares in two passes over memory. relevance: [T, B, ...] -> two of them"""
    values = call.node.args[:2]
    a, b = alike(call, *values)
    parts = call.node.outputs[0].sample
    assert parts is not None
    batch = relevance.shape[1] // parts.factor
    shapes = [(1 if t.shape[0] == 1 and relevance.shape[1] > 1 else batch, -1) for t in (a, b)]
    first, second = a.reshape(shapes[0]), b.reshape(shapes[1])
    swapped = first.shape[0] < second.shape[0]
    if swapped:
        first, second = second, first
    flat = relevance.reshape(relevance.shape[0], batch, -1)
    passed = native_cuda.add_normalised(flat, first, second, stabiliser=rule.stabiliser.code)
    passed = passed[::-1] if swapped else passed
    return tuple(
        part.reshape(relevance.shape) if value.carrying else None for value, part in zip(values, passed, strict=True)
    )


def add(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Both parts in one pass over memory. relevance: [T, ...] -> two of them"""
    values = call.node.args[:2]
    a, b = (t.expand(relevance.shape[1:]) for t in alike(call, *values))
    if isinstance(rule, AddGamma):
        parts = native_cuda.add_gamma(relevance, a, b, stabiliser=rule.stabiliser.code, gamma=rule.gamma)
    else:
        parts = native_cuda.add_epsilon(relevance, a, b, stabiliser=rule.stabiliser.code)
    return tuple(
        unbroadcast(part, call.shapes[value.index]) if value.carrying else None
        for value, part in zip(values, parts, strict=True)
    )


def fanout_epsilon(rule: Any, call: Call, relevance: Any) -> Relevances:
    """All uses gathered in one pass. relevance: one [T, ...] per use"""
    parts = [part for part in relevance if part is not None]
    (x,) = alike(call, call.node.operands[0])
    return (native_cuda.fanout_epsilon(parts, x, stabiliser=rule.stabiliser.code),)


def softmax_taylor(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Sums and relevance of a row in one kernel. relevance: [T, ..., N]"""
    logits, probabilities = alike(call, call.node.operands[0], call.node.outputs[0])
    return only_first(call, native_cuda.softmax_taylor(relevance, logits, probabilities))


def attention_composed(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Shares of both products between the matrix products in one pass. relevance: [T, ..., H, Nq, dv]"""
    at = heads(call)
    (z,) = alike(call, call.node.outputs[0])
    s = native_cuda.share(relevance, z, stabiliser=rule.av.stabiliser.code)
    value = multiply(call, at.probabilities.mT, s / 2).mul_(at.v) if call.wanted[2] else None
    weighted = multiply(call, s, at.v.mT)
    query = key = None
    if call.wanted[0] or call.wanted[1]:
        shares, map_relevance = native_cuda.attention_shares(
            at.probabilities, weighted, at.dots, stabiliser=rule.qk.stabiliser.code, want_relevance=True
        )
        query = multiply(call, shares, at.k / 2).mul_(at.q) if call.wanted[0] else None
        key = multiply(call, shares.mT, at.q / 2).mul_(at.k) if call.wanted[1] else None
        assert map_relevance is not None
    else:
        map_relevance = weighted * (at.probabilities / 2)
    call.maps["relevance"] = map_relevance
    return query, at.fold(key), at.fold(value), None


KERNELS: dict[type[Rule], Callable[[Any, Call, Any], Relevances]] = {
    LinearAlphaBeta: linear,
    LinearEpsilon: linear,
    LinearGamma: linear,
    Gradient: gradient,
    AddNormalised: add_normalised,
    AddEpsilon: add,
    AddGamma: add,
    FanoutEpsilon: fanout_epsilon,
    SoftmaxTaylor: softmax_taylor,
    AttentionComposed: attention_composed,
}
