"""Measures of what immunization changed, from accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hf_immunize.attacks.outcomes import Utility
from hf_immunize.errors import ShapeError


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


def paired_utility(immunized: Tensor, reference: Tensor | None = None) -> Utility:
    """Accuracy of two classifiers on the same images, with the 95 % interval of their difference.

    The normal interval of the mean of the differences image by image, each −1, 0 or 1; where no image differs, the
    rule of three bounds how often one might.

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
    differences = immunized.double() - reference.double()
    mean = float(differences.mean())
    half = 1.96 * float(differences.std(unbiased=size > 1)) / math.sqrt(size)
    if not bool(differences.any()):
        half = min(1.0, 3 / size)
    return Utility(size, ours, theirs, mean, (max(-1.0, mean - half), min(1.0, mean + half)))
