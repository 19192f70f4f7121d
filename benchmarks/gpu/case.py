"""One case of a kernel: its inputs, the Triton and the CUDA kernel, the same in float64, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STABILISER = (0, 1e-9)
# float32 products, bfloat16 operands; shares are rounded to 8 bits on the way back.
TOLERANCE = {"highest": 1e-4, "ieee": 1e-4, "tf32x3": 1e-4, "high": 3e-2, "medium": 6e-2, "bf16": 6e-2, "fp16": 3e-2}
CUDA_PRECISIONS = ("highest", "high", "medium")
Runs = dict[str, Callable[[], Any]]


@dataclass
class Case:
    """Attributes:
    op, dtype, shape: for the row.
    runs: the kernels, by backend.
    exact: the same tensors in float64.
    flops: of matrix products.
    nbytes: that have to be read or written at least.
    tolerance: relative to the root mean square.
    variant: which of the operation's forms it is.
    """

    op: str
    dtype: str
    shape: str
    runs: Runs
    exact: Callable[[], tuple[Tensor, ...]]
    flops: float
    nbytes: float
    tolerance: float
    variant: str = ""

    def key(self, backend: str) -> tuple[str, ...]:
        """By which a timing finds its check."""
        return self.op, self.variant, backend, self.dtype

    def row(self, backend: str) -> dict[str, str]:
        """The columns that say what a row is of."""
        return {"op": self.op, "variant": self.variant, "backend": backend, "dtype": self.dtype, "shape": self.shape}


def name_of(dtype: torch.dtype, precision: str) -> str:
    """How products are taken, as tables have it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, precision)


def size_of(*tensors: Tensor | None) -> float:
    """Bytes."""
    return float(sum(t.numel() * t.element_size() for t in tensors if t is not None))
