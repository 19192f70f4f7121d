"""Normalised rule of a residual add y = a + b, in two passes whose sums add up in a fixed order.

    a' = a R / stab(a + b)        b' likewise; all sums are per target and sample
    R_a = a' sum(R) |sum a'| / stab(|sum a'| + |sum b'|) / stab(sum a')

The first pass sums pieces of a sample in float64; the second adds the pieces' sums and scales. Deferred, the first pass
also writes a' and b', and the scales are left to whoever reads them next.

Source: Chefer et al., CVPR 2021, section 3, per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.kernels.checks import Stabiliser, check, check_dtype, check_output, check_stabiliser, targets_of
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import architecture_of, cdiv, jit, launch, next_power_of_two, tl
from relprop.kernels.stabiliser import share, total

# So many pieces of one sample are added in one go; `add_normalised` makes no more.
_MOST_PIECES = 1024


@jit
def _parts(relevance_ptr, a_ptr, b_ptr, at, inside, epsilon, KIND: tl.constexpr):
    """R, a', b' of some elements."""
    relevance = tl.load(relevance_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = share(relevance, a + b, epsilon, KIND)
    return relevance, a * s, b * s


@jit
def _add_normalised_sums_kernel(
    sums_ptr,  # [T, B, 3, pieces], float64: R, a', b'
    part_a_ptr,  # [T, B, size], where deferred
    part_b_ptr,  # [T, B, size]
    relevance_ptr,  # [T, B, size]
    a_ptr,  # [B, size]
    b_ptr,  # [B or 1, size]
    batch,
    size,
    pieces,
    stride_bb,
    epsilon,
    KIND: tl.constexpr,
    DEFERRED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64) * batch + sample
    sum_r = tl.full((BLOCK,), 0.0, tl.float64)
    sum_a = tl.full((BLOCK,), 0.0, tl.float64)
    sum_b = tl.full((BLOCK,), 0.0, tl.float64)
    relevance_ptr += row * size
    for step in range(STEPS):
        at = (piece.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        relevance, a, b = _parts(
            relevance_ptr, a_ptr + sample * size, b_ptr + sample * stride_bb, at, inside, epsilon, KIND
        )
        sum_r += relevance.to(tl.float64)
        sum_a += a.to(tl.float64)
        sum_b += b.to(tl.float64)
        if DEFERRED:
            tl.store(part_a_ptr + row * size + at, a.to(part_a_ptr.dtype.element_ty), mask=inside)
            tl.store(part_b_ptr + row * size + at, b.to(part_b_ptr.dtype.element_ty), mask=inside)
    sums_ptr += row * 3 * pieces + piece
    tl.store(sums_ptr, total(sum_r, 0))
    tl.store(sums_ptr + pieces, total(sum_a, 0))
    tl.store(sums_ptr + 2 * pieces, total(sum_b, 0))


@jit
def _scales(sums_ptr, pieces, epsilon, KIND: tl.constexpr, PIECES: tl.constexpr):
    """Factors of a' and b' from the sums of one sample's pieces."""
    sum_r = tl.full((PIECES,), 0.0, tl.float64)
    sum_a = tl.full((PIECES,), 0.0, tl.float64)
    sum_b = tl.full((PIECES,), 0.0, tl.float64)
    for start in range(0, pieces, PIECES):
        at = start + tl.arange(0, PIECES)
        inside = at < pieces
        sum_r += tl.load(sums_ptr + at, mask=inside, other=0.0).to(tl.float64)
        sum_a += tl.load(sums_ptr + pieces + at, mask=inside, other=0.0).to(tl.float64)
        sum_b += tl.load(sums_ptr + 2 * pieces + at, mask=inside, other=0.0).to(tl.float64)
    sum_r = total(sum_r, 0).to(tl.float32)
    sum_a = total(sum_a, 0).to(tl.float32)
    sum_b = total(sum_b, 0).to(tl.float32)
    size = tl.abs(sum_a) + tl.abs(sum_b)
    scale_a = share(share(tl.abs(sum_a), size, epsilon, KIND) * sum_r, sum_a, epsilon, KIND)
    scale_b = share(share(tl.abs(sum_b), size, epsilon, KIND) * sum_r, sum_b, epsilon, KIND)
    return scale_a, scale_b


