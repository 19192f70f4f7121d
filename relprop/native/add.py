"""Adds and fan-outs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.native.module import _C
from relprop.native.tensors import (
    Stabiliser,
    dtype_of,
    input_tensor,
    output_tensor,
    target_count,
)


def add_normalised(
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    stabiliser: Stabiliser,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised rule of a residual add: a' = aR/stab(a+b) scaled to the sum |Σa'|/(|Σa'|+|Σb'|) · ΣR, b' likewise.

    Args:
        relevance: relevance at a + b. [T, B, ...], float32 | float64
        a: first branch; sums are per target and entry of its first axis. [B, ...]
        b: second branch. [B, ...], or [1, ...] for one that all samples share
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        out: (R_a, R_b) to write to; either may be `relevance` itself, not both
    Returns:
        R_a, R_b, each [T, B, ...]; sums in float64, the same bits for any number of threads
    Conservation:
        sum(R_a) + sum(R_b) = sum(R) per sample where both branch sums have one sign; never more in size
    Raises:
        ShapeError, DTypeError, DeviceError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    dtype, itemsize = dtype_of("relevance", relevance)
    shape = a.shape
    if not shape:
        raise ShapeError("a: expected shape [B, ...], got []")
    targets = target_count("relevance", relevance, "B, ...")
    full = (targets, *shape)
    batch = shape[0]
    relevance = input_tensor("relevance", relevance, full, dtype)
    a = input_tensor("a", a, shape, dtype)
    shared = b.shape != shape and b.shape == (1, *shape[1:])
    b = input_tensor("b", b, b.shape if shared else shape, dtype)
    relevance_a = output_tensor("out[0]", None if out is None else out[0], full, dtype)
    relevance_b = output_tensor("out[1]", None if out is None else out[1], full, dtype)
    if relevance_a is relevance_b:
        raise OptionError("out: expected two different tensors, got the same one twice")
    _C.add_normalised(
        itemsize,
        relevance_a.data_ptr(),
        relevance_b.data_ptr(),
        relevance.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        targets,
        batch,
        1 if shared else batch,
        a.numel() // batch if batch else 0,
        *stabiliser,
        torch.get_num_threads(),
    )
    return relevance_a, relevance_b


def fanout_epsilon(
    relevances: Sequence[Tensor], x: Tensor, *, stabiliser: Stabiliser, out: Tensor | None = None
) -> Tensor:
    """Epsilon rule of a value read by several operations: x ⊙ Σᵢ rᵢ / stab(x).

    Args:
        relevances: one per reader. n × [T, ...], float32 | float64
        x: the value. [...]
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        out: tensor to write to, may be one of the relevances itself. [T, ...]
    Returns:
        relevance of x. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Clone and IndexSelect in the code of Chefer et al., CVPR 2021.
    """
    if not relevances:
        raise OptionError("relevances: expected at least one tensor, got none")
    dtype, itemsize = dtype_of("x", x)
    shape = x.shape
    targets = target_count("relevances[0]", relevances[0], "...")
    full = (targets, *shape)
    x = input_tensor("x", x, shape, dtype)
    ready = [input_tensor(f"relevances[{i}]", relevance, full, dtype) for i, relevance in enumerate(relevances)]
    out = output_tensor("out", out, full, dtype)
    _C.fanout_epsilon(
        itemsize,
        out.data_ptr(),
        [relevance.data_ptr() for relevance in ready],
        x.data_ptr(),
        targets,
        x.numel(),
        *stabiliser,
        torch.get_num_threads(),
    )
    return out
