"""The Triton backend: fused GPU kernels of `relprop.kernels`, also under Triton's interpreter on the CPU.

Streams are float32. Products of a bfloat16 or float16 model are taken in its own dtype with float32 accumulation, those
of a float32 model as `precision` says. Kernels are imported when the first one is needed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from relprop.backends import cpp_attention, elementwise
from relprop.backends.elementwise import ACTIVATIONS, NORMS, Rows, only_first, stored
from relprop.graph import Node
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
    NormSigmaConstant,
    Relevances,
    Rule,
    SoftmaxTaylor,
)
from relprop.rules.base import unbroadcast

DTYPES = (torch.float32,)
_LARGEST_HEAD = 256
_LONGEST_ROW = 8192
_QK = {"half": "half", "positive": "alpha_beta", "detached": "none"}


def _interpreted() -> bool:
    loaded = sys.modules.get("relprop.kernels.launch")
    return os.environ.get("TRITON_INTERPRET", "0") == "1" if loaded is None else loaded.interpreted


def available() -> tuple[bool, str]:
    """Whether the kernels can be used on this machine, and why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if not _interpreted() and not torch.cuda.is_available():
        return False, "torch finds no CUDA device"
    return True, ""


def reasons_against(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason why no kernel of this backend can run streams of a dtype on a device."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    elif device.type == "cuda" or _interpreted():
        from relprop.kernels.launch import unusable

        reasons += unusable(device)
    else:
        reasons.append(f"its kernels run on CUDA devices (or under TRITON_INTERPRET=1), not on {device}")
    if dtype not in DTYPES:
        reasons.append(f"its kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}")
    return reasons


def kernel_reasons(node: Node, rule: Rule) -> list[str]:
    """Why the kernel for a rule does not take this node; empty where it does."""
    if isinstance(rule, (LinearAlphaBeta, LinearEpsilon, LinearGamma)):
        reasons = elementwise.linear_reasons(node)
        if isinstance(rule, LinearAlphaBeta) and not rule.joint:
            reasons.append("the kernel has one denominator")
        return reasons
    if isinstance(rule, AddNormalised):
        sample = node.outputs[0].sample
        if sample is None or sample.axis != 0 or sample.factor != 1:
            return ["the kernel wants samples on the first axis", *elementwise.add_reasons(node)]
    if isinstance(rule, (AddNormalised, AddEpsilon, AddGamma)):
        return elementwise.add_reasons(node)
    if isinstance(rule, FanoutEpsilon):
        return ["a plain sum needs no kernel"] if rule.stabiliser.is_exact else []
    if isinstance(rule, SoftmaxTaylor):
        return elementwise.softmax_reasons(node)
    if isinstance(rule, NormSigmaConstant):
        return elementwise.norm_reasons(node) or _row_reasons(node)
    return elementwise.gradient_reasons(node) or (_row_reasons(node) if node.kind == "norm" else [])


def _row_reasons(node: Node) -> list[str]:
    size = math.prod(int(n) for n in node.args[1])
    return [f"the kernel takes rows of at most {_LONGEST_ROW} elements, not {size}"] if size > _LONGEST_ROW else []


def _linear(call: Call) -> dict[str, Any]:
    """x, w, y and bias as the share-outs take them: y only where it was not rounded to less than the streams."""
    x, weight = (call.tensors[v.index] for v in call.node.operands[:2] if v is not None)
    if x.dtype != weight.dtype:
        x, weight = x.float(), weight.float()
    y = call.tensors.get(call.node.outputs[0].index)
    bias = call.node.operands[2] if len(call.node.operands) > 2 else None
    return {
        "x": x,
        "w": weight,
        "y": y if y is not None and y.dtype == call.dtype else None,
        "bias": None if bias is None else call.tensors[bias.index],
    }


def shares(rule: Any, call: Call, relevance: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
    """The share-out of any linear rule, as `linear_back` takes it: shares, x, w and the factors of the products.

    Args:
        relevance: at the output. [T, ..., N]
        scale: of relevance, per target and sample. [T, B]
    """
    from relprop.kernels import linear_alpha_beta, linear_epsilon, linear_gamma

    given = _linear(call)
    found = {"x": given["x"], "w": given["w"]}
    options = {"stabiliser": rule.stabiliser.code, "precision": call.precision, "scale": scale}
    given |= {"bias_share": rule.bias, **options}
    if isinstance(rule, LinearAlphaBeta):
        p1, p2 = linear_alpha_beta.linear_alpha_beta_share_out(relevance, alpha=rule.alpha, beta=rule.beta, **given)
        return {**found, "p1": p1, "p2": p2, **linear_alpha_beta.factors()}
    if isinstance(rule, LinearGamma):
        p1, p2 = linear_gamma.linear_gamma_share_out(relevance, gamma=rule.gamma, **given)
        return {**found, "p1": p1, "p2": p2, **linear_gamma.factors(rule.gamma)}
    return {**found, "p1": linear_epsilon.linear_epsilon_share_out(relevance, **given), "p2": None}


def _through_linear(rule: Any, call: Call, relevance: Tensor, gradients: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Shares and the way back of any linear rule, with gradients that ride along."""
    from relprop.kernels.linear_back import linear_back

    passed, carried = linear_back(**shares(rule, call, relevance), gradients=gradients, precision=call.precision)
    assert passed is not None
    return passed, carried


def linear(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Shares in one kernel, the way back in another. relevance: [T, ..., N] -> [T, ..., K]"""
    return only_first(call, _through_linear(rule, call, relevance, None)[0])


def linear_joint(
    call: Call, streams: Mapping[str, JointStream], edge: str | None, row: Tensor | None
) -> tuple[dict[str, Relevances], Tensor | None]:
    """Relevance and gradient with one load of the weight."""
    relevance, gradient = streams.get("relevance"), streams.get("gradient")
    if relevance is None or gradient is None:
        name, stream = next(iter(streams.items()))
        return {name: KERNELS[type(stream.rule)](stream.rule, call, stream.arrived)}, None
    passed, carried = _through_linear(relevance.rule, call, relevance.arrived, gradient.arrived)
    return {"relevance": only_first(call, passed), "gradient": only_first(call, carried)}, None  # type: ignore[arg-type]


def add(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Both parts of a residual add. relevance: [T, B, ...] -> two of them"""
    from relprop.kernels.add_epsilon import add_epsilon
    from relprop.kernels.add_gamma import add_gamma
    from relprop.kernels.add_normalised import add_normalised

    values = call.node.args[:2]
    first, second = (stored(call, v) for v in values)
    swapped = first.shape[0] < second.shape[0]
    if swapped:
        first, second = second, first
    code = rule.stabiliser.code
    if isinstance(rule, AddNormalised):
        parts = add_normalised(relevance, first, second, stabiliser=code)[:2]
    elif isinstance(rule, AddGamma):
        parts = add_gamma(relevance, first, second, gamma=rule.gamma, stabiliser=code)
    else:
        parts = add_epsilon(relevance, first, second, stabiliser=code)
    parts = parts[::-1] if swapped else parts
    return tuple(
        unbroadcast(part, call.shapes[value.index]) if value.carrying else None
        for value, part in zip(values, parts, strict=True)
    )


def fanout_epsilon(rule: Any, call: Call, relevance: Any) -> Relevances:
    """All uses gathered in one pass. relevance: one [T, ...] per use"""
    from relprop.kernels import fanout_epsilon as kernels

    parts = [part for part in relevance if part is not None]
    x = stored(call, call.node.operands[0])
    return (kernels.fanout_epsilon(parts, x, stabiliser=rule.stabiliser.code),)


def softmax_taylor(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """One program per row. relevance: [T, ..., N]"""
    from relprop.kernels import softmax_taylor as kernels

    logits, probabilities = stored(call, call.node.operands[0]), stored(call, call.node.outputs[0])
    return only_first(call, kernels.softmax_taylor(relevance, logits, probabilities))


def norm_sigma_constant(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """Statistics, shares and relevance of a row in registers. relevance: [T, ..., N]"""
    from relprop.kernels import norm_sigma_constant as kernels

    rows = Rows(call)
    x, y = (rows.flat(stored(call, v)) for v in (call.node.operands[0], call.node.outputs[0]))
    passed = kernels.norm_sigma_constant(
        rows.flat(relevance), x, y, rows.weight, kind=rows.norm, eps=rows.epsilon, stabiliser=rule.stabiliser.code
    )
    return only_first(call, passed.reshape(relevance.shape))


def gradient(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """The gradient of a linear layer, a norm or an activation. relevance: [T, ...]"""
    from relprop.kernels.activation_gradient import activation_gradient
    from relprop.kernels.linear_back import linear_back
    from relprop.kernels.norm_gradient import norm_gradient

    node = call.node
    if node.kind == "linear":
        if not call.wanted[0]:
            return rule.propagate(call, relevance)
        weight = node.operands[1]
        assert weight is not None
        passed = linear_back(None, None, None, call.tensors[weight.index], relevance, precision=call.precision)[1]
        assert passed is not None
        return only_first(call, passed)
    x = stored(call, node.operands[0])
    if node.target in NORMS:
        rows = Rows(call)
        flat = norm_gradient(rows.flat(relevance), rows.flat(x), rows.weight, kind=rows.norm, eps=rows.epsilon)
        return only_first(call, flat.reshape(relevance.shape))
    return only_first(call, activation_gradient(relevance, x, activation_name(node)))


def activation_name(node: Node) -> str:
    """An activation as the kernels call it."""
    name = ACTIVATIONS[node.target]
    return "gelu_tanh" if name == "gelu" and node.kwargs.get("approximate", "none") == "tanh" else name


def attention(
    call: Call, streams: Mapping[str, JointStream], edge: str | None, row: Tensor | None
) -> tuple[dict[str, Relevances], Tensor | None]:
    """All streams through one attention layer, and row E; see `relprop.kernels.attention_relevance`."""
    from relprop.kernels.attention_relevance import attention_relevance

    arrived = streams.get("relevance")
    if arrived is not None and isinstance(arrived.rule, ModifiedGradient):
        return cpp_attention.modified(attention, call, arrived, edge, row)
    node = call.node
    q, k, v = (call.tensors[value.index] for value in node.operands[:3] if value is not None)
    mask = None if node.operands[3] is None else call.tensors[node.operands[3].index]
    output = call.tensors.get(node.outputs[0].index)
    scale, causal, grouped = node.args[4:7]
    if output is None:
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    relevance, gradient = streams.get("relevance"), streams.get("gradient")
    rule: Any = AttentionComposed() if relevance is None else relevance.rule
    found = attention_relevance(
        q,
        k,
        v,
        output,
        None if gradient is None else gradient.arrived,
        None if relevance is None else relevance.arrived,
        mask=mask,
        causal=causal,
        scale=scale,
        qk=_QK[cpp_attention._qk_rule(rule)],
        qk_stabiliser=rule.qk.stabiliser.code,
        av_stabiliser=rule.av.stabiliser.code,
        row=None if edge is None else row,
        edge=edge,
        gradients_wanted=cpp_attention._wanted(gradient),
        relevances_wanted=cpp_attention._wanted(relevance),
        precision=call.precision,
    )
    passed = {"gradient": (*found.gradients, None), "relevance": (*found.relevances, None)}
    return {name: passed[name] for name in streams}, found.row


def joint_kernel(node: Node, rules: Mapping[str, Rule], edge: str | None, device: torch.device) -> JointKernel | None:
    """The kernel that takes all streams of a step at once, None where there is none."""
    if node.kind == "attention" and not _attention_reasons(node, rules, edge):
        return attention
    if node.kind == "linear" and set(rules) == {"relevance", "gradient"} and isinstance(rules["gradient"], Gradient):
        kernel = KERNELS.get(type(rules["relevance"]))
        if kernel is linear and not kernel_reasons(node, rules["relevance"]):
            return linear_joint
    return None


def _attention_reasons(node: Node, rules: Mapping[str, Rule], edge: str | None) -> list[str]:
    reasons = cpp_attention.kernel_reasons(node, rules, edge)
    q, v = node.operands[0], node.operands[2]
    if q is None or v is None or q.rank != 4:
        reasons.append("the kernel takes q, k, v of 4 axes")
    elif any(not isinstance(t.shape[-1], int) or t.shape[-1] > _LARGEST_HEAD for t in (q, v)):
        reasons.append(f"the kernel takes heads of at most {_LARGEST_HEAD} channels")
    return reasons


KERNELS: dict[type[Rule], Callable[[Any, Call, Any], Relevances]] = {
    LinearAlphaBeta: linear,
    LinearEpsilon: linear,
    LinearGamma: linear,
    AddNormalised: add,
    AddEpsilon: add,
    AddGamma: add,
    FanoutEpsilon: fanout_epsilon,
    SoftmaxTaylor: softmax_taylor,
    NormSigmaConstant: norm_sigma_constant,
    Gradient: gradient,
}
