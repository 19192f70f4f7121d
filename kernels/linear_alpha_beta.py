"""Alpha-beta rule of a linear layer y = x w^T + b: shares from |x||w|^T and the way back, each in one kernel.

    z+- = (x w^T +- |x||w|^T) / 2      s+- = R / stab(z+-)      p1 = alpha s+ - beta s-      p2 = alpha s+ + beta s-
    R_in = (x (p1 w) + |x| (p2 |w|)) / 2

Source: Bach et al., PLoS ONE 2015, eq. 60; Chefer et al., CVPR 2021, section 3.
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
def _linear_alpha_beta_share_out_kernel(
    p1_ptr,  # [T, M, N]
    p2_ptr,  # [T, M, N], or p1 itself where beta is 0
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
    alpha,
    beta,
    tolerance,
    KIND: tl.constexpr,
    OPPOSED: tl.constexpr,
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
        True,
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
    p2_ptr += first_row * n_size + first_column
    for side in tl.static_range(2):
        plain, absolute, bias, kept = share_half(
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
        p2_at = p2_ptr
        bound = tolerance * absolute
        supporting = (plain + absolute) * 0.5
        supporting = tl.where(supporting <= bound, 0.0, supporting)
        if BIAS_SHARE:
            supporting = supporting + tl.maximum(bias, 0.0)
        if OPPOSED:
            opposing = (plain - absolute) * 0.5
            opposing = tl.where(opposing >= -bound, 0.0, opposing)
            if BIAS_SHARE:
                opposing = opposing + tl.minimum(bias, 0.0)
        for _ in range(targets):
            relevance = tl.load(relevance_at + (row * stride_rm + column), mask=kept, other=0.0).to(tl.float32)
            if SCALED:
                relevance = relevance * row_scales(scale_at, first_row, row, m_size, per_sample, stride_cb)
            # Whatever the stabiliser, nothing supports a z+ of 0.
            s = alpha * tl.where(supporting == 0, 0.0, share(relevance, supporting, epsilon, KIND))
            if OPPOSED:
                t = beta * tl.where(opposing == 0, 0.0, share(relevance, opposing, epsilon, KIND))
                tl.store(p2_at + (row * n_size + column), (s + t).to(p2_ptr.dtype.element_ty), mask=kept)
                s = s - t
            tl.store(p1_at + (row * n_size + column), s.to(p1_ptr.dtype.element_ty), mask=kept)
            relevance_at += stride_rt
            scale_at += stride_ct
            p1_at += tl.cast(m_size, tl.int64) * n_size
            p2_at += tl.cast(m_size, tl.int64) * n_size


def linear_alpha_beta_share_out(
    relevance: Tensor,
    x: Tensor,
    w: Tensor,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    bias_share: bool = False,
    stabiliser: Stabiliser,
    tolerance: float | None = None,
    scale: Tensor | None = None,
    precision: str = "highest",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shares p1 = αs⁺ - βs⁻, p2 = αs⁺ + βs⁻, s± = R / stab(z±), z± = ½(x wᵀ ± |x||w|ᵀ).

    Args:
        relevance: relevance at the output. [T, ..., N], float32 | bfloat16 | float16
        x: layer input. [..., K], float32 | bfloat16 | float16
        w: weight, of x's dtype. [N, K]
        y: layer output with the bias, only where it was not rounded below float32; else x wᵀ is computed. [..., N]
        bias: [N] or None
        alpha, beta: factors of the z⁺ and the z⁻ part
        bias_share: whether the bias's positive (negative) part takes a share of z⁺ (z⁻)
        stabiliser: (kind, epsilon)
        tolerance: a z± within tolerance · |x||w|ᵀ of 0 counts as 0; four roundings of the products unless given
        scale: of relevance, per target and sample, where x is [B, ..., K]. [T, B], float32
        precision: of the products, see `launch.products`
        out: (p1, p2) to write to
    Returns:
        p1, p2, each [T, ..., N] in relevance's dtype; the same tensor where beta is 0
    Conservation:
        what falls on z± counted as 0 is absorbed
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    given = ShareInputs(relevance, x, w, y, bias, stabiliser, precision, scale)
    p1, p2 = given.outputs(beta != 0, out)
    if tolerance is None:
        tolerance = 4 * given.products.rounding
    given.launch(
        _linear_alpha_beta_share_out_kernel,
        p1,
        p2,
        (alpha, beta, tolerance),
        OPPOSED=beta != 0,
        BIAS_SHARE=bias_share and bias is not None,
    )
    return p1, p2


def factors() -> dict[str, float]:
    """Of the two products on the way back, as `linear_back` takes them."""
    return {"plain": 0.5, "magnified": 0.5}


def linear_alpha_beta_back(
    p1: Tensor, p2: Tensor, x: Tensor, w: Tensor, gradients: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The way back, ½(x ⊙ (p1 w) + |x| ⊙ (p2 |w|)), and gᵀw of plain gradients, with one load of each tile of w.

    Args:
        p1, p2: shares; the same tensor where beta is 0. [T, ..., N]
        x: layer input. [..., K]
        w: weight. [N, K]
        gradients: any number of plain left operands. [G, ..., N]
        options: see `linear_back`
    Returns:
        relevance at the input [T, ..., K], and the gradients there [G, ..., K] or None
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    return linear_back(p1, p2, x, w, gradients, **factors(), **options)
