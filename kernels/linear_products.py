"""The products x w^T and |x||w|^T of one output tile, for the share-outs of the linear rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relprop.errors import ShapeError
from relprop.kernels.checks import (
    Stabiliser,
    as_rows,
    as_target_rows,
    check,
    check_dtype,
    check_output,
    check_stabiliser,
    targets_of,
    text,
)
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import Products, architecture_of, cdiv, jit, launch, products, tl
from relprop.kernels.stabiliser import magnitude, product, side_of, tile_of


@jit
def tile_products(
    x_ptr,
    w_ptr,
    rows,
    columns,
    k_size,
    stride_xm,
    stride_wn,
    PLAIN: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x w^T and |x||w|^T of rows and columns that lie inside; one load of each tile serves both."""
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + k[None, :]
    w_at = w_ptr + columns.to(tl.int64)[:, None] * stride_wn + k[None, :]
    plain = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    absolute = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if PLAIN or MAGNITUDE:
        for start in range(0, k_size, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_at)
                w = tl.load(w_at)
            else:
                inside = (start + k < k_size)[None, :]
                x = tl.load(x_at, mask=inside, other=0.0)
                w = tl.load(w_at, mask=inside, other=0.0)
            x = x.to(OPERAND)
            w = w.to(OPERAND)
            if PLAIN:
                plain = product(x, tl.trans(w), plain, PRECISION)
            if MAGNITUDE:
                absolute = product(magnitude(x), tl.trans(magnitude(w)), absolute, PRECISION)
            x_at += BLOCK_K
            w_at += BLOCK_K
    return plain, absolute


