"""Softmax regression by gradient descent with exact line search, for :mod:`hf_immunize.linear.probe`."""

from collections.abc import Iterator
from typing import Any

import torch

from hf_immunize.errors import ShapeError
from hf_immunize.linear.checks import as_data
from hf_immunize.spectra.checks import as_labels, binary_scale, check_result


# Sizes of features for which the search for a step, which halves an interval of 1, has all digits.
_ORDINARY = (1e-30, 1e8)


def with_ones(Z: torch.Tensor) -> torch.Tensor:
    """``Z`` with a last column of ones, whose weight is the intercept."""
    return torch.cat([Z, torch.ones_like(Z[:, :1])], dim=1)


def class_numbers(Z: Any, labels: Any, name: str = "Z", at_least: int = 2) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Features in float64 and their class numbers, with how many classes there are.

    Args:
        Z: ``(N, D)``.
        labels: ``(N,)`` whole numbers from 0.
        name: What the caller calls the features.
        at_least: Fewest classes to accept.

    Raises:
        ShapeError: Labels are no class numbers, not one a row, or too few classes.
    """
    matrix = as_data(Z, name)
    numbers = as_labels(labels, len(matrix), f"the labels of {name}").to(matrix.device)
    classes = int(numbers.max()) + 1
    if classes < at_least:
        raise ShapeError(f"The labels of {name} must hold at least two classes, found only class 0.")
    return matrix, numbers, classes


def logistic_path(Z: Any, y: Any, steps: int, intercept: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield weights and mean cross-entropy for t = 1..steps."""
    matrix, labels, classes = class_numbers(Z, y)
    if intercept:
        matrix = with_ones(matrix)
    # Scores do not depend on the size of the features, and weights are one over it.
    scale = binary_scale(matrix)
    scale = 1.0 if _ORDINARY[0] < scale < _ORDINARY[1] else scale
    matrix = matrix / scale
    onehot = torch.nn.functional.one_hot(labels, classes).to(torch.float64)
    weight = matrix.new_zeros(matrix.shape[1], classes)
    scores = matrix @ weight
    for _ in range(steps):
        gradient = matrix.T @ (scores.softmax(dim=1) - onehot) / len(matrix)
        direction = -(matrix @ gradient)
        step = _exact_step(scores, direction, onehot)
        weight = weight - step * gradient
        scores = scores + step * direction
        yield check_result(weight / scale, "the weights"), -(onehot * scores.log_softmax(dim=1)).sum(dim=1).mean()


def _exact_step(scores: torch.Tensor, direction: torch.Tensor, onehot: torch.Tensor) -> float:
    """Minimize the cross-entropy of ``scores + a · direction`` over ``a ≥ 0``: bracket the sign change, then bisect.

    Where the direction separates the classes no minimizer exists; the slope then falls towards zero and the search
    stops at a millionth of its starting value.
    """

    def slope(a: float) -> float:
        return float((((scores + a * direction).softmax(dim=1) - onehot) * direction).sum())

    start = slope(0.0)
    if start >= 0:
        return 0.0
    low, high = 0.0, 1.0
    while (value := slope(high)) < 1e-6 * start:
        low, high = high, 2 * high
    if value <= 0:
        return high
    for _ in range(100):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high
