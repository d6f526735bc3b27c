"""Linear probing by gradient descent with exact line search, the attacker of the paper's theory, and in closed form.

Gradient descent with exact line search on ``½‖Zw − y‖²`` contracts by a factor that depends on ``κ(ZᵀZ)`` alone (Boyd
& Vandenberghe, 2004, §9.3): its curve is the condition number seen at work. Everything is computed in float64.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import RankError, ShapeError
from hf_immunize.linear.inputs import as_data, as_targets, dtype_of_origin, keep_above_noise
from hf_immunize.spectra.checks import as_labels, binary_scale, check_count, check_number, check_result, decomposing


def descent_residuals(s: Tensor, weights: Tensor, steps: Sequence[int]) -> list[Tensor]:
    """The part of each direction's error that is left after given, ascending, steps with exact line search, ``(r,)``.

    In the eigenbasis of ``ZᵀZ`` one step multiplies the error of direction i by ``1 − α_t s_i²``, with
    ``α_t = Σ s_i⁴ p_i² w_i / Σ s_i⁶ p_i² w_i``, ``p`` the product so far and ``w_i`` the squared norm of the optimum's
    row i. So 100,000 steps cost as much as one on the features.
    """
    s, weights = s.cpu(), weights.cpu()
    # Scaled so that the sixth power of the largest is 1.
    q = (s / s.max()).square().numpy() if len(s) else s.numpy()
    scale = weights / weights.max() if weights.any() else weights
    w = scale.to(s.dtype).numpy() * q * q
    last, wanted = steps[-1] if steps else 0, set(steps)
    factors = enumerate(islice(line_search_factors(q, w), last), start=1)
    return [torch.from_numpy(p) for step, p in factors if step in wanted]


def line_search_factors(q: np.ndarray, w: np.ndarray) -> Iterator[np.ndarray]:
    """What is left of the error in each direction after one step, two, …: ``q = s²``, ``w = s⁴w_i``, up to factors."""
    p = np.ones_like(q)
    while True:
        gradient = w * p * p
        curvature = float(gradient @ q)
        if curvature > 0:
            p = p * (1 - q.dtype.type(float(gradient.sum()) / curvature) * q)
        yield p


class _Problem(NamedTuple):
    """``Z = U diag(s) Vᵀ`` without its null part, and the targets in it, both divided by powers of two."""

    s: Tensor  # (r,)
    V: Tensor  # (D, r)
    optimum: Tensor  # (r, C), the minimum-norm solution in the basis V

    def residuals(self, steps: int) -> Tensor:
        """`descent_residuals` after steps 1..steps, ``(steps, r)``."""
        found = descent_residuals(self.s, self.optimum.square().sum(1), range(1, steps + 1))
        return torch.stack(found).to(self.s.device)


def _problem(Z: Any, y: Any, intercept: bool, produced_dtype: torch.dtype | None = None) -> _Problem:
    matrix = as_data(Z)
    targets = as_targets(y, len(matrix)).to(matrix.device)
    if intercept:
        matrix = _with_ones(matrix)
    with decomposing("features"):
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = keep_above_noise(s, matrix.shape, dtype_of_origin(Z, produced_dtype))
    if not keep.any():
        raise RankError("Expected features to probe, found all zero. Check the layer they come from.")
    U, s, V = U[:, keep], s[keep] / binary_scale(matrix), Vh[keep].T
    targets = targets / binary_scale(targets)
    inside = U.T @ targets
    # Targets orthogonal to the features are so up to the rounding of their own dtype; the rest is no signal.
    eps = min(torch.finfo(dtype_of_origin(y)).eps, torch.finfo(torch.float32).eps)
    if inside.norm() <= 4 * eps * len(matrix) ** 0.5 * targets.norm():
        inside = torch.zeros_like(inside)
    return _Problem(s, V, inside / s[:, None])


def probe_convergence(
    Z: Any, y: Any, steps: int, *, intercept: bool = False, produced_dtype: torch.dtype | None = None
) -> Tensor:
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
        produced_dtype: The dtype the features were computed in, where it is not the one they carry.

    Returns:
        ``(steps,)`` float64, for t = 1..steps.

    Raises:
        ShapeError, NonFiniteError, RankError: Shapes do not fit, a number is not finite, or all features are zero.
        ArgumentError: ``steps`` is not a positive whole number.

    Example:
        >>> Z = torch.diag(torch.tensor([1.0, 3.0]))
        >>> probe_convergence(Z, torch.tensor([1.0, 3.0]), steps=2)
        tensor([0.3940, 0.0062], dtype=torch.float64)
    """
    check_count(steps, "steps")
    problem = _problem(Z, y, intercept, produced_dtype)
    weights = problem.optimum.square().sum(1)
    if not weights.any():
        return torch.zeros(steps, dtype=torch.float64, device=weights.device)
    return problem.residuals(steps).square() @ (weights / weights.sum())


def probe_accuracy(Z: Any, labels: Any, Z_test: Any, labels_test: Any, steps: int) -> Tensor:
    """Test accuracy of a linear probe with intercept after steps 1..steps, fitted to one-hot rows, ``(steps,)``."""
    check_count(steps, "steps")
    matrix, test = as_data(Z), as_data(Z_test, "Z_test")
    classes = as_labels(labels, len(matrix), "the labels of Z").to(matrix.device)
    wanted = as_labels(labels_test, len(test), "the labels of Z_test").to(matrix.device)
    if not classes.any():
        raise ShapeError("Expected at least two classes in the labels of Z, found only class 0. Pass both sides.")
    if test.shape[1] != matrix.shape[1]:
        raise ShapeError(f"Expected Z_test with the {matrix.shape[1]} columns of Z, found {test.shape[1]}.")
    problem = _problem(Z, torch.nn.functional.one_hot(classes).to(torch.float64), intercept=True)
    test = _with_ones(test).to(matrix.device)
    # The largest score does not depend on a factor on all of them.
    projected = test / binary_scale(test) @ problem.V
    fitted = ((1 - left)[:, None] * problem.optimum for left in problem.residuals(steps))
    return torch.stack([(projected @ part).argmax(1) == wanted for part in fitted]).to(torch.float64).mean(1)


class LinearProbe(NamedTuple):
    """A linear classifier or regressor on features."""

    weight: Tensor  # (D, C)
    bias: Tensor  # (C,), zero where the probe has no intercept

    def predict(self, Z: Tensor) -> Tensor:
        """Scores ``(N, C)`` of features ``(N, D)``."""
        return Z.to(self.weight) @ self.weight + self.bias


def least_squares_probe(Z: Any, y: Any, ridge: float = 0.0, *, intercept: bool = False) -> LinearProbe:
    """The minimizer of ``‖ZW + b − Y‖² + ridge · ‖W‖²``: what an attacker has who does not descend.

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


def _with_ones(Z: Tensor) -> Tensor:
    """``Z`` with a last column of ones, whose weight is the intercept."""
    return torch.cat([Z, torch.ones_like(Z[:, :1])], dim=1)
