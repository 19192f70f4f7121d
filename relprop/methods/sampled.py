"""Gradients at many points of the input: integrated gradients and SmoothGrad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from relprop.errors import OptionError
from relprop.graph import Graph
from relprop.methods.base import Requirements
from relprop.methods.input_maps import InputMap, only_one


@dataclass(frozen=True)
class SampledMap(InputMap):
    """The mean of gradients at several points, in batches of `batch` points.

    Args:
        batch: points that share one pass.
    """

    batch: int = 8

    def require(self, graph: Graph) -> Requirements:
        """The gradient at the one explained input."""
        return replace(only_one(super().require(graph), self.method), latent_stream=None)

    def points(self, x: Tensor) -> Sequence[tuple[float, Tensor]]:
        """Weights and points. x: [B, ...]"""
        raise NotImplementedError

    def combine(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The answer, per element of the input, from the weighted gradients. gradient: [T, B, ...]"""
        raise NotImplementedError

    def check(self, **counts: int) -> None:
        """Refuse counts below 1."""
        for name, count in {"batch": self.batch, **counts}.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise OptionError(f"{name}: expected an int from 1, got {count!r}")


@dataclass(frozen=True)
class IntegratedGradients(SampledMap):
    """(x - b) times the gradient's mean on the straight line from the baseline b to x, by Gauss-Legendre quadrature.

    Args:
        steps: points of the quadrature.
        baseline: value of every element of b.
    """

    steps: int = 32
    baseline: float = 0.0

    def points(self, x: Tensor) -> Sequence[tuple[float, Tensor]]:
        """Nodes and weights of the quadrature on [0, 1]."""
        self.check(steps=self.steps)
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        away = x - self.baseline
        return [(float(w) / 2, self.baseline + (1 + float(a)) / 2 * away) for a, w in zip(nodes, weights, strict=True)]

    def combine(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Completeness: the sum is the score at x less that at b, up to the quadrature's error."""
        return (x - self.baseline) * gradient


@dataclass(frozen=True)
class SmoothGrad(SampledMap):
    """The gradient's mean over inputs with normal noise.

    Args:
        samples: noisy inputs.
        noise: standard deviation, as a share of each sample's range.
        seed: of the noise, which is the same for every sample of a batch.
        times_input: multiply with the input.
    """

    samples: int = 32
    noise: float = 0.15
    seed: int = 0
    times_input: bool = False

    def points(self, x: Tensor) -> Sequence[tuple[float, Tensor]]:
        """Noisy copies, each of the same weight."""
        self.check(samples=self.samples)
        axes = tuple(range(1, x.ndim))
        spread = self.noise * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True))
        generator = torch.Generator().manual_seed(self.seed)
        noise = [torch.randn(x.shape[1:], generator=generator).to(x) for _ in range(self.samples)]
        return [(1 / self.samples, x + spread * one) for one in noise]

    def combine(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The mean itself, or times the input."""
        return x * gradient if self.times_input else gradient
