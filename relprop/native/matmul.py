"""Products of two activations and attention: what surrounds their matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import ShapeError
from relprop.native.module import _C
from relprop.native.tensors import (
    HALF,
    NONE,
    Stabiliser,
    argument,
    empty,
    input_tensor,
    is_aligned,
    output_tensor,
    stream_dtype,
    target_count,
    text_of,
)


def share(relevance: Tensor, z: Tensor, *, stabiliser: Stabiliser) -> Tensor:
    """Shares R / stab(z); tensors that are both laid out in one other order of axes are not copied.

    Args:
        relevance: [T, ...], any dtype
        z: the output that the relevance belongs to. [...], that dtype or a half precision
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
    Returns:
        s, laid out as `relevance`. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    compute = stream_dtype("relevance", relevance)
    targets = target_count("relevance", relevance, "...")
    full = (targets, *z.shape)
    alike = (
        relevance.stride()[1:] == z.stride()
        and (targets == 1 or relevance.stride(0) == z.numel())
        and z.numel() > 0
        and relevance.shape == full
        and z.dtype in (compute, *HALF)
        and relevance.is_cpu
        and z.is_cpu
        and _is_dense(z)
        and is_aligned(relevance)
        and is_aligned(z)
        and not (relevance.is_neg() or z.is_neg())
    )
    if alike:
        s = torch.empty_strided(full, relevance.stride(), dtype=relevance.dtype)
    else:
        relevance, z = input_tensor("relevance", relevance, full, compute), input_tensor("z", z, z.shape, compute)
        s = empty(full, relevance.dtype)
    _C.matmul_half_share(
        argument(s), argument(relevance), argument(z), targets, z.numel(), *stabiliser, torch.get_num_threads()
    )
    return s


def _is_dense(tensor: Tensor) -> bool:
    """Whether some order of axes makes the tensor contiguous."""
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != size:
            return False
        size *= length
    return True


def attention_shares(
    attention: Tensor,
    sv: Tensor,
    dots: Tensor,
    *,
    stabiliser: Stabiliser,
    want_relevance: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Half rule through O = A v and A = softmax(q kᵀ): R_A = ½ A ⊙ (s vᵀ) and s' = R_A / stab(q kᵀ).

    Args:
        attention: A. [B, H, Nq, Nk], sv's dtype or a half precision
        sv: s vᵀ with s = R_O / stab(O). [T, B, H, Nq, Nk], any dtype
        dots: q kᵀ, unscaled. [B, H, Nq, Nk], as attention
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        want_relevance: whether R_A is returned too
        out: tensor for s', may be sv itself. [T, B, H, Nq, Nk]
    Returns:
        s' and R_A or None, each [T, B, H, Nq, Nk]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3; Achtibat et al., ICML 2024, proposition 3.3.
    """
    compute = stream_dtype("sv", sv)
    shape = attention.shape
    targets = target_count("sv", sv, "B, H, Nq, Nk")
    full = (targets, *shape)
    attention = input_tensor("attention", attention, shape, compute)
    sv = input_tensor("sv", sv, full, compute)
    dots = input_tensor("dots", dots, shape, compute)
    s_prime = output_tensor("out", out, full, compute, default=sv.dtype, same=[sv], apart=[attention, dots])
    relevance = empty(full, sv.dtype) if want_relevance else None
    _C.matmul_half_attention_shares(
        argument(s_prime),
        NONE if relevance is None else argument(relevance),
        argument(attention),
        argument(sv),
        argument(dots),
        targets,
        attention.numel(),
        *stabiliser,
        torch.get_num_threads(),
    )
    return s_prime, relevance


def rollout_matrix(grad: Tensor, relevance: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Read-out of a block: E = mean over heads of (∇A ⊙ R_A)⁺.

    Args:
        grad: gradient of the target with respect to A. [T, B, H, Nq, Nk], any dtype
        relevance: R_A. [T, B, H, Nq, Nk], that dtype or a half precision
        out: tensor to write to. [T, B, Nq, Nk]
    Returns:
        E. [T, B, Nq, Nk]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    compute = stream_dtype("grad", grad)
    shape = grad.shape
    if len(shape) != 5 or shape[2] == 0:
        raise ShapeError(f"grad: expected shape [T, B, H, Nq, Nk] with at least one head, got {text_of(shape)}")
    targets, batch, heads, queries, keys = shape
    grad = input_tensor("grad", grad, shape, compute)
    relevance = input_tensor("relevance", relevance, shape, compute)
    full = (targets, batch, queries, keys)
    e = output_tensor("out", out, full, compute, default=grad.dtype, apart=[grad, relevance])
    _C.matmul_half_rollout_matrix(
        argument(e),
        argument(grad),
        argument(relevance),
        targets * batch,
        heads,
        queries * keys,
        torch.get_num_threads(),
    )
    return e


def softmax_taylor(relevance: Tensor, logits: Tensor, probabilities: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Softmax by its first-order Taylor expansion: x ⊙ (R - p ΣR) over the last axis; infinite logits count as 0.

    Args:
        relevance: relevance at p. [T, ..., N], any dtype; the others are of that or a half precision
        logits: x. [..., N]
        probabilities: p = softmax(x). [..., N]
        out: tensor to write to, may be `relevance` itself. [T, ..., N]
    Returns:
        relevance at the logits. [T, ..., N]; sums in float64, the same bits for any number of threads
    Conservation:
        none: the expansion's constant term keeps a part
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Achtibat et al., ICML 2024, prop. 3.1.
    """
    compute = stream_dtype("relevance", relevance)
    shape = logits.shape
    if not shape:
        raise ShapeError("logits: expected shape [..., N], got []")
    targets = target_count("relevance", relevance, "..., N")
    full = (targets, *shape)
    n = shape[-1]
    relevance = input_tensor("relevance", relevance, full, compute)
    logits = input_tensor("logits", logits, shape, compute)
    p = input_tensor("probabilities", probabilities, shape, compute)
    out = output_tensor("out", out, full, compute, default=relevance.dtype, same=[relevance], apart=[logits, p])
    _C.softmax_taylor(
        argument(out),
        argument(relevance),
        argument(logits),
        argument(p),
        targets,
        logits.numel() // n if n else 0,
        n,
        torch.get_num_threads(),
    )
    return out
