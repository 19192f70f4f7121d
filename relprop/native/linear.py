"""Linear layers: what surrounds their matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.native.module import _C
from relprop.native.tensors import (
    NONE,
    TOLERANCE,
    Stabiliser,
    argument,
    given_pair,
    input_tensor,
    output_tensor,
    stream_dtype,
    target_count,
)


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
    dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shares of the alpha-beta rule of y = x wᵀ + b: p1 = αs⁺ - βs⁻, p2 = αs⁺ + βs⁻, s± = R / stab(z±).

    z± = ½((y - b) ± |x||w|ᵀ); the way back is ½(x ⊙ (p1 w) + |x| ⊙ (p2 |w|)), see `select`.

    Args:
        relevance: relevance at the output. [T, ..., N], any dtype; the others are of that or a half precision
        y: layer output, bias included, not rounded to less than its own dtype. [..., N]
        bias: [N] or None
        absz: |x||w|ᵀ, without the bias. [..., N]
        alpha: factor of the z⁺ part
        beta: factor of the z⁻ part
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        tolerance: a z± within tolerance · absz of 0 counts as 0 and has share 0; 4 machine epsilons unless given
        dtype: of p1 and p2, `relevance`'s unless given
        out: (p1, p2) to write to; either may be `relevance` itself, not both
    Returns:
        p1, p2, each [T, ..., N]; the same tensor where beta is 0
    Conservation:
        what falls on z± counted as 0 is absorbed
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    compute = stream_dtype("relevance", relevance)
    shape = y.shape
    if not shape:
        raise ShapeError("y: expected shape [..., N], got []")
    targets = target_count("relevance", relevance, "..., N")
    full = (targets, *shape)
    n = shape[-1]
    relevance = input_tensor("relevance", relevance, full, compute)
    y = input_tensor("y", y, shape, compute)
    absz = input_tensor("absz", absz, shape, compute)
    inputs = [y, absz]
    if bias is not None:
        bias = input_tensor("bias", bias, (n,), compute)
        inputs.append(bias)
    default = relevance.dtype if dtype is None else dtype
    given = (None, None) if out is None else out
    p1 = output_tensor("out[0]", given[0], full, compute, default=default, same=[relevance], apart=inputs)
    p2 = p1
    if beta != 0:
        if given[1] is p1:
            raise OptionError("out: expected two different tensors where beta is not 0, got the same one twice")
        p2 = output_tensor("out[1]", given[1], full, compute, default=default, same=[relevance], apart=[*inputs, p1])
    _C.linear_alpha_beta_share_out(
        argument(p1),
        argument(p2),
        argument(relevance),
        argument(y),
        NONE if bias is None else argument(bias),
        argument(absz),
        targets,
        y.numel() // n if n else 0,
        n,
        alpha,
        beta,
        TOLERANCE[compute] if tolerance is None else tolerance,
        *stabiliser,
        torch.get_num_threads(),
    )
    return p1, p2


def select(x: Tensor, c1: Tensor, c2: Tensor, out: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """End of the alpha-beta rule's way back: ½(x ⊙ c1 + |x| ⊙ c2), with c1 = p1 w and c2 = p2 |w|.

    Args:
        x: layer input. [..., K], c1's dtype or a half precision
        c1: [T, ..., K], any dtype
        c2: [T, ..., K], c1's dtype or a half precision
        out: tensor to write to, may be c1 or c2 itself. [T, ..., K]
        dtype: of the result, c1's unless given
    Returns:
        relevance at the input. [T, ..., K]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    compute = stream_dtype("c1", c1)
    targets = target_count("c1", c1, "..., K")
    shape = x.shape
    full = (targets, *shape)
    x = input_tensor("x", x, shape, compute)
    c1 = input_tensor("c1", c1, full, compute)
    c2 = input_tensor("c2", c2, full, compute)
    out = output_tensor("out", out, full, compute, default=dtype or c1.dtype, same=[c1, c2], apart=[x])
    _C.linear_alpha_beta_select(
        argument(out), argument(x), argument(c1), argument(c2), targets, x.numel(), torch.get_num_threads()
    )
    return out


