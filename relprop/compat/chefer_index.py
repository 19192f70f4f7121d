"""What Chefer, Gur and Wolf's interfaces share: which class or query of each sample, and which model, is explained."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relprop.errors import OptionError, ShapeError, TargetError


class ClassIndexError(TargetError, IndexError):
    """A class index is out of range, where the original's indexing failed too."""


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
    several = "several classes of one sample would be explained as one sum"
    found = _integers(index, wanted, several, {batch}).to(output.device).expand(batch)
    if bool(((found < -classes) | (found >= classes)).any()):
        raise ClassIndexError(f"index: expected classes of an output with {classes}, got {found.tolist()}")
    return found % classes


def _integers(given: Any, wanted: str, several: str, lengths: set[int]) -> Tensor:
    """One number, or as many as one of the lengths. [] or [length]

    Args:
        wanted: what a message says was expected.
        several: what it adds where there are more.
    """
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"{wanted}, got {type(given).__name__}") from None
    if found.dtype.is_floating_point or found.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TargetError(f"{wanted}, got {found.dtype}")
    if found.ndim > 1 or (found.ndim and len(found) not in lengths):
        raise TargetError(f"{wanted}, got shape {list(found.shape)}; {several}")
    return found.long()


@dataclass(frozen=True)
class Queries:
    """Which object query is explained, one for each image.

    Args:
        of_images: their numbers. [B]
        listed: they came with an axis, which the answer keeps, as the original's does.
    """

    of_images: Tensor
    listed: bool

    @classmethod
    def of(cls, target_index: Any, batch: int) -> Queries:
        """Queries as callers name them: one for all images, or one for each."""
        wanted = f"target_index: expected one query or one for each image, integers of shape [{batch}]"
        several = "several queries of one image would be explained as one sum"
        found = _integers(target_index, wanted, several, {1, batch})
        return cls(found.cpu().expand(batch), found.ndim > 0)

    def score(self, index: Any) -> Callable[[Tensor], Tensor]:
        """A target: a class of each query; None is its largest one but the last, "no object". [B, Q, C] -> [B]"""

        def score(logits: Tensor) -> Tensor:
            chosen = self._chosen(logits)
            return class_score(index)(chosen[:, :-1] if index is None else chosen)

        return score

    def rows(self, matrix: Tensor) -> Tensor:
        """The queries' rows of a matrix [B, Q, N]. [1, B, N], or [1, B, 1, N] where they were listed"""
        found = self._chosen(matrix)
        return (found[:, None] if self.listed else found)[None]

    def _chosen(self, found: Tensor) -> Tensor:
        """[B, Q, N] -> [B, N]"""
        count = found.shape[1]
        wrong = self.of_images[(self.of_images < -count) | (self.of_images >= count)]
        if len(wrong):
            got = ", ".join(map(str, wrong.unique().tolist()))
            raise TargetError(f"target_index: expected one of {count} queries, got {got}")
        return found[torch.arange(len(found), device=found.device), self.of_images.to(found.device)]


def check_kind(model: nn.Module, wanted: str, other: str, instead: str) -> None:
    """Refuse a model of the kind that another class of the same name is for.

    Args:
        wanted, other: inputs that only one of the two kinds has.
        instead: the class for the other.
    """
    taken = inspect.signature(model.forward).parameters
    if other in taken and wanted not in taken:
        raise OptionError(
            f"model: expected one that takes {wanted}, got {type(model).__name__}, which takes {other}; the Generator"
            f" for it is {instead}"
        )


def alone(found: Tensor, without_batch: bool) -> Tensor:
    """A batch of one loses its axis where the original has none."""
    return found[0] if without_batch and len(found) == 1 else found
