"""Products of activations, and softmax."""

from __future__ import annotations

from torch import Tensor

from relprop.errors import ShapeError
from relprop.native_cuda.call import (
    Call,
    Stabiliser,
    pointer_of,
    row_count,
    target_count,
)


def share(relevance: Tensor, z: Tensor, *, stabiliser: Stabiliser) -> Tensor:
    """Shares R / stab(z).

    Args:
        relevance: [T, ...], float32 | as z
        z: the output that the relevance belongs to. [...], float32 | bfloat16 | float16
        stabiliser: (kind, epsilon)
    Returns:
        s. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, BackendError
    """
    call = Call("z", z, "relevance", relevance)
    full = (target_count("relevance", relevance, "..."), *z.shape)
    relevance, z = call.stream("relevance", relevance, full), call.value("z", z, z.shape)
    s = call.new(full)
    call.run("matmul_half_share", s.data_ptr(), relevance.data_ptr(), z.data_ptr(), full[0], z.numel(), stabiliser)
    return s


def attention_shares(
    attention: Tensor, sv: Tensor, dots: Tensor, *, stabiliser: Stabiliser, want_relevance: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Half rule through O = A v and A = softmax(q kᵀ): R_A = ½ A ⊙ (s vᵀ) and s' = R_A / stab(q kᵀ).

    Args:
        attention: A. [B, H, Nq, Nk], float32 | bfloat16 | float16
        sv: s vᵀ with s = R_O / stab(O). [T, B, H, Nq, Nk], float32 | as attention
        dots: q kᵀ, unscaled. [B, H, Nq, Nk], as attention
        stabiliser: (kind, epsilon)
        want_relevance: whether R_A is returned too
    Returns:
        s' and R_A or None, each [T, B, H, Nq, Nk]
    Raises:
        ShapeError, DTypeError, DeviceError, BackendError
    Source: Chefer et al., CVPR 2021, section 3; Achtibat et al., ICML 2024, proposition 3.3.
    """
    call = Call("attention", attention, "sv", sv)
    shape = attention.shape
    full = (target_count("sv", sv, "B, H, Nq, Nk"), *shape)
    attention, dots = call.value("attention", attention, shape), call.value("dots", dots, shape)
    sv = call.stream("sv", sv, full)
    s_prime = call.new(full)
    relevance = call.new(full) if want_relevance else None
    pointers = [pointer_of(t) for t in (s_prime, relevance, attention, sv, dots)]
    call.run("matmul_half_attention_shares", *pointers, full[0], attention.numel(), stabiliser)
    return s_prime, relevance


def softmax_taylor(relevance: Tensor, logits: Tensor, probabilities: Tensor) -> Tensor:
    """Softmax by its Taylor expansion: x ⊙ (R - p ΣR) over the last axis; masked logits (-inf) get exactly 0.

    Args:
        relevance: at the softmax's output. [T, ..., N], float32 | as logits
        logits: x. [..., N], float32 | bfloat16 | float16
        probabilities: p. [..., N], as logits
    Returns:
        relevance at the logits. [T, ..., N]
    Raises:
        ShapeError, DTypeError, DeviceError, BackendError
    Source: Achtibat et al., ICML 2024, prop. 3.1.
    """
    call = Call("logits", logits, "relevance", relevance)
    shape = logits.shape
    if not shape:
        raise ShapeError("logits: expected shape [..., N], got []")
    full = (target_count("relevance", relevance, "..., N"), *shape)
    relevance = call.stream("relevance", relevance, full)
    logits, probabilities = call.value("logits", logits, shape), call.value("probabilities", probabilities, shape)
    out = call.new(full)
    pointers = [t.data_ptr() for t in (out, relevance, logits, probabilities)]
    call.run("softmax_taylor", *pointers, full[0], row_count(logits), shape[-1])
    return out
