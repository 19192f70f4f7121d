"""Linear layers: what surrounds their matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.native.module import _C
from relprop.native.tensors import (
    TOLERANCE,
    Stabiliser,
    dtype_of,
    input_tensor,
    output_tensor,
    target_count,
)


def share_out(
    relevance: Tensor,
    y: Tensor,
    bias: Tensor | None,
    absz: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    stabiliser: Stabiliser,
    tolerance: float | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shares of the alpha-beta rule of y = x wᵀ + b: p1 = αs⁺ - βs⁻, p2 = αs⁺ + βs⁻, s± = R / stab(z±).

    z± = ½((y - b) ± |x||w|ᵀ); the way back is ½(x ⊙ (p1 w) + |x| ⊙ (p2 |w|)), see `select`.

    Args:
        relevance: relevance at the output. [T, ..., N], float32 | float64
        y: layer output, bias included, not rounded to less than its own dtype. [..., N]
        bias: [N] or None
        absz: |x||w|ᵀ, without the bias. [..., N]
        alpha: factor of the z⁺ part
        beta: factor of the z⁻ part
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        tolerance: a z± within tolerance · absz of 0 counts as 0 and has share 0; 4 machine epsilons unless given
        out: (p1, p2) to write to; either may be `relevance` itself, not both
    Returns:
        p1, p2, each [T, ..., N]; the same tensor where beta is 0
    Conservation:
        what falls on z± counted as 0 is absorbed
    Raises:
        ShapeError, DTypeError, DeviceError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    dtype, itemsize = dtype_of("relevance", relevance)
    shape = y.shape
    if not shape:
        raise ShapeError("y: expected shape [..., N], got []")
    targets = target_count("relevance", relevance, "..., N")
    full = (targets, *shape)
    n = shape[-1]
    relevance = input_tensor("relevance", relevance, full, dtype)
    y = input_tensor("y", y, shape, dtype)
    absz = input_tensor("absz", absz, shape, dtype)
    bias_pointer = 0
    if bias is not None:
        bias = input_tensor("bias", bias, (n,), dtype)
        bias_pointer = bias.data_ptr()
    p1 = output_tensor("out[0]", None if out is None else out[0], full, dtype)
    p2 = p1 if beta == 0 else output_tensor("out[1]", None if out is None else out[1], full, dtype)
    if beta != 0 and p1 is p2:
        raise OptionError("out: expected two different tensors where beta is not 0, got the same one twice")
    _C.linear_alpha_beta_share_out(
        itemsize,
        p1.data_ptr(),
        p2.data_ptr(),
        relevance.data_ptr(),
        y.data_ptr(),
        bias_pointer,
        absz.data_ptr(),
        targets,
        y.numel() // n if n else 0,
        n,
        alpha,
        beta,
        TOLERANCE[dtype] if tolerance is None else tolerance,
        *stabiliser,
        torch.get_num_threads(),
    )
    return p1, p2


def select(x: Tensor, c1: Tensor, c2: Tensor, out: Tensor | None = None) -> Tensor:
    """End of the alpha-beta rule's way back: ½(x ⊙ c1 + |x| ⊙ c2), with c1 = p1 w and c2 = p2 |w|.

    Args:
        x: layer input. [..., K], float32 | float64
        c1: [T, ..., K]
        c2: [T, ..., K]
        out: tensor to write to, may be c1 or c2 itself. [T, ..., K]
    Returns:
        relevance at the input. [T, ..., K]
    Raises:
        ShapeError, DTypeError, DeviceError
    """
    dtype, itemsize = dtype_of("x", x)
    targets = target_count("c1", c1, "..., K")
    shape = x.shape
    full = (targets, *shape)
    x = input_tensor("x", x, shape, dtype)
    c1 = input_tensor("c1", c1, full, dtype)
    c2 = input_tensor("c2", c2, full, dtype)
    out = output_tensor("out", out, full, dtype)
    _C.linear_alpha_beta_select(
        itemsize,
        out.data_ptr(),
        x.data_ptr(),
        c1.data_ptr(),
        c2.data_ptr(),
        targets,
        x.numel(),
        torch.get_num_threads(),
    )
    return out
