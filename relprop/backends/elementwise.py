"""Rules of the C++ backend whose kernels work element by element or row by row, around matrix products by torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from relprop import native
from relprop.backends import products
from relprop.graph import Node, Value
from relprop.rules import Call, Relevances
from relprop.rules.base import unbroadcast
from relprop.rules.linear_map import bias_of, reduced_precision, weight_of
from relprop.rules.norm_sigma_constant import layer_norm_arguments

aten = torch.ops.aten

ACTIVATIONS = {aten.gelu.default: "gelu", aten.silu.default: "silu", aten.silu_.default: "silu"}
NORMS = {aten.layer_norm.default: "layer", aten.rms_norm.default: "rms"}


def stored(call: Call, value: Value | None) -> Tensor:
    """A saved tensor as the kernels read it: a half precision as it is, else in the streams' dtype."""
    assert value is not None
    tensor = call.tensors[value.index]
    return tensor if tensor.dtype in native.HALF else call.tensor(value)


def factor_dtype(call: Call) -> torch.dtype:
    """What the factors and results of this call's matrix products are held in."""
    return torch.bfloat16 if reduced_precision(call) else call.dtype


def only_first(call: Call, passed: Tensor) -> Relevances:
    """What the first operand gets, and nothing for the others."""
    return (passed, *[None] * (len(call.node.operands) - 1))


def add_reasons(node: Node) -> list[str]:
    """Why the kernels of adds do not take a node."""
    reasons = []
    shapes = [a.shape if isinstance(a, Value) else () for a in node.args[:2]]
    if any([str(s) for s in shape[1:]] != [str(s) for s in node.outputs[0].shape[1:]] for shape in shapes):
        reasons.append("the kernel wants summands of one shape, but for the batch")
    if node.kwargs or node.target is not aten.add.Tensor:
        reasons.append("the kernel adds without a factor")
    return reasons


