"""The way back through a linear layer for every rule: factor x (p1 w) + factor |x| (p2 |w|), with plain gradients.

The rules differ in their shares (alpha_beta: p1, p2 and two halves; gamma: s and s sign(y); epsilon: s alone). Rows of
all targets are one matrix, so that targets share the tiles of w; a gradient rides along in the same program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.kernels.activation_gradient import ACTIVATIONS, slope
from relprop.kernels.checks import as_rows, as_target_rows, check, check_dtype, check_output, targets_of, text
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import Configuration, architecture_of, cdiv, jit, launch, products, share_products, tl
from relprop.kernels.stabiliser import magnitude, product, side_of, tile_of

LARGEST_BLOCK_N = 64  # of the tabled tiles


@jit
def back_tile(
    p1_ptr,  # [T, M, N]
    p2_ptr,  # [T, M, N]
    gradient_ptr,  # [T, M, N]
    w_ptr,  # [N, K]
    rows_size,  # T * M
    m_size,
    n_size,
    k_size,
    stride_pt,
    stride_pm,
    stride_qt,
    stride_qm,
    stride_gt,
    stride_gm,
    stride_wn,
    RELEVANCE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    SEPARATE: tl.constexpr,
    GRADIENT: tl.constexpr,
    EVEN_N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program's tile of p1 w, p2 |w| and g w, and its row and column among the tiles."""
    row_tile, column_tile = tile_of(
        tl.program_id(0), (rows_size + BLOCK_M - 1) // BLOCK_M, (k_size + BLOCK_K - 1) // BLOCK_K, GROUP
    )
    columns = column_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    targets, samples, _inside = back_rows(row_tile, rows_size, m_size, BLOCK_M)
    columns = tl.where(columns < k_size, columns, 0)
    n = tl.arange(0, BLOCK_N)
    w_at = w_ptr + n.to(tl.int64)[:, None] * stride_wn + columns[None, :]
    if RELEVANCE:
        p1_at = p1_ptr + (targets * stride_pt + samples * stride_pm)[:, None] + n[None, :]
        p2_at = p2_ptr + (targets * stride_qt + samples * stride_qm)[:, None] + n[None, :]
    if GRADIENT:
        gradient_at = gradient_ptr + (targets * stride_gt + samples * stride_gm)[:, None] + n[None, :]
    c1 = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)
    c2 = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)
    passed = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)
    for start in range(0, n_size, BLOCK_N):
        inside = start + n < n_size
        if EVEN_N:
            w = tl.load(w_at).to(OPERAND)
        else:
            w = tl.load(w_at, mask=inside[:, None], other=0.0).to(OPERAND)
        if GRADIENT:
            if EVEN_N:
                gradient = tl.load(gradient_at).to(OPERAND)
            else:
                gradient = tl.load(gradient_at, mask=inside[None, :], other=0.0).to(OPERAND)
            passed = product(gradient, w, passed, PRECISION)
            gradient_at += BLOCK_N
        if RELEVANCE:
            if EVEN_N:
                p = tl.load(p1_at).to(OPERAND)
            else:
                p = tl.load(p1_at, mask=inside[None, :], other=0.0).to(OPERAND)
            c1 = product(p, w, c1, PRECISION)
            if MAGNITUDE:
                if SEPARATE:
                    if EVEN_N:
                        p = tl.load(p2_at).to(OPERAND)
                    else:
                        p = tl.load(p2_at, mask=inside[None, :], other=0.0).to(OPERAND)
                    p2_at += BLOCK_N
                c2 = product(p, magnitude(w), c2, PRECISION)
            p1_at += BLOCK_N
        w_at += BLOCK_N * tl.cast(stride_wn, tl.int64)
    return c1, c2, passed, row_tile, column_tile


