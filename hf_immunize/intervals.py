"""Intervals of 95 %, for summaries, records and audits: of accuracies on the same images; the words of a share."""

import math
from collections.abc import Sequence
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


def removal(removed: float, ends: Sequence[float | None] | None = None, of: str = "it", digits: int = 0) -> str:
    """What immunization does to an attacker's head start, by the share that it removes and the interval of that.

    >>> removal(0.98, (0.53, 1.99))
    'removed 98% of it (95% interval 53% to 199%)'
    >>> removal(-0.26, (-0.6, -0.1)), removal(-0.26, (-0.6, 0.1), of="that")
    ('helps the attacker: it grew by 26% (95% interval 10% to 60%)', \
'may help the attacker: that grew by 26% (95% interval −10% to 60%)')
    """
    low, high = ends or (None, None)
    shares = [round(removed if one is None else one, 2 + digits) + 0.0 for one in (removed, low, high)]  # never −0
    helps = shares[0] < 0
    value, *around = [f"{0.0 - one if helps else one:.{digits}%}".replace("-", "−") for one in shares]
    first, last = reversed(around) if helps else around
    interval = f" (95% interval {first} to {last})" if first != last else ""
    if not helps:
        return f"removed {value} of {of}{interval}"
    return f"{'helps' if shares[2] < 0 else 'may help'} the attacker: {of} grew by {value}{interval}"
