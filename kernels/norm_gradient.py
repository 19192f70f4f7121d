"""Backward of LayerNorm and RMSNorm, and their relevance with 1 / sigma constant, for every target of a stream.

    gradient:        g_in = (h - mean(h) - xhat mean(h xhat)) / sigma, h = g w; RMSNorm has no mean(h)
    sigma_constant:  R_in = x (h - mean(h)) / sigma, h = w R / stab(y); RMSNorm has no mean(h)

Source: Ba et al. 2016; Zhang and Sennrich 2019; Achtibat et al., ICML 2024, prop. 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.kernels.checks import (
    Stabiliser,
    as_rows,
    as_target_rows,
    check,
    check_dtype,
    check_output,
    check_stabiliser,
    targets_of,
)
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import architecture_of, jit, launch, next_power_of_two, tl
from relprop.kernels.stabiliser import share, total

_KINDS = {"layer": True, "rms": False}
_LONGEST = 8192


@jit
def _norm_kernel(
    out_ptr,  # [T, rows, N]
    stream_ptr,  # [T, rows, N]
    x_ptr,  # [rows, N]
    y_ptr,  # [rows, N]
    weight_ptr,  # [N]
    targets,
    rows,
    n_size,
    stride_st,
    stride_sm,
    stride_xm,
    stride_ym,
    eps,
    epsilon,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SIGMA_CONSTANT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n_size
    x = tl.load(x_ptr + row * stride_xm + at, mask=inside, other=0.0).to(tl.float32)
    centred = x
    if CENTRED:
        centred = tl.where(inside, x - total(x, 0) / n_size, 0.0)
    inverse = 1.0 / tl.sqrt(total(centred * centred, 0) / n_size + eps)
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SIGMA_CONSTANT:
        y = tl.load(y_ptr + row * stride_ym + at, mask=inside, other=1.0).to(tl.float32)
    else:
        normalised = centred * inverse
    stream_ptr += row * stride_sm
    out_ptr += row * n_size
    for _ in range(targets):
        h = tl.load(stream_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SIGMA_CONSTANT:
            h = factor * share(h, y, epsilon, KIND)
        else:
            h = factor * h
        back = h
        if CENTRED:
            back = back - total(h, 0) / n_size
        if SIGMA_CONSTANT:
            back = x * back
        else:
            back = back - normalised * (total(h * normalised, 0) / n_size)
        tl.store(out_ptr + at, (back * inverse).to(out_ptr.dtype.element_ty), mask=inside)
        stream_ptr += stride_st
        out_ptr += tl.cast(rows, tl.int64) * n_size


def norm(
    stream: Tensor,
    x: Tensor,
    weight: Tensor | None,
    y: Tensor | None,
    kind: str,
    eps: float,
    stabiliser: Stabiliser,
    out: Tensor | None,
) -> Tensor:
    """The gradient, or with y the relevance; see `norm_gradient` and `norm_sigma_constant`."""
    if kind not in _KINDS:
        raise OptionError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
    check_dtype("x", x)
    check_stabiliser(stabiliser)
    targets = targets_of("stream", stream, "..., N")
    if x.dim() == 0 or x.shape[-1] > _LONGEST:
        raise ShapeError(f"x: expected shape [..., N] with N at most {_LONGEST}, got {list(x.shape)}")
    full = (targets, *x.shape)
    check("stream", stream, full, x)
    if weight is not None:
        check("weight", weight, x.shape[-1:], x)
        weight = weight.contiguous()
    if y is not None:
        check("y", y, x.shape, x)
    result = torch.empty(full, dtype=stream.dtype, device=x.device) if out is None else out
    check_output("out", result, full, stream)
    s, x_rows = as_target_rows(stream), as_rows(x)
    y_rows = x_rows if y is None else as_rows(y)
    rows, n = x_rows.shape
    block = max(16, next_power_of_two(n))
    size = "small" if block <= 2048 else "medium" if block <= 4096 else "large"
    launch(
        _norm_kernel,
        (rows,),
        (
            *(result, s, x_rows, y_rows, x_rows if weight is None else weight, targets, rows, n),
            *(s.stride(0), s.stride(1), x_rows.stride(0), y_rows.stride(0), float(eps), float(stabiliser[1])),
        ),
        configuration("norm", architecture_of(x.device), "", size),
        CENTRED=_KINDS[kind],
        HAS_WEIGHT=weight is not None,
        SIGMA_CONSTANT=y is not None,
        KIND=stabiliser[0],
        BLOCK=block,
    )
    return result


def norm_gradient(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient through a LayerNorm or RMSNorm over the last axis.

    Args:
        gradient: at the norm's output. [T, ..., N], float32 | bfloat16 | float16
        x: the norm's input. [..., N], N at most 8192
        weight: [N] or None
        kind: "layer" or "rms"
        eps: of the norm
        out: tensor to write to. [T, ..., N]
    Returns:
        gradient at the input, in gradient's dtype. [T, ..., N]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    return norm(gradient, x, weight, None, kind, eps, (0, 0.0), out)
