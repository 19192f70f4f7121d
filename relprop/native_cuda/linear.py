"""Linear layers: share-outs with their products, and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relprop.errors import DTypeError, OptionError, ShapeError
from relprop.native_cuda.call import (
    PRODUCTS,
    TOLERANCE,
    Call,
    Stabiliser,
    code_of,
    compiled,
    pointer_of,
    row_count,
    target_count,
    text_of,
)


@dataclass(frozen=True)
class _Linear:
    call: Call
    product: int
    relevance: Tensor
    x: Tensor
    weight: Tensor
    y: Tensor | None
    bias: Tensor | None
    full: tuple[int, ...]

    @property
    def pointers(self) -> tuple[int, ...]:
        return tuple(pointer_of(t) for t in (self.relevance, self.x, self.weight, self.y, self.bias))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        n, k = self.weight.shape
        return self.full[0], row_count(self.x), n, k


def _linear(
    relevance: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, bias: Tensor | None, product: str
) -> _Linear:
    code = code_of("product", product, PRODUCTS)
    call = Call("x", x, "relevance", relevance)
    if weight.dim() != 2 or x.dim() == 0:
        raise ShapeError(
            f"x, weight: expected shapes [..., K] and [N, K], got {text_of(x.shape)}, {text_of(weight.shape)}"
        )
    n = weight.shape[0]
    shape = (*x.shape[:-1], n)
    targets = target_count("relevance", relevance, "..., N")
    if product == "float32" and y is None:
        raise OptionError("y: expected the layer's output, from which float32 takes x w, got None")
    if product == "float32" and x.dtype is not torch.float32:
        raise DTypeError(f"x: expected torch.float32 for products in float32, got {x.dtype}")
    return _Linear(
        call,
        code,
        call.stream("relevance", relevance, (targets, *shape)),
        call.value("x", x, x.shape),
        call.value("weight", weight, (n, x.shape[-1])),
        call.value("y", y, shape) if product == "float32" and y is not None else None,
        None if bias is None else call.value("bias", bias, (n,)),
        (targets, *shape),
    )


def linear_alpha_beta_share_out(
    relevance: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    *,
    product: str,
    stabiliser: Stabiliser,
    alpha: float = 1.0,
    beta: float = 0.0,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Shares of the alpha-beta rule of y = x wᵀ + b: p1 = αs⁺ - βs⁻, p2 = αs⁺ + βs⁻, s± = R / stab(z±).

    Args:
        relevance: relevance at the output. [T, ..., N], float32 | as x
        x: layer input. [..., K], float32 | bfloat16 | float16
        weight: [N, K], as x
        y: layer output, bias included. [..., N], as x; read where the product is "float32"
        bias: [N] or None, as x
        product: "float32" (z± = ½(y - b ± |x||w|ᵀ)), "tfloat32", "bfloat16" or "float16" (z± summed from their own
            products, of which none cancels another)
        stabiliser: (kind, epsilon)
        alpha, beta: factors of the z⁺ and the z⁻ part
        tolerance: with "float32" a z± within tolerance · |x||w|ᵀ of 0 counts as 0 and has share 0
    Returns:
        p1, p2, each [T, ..., N], as relevance; the same tensor where beta is 0
    Conservation:
        what falls on z± counted as 0 is absorbed
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, BackendError
    Source: Chefer et al., CVPR 2021, section 3.
    """
    given = _linear(relevance, x, weight, y, bias, product)
    p1 = given.call.new(given.full)
    p2 = p1 if beta == 0 else given.call.new(given.full)
    given.call.run(
        "linear_alpha_beta_share_out",
        given.product,
        p1.data_ptr(),
        p2.data_ptr(),
        *given.pointers,
        *given.sizes,
        alpha,
        beta,
        tolerance,
        stabiliser,
    )
    return p1, p2


def linear_epsilon_share_out(
    relevance: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    *,
    product: str,
    stabiliser: Stabiliser,
    bias_takes_share: bool = True,
) -> Tensor:
    """Shares of the epsilon rule of y = x wᵀ + b: R / stab(z), z = y, or y - b where the bias takes no share.

    Args: as `linear_alpha_beta_share_out`; "float32" reads z from y, other products sum it anew.
    Returns:
        s. [T, ..., N], as relevance
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, BackendError
    Source: Bach et al., PLoS ONE 2015; Achtibat et al., ICML 2024, eq. 8.
    """
    given = _linear(relevance, x, weight, y, bias, product)
    s = given.call.new(given.full)
    given.call.run(
        "linear_epsilon_share_out",
        given.product,
        s.data_ptr(),
        *given.pointers,
        bias_takes_share,
        *given.sizes,
        stabiliser,
    )
    return s


