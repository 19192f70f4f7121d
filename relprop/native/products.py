"""Linear layers with their matrix products: y = x wᵀ + b in float32 streams, everything around the products fused.

x and w are read in the dtype they are stored in (float32, bfloat16 or float16); `operands` is what is multiplied,
torch.float32 or torch.bfloat16, with float32 accumulation. Results are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import DTypeError, OptionError, ShapeError
from relprop.native.module import _C
from relprop.native.tensors import CODES, HALF, Stabiliser, check, dense, empty, is_aligned, target_count, text_of

_STORED = (torch.float32, *HALF)
_OPERANDS = {torch.float32: 0, torch.bfloat16: 1}


def products_fast(operands: torch.dtype) -> bool:
    """Whether this CPU has instructions for these operands that make the products here worth calling."""
    return operands in _OPERANDS and bool(_C.gemm_fast(_OPERANDS[operands]))


def _matrix(weight: Tensor) -> tuple[int, int, int, int]:
    row, column = weight.stride()
    return weight.data_ptr(), CODES[weight.dtype], row, column


def _layer(x: Tensor | None, weight: Tensor, packed: Tensor | None, rows: int, operands: torch.dtype) -> object:
    n, k = weight.shape
    pointer = 0 if x is None else x.data_ptr()
    code = 0 if x is None else CODES[x.dtype]
    ready = 0 if packed is None else packed.data_ptr()
    return _C.Linear((pointer, code), _matrix(weight), ready, rows, k, n, _OPERANDS[operands])


def pack_weight(weight: Tensor, *, transpose: bool, operands: torch.dtype) -> Tensor:
    """A weight as the products read it, to be made once and passed as `packed` to every call.

    Args:
        weight: [N, K]
        transpose: for products with wᵀ (`linear_apply`, `share_out_product`), else for those with w.
        operands: torch.float32 | torch.bfloat16
    Returns:
        opaque bytes, about N · K times the size of an operand. uint8
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    weight = _weight(weight, operands)
    n, k = weight.shape
    columns, depth = (n, k) if transpose else (k, n)
    packed = torch.empty(_C.linear_packed_bytes(columns, depth, _OPERANDS[operands]), dtype=torch.uint8)
    if weight.numel():
        arguments = (n, k, transpose, _OPERANDS[operands], torch.get_num_threads())
        _C.linear_pack(packed.data_ptr(), _matrix(weight), *arguments)
    return packed


def _packed(packed: Tensor | None, columns: int, depth: int, operands: torch.dtype) -> Tensor | None:
    if packed is not None:
        check("packed", packed, (_C.linear_packed_bytes(columns, depth, _OPERANDS[operands]),), torch.uint8)
        if packed.data_ptr() % 64:
            raise ShapeError("packed: expected memory on a 64-byte boundary as pack_weight makes it, got a part of it")
    return packed


def _operand(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype not in _STORED:
        raise DTypeError(f"{name}: expected torch.float32, torch.bfloat16 or torch.float16, got {tensor.dtype}")
    check(name, tensor, shape, tensor.dtype)
    return dense(tensor)


def _stream(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    check(name, tensor, shape, torch.float32)
    return dense(tensor)


def _weight(weight: Tensor, operands: torch.dtype) -> Tensor:
    if weight.dim() != 2:
        raise ShapeError(f"weight: expected shape [N, K], got {text_of(weight.shape)}")
    if operands not in _OPERANDS:
        raise OptionError(f"operands: expected torch.float32 or torch.bfloat16, got {operands}")
    if weight.is_neg() or 1 not in weight.stride() or not is_aligned(weight):
        return _operand("weight", weight.resolve_neg().contiguous(), tuple(weight.shape))
    if weight.dtype not in _STORED:
        raise DTypeError(f"weight: expected torch.float32, torch.bfloat16 or torch.float16, got {weight.dtype}")
    return weight


def _rows(shape: torch.Size) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, operands: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, ...]]:
    """x, weight, bias and packed of x wᵀ + b, checked and as the kernels read them, and the shape of y."""
    weight = _weight(weight, operands)
    n, k = weight.shape
    packed = _packed(packed, n, k, operands)
    x = _operand("x", x, (*x.shape[:-1], k))
    bias = None if bias is None else _stream("bias", bias, (n,))
    return x, weight, bias, packed, (*x.shape[:-1], n)