@jit
def _add_normalised_scales_kernel(
    scales_ptr,  # [T, B, 2]
    sums_ptr,  # [T, B, 3, pieces]
    pieces,
    epsilon,
    KIND: tl.constexpr,
    PIECES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale_a, scale_b = _scales(sums_ptr + row * 3 * pieces, pieces, epsilon, KIND, PIECES)
    tl.store(scales_ptr + 2 * row, scale_a)
    tl.store(scales_ptr + 2 * row + 1, scale_b)


@jit
def _add_normalised_kernel(
    out_a_ptr,  # [T, B, size]
    out_b_ptr,  # [T, B, size]
    sums_ptr,  # [T, B, 3, pieces]
    relevance_ptr,  # [T, B, size]
    a_ptr,  # [B, size]
    b_ptr,  # [B or 1, size]
    batch,
    size,
    pieces,
    stride_bb,
    epsilon,
    KIND: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64) * batch + sample
    scale_a, scale_b = _scales(sums_ptr + row * 3 * pieces, pieces, epsilon, KIND, PIECES)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    _relevance, a, b = _parts(
        relevance_ptr + row * size, a_ptr + sample * size, b_ptr + sample * stride_bb, at, inside, epsilon, KIND
    )
    tl.store(out_a_ptr + row * size + at, (a * scale_a).to(out_a_ptr.dtype.element_ty), mask=inside)
    tl.store(out_b_ptr + row * size + at, (b * scale_b).to(out_b_ptr.dtype.element_ty), mask=inside)


def add_normalised(
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    stabiliser: Stabiliser,
    deferred: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalised rule of a residual add.

    Args:
        relevance: relevance at a + b. [T, B, ...], float32 | bfloat16 | float16
        a: first branch. [B, ...]
        b: second branch. [B, ...], or [1, ...] for one that all samples share
        stabiliser: (kind, epsilon)
        deferred: return a' and b' unscaled, and their scales
        out: (R_a, R_b) to write to
    Returns:
        R_a and R_b [T, B, ...] in relevance's dtype, and None; deferred a', b' and their scales [T, B, 2] in float32.
        The same bits for any batch around a sample.
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    check_dtype("a", a)
    check_stabiliser(stabiliser)
    targets = targets_of("relevance", relevance, "B, ...")
    full = (targets, *a.shape)
    check("relevance", relevance, full, a)
    shared = b.shape != a.shape and b.shape == (1, *a.shape[1:])
    check("b", b, b.shape if shared else a.shape, a)
    if out is None:
        part_a, part_b = (torch.empty(full, dtype=relevance.dtype, device=a.device) for _ in range(2))
    else:
        part_a, part_b = (check_output(f"out[{i}]", tensor, full, relevance) for i, tensor in enumerate(out))
    relevance, a, b = (t.resolve_neg().contiguous() for t in (relevance, a, b))
    batch = a.shape[0]
    size = a.numel() // batch if batch else 0
    chosen = configuration("add_normalised", architecture_of(a.device))
    block = chosen.tiles["BLOCK"]
    steps = max(4, cdiv(size, block * _MOST_PIECES))
    pieces = cdiv(size, block * steps)
    sums = torch.empty((targets, batch, 3, pieces), dtype=torch.float64, device=a.device)
    kind, epsilon = stabiliser[0], float(stabiliser[1])
    rest = (relevance, a, b, batch, size, pieces, 0 if shared else size, epsilon)
    launch(
        _add_normalised_sums_kernel,
        (pieces, batch, targets),
        (sums, part_a, part_b, *rest),
        chosen,
        KIND=kind,
        DEFERRED=deferred,
        STEPS=steps,
    )
    if deferred:
        return part_a, part_b, scales_of(sums, stabiliser)
    launch(
        _add_normalised_kernel,
        (cdiv(size, block), batch, targets),
        (part_a, part_b, sums, *rest),
        chosen,
        KIND=kind,
        PIECES=_at_once(pieces),
    )
    return part_a, part_b, None


def scales_of(sums: Tensor, stabiliser: Stabiliser) -> Tensor:
    """Factors of a' and b' from the sums of R, a' and b' over pieces of a sample, added in a fixed order.

    Args:
        sums: [T, B, 3, pieces], float64 | float32, contiguous
        stabiliser: (kind, epsilon)
    Returns:
        [T, B, 2], float32
    """
    targets, batch, _, pieces = sums.shape
    scales = torch.empty((targets, batch, 2), dtype=torch.float32, device=sums.device)
    launch(
        _add_normalised_scales_kernel,
        (targets * batch if pieces else 0,),
        (scales, sums, pieces, float(stabiliser[1])),
        configuration("scalars", architecture_of(sums.device)),
        KIND=stabiliser[0],
        PIECES=_at_once(pieces),
    )
    return scales


def _at_once(pieces: int) -> int:
    return min(next_power_of_two(pieces), _MOST_PIECES)
