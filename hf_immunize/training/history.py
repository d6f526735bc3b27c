"""What the log history of a Trainer says about benign accuracy and RIR.

The history is saved with every checkpoint, so a decision that depends on it alone is the same in a resumed run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_immunize.errors import ArgumentError


History = Sequence[Mapping[str, Any]]


def by_step(history: History, metric: str) -> dict[int, float]:
    """Values of a metric, one a step; of several at one step (a resumed run may repeat one), the last.

    Args:
        history: ``trainer.state.log_history``.
        metric: A key of its entries.

    Returns:
        Step to value, in the order of the steps' first appearance.

    Example:
        >>> by_step([{"step": 0, "eval_accuracy": 0.9}, {"step": 5, "loss": 1.0}], "eval_accuracy")
        {0: 0.9}
    """
    return {entry["step"]: float(entry[metric]) for entry in history if metric in entry and "step" in entry}


def benign_drops(
    history: History, metric: str = "eval_accuracy", baseline: float | None = None, percent: bool = False
) -> dict[int, float]:
    """How many points benign accuracy lies below its starting value, at every evaluation.

    Args:
        history: ``trainer.state.log_history``.
        metric: The accuracy, as the history calls it.
        baseline: The starting value; by default the first one in the history.
        percent: Whether the accuracy is logged between 0 and 100, not between 0 and 1.

    Returns:
        Step to points (negative where it rose, infinite where it is NaN).

    Raises:
        ArgumentError: If a value lies outside of the range that `percent` says.

    Example:
        >>> history = [{"step": 0, "eval_accuracy": 0.75}, {"step": 5, "eval_accuracy": 0.625}]
        >>> benign_drops(history)
        {0: 0.0, 5: 12.5}
    """
    values = by_step(history, metric)
    top = 100.0 if percent else 1.0
    for value in values.values():
        if value < 0 or value > top:
            raise ArgumentError(
                f"Expected {metric} between 0 and {top:g}, found {value:g}. "
                + ("Leave percent= out if it is a fraction." if percent else "Pass percent=True if it is in percent.")
            )
    start = next(iter(values.values()), math.nan) if baseline is None else baseline
    # The last digits of a difference of fractions are rounding: 0.90 - 0.88 is no more than two points.
    drops = {step: round((start - value) * 100.0 / top, 9) for step, value in values.items()}
    return {step: math.inf if math.isnan(drop) else drop for step, drop in drops.items()}


def rir_successes(history: History, target: float, metric: str = "eval_log10_rir") -> dict[int, bool]:
    """Whether RIR is known to have reached a target, at every evaluation.

    A lower bound at or above the target counts. An upper bound does not, nor does an undetermined RIR: the true one
    may be below.

    Args:
        history: ``trainer.state.log_history``.
        target: The RIR to reach, dimensionless.
        metric: The decimal logarithm of RIR, as the history calls it; ``…rir_is_upper_bound`` beside it is heeded.

    Returns:
        Step to whether it is reached.

    Example:
        >>> rir_successes([{"step": 5, "eval_log10_rir": 3.1, "eval_rir_is_upper_bound": 0.0}], target=1000.0)
        {5: True}
    """
    bound = metric.removesuffix("log10_rir") + "rir_is_upper_bound"
    uppers = by_step(history, bound)
    found = by_step(history, metric)
    return {step: value >= math.log10(target) and not uppers.get(step) for step, value in found.items()}
