"""Adds and fan-outs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.native_cuda.call import (
    Call,
    Stabiliser,
    compiled,
    target_count,
)


def add_normalised(relevance: Tensor, a: Tensor, b: Tensor, *, stabiliser: Stabiliser) -> tuple[Tensor, Tensor]:
    """Normalised rule of a residual add: a' = aR/stab(a+b) scaled to the sum |Σa'|/(|Σa'|+|Σb'|) · ΣR, b' likewise.

    Args:
        relevance: relevance at a + b. [T, B, ...], float32 | as a
        a: first branch; sums are per target and entry of its first axis. [B, ...], float32 | bfloat16 | float16
        b: second branch. [B, ...], or [1, ...] for one that all samples share
        stabiliser: (kind, epsilon)
    Returns:
        R_a, R_b, each [T, B, ...]; the same bits from run to run and in any batch
    Conservation:
        sum(R_a) + sum(R_b) = sum(R) per sample where both branch sums have one sign; never more in size
    Raises:
        ShapeError, DTypeError, DeviceError, BackendError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    call = Call("a", a, "relevance", relevance)
    shape = a.shape
    if not shape:
        raise ShapeError("a: expected shape [B, ...], got []")
    full = (target_count("relevance", relevance, "B, ..."), *shape)
    batch = shape[0]
    shared = b.shape != shape and b.shape == (1, *shape[1:])
    relevance, a = call.stream("relevance", relevance, full), call.value("a", a, shape)
    b = call.value("b", b, b.shape if shared else shape)
    size = a.numel() // batch if batch else 0
    workspace = torch.empty(
        compiled().add_normalised_workspace(full[0], batch, size) if size else 0,
        dtype=torch.float64,
        device=call.device,
    )
    ra, rb = call.new(full), call.new(full)
    pointers = [t.data_ptr() for t in (ra, rb, relevance, a, b, workspace)]
    call.run("add_normalised", *pointers, full[0], batch, 1 if shared else batch, size, stabiliser)
    return ra, rb


def _add(kernel: str, relevance: Tensor, a: Tensor, b: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    call = Call("a", a, "relevance", relevance)
    full = (target_count("relevance", relevance, "..."), *a.shape)
    relevance, a, b = (
        call.stream("relevance", relevance, full),
        call.value("a", a, a.shape),
        call.value("b", b, a.shape),
    )
    ra, rb = call.new(full), call.new(full)
    call.run(kernel, *(t.data_ptr() for t in (ra, rb, relevance, a, b)), full[0], a.numel(), *parameters)
    return ra, rb


def add_epsilon(relevance: Tensor, a: Tensor, b: Tensor, *, stabiliser: Stabiliser) -> tuple[Tensor, Tensor]:
    """Epsilon rule of a residual add: a R / stab(a + b) and b R / stab(a + b).

    Args:
        relevance: [T, ...], float32 | as a
        a, b: branches. [...], float32 | bfloat16 | float16
        stabiliser: (kind, epsilon)
    Returns:
        R_a, R_b, each [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, BackendError
    Source: Achtibat et al., ICML 2024, eq. 8.
    """
    return _add("add_epsilon", relevance, a, b, stabiliser)


def add_gamma(
    relevance: Tensor, a: Tensor, b: Tensor, *, stabiliser: Stabiliser, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gamma rule of a residual add: shares of a'' = (1 + γ[sign a = sign(a + b)]) a and b''; halves where a + b is 0.

    Args:
        relevance: [T, ...], float32 | as a
        a, b: branches. [...], float32 | bfloat16 | float16
        stabiliser: (kind, epsilon)
        gamma: preference for the branch of the sum's sign
    Returns:
        R_a, R_b, each [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, BackendError
    Source: Berend et al. 2026 (ResLRP), eq. 3.
    """
    return _add("add_gamma", relevance, a, b, gamma, stabiliser)


def most_readers() -> int:
    """As many operations may read a value whose relevance `fanout_epsilon` gathers."""
    return int(compiled().MAX_FANOUT)


def fanout_epsilon(relevances: Sequence[Tensor], x: Tensor, *, stabiliser: Stabiliser) -> Tensor:
    """Epsilon rule of a value read by several operations: x ⊙ Σᵢ rᵢ / stab(x).

    Args:
        relevances: one per reader, 1 to 16. n × [T, ...], float32 | as x
        x: the value. [...], float32 | bfloat16 | float16
        stabiliser: (kind, epsilon)
    Returns:
        relevance of x. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, BackendError
    Source: Clone and IndexSelect in the code of Chefer et al., CVPR 2021.
    """
    most = most_readers()
    if not 1 <= len(relevances) <= most:
        raise OptionError(f"relevances: expected 1 to {most} tensors, got {len(relevances)}")
    call = Call("x", x, "relevances[0]", relevances[0])
    full = (target_count("relevances[0]", relevances[0], "..."), *x.shape)
    x = call.value("x", x, x.shape)
    ready = [call.stream(f"relevances[{i}]", relevance, full) for i, relevance in enumerate(relevances)]
    out = call.new(full)
    call.run(
        "fanout_epsilon", out.data_ptr(), [r.data_ptr() for r in ready], x.data_ptr(), full[0], x.numel(), stabiliser
    )
    return out
