"""What the tests of the kernels share: inputs, poisoned outputs, and how near an answer has to be."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.kernels.configurations import TABLE, configuration

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STABILISERS = {"signed": (0, 1e-6), "exact": (0, 0.0), "reference": (1, 1e-9)}

# float32: sums of at most a few hundred terms. 16 bits: operands are exact and sums are float32; shares are rounded to
# 8 (bfloat16) or 11 bits (float16, multiplied as tf32) on their way into the second product.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, zeros: bool = False) -> Tensor:
    """Normal numbers, every seventh 0 where asked for."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if zeros:
        made.view(-1)[::7] = 0.0
    return made.to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel has to write over."""
    return torch.full(shape, float("nan"), dtype=dtype)


def spread_out(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous, NaN between them."""
    room = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
    room[..., 0] = tensor
    return room[..., 0]


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Every element within tolerance of itself or of the tensor's root mean square; no NaN; no bias."""
    assert got.shape == want.shape, f"expected shape {list(want.shape)}, got {list(got.shape)}"
    if want.numel() == 0:
        return
    got, want = got.double(), want.double()
    size = want.square().mean().sqrt().clamp(min=1e-30)
    error = ((got - want).abs() / torch.maximum(want.abs(), size)).max()
    assert bool(error <= tolerance), f"relative error {float(error):.3g}, tolerance {tolerance:g}"
    assert bool((got - want).mean().abs() <= tolerance * size / want.numel() ** 0.5 * 4 + 1e-30)


def distinct_architectures(tables: str, kind: str, shape_class: str = "") -> list[int]:
    """Architectures whose tiles are not those of one before: what the interpreter has to run at.

    Args:
        tables: how their names begin.
        kind: of products.
        shape_class: the one of interest, or all.
    """
    keys = [k for k in TABLE if k[0].startswith(tables) and k[1] == kind and shape_class in ("", k[2])]
    found = {a: [configuration(name, a, *rest).tiles for name, *rest in keys] for a in (80, 90, 100)}
    return [a for a in found if found[a] not in [found[before] for before in found if before < a]]
