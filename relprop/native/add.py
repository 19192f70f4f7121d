"""Adds and fan-outs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.native.module import _C
from relprop.native.tensors import (
    NONE,
    Stabiliser,
    argument,
    given_pair,
    input_tensor,
    output_tensor,
    stream_dtype,
    target_count,
)


def add_normalised(
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    stabiliser: Stabiliser,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised rule of a residual add: a' = aR/stab(a+b) scaled to the sum |Σa'|/(|Σa'|+|Σb'|) · ΣR, b' likewise.

    Args:
        relevance: relevance at a + b. [T, B, ...], any dtype; a and b are of that or a half precision
        a: first branch; sums are per target and entry of its first axis. [B, ...]
        b: second branch. [B, ...], or [1, ...] for one that all samples share
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        out: (R_a, R_b) to write to; either may be `relevance` itself, not both
    Returns:
        R_a, R_b, each [T, B, ...]; sums in float64, the same bits for any number of threads
    Conservation:
        sum(R_a) + sum(R_b) = sum(R) per sample where both branch sums have one sign; never more in size
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    compute = stream_dtype("relevance", relevance)
    shape = a.shape
    if not shape:
        raise ShapeError("a: expected shape [B, ...], got []")
    targets = target_count("relevance", relevance, "B, ...")
    full = (targets, *shape)
    batch = shape[0]
    relevance = input_tensor("relevance", relevance, full, compute)
    a = input_tensor("a", a, shape, compute)
    shared = b.shape != shape and b.shape == (1, *shape[1:])
    b = input_tensor("b", b, b.shape if shared else shape, compute)
    given = given_pair(out)
    default = relevance.dtype
    ra = output_tensor("out[0]", given[0], full, compute, default=default, same=[relevance], apart=[a, b])
    rb = output_tensor("out[1]", given[1], full, compute, default=default, same=[relevance], apart=[a, b, ra])
    _C.add_normalised(
        argument(ra),
        argument(rb),
        argument(relevance),
        argument(a),
        argument(b),
        targets,
        batch,
        1 if shared else batch,
        a.numel() // batch if batch else 0,
        *stabiliser,
        torch.get_num_threads(),
    )
    return ra, rb


def add_epsilon(
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    stabiliser: Stabiliser,
    wanted: tuple[bool, bool] = (True, True),
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Epsilon rule of an add: R_a = aR/stab(a+b), R_b likewise.

    Args:
        relevance: relevance at a + b. [T, B, ...], any dtype; a and b are of that or a half precision
        a: first summand. [B, ...]
        b: second summand. [B, ...], or [1, ...] for one that all samples share
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        wanted: which of the two results are made
        out: (R_a, R_b) to write to; either may be `relevance` itself, not both
    Returns:
        R_a, R_b, each [T, B, ...], None where not wanted
    Conservation:
        sum(R_a) + sum(R_b) = sum(R) - epsilon leak, per sample
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Achtibat et al., ICML 2024, eq. 8.
    """
    return _add(_C.add_epsilon, (), relevance, a, b, stabiliser, wanted, out)


def add_gamma(
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    gamma: float,
    stabiliser: Stabiliser,
    wanted: tuple[bool, bool] = (True, True),
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gamma rule of an add: R_a = a''R/stab(a''+b''), a'' = (1 + γ[sign a = sign(a+b)])a; one half each where a+b = 0.

    Args:
        relevance: relevance at a + b. [T, B, ...], any dtype; a and b are of that or a half precision
        a: first summand. [B, ...]
        b: second summand. [B, ...], or [1, ...] for one that all samples share
        gamma: preference for the summand of the sum's sign
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        wanted: which of the two results are made
        out: (R_a, R_b) to write to; either may be `relevance` itself, not both
    Returns:
        R_a, R_b, each [T, B, ...], None where not wanted
    Conservation:
        sum(R_a) + sum(R_b) = sum(R) - epsilon leak, per sample
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Berend et al. 2026 (ResLRP), eq. 3.
    """
    return _add(_C.add_gamma, (gamma,), relevance, a, b, stabiliser, wanted, out)


def _add(
    kernel: Callable[..., None],
    parameters: tuple[float, ...],
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    stabiliser: Stabiliser,
    wanted: tuple[bool, bool],
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None]:
    compute = stream_dtype("relevance", relevance)
    shape = a.shape
    if not shape:
        raise ShapeError("a: expected shape [B, ...], got []")
    targets = target_count("relevance", relevance, "B, ...")
    full = (targets, *shape)
    batch = shape[0]
    relevance = input_tensor("relevance", relevance, full, compute)
    a = input_tensor("a", a, shape, compute)
    shared = b.shape != shape and b.shape == (1, *shape[1:])
    b = input_tensor("b", b, b.shape if shared else shape, compute)
    if not any(wanted):
        return None, None
    made: list[Tensor | None] = []
    apart = [a, b]
    for i, given in enumerate(given_pair(out)):
        result = None
        if wanted[i]:
            result = output_tensor(
                f"out[{i}]", given, full, compute, default=relevance.dtype, same=[relevance], apart=apart
            )
            apart.append(result)
        made.append(result)
    kernel(
        *(NONE if result is None else argument(result) for result in made),
        argument(relevance),
        argument(a),
        argument(b),
        targets,
        batch,
        1 if shared else batch,
        a.numel() // batch if batch else 0,
        *parameters,
        *stabiliser,
        torch.get_num_threads(),
    )
    return made[0], made[1]


def fanout_epsilon(
    relevances: Sequence[Tensor], x: Tensor, *, stabiliser: Stabiliser, out: Tensor | None = None
) -> Tensor:
    """Epsilon rule of a value read by several operations: x ⊙ Σᵢ rᵢ / stab(x).

    Args:
        relevances: one per reader. n × [T, ...], any dtype
        x: the value. [...], that dtype or a half precision
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        out: tensor to write to, may be one of the relevances itself. [T, ...]
    Returns:
        relevance of x. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Clone and IndexSelect in the code of Chefer et al., CVPR 2021.
    """
    if not relevances:
        raise OptionError("relevances: expected at least one tensor, got none")
    compute = stream_dtype("relevances[0]", relevances[0])
    shape = x.shape
    targets = target_count("relevances[0]", relevances[0], "...")
    full = (targets, *shape)
    x = input_tensor("x", x, shape, compute)
    ready = [input_tensor(f"relevances[{i}]", relevance, full, compute) for i, relevance in enumerate(relevances)]
    out = output_tensor("out", out, full, compute, default=ready[0].dtype, same=ready, apart=[x])
    _C.fanout_epsilon(
        argument(out),
        [argument(relevance) for relevance in ready],
        argument(x),
        targets,
        x.numel(),
        *stabiliser,
        torch.get_num_threads(),
    )
    return out
