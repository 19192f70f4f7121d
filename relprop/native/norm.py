"""Norms and activations: their gradients and the rules that differ from the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.native.module import _C
from relprop.native.tensors import (
    NONE,
    Stabiliser,
    argument,
    input_tensor,
    output_tensor,
    stream_dtype,
    target_count,
)

NORMS = {"layer": 0, "rms": 1}  # Norm in csrc/norm_rows.h
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}  # Activation in csrc/activation_gradient.h


def code_of(name: str, value: str, codes: dict[str, int]) -> int:
    """The compiled module's number for a name."""
    if value not in codes:
        raise OptionError(f"{name}: expected one of {', '.join(codes)}, got {value!r}")
    return codes[value]


def norm_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor | None, *, norm: str, epsilon: float, out: Tensor | None = None
) -> Tensor:
    """Gradient of a layer norm or RMS norm over the last axis; the row's statistics are taken again from x.

    Args:
        gradient: at the output. [T, ..., N], any dtype; the others are of that or a half precision
        x: input. [..., N]
        weight: [N] or None
        norm: "layer" or "rms"
        epsilon: the norm's
        out: tensor to write to, may be `gradient` itself. [T, ..., N]
    Returns:
        gradient at x. [T, ..., N]; sums in float64, the same bits for any number of threads
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: the chain rule.
    """
    compute = stream_dtype("gradient", gradient)
    shape = x.shape
    if not shape:
        raise ShapeError("x: expected shape [..., N], got []")
    targets = target_count("gradient", gradient, "..., N")
    full = (targets, *shape)
    n = shape[-1]
    gradient = input_tensor("gradient", gradient, full, compute)
    x = input_tensor("x", x, shape, compute)
    inputs = [x]
    if weight is not None:
        weight = input_tensor("weight", weight, (n,), compute)
        inputs.append(weight)
    out = output_tensor("out", out, full, compute, default=gradient.dtype, same=[gradient], apart=inputs)
    _C.norm_gradient(
        argument(out),
        argument(gradient),
        argument(x),
        NONE if weight is None else argument(weight),
        targets,
        x.numel() // n if n else 0,
        n,
        code_of("norm", norm, NORMS),
        epsilon,
        torch.get_num_threads(),
    )
    return out


def norm_sigma_constant(
    relevance: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    *,
    norm: str,
    epsilon: float,
    stabiliser: Stabiliser,
    out: Tensor | None = None,
) -> Tensor:
    """Norm rule with 1/σ constant: x ⊙ (h - mean(h)) / σ, h = R weight / stab(y); an RMS norm has no mean(h).

    Args:
        relevance: at the output. [T, ..., N], any dtype; the others are of that or a half precision
        x: input. [..., N]
        y: output. [..., N]
        weight: [N] or None
        norm: "layer" or "rms"
        epsilon: the norm's
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        out: tensor to write to, may be `relevance` itself. [T, ..., N]
    Returns:
        relevance at x. [T, ..., N]; sums in float64, the same bits for any number of threads
    Conservation:
        the bias's share is absorbed
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Achtibat et al., ICML 2024, prop. 3.4.
    """
    compute = stream_dtype("relevance", relevance)
    shape = x.shape
    if not shape:
        raise ShapeError("x: expected shape [..., N], got []")
    targets = target_count("relevance", relevance, "..., N")
    full = (targets, *shape)
    n = shape[-1]
    relevance = input_tensor("relevance", relevance, full, compute)
    x = input_tensor("x", x, shape, compute)
    y = input_tensor("y", y, shape, compute)
    inputs = [x, y]
    if weight is not None:
        weight = input_tensor("weight", weight, (n,), compute)
        inputs.append(weight)
    out = output_tensor("out", out, full, compute, default=relevance.dtype, same=[relevance], apart=inputs)
    _C.norm_sigma_constant(
        argument(out),
        argument(relevance),
        argument(x),
        argument(y),
        NONE if weight is None else argument(weight),
        targets,
        x.numel() // n if n else 0,
        n,
        code_of("norm", norm, NORMS),
        epsilon,
        *stabiliser,
        torch.get_num_threads(),
    )
    return out


def activation_gradient(gradient: Tensor, x: Tensor, *, activation: str, out: Tensor | None = None) -> Tensor:
    """Gradient of an activation: g ⊙ f'(x); the slope is made once for all targets.

    Args:
        gradient: at the output. [T, ...], any dtype
        x: input. [...], that dtype or a half precision
        activation: "gelu", "gelu_tanh" or "silu"
        out: tensor to write to, may be `gradient` itself. [T, ...]
    Returns:
        gradient at x. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: the chain rule.
    """
    compute = stream_dtype("gradient", gradient)
    targets = target_count("gradient", gradient, "...")
    full = (targets, *x.shape)
    gradient = input_tensor("gradient", gradient, full, compute)
    x = input_tensor("x", x, x.shape, compute)
    out = output_tensor("out", out, full, compute, default=gradient.dtype, same=[gradient], apart=[x])
    _C.activation_gradient(
        argument(out),
        argument(gradient),
        argument(x),
        targets,
        x.numel(),
        code_of("activation", activation, ACTIVATIONS),
        torch.get_num_threads(),
    )
    return out


def activation_slope(
    relevance: Tensor, x: Tensor, y: Tensor, *, stabiliser: Stabiliser, out: Tensor | None = None
) -> Tensor:
    """Slope rule of an activation y = f(x): x ⊙ (y/stab(x)) ⊙ (R/stab(y)).

    Args:
        relevance: at the output. [T, ...], any dtype; the others are of that or a half precision
        x: input. [...]
        y: output. [...]
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        out: tensor to write to, may be `relevance` itself. [T, ...]
    Returns:
        relevance at x. [T, ...]
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Achtibat et al., ICML 2024, eq. 9.
    """
    compute = stream_dtype("relevance", relevance)
    targets = target_count("relevance", relevance, "...")
    full = (targets, *x.shape)
    relevance = input_tensor("relevance", relevance, full, compute)
    x = input_tensor("x", x, x.shape, compute)
    y = input_tensor("y", y, x.shape, compute)
    out = output_tensor("out", out, full, compute, default=relevance.dtype, same=[relevance], apart=[x, y])
    _C.activation_slope(
        argument(out),
        argument(relevance),
        argument(x),
        argument(y),
        targets,
        x.numel(),
        *stabiliser,
        torch.get_num_threads(),
    )
    return out