def add_epsilon(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Both parts in one pass over memory. relevance: [T, ...] -> two of them"""
    return _add(native.add_epsilon, {}, rule, call, relevance)


def add_gamma(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Both parts in one pass over memory. relevance: [T, ...] -> two of them"""
    return _add(native.add_gamma, {"gamma": rule.gamma}, rule, call, relevance)


def _add(kernel: Any, parameters: dict[str, float], rule: Any, call: Call, relevance: Tensor) -> Relevances:
    values = call.node.args[:2]
    first, second = (stored(call, v) for v in values)
    wanted = tuple(bool(v.carrying) for v in values)
    swapped = first.shape[0] < second.shape[0]
    if swapped:
        first, second, wanted = second, first, wanted[::-1]
    parts = kernel(relevance, first, second, stabiliser=rule.stabiliser.code, wanted=wanted, **parameters)
    parts = parts[::-1] if swapped else parts
    return tuple(
        None if part is None else unbroadcast(part, call.shapes[value.index])
        for value, part in zip(values, parts, strict=True)
    )


def linear_reasons(node: Node) -> list[str]:
    """Why the kernels of linear layers do not take a node."""
    return [] if node.kind == "linear" else ["the kernel is for linear layers"]


def preactivation(call: Call, x: Tensor) -> tuple[Tensor, bool]:
    """y, and whether the bias is in it: as stored where that was not rounded, else x wᵀ anew."""
    y = call.tensors.get(call.node.outputs[0].index)
    if y is None or y.dtype != call.dtype:
        return x.to(factor_dtype(call)) @ weight_of(call).mT, False
    return y, True


def linear_epsilon(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Shares in one pass over memory, the selection in another. relevance: [T, ..., N] -> [T, ..., K]"""
    x, dtype = stored(call, call.node.operands[0]), factor_dtype(call)
    y, biased = preactivation(call, x)
    bias = bias_of(call) if biased != rule.bias else None  # y lacks what takes a share, or has what takes none
    made_of = products.of_call(call)
    s = native.epsilon_share_out(
        relevance,
        y,
        bias,
        bias_factor=-1.0 if biased else 1.0,
        stabiliser=rule.stabiliser.code,
        dtype=dtype if made_of is None else None,
    )
    c = s @ weight_of(call) if made_of is None else products.transpose(call, s, made_of)
    out = c if c.dtype == call.dtype else None
    return only_first(call, native.epsilon_select(x, c, out, dtype=call.dtype))


def linear_gamma(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Shares in one pass over memory, the selection in another. relevance: [T, ..., N] -> [T, ..., K]"""
    x, weight, magnitude = stored(call, call.node.operands[0]), weight_of(call), weight_of(call, "abs")
    dtype = factor_dtype(call)
    y, biased = preactivation(call, x)
    p1, p2 = native.gamma_share_out(
        relevance,
        y,
        bias_of(call),
        x.to(dtype).abs() @ magnitude.mT,
        gamma=rule.gamma,
        biased=biased,
        bias_share=rule.bias,
        stabiliser=rule.stabiliser.code,
        dtype=dtype,
    )
    c1, c2 = p1 @ weight, p2 @ magnitude
    return only_first(call, native.select(x, c1, c2, c1 if dtype == call.dtype else None, dtype=call.dtype))


def softmax_reasons(node: Node) -> list[str]:
    """Why the kernel of the Taylor rule does not take a node."""
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    return [] if axis in (-1, node.outputs[0].rank - 1) else ["the kernel is for a softmax over the last axis"]


def softmax_taylor(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Sums and relevance of a row while it is in cache. relevance: [T, ..., N]"""
    logits, probabilities = stored(call, call.node.operands[0]), stored(call, call.node.outputs[0])
    return only_first(call, native.softmax_taylor(relevance, logits, probabilities))


def activation_slope(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """One pass over memory. relevance: [T, ...]"""
    x, y = stored(call, call.node.operands[0]), stored(call, call.node.outputs[0])
    return only_first(call, native.activation_slope(relevance, x, y, stabiliser=rule.stabiliser.code))


def norm_reasons(node: Node) -> list[str]:
    """Why the kernels of norms do not take a node."""
    return [] if node.target in NORMS else ["the kernel is for layer norms and RMS norms"]


class Rows:
    """A norm's tensors with the normalised axes as one."""

    def __init__(self, call: Call) -> None:
        node = call.node
        self.norm = NORMS[node.target]
        if self.norm == "layer":
            shape, weight, _, self.epsilon = layer_norm_arguments(node)
        else:
            shape, weight, epsilon = (*node.args[1:4], None, None)[:3]
            self.epsilon = torch.finfo(call.dtype).eps if epsilon is None else epsilon
        self.size = math.prod(shape)
        self.weight = stored(call, weight).reshape(-1) if isinstance(weight, Value) else None
        self.axes = len(shape)

    def flat(self, tensor: Tensor) -> Tensor:
        """[..., *normalised] -> [..., N]"""
        return tensor if self.axes == 1 else tensor.reshape(*tensor.shape[: -self.axes], self.size)


def norm_sigma_constant(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Statistics, shares and relevance of a row while it is in cache. relevance: [T, ..., N]"""
    rows, x = Rows(call), stored(call, call.node.operands[0])
    passed = native.norm_sigma_constant(
        rows.flat(relevance),
        rows.flat(x),
        rows.flat(stored(call, call.node.outputs[0])),
        rows.weight,
        norm=rows.norm,
        epsilon=rows.epsilon,
        stabiliser=rule.stabiliser.code,
    )
    return only_first(call, passed.reshape(relevance.shape))


def gradient_reasons(node: Node) -> list[str]:
    """Why no kernel of the gradient takes a node."""
    if node.kind == "linear" or node.target in NORMS or node.target in ACTIVATIONS:
        return []
    return ["the kernels are for linear layers, layer norms, RMS norms, GELU and SiLU"]


def _sum(parts: list[Tensor]) -> Tensor:
    """Of streams of one shape."""
    total = parts[0]
    for part in parts[1:]:
        own = total is not parts[0]
        total = torch.add(total, part, out=total if own else native.empty(total.shape, total.dtype))
    return total


def gradient(rule: Any, call: Call, relevance: Any) -> Relevances:
    """The gradient where a kernel is faster than torch's own. relevance: [T, ...]"""
    node = call.node
    if node.kind == "linear":
        return products.gradient(rule, call, relevance)
    if node.kind == "fanout":
        parts = relevance if isinstance(relevance, tuple) else (relevance,)
        return (_sum([part for part in parts if part is not None]),)
    x = stored(call, node.operands[0])
    if node.target in NORMS:
        rows = Rows(call)
        passed = native.norm_gradient(
            rows.flat(relevance), rows.flat(x), rows.weight, norm=rows.norm, epsilon=rows.epsilon
        )
        return only_first(call, passed.reshape(relevance.shape))
    name = ACTIVATIONS[node.target]
    if name == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    return only_first(call, native.activation_gradient(relevance, x, activation=name))
