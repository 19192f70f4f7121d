"""The products x w^T and |x||w|^T of one output tile, for the share-outs of the linear rules."""

from __future__ import annotations

from relprop.kernels.checks import (
    Stabiliser,
    as_rows,
    as_target_rows,
    check,
    check_dtype,
    check_stabiliser,
    targets_of,
    text,
)
from relprop.kernels.launch import Products, jit, products, tl
from relprop.kernels.stabiliser import magnitude, product
from torch import Tensor

from relprop.errors import ShapeError


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


class ShareInputs:
    """Checked tensors of a linear share-out, as rows.

    Args:
        relevance: at the output. [T, ..., N]
        x: layer input. [..., K]
        w: weight. [N, K]
        y: layer output with the bias where it was not rounded, else None. [..., N]
        bias: [N] or None
        precision: see `launch.products`
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
        self.full = (self.targets, *self.shape)
        self.relevance, self.x, self.w = as_target_rows(relevance), as_rows(x), as_rows(w)
        self.y = None if y is None else as_rows(y)
        self.bias = None if bias is None else bias.contiguous()
        self.products: Products = products(x.dtype, precision)
        self.kind, self.epsilon = stabiliser
        self.rows, self.k = self.x.shape
        self.n = self.w.shape[0]

    @property
    def shape_class(self) -> str:
        """Of the configuration's table."""
        return "few" if self.rows <= 32 else "many"