@jit
def back_rows(row_tile, rows_size, m_size, BLOCK_M: tl.constexpr):
    """Target and row of x of a tile's rows, 0 for those outside, and which are inside."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < rows_size
    rows = tl.where(inside, rows, 0).to(tl.int64)
    return rows // m_size, rows % m_size, inside


@jit
def back_half(
    c1, c2, x, side: tl.constexpr, plain, magnified, MAGNITUDE: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr
):
    """Relevance at half a tile of x."""
    back = plain * x * side_of(c1, side, BLOCK_M, HALF)
    if MAGNITUDE:
        back += magnified * tl.abs(x) * side_of(c2, side, BLOCK_M, HALF)
    return back


@jit
def _linear_back_kernel(
    out_ptr,  # [T * M, K]
    gradient_out_ptr,  # [T * M, K]
    p1_ptr,  # [T, M, N]
    p2_ptr,  # [T, M, N]
    gradient_ptr,  # [T, M, N]
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    h_ptr,  # [M, K], input of the activation whose output is x
    rows_size,  # T * M
    m_size,
    n_size,
    k_size,
    stride_pt,
    stride_pm,
    stride_qt,
    stride_qm,
    stride_gt,
    stride_gm,
    stride_xm,
    stride_wn,
    stride_hm,
    plain,
    magnified,
    RELEVANCE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    SEPARATE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    c1, c2, passed, row_tile, column_tile = back_tile(
        p1_ptr,
        p2_ptr,
        gradient_ptr,
        w_ptr,
        rows_size,
        m_size,
        n_size,
        k_size,
        stride_pt,
        stride_pm,
        stride_qt,
        stride_qm,
        stride_gt,
        stride_gm,
        stride_wn,
        RELEVANCE,
        MAGNITUDE,
        SEPARATE,
        GRADIENT,
        EVEN_N,
        OPERAND,
        PRECISION,
        BLOCK_M,
        BLOCK_K,
        BLOCK_N,
        GROUP,
    )
    targets, samples, rows_inside = back_rows(row_tile, rows_size, m_size, BLOCK_M)
    rows_out = (targets * m_size + samples) * k_size
    half: tl.constexpr = BLOCK_K // 2
    for side in tl.static_range(2):
        # Half a tile at a time: the epilogue's operands would not fit into registers beside the accumulators.
        columns = column_tile * BLOCK_K + side * half + tl.arange(0, half)
        kept = rows_inside[:, None] & (columns < k_size)[None, :]
        if RELEVANCE:
            x = tl.load((x_ptr + samples * stride_xm)[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
            back = back_half(c1, c2, x, side, plain, magnified, MAGNITUDE, BLOCK_M, half)
            tl.store((out_ptr + rows_out)[:, None] + columns[None, :], back.to(out_ptr.dtype.element_ty), mask=kept)
        if GRADIENT:
            g = side_of(passed, side, BLOCK_M, half)
            if ACTIVATION > 0:
                h_at = (h_ptr + samples * stride_hm)[:, None] + columns[None, :]
                g = g * slope(tl.load(h_at, mask=kept, other=0.0).to(tl.float32), ACTIVATION)
            g = g.to(gradient_out_ptr.dtype.element_ty)
            tl.store((gradient_out_ptr + rows_out)[:, None] + columns[None, :], g, mask=kept)


def linear_back(
    p1: Tensor | None,
    p2: Tensor | None,
    x: Tensor | None,
    w: Tensor,
    gradients: Tensor | None = None,
    *,
    plain: float = 1.0,
    magnified: float = 0.0,
    activation: str | None = None,
    preactivation: Tensor | None = None,
    precision: str = "highest",
    out: Tensor | None = None,
    gradient_out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """plain · x ⊙ (p1 w) + magnified · |x| ⊙ (p2 |w|), and g w of plain gradients.

    Args:
        p1, p2: shares of either product, None for no relevance; p2 may be p1 itself, None for a magnified of 0.
            [T, ..., N], float32 | bfloat16 | float16
        x: layer input, None where there are no shares. [..., K], float32 | bfloat16 | float16
        w: weight, of x's dtype. [N, K]
        gradients: any number of plain left operands. [G, ..., N]
        plain, magnified: factors of the two products
        activation: "gelu", "gelu_tanh", "silu" or "relu", where x is its output: gradients are taken through it too
        preactivation: that activation's input. [..., K]
        precision: of the products, see `launch.products`; shares with float16 operands are multiplied in tf32
        out, gradient_out: tensors to write to. [T, ..., K], [G, ..., K]
    Returns:
        relevance at the input [T, ..., K] in p1's dtype and gradients [G, ..., K] in theirs, None for what is not given
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    call = BackInputs(p1, p2, x, w, gradients, magnified, activation, preactivation, precision)
    result = call.output("out", out, p1, call.targets)
    passed = call.output("gradient_out", gradient_out, gradients, call.gradients)
    fused = min(call.targets, call.gradients)
    for first, last, relevance, gradient in (
        (0, fused, True, True),
        (fused, call.targets, True, False),
        (fused, call.gradients, False, True),
    ):
        if last > first:
            call.launch(result, passed, first, last, relevance, gradient, plain, magnified)
    return result, passed


