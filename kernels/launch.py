"""How kernels are made and launched: Triton where it is installed, its interpreter where TRITON_INTERPRET=1.

Importing this needs neither Triton nor a GPU; what is missing is said when a kernel is launched. The choice between
compiler and interpreter is made once, when this module is imported. Kernels call only what `triton.language` itself
interprets (no `tl.sum`, `tl.zeros`, `tl.cdiv`), so it does not matter who imported Triton before, and how.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from relprop.errors import BackendError, DeviceError, OptionError

MISSING = ""
triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError as error:
    MISSING = f"triton cannot be imported: {error}"
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

interpreted = not MISSING and os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRETED = tl.constexpr(interpreted)  # as kernels see it


def _round_to_nearest() -> None:
    """float32 becomes bfloat16 as on a device, to the nearest even.

    The interpreter cuts bits off, which takes a part of every share at every layer.
    """
    from triton.runtime import interpreter

    cut = interpreter.interpreter_builder.create_fp_trunc

    def create_fp_trunc(value: Any, to: Any) -> Any:
        if value.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(value.data.copy()).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(rounded.view("uint16"), to.scalar)
        return cut(value, to)

    interpreter.interpreter_builder.create_fp_trunc = create_fp_trunc


if interpreted:
    _round_to_nearest()


def jit(function: Callable[..., None]) -> Any:
    """A kernel, or a function that kernels call."""
    if MISSING:
        return function
    if interpreted:
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(function)
    return triton.runtime.jit.JITFunction(function)


@dataclass(frozen=True)
class Configuration:
    """One way to compile a kernel.

    Attributes:
        tiles: the kernel's BLOCK_... constants.
        warps: per program.
        stages: of the software pipeline.
    """

    tiles: Mapping[str, int]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for; see `recording`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    configuration: Configuration


class _Recorder:
    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.launches: list[Launch] = []


_RECORDER: _Recorder | None = None


@contextlib.contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Within it launches are written down instead of run, on tensors of any device, as for one architecture.

    Args:
        architecture: compute capability, as 90 for 9.0.
    """
    global _RECORDER
    before, _RECORDER = _RECORDER, _Recorder(architecture)
    try:
        yield _RECORDER.launches
    finally:
        _RECORDER = before


def architecture_of(device: torch.device) -> int:
    """Compute capability as one number; the interpreter stands for 8.0."""
    if _RECORDER is not None:
        return _RECORDER.architecture
    if interpreted or device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def unusable(device: torch.device) -> list[str]:
    """Every reason why kernels cannot run on a device; empty where they can."""
    if MISSING:
        return [MISSING]
    if interpreted or _RECORDER is not None:
        return []
    if device.type != "cuda":
        return [f"its kernels run on CUDA devices (or under TRITON_INTERPRET=1), not on {device}"]
    if not torch.cuda.is_available():
        return ["torch finds no CUDA device"]
    if torch.cuda.get_device_capability(device) < (8, 0):
        found = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
        return [f"its kernels need compute capability 8.0, {device} has {found}"]
    return []


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], configuration: Configuration, **constants: Any
) -> None:
    """Run a kernel on the current stream of its first tensor's device.

    Args:
        grid: programs per axis; nothing runs where one is 0.
        arguments: positional, tensors and numbers.
        constants: compile-time constants beside the configuration's tiles.
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    reasons = unusable(device)
    if MISSING:
        raise BackendError("backend triton: " + "; ".join(reasons))
    if reasons:
        raise DeviceError("backend triton: " + "; ".join(reasons))
    if 0 in grid:
        return
    constants = {**constants, **configuration.tiles}
    if _RECORDER is not None:
        _RECORDER.launches.append(Launch(kernel, grid, arguments, constants, configuration))
        return
    options = {} if interpreted else {"num_warps": configuration.warps, "num_stages": configuration.stages}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, **options)


def cdiv(size: int, block: int) -> int:
    """Blocks that cover a size."""
    return -(-size // block)


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True)
class Products:
    """How matrix products are taken.

    Attributes:
        operand: what operands are converted to on the way into the product.
        precision: Triton's `input_precision`; it matters for float32 operands.
        rounding: relative rounding of one product.
        kind: as the tables of configurations call it: "half", "medium" (float32 in memory), "tf32", "tf32x3", "ieee".
    """

    operand: torch.dtype
    precision: str
    rounding: float
    kind: str

    @property
    def constants(self) -> dict[str, Any]:
        """As the kernels take it."""
        return {"OPERAND": tl_dtype(self.operand), "PRECISION": self.precision}


# Three products of the two halves of each number: half the rounding of one float32 product at most is lost.
HIGHEST = "tf32x3"
_ROUNDING = {"ieee": 2.0**-23, "tf32x3": 2.0**-22, "tf32": 2.0**-10}


def products(dtype: torch.dtype, precision: str) -> Products:
    """How products of operands that are stored in `dtype` are taken at a precision.

    Args:
        dtype: float32 | bfloat16 | float16
        precision: as in `torch.set_float32_matmul_precision`: "highest", "high" or "medium"; "ieee", "tf32x3" and
            "tf32" ask for that
    Raises:
        OptionError: no such precision.
    """
    float32 = {"highest": HIGHEST, "high": "tf32", "ieee": "ieee", "tf32x3": "tf32x3", "tf32": "tf32", "medium": ""}
    if precision not in float32:
        raise OptionError(f"precision: expected one of {', '.join(float32)}, got {precision!r}")
    if dtype != torch.float32:
        return Products(dtype, "tf32", _ROUNDING["ieee"], "half")
    found = float32[precision]
    if not found:
        return Products(torch.bfloat16, "tf32", torch.finfo(torch.bfloat16).eps, "medium")
    return Products(torch.float32, found, _ROUNDING[found], found)


def share_products(taken: Products) -> Products:
    """How products with shares are taken: a share R / z overflows float16, tf32 has its bits and float32's range."""
    if taken.operand != torch.float16:
        return taken
    return Products(torch.float32, "tf32", _ROUNDING["tf32"], "tf32")


def tl_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))