def epsilon_share_out(
    relevance: Tensor,
    y: Tensor,
    bias: Tensor | None,
    *,
    bias_factor: float = 1.0,
    stabiliser: Stabiliser,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Shares of the epsilon rule of a linear layer: s = R / stab(y + bias_factor · b).

    Args:
        relevance: relevance at the output. [T, ..., N], any dtype; the others are of that or a half precision
        y: layer output, with or without the bias. [..., N]
        bias: [N] or None
        bias_factor: 1 adds a bias that y lacks, -1 takes out one that y has
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        dtype: of s, `relevance`'s unless given
        out: tensor to write to, may be `relevance` itself. [T, ..., N]
    Returns:
        s. [T, ..., N]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Bach et al., PLoS ONE 2015; Achtibat et al., ICML 2024, eq. 8.
    """
    compute = stream_dtype("relevance", relevance)
    shape = y.shape
    if not shape:
        raise ShapeError("y: expected shape [..., N], got []")
    targets = target_count("relevance", relevance, "..., N")
    full = (targets, *shape)
    n = shape[-1]
    relevance = input_tensor("relevance", relevance, full, compute)
    y = input_tensor("y", y, shape, compute)
    inputs = [y]
    if bias is not None:
        bias = input_tensor("bias", bias, (n,), compute)
        inputs.append(bias)
    s = output_tensor("out", out, full, compute, default=dtype or relevance.dtype, same=[relevance], apart=inputs)
    _C.linear_epsilon_share_out(
        argument(s),
        argument(relevance),
        argument(y),
        NONE if bias is None else argument(bias),
        targets,
        y.numel() // n if n else 0,
        n,
        bias_factor,
        *stabiliser,
        torch.get_num_threads(),
    )
    return s


def epsilon_select(x: Tensor, c: Tensor, out: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """End of the epsilon rule's way back: x ⊙ c, with c = s w.

    Args:
        x: layer input. [..., K], c's dtype or a half precision
        c: [T, ..., K], any dtype
        out: tensor to write to, may be c itself. [T, ..., K]
        dtype: of the result, c's unless given
    Returns:
        relevance at the input. [T, ..., K]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    """
    compute = stream_dtype("c", c)
    targets = target_count("c", c, "..., K")
    full = (targets, *x.shape)
    x = input_tensor("x", x, x.shape, compute)
    c = input_tensor("c", c, full, compute)
    out = output_tensor("out", out, full, compute, default=dtype or c.dtype, same=[c], apart=[x])
    _C.linear_epsilon_select(argument(out), argument(x), argument(c), targets, x.numel(), torch.get_num_threads())
    return out


def gamma_share_out(
    relevance: Tensor,
    y: Tensor,
    bias: Tensor | None,
    absz: Tensor,
    *,
    gamma: float,
    biased: bool,
    bias_share: bool = True,
    stabiliser: Stabiliser,
    dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shares of the gamma rule of a linear layer; the way back is `select`(x, p1 w, p2 |w|).

    Args:
        relevance: relevance at the output. [T, ..., N], any dtype; the others are of that or a half precision
        y: layer output. [..., N]
        bias: [N] or None
        absz: |x||w|ᵀ, without the bias. [..., N]
        gamma: preference for contributions of the output's sign
        biased: whether y has the bias in it
        bias_share: whether the bias takes a share
        stabiliser: (kind, epsilon), kind `SIGNED` or `REFERENCE`
        dtype: of p1 and p2, `relevance`'s unless given
        out: (p1, p2) to write to; either may be `relevance` itself, not both
    Returns:
        p1 = (2 + γ) s and p2 = γ s sign(y), each [T, ..., N]; 0 where the output is exactly 0
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Montavon et al. 2019, in the form for either sign of Anders et al. 2021 (zennit).
    """
    compute = stream_dtype("relevance", relevance)
    shape = y.shape
    if not shape:
        raise ShapeError("y: expected shape [..., N], got []")
    targets = target_count("relevance", relevance, "..., N")
    full = (targets, *shape)
    n = shape[-1]
    relevance = input_tensor("relevance", relevance, full, compute)
    y = input_tensor("y", y, shape, compute)
    absz = input_tensor("absz", absz, shape, compute)
    inputs = [y, absz]
    if bias is not None:
        bias = input_tensor("bias", bias, (n,), compute)
        inputs.append(bias)
    given = given_pair(out)
    default = dtype or relevance.dtype
    p1 = output_tensor("out[0]", given[0], full, compute, default=default, same=[relevance], apart=inputs)
    p2 = output_tensor("out[1]", given[1], full, compute, default=default, same=[relevance], apart=[*inputs, p1])
    _C.linear_gamma_share_out(
        argument(p1),
        argument(p2),
        argument(relevance),
        argument(y),
        NONE if bias is None else argument(bias),
        argument(absz),
        targets,
        y.numel() // n if n else 0,
        n,
        gamma,
        biased,
        bias_share,
        *stabiliser,
        torch.get_num_threads(),
    )
    return p1, p2