class BackInputs:
    """Checked tensors of a way back, as rows; arguments as of `linear_back`."""

    def __init__(
        self,
        p1: Tensor | None,
        p2: Tensor | None,
        x: Tensor | None,
        w: Tensor,
        gradients: Tensor | None,
        magnified: float,
        activation: str | None,
        preactivation: Tensor | None,
        precision: str,
    ) -> None:
        if x is None:
            if p1 is not None or gradients is None or gradients.dim() < 2 or w.dim() != 2:
                raise OptionError("x: expected the layer's input for shares, got None")
            # Only its shape and dtype matter.
            x = torch.empty((*gradients.shape[1:-1], w.shape[1]), dtype=w.dtype, device="meta")
            like = w
        else:
            like = x
        check_dtype("x", x)
        if x.dim() == 0 or w.dim() != 2 or w.shape[1] != x.shape[-1]:
            raise ShapeError(f"x, w: expected shapes [..., K] and [N, K], got {text(x.shape)} and {text(w.shape)}")
        check("w", w, w.shape, like, x.dtype)
        if activation not in ACTIVATIONS or (activation is None) != (preactivation is None):
            known = ", ".join(str(name) for name in ACTIVATIONS)
            raise OptionError(f"activation: expected one of {known} and its input with it, got {activation!r}")
        if p1 is not None and magnified and p2 is None:
            raise OptionError("p2: expected shares of the magnified product, got None")
        shape = (*x.shape[:-1], w.shape[0])
        self.input_shape, self.like = x.shape, like
        self.targets = self._check("p1", p1, shape)
        self.gradients = self._check("gradients", gradients, shape)
        self.separate = p2 is not p1
        self.p1 = None if p1 is None else as_target_rows(p1)
        self.p2 = self.p1
        if self.separate and p2 is not None:
            check("p2", p2, (self.targets, *shape), like)
            self.p2 = as_target_rows(p2)
        self.g = None if gradients is None else as_target_rows(gradients)
        self.w, self.h = as_rows(w), None
        self.x = as_rows(x) if like is x else self.w
        if preactivation is not None:
            check("preactivation", preactivation, x.shape, like)
            self.h = as_rows(preactivation)
        self.activation = ACTIVATIONS[activation]
        self.products = share_products(products(w.dtype, precision))
        self.m = x.shape[:-1].numel()
        self.n, self.k = self.w.shape

    def configuration(self, table: str, relevance: bool, gradient: bool, count: int) -> Configuration:
        """The tabled one for that many targets."""
        kind = "fused" if relevance and gradient else "one"
        many = f"{kind}_many" if self.n % LARGEST_BLOCK_N == 0 else "ragged"
        shape_class = f"{kind}_few" if count * self.m <= 32 else many
        return configuration(table, architecture_of(self.x.device), self.products.kind, shape_class)

    def _check(self, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> int:
        if tensor is None:
            return 0
        count = targets_of(name, tensor, "..., N")
        check(name, tensor, (count, *shape), self.like)
        return count

    def output(self, name: str, out: Tensor | None, source: Tensor | None, count: int) -> Tensor | None:
        if source is None:
            return None
        shape = (count, *self.input_shape)
        if out is not None:
            return check_output(name, out, shape, source)
        return torch.empty(shape, dtype=source.dtype, device=source.device)

    def launch(
        self,
        out: Tensor | None,
        gradient_out: Tensor | None,
        first: int,
        last: int,
        relevance: bool,
        gradient: bool,
        plain: float,
        magnified: float,
    ) -> None:
        """Targets first to last."""

        def part(tensor: Tensor | None) -> Tensor:
            # Pointers that are not read are those of a tensor that is there.
            return self.x[None] if tensor is None else tensor[first:last]

        rows = (last - first) * self.m
        chosen = self.configuration("linear_back", relevance, gradient, last - first)
        p1, p2, g = (part(t) for t in (self.p1, self.p2, self.g))
        h = self.x if self.h is None else self.h
        launch(
            _linear_back_kernel,
            (cdiv(rows, chosen.tiles["BLOCK_M"]) * cdiv(self.k, chosen.tiles["BLOCK_K"]),),
            (
                part(out),
                part(gradient_out),
                p1,
                p2,
                g,
                self.x,
                self.w,
                h,
                rows,
                self.m,
                self.n,
                self.k,
                p1.stride(0),
                p1.stride(1),
                p2.stride(0),
                p2.stride(1),
                g.stride(0),
                g.stride(1),
                self.x.stride(0),
                self.w.stride(0),
                h.stride(0),
                float(plain),
                float(magnified),
            ),
            chosen,
            RELEVANCE=relevance,
            MAGNITUDE=relevance and magnified != 0,
            SEPARATE=self.separate,
            GRADIENT=gradient,
            ACTIVATION=self.activation if gradient else 0,
            EVEN_N=self.n % chosen.tiles["BLOCK_N"] == 0,
            **self.products.constants,
        )
