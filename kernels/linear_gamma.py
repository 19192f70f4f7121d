"""Gamma rule of a linear layer: contributions of the output's sign weigh 1 + gamma.

    z = x w^T + gamma (x w^T + sign(y) |x||w|^T) / 2 (+ b + gamma b+-)      s = R / stab(z)
    R_in = (1 + gamma/2) x (s w) + (gamma/2) |x| ((s sign(y)) |w|)

Source: Montavon et al. 2019, in the form for either sign of Anders et al. 2021 (zennit).
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
def _linear_gamma_share_out_kernel(
    p1_ptr,  # [T, M, N]
    p2_ptr,  # [T, M, N], s sign(y)
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
    gamma,
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
        y = plain + bias
        sign = tl.where(y > 0, 1.0, tl.where(y < 0, -1.0, 0.0))
        z = plain + 0.5 * gamma * (plain + sign * absolute)
        if BIAS_SHARE:
            z = z + bias + gamma * tl.where(sign > 0, tl.maximum(bias, 0.0), tl.minimum(bias, 0.0))
        for _ in range(targets):
            relevance = tl.load(relevance_at + (row * stride_rm + column), mask=kept, other=0.0).to(tl.float32)
            if SCALED:
                relevance = relevance * row_scales(scale_at, first_row, row, m_size, per_sample, stride_cb)
            # An output of exactly 0 has no sign, and no share.
            s = tl.where(sign == 0, 0.0, share(relevance, z, epsilon, KIND))
            tl.store(p1_at + (row * n_size + column), s.to(p1_ptr.dtype.element_ty), mask=kept)
            tl.store(p2_at + (row * n_size + column), (s * sign).to(p2_ptr.dtype.element_ty), mask=kept)
            relevance_at += stride_rt
            scale_at += stride_ct
            p1_at += tl.cast(m_size, tl.int64) * n_size
            p2_at += tl.cast(m_size, tl.int64) * n_size


def linear_gamma_share_out(
    relevance: Tensor,
    x: Tensor,
    w: Tensor,
    y: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gamma: float = 0.25,
    bias_share: bool = True,
    stabiliser: Stabiliser,
    scale: Tensor | None = None,
    precision: str = "highest",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shares s = R / stab(z) of the gamma rule, and s sign(y).

    Args:
        relevance: relevance at the output. [T, ..., N], float32 | bfloat16 | float16
        x: layer input. [..., K], float32 | bfloat16 | float16
        w: weight, of x's dtype. [N, K]
        y: layer output with the bias, only where it was not rounded below float32; else x wᵀ is computed. [..., N]
        bias: [N] or None
        gamma: preference for contributions of the output's sign
        bias_share: whether the bias takes a share
        stabiliser: (kind, epsilon)
        scale: of relevance, per target and sample, where x is [B, ..., K]. [T, B], float32
        precision: of the products, see `launch.products`
        out: (s, s sign(y)) to write to. [T, ..., N]
    Returns:
        s and s sign(y), in relevance's dtype. [T, ..., N]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    given = ShareInputs(relevance, x, w, y, bias, stabiliser, precision, scale)
    p1, p2 = given.outputs(True, out)
    given.launch(_linear_gamma_share_out_kernel, p1, p2, (gamma,), BIAS_SHARE=bias_share and bias is not None)
    return p1, p2


def factors(gamma: float) -> dict[str, float]:
    """Of the two products on the way back, as `linear_back` takes them."""
    return {"plain": 1 + gamma / 2, "magnified": gamma / 2}


def linear_gamma_back(
    p1: Tensor,
    p2: Tensor,
    x: Tensor,
    w: Tensor,
    gradients: Tensor | None = None,
    *,
    gamma: float = 0.25,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The way back, (1 + γ/2) x ⊙ (p1 w) + (γ/2) |x| ⊙ (p2 |w|), and plain gradients g w.

    Args:
        p1, p2: s and s sign(y). [T, ..., N]
        x: layer input. [..., K]
        w: weight. [N, K]
        gradients: any number of plain left operands. [G, ..., N]
        gamma: as in the share-out
        options: see `linear_back`
    Returns:
        relevance at the input [T, ..., K], and the gradients there [G, ..., K] or None
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    return linear_back(p1, p2, x, w, gradients, **factors(gamma), **options)
