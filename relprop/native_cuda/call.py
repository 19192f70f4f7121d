"""One call of a CUDA kernel: the compiled module `relprop._cuda`, and what tensors must be to be given to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relprop.errors import BackendError, DeviceError, DTypeError, OptionError, ShapeError

Stabiliser = tuple[int, float]  # (kind, epsilon)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PRODUCTS = {"float32": 0, "tfloat32": 1, "bfloat16": 2, "float16": 3}
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}
NORMS = {"layer": 0, "rms": 1}

TOLERANCE = 4 * torch.finfo(torch.float32).eps


class _Missing:
    """Stands for the compiled module where it cannot be imported; any use says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        raise BackendError(f"backend cuda: expected the compiled module relprop._cuda, got {self.reason}")


_cuda: Any
try:
    from relprop import _cuda  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _cuda = _Missing(f"an import error: {error}")


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and why not (empty where they can)."""
    if isinstance(_cuda, _Missing):
        return False, f"the compiled module relprop._cuda cannot be used: {_cuda.reason}"
    reason = _cuda.build_info()["reason"]
    return reason == "", reason


def device_type() -> str:
    """Where the kernels' tensors must lie."""
    return "cuda" if isinstance(_cuda, _Missing) else _cuda.DEVICE_TYPE


def info() -> dict[str, Any]:
    """How the kernels were built and whether they can run here.

    Returns:
        available, reason; where they were built also compiler
    """
    usable, reason = available()
    built = {} if isinstance(_cuda, _Missing) else _cuda.build_info()
    return {**built, "available": usable, "reason": reason}


def text_of(shape: Sequence[int]) -> str:
    """A shape as the error messages print it."""
    return f"[{', '.join(str(size) for size in shape)}]"


def compiled() -> Any:
    """The compiled module."""
    return _cuda


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


class Call:
    """The dtypes and the device of one call, settled by its first two tensors, and what all others are held to."""

    def __init__(self, name: str, values: Tensor, stream_name: str, stream: Tensor) -> None:
        if values.dtype not in DTYPES:
            raise DTypeError(f"{name}: expected {', '.join(str(d) for d in DTYPES)}, got {values.dtype}")
        if stream.dtype not in (torch.float32, values.dtype):
            expected = " or ".join(dict.fromkeys(str(d) for d in (torch.float32, values.dtype)))
            raise DTypeError(f"{stream_name}: expected {expected}, got {stream.dtype}")
        self.values, self.streams, self.device = values.dtype, stream.dtype, values.device
        kind = _cuda.DEVICE_TYPE
        if self.device.type != kind:
            raise DeviceError(f"{name}: expected a tensor on a {kind} device, got one on {self.device}")

    def _checked(self, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if tensor.dtype is not dtype:
            raise DTypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.shape != tuple(shape):
            raise ShapeError(f"{name}: expected shape {text_of(shape)}, got {text_of(tensor.shape)}")
        if tensor.device != self.device:
            raise DeviceError(f"{name}: expected a tensor on {self.device} as the others, got one on {tensor.device}")
        tensor = tensor.resolve_neg().contiguous()
        # Views of raw bytes may begin anywhere.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    def value(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A layer tensor as the kernels read it."""
        return self._checked(name, tensor, shape, self.values)

    def stream(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A stream as the kernels read it."""
        return self._checked(name, tensor, shape, self.streams)

    def single(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor that is float32 whatever the others are."""
        return self._checked(name, tensor, shape, torch.float32)

    def new(self, shape: Sequence[int]) -> Tensor:
        """A stream to write to."""
        return empty(shape, self.streams, self.device)

    def run(self, kernel: str, *arguments: Any) -> None:
        """Launch on the current stream; a failure is the backend's."""
        index, handle = 0, 0
        if self.device.type == "cuda":
            index = self.device.index or 0
            handle = torch.cuda.current_stream(self.device).cuda_stream
        context = (DTYPES[self.values], DTYPES[self.streams], index, handle)
        try:
            getattr(_cuda, kernel)(context, *arguments)
        except ValueError:
            raise
        except RuntimeError as error:
            raise BackendError(f"backend cuda: {kernel} could not run on {self.device}: {error}") from error


def pointer_of(tensor: Tensor | None) -> int:
    """A tensor's address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def target_count(name: str, tensor: Tensor, trailing: str) -> int:
    """T, the length of the leading axis."""
    if tensor.dim() == 0:
        raise ShapeError(f"{name}: expected shape [T, {trailing}], got []")
    return tensor.shape[0]


def code_of(name: str, choice: str, choices: dict[str, int]) -> int:
    """A named choice as the compiled module takes it."""
    if choice not in choices:
        raise OptionError(f"{name}: expected one of {', '.join(choices)}, got {choice!r}")
    return choices[choice]


def row_count(x: Tensor) -> int:
    """How many vectors along the last axis."""
    return math.prod(x.shape[:-1])
