"""Tensors as the kernels take them: shapes, dtypes and devices checked, inputs contiguous, outputs allocated."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from relprop.errors import DeviceError, DTypeError, OptionError, ShapeError
from relprop.native.module import _C, available

Stabiliser = tuple[int, float]  # (kind, epsilon)
SIGNED = 0  # z + epsilon * sign(z), sign(0) = +1; with epsilon 0 the share is 0 where z is 0
REFERENCE = 1  # z + epsilon; the share is 0 where z is 0

ITEMSIZE = {torch.float32: 4, torch.float64: 8}
TOLERANCE = {dtype: 4 * torch.finfo(dtype).eps for dtype in ITEMSIZE}

HALF = (torch.bfloat16, torch.float16)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # DType in csrc/dtype.h
_MIXED = {dtype: (dtype, *HALF) for dtype in ITEMSIZE}
SMALLEST_KEPT = _C.SMALLEST_BLOCK if available()[0] else 0  # bytes, of a result in memory that is kept
FLOATING = tuple(CODES)
NONE = (0, 0)  # as `argument`, where there is no tensor
_here = threading.local()  # fresh: whether this thread's results come from torch's own allocator


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A result to write to, on the CPU; its memory may be an earlier result's, which saves the first touch of pages."""
    if math.prod(shape) * dtype.itemsize < SMALLEST_KEPT or getattr(_here, "fresh", False):
        return torch.empty(shape, dtype=dtype)
    return torch.from_dlpack(_C.result(list(shape), CODES[dtype]))


@contextlib.contextmanager
def fresh_results() -> Iterator[None]:
    """Within it this thread's results come from torch's own allocator, for whoever watches what it hands out."""
    before, _here.fresh = getattr(_here, "fresh", False), True
    try:
        yield
    finally:
        _here.fresh = before


def kept_limit() -> int:
    """Bytes of results that died which the CPU kernels keep at most."""
    return int(_C.block_use()[1])


def empty_cache() -> None:
    """Give the memory of results that died back to the system.

    The CPU kernels keep it for the next result of its size, a sixteenth of the machine's memory at most.
    """
    if available()[0]:
        _, limit = _C.block_use()
        _C.limit_blocks(0)
        _C.limit_blocks(limit)


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


def stream_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """What a kernel computes in for a stream: float64 for float64, else float32."""
    if tensor.dtype not in CODES:
        raise DTypeError(f"{name}: expected {any_of(CODES)}, got {tensor.dtype}")
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def any_of(dtypes: Iterable[torch.dtype]) -> str:
    """Dtypes as the error messages list them."""
    names = [str(dtype) for dtype in dtypes]
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _check_mixed(name: str, tensor: Tensor, shape: Sequence[int], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise DTypeError(f"{name}: expected {any_of(dtypes)}, got {tensor.dtype}")
    check(name, tensor, shape, tensor.dtype)


def argument(tensor: Tensor) -> tuple[int, int]:
    """A tensor as the compiled module takes it: address and dtype code."""
    return tensor.data_ptr(), CODES[tensor.dtype]


def given_pair(out: tuple[Tensor | None, Tensor | None] | None) -> tuple[Tensor | None, Tensor | None]:
    """Two tensors to write to, or None for each that is to be made."""
    if out is None:
        return None, None
    if out[0] is not None and out[0] is out[1]:
        raise OptionError("out: expected two different tensors, got the same one twice")
    return out


def is_aligned(tensor: Tensor) -> bool:
    """Whether its address is a multiple of its element size, which views of raw bytes need not be."""
    return tensor.data_ptr() % tensor.element_size() == 0


def input_tensor(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor as the kernels read it: of the dtype they compute in or a half precision, contiguous, aligned."""
    _check_mixed(name, tensor, shape, _MIXED[dtype])
    return dense(tensor)


def dense(tensor: Tensor) -> Tensor:
    """Contiguous, aligned and without lazy negation; copied where it is not."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor if is_aligned(tensor) else tensor.clone()
    return tensor.resolve_neg().contiguous()


def output_tensor(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    default: torch.dtype | None = None,
    same: Sequence[Tensor] = (),
    apart: Sequence[Tensor] = (),
) -> Tensor:
    """The tensor to write to: the given one, checked, or a new one.

    Args:
        name: in messages.
        tensor: the given one or None.
        shape: expected.
        dtype: what the kernel computes in; float32 can be rounded to a half precision on the way out.
        default: dtype of a new tensor, `dtype` unless given.
        same: contiguous tensors that it may be, but not overlap otherwise.
        apart: contiguous tensors that it must not overlap.
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    dtypes = (dtype,) if dtype is torch.float64 else _MIXED[dtype]
    if tensor is None:
        if default is not None and default not in dtypes:
            raise DTypeError(f"{name}: expected {any_of(dtypes)}, got {default}")
        return empty(shape, default or dtype)
    _check_mixed(name, tensor, shape, dtypes)
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ShapeError(f"{name}: expected a contiguous tensor to write to, got strides {text_of(tensor.stride())}")
    if not is_aligned(tensor):
        size = tensor.element_size()
        raise OptionError(f"{name}: expected memory aligned to {size} bytes, got the address {tensor.data_ptr():#x}")
    for other in (*same, *apart):
        if other is tensor and any(other is s for s in same):
            continue
        if _overlap(tensor, other) and not (any(other is s for s in same) and _identical(tensor, other)):
            raise OptionError(f"{name}: expected memory apart from the inputs and other results, got an overlap")
    return tensor


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.nbytes and second < first + a.nbytes


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype is b.dtype and a.numel() == b.numel()


def target_count(name: str, tensor: Tensor, trailing: str) -> int:
    """T, the length of the leading axis."""
    if tensor.dim() == 0:
        raise ShapeError(f"{name}: expected shape [T, {trailing}], got []")
    return tensor.shape[0]
