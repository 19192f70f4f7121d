"""Linear layers of the C++ backend with their matrix products: which layers take them, and on which operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relprop import native
from relprop.graph import Node
from relprop.rules import Call, Relevances, linear_map
from relprop.weights import Derive

# With fewer rows than this a product reads its weights faster than it can pack them; torch's own is used.
FEWEST_ROWS = 12

_STORED = (torch.float32, torch.bfloat16, torch.float16)


def row_count(shape: torch.Size) -> int:
    """Rows of a layer input [..., K]."""
    return shape[:-1].numel()


def operands(rows: int, weight: Tensor, stream: torch.dtype, precision: str) -> torch.dtype | None:
    """What the products of a linear layer are made of, or None where they are torch's.

    Args:
        rows: of the layer's input.
        weight: [N, K]
        stream: the streams' dtype.
    """
    if stream != torch.float32 or weight.dtype not in _STORED or rows < FEWEST_ROWS or not weight.is_cpu:
        return None
    if precision == "medium" and linear_map.native_bfloat16():
        return torch.bfloat16 if native.products_fast(torch.bfloat16) else None
    return torch.float32 if native.products_fast(torch.float32) else None


def of_call(call: Call) -> torch.dtype | None:
    """The same for a step of the sweep."""
    node = call.node
    if node.kind != "linear":
        return None
    return operands(row_count(call.shape(0)), _weight(call), call.dtype, call.precision)


def _weight(call: Call) -> Tensor:
    value = call.node.operands[1]
    assert value is not None
    return call.tensors[value.index]


def _packed(call: Call, transpose: bool, operands: torch.dtype) -> Tensor | None:
    """The weight made ready once per model, for bfloat16 operands.

    They are half as large, and packing them at every call would take a tenth of a product's time. float32 operands
    would double the memory of the weights for half of that gain.
    """
    return call.packed(1, transpose, operands) if operands == torch.bfloat16 else None


def alpha_beta(rule: Any, call: Call, relevance: Tensor, made_of: torch.dtype) -> Relevances:
    """The z+ rule in two products, shares and selection fused. relevance: [T, ..., N] -> [T, ..., K]"""
    node, weight = call.node, _weight(call)
    first = node.operands[0]
    assert first is not None
    x = call.tensors[first.index]
    if x.dtype not in _STORED:
        x = call.x
    # A product of bfloat16 numbers is exact in bfloat16 operands: nothing is lost and half the time is saved.
    exact = torch.bfloat16 if {x.dtype, weight.dtype} == {torch.bfloat16} else made_of
    exact = exact if native.products_fast(exact) else made_of
    y, bias = _product(call)
    shares = native.share_out_product(
        relevance,
        x,
        weight,
        y,
        bias,
        operands=exact,
        alpha=rule.alpha,
        stabiliser=rule.stabiliser.code,
        tolerance=4 * torch.finfo(torch.float32).eps,
        packed=_packed(call, True, exact),
    )
    packed = _packed(call, False, made_of)
    return native.back_product(shares, x, weight, operands=made_of, packed=packed), None, None


def _product(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """x wᵀ in float32 as the forward pass left it, and the bias in it; None where it was rounded. [..., N], [N]"""
    output = call.node.outputs[0]
    sums, y = call.tensors.get(output.sums), call.tensors.get(output.index)
    if sums is None and y is not None and y.dtype == call.dtype:
        return y, linear_map.bias_of(call)
    return sums, None


def terms(call: Call) -> tuple[Tensor, Tensor | None, Tensor]:
    """x wᵀ, the bias in it, and |x||w|ᵀ, all sums of the same factors in the streams' dtype. [..., N], [N], [..., N]

    In bfloat16 where the forward pass was (`forward`), else in the streams' dtype as that was.
    """
    value = call.node.operands[1]
    assert value is not None
    y, bias = _product(call)
    if of_call(call) == torch.bfloat16:
        x, weight = call.x, _weight(call)
        magnitude = call.derive(value, weight, "abs", torch.bfloat16)
        if y is None:
            y = native.linear_apply(x, weight, None, operands=torch.bfloat16)
        return y, bias, native.linear_apply(x.abs(), magnitude, None, operands=torch.bfloat16)
    if y is None:
        y = call.x @ call.tensor(value).mT
    return y, bias, call.x.abs() @ call.tensor(value, "abs").mT


def transpose(call: Call, s: Tensor, made_of: torch.dtype) -> Tensor:
    """s w. s: [T, ..., N] -> [T, ..., K]"""
    return native.linear_transpose(s, _weight(call), operands=made_of, packed=_packed(call, False, made_of))


def gradient(rule: Any, call: Call, relevance: Tensor) -> Relevances:
    """The gradient of a linear layer's input. relevance: [T, ..., N] -> [T, ..., K]"""
    made_of = of_call(call) if call.wanted[0] else None
    if made_of is None:
        return rule.propagate(call, relevance)
    passed = transpose(call, relevance, made_of)
    return (passed, *[None] * (len(call.node.operands) - 1))


def forward(node: Node, derive: Derive, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A float32 layer's forward in bfloat16 operands, where its relevance will be; else the layer's own. [..., N]"""
    if x.dtype == torch.float32 and weight.dtype == torch.float32:
        made_of = operands(row_count(x.shape), weight, torch.float32, "medium")
        if made_of == torch.bfloat16:
            value = node.operands[1]
            packed = None if value is None else derive.packed(value, weight, True, made_of)
            return native.linear_apply(x, weight, bias, operands=made_of, packed=packed)
    return node.target(x, weight, bias)


def forward_with_sums(
    node: Node, derive: Derive, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A bfloat16 layer's forward and the sums x wᵀ in float32, None where the product is torch's. Each [..., N]"""
    made_of = operands(row_count(x.shape), weight, torch.float32, "medium")
    if made_of != torch.bfloat16 or {x.dtype, weight.dtype} != {torch.bfloat16}:
        return node.target(x, weight, bias), None
    value, third = node.operands[1:3]
    packed = None if value is None else derive.packed(value, weight, True, made_of)
    added = None if bias is None or third is None else derive(third, bias, "", torch.float32)
    return native.linear_apply_rounded(x, weight, added, operands=made_of, packed=packed)
