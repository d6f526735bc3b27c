"""Linear probing by gradient descent with exact line search, the attacker of the paper's theory.

The paper measures how slowly a linear probe converges on immunized features (Zheng et al., ICML 2025, figure of
``‖w_t − w*‖² / ‖w_0 − w*‖²``). Gradient descent with exact line search on ``½‖Zw − y‖²`` contracts by a factor that
depends on ``κ(ZᵀZ)`` alone (Boyd & Vandenberghe, 2004, §9.3), so the curve is the condition number seen at work.

Everything is computed in float64, whatever the dtype of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hf_immunize.errors import ArgumentError, RankError, ShapeError
from hf_immunize.linear.inputs import as_data, as_targets, dtype_of_origin, keep_above_noise
from hf_immunize.spectra.checks import (
    as_labels,
    binary_scale,
    check_count,
    check_number,
    check_result,
    decomposing,
    times_power,
)


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


class LinearProbe(NamedTuple):
    """A linear classifier or regressor on features: ``Z @ weight + bias``.

    Attributes:
        weight: ``(D, C)``.
        bias: ``(C,)``, zero where the probe has no intercept.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def predict(self, Z: torch.Tensor) -> torch.Tensor:
        """Scores ``(N, C)`` of features ``(N, D)``."""
        return Z.to(self.weight) @ self.weight + self.bias


class _Spectrum(NamedTuple):
    """``Z = U diag(s) Vᵀ`` without its null part, and the targets in it: all a quadratic problem needs.

    Of features and targets divided by powers of two near their size, so that no square leaves the range.
    """

    s: torch.Tensor  # (r,)
    V: torch.Tensor  # (D, r)
    optimum: torch.Tensor  # (r, C), the minimum-norm solution in the basis V
    outside: float  # ‖Y − UUᵀY‖², the squared loss nothing removes
    weight_scale: float  # what weights are in units of
    target_scale: float  # what targets are in units of


def _spectrum(Z: Any, y: Any, intercept: bool, produced_dtype: torch.dtype | None) -> _Spectrum:
    matrix = as_data(Z)
    targets = as_targets(y, len(matrix)).to(matrix.device)
    if intercept:
        matrix = with_ones(matrix)
    with decomposing("features"):
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = keep_above_noise(s, matrix.shape, dtype_of_origin(Z, produced_dtype))
    if not keep.any():
        raise RankError("The features are all zero, so there is nothing to probe; check the layer they come from.")
    scale, target_scale = binary_scale(matrix), binary_scale(targets)
    targets = targets / target_scale
    U, s, V = U[:, keep], s[keep] / scale, Vh[keep].T
    inside = U.T @ targets
    # Targets orthogonal to the features are so up to the rounding of their own dtype; the rest is no signal.
    eps = min(torch.finfo(dtype_of_origin(y)).eps, torch.finfo(torch.float32).eps)
    if inside.norm() <= 4 * eps * len(matrix) ** 0.5 * targets.norm():
        inside = torch.zeros_like(inside)
    outside = float((targets - U @ inside).square().sum())
    return _Spectrum(s, V, inside / s[:, None], outside, target_scale / scale, target_scale)


def _check_steps(steps: int) -> None:
    check_count(steps, "steps")


def _errors(spectrum: _Spectrum, steps: int) -> Iterator[torch.Tensor]:
    """Yield ``w_t − w*`` in the basis ``V``, for t = 1..steps.

    Gradient descent commutes with rotations of ``w``. In the eigenbasis of ``ZᵀZ`` its step is elementwise, so a step
    costs O(rank · C) instead of O(N · D · C), and weights that start at zero never leave the row space of ``Z``.
    """
    squared = spectrum.s.square()[:, None]
    error = -spectrum.optimum
    for _ in range(steps):
        gradient = squared * error
        curvature = (squared * gradient.square()).sum()
        if curvature > 0:
            error = error - gradient.square().sum() / curvature * gradient
        yield error


