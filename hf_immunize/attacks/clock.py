"""A budget in seconds: training that ends, with its learning rate at zero, when the steps or the time are used up."""

from __future__ import annotations

import math
import time


class Clock:
    """How much of its budget a training has used: of its steps or of its time, whichever is further.

    A schedule that follows `progress` reaches its end under either limit, so that an attack that runs out of time is
    a whole attack of fewer steps and not the beginning of a longer one.

    Args:
        steps: Steps at most.
        seconds: Wall-clock time at most, measuring accuracy included; None: only the steps count, and results do not
            depend on the machine.

    Example:
        >>> clock = Clock(10)
        >>> clock.progress(5), clock.over(9), clock.over(10)
        (0.5, False, True)
        >>> Clock(10, seconds=0.0).over(1)
        True
    """

    def __init__(self, steps: int, seconds: float | None = None) -> None:
        self.steps, self.seconds = steps, seconds
        self._begin = time.perf_counter()

    @property
    def timed(self) -> bool:
        """Whether time may end it before its last step."""
        return self.seconds is not None

    def progress(self, done: int) -> float:
        """Part of the budget that is used, between 0 and 1.

        Args:
            done: Steps taken.

        Returns:
            The larger of the parts of steps and of time.
        """
        used = done / self.steps
        if self.seconds is not None:
            spent = time.perf_counter() - self._begin
            used = max(used, spent / self.seconds if self.seconds > 0 else 1.0)
        return min(1.0, used)

    def over(self, done: int) -> bool:
        """Whether no step is left after these; the first step is always taken."""
        return done >= 1 and self.progress(done) >= 1.0


def half_cosine(progress: float) -> float:
    """The cosine schedule: 1 at the start, 0 at the end.

    Example:
        >>> half_cosine(0.0), round(half_cosine(0.5), 3), half_cosine(1.0)
        (1.0, 0.5, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * progress))
