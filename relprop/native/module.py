"""The compiled module `relprop._C`, or why it cannot be used."""

from __future__ import annotations

from typing import Any

import torch

from relprop.errors import BackendError


class _Missing:
    """Stands for the compiled module where it cannot be imported; any use says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        raise BackendError(f"backend cpp: expected the compiled module relprop._C, got {self.reason}")


_C: Any
try:
    from relprop import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _C = _Missing(f"an import error: {error}")


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and why not (empty where they can)."""
    if isinstance(_C, _Missing):
        return False, f"the compiled module relprop._C cannot be used: {_C.reason}"
    try:
        _C.build_info()
    except (ValueError, RuntimeError) as error:
        return False, str(error)
    return True, ""


def info() -> dict[str, Any]:
    """How the kernels were built and what they found at run time.

    Returns:
        available, reason; where available also version, compiler, isa (in use), isas_built, isas_supported, openmp
        (file name of the runtime, shared with torch; empty for none), threads, cuda, cuda_reason
    """
    usable, reason = available()
    found: dict[str, Any] = {"available": usable, "reason": reason}
    if usable:
        found.update(_C.build_info(), threads=torch.get_num_threads())
    return found
