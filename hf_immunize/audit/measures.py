"""Measures of what immunization changed, from accuracies of both models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_immunize.audit.intervals import mean_interval, paired_interval
from hf_immunize.audit.outcomes import AuditData, Outcome, Utility
from hf_immunize.errors import ShapeError


@dataclass(frozen=True)
class Deviation:
    """Relative fine-tuning deviation of one attack over its seeds, in per cent.

    Attributes:
        attacker, layer, precision: As in `Outcome`.
        absolute, signed: Means over seeds of `relative_deviation`, each seed against the reference's same seed.
        absolute_interval, signed_interval: Student's t intervals; None with fewer than `MIN_SEEDS`.
        seeds: Number of seeds.
    """

    attacker: str
    layer: str
    precision: str
    absolute: float
    absolute_interval: tuple[float, float] | None
    signed: float
    signed_interval: tuple[float, float] | None
    seeds: int


def relative_deviation(reference: Sequence[float], immunized: Sequence[float]) -> tuple[float, float]:
    """Relative fine-tuning deviation in per cent, absolute and signed.

    ``100 · mean_t |a_t − b_t| / a_t`` over the points of the curves, ``a`` of the reference and ``b`` of the immunized
    model (Sarker et al. 2025); the signed form leaves out the bars, so that it is negative where the immunized model
    learned better. Points at which the reference reads nothing are left out.

    Args:
        reference: Accuracies of the reference at the same steps.
        immunized: Accuracies of the immunized model.

    Returns:
        Absolute and signed; not a number where the reference never reads anything.

    Raises:
        ShapeError: If the curves differ in length.

    Example:
        >>> relative_deviation([0.5, 0.5], [0.25, 0.75])
        (50.0, 0.0)
    """
    if len(reference) != len(immunized):
        raise ShapeError(
            f"Expected curves measured at the same steps, found {len(reference)} and {len(immunized)} points."
        )
    parts = [(a - b) / a for a, b in zip(reference, immunized, strict=True) if a > 0]
    if not parts:
        return math.nan, math.nan
    return 100 * math.fsum(map(abs, parts)) / len(parts), 100 * math.fsum(parts) / len(parts)


def deviations(data: AuditData, task: str = "harmful") -> list[Deviation]:
    """Relative deviation of every fine-tuning attack that was run on both models.

    Points are the steps, 0 left out, after which both curves of a seed were measured.

    Args:
        data: What the audit found.
        task: As in `Outcome`.

    Returns:
        In the order of the audit; none for an attack without a seed that is done on both models.
    """
    runs: dict[tuple[str, str, str], dict[tuple[str, int], Outcome]] = {}
    for one in data.outcomes:
        if (one.access, one.task, one.status) == ("fine_tuning", task, "done") and one.curve:
            runs.setdefault((one.attacker, one.layer, one.precision), {})[one.subject, one.seed] = one
    found = []
    for (attacker, layer, precision), by in runs.items():
        pairs = []
        for (subject, seed), reference in by.items():
            if subject != "reference" or ("immunized", seed) not in by:
                continue
            ours = dict(zip(by["immunized", seed].steps, by["immunized", seed].curve, strict=True))
            theirs = dict(zip(reference.steps, reference.curve, strict=True))
            shared = [step for step in theirs if step > 0 and step in ours]
            pair = relative_deviation([theirs[step] for step in shared], [ours[step] for step in shared])
            if not math.isnan(pair[0]):
                pairs.append(pair)
        if pairs:
            absolute, interval = mean_interval([pair[0] for pair in pairs])
            signed, signed_interval = mean_interval([pair[1] for pair in pairs])
            interval = interval and (max(0.0, interval[0]), interval[1])
            found.append(
                Deviation(attacker, layer, precision, absolute, interval, signed, signed_interval, len(pairs))
            )
    return found


def paired_utility(immunized: Tensor, reference: Tensor | None = None) -> Utility:
    """Accuracy of two classifiers on the same images, with the 95 % interval of their difference.

    The interval is paired by image; see `paired_interval`.

    Args:
        immunized: Whether the immunized model named each image rightly, ``(N,)``.
        reference: The same of the reference, or None.

    Returns:
        `Utility`.

    Example:
        >>> import torch
        >>> paired_utility(torch.tensor([True, False]), torch.tensor([True, True])).difference
        -0.5
    """
    size = len(immunized)
    ours = float(immunized.double().mean())
    if reference is None:
        return Utility(size, ours)
    theirs = float(reference.double().mean())
    ours_right, theirs_right = immunized.bool(), reference.bool()
    gained, lost = (int(one.sum()) for one in (ours_right & ~theirs_right, theirs_right & ~ours_right))
    return Utility(size, ours, theirs, (gained - lost) / size, paired_interval(gained, lost, size))
