"""The 95 % interval of a difference of accuracies on the same images, for summaries, records and audits."""

import math
from statistics import NormalDist


Interval = tuple[float, float]
# Two-sided level of every interval.
LEVEL = 0.95
# Two-sided quantile of the standard normal distribution.
NORMAL = NormalDist().inv_cdf(0.5 + LEVEL / 2)


def paired_interval(gained: int, lost: int, size: int) -> Interval:
    """Bonett and Price's interval (2012) of a difference of accuracies: images that one side alone names rightly."""
    up, down = (gained + 1) / (size + 2), (lost + 1) / (size + 2)
    half = NORMAL * math.sqrt((up + down - (up - down) ** 2) / (size + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)
