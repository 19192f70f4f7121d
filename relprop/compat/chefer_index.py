"""The index of Chefer, Gur and Wolf's interfaces: which class to explain, one for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError, TargetError


class ClassIndexError(TargetError, IndexError):
    """A class index is out of range, where the original's indexing failed too."""


class LayerIndexError(OptionError, IndexError):
    """A start layer is out of range, where the original's indexing failed too."""


def class_score(index: Any) -> Callable[[Tensor], Tensor]:
    """A target: one class per sample."""

    def score(output: Tensor) -> Tensor:
        return output.gather(1, _classes(index, output)[:, None])[:, 0]

    return score


def _classes(index: Any, output: Tensor) -> Tensor:
    """One class for each sample of an output [B, C]. [B]"""
    if output.ndim != 2:
        raise ShapeError(f"model: expected logits [B, classes], got {list(output.shape)}")
    batch, classes = output.shape
    if index is None:
        return output.argmax(-1)
    wanted = f"index: expected None, a class or one class for each sample, shape [{batch}]"
    try:
        found = torch.as_tensor(index, device=output.device)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"{wanted}, got {type(index).__name__}") from None
    if found.dtype.is_floating_point or found.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TargetError(f"{wanted}, got {found.dtype}")
    if found.ndim and tuple(found.shape) != (batch,):
        raise TargetError(
            f"{wanted}, got shape {list(found.shape)}; several classes of one sample would be explained as one sum"
        )
    found = found.long().expand(batch)
    if bool(((found < -classes) | (found >= classes)).any()):
        raise ClassIndexError(f"index: expected classes of an output with {classes}, got {found.tolist()}")
    return found % classes


def alone(found: Tensor, without_batch: bool) -> Tensor:
    """A batch of one loses its axis where the original has none."""
    return found[0] if without_batch and len(found) == 1 else found
