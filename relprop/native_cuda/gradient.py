"""What the gradient stream passes through besides linear layers."""

from __future__ import annotations

from torch import Tensor

from relprop.errors import ShapeError
from relprop.native_cuda.call import (
    ACTIVATIONS,
    NORMS,
    Call,
    code_of,
    pointer_of,
    row_count,
    target_count,
)


def activation_gradient(gradient: Tensor, x: Tensor, *, activation: str) -> Tensor:
    """Gradient of an activation: gradient ⊙ f'(x).

    Args:
        gradient: at the output. [T, ...], float32 | as x
        x: input. [...], float32 | bfloat16 | float16
        activation: "gelu", "gelu_tanh" or "silu"
    Returns:
        gradient at the input. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, BackendError
    """
    code = code_of("activation", activation, ACTIVATIONS)
    call = Call("x", x, "gradient", gradient)
    full = (target_count("gradient", gradient, "..."), *x.shape)
    gradient, x = call.stream("gradient", gradient, full), call.value("x", x, x.shape)
    out = call.new(full)
    call.run("activation_gradient", out.data_ptr(), gradient.data_ptr(), x.data_ptr(), full[0], x.numel(), code)
    return out


def norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor | None, *, epsilon: float, norm: str) -> Tensor:
    """Gradient of a layer norm or an RMS norm over the last axis.

    Args:
        gradient: at the output. [T, ..., N], float32 | as x
        x: input. [..., N], float32 | bfloat16 | float16
        weight: [N] or None, as x
        epsilon: the norm's own
        norm: "layer" or "rms"
    Returns:
        gradient at the input. [T, ..., N]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, BackendError
    """
    code = code_of("norm", norm, NORMS)
    call = Call("x", x, "gradient", gradient)
    shape = x.shape
    if not shape:
        raise ShapeError("x: expected shape [..., N], got []")
    full = (target_count("gradient", gradient, "..., N"), *shape)
    gradient, x = call.stream("gradient", gradient, full), call.value("x", x, shape)
    weight = None if weight is None else call.value("weight", weight, shape[-1:])
    out = call.new(full)
    pointers = [pointer_of(t) for t in (out, gradient, x, weight)]
    call.run("norm_gradient", *pointers, full[0], row_count(x), shape[-1], epsilon, code)
    return out
