"""Epsilon rule of a linear layer: R_in = x (s w), s = R / stab(z), z = x w^T + b.

Source: Bach et al., PLoS ONE 2015; Achtibat et al., ICML 2024, eq. 8.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from relprop.kernels.checks import Stabiliser
from relprop.kernels.launch import jit, tl
from relprop.kernels.linear_back import linear_back
from relprop.kernels.linear_products import ShareInputs, row_scales, share_half, share_tile
from relprop.kernels.stabiliser import share


@jit
def _linear_epsilon_share_out_kernel(
    p1_ptr,  # [T, M, N]
    p2_ptr,  # [T, M, N], p1 itself
    relevance_ptr,  # [T, M, N]
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    y_ptr,  # [M, N]
    bias_ptr,  # [N]
    scale_ptr,  # [T, B], of relevance
    targets,
    m_size,
    n_size,
    k_size,
    stride_rt,
    stride_rm,
    stride_xm,
    stride_wn,
    stride_ym,
    stride_ct,
    stride_cb,
    per_sample,  # rows of one sample
    epsilon,
    KIND: tl.constexpr,
    BIAS_SHARE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    product, magnified, first_row, first_column = share_tile(
        x_ptr,
        w_ptr,
        m_size,
        n_size,
        k_size,
        stride_xm,
        stride_wn,
        not HAS_Y,
        False,
        EVEN_K,
        OPERAND,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP,
    )
    row = tl.arange(0, BLOCK_M)[:, None]
    relevance_ptr += first_row * stride_rm + first_column
    p1_ptr += first_row * n_size + first_column
    for side in tl.static_range(2):
        plain, _absolute, bias, kept = share_half(
            product,
            magnified,
            y_ptr,
            bias_ptr,
            first_row,
            first_column,
            m_size,
            n_size,
            stride_ym,
            side,
            HAS_Y,
            HAS_BIAS,
            BLOCK_M,
            BLOCK_N // 2,
        )
        column = side * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
        relevance_at = relevance_ptr
        scale_at = scale_ptr
        p1_at = p1_ptr
        if BIAS_SHARE:
            plain = plain + bias
        for _ in range(targets):
            relevance = tl.load(relevance_at + (row * stride_rm + column), mask=kept, other=0.0).to(tl.float32)
            if SCALED:
                relevance = relevance * row_scales(scale_at, first_row, row, m_size, per_sample, stride_cb)
            s = share(relevance, plain, epsilon, KIND)
            tl.store(p1_at + (row * n_size + column), s.to(p1_ptr.dtype.element_ty), mask=kept)
            relevance_at += stride_rt
            scale_at += stride_ct
            p1_at += tl.cast(m_size, tl.int64) * n_size


def linear_epsilon_share_out(
    relevance: Tensor,
    x: Tensor,
    w: Tensor,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bias_share: bool = True,
    stabiliser: Stabiliser,
    scale: Tensor | None = None,
    precision: str = "highest",
    out: Tensor | None = None,
) -> Tensor:
    """Shares s = R / stab(z), z = x wᵀ + b; no product is taken where y is given.

    Args:
        relevance: relevance at the output. [T, ..., N], float32 | bfloat16 | float16
        x: layer input. [..., K], float32 | bfloat16 | float16
        w: weight, of x's dtype. [N, K]
        y: layer output with the bias, only where it was not rounded below float32; else x wᵀ is computed. [..., N]
        bias: [N] or None
        bias_share: whether the bias takes a share; without, z = x wᵀ
        stabiliser: (kind, epsilon)
        scale: of relevance, per target and sample, where x is [B, ..., K]. [T, B], float32
        precision: of the product, see `launch.products`
        out: tensor to write to. [T, ..., N]
    Returns:
        s, in relevance's dtype. [T, ..., N]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Achtibat et al., ICML 2024, eq. 8.
    """
    given = ShareInputs(relevance, x, w, y, bias, stabiliser, precision, scale)
    s, _ = given.outputs(False, None if out is None else (out, out))
    given.launch(_linear_epsilon_share_out_kernel, s, s, (), BIAS_SHARE=bias_share and bias is not None)
    return s


def linear_epsilon_back(
    s: Tensor, x: Tensor, w: Tensor, gradients: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The way back, x ⊙ (s w), and plain gradients g w with one load of each tile of w.

    Args:
        s: shares. [T, ..., N]
        x: layer input. [..., K]
        w: weight. [N, K]
        gradients: any number of plain left operands. [G, ..., N]
        options: see `linear_back`
    Returns:
        relevance at the input [T, ..., K], and the gradients there [G, ..., K] or None
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    return linear_back(s, None, x, w, gradients, **options)
