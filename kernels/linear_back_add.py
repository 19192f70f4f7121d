"""The way back through a linear layer whose relevance next gathers at a fan-out and is shared by a residual add.

    R = f (R_linear + R_other) / stab(f)      s = R / stab(a + b)      a' = a s      b' = b s

The add's sums per sample of R, a' and b' are taken from the tile while it is in registers: a sum per row and tile of
columns, which the scales add up in a fixed order. What is written is a' and b'; their scales are left to who reads them
next (`add_normalised`).

Source: Chefer et al., CVPR 2021, section 3, per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.kernels.add_normalised import scales_of
from relprop.kernels.checks import Stabiliser, as_rows, as_target_rows, check, check_stabiliser, text
from relprop.kernels.launch import cdiv, jit, launch, tl
from relprop.kernels.linear_back import BackInputs, back_half, back_rows, back_tile
from relprop.kernels.stabiliser import share, side_of, total


@jit
def _linear_back_add_kernel(
    part_a_ptr,  # [T * M, K]
    part_b_ptr,  # [T * M, K]
    sums_ptr,  # [T, B, 3, pieces]: R, a', b'
    gradient_out_ptr,  # [T * M, K]
    p1_ptr,  # [T, M, N]
    p2_ptr,  # [T, M, N]
    gradient_ptr,  # [T, M, N]
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    other_ptr,  # [T, M, K]
    scale_ptr,  # [T, B], of other
    f_ptr,  # [M, K]
    a_ptr,  # [M, K]
    b_ptr,  # [M, K]
    rows_size,  # T * M
    m_size,
    n_size,
    k_size,
    per_sample,  # rows of one sample
    stride_pt,
    stride_pm,
    stride_qt,
    stride_qm,
    stride_gt,
    stride_gm,
    stride_xm,
    stride_wn,
    stride_ot,
    stride_om,
    stride_ct,
    stride_cb,
    stride_fm,
    stride_am,
    stride_bm,
    plain,
    magnified,
    gather_epsilon,
    epsilon,
    KIND: tl.constexpr,
    GATHER_KIND: tl.constexpr,
    GATHER_EXACT: tl.constexpr,
    SCALED: tl.constexpr,
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
        True,
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
    targets, rows, rows_inside = back_rows(row_tile, rows_size, m_size, BLOCK_M)
    rows_out = (targets * m_size + rows) * k_size
    samples = rows // per_sample
    sum_r = tl.full((BLOCK_M,), 0.0, tl.float32)
    sum_a = tl.full((BLOCK_M,), 0.0, tl.float32)
    sum_b = tl.full((BLOCK_M,), 0.0, tl.float32)
    half: tl.constexpr = BLOCK_K // 2
    for side in tl.static_range(2):
        # Half a tile at a time: the epilogue's operands would not fit into registers beside the accumulators.
        columns = column_tile * BLOCK_K + side * half + tl.arange(0, half)
        kept = rows_inside[:, None] & (columns < k_size)[None, :]
        x = tl.load((x_ptr + rows * stride_xm)[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
        r = back_half(c1, c2, x, side, plain, magnified, MAGNITUDE, BLOCK_M, half)
        other_at = (other_ptr + targets * stride_ot + rows * stride_om)[:, None] + columns[None, :]
        other = tl.load(other_at, mask=kept, other=0.0).to(tl.float32)
        if SCALED:
            other = other * tl.load(scale_ptr + targets * stride_ct + samples * stride_cb)[:, None]
        r += other
        if not GATHER_EXACT:
            f = tl.load((f_ptr + rows * stride_fm)[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
            r = f * share(r, f, gather_epsilon, GATHER_KIND)
        a = tl.load((a_ptr + rows * stride_am)[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
        b = tl.load((b_ptr + rows * stride_bm)[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
        s = share(r, a + b, epsilon, KIND)
        a = a * s
        b = b * s
        sum_r += total(r, 1)
        sum_a += total(a, 1)
        sum_b += total(b, 1)
        at = rows_out[:, None] + columns[None, :]
        tl.store(part_a_ptr + at, a.to(part_a_ptr.dtype.element_ty), mask=kept)
        tl.store(part_b_ptr + at, b.to(part_b_ptr.dtype.element_ty), mask=kept)
        if GRADIENT:
            g = side_of(passed, side, BLOCK_M, half)
            tl.store(gradient_out_ptr + at, g.to(gradient_out_ptr.dtype.element_ty), mask=kept)
    pieces = per_sample * tl.cast((k_size + BLOCK_K - 1) // BLOCK_K, tl.int64)
    sums_at = sums_ptr + (targets * (m_size // per_sample) + samples) * 3 * pieces
    sums_at += tl.cast(column_tile, tl.int64) * per_sample + rows % per_sample
    tl.store(sums_at, sum_r, mask=rows_inside)
    tl.store(sums_at + pieces, sum_a, mask=rows_inside)
    tl.store(sums_at + 2 * pieces, sum_b, mask=rows_inside)


def linear_back_add(
    p1: Tensor,
    p2: Tensor | None,
    x: Tensor,
    w: Tensor,
    other: Tensor,
    f: Tensor,
    a: Tensor,
    b: Tensor,
    gradients: Tensor | None = None,
    *,
    plain: float = 1.0,
    magnified: float = 0.0,
    other_scale: Tensor | None = None,
    gather_stabiliser: Stabiliser = (0, 0.0),
    stabiliser: Stabiliser,
    precision: str = "highest",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The way back of `linear_back`, gathered with another use's relevance and shared by a residual add.

    Args:
        p1, p2, x, w, plain, magnified, precision: as in `linear_back`; rows of x are those of samples in order
        other: relevance of the fan-out's other use. [T, B, ..., K]
        f: the fan-out's input. [B, ..., K]
        a, b: the add's operands. [B, ..., K]
        gradients: as many as targets. [T, B, ..., N]
        other_scale: of `other`, per target and sample. [T, B], float32
        gather_stabiliser: of the fan-out, (kind, epsilon); an epsilon of 0 makes it a plain sum
        stabiliser: of the add
    Returns:
        a', b' [T, B, ..., K], their scales [T, B, 2] in float32, and gradients [T, B, ..., K] or None. The same bits
        from run to run, and for any batch around a sample whose rows have the same class of tiles, at most 32 or more;
        the classes differ by rounding, as their tiles cut the sum over N in other places.
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    given = BackInputs(p1, p2, x, w, gradients, magnified, None, None, precision)
    if x.dim() < 2:
        raise ShapeError(f"x: expected shape [B, ..., K], got {text(x.shape)}")
    if gradients is not None and given.gradients != given.targets:
        raise OptionError(f"gradients: expected one per target ({given.targets}), got {given.gradients}")
    for code in (gather_stabiliser, stabiliser):
        check_stabiliser(code)
    for name, tensor in (("f", f), ("a", a), ("b", b)):
        check(name, tensor, x.shape, x)
    check("other", other, (given.targets, *x.shape), x)
    batch = x.shape[0]
    if other_scale is not None:
        check("other_scale", other_scale, (given.targets, batch), x, torch.float32)
    part_a, part_b = (given.output("p1", None, p1, given.targets) for _ in range(2))
    passed = given.output("gradients", None, gradients, given.targets)
    assert part_a is not None and part_b is not None
    sums = _launch(
        given, part_a, part_b, passed, other, other_scale, f, a, b, plain, magnified, gather_stabiliser, stabiliser
    )
    return part_a, part_b, scales_of(sums, stabiliser), passed


def _launch(
    given: BackInputs,
    part_a: Tensor,
    part_b: Tensor,
    passed: Tensor | None,
    other: Tensor,
    other_scale: Tensor | None,
    f: Tensor,
    a: Tensor,
    b: Tensor,
    plain: float,
    magnified: float,
    gather: Stabiliser,
    stabiliser: Stabiliser,
) -> Tensor:
    """Fills the parts and the gradients; returns the sums. [T, B, 3, pieces]"""
    batch = part_a.shape[1]
    chosen = given.configuration("linear_back_add", True, passed is not None, given.targets)
    column_tiles = cdiv(given.k, chosen.tiles["BLOCK_K"])
    per_sample = given.m // batch if batch else 0
    sums = torch.empty((given.targets, batch, 3, per_sample * column_tiles), dtype=torch.float32, device=part_a.device)
    other, f, a, b = as_target_rows(other), as_rows(f), as_rows(a), as_rows(b)
    p1, p2 = given.p1, given.p2
    assert p1 is not None
    p2 = p1 if p2 is None else p2
    # Pointers that are not read are those of a tensor that is there.
    g = p1 if given.g is None else given.g
    scale = sums[:, :, 0, 0] if other_scale is None else other_scale
    rows = given.targets * given.m
    launch(
        _linear_back_add_kernel,
        (cdiv(rows, chosen.tiles["BLOCK_M"]) * column_tiles,),
        (
            *(part_a, part_b, sums, part_a if passed is None else passed, p1, p2, g, given.x, given.w),
            *(other, scale, f, a, b),
            *(rows, given.m, given.n, given.k, per_sample),
            *(*p1.stride()[:2], *p2.stride()[:2], *g.stride()[:2], given.x.stride(0), given.w.stride(0)),
            *(*other.stride()[:2], *scale.stride()[:2], f.stride(0), a.stride(0), b.stride(0)),
            *(float(plain), float(magnified), float(gather[1]), float(stabiliser[1])),
        ),
        chosen,
        KIND=stabiliser[0],
        GATHER_KIND=gather[0],
        GATHER_EXACT=gather[1] == 0,
        SCALED=other_scale is not None,
        MAGNITUDE=magnified != 0,
        SEPARATE=given.separate,
        GRADIENT=passed is not None,
        EVEN_N=given.n % chosen.tiles["BLOCK_N"] == 0,
        **given.products.constants,
    )
    return sums