def linear_gamma_share_out(
    relevance: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    *,
    product: str,
    stabiliser: Stabiliser,
    gamma: float = 0.25,
    bias_takes_share: bool = True,
) -> tuple[Tensor, Tensor]:
    """Shares of the gamma rule of y = x wᵀ + b: p1 = R / stab(z), p2 = sign(y) p1, z = xw + γ z± by y's sign.

    Args: as `linear_alpha_beta_share_out`.
    Returns:
        p1, p2, each [T, ..., N], as relevance
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, BackendError
    Source: Montavon et al. 2019, in the form for either sign of Anders et al. 2021 (zennit).
    """
    given = _linear(relevance, x, weight, y, bias, product)
    p1, p2 = given.call.new(given.full), given.call.new(given.full)
    given.call.run(
        "linear_gamma_share_out",
        given.product,
        p1.data_ptr(),
        p2.data_ptr(),
        *given.pointers,
        bias_takes_share,
        *given.sizes,
        gamma,
        stabiliser,
    )
    return p1, p2


@dataclass(frozen=True)
class Back:
    """One stream on its way back through y = x wᵀ.

    Args:
        p1: [T, ..., N]. Alone, with `factor1` None, a gradient: the result is p1 w.
        p2: [T, ..., N] or None; may be p1 itself, which costs less
        factor1: with it the result is factor1 · x ⊙ (p1 w) ...
        factor2: ... + factor2 · |x| ⊙ (p2 |w|), where p2 is given
    """

    p1: Tensor
    p2: Tensor | None = None
    factor1: float | None = None
    factor2: float = 0.0


def linear_back(backs: Sequence[Back], x: Tensor | None, weight: Tensor, *, product: str) -> list[Tensor]:
    """Every stream's way back through y = x wᵀ in one launch: all of them read w together.

    Args:
        backs: 1 to 8 streams of one dtype
        x: layer input, None where all are gradients. [..., K], as weight
        weight: [N, K], float32 | bfloat16 | float16
        product: what factors are rounded to: "float32" (not at all; wants float32 streams), "tfloat32" (float32
            streams), "bfloat16" (float32 or bfloat16), "float16" (all float16)
    Returns:
        one [T, ..., K] for each, as its p1
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, BackendError
    """
    most = compiled().MAX_BACKS
    if not 1 <= len(backs) <= most:
        raise OptionError(f"backs: expected 1 to {most} streams, got {len(backs)}")
    code = code_of("product", product, PRODUCTS)
    call = Call("weight" if x is None else "x", weight if x is None else x, "backs[0].p1", backs[0].p1)
    if weight.dim() != 2 or (x is not None and x.dim() == 0):
        shape = "none" if x is None else text_of(x.shape)
        raise ShapeError(f"x, weight: expected shapes [..., K] and [N, K], got {shape}, {text_of(weight.shape)}")
    n, k = weight.shape
    leading = tuple(backs[0].p1.shape[1:-1] if x is None else x.shape[:-1])
    if x is not None:
        x = call.value("x", x, (*leading, k))
    weight = call.value("weight", weight, (n, k))
    arguments, kept, results = [], [], []
    for i, back in enumerate(backs):
        full = (target_count(f"backs[{i}].p1", back.p1, "..., N"), *leading, n)
        p1 = call.stream(f"backs[{i}].p1", back.p1, full)
        p2 = p1 if back.p2 is back.p1 else None if back.p2 is None else call.stream(f"backs[{i}].p2", back.p2, full)
        if x is None and back.factor1 is not None:
            raise OptionError(f"x: expected a tensor, which backs[{i}].factor1 needs, got None")
        if p2 is not None and back.factor1 is None:
            raise OptionError(f"backs[{i}].factor1: expected a number where p2 is given, got None")
        out = call.new((*full[:-1], k))
        selection = 0 if back.factor1 is None else 1 if p2 is None else 2
        arguments.append(
            (out.data_ptr(), p1.data_ptr(), pointer_of(p2), full[0], selection, back.factor1 or 0.0, back.factor2)
        )
        kept.append((p1, p2))
        results.append(out)
    call.run("linear_back", code, arguments, pointer_of(x), weight.data_ptr(), math.prod(leading), n, k)
    return results
