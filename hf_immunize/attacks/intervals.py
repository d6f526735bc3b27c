"""Intervals of means over seeds, and of accuracies over test images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import ndtri, stdtrit

from hf_immunize.attacks.thresholds import LEVEL, MIN_SEEDS


# Two-sided quantile of the standard normal distribution.
NORMAL = float(ndtri(0.5 + LEVEL / 2))


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and Student's t interval at `LEVEL`.

    Args:
        values: One a seed; at least one.

    Returns:
        The mean, and the interval or None with fewer than `MIN_SEEDS` values.

    Example:
        >>> mean, (low, high) = mean_interval([0.1, 0.2, 0.3])
        >>> round(mean, 3), round(low, 3), round(high, 3)
        (0.2, -0.048, 0.448)
    """
    mean = statistics.fmean(values)
    if len(values) < MIN_SEEDS:
        return mean, None
    half = float(stdtrit(len(values) - 1, 0.5 + LEVEL / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def wilson_interval(accuracy: float, size: int) -> tuple[float, float]:
    """Wilson's score interval of an accuracy at `LEVEL`, for what another draw of test images would give.

    Args:
        accuracy: Share of the images that are right, between 0 and 1.
        size: Number of images.

    Returns:
        Its ends, between 0 and 1; (0, 1) without images.

    Example:
        >>> low, high = wilson_interval(0.0, 100)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.037)
    """
    if size < 1:
        return 0.0, 1.0
    z2 = NORMAL**2
    centre = (accuracy + z2 / (2 * size)) / (1 + z2 / size)
    half = math.sqrt(z2) / (1 + z2 / size) * math.sqrt(accuracy * (1 - accuracy) / size + z2 / (4 * size**2))
    return max(0.0, centre - half), min(1.0, centre + half)
