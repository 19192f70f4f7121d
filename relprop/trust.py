"""The trust check: is an answer stable under a rounding-sized move of its input?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from relprop.explanation import Explanation
from relprop.graph import Graph, Value

STEP = 2.0**-22
SEEDS = (20210621, 20210622)  # of the moved runs; the larger disagreement counts

# Largest disagreement of a trustworthy answer. Frozen on the random models in the rows "calibration" of
# benchmarks/results/trust_check.csv (97.8 % of the bad answers found, 2.7 % false alarms); the rows "evaluation", of
# other models and the trained one, say what it is worth. One moved run instead of two was too little: at 1.5e-3 it
# found 95.7 % on calibration models and 92.3 % on others, with a lower bound of 89.5 %.
THRESHOLD = 2e-3


def mover(graph: Graph, seed: int = SEEDS[0]) -> Callable[[Value, Tensor], Tensor]:
    """A function that moves explained inputs by one rounding unit of half a float32 mantissa step.

    Each element is multiplied by 1 +- 2^-22 (signs drawn once, the same for every sample, so that an answer does not
    depend on its batch); zeros move by 2^-22 of the sample's root mean square. Token ids move at their embedding.
    """
    explained = {v.index for v in graph.explained if v.dtype.is_floating_point}

    def moves(value: Value) -> bool:
        node = value.producer
        if node is None:
            return value.index in explained
        return node.kind == "embedding" and node.role == "tokens"

    def move(value: Value, tensor: Tensor) -> Tensor:
        if not moves(value) or value.sample is None or value.sample.axis != 0:
            return tensor
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, tensor.shape[1:], generator=generator).to(tensor.device) * 2 - 1
        size = tensor.float().square().mean(tuple(range(1, tensor.ndim)), keepdim=True).sqrt().to(tensor.dtype)
        step = signs.to(tensor.dtype) * max(STEP, torch.finfo(tensor.dtype).eps if tensor.dtype.itemsize == 2 else 0.0)
        return torch.where(tensor == 0, step * size, tensor + tensor * step)

    return move


def answer(explanation: Explanation, several: bool) -> Tensor:
    """All that an explanation says of a sample, in one row where it is of several inputs. [B, ...] or [B, T, ...]"""
    maps = list(explanation.relevances.values())
    if len(maps) < 2:
        return explanation.relevance
    return torch.cat([found.flatten(2 if several else 1) for found in maps], -1)


def disagreement(
    first: Tensor,
    second: Tensor,
    several: bool,
    own: Tensor | None = None,
    explained: Tensor | None = None,
) -> Tensor:
    """Relative distance of two answers, per sample (and target): |a - b| / |a|. [B] or [B, T]

    Only what says something about the input counts. A walk through the layers starts from 1 at the class token, a
    hundred times what the patches get, and that 1 never moves: left in, it would hide any disagreement about them.

    Args:
        first, second: [B, ...], or [B, T, ...] if `several`.
        own: the row that a walk starts from; it is taken off. [B, N] or [B, T or 1, N]
        explained: the tokens that come from the input, not class or register tokens; others are left out. [N], bool
    """
    lead = 2 if several else 1
    a, b = (t.double().reshape(*t.shape[:lead], -1) for t in (first, second))
    if own is not None:
        a, b = a - own.double(), b - own.double()
    if explained is not None:
        a, b = a[..., explained], b[..., explained]
    norm = a.norm(dim=-1)
    return torch.where(norm > 0, (a - b).norm(dim=-1) / norm.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def threshold(method: str, dtype: torch.dtype) -> float:
    """The largest disagreement that counts as trustworthy."""
    return THRESHOLD
