"""Epsilon and gamma rules of an add y = a + b, element by element.

    R_a = a'' R / stab(a'' + b'')        a'' = (1 + gamma [sign a = sign(a + b)]) a; gamma = 0 is the epsilon rule

Source: Achtibat et al., ICML 2024, eq. 8; Berend et al. 2026 (ResLRP), eq. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.kernels.checks import Stabiliser, check, check_dtype, check_output, check_stabiliser, targets_of
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import architecture_of, cdiv, jit, launch, tl
from relprop.kernels.stabiliser import share


@jit
def _add_shares_kernel(
    out_a_ptr,  # [T, size]
    out_b_ptr,  # [T, size]
    relevance_ptr,  # [T, size]
    a_ptr,  # [size]
    b_ptr,  # [b_size], repeated
    targets,
    size,
    b_size,
    gamma,
    epsilon,
    KIND: tl.constexpr,
    PREFER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at % b_size, mask=inside, other=0.0).to(tl.float32)
    y = a + b
    z = y
    if PREFER:
        a = tl.where(a * y > 0, (1.0 + gamma) * a, a)
        b = tl.where(b * y > 0, (1.0 + gamma) * b, b)
        z = a + b
    for _ in range(targets):
        relevance = tl.load(relevance_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s = share(relevance, z, epsilon, KIND)
        part_a = a * s
        part_b = b * s
        if PREFER:
            # A sum of exactly 0 has two one-sided limits; their mean is one half each.
            part_a = tl.where(y == 0, 0.5 * relevance, part_a)
            part_b = tl.where(y == 0, 0.5 * relevance, part_b)
        tl.store(out_a_ptr + at, part_a.to(out_a_ptr.dtype.element_ty), mask=inside)
        tl.store(out_b_ptr + at, part_b.to(out_b_ptr.dtype.element_ty), mask=inside)
        relevance_ptr += size
        out_a_ptr += size
        out_b_ptr += size


def add_shares(
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    gamma: float | None,
    stabiliser: Stabiliser,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Shares of both summands; see `add_epsilon` and `add_gamma`. A gamma of None is the epsilon rule."""
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
    chosen = configuration("elementwise", architecture_of(a.device))
    launch(
        _add_shares_kernel,
        (cdiv(a.numel(), chosen.tiles["BLOCK"]),),
        (part_a, part_b, relevance, a, b, targets, a.numel(), b.numel(), float(gamma or 0.0), float(stabiliser[1])),
        chosen,
        KIND=stabiliser[0],
        PREFER=gamma is not None,
    )
    return part_a, part_b


def add_epsilon(
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    stabiliser: Stabiliser,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """R_a = a R / stab(a + b), R_b likewise.

    Args:
        relevance: relevance at a + b. [T, B, ...], float32 | bfloat16 | float16
        a: first summand. [B, ...]
        b: second summand. [B, ...], or [1, ...] for one that all samples share
        stabiliser: (kind, epsilon)
        out: (R_a, R_b) to write to; either may be `relevance` itself, not both
    Returns:
        R_a, R_b, in relevance's dtype. [T, B, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Achtibat et al., ICML 2024, eq. 8.
    """
    return add_shares(relevance, a, b, None, stabiliser, out)
