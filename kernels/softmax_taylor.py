"""Softmax by its first-order Taylor expansion: R_in = x (R - p sum(R)), p the softmax of x.

Source: Achtibat et al., ICML 2024, prop. 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.kernels.checks import as_rows, as_target_rows, check, check_dtype, check_output, targets_of
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import architecture_of, jit, launch, tl
from relprop.kernels.stabiliser import total


@jit
def _softmax_taylor_kernel(
    out_ptr,  # [T, rows, N]
    relevance_ptr,  # [T, rows, N]
    x_ptr,  # [rows, N]
    p_ptr,  # [rows, N]
    rows,
    n_size,
    stride_rt,
    stride_rm,
    stride_xm,
    stride_pm,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.program_id(1).to(tl.int64)
    relevance_ptr += target * stride_rt + row * stride_rm
    out_ptr += (target * rows + row) * n_size
    x_ptr += row * stride_xm
    p_ptr += row * stride_pm
    summed = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, n_size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        summed += tl.load(relevance_ptr + at, mask=at < n_size, other=0.0).to(tl.float32)
    whole = total(summed, 0)
    for start in range(0, n_size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_size
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
        relevance = tl.load(relevance_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # Masked logits are -inf; they get exactly 0. A NaN stays one.
        x = tl.where(tl.abs(x) == float("inf"), 0.0, x)
        tl.store(out_ptr + at, (x * (relevance - p * whole)).to(out_ptr.dtype.element_ty), mask=inside)


def softmax_taylor(relevance: Tensor, x: Tensor, p: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x ⊙ (R - p ΣR) along the last axis.

    Args:
        relevance: relevance at the softmax. [T, ..., N], float32 | bfloat16 | float16
        x: logits, masked ones -inf. [..., N]
        p: the softmax. [..., N]
        out: tensor to write to. [T, ..., N]
    Returns:
        relevance at the logits, in relevance's dtype. [T, ..., N]
    Raises:
        ShapeError, DTypeError, DeviceError
    Source: Achtibat et al., ICML 2024, prop. 3.1.
    """
    check_dtype("x", x)
    targets = targets_of("relevance", relevance, "..., N")
    full = (targets, *x.shape)
    check("relevance", relevance, full, x)
    check("p", p, x.shape, x)
    result = torch.empty(full, dtype=relevance.dtype, device=x.device) if out is None else out
    check_output("out", result, full, relevance)
    r, x_rows, p_rows = as_target_rows(relevance), as_rows(x), as_rows(p)
    rows, n = x_rows.shape
    chosen = configuration("rows", architecture_of(x.device), "", "small" if n <= 1024 else "large")
    launch(
        _softmax_taylor_kernel,
        (rows, targets),
        (result, r, x_rows, p_rows, rows, n, r.stride(0), r.stride(1), x_rows.stride(0), p_rows.stride(0)),
        chosen,
    )
    return result
