"""The C++ kernels of ``csrc/`` for torch tensors: shapes, dtypes and devices are checked here, outputs allocated.

A relevance has a leading axis of T targets; layer inputs and outputs, shared by the targets, have none. The tensors of
a call are all float32 or all float64, on the CPU; those that are not contiguous are copied. Results carry no autograd
history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relprop.errors import BackendError, DeviceError, DTypeError, OptionError, ShapeError

Stabiliser = tuple[int, float]  # (kind, epsilon)
SIGNED = 0  # z + epsilon * sign(z), sign(0) = +1; with epsilon 0 the share is 0 where z is 0
REFERENCE = 1  # z + epsilon; the share is 0 where z is 0

_ITEMSIZE = {torch.float32: 4, torch.float64: 8}
_TOLERANCE = {dtype: 4 * torch.finfo(dtype).eps for dtype in _ITEMSIZE}


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


def _dtype_of(name: str, tensor: Tensor) -> tuple[torch.dtype, int]:
    dtype = tensor.dtype
    itemsize = _ITEMSIZE.get(dtype)
    if itemsize is None:
        raise DTypeError(f"{name}: expected torch.float32 or torch.float64, got {dtype}")
    return dtype, itemsize


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _check(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype:
        raise DTypeError(f"{name}: expected {dtype} as the other tensors, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ShapeError(f"{name}: expected shape {_text(shape)}, got {_text(tensor.shape)}")
    if not tensor.is_cpu:
        raise DeviceError(f"{name}: expected a tensor on the cpu, got one on {tensor.device}")


def _input(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor as the kernels read it: checked, contiguous, no lazy negation."""
    _check(name, tensor, shape, dtype)
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def _output(name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if tensor is None:
        return torch.empty(shape, dtype=dtype)
    _check(name, tensor, shape, dtype)
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ShapeError(f"{name}: expected a contiguous tensor to write to, got strides {_text(tensor.stride())}")
    return tensor


def _targets(name: str, tensor: Tensor, trailing: str) -> int:
    if tensor.dim() == 0:
        raise ShapeError(f"{name}: expected shape [T, {trailing}], got []")
    return tensor.shape[0]


def share_out(
    relevance: Tensor,
    y: Tensor,
    bias: Tensor | None,
    absz: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    stabiliser: Stabiliser,
    tolerance: float | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shares of the alpha-beta rule of y = x wᵀ + b: p1 = αs⁺ - βs⁻, p2 = αs⁺ + βs⁻, s± = R / stab(z±).

    z± = ½((y - b) ± |x||w|ᵀ); the way back is ½(x ⊙ (p1 w) + |x| ⊙ (p2 |w|)), see `select`.

    Args:
        relevance: relevance at the output. [T, ..., N], float32 | float64
        y: layer output, bias included, not rounded to less than its own dtype. [..., N]
        bias: [N] or None
        absz: |x||w|ᵀ, without the bias. [..., N]
        alpha: factor of the z⁺ part
        beta: factor of the z⁻ part
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        tolerance: a z± within tolerance · absz of 0 counts as 0 and has share 0; 4 machine epsilons unless given
        out: (p1, p2) to write to; either may be `relevance` itself, not both
    Returns:
        p1, p2, each [T, ..., N]; the same tensor where beta is 0
    Conservation:
        what falls on z± counted as 0 is absorbed
    Raises:
        ShapeError, DTypeError, DeviceError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    dtype, itemsize = _dtype_of("relevance", relevance)
    shape = y.shape
    if not shape:
        raise ShapeError("y: expected shape [..., N], got []")
    targets = _targets("relevance", relevance, "..., N")
    full = (targets, *shape)
    n = shape[-1]
    relevance = _input("relevance", relevance, full, dtype)
    y = _input("y", y, shape, dtype)
    absz = _input("absz", absz, shape, dtype)
    bias_pointer = 0
    if bias is not None:
        bias = _input("bias", bias, (n,), dtype)
        bias_pointer = bias.data_ptr()
    p1 = _output("out[0]", None if out is None else out[0], full, dtype)
    p2 = p1 if beta == 0 else _output("out[1]", None if out is None else out[1], full, dtype)
    if beta != 0 and p1 is p2:
        raise OptionError("out: expected two different tensors where beta is not 0, got the same one twice")
    _C.linear_alpha_beta_share_out(
        itemsize,
        p1.data_ptr(),
        p2.data_ptr(),
        relevance.data_ptr(),
        y.data_ptr(),
        bias_pointer,
        absz.data_ptr(),
        targets,
        y.numel() // n if n else 0,
        n,
        alpha,
        beta,
        _TOLERANCE[dtype] if tolerance is None else tolerance,
        *stabiliser,
        torch.get_num_threads(),
    )
    return p1, p2


def select(x: Tensor, c1: Tensor, c2: Tensor, out: Tensor | None = None) -> Tensor:
    """End of the alpha-beta rule's way back: ½(x ⊙ c1 + |x| ⊙ c2), with c1 = p1 w and c2 = p2 |w|.

    Args:
        x: layer input. [..., K], float32 | float64
        c1: [T, ..., K]
        c2: [T, ..., K]
        out: tensor to write to, may be c1 or c2 itself. [T, ..., K]
    Returns:
        relevance at the input. [T, ..., K]
    Raises:
        ShapeError, DTypeError, DeviceError
    """
    dtype, itemsize = _dtype_of("x", x)
    targets = _targets("c1", c1, "..., K")
    shape = x.shape
    full = (targets, *shape)
    x = _input("x", x, shape, dtype)
    c1 = _input("c1", c1, full, dtype)
    c2 = _input("c2", c2, full, dtype)
    out = _output("out", out, full, dtype)
    _C.linear_alpha_beta_select(
        itemsize,
        out.data_ptr(),
        x.data_ptr(),
        c1.data_ptr(),
        c2.data_ptr(),
        targets,
        x.numel(),
        torch.get_num_threads(),
    )
    return out


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
        relevance: relevance at a + b. [T, B, ...], float32 | float64
        a: first branch; sums are per target and entry of its first axis. [B, ...]
        b: second branch. [B, ...], or [1, ...] for one that all samples share
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        out: (R_a, R_b) to write to; either may be `relevance` itself, not both
    Returns:
        R_a, R_b, each [T, B, ...]; sums in float64, the same bits for any number of threads
    Conservation:
        sum(R_a) + sum(R_b) = sum(R) per sample where both branch sums have one sign; never more in size
    Raises:
        ShapeError, DTypeError, DeviceError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    dtype, itemsize = _dtype_of("relevance", relevance)
    shape = a.shape
    if not shape:
        raise ShapeError("a: expected shape [B, ...], got []")
    targets = _targets("relevance", relevance, "B, ...")
    full = (targets, *shape)
    batch = shape[0]
    relevance = _input("relevance", relevance, full, dtype)
    a = _input("a", a, shape, dtype)
    shared = b.shape != shape and b.shape == (1, *shape[1:])
    b = _input("b", b, b.shape if shared else shape, dtype)
    relevance_a = _output("out[0]", None if out is None else out[0], full, dtype)
    relevance_b = _output("out[1]", None if out is None else out[1], full, dtype)
    if relevance_a is relevance_b:
        raise OptionError("out: expected two different tensors, got the same one twice")
    _C.add_normalised(
        itemsize,
        relevance_a.data_ptr(),
        relevance_b.data_ptr(),
        relevance.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        targets,
        batch,
        1 if shared else batch,
        a.numel() // batch if batch else 0,
        *stabiliser,
        torch.get_num_threads(),
    )
    return relevance_a, relevance_b


def fanout_epsilon(
    relevances: Sequence[Tensor], x: Tensor, *, stabiliser: Stabiliser, out: Tensor | None = None
) -> Tensor:
    """Epsilon rule of a value read by several operations: x ⊙ Σᵢ rᵢ / stab(x).

    Args:
        relevances: one per reader. n × [T, ...], float32 | float64
        x: the value. [...]
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
    dtype, itemsize = _dtype_of("x", x)
    shape = x.shape
    targets = _targets("relevances[0]", relevances[0], "...")
    full = (targets, *shape)
    x = _input("x", x, shape, dtype)
    ready = [_input(f"relevances[{i}]", relevance, full, dtype) for i, relevance in enumerate(relevances)]
    out = _output("out", out, full, dtype)
    _C.fanout_epsilon(
        itemsize,
        out.data_ptr(),
        [relevance.data_ptr() for relevance in ready],
        x.data_ptr(),
        targets,
        x.numel(),
        *stabiliser,
        torch.get_num_threads(),
    )
    return out


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
    dtype, itemsize = _dtype_of("relevance", relevance)
    targets = _targets("relevance", relevance, "...")
    full = (targets, *z.shape)
    alike = (
        relevance.stride()[1:] == z.stride()
        and (targets == 1 or relevance.stride(0) == z.numel())
        and z.numel() > 0
        and _is_dense(z)
        and not (relevance.is_neg() or z.is_neg())
    )
    if alike:
        _check("relevance", relevance, full, dtype)
        _check("z", z, z.shape, dtype)
        s = torch.empty_strided(full, relevance.stride(), dtype=dtype)
    else:
        relevance, z = _input("relevance", relevance, full, dtype), _input("z", z, z.shape, dtype)
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
    dtype, itemsize = _dtype_of("attention", attention)
    shape = attention.shape
    targets = _targets("sv", sv, "B, H, Nq, Nk")
    full = (targets, *shape)
    attention = _input("attention", attention, shape, dtype)
    sv = _input("sv", sv, full, dtype)
    dots = _input("dots", dots, shape, dtype)
    s_prime = _output("out", out, full, dtype)
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
    dtype, itemsize = _dtype_of("grad", grad)
    shape = grad.shape
    if len(shape) != 5 or shape[2] == 0:
        raise ShapeError(f"grad: expected shape [T, B, H, Nq, Nk] with at least one head, got {_text(shape)}")
    targets, batch, heads, queries, keys = shape
    grad = _input("grad", grad, shape, dtype)
    relevance = _input("relevance", relevance, shape, dtype)
    e = _output("out", out, (targets, batch, queries, keys), dtype)
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
