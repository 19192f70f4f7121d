"""Kernels compiled without a GPU: what a launch would compile to on an architecture, and what that uses.

with recording(90) as launches:
    linear_alpha_beta_share_out(...)  # on tensors of the meta device
built = [compile_launch(launch, 90) for launch in launches]
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relprop.errors import BackendError
from relprop.kernels.launch import MISSING, Launch, interpreted, triton

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        name: of the kernel.
        registers: per thread.
        stack: bytes per thread that did not fit into registers.
        shared: bytes of shared memory per program.
        ptx: its assembly.
    """

    name: str
    registers: int
    stack: int
    shared: int
    ptx: str


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compile a recorded launch as a device of that compute capability would.

    Pointers are taken as aligned to 16 bytes, as torch allocates; sizes and strides are specialised as on a GPU.

    Raises:
        BackendError: Triton is missing, or the kernels were imported for its interpreter.
    """
    if MISSING or interpreted:
        raise BackendError(f"ahead of time: expected Triton's compiler, got {MISSING or 'its interpreter'}")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialised(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.configuration.warps, "num_stages": launch.configuration.stages}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _resources(built.asm["cubin"])
    return Compiled(launch.kernel.__name__, registers, stack, built.metadata.shared, built.asm["ptx"])


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    given = dict(zip(names, launch.arguments, strict=False)) | launch.constants
    for position, name in enumerate(names):
        value = given[name]
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(position,)] = _ALIGNED
        elif name in launch.constants or value == 1:
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = _ALIGNED
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run([tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise BackendError(f"cuobjdump: expected the resources of a kernel, got {said.stdout!r}")
    return int(found[1]), int(found[2])
