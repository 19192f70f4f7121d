"""Gradients at many points of the input: integrated gradients and SmoothGrad."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from relprop.errors import OptionError
from relprop.graph import Graph
from relprop.methods.base import Requirements
from relprop.methods.input_maps import InputMap


@dataclass(frozen=True)
class Origin:
    """What the points are made around, at one explained input.

    Attributes:
        x: the input itself, or the embeddings of its tokens. [B, ...]
        number: of the input, from 0.
        first: how many tokens in front are hidden from all others, where masks hide some. [B]
    """

    x: Tensor
    number: int
    first: Tensor | None = None


@dataclass(frozen=True)
class SampledMap(InputMap):
    """The mean of gradients at several points, in batches of `batch` points; explained inputs move together.

    Args:
        batch: points that share one pass.
    """

    batch: int = 8

    def require(self, graph: Graph) -> Requirements:
        """The gradient at every explained input."""
        self.check()
        return replace(super().require(graph), latent_stream=None, padding=True)

    def weights(self) -> list[float]:
        """One for each point."""
        raise NotImplementedError

    def moved(self, origin: Origin, point: int) -> Tensor:
        """An input at a point. [B, ...]"""
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

    def check(self, **counts: int) -> None:
        """Also of the quadrature, and a baseline that is no number."""
        super().check(steps=self.steps, **counts)
        if isinstance(self.baseline, bool) or not isinstance(self.baseline, Real):
            raise OptionError(f"baseline: expected a number, got {self.baseline!r}")

    def weights(self) -> list[float]:
        """Of the quadrature on [0, 1]."""
        return [weight / 2 for weight in _quadrature(self.steps)[1]]

    def moved(self, origin: Origin, point: int) -> Tensor:
        """At a node of the quadrature."""
        share = (1 + _quadrature(self.steps)[0][point]) / 2
        return self.baseline + share * (origin.x - self.baseline)

    def combine(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Completeness: the sum is the score at x less that at b, up to the quadrature's error."""
        return (x - self.baseline) * gradient


@cache
def _quadrature(steps: int) -> tuple[list[float], list[float]]:
    """Nodes and weights on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return nodes.tolist(), weights.tolist()


@dataclass(frozen=True)
class SmoothGrad(SampledMap):
    """The gradient's mean over inputs with normal noise.

    A token's noise depends on its place among the tokens that are seen and on its own embedding alone, so that neither
    other samples nor padding change it.

    Args:
        samples: noisy inputs.
        noise: standard deviation, as a share of each sample's range; in a sequence [B, N, C] of each token's own.
        seed: of the noise, which is the same for every sample of a batch.
        times_input: multiply with the input.
    """

    samples: int = 32
    noise: float = 0.15
    seed: int = 0
    times_input: bool = False

    def check(self, **counts: int) -> None:
        """Also of the draws."""
        super().check(samples=self.samples, **counts)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise OptionError(f"seed: expected an int from 0, got {self.seed!r}")

    def weights(self) -> list[float]:
        """The same for each draw."""
        return [1 / self.samples] * self.samples

    def moved(self, origin: Origin, point: int) -> Tensor:
        """A noisy copy."""
        x = origin.x
        axes = (2,) if x.ndim == 3 else tuple(range(1, x.ndim))
        spread = self.noise * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True))
        return x + spread * self._draw(origin, point)

    def _draw(self, origin: Origin, point: int) -> Tensor:
        """Normal noise; a longer sequence's starts with a shorter one's. [...], or [B, N, C] where tokens are hidden"""
        x = origin.x
        stream = np.random.default_rng((self.seed, point, origin.number))
        noise = torch.from_numpy(stream.standard_normal(tuple(x.shape[1:]), dtype=np.float32)).to(x)
        if origin.first is None:
            return noise
        place = torch.arange(x.shape[1], device=x.device) - origin.first.to(x.device).unsqueeze(1)
        return noise[place % x.shape[1]]

    def combine(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The mean itself, or times the input."""
        return x * gradient if self.times_input else gradient
