"""Products of two activations and attention: what surrounds their matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import ShapeError
from relprop.native.module import _C
from relprop.native.tensors import (
    Stabiliser,
    check,
    dtype_of,
    input_tensor,
    output_tensor,
    target_count,
    text_of,
)


def share(relevance: Tensor, z: Tensor, *, stabiliser: Stabiliser) -> Tensor:
    """Shares R / stab(z); tensors that are both laid out in one other order of axes are not copied.

    Args:
        relevance: [T, ...], float32 | float64
        z: the output that the relevance belongs to. [...]
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
    Returns:
        s, laid out as `relevance`. [T, ...]
    Raises:
        ShapeError, DTypeError, DeviceError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    dtype, itemsize = dtype_of("relevance", relevance)
    targets = target_count("relevance", relevance, "...")
    full = (targets, *z.shape)
    alike = (
        relevance.stride()[1:] == z.stride()
        and (targets == 1 or relevance.stride(0) == z.numel())
        and z.numel() > 0
        and _is_dense(z)
        and not (relevance.is_neg() or z.is_neg())
    )
    if alike:
        check("relevance", relevance, full, dtype)
        check("z", z, z.shape, dtype)
        s = torch.empty_strided(full, relevance.stride(), dtype=dtype)
    else:
        relevance, z = input_tensor("relevance", relevance, full, dtype), input_tensor("z", z, z.shape, dtype)
        s = torch.empty(full, dtype=dtype)
    _C.matmul_half_share(
        itemsize,
        s.data_ptr(),
        relevance.data_ptr(),
        z.data_ptr(),
        targets,
        z.numel(),
        *stabiliser,
        torch.get_num_threads(),
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
        attention: A. [B, H, Nq, Nk], float32 | float64
        sv: s vᵀ with s = R_O / stab(O). [T, B, H, Nq, Nk]
        dots: q kᵀ, unscaled. [B, H, Nq, Nk]
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        want_relevance: whether R_A is returned too
        out: tensor for s', may be sv itself. [T, B, H, Nq, Nk]
    Returns:
        s' and R_A or None, each [T, B, H, Nq, Nk]
    Raises:
        ShapeError, DTypeError, DeviceError
    Source: Chefer et al., CVPR 2021, section 3; Achtibat et al., ICML 2024, proposition 3.3.
    """
    dtype, itemsize = dtype_of("attention", attention)
    shape = attention.shape
    targets = target_count("sv", sv, "B, H, Nq, Nk")
    full = (targets, *shape)
    attention = input_tensor("attention", attention, shape, dtype)
    sv = input_tensor("sv", sv, full, dtype)
    dots = input_tensor("dots", dots, shape, dtype)
    s_prime = output_tensor("out", out, full, dtype)
    relevance = torch.empty(full, dtype=dtype) if want_relevance else None
    _C.matmul_half_attention_shares(
        itemsize,
        s_prime.data_ptr(),
        0 if relevance is None else relevance.data_ptr(),
        attention.data_ptr(),
        sv.data_ptr(),
        dots.data_ptr(),
        targets,
        attention.numel(),
        *stabiliser,
        torch.get_num_threads(),
    )
    return s_prime, relevance


def rollout_matrix(grad: Tensor, relevance: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Read-out of a block: E = mean over heads of (∇A ⊙ R_A)⁺.

    Args:
        grad: gradient of the target with respect to A. [T, B, H, Nq, Nk], float32 | float64
        relevance: R_A. [T, B, H, Nq, Nk]
        out: tensor to write to. [T, B, Nq, Nk]
    Returns:
        E. [T, B, Nq, Nk]
    Raises:
        ShapeError, DTypeError, DeviceError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    dtype, itemsize = dtype_of("grad", grad)
    shape = grad.shape
    if len(shape) != 5 or shape[2] == 0:
        raise ShapeError(f"grad: expected shape [T, B, H, Nq, Nk] with at least one head, got {text_of(shape)}")
    targets, batch, heads, queries, keys = shape
    grad = input_tensor("grad", grad, shape, dtype)
    relevance = input_tensor("relevance", relevance, shape, dtype)
    e = output_tensor("out", out, (targets, batch, queries, keys), dtype)
    _C.matmul_half_rollout_matrix(
        itemsize,
        e.data_ptr(),
        grad.data_ptr(),
        relevance.data_ptr(),
        targets * batch,
        heads,
        queries * keys,
        torch.get_num_threads(),
    )
    return e
