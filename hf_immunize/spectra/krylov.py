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


_BLOCK = 3
_TOP_DEPTHS = (4, 8, 12)  # depths at which convergence is looked at
_INVERSE_DEPTHS = (4, 7, 10, 14, 18, 24)


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
    for ritz in _ritz(lambda block: gram @ block, _start(gram), _TOP_DEPTHS):
        vector, residual = ritz.top_residual()
        gap = ritz.values[-1] - ritz.values[-2]
        if residual <= accuracy * gap:
            return Pair(ritz.values[-1], vector, residual)
    spread = max(gap, residual / 8)
    shift = ritz.values[-1] + max(residual**2 / spread, 64 * torch.finfo(torch.float64).eps * ritz.values[-1])
    shifted = -gram
    shifted.diagonal().add_(shift)
    found = smallest_pair(shifted, accuracy, start=ritz.vectors(_BLOCK))
    return None if found is None else found._replace(value=shift - found.value)


def smallest_pair(matrix: Tensor, accuracy: float, *, start: Tensor | None = None, slack: float = 0.0) -> Pair | None:
    """The smallest eigenvalue of a positive definite matrix and its vector, where it is simple and both can be proved.

    Args:
        matrix: A, shape ``(n, n)``, float64.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.
        start: Vectors that are near it, shape ``(n, 3)``; random ones by default.
        slack: A larger angle is allowed where the eigenvalue is small: ``accuracy·slack/value``, at most 1e-5, for
            callers that weight the vector by its eigenvalue.

    Returns:
        The pair; None where it could not be proved, and where the matrix is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return None
    largest = float(torch.linalg.vector_norm(matrix))  # or more
    start = _start(matrix) if start is None else start
    for ritz in _ritz(lambda block: torch.cholesky_solve(block, factor), start, _INVERSE_DEPTHS):
        if ritz.values[-2] <= 0:
            return None
        vector = ritz.vectors(1)
        vector = vector / torch.linalg.vector_norm(vector)
        image = matrix @ vector
        value = float(vector.mT @ image)
        residual = float(torch.linalg.vector_norm(image - value * vector))
        gap = 1 / ritz.values[-2] - value
        allowed = max(accuracy, min(1e-5, accuracy * slack / value)) if value > 0 else accuracy
        if residual <= allowed * gap and gap > 4 * tie_tolerance(matrix.shape[0], largest):
            return Pair(value, vector, residual)
    return None


class _Ritz(NamedTuple):
    """Eigenvalues of an operator on a subspace, ascending, and the subspace."""

    values: list[float]
    coordinates: Tensor
    basis: Tensor
    image: Tensor

    def vectors(self, count: int) -> Tensor:
        """Of the largest values."""
        return self.basis @ self.coordinates[:, -count:]

    def top_residual(self) -> tuple[Tensor, float]:
        """Vector of the largest value, of unit length, and the norm of its residual."""
        vector = self.vectors(1)
        residual = self.image @ self.coordinates[:, -1:] - self.values[-1] * vector
        return vector / torch.linalg.vector_norm(vector), float(torch.linalg.vector_norm(residual))


def _ritz(times: Callable[[Tensor], Tensor], start: Tensor, depths: tuple[int, ...]) -> Iterator[_Ritz]:
    basis = torch.linalg.qr(start).Q
    image = times(basis)
    block = start.shape[1]
    for depth in range(2, depths[-1] + 1):
        step = image[:, -block:]
        for _ in range(2):  # twice is enough to stay orthogonal in floating point
            step = step - basis @ (basis.mT @ step)
        basis = torch.cat([basis, torch.linalg.qr(step).Q], dim=1)
        image = torch.cat([image, times(basis[:, -block:])], dim=1)
        if depth in depths:
            values, coordinates = torch.linalg.eigh(basis.mT @ image)
            yield _Ritz(values.tolist(), coordinates, basis, image)


def _start(matrix: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[0], _BLOCK, dtype=torch.float64, generator=generator).to(matrix.device)
