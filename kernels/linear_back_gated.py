"""Gradients through a linear layer, and through the activation and the gate whose product is its input.

    m = f(h) u    y = m w^T        g_u = c f(h) (g w)        g_h = c u (g w) f'(h)    or    g_h = c u (g w) f(h) / h

The second form and c = 1/2 are AttnLRP's, for relevance as a modified gradient. Without a gate u is 1.

Source: Achtibat et al., ICML 2024, eq. 9 and prop. 3.2.
"""

from __future__ import annotations

from torch import Tensor

from relprop.errors import OptionError
from relprop.kernels.activation_gradient import ACTIVATIONS, slope
from relprop.kernels.checks import as_rows, check
from relprop.kernels.launch import cdiv, jit, launch, tl
from relprop.kernels.linear_back import BackInputs, back_rows, back_tile
from relprop.kernels.stabiliser import SIGNED, share, side_of


@jit
def _linear_back_gated_kernel(
    h_out_ptr,  # [T * M, K]
    u_out_ptr,  # [T * M, K]
    gradient_ptr,  # [T, M, N]
    w_ptr,  # [N, K]
    h_ptr,  # [M, K]
    f_ptr,  # [M, K]
    u_ptr,  # [M, K]
    rows_size,  # T * M
    m_size,
    n_size,
    k_size,
    stride_gt,
    stride_gm,
    stride_wn,
    stride_hm,
    stride_fm,
    stride_um,
    factor,
    ACTIVATION: tl.constexpr,  # 0 for f(h) / h
    GATED: tl.constexpr,
    EVEN_N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    _c1, _c2, passed, row_tile, column_tile = back_tile(
        gradient_ptr,
        gradient_ptr,
        gradient_ptr,
        w_ptr,
        rows_size,
        m_size,
        n_size,
        k_size,
        stride_gt,
        stride_gm,
        stride_gt,
        stride_gm,
        stride_gt,
        stride_gm,
        stride_wn,
        False,
        False,
        False,
        True,
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
        # Half a tile at a time: the epilogue's operands would not fit into registers beside the accumulator.
        columns = column_tile * BLOCK_K + side * half + tl.arange(0, half)
        kept = rows_inside[:, None] & (columns < k_size)[None, :]
        at = rows_out[:, None] + columns[None, :]
        g = factor * side_of(passed, side, BLOCK_M, half)
        h = tl.load((h_ptr + samples * stride_hm)[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
        f = tl.load((f_ptr + samples * stride_fm)[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
        if GATED:
            u = tl.load((u_ptr + samples * stride_um)[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
            tl.store(u_out_ptr + at, (g * f).to(u_out_ptr.dtype.element_ty), mask=kept)
            g = g * u
        if ACTIVATION > 0:
            g = g * slope(h, ACTIVATION)
        else:
            g = g * share(f, h, 0.0, SIGNED)
        tl.store(h_out_ptr + at, g.to(h_out_ptr.dtype.element_ty), mask=kept)


def linear_back_gated(
    gradients: Tensor,
    w: Tensor,
    h: Tensor,
    f: Tensor,
    u: Tensor | None = None,
    *,
    activation: str | None = None,
    factor: float = 1.0,
    precision: str = "highest",
) -> tuple[Tensor, Tensor | None]:
    """Gradients at h and u of a linear layer whose input is f(h) u, or f(h) alone.

    Args:
        gradients: at the layer's output. [T, ..., N], float32 | bfloat16 | float16
        w: weight. [N, K], float32 | bfloat16 | float16
        h: input of the activation. [..., K], of any of these dtypes
        f: its output. [..., K]
        u: what that is multiplied by. [..., K]
        activation: "gelu", "gelu_tanh", "silu" or "relu" for its derivative, None for the slope f(h) / h (0 at 0)
        factor: of both results
        precision: of the product, see `launch.products`
    Returns:
        gradients at h and at u, None without one. [T, ..., K], in the dtype of gradients
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(str(name) for name in ACTIVATIONS)
        raise OptionError(f"activation: expected one of {known}, got {activation!r}")
    given = BackInputs(None, None, None, w, gradients, 0.0, None, None, precision)
    for name, tensor in (("h", h), ("f", f), ("u", u)):
        if tensor is not None:
            check(name, tensor, given.input_shape, w)
    at_h = given.output("h_out", None, gradients, given.gradients)
    at_u = None if u is None else given.output("u_out", None, gradients, given.gradients)
    assert at_h is not None and given.g is not None
    # The gate takes the registers of a second sum.
    chosen = given.configuration("linear_back", u is not None, True, given.gradients)
    rows_h, rows_f = as_rows(h), as_rows(f)
    rows_u = rows_f if u is None else as_rows(u)
    rows = given.gradients * given.m
    launch(
        _linear_back_gated_kernel,
        (cdiv(rows, chosen.tiles["BLOCK_M"]) * cdiv(given.k, chosen.tiles["BLOCK_K"]),),
        (
            *(at_h, at_h if at_u is None else at_u, given.g, given.w, rows_h, rows_f, rows_u),
            *(rows, given.m, given.n, given.k, *given.g.stride()[:2], given.w.stride(0)),
            *(rows_h.stride(0), rows_f.stride(0), rows_u.stride(0), float(factor)),
        ),
        chosen,
        ACTIVATION=ACTIVATIONS[activation],
        GATED=u is not None,
        EVEN_N=given.n % chosen.tiles["BLOCK_N"] == 0,
        **given.products.constants,
    )
    return at_h, at_u
