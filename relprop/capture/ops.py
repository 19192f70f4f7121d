"""Canonical operations: what the passes rewrite a captured graph into, and the kind of every aten op.

A canonical operation is an ordinary function of tensors, so that the rewritten graph still runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten


def attention(
    q: Tensor,  # [..., H, Nq, d]
    k: Tensor,  # [..., Hk, Nk, d]
    v: Tensor,  # [..., Hk, Nk, dv]
    mask: Tensor | None = None,  # broadcasts to [..., H, Nq, Nk]; bool (True is seen) or additive
    scale: float = 1.0,
    causal: bool = False,
    grouped: bool = False,
) -> Tensor:  # [..., H, Nq, dv]
    """softmax(scale q k^T + mask) v."""
    if q.ndim < 3:
        lifted = attention(q[None], k[None], v[None], mask, scale, causal, grouped)
        return lifted[0]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)


def window_mask(
    mask: Tensor,  # broadcasts to [B, W, ..., Nq, Nk]
    rank: int,  # of that
    q: Tensor,  # [B * W, ..., Nq, d]
) -> Tensor:  # [B * W or 1, ..., Nq, Nk]
    """A mask of scores whose batch axis was split, as one of scores whose batch axis holds samples and windows."""
    mask = mask.reshape(*[1] * (rank - mask.ndim), *mask.shape)
    merged = rank - q.ndim + 1
    lead = mask.shape[:merged]
    windows = math.prod(lead[1:])
    if lead[0] == windows == 1:
        return mask.flatten(0, merged - 1)
    flat = mask.flatten(0, merged - 1)
    if lead[0] == 1:
        return flat.repeat(q.shape[0] // windows, *[1] * (q.ndim - 1))
    return flat.repeat_interleave(q.shape[0] // flat.shape[0], 0)


def additive_mask(seen: Tensor, q: Tensor) -> Tensor:
    """-inf where a boolean mask does not see, in the dtype of the queries."""
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)


def row_select(x: Tensor, axis: int) -> Tensor:
    """Drop an axis of length one: what is left of `select` once its gather has been hoisted."""
    return x.squeeze(axis)


@dataclass(frozen=True, eq=False)
class Region:
    """Several aten ops that together are one operation of one carrying value, with constants as further inputs.

    `statistics` names the nodes whose value is a statistic of the input (a norm's sigma); `forward` can hold them
    constant, which is what the rule `sigma_constant` differentiates.
    """

    name: str
    module: fx.GraphModule
    statistics: frozenset[str]

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)

    def with_constant_statistics(self, *inputs: Tensor) -> Tensor:
        """The same, with its statistics detached from the input."""
        return _Detaching(self.module, self.statistics).run(*inputs)


class _Detaching(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: frozenset[str]) -> None:
        super().__init__(module)
        self.names = names

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return result.detach() if n.name in self.names else result


def overloads(names: str) -> frozenset[Any]:
    """aten overloads by name; one that this torch does not have is left out."""
    found = (_overload(name) for name in names.split())
    return frozenset(op for op in found if op is not None)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet, None), overload or "default", None)


POINTWISE = overloads(
    "relu relu_ gelu silu silu_ tanh sigmoid mish softplus elu leaky_relu hardtanh relu6 hardswish hardsigmoid exp log"
    " log1p erf rsqrt sqrt reciprocal abs square pow.Tensor_Scalar clamp clamp.Tensor clamp_min clamp_max sin cos"
    " log_sigmoid selu celu"
)

REDUCTIONS = overloads(
    "mean.dim sum.dim_IntList var.correction var.dim std.correction linalg_vector_norm norm.ScalarOpt_dim amax"
)

BINARY = overloads("add.Tensor sub.Tensor mul.Tensor div.Tensor")

MOVEMENT = overloads(
    "view reshape flatten.using_ints unflatten.int _unsafe_view squeeze squeeze.dim squeeze.dims unsqueeze permute"
    " transpose.int t movedim.int movedim.intlist swapaxes numpy_T mT slice.Tensor narrow select.int index.Tensor"
    " index_select gather unbind.int split.Tensor split_with_sizes split.sizes chunk cat concat stack expand expand_as"
    " repeat repeat_interleave.self_int roll flip pad constant_pad_nd pixel_shuffle pixel_unshuffle unfold im2col"
    " masked_fill.Scalar masked_scatter topk"
    " to.dtype to.device to.dtype_layout _to_copy contiguous clone alias view_as broadcast_to tile type_as view.dtype"
)

RESHAPES = overloads(
    "view reshape flatten.using_ints unflatten.int _unsafe_view view_as squeeze squeeze.dim squeeze.dims"
)

# Movements that leave the rows of an axis in order, also where each is repeated.
ORDERED = RESHAPES | overloads(
    "unsqueeze permute transpose.int t movedim.int movedim.intlist swapaxes numpy_T mT unbind.int split.Tensor"
    " split_with_sizes split.sizes chunk stack expand expand_as broadcast_to repeat_interleave.self_int slice.Tensor"
    " narrow select.int masked_fill.Scalar topk to.dtype to.device to.dtype_layout _to_copy contiguous clone alias"
    " type_as"
)

_KIND_NAMES = {
    "linear": "linear",
    "conv": "conv1d conv2d conv2d.padding conv3d convolution",
    "matmul": "matmul bmm mm",
    "softmax": "softmax.int _softmax",
    "add": "add.Tensor sub.Tensor",
    "mul": "mul.Tensor div.Tensor neg",
    "norm": "layer_norm rms_norm group_norm batch_norm _native_batch_norm_legit_no_training",
    "embedding": "embedding",
    "pool": "mean.dim mean sum.dim_IntList avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d amax",
}

KINDS: dict[Any, str] = {
    **dict.fromkeys(POINTWISE, "activation"),
    **dict.fromkeys(MOVEMENT, "movement"),
    **{op: kind for kind, names in _KIND_NAMES.items() for op in overloads(names)},
    attention: "attention",
    row_select: "select",
}

# Their value does not depend on the values of their inputs.
CONSTANT = overloads("zeros_like ones_like full_like new_zeros new_ones new_full new_empty") | {
    window_mask,
    additive_mask,
}

# Gone in evaluation mode, or never more than a copy of their first argument.
IDENTITIES = overloads("dropout dropout_ feature_dropout alias lift_fresh_copy lift_fresh detach detach_")

ASSERTIONS = overloads(
    "_assert_tensor_metadata _assert_async.msg _assert_scalar sym_constrain_range_for_size sym_constrain_range"
)


def kind_of(target: Callable[..., Any]) -> str | None:
    """Canonical kind of a graph node's target, None where it has none."""
    if isinstance(target, Region):
        return target.name
    return KINDS.get(target)


def default_scale(head_size: int) -> float:
    """The scale of scaled dot-product attention where none is given."""
    return 1.0 / math.sqrt(head_size)
