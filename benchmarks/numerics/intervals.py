"""Confidence intervals used by the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z_TWO_SIDED = 1.959963984540054  # of the normal distribution, 95 %


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval."""

    estimate: float
    low: float
    high: float


def wilson(hits: int, total: int) -> Interval:
    """Wilson's score interval of a proportion, 95 %, two-sided.

    Raises:
        ValueError: no trials, or more hits than trials.
    """
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"expected 0 <= hits <= total and total >= 1, got {hits} of {total}")
    share, z2 = hits / total, Z_TWO_SIDED**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_TWO_SIDED / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return Interval(share, centre - half, centre + half)


def mean(values: NDArray[np.float64]) -> Interval:
    """Mean with the interval of the t distribution.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"expected at least two values, got {len(values)}")
    from scipy.stats import t

    centre = float(values.mean())
    half = float(t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(centre, centre - half, centre + half)


def geometric_mean(ratios: NDArray[np.float64]) -> Interval:
    """Geometric mean of positive ratios: the t interval of their logarithms."""
    found = mean(np.log(ratios))
    return Interval(math.exp(found.estimate), math.exp(found.low), math.exp(found.high))


def clustered_geometric_mean(
    clusters: Sequence[NDArray[np.float64]], resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Geometric mean of ratios that come in clusters (one per model): bootstrap over whole clusters, percentiles.

    Raises:
        ValueError: fewer than two clusters.
    """
    if len(clusters) < 2:
        raise ValueError(f"expected at least two clusters, got {len(clusters)}")
    sums = np.array([np.log(c).sum() for c in clusters])
    sizes = np.array([len(c) for c in clusters], dtype=float)
    drawn = np.random.default_rng(seed).integers(len(clusters), size=(resamples, len(clusters)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.exp(sums.sum() / sizes.sum())), float(np.exp(low)), float(np.exp(high)))
