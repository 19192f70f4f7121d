"""torch's own flags for float32 products (`torch.set_float32_matmul_precision`, `allow_tf32`), set aside during a pass.

What a product's factors are rounded to is said by an engine's `precision` alone. A z+ = (x w + |x| |w|) / 2 nearly
vanishes where x w is all negative terms: if the forward pass had rounded x w otherwise than |x| |w| is rounded, what is
left would be noise.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_BACKENDS = torch.backends
_EXACT = ("none", "ieee")
_LOCK = threading.Lock()
_passes = 0  # that run now, in all threads
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Until the last of all threads' passes has ended, torch's products of float32 are products of float32."""
    global _passes
    with _LOCK:
        if _passes == 0:
            _set_aside()
        _passes += 1
    try:
        yield
    finally:
        with _LOCK:
            _passes -= 1
            while _passes == 0 and _undo:
                _undo.pop()()


def _set_aside() -> None:
    """Through the older names first: where these were used, torch does not take a mixture with the newer ones."""
    gpu = torch.cuda.is_initialized()
    named: list[Any] = [_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv]
    named += [_BACKENDS.cudnn.conv] if gpu else []
    before = [of.fp32_precision for of in named]
    _undo.append(lambda: _set(named, before))
    with contextlib.suppress(RuntimeError):  # they are a mixture already
        flag = torch.get_float32_matmul_precision()
        if flag != "highest":
            torch.set_float32_matmul_precision("highest")
            _undo.append(lambda: torch.set_float32_matmul_precision(flag))
    with contextlib.suppress(RuntimeError):
        if gpu and _BACKENDS.cudnn.allow_tf32:
            _BACKENDS.cudnn.allow_tf32 = False
            _undo.append(lambda: setattr(_BACKENDS.cudnn, "allow_tf32", True))
    _set(named, [precision if precision in _EXACT else "ieee" for precision in before])


def _set(named: list[Any], precisions: list[str]) -> None:
    for of, precision in zip(named, precisions, strict=True):
        if of.fp32_precision not in {precision, *(_EXACT if precision in _EXACT else ())}:
            of.fp32_precision = precision
