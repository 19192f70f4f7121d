"""Tensors as the kernels take them: shapes, dtypes and devices checked, inputs contiguous, outputs allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relprop.errors import DeviceError, DTypeError, ShapeError

Stabiliser = tuple[int, float]  # (kind, epsilon)
SIGNED = 0  # z + epsilon * sign(z), sign(0) = +1; with epsilon 0 the share is 0 where z is 0
REFERENCE = 1  # z + epsilon; the share is 0 where z is 0

ITEMSIZE = {torch.float32: 4, torch.float64: 8}
TOLERANCE = {dtype: 4 * torch.finfo(dtype).eps for dtype in ITEMSIZE}


def dtype_of(name: str, tensor: Tensor) -> tuple[torch.dtype, int]:
    """A floating-point tensor's dtype and its bytes per element."""
    dtype = tensor.dtype
    itemsize = ITEMSIZE.get(dtype)
    if itemsize is None:
        raise DTypeError(f"{name}: expected torch.float32 or torch.float64, got {dtype}")
    return dtype, itemsize


def text_of(shape: Sequence[int]) -> str:
    """A shape as the error messages print it."""
    return f"[{', '.join(str(size) for size in shape)}]"


def check(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise where a tensor is not of this dtype and shape and on the CPU."""
    if tensor.dtype is not dtype:
        raise DTypeError(f"{name}: expected {dtype} as the other tensors, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ShapeError(f"{name}: expected shape {text_of(shape)}, got {text_of(tensor.shape)}")
    if not tensor.is_cpu:
        raise DeviceError(f"{name}: expected a tensor on the cpu, got one on {tensor.device}")


def input_tensor(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor as the kernels read it: checked, contiguous, no lazy negation."""
    check(name, tensor, shape, dtype)
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def output_tensor(name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor to write to: the given one, checked, or a new one."""
    if tensor is None:
        return torch.empty(shape, dtype=dtype)
    check(name, tensor, shape, dtype)
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ShapeError(f"{name}: expected a contiguous tensor to write to, got strides {text_of(tensor.stride())}")
    return tensor


def target_count(name: str, tensor: Tensor, trailing: str) -> int:
    """T, the length of the leading axis."""
    if tensor.dim() == 0:
        raise ShapeError(f"{name}: expected shape [T, {trailing}], got []")
    return tensor.shape[0]
