"""The C++ backend: fused CPU kernels for the rules on the hot path, matrix products by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from relprop import native
from relprop.backends import cpp_attention, elementwise, products
from relprop.backends.elementwise import factor_dtype, stored
from relprop.graph import Node
from relprop.program import JointKernel
from relprop.rules import (
    ActivationSlope,
    AddEpsilon,
    AddGamma,
    AddIdentity,
    AddNormalised,
    AttentionComposed,
    Call,
    FanoutEpsilon,
    Gradient,
    LinearAlphaBeta,
    LinearEpsilon,
    LinearGamma,
    MatmulHalf,
    NormSigmaConstant,
    Relevances,
    Rule,
    SoftmaxIdentity,
    SoftmaxTaylor,
)
from relprop.rules.attention_composed import heads
from relprop.rules.linear_map import multiply, weight_of

DTYPES = (torch.float32, torch.float64)


def available() -> tuple[bool, str]:
    """Whether the compiled kernels can be used here, and why not."""
    return native.available()


def reasons_against(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason why no kernel of this backend can run streams of a dtype on a device."""
    usable, reason = native.available()
    reasons = [] if usable else [reason]
    if device.type != "cpu":
        reasons.append(f"its kernels run on the CPU, not on {device}")
    if dtype not in DTYPES:
        reasons.append(f"its kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}")
    return reasons


def kernel_reasons(node: Node, rule: Rule) -> list[str]:
    """Why the kernel for a rule does not take this node; empty where it does."""
    reasons: list[str] = []
    if type(rule) in _REASONS:
        return _REASONS[type(rule)](node)
    if isinstance(rule, LinearAlphaBeta):
        if node.kind != "linear":
            reasons.append("the kernel is for linear layers")
        if rule.bias or not rule.joint:
            reasons.append("the kernel has no bias share and one denominator")
    if isinstance(rule, AddNormalised):
        sample = node.outputs[0].sample
        if sample is None or sample.axis != 0 or sample.factor is None:
            reasons.append("the kernel wants samples on the first axis")
        reasons += elementwise.add_reasons(node)
    if isinstance(rule, FanoutEpsilon) and rule.stabiliser.is_exact:
        reasons.append("a plain sum needs no kernel")
    if isinstance(rule, AttentionComposed):
        parts = (rule.qk, rule.softmax, rule.av)
        if not (isinstance(parts[0], MatmulHalf) and isinstance(parts[2], MatmulHalf)):
            reasons.append("the kernel is for the rule half in both products")
        if not isinstance(parts[1], SoftmaxIdentity):
            reasons.append("the kernel is for the softmax rule identity")
        if not isinstance(rule.mask, AddIdentity):
            reasons.append("the kernel gives nothing to the mask")
    return reasons


def divides_by_sums(node: Node, rules: Mapping[str, Rule]) -> bool:
    """Whether z+ of a bfloat16 layer would be made of x wᵀ as it was before it was rounded."""
    rule = rules.get("relevance")
    rounded = node.kind == "linear" and node.outputs[0].dtype == torch.bfloat16
    return rounded and isinstance(rule, LinearAlphaBeta) and rule.beta == 0 and not kernel_reasons(node, rule)


def joint_kernel(node: Node, rules: Mapping[str, Rule], edge: str | None, device: torch.device) -> JointKernel | None:
    """The kernel that takes all streams of a step at once, None where there is none."""
    if node.kind != "attention" or cpp_attention.kernel_reasons(node, rules, edge):
        return None
    return cpp_attention.attention


def linear_alpha_beta(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """z+ shares in one pass over memory, the selection in another. relevance: [T, ..., N] -> [T, ..., K]"""
    made_of = products.of_call(call)
    if made_of is not None and rule.beta == 0:
        return products.alpha_beta(rule, call, relevance, made_of)
    if made_of is None:  # few rows, which take no less time in bfloat16
        call = call.at_precision("highest")
    x, weight, magnitude = stored(call, call.node.operands[0]), weight_of(call), weight_of(call, "abs")
    dtype = factor_dtype(call)
    y, bias, absolute = products.terms(call)
    p1, p2 = native.share_out(
        relevance,
        y,
        bias,
        absolute,
        alpha=rule.alpha,
        beta=rule.beta,
        stabiliser=rule.stabiliser.code,
        tolerance=4 * torch.finfo(call.dtype).eps,
        dtype=dtype,
    )
    c1, c2 = p1 @ weight, p2 @ magnitude
    return native.select(x, c1, c2, out=c1 if dtype == call.dtype else None, dtype=call.dtype), None, None


def add_normalised(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Sums and shares in two passes over memory. relevance: [T, B, ...] -> two of them"""
    a, b = (stored(call, v) for v in call.node.args[:2])
    parts = call.node.outputs[0].sample
    assert parts is not None
    batch = relevance.shape[1] // parts.factor
    shapes = [(1 if t.shape[0] == 1 and relevance.shape[1] > 1 else batch, -1) for t in (a, b)]
    flat = relevance.reshape(relevance.shape[0], batch, -1)
    first, second = a.reshape(shapes[0]), b.reshape(shapes[1])
    swapped = first.shape[0] < second.shape[0]
    if swapped:
        first, second = second, first
    ra, rb = native.add_normalised(flat, first, second, stabiliser=rule.stabiliser.code)
    if swapped:
        ra, rb = rb, ra
    results: list[Tensor | None] = []
    for value, part in zip(call.node.args[:2], (ra, rb), strict=True):
        results.append(part.reshape(relevance.shape) if value.carrying else None)
    return tuple(results)


def fanout_epsilon(rule: Any, call: Call, relevance: Any) -> Relevances:
    """All uses gathered in one pass. relevance: one [T, ...] per use"""
    parts = [part for part in relevance if part is not None]
    return (native.fanout_epsilon(parts, stored(call, call.node.operands[0]), stabiliser=rule.stabiliser.code),)


def attention_composed(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Shares of both products between the matrix products in one pass. relevance: [T, ..., H, Nq, dv]"""
    at = heads(call)
    s = native.share(relevance, stored(call, call.node.outputs[0]), stabiliser=rule.av.stabiliser.code)
    value = multiply(call, at.probabilities.mT, s / 2).mul_(at.v) if call.wanted[2] else None
    weighted = multiply(call, s, at.v.mT)
    query = key = None
    if call.wanted[0] or call.wanted[1]:
        shares, map_relevance = native.attention_shares(
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
    LinearAlphaBeta: linear_alpha_beta,
    AddNormalised: add_normalised,
    FanoutEpsilon: fanout_epsilon,
    AttentionComposed: attention_composed,
    LinearEpsilon: elementwise.linear_epsilon,
    LinearGamma: elementwise.linear_gamma,
    AddEpsilon: elementwise.add_epsilon,
    AddGamma: elementwise.add_gamma,
    SoftmaxTaylor: elementwise.softmax_taylor,
    ActivationSlope: elementwise.activation_slope,
    NormSigmaConstant: elementwise.norm_sigma_constant,
    Gradient: elementwise.gradient,
}

_REASONS: dict[type[Rule], Callable[[Node], list[str]]] = {
    LinearEpsilon: elementwise.linear_reasons,
    LinearGamma: elementwise.linear_reasons,
    AddEpsilon: elementwise.add_reasons,
    AddGamma: elementwise.add_reasons,
    SoftmaxTaylor: elementwise.softmax_reasons,
    ActivationSlope: lambda node: [],
    NormSigmaConstant: elementwise.norm_reasons,
    Gradient: lambda node: [] if node.kind == "fanout" else elementwise.gradient_reasons(node),
}
