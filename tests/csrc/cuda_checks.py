"""What the tests of CUDA kernels share: inputs with NaN around them, and how near a result must be."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Layer tensors and streams.
DTYPES = [(FLOAT, FLOAT), (BF16, FLOAT), (BF16, BF16), (FP16, FLOAT), (FP16, FP16)]

# Of float32 arithmetic on a handful of numbers, then one rounding to the result's dtype.
TOLERANCE = {FLOAT: 4e-6, BF16: 2**-8, FP16: 2**-11}

STABILISERS = [(0, 1e-6), (0, 0.0), (1, 1e-9)]


def surrounded(tensor: Tensor, shift: int = 0) -> Tensor:
    """The same numbers in memory with NaN on both sides; `shift` misaligns them by so many elements."""
    room = torch.full((tensor.numel() + 128 + shift,), float("nan"), dtype=tensor.dtype)
    inner = room[64 + shift :][: tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def random(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0, shift: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return surrounded(made.to(dtype), shift)


def share(relevance: Tensor, z: Tensor, stabiliser: tuple[int, float]) -> Tensor:
    """relevance / stab(z) in float64, from the stabiliser's definition."""
    kind, epsilon = stabiliser
    epsilon = float(torch.tensor(epsilon, dtype=FLOAT))
    if kind == 0 and epsilon > 0:
        return relevance / (z + torch.where(z < 0, -epsilon, epsilon).double())
    denominator = z + epsilon
    return torch.where(z == 0, 0.0, relevance / torch.where(denominator == 0, max(epsilon, 1e-300), denominator))


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Every element within tolerance of itself or of the tensor's root mean square; no NaN left over.

    What a half precision cannot hold must be infinite.
    """
    assert got.shape == want.shape, f"expected shape {list(want.shape)}, got {list(got.shape)}"
    if want.numel() == 0:
        return
    too_large = want.abs() > torch.finfo(got.dtype).max
    assert bool((got[too_large] == want[too_large].sign() * torch.inf).all())
    got, want = got.masked_fill(too_large, 0.0), want.masked_fill(too_large, 0.0)
    scale = torch.maximum(want.abs(), want.square().mean().sqrt()).clamp(min=1e-30)
    error = ((got.double() - want).abs() / scale).max()
    assert bool(error <= tolerance), f"relative error {float(error):.3g}, tolerance {tolerance:g}"
