"""Backward of GELU, SiLU and ReLU: g f'(h), for every target of a stream.

Source: Hendrycks and Gimpel 2016 (GELU); Elfwing et al. 2018 (SiLU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import OptionError
from relprop.kernels.checks import check, check_dtype, check_output, targets_of
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import architecture_of, cdiv, jit, launch, tl

ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


@jit
def slope(h, ACTIVATION: tl.constexpr):
    """f'(h) in float32."""
    if ACTIVATION == 1:
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        return below + h * density
    elif ACTIVATION == 2:
        inner = 0.7978845608028654 * (h + 0.044715 * h * h * h)
        # Of -|a|, which does not overflow.
        decay = tl.exp(-2.0 * tl.abs(inner))
        tanh = tl.where(inner >= 0, 1.0, -1.0) * (1.0 - decay) / (1.0 + decay)
        derivative = 0.7978845608028654 * (1.0 + 0.134145 * h * h)
        return 0.5 * (1.0 + tanh) + 0.5 * h * (1.0 - tanh * tanh) * derivative
    elif ACTIVATION == 3:
        decay = tl.exp(-tl.abs(h))
        sigmoid = tl.where(h >= 0, 1.0, decay) / (1.0 + decay)
        return sigmoid * (1.0 + h * (1.0 - sigmoid))
    else:
        return tl.where(h > 0, 1.0, 0.0)


@jit
def _activation_gradient_kernel(
    out_ptr,  # [T, size]
    gradient_ptr,  # [T, size]
    h_ptr,  # [size]
    targets,
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    factor = slope(tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    for _ in range(targets):
        gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (gradient * factor).to(out_ptr.dtype.element_ty), mask=inside)
        gradient_ptr += size
        out_ptr += size


def activation_gradient(gradient: Tensor, h: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """g ⊙ f'(h).

    Args:
        gradient: at the activation's output. [T, ...], float32 | bfloat16 | float16
        h: the activation's input. [...]
        activation: "gelu", "gelu_tanh", "silu" or "relu"
        out: tensor to write to, may be `gradient` itself. [T, ...]
    Returns:
        gradient at the input, in gradient's dtype. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    if activation is None or activation not in ACTIVATIONS:
        known = ", ".join(str(name) for name in ACTIVATIONS if name)
        raise OptionError(f"activation: expected one of {known}, got {activation!r}")
    check_dtype("h", h)
    targets = targets_of("gradient", gradient, "...")
    full = (targets, *h.shape)
    check("gradient", gradient, full, h)
    result = torch.empty(full, dtype=gradient.dtype, device=h.device) if out is None else out
    check_output("out", result, full, gradient)
    chosen = configuration("elementwise", architecture_of(h.device))
    launch(
        _activation_gradient_kernel,
        (cdiv(h.numel(), chosen.tiles["BLOCK"]),),
        (result, gradient.contiguous(), h.contiguous(), targets, h.numel()),
        chosen,
        ACTIVATION=ACTIVATIONS[activation],
    )
    return result