def probe_convergence(
    Z: Any, y: Any, steps: int, *, intercept: bool = False, produced_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """How far a linear probe still is from its optimum after each step: ``‖w_t − w*‖² / ‖w_0 − w*‖²``.

    Squared loss, gradient descent with exact line search from ``w_0 = 0``. Where the features are rank-deficient,
    ``w*`` is the minimum-norm least-squares solution, the only one this iteration can reach. Several columns of ``y``
    are one problem with one step size, by the Frobenius inner product. ``w_0`` already optimal (``y`` orthogonal to
    the features, up to rounding in its dtype) gives zeros.

    Args:
        Z: Features, ``(N, D)``.
        y: Targets, ``(N,)`` or ``(N, C)``; one-hot rows for classes.
        steps: Number of steps.
        intercept: Add a column of ones to the features; its weight is part of ``w``.
        produced_dtype: The dtype the features were computed in, where it is not the one they carry: it decides which
            small singular values count as rounding noise.

    Returns:
        ``(steps,)`` float64, for t = 1..steps.

    Raises:
        ShapeError: Shapes do not fit, or there are fewer than two rows.
        NonFiniteError: A feature or target is NaN or infinite.
        RankError: All features are zero.
        ArgumentError: ``steps`` is not a positive whole number.

    Example:
        >>> Z = torch.diag(torch.tensor([1.0, 3.0]))
        >>> probe_convergence(Z, torch.tensor([1.0, 3.0]), steps=2)
        tensor([0.3940, 0.0062], dtype=torch.float64)
    """
    _check_steps(steps)
    spectrum = _spectrum(Z, y, intercept, produced_dtype)
    start = spectrum.optimum.square().sum()
    if start == 0:
        return torch.zeros(steps, dtype=torch.float64, device=start.device)
    return torch.stack([error.square().sum() for error in _errors(spectrum, steps)]) / start


def probe_path(
    Z: Any,
    y: Any,
    steps: int,
    *,
    loss: str = "squared",
    intercept: bool = False,
    produced_dtype: torch.dtype | None = None,
) -> Iterator[LinearProbe]:
    """Yield the probe after each step of gradient descent with exact line search, from zero weights.

    Args:
        Z: Features, ``(N, D)``.
        y: Targets, ``(N,)`` or ``(N, C)``, for the squared loss; class numbers ``(N,)`` for the logistic loss.
        steps: Number of steps.
        loss: ``"squared"`` or ``"logistic"`` (softmax cross-entropy).
        intercept: Add a column of ones to the features.
        produced_dtype: As in :func:`probe_convergence`.

    Yields:
        The probe after t = 1..steps.

    Raises:
        ArgumentError: An unknown loss.
        ShapeError: As in :func:`probe_convergence`.

    Example:
        >>> Z, y = torch.eye(2), torch.tensor([0, 1])
        >>> [probe.predict(Z).argmax(1).tolist() for probe in probe_path(Z, y, 1, loss="logistic")]
        [[0, 1]]
    """
    _check_steps(steps)
    if loss == "logistic":
        for weight, _ in logistic_path(Z, y, steps, intercept):
            yield _split(weight, intercept)
        return
    if loss != "squared":
        raise ArgumentError(f"loss must be 'squared' or 'logistic', found {loss!r}.")
    spectrum = _spectrum(Z, y, intercept, produced_dtype)
    for error in _errors(spectrum, steps):
        weight = spectrum.V @ (error + spectrum.optimum) * spectrum.weight_scale
        yield _split(check_result(weight, "the weights"), intercept)


def probe_loss_curve(
    Z: Any,
    y: Any,
    steps: int,
    *,
    loss: str = "squared",
    intercept: bool = False,
    produced_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The training loss of a linear probe, before the first step and after each.

    Squared: ``‖ZW − Y‖²_F / 2N``. Logistic: mean softmax cross-entropy. Both by gradient descent with exact line
    search from zero.

    Args:
        Z: Features, ``(N, D)``.
        y: As in :func:`probe_path`.
        steps: Number of steps.
        loss: ``"squared"`` or ``"logistic"``.
        intercept: Add a column of ones to the features.
        produced_dtype: As in :func:`probe_convergence`.

    Returns:
        ``(steps + 1,)`` float64, for t = 0..steps.

    Raises:
        ArgumentError: An unknown loss.
        ShapeError: As in :func:`probe_convergence`.

    Example:
        >>> probe_loss_curve(torch.eye(2), torch.tensor([1.0, 1.0]), steps=1)
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    _check_steps(steps)
    if loss == "logistic":
        matrix, labels, classes = class_numbers(Z, y)
        start = torch.log(torch.tensor(float(classes), dtype=torch.float64))
        values = [float(start), *(float(value) for _, value in logistic_path(matrix, labels, steps, intercept))]
        return torch.tensor(values, dtype=torch.float64)
    if loss != "squared":
        raise ArgumentError(f"loss must be 'squared' or 'logistic', found {loss!r}.")
    spectrum = _spectrum(Z, y, intercept, produced_dtype)
    squared = spectrum.s.square()[:, None]
    inside = [(squared * e.square()).sum() for e in (-spectrum.optimum, *_errors(spectrum, steps))]
    losses = (torch.stack(inside) + spectrum.outside) / (2 * len(torch.as_tensor(Z)))
    return check_result(times_power(losses, spectrum.target_scale, 2), "the loss")


def probe_accuracy(
    Z: Any, labels: Any, Z_test: Any, labels_test: Any, steps: int, *, loss: str = "squared", intercept: bool = True
) -> torch.Tensor:
    """Test accuracy of a linear probe after each step of gradient descent with exact line search.

    Args:
        Z: Training features, ``(N, D)``.
        labels: Their class numbers, ``(N,)``; the squared loss fits one-hot rows.
        Z_test: Test features, ``(M, D)``.
        labels_test: Their class numbers, ``(M,)``.
        steps: Number of steps.
        loss: ``"squared"`` or ``"logistic"``.
        intercept: Add a column of ones to the features.

    Returns:
        ``(steps,)`` float64, for t = 1..steps, between 0 and 1.

    Raises:
        ShapeError: Shapes do not fit, or labels are not whole numbers from 0.

    Example:
        >>> Z, labels = torch.tensor([[1.0, 0.1], [0.9, 0.0], [0.0, 1.0], [0.2, 0.8]]), torch.tensor([0, 0, 1, 1])
        >>> probe_accuracy(Z, labels, Z, labels, steps=2)
        tensor([1., 1.], dtype=torch.float64)
    """
    matrix, classes_of_rows, classes = class_numbers(Z, labels)
    test, test_labels, _ = class_numbers(Z_test, labels_test, "Z_test", at_least=1)
    if test.shape[1] != matrix.shape[1]:
        raise ShapeError(f"Z_test must have the {matrix.shape[1]} columns of Z, found {test.shape[1]}.")
    targets = classes_of_rows
    if loss == "squared":
        targets = torch.nn.functional.one_hot(classes_of_rows, classes).to(torch.float64)
    original = dtype_of_origin(Z)
    path = probe_path(matrix, targets, steps, loss=loss, intercept=intercept, produced_dtype=original)
    hits = [(probe.predict(test).argmax(dim=1) == test_labels).to(torch.float64).mean() for probe in path]
    return torch.stack(hits)


def least_squares_probe(Z: Any, y: Any, ridge: float = 0.0, *, intercept: bool = False) -> LinearProbe:
    """The probe in closed form: what an attacker has who does not descend.

    Minimizes ``‖ZW + b − Y‖² + ridge · ‖W‖²``; at ``ridge = 0`` the minimum-norm solution. The intercept carries no
    penalty.

    Args:
        Z: Features, ``(N, D)``.
        y: Targets, ``(N,)`` or ``(N, C)``.
        ridge: Strength, at least 0.
        intercept: Fit ``b``; otherwise it is zero.

    Raises:
        ArgumentError: A negative strength.
        ShapeError: As in :func:`probe_convergence`.

    Example:
        >>> least_squares_probe(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 5.0]), intercept=True)
        LinearProbe(weight=tensor([[2.0000]], dtype=torch.float64), bias=tensor([1.0000], dtype=torch.float64))
    """
    check_number(ridge, "ridge", 0)
    matrix = as_data(Z)
    targets = as_targets(y, len(matrix)).to(matrix.device)
    centre = matrix.mean(0) if intercept else torch.zeros_like(matrix[0])
    level = targets.mean(0) if intercept else torch.zeros_like(targets[0])
    with decomposing("features"):
        U, s, Vh = torch.linalg.svd(matrix - centre, full_matrices=False)
    keep = keep_above_noise(s, matrix.shape, dtype_of_origin(Z))
    U, s, Vh = U[:, keep], s[keep], Vh[keep]
    # s/(s² + ridge), without the square.
    weight = check_result(Vh.T @ ((1 / (s + ridge / s))[:, None] * (U.T @ (targets - level))), "the weights")
    return LinearProbe(weight, check_result(level - centre @ weight, "the bias"))


def _split(weight: torch.Tensor, intercept: bool) -> LinearProbe:
    return LinearProbe(weight[:-1], weight[-1]) if intercept else LinearProbe(weight, torch.zeros_like(weight[0]))
