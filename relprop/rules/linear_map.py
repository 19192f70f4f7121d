"""Linear layers and convolutions as one thing: y = W x + b, applied and transposed with any weight."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.graph import Value
from relprop.rules.base import Call

aten = torch.ops.aten


@functools.cache
def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return bool(supported or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def reduced_precision(call: Call) -> bool:
    """Whether products of this call run in bfloat16 with float32 accumulation."""
    if call.precision != "medium" or call.dtype != torch.float32:
        return False
    first = next(t for t in call.tensors.values() if isinstance(t, Tensor))
    return first.is_cuda or native_bfloat16()


def multiply(call: Call, left: Tensor, right: Tensor) -> Tensor:
    """left @ right at the call's precision, in the streams' dtype.

    On a CPU only products with weights are reduced: those between activations have too few channels for it to pay.
    """
    if reduced_precision(call) and (call.node.kind == "linear" or left.is_cuda):
        return (left.bfloat16() @ right.bfloat16()).to(call.dtype)
    return left @ right


def convolution(call: Call) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution node."""
    node = call.node
    rank = len(node.outputs[0].shape) - 2
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if node.target is aten.convolution.default:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
    values = dict(zip(names, node.args, strict=False)) | node.kwargs

    def sizes(name: str, default: int) -> list[int]:
        value = values.get(name, default)
        return [value] * rank if isinstance(value, int) else list(value) * (rank if len(value) == 1 else 1)

    padding = values.get("padding", 0)
    if isinstance(padding, str):
        kernel = node.operands[1].shape[2:]  # type: ignore[union-attr]
        dilation = sizes("dilation", 1)
        padding = (
            [0] * rank if padding == "valid" else [d * (int(k) - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        )
        values["padding"] = padding
    return {
        "stride": sizes("stride", 1),
        "padding": sizes("padding", 0),
        "dilation": sizes("dilation", 1),
        "transposed": bool(values.get("transposed", False)),
        "output_padding": sizes("output_padding", 0),
        "groups": values.get("groups", 1),
    }


def apply(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    """W x without bias. x: [..., K] -> [..., N], or [B, C, ...] -> [B, N, ...] for a convolution."""
    if call.node.kind == "linear":
        return multiply(call, x, weight.mT)
    options = convolution(call)
    return aten.convolution(x, weight, None, *options.values())


def transpose(call: Call, s: Tensor, weight: Tensor) -> Tensor:
    """W^T s for every target. s: [T, ..., N] -> [T, ..., K]"""
    if call.node.kind == "linear":
        return multiply(call, s, weight)
    options = convolution(call)
    targets, batch = s.shape[:2]
    shape = call.shape(0)
    dummy = s.new_empty(()).expand(targets * batch, *shape[1:])
    mask = [True, False, False]
    result = aten.convolution_backward(s.reshape(-1, *s.shape[2:]), dummy, weight, None, *options.values(), mask)[0]
    return result.reshape(targets, *shape)


def weight_of(call: Call, transform: str = "") -> Tensor:
    """The weight in the streams' dtype, optionally transformed. [N, K] or [N, C, ...]"""
    value = call.node.operands[1]
    assert isinstance(value, Value)
    if call.node.kind == "linear" and reduced_precision(call):
        return call.derive(value, call.tensors[value.index], transform, torch.bfloat16)  # cast once, not at every call
    return call.tensor(value, transform)


def bias_of(call: Call) -> Tensor | None:
    """The bias, shaped to broadcast over the output."""
    bias = call.operand(2)
    if bias is None:
        return None
    if call.node.kind == "linear":
        return bias
    return bias.reshape(-1, *[1] * (len(call.node.outputs[0].shape) - 2))


def preactivation(call: Call) -> Tensor:
    """W x at the precision of the streams: from the stored output where that was not rounded, else computed anew."""
    stored = call.tensors.get(call.node.outputs[0].index)
    if stored is None or stored.dtype != call.dtype:
        return apply(call, call.x, weight_of(call))
    bias = bias_of(call)
    return stored if bias is None else stored - bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The forward of a linear layer."""
    return F.linear(x, weight, bias)
