"""Epsilon rule of a fan-out (one value read by several operations): R_in = x sum_i(r_i) / stab(x).

Source: Clone and IndexSelect in the code of Chefer et al., CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relprop.errors import OptionError
from relprop.kernels.checks import Stabiliser, check, check_dtype, check_output, check_stabiliser, targets_of
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import architecture_of, cdiv, jit, launch, tl
from relprop.kernels.stabiliser import share

_AT_ONCE = 4


@jit
def _fanout_epsilon_kernel(
    out_ptr,  # [T, size]
    first_ptr,  # [T, size]
    second_ptr,  # [T, size]
    third_ptr,  # [T, size]
    fourth_ptr,  # [T, size]
    x_ptr,  # [size]
    targets,
    size,
    epsilon,
    KIND: tl.constexpr,
    COUNT: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if SHARE:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for _ in range(targets):
        gathered = tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 1:
            gathered += tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 2:
            gathered += tl.load(third_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 3:
            gathered += tl.load(fourth_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SHARE:
            gathered = x * share(gathered, x, epsilon, KIND)
        tl.store(out_ptr + at, gathered.to(out_ptr.dtype.element_ty), mask=inside)
        out_ptr += size
        first_ptr += size
        second_ptr += size
        third_ptr += size
        fourth_ptr += size


def fanout_epsilon(
    relevances: Sequence[Tensor], x: Tensor, *, stabiliser: Stabiliser, out: Tensor | None = None
) -> Tensor:
    """x ⊙ Σᵢ rᵢ / stab(x).

    Args:
        relevances: one per reader. n × [T, ...], float32 | bfloat16 | float16, all of one dtype
        x: the value. [...]
        stabiliser: (kind, epsilon)
        out: tensor to write to. [T, ...]
    Returns:
        relevance of x, in the relevances' dtype. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    if not relevances:
        raise OptionError("relevances: expected at least one tensor, got none")
    check_dtype("x", x)
    check_stabiliser(stabiliser)
    targets = targets_of("relevances[0]", relevances[0], "...")
    full = (targets, *x.shape)
    for i, relevance in enumerate(relevances):
        check(f"relevances[{i}]", relevance, full, x, relevances[0].dtype)
    check_dtype("relevances[0]", relevances[0])
    result = torch.empty(full, dtype=relevances[0].dtype, device=x.device) if out is None else out
    check_output("out", result, full, relevances[0])
    chosen = configuration("elementwise", architecture_of(x.device))
    x, waiting = x.contiguous(), [r.resolve_neg().contiguous() for r in relevances]
    while waiting:
        parts, waiting = waiting[:_AT_ONCE], waiting[_AT_ONCE:]
        gathered = torch.empty(full, dtype=torch.float32, device=x.device) if waiting else result
        launch(
            _fanout_epsilon_kernel,
            (cdiv(x.numel(), chosen.tiles["BLOCK"]),),
            (gathered, *(parts + parts[:1] * _AT_ONCE)[:_AT_ONCE], x, targets, x.numel(), float(stabiliser[1])),
            chosen,
            KIND=stabiliser[0],
            COUNT=len(parts),
            SHARE=not waiting,
        )
        waiting = [gathered, *waiting] if waiting else []
    return result
