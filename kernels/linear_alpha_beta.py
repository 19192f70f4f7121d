"""Alpha-beta rule of a linear layer y = x w^T + b: shares from |x||w|^T and the way back, each in one kernel.

    z+- = (x w^T +- |x||w|^T) / 2      s+- = R / stab(z+-)      p1 = alpha s+ - beta s-      p2 = alpha s+ + beta s-
    R_in = (x (p1 w) + |x| (p2 |w|)) / 2

Source: Bach et al., PLoS ONE 2015, eq. 60; Chefer et al., CVPR 2021, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from relprop.kernels.checks import Stabiliser, check_output
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import architecture_of, cdiv, jit, launch, tl
from relprop.kernels.linear_back import linear_back
from relprop.kernels.linear_products import ShareInputs, tile_products
from relprop.kernels.stabiliser import share, tile_of
from torch import Tensor


@jit
def _linear_alpha_beta_share_out_kernel(
    p1_ptr,  # [T, M, N]
    p2_ptr,  # [T, M, N], or p1 itself where beta is 0
    relevance_ptr,  # [T, M, N]
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    y_ptr,  # [M, N]
    bias_ptr,  # [N]
    targets,
    m_size,
    n_size,
    k_size,
    stride_rt,
    stride_rm,
    stride_xm,
    stride_wn,
    stride_ym,
    alpha,
    beta,
    tolerance,
    epsilon,
    KIND: tl.constexpr,
    OPPOSED: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_SHARE: tl.constexpr,
    EVEN_K: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = tile_of(
        tl.program_id(0), (m_size + BLOCK_M - 1) // BLOCK_M, (n_size + BLOCK_N - 1) // BLOCK_N, GROUP
    )
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (rows < m_size)[:, None] & (columns < n_size)[None, :]
    rows = tl.where(rows < m_size, rows, 0)
    columns = tl.where(columns < n_size, columns, 0)
    plain, absolute = tile_products(
        x_ptr,
        w_ptr,
        rows,
        columns,
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
    )
    rows = rows.to(tl.int64)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    if HAS_Y:
        plain = tl.load(y_ptr + rows[:, None] * stride_ym + columns[None, :], mask=kept, other=0.0).to(tl.float32)
        if HAS_BIAS:
            plain = plain - bias
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
    at = rows[:, None] * stride_rm + columns[None, :]
    out = rows[:, None] * n_size + columns[None, :]
    for _ in range(targets):
        relevance = tl.load(relevance_ptr + at, mask=kept, other=0.0).to(tl.float32)
        # Whatever the stabiliser, nothing supports a z+ of 0.
        s = alpha * tl.where(supporting == 0, 0.0, share(relevance, supporting, epsilon, KIND))
        if OPPOSED:
            t = beta * tl.where(opposing == 0, 0.0, share(relevance, opposing, epsilon, KIND))
            tl.store(p2_ptr + out, (s + t).to(p2_ptr.dtype.element_ty), mask=kept)
            s = s - t
        tl.store(p1_ptr + out, s.to(p1_ptr.dtype.element_ty), mask=kept)
        at += stride_rt
        out += tl.cast(m_size, tl.int64) * n_size


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
    given = ShareInputs(relevance, x, w, y, bias, stabiliser, precision)
    p1, p2 = _outputs(given, relevance, beta != 0, out)
    taken = given.products
    if tolerance is None:
        tolerance = 4 * taken.rounding
    chosen = configuration("linear_share_out", architecture_of(x.device), taken.kind, given.shape_class)
    # Pointers that are not read are those of a tensor that is there.
    y_rows = given.relevance[0] if given.y is None else given.y
    launch(
        _linear_alpha_beta_share_out_kernel,
        (cdiv(given.rows, chosen.tiles["BLOCK_M"]) * cdiv(given.n, chosen.tiles["BLOCK_N"]),),
        (
            p1,
            p2,
            given.relevance,
            given.x,
            given.w,
            y_rows,
            given.w if given.bias is None else given.bias,
            given.targets,
            given.rows,
            given.n,
            given.k,
            given.relevance.stride(0),
            given.relevance.stride(1),
            given.x.stride(0),
            given.w.stride(0),
            y_rows.stride(0),
            float(alpha),
            float(beta),
            float(tolerance),
            float(given.epsilon),
        ),
        chosen,
        KIND=given.kind,
        OPPOSED=beta != 0,
        HAS_Y=given.y is not None,
        HAS_BIAS=given.bias is not None,
        BIAS_SHARE=bias_share and given.bias is not None,
        EVEN_K=given.k % chosen.tiles["BLOCK_K"] == 0,
        **taken.constants,
    )
    return p1, p2


def _outputs(
    given: ShareInputs, relevance: Tensor, opposed: bool, out: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    if out is not None:
        p1 = check_output("out[0]", out[0], given.full, relevance)
        return p1, check_output("out[1]", out[1], given.full, relevance) if opposed else p1
    p1 = torch.empty(given.full, dtype=relevance.dtype, device=relevance.device)
    return p1, torch.empty_like(p1) if opposed else p1


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
    return linear_back(p1, p2, x, w, gradients, plain=0.5, magnified=0.5, **options)