@jit
def share_tile(
    x_ptr,
    w_ptr,
    m_size,
    n_size,
    k_size,
    stride_xm,
    stride_wn,
    PLAIN: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program's tile: x w^T, |x||w|^T, and its first row (64 bits) and column."""
    row_tile, column_tile = tile_of(
        tl.program_id(0), (m_size + BLOCK_M - 1) // BLOCK_M, (n_size + BLOCK_N - 1) // BLOCK_N, GROUP
    )
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    plain, absolute = tile_products(
        x_ptr,
        w_ptr,
        tl.where(rows < m_size, rows, 0),
        tl.where(columns < n_size, columns, 0),
        k_size,
        stride_xm,
        stride_wn,
        PLAIN,
        MAGNITUDE,
        EVEN_K,
        OPERAND,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    return plain, absolute, (row_tile * BLOCK_M).to(tl.int64), column_tile * BLOCK_N


@jit
def share_half(
    plain,
    absolute,
    y_ptr,
    bias_ptr,
    first_row,
    first_column,
    m_size,
    n_size,
    stride_ym,
    side: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALF: tl.constexpr,
):
    """Half of a tile, as the epilogue takes it: a whole one's operands would not fit into registers.

    Returns:
        x w^T without the bias (from y where it is given), |x||w|^T, the bias, which elements are inside.
    """
    # Offsets within a tile fit 32 bits, and their registers.
    row = tl.arange(0, BLOCK_M)[:, None]
    column = side * HALF + tl.arange(0, HALF)[None, :]
    kept = (row < (m_size - first_row).to(tl.int32)) & (column < n_size - first_column)
    bias = tl.full((1, HALF), 0.0, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_column + column, mask=column < n_size - first_column, other=0.0).to(tl.float32)
    if HAS_Y:
        y_ptr += first_row * stride_ym + first_column
        product_half = tl.load(y_ptr + (row * stride_ym + column), mask=kept, other=0.0).to(tl.float32) - bias
    else:
        product_half = side_of(plain, side, BLOCK_M, HALF)
    return product_half, side_of(absolute, side, BLOCK_M, HALF), bias, kept


@jit
def row_scales(scale_at, first_row, row, m_size, per_sample, stride_cb):
    """The factors of a tile's rows, those of their samples. [BLOCK_M, 1]"""
    # Only the first row's place among all samples takes 64 bits; others' would not fit into registers.
    scale_at += first_row // per_sample * stride_cb
    samples = ((first_row % per_sample).to(tl.int32) + row) // per_sample
    return tl.load(scale_at + samples * stride_cb, mask=row < (m_size - first_row).to(tl.int32), other=0.0)


class ShareInputs:
    """Checked tensors of a linear share-out, as rows.

    Args:
        relevance: at the output. [T, ..., N]
        x: layer input. [..., K]
        w: weight. [N, K]
        y: layer output with the bias where it was not rounded, else None. [..., N]
        bias: [N] or None
        precision: see `launch.products`
        scale: of relevance, per target and sample. [T, B], float32
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """

    def __init__(
        self,
        relevance: Tensor,
        x: Tensor,
        w: Tensor,
        y: Tensor | None,
        bias: Tensor | None,
        stabiliser: Stabiliser,
        precision: str,
        scale: Tensor | None = None,
    ) -> None:
        check_dtype("x", x)
        check_stabiliser(stabiliser)
        if x.dim() == 0 or w.dim() != 2 or w.shape[1] != x.shape[-1]:
            raise ShapeError(f"x, w: expected shapes [..., K] and [N, K], got {text(x.shape)} and {text(w.shape)}")
        self.targets = targets_of("relevance", relevance, "..., N")
        self.shape = (*x.shape[:-1], w.shape[0])
        check("w", w, w.shape, x, x.dtype)
        check("relevance", relevance, (self.targets, *self.shape), x)
        if y is not None:
            check("y", y, self.shape, x)
        if bias is not None:
            check("bias", bias, (w.shape[0],), x)
        if scale is not None:
            check("scale", scale, (self.targets, *x.shape[:1]), x, torch.float32)
        self.scale = scale
        self.full = (self.targets, *self.shape)
        self.relevance, self.x, self.w = as_target_rows(relevance), as_rows(x), as_rows(w)
        self.y = None if y is None else as_rows(y)
        self.bias = None if bias is None else bias.contiguous()
        self.products: Products = products(x.dtype, precision)
        self.kind, self.epsilon = stabiliser[0], float(stabiliser[1])
        self.rows, self.k = self.x.shape
        self.n = self.w.shape[0]

    def outputs(self, separate: bool, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Tensors for p1 and p2, the same one unless they are separate. [T, ..., N]"""
        like = self.relevance
        if out is not None:
            p1 = check_output("out[0]", out[0], self.full, like)
            return p1, check_output("out[1]", out[1], self.full, like) if separate else p1
        p1 = torch.empty(self.full, dtype=like.dtype, device=like.device)
        return p1, torch.empty_like(p1) if separate else p1

    def _shape_class(self, one_share: bool) -> str:
        # The widest tiles leave registers for whole tiles of K, for one share only, and for one target's scales.
        if self.rows <= 32:
            return "few"
        scales = 0 if self.scale is None else self.targets
        return "wide" if one_share and self.k % 64 == 0 and scales <= 1 else "many"

    def launch(self, kernel: Any, p1: Tensor, p2: Tensor, scalars: tuple[float, ...], **constants: Any) -> None:
        """Launch a share-out kernel: its arguments are the same for every rule, but for the rule's own scalars."""
        chosen = configuration(
            "linear_share_out", architecture_of(self.x.device), self.products.kind, self._shape_class(p1 is p2)
        )
        # Pointers that are not read are those of a tensor that is there.
        y = self.x if self.y is None else self.y
        scale = self.relevance[..., 0] if self.scale is None else self.scale
        launch(
            kernel,
            (cdiv(self.rows, chosen.tiles["BLOCK_M"]) * cdiv(self.n, chosen.tiles["BLOCK_N"]),),
            (
                p1,
                p2,
                self.relevance,
                self.x,
                self.w,
                y,
                self.w if self.bias is None else self.bias,
                scale,
                self.targets,
                self.rows,
                self.n,
                self.k,
                self.relevance.stride(0),
                self.relevance.stride(1),
                self.x.stride(0),
                self.w.stride(0),
                y.stride(0),
                *scale.stride(),
                self.rows // scale.shape[1] if scale.shape[1] else 1,
                self.epsilon,
                *(float(scalar) for scalar in scalars),
            ),
            chosen,
            KIND=self.kind,
            SCALED=self.scale is not None,
            HAS_Y=self.y is not None,
            HAS_BIAS=self.bias is not None,
            EVEN_K=self.k % chosen.tiles["BLOCK_K"] == 0,
            **constants,
            **self.products.constants,
        )
