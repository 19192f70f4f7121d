"""Forward operations of the C++ backend: torch's own kernels, their results in memory that is kept.

Every other result of a large model's forward pass comes from here, and fresh pages cost more than these kernels do. The
numbers are the model's, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relprop import native
from relprop.graph import Node
from relprop.weights import Derive

_aten = torch.ops.aten


def _unary(into: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return into(x, *args, **kwargs, out=native.empty(x.shape, x.dtype))

    return run


def _add(a: Tensor, b: Any, *, alpha: Any = 1) -> Tensor:
    if not isinstance(b, Tensor) or b.dtype != a.dtype:
        return torch.add(a, b, alpha=alpha)
    shape = a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape)
    return torch.add(a, b, alpha=alpha, out=native.empty(shape, a.dtype))


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return torch.layer_norm(x, shape, weight, bias, eps)
    rows = (*x.shape[: x.ndim - len(shape)], *[1] * len(shape))
    results = {"out1": x.new_empty(rows), "out2": x.new_empty(rows)}
    out = native.empty(x.shape, x.dtype)
    return _aten.native_layer_norm.out(x, shape, weight, bias, eps, out0=out, **results)[0]


_RUN: dict[Any, Callable[..., Tensor]] = {
    _aten.gelu.default: _unary(_aten.gelu.out),
    _aten.silu.default: _unary(_aten.silu.out),
    _aten.add.Tensor: _add,
    _aten.layer_norm.default: _layer_norm,
}


def takes(node: Node) -> bool:
    """Whether there is a form of this operation that writes to given memory."""
    return node.target in _RUN


def run(node: Node, derive: Derive, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation's own result; where it is small, not floating-point or seen by autograd, as torch makes it."""
    usual = not isinstance(x, Tensor) or not x.is_cpu or x.dtype not in native.FLOATING or torch.is_grad_enabled()
    if usual or math.prod(x.shape) * x.itemsize < native.SMALLEST_KEPT:
        return node.target(x, *args, **kwargs)
    return _RUN[node.target](x, *args, **kwargs)
