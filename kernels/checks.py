"""What every launcher checks of its tensors, and how it reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Stabiliser = tuple[int, float]  # (kind, epsilon) as in `Stabiliser.code`


def text(shape: Sequence[int]) -> str:
    """A shape for a message."""
    return f"[{', '.join(str(size) for size in shape)}]"


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises DTypeError where the kernels do not take a tensor's dtype."""
    if tensor.dtype not in DTYPES:
        raise DTypeError(f"{name}: expected {', '.join(str(d) for d in DTYPES)}, got {tensor.dtype}")


def check(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises where a tensor has another shape, lies on another device than `like` or has a dtype that no kernel takes.

    Args:
        dtype: the only one that is right; any of the kernels' by default.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name}: expected shape {text(shape)}, got {text(tensor.shape)}")
    if tensor.device != like.device:
        raise DeviceError(f"{name}: expected a tensor on {like.device} as the others, got one on {tensor.device}")
    if dtype is None:
        check_dtype(name, tensor)
    elif tensor.dtype != dtype:
        raise DTypeError(f"{name}: expected {dtype}, got {tensor.dtype}")


def check_stabiliser(stabiliser: Stabiliser) -> None:
    """Raises OptionError for a stabiliser of no known kind or of negative epsilon."""
    kind, epsilon = stabiliser
    if kind not in (0, 1) or not epsilon >= 0:
        raise OptionError(f"stabiliser: expected kind 0 or 1 and an epsilon of at least 0, got ({kind}, {epsilon:g})")


def targets_of(name: str, tensor: Tensor, trailing: str) -> int:
    """Length of the leading axis of targets."""
    if tensor.dim() == 0:
        raise ShapeError(f"{name}: expected shape [T, {trailing}], got []")
    return tensor.shape[0]


def as_rows(tensor: Tensor) -> Tensor:
    """[..., N] -> [rows, N], rows strided, their elements next to each other; copied only where they are not."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return with_unit_stride(flat)


def as_target_rows(tensor: Tensor) -> Tensor:
    """[T, ..., N] -> [T, rows, N], as `as_rows`."""
    rows = 1
    for size in tensor.shape[1:-1]:
        rows *= size
    return with_unit_stride(tensor.reshape(tensor.shape[0], rows, tensor.shape[-1]))


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with elements of its last axis next to each other."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def check_output(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """The tensor, if a kernel can write it: of `like`'s dtype and device, contiguous."""
    check(name, tensor, shape, like, like.dtype)
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ShapeError(f"{name}: expected a contiguous tensor to write to, got strides {text(tensor.stride())}")
    return tensor
