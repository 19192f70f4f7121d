"""Gamma rule of a residual add: the summand of the sum's sign is preferred. Its kernel is that of `add_epsilon`.

Source: Berend et al. 2026 (ResLRP), eq. 3.
"""

from __future__ import annotations

from torch import Tensor

from relprop.kernels.add_epsilon import add_shares
from relprop.kernels.checks import Stabiliser


def add_gamma(
    relevance: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    gamma: float = 1.0,
    stabiliser: Stabiliser,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """R_a = a'' R / stab(a'' + b''), a'' = (1 + γ [sign a = sign(a + b)]) a; one half each where a + b is exactly 0.

    Args:
        relevance: relevance at a + b. [T, B, ...], float32 | bfloat16 | float16
        a: first summand. [B, ...]
        b: second summand. [B, ...], or [1, ...] for one that all samples share
        gamma: preference for the summand of the sum's sign
        stabiliser: (kind, epsilon)
        out: (R_a, R_b) to write to; either may be `relevance` itself, not both
    Returns:
        R_a, R_b, in relevance's dtype. [T, B, ...]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Berend et al. 2026 (ResLRP), eq. 3.
    """
    return add_shares(relevance, a, b, float(gamma), stabiliser, out)
