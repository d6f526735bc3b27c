"""Extreme eigenpairs of a positive semi-definite matrix without its full decomposition.

Block Krylov iteration (Musco and Musco 2015) from a fixed start, so that no global random state is touched, on the
matrix itself for its largest eigenvalue, and on the inverse by a Cholesky factor for its smallest. A pair is believed
only where residual and gap prove the vector (Davis and Kahan 1970); elsewhere, with repeated and nearly repeated
values above all, nothing is returned, and the full decomposition takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


# Two vectors at least, or a repeated value would pass for a simple one.
_BLOCK = 3
# Depths at which convergence is looked at. Seen at N = 1,024, D = 768: 5 for the largest value of features around a
# mean; from the vectors of depth 8, where no gap was seen, 6; 23 for the smallest value.
_TOP_DEPTHS = (4, 5, 6, 8)
_SHIFTED_DEPTHS = (4, 6, 7, 8, 9, 11)
_BOTTOM_DEPTHS = (8, 14, 18, 21, 24, 28)


class Pair(NamedTuple):
    """A simple eigenvalue and its vector.

    Attributes:
        value: The eigenvalue.
        vector: Its unit vector, shape ``(n, 1)``.
        residual: ``‖Av − λv‖``: how far the value may be off.
    """

    value: float
    vector: Tensor
    residual: float


def tie_tolerance(size: int, largest: float) -> float:
    """Distance below which two eigenvalues computed in float64 count as one repeated value."""
    return 16 * size * torch.finfo(torch.float64).eps * largest


def largest_pair(gram: Tensor, accuracy: float) -> Pair | None:
    """The largest eigenvalue and its vector, where it is simple and both can be proved.

    Where the gap is too small for the iteration, it goes on with the inverse of ``θI − G``, θ a little above the
    largest eigenvalue, which a Cholesky factor proves that it is.

    Args:
        gram: G, shape ``(n, n)``, float64, positive semi-definite.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.
    """
    for ritz in _ritz(lambda rows: rows @ gram, _start(gram), _TOP_DEPTHS):
        value, vector = ritz.values[-1], ritz.vectors(1)
        residual = float(torch.linalg.vector_norm(vector @ gram - value * vector))
        gap = value - ritz.values[-2]
        if residual <= accuracy * gap and gap > 4 * tie_tolerance(gram.shape[0], value):
            return Pair(value, vector.mT, residual)
    # The Ritz value lacks about residual²/gap. A shift that lies below the eigenvalue has no Cholesky factor.
    lack = max(
        residual * min(1.0, residual / gap) if gap > 0 else residual, 64 * torch.finfo(torch.float64).eps * value
    )
    for shift in (value + lack, value + 4 * lack):
        shifted = -gram
        shifted.diagonal().add_(shift)
        factor = _factor(shifted)
        if factor is not None:
            found = _smallest(shifted, factor, ritz.vectors(_BLOCK), _SHIFTED_DEPTHS, lambda _: accuracy)
            return None if found is None else found._replace(value=shift - found.value)
    return None


def smallest_pair(matrix: Tensor, accuracy: float, slack: float = 0.0) -> Pair | None:
    """The smallest eigenvalue of a positive definite matrix and its vector, where it is simple and both can be proved.

    Args:
        matrix: A, shape ``(n, n)``, float64.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.
        slack: A larger angle is allowed where the eigenvalue is small: ``accuracy·slack/value``, at most 1e-5, for
            callers that weight the vector by its eigenvalue.

    Returns:
        The pair; None where it could not be proved, and where the matrix is not positive definite.
    """

    def allowed(value: float) -> float:
        return max(accuracy, min(1e-5, accuracy * slack / value)) if value > 0 else accuracy

    factor = _factor(matrix)
    return None if factor is None else _smallest(matrix, factor, _start(matrix), _BOTTOM_DEPTHS, allowed)


def _factor(matrix: Tensor) -> Tensor | None:
    """U of ``A = UᵀU``; None where A is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix, upper=True)
    return None if int(info) else factor


def _smallest(
    matrix: Tensor, factor: Tensor, start: Tensor, depths: tuple[int, ...], allowed: Callable[[float], float]
) -> Pair | None:
    largest = float(torch.linalg.vector_norm(matrix))  # or more

    def solve(rows: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor.mT, rows.mT, upper=False)
        return torch.linalg.solve_triangular(factor, half, upper=True).mT

    for ritz in _ritz(solve, start, depths):
        if ritz.values[-2] <= 0:
            return None
        vector = ritz.vectors(1)
        image = vector @ matrix
        value = float(image @ vector.mT)
        residual = float(torch.linalg.vector_norm(image - value * vector))
        gap = 1 / ritz.values[-2] - value
        if residual <= allowed(value) * gap and gap > 4 * tie_tolerance(matrix.shape[0], largest):
            return Pair(value, vector.mT, residual)
    return None


class _Ritz(NamedTuple):
    """Eigenvalues of an operator on a subspace, ascending, and the orthonormal rows that span it."""

    values: list[float]
    coordinates: Tensor
    basis: Tensor

    def vectors(self, count: int) -> Tensor:
        """Of the largest values, as rows of unit length, shape ``(count, n)``."""
        rows = self.coordinates[:, -count:].mT @ self.basis
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _ritz(times: Callable[[Tensor], Tensor], start: Tensor, depths: tuple[int, ...]) -> Iterator[_Ritz]:
    """Rayleigh–Ritz on the Krylov spaces of a symmetric operator, which takes and gives rows."""
    block, n = start.shape
    size = block * (depths[-1] + 1)
    basis = start.new_empty(size, n)
    projected = start.new_zeros(size, size)
    basis[:block] = torch.linalg.qr(start.mT).Q.mT
    for depth in range(1, depths[-1] + 1):
        end = block * depth
        known, step = basis[:end], times(basis[end - block : end])
        for _ in range(2):  # twice is enough to stay orthogonal in floating point
            part = step @ known.mT
            projected[end - block : end, :end] += part
            step = step - part @ known
        if depth in depths:
            values, coordinates = torch.linalg.eigh(projected[:end, :end])
            yield _Ritz(values.tolist(), coordinates, known)
        basis[end : end + block] = torch.linalg.qr(step.mT).Q.mT


def _start(matrix: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_BLOCK, matrix.shape[0], dtype=torch.float64, generator=generator).to(matrix.device)