def linear_apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, operands: torch.dtype, packed: Tensor | None = None
) -> Tensor:
    """x wᵀ + b.

    Args:
        x: [..., K]
        weight: [N, K]
        bias: [N] or None, float32
        operands: torch.float32 | torch.bfloat16
        packed: the weight as `pack_weight` makes it for this product, or None
    Returns:
        [..., N], float32
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    x, weight, bias, packed, shape = _forward(x, weight, bias, packed, operands)
    if x.shape[-1] == 0:
        return torch.zeros(shape) if bias is None else bias.expand(shape).clone()
    y = empty(shape, torch.float32)
    layer = _layer(x, weight, packed, _rows(x.shape), operands)
    _C.linear_apply(y.data_ptr(), 0 if bias is None else bias.data_ptr(), layer, torch.get_num_threads())
    return y


def linear_apply_rounded(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, operands: torch.dtype, packed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x wᵀ + b in bfloat16, rounded once, and the sums x wᵀ that it was rounded from.

    Args:
        x: [..., K]
        weight: [N, K]
        bias: [N] or None, float32
        operands: torch.float32 | torch.bfloat16
        packed: the weight as `pack_weight` makes it for this product, or None
    Returns:
        x wᵀ + b, bfloat16, and x wᵀ, float32, without the bias. Each [..., N]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    x, weight, bias, packed, shape = _forward(x, weight, bias, packed, operands)
    if x.shape[-1] == 0:
        sums = torch.zeros(shape)
        return (sums if bias is None else sums + bias).bfloat16(), sums
    y, sums = empty(shape, torch.bfloat16), empty(shape, torch.float32)
    layer = _layer(x, weight, packed, _rows(x.shape), operands)
    pointer = 0 if bias is None else bias.data_ptr()
    _C.linear_apply_rounded(y.data_ptr(), sums.data_ptr(), pointer, layer, torch.get_num_threads())
    return y, sums


def linear_transpose(stream: Tensor, weight: Tensor, *, operands: torch.dtype, packed: Tensor | None = None) -> Tensor:
    """stream w, the way back of the gradient.

    Args:
        stream: [..., N], float32
        weight: [N, K]
        operands: torch.float32 | torch.bfloat16
        packed: the weight as `pack_weight` makes it for this product, or None
    Returns:
        [..., K], float32
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    weight = _weight(weight, operands)
    n, k = weight.shape
    packed = _packed(packed, k, n, operands)
    stream = _stream("stream", stream, (*stream.shape[:-1], n))
    if n == 0:
        return torch.zeros((*stream.shape[:-1], k))
    out = empty((*stream.shape[:-1], k), torch.float32)
    layer = _layer(None, weight, packed, _rows(stream.shape), operands)
    _C.linear_transpose(out.data_ptr(), stream.data_ptr(), layer, 1, torch.get_num_threads())
    return out


def share_out_product(
    relevance: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    *,
    operands: torch.dtype,
    alpha: float = 1.0,
    stabiliser: Stabiliser,
    tolerance: float,
    packed: Tensor | None = None,
) -> Tensor:
    """Shares of the z⁺ rule, αR / stab(z⁺) with z⁺ = ½(x wᵀ + |x||w|ᵀ), without |x||w|ᵀ in memory.

    Args:
        relevance: [T, ..., N], float32
        x: [..., K]
        weight: [N, K]
        y: x wᵀ + b of the same operands, float32; None forms x wᵀ beside |x||w|ᵀ, from one pass. [..., N]
        bias: of y. [N] or None, float32
        operands: torch.float32 | torch.bfloat16
        alpha: factor of the shares
        stabiliser: (kind, epsilon)
        tolerance: a z⁺ within tolerance · |x||w|ᵀ of 0 counts as 0 and has share 0
        packed: the weight as `pack_weight` makes it for this product, or None
    Returns:
        [T, ..., N], float32
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    x, weight, bias, packed, shape = _forward(x, weight, bias, packed, operands)
    targets = target_count("relevance", relevance, "..., N")
    relevance = _stream("relevance", relevance, (targets, *shape))
    y = None if y is None else _stream("y", y, shape)
    out = empty(relevance.shape, torch.float32)
    if x.shape[-1] == 0:
        return out.zero_()
    _C.linear_alpha_beta_share_out_product(
        out.data_ptr(),
        relevance.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        _layer(x, weight, packed, _rows(x.shape), operands),
        targets,
        alpha,
        tolerance,
        *stabiliser,
        torch.get_num_threads(),
    )
    return out


def back_product(
    shares: Tensor, x: Tensor, weight: Tensor, *, operands: torch.dtype, packed: Tensor | None = None
) -> Tensor:
    """End of the z⁺ rule: ½(x ⊙ (s w) + |x| ⊙ (s |w|)), both products from one pass over s and w.

    Args:
        shares: s. [T, ..., N], float32
        x: [..., K]
        weight: [N, K]
        operands: torch.float32 | torch.bfloat16
        packed: the weight as `pack_weight` makes it for this product, or None
    Returns:
        [T, ..., K], float32
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    weight = _weight(weight, operands)
    n, k = weight.shape
    packed = _packed(packed, k, n, operands)
    x = _operand("x", x, (*x.shape[:-1], k))
    targets = target_count("shares", shares, "..., N")
    shares = _stream("shares", shares, (targets, *x.shape[:-1], n))
    if n == 0:
        return torch.zeros((targets, *x.shape))
    out = empty((targets, *x.shape), torch.float32)
    layer = _layer(x, weight, packed, _rows(x.shape), operands)
    _C.linear_alpha_beta_back_product(out.data_ptr(), shares.data_ptr(), layer, targets, torch.get_num_threads())
    return out
