"""Intervals of means over seeds, and of accuracies and their differences over test images.

Over seeds: Student's t. An accuracy over test images: Wilson's score interval. A difference of two accuracies over
test images: Bonett and Price's interval where the answers are known image by image, otherwise Newcombe's for
independent draws, which is wider and so on the safe side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import ndtri, stdtrit

from hf_immunize.audit.thresholds import LEVEL, MIN_SEEDS


# Two-sided quantile of the standard normal distribution.
NORMAL = float(ndtri(0.5 + LEVEL / 2))
# Values this close, relative to the largest, are the same.
_ROUNDING = 1e-12


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and Student's t interval at `LEVEL`.

    Args:
        values: One a seed; at least one.

    Returns:
        The mean, and the interval or None with fewer than `MIN_SEEDS` values, or where all agree: what does not depend
        on the seed has no interval over seeds.

    Example:
        >>> mean, (low, high) = mean_interval([0.1, 0.2, 0.3])
        >>> round(mean, 3), round(low, 3), round(high, 3)
        (0.2, -0.048, 0.448)
    """
    mean = statistics.fmean(values)
    if len(values) < MIN_SEEDS or max(values) - min(values) <= _ROUNDING * max(map(abs, values)):
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


def newcombe_interval(first: float, first_size: int, second: float, second_size: int) -> tuple[float, float]:
    """Newcombe's interval of first − second at `LEVEL`, as if both were measured on images of their own.

    Newcombe. Interval estimation for the difference between independent proportions. Statistics in Medicine, 1998.

    Args:
        first: An accuracy, between 0 and 1.
        first_size: Number of its test images.
        second: Another accuracy.
        second_size: Number of its test images.

    Returns:
        Its ends.

    Example:
        >>> low, high = newcombe_interval(56 / 70, 70, 48 / 80, 80)
        >>> round(low, 4), round(high, 4)
        (0.0524, 0.3339)
    """
    low, high = wilson_interval(first, first_size)
    other_low, other_high = wilson_interval(second, second_size)
    difference = first - second
    below, above = math.hypot(first - low, other_high - second), math.hypot(high - first, second - other_low)
    return difference - below, difference + above


def paired_interval(gained: int, lost: int, size: int) -> tuple[float, float]:
    """Bonett and Price's interval of the difference of two accuracies on the same images, at `LEVEL`.

    Bonett, Price. Adjusted Wald confidence interval for a difference of binomial proportions based on paired data.
    Journal of Educational and Behavioral Statistics, 2012. Only images on which the two differ count, as in McNemar's
    test.

    Args:
        gained: Images that the first alone names rightly.
        lost: Images that the second alone names rightly.
        size: Number of images.

    Returns:
        Its ends, between −1 and 1.

    Example:
        >>> low, high = paired_interval(0, 4, 100)
        >>> low < 0 < high  # four images might be chance
        True
    """
    up, down = (gained + 1) / (size + 2), (lost + 1) / (size + 2)
    half = NORMAL * math.sqrt((up + down - (up - down) ** 2) / (size + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def wider(interval: tuple[float, float], other: tuple[float, float] | None) -> tuple[float, float]:
    """The interval that holds both; the first where there is no other."""
    return interval if other is None else (min(interval[0], other[0]), max(interval[1], other[1]))


def accuracy_interval(accuracies: Sequence[float], size: int) -> tuple[float, tuple[float, float]]:
    """Mean over seeds of an accuracy, and the interval that holds that over seeds and that over test images.

    Args:
        accuracies: One a seed; at least one.
        size: Number of test images.

    Returns:
        The mean and the interval, between 0 and 1.

    Example:
        >>> accuracy_interval([0.5, 0.5, 0.5], 100)[1] == wilson_interval(0.5, 100)  # the seed decides nothing
        True
    """
    mean, seeds = mean_interval(accuracies)
    low, high = wider(wilson_interval(mean, size), seeds)
    return mean, (max(0.0, low), min(1.0, high))
