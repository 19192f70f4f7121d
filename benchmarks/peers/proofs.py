"""What shows that a contender's answer is right, before any time is printed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-3  # of an answer in float64


@dataclass(frozen=True)
class Proof:
    """An error, what it is of, and how large it may be."""

    check: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN

    def __str__(self) -> str:
        return f"{self.check}: {self.error:.2g}, at most {self.tolerance:g}"


def same(check: str, answer: Tensor, truth: Tensor, tolerance: float = EXACT) -> Proof:
    """The largest relative error of a sample. answer, truth: [B, ...] of the same shape"""
    return _worst(check, answer, truth, tolerance, lambda found, known: (found - known).norm(dim=1) / known.norm(dim=1))


def aligned(check: str, answer: Tensor, truth: Tensor, tolerance: float) -> Proof:
    """The largest 1 - correlation of a sample, over its elements. answer, truth: [B, ...] of the same shape"""

    def apart(found: Tensor, known: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(found - found.mean(1, True), known - known.mean(1, True))

    return _worst(check, answer, truth, tolerance, apart)


def _worst(
    check: str, answer: Tensor, truth: Tensor, tolerance: float, errors: Callable[[Tensor, Tensor], Tensor]
) -> Proof:
    if answer.shape != truth.shape:
        return Proof(f"{check}: shape {list(answer.shape)}, expected {list(truth.shape)}", math.inf, tolerance)
    found, known = (given.detach().double().flatten(1).cpu() for given in (answer, truth))
    return Proof(check, float(errors(found, known).nan_to_num(nan=math.inf).max()), tolerance)


def complete(check: str, relevance: Tensor, change: Tensor, tolerance: float) -> Proof:
    """Completeness: relevance sums to how much the score changed. relevance: [B, ...], change: [B]"""
    missing = (relevance.double().flatten(1).sum(1) - change.double()).abs() / change.double().abs()
    return Proof(check, float(missing.max()), tolerance)


def centred(check: str, missing: Tensor) -> Proof:
    """The mean of random errors is zero, as far as their number can tell. missing: [n]"""
    away = missing.double().mean().abs() / (missing.double().std() / len(missing) ** 0.5)
    return Proof(check, float(away), 4.0)


def usable(answer: Tensor, batch: int) -> str:
    """Why an answer cannot be one, or "". answer: [B, ...]"""
    if len(answer) != batch:
        return f"expected {batch} answers, got {len(answer)}"
    if not bool(torch.isfinite(answer).all()):
        return "answers that are not finite"
    constant = (answer.flatten(1).amax(1) == answer.flatten(1).amin(1)).any()
    return "an answer that is the same everywhere" if bool(constant) else ""
