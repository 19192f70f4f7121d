"""Adds and fan-outs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.native.module import _C
from relprop.native.tensors import Stabiliser, argument, input_tensor, output_tensor, stream_dtype, target_count


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
        relevance: relevance at a + b. [T, B, ...], any dtype; a and b are of that or a half precision
        a: first branch; sums are per target and entry of its first axis. [B, ...]
        b: second branch. [B, ...], or [1, ...] for one that all samples share
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        out: (R_a, R_b) to write to; either may be `relevance` itself, not both
    Returns:
        R_a, R_b, each [T, B, ...]; sums in float64, the same bits for any number of threads
    Conservation:
        sum(R_a) + sum(R_b) = sum(R) per sample where both branch sums have one sign; never more in size
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    compute = stream_dtype("relevance", relevance)
    shape = a.shape
    if not shape:
        raise ShapeError("a: expected shape [B, ...], got []")
    targets = target_count("relevance", relevance, "B, ...")
    full = (targets, *shape)
    batch = shape[0]
    relevance = input_tensor("relevance", relevance, full, compute)
    a = input_tensor("a", a, shape, compute)
    shared = b.shape != shape and b.shape == (1, *shape[1:])
    b = input_tensor("b", b, b.shape if shared else shape, compute)
    given = (None, None) if out is None else out
    if given[0] is not None and given[0] is given[1]:
        raise OptionError("out: expected two different tensors, got the same one twice")
    default = relevance.dtype
    ra = output_tensor("out[0]", given[0], full, compute, default=default, same=[relevance], apart=[a, b])
    rb = output_tensor("out[1]", given[1], full, compute, default=default, same=[relevance], apart=[a, b, ra])
    _C.add_normalised(
        argument(ra),
        argument(rb),
        argument(relevance),
        argument(a),
        argument(b),
        targets,
        batch,
        1 if shared else batch,
        a.numel() // batch if batch else 0,
        *stabiliser,
        torch.get_num_threads(),
    )
    return ra, rb


def fanout_epsilon(
    relevances: Sequence[Tensor], x: Tensor, *, stabiliser: Stabiliser, out: Tensor | None = None
) -> Tensor:
    """Epsilon rule of a value read by several operations: x ⊙ Σᵢ rᵢ / stab(x).

    Args:
        relevances: one per reader. n × [T, ...], any dtype
        x: the value. [...], that dtype or a half precision
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
    compute = stream_dtype("relevances[0]", relevances[0])
    shape = x.shape
    targets = target_count("relevances[0]", relevances[0], "...")
    full = (targets, *shape)
    x = input_tensor("x", x, shape, compute)
    ready = [input_tensor(f"relevances[{i}]", relevance, full, compute) for i, relevance in enumerate(relevances)]
    out = output_tensor("out", out, full, compute, default=ready[0].dtype, same=ready, apart=[x])
    _C.fanout_epsilon(
        argument(out),
        [argument(relevance) for relevance in ready],
        argument(x),
        targets,
        x.numel(),
        *stabiliser,
        torch.get_num_threads(),
    )
    return out
