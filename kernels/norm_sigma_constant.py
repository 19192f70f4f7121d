"""Norms as linear maps, their 1 / sigma constant: R_in = x J^T (R / stab(y)). Its kernel is that of `norm_gradient`.

Source: Achtibat et al., ICML 2024, prop. 3.4, in the form of its authors' efficient implementation.
"""

from __future__ import annotations

from torch import Tensor

from relprop.kernels.checks import Stabiliser
from relprop.kernels.norm_gradient import norm


def norm_sigma_constant(
    relevance: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    stabiliser: Stabiliser,
    out: Tensor | None = None,
) -> Tensor:
    """Relevance through a LayerNorm or RMSNorm over the last axis with 1 / σ constant.

    Args:
        relevance: at the norm's output. [T, ..., N], float32 | bfloat16 | float16
        x: the norm's input. [..., N], N at most 8192
        y: the norm's output. [..., N]
        weight: [N] or None
        kind: "layer" (its mean depends on the input, its bias takes a share) or "rms"
        eps: of the norm
        stabiliser: (kind, epsilon)
        out: tensor to write to. [T, ..., N]
    Returns:
        relevance at the input, in relevance's dtype. [T, ..., N]
    Raises:
        ShapeError, DTypeError, DeviceError, OptionError
    Source: Achtibat et al., ICML 2024, prop. 3.4.
    """
    return norm(relevance, x, weight, y, kind, eps, stabiliser, out)
