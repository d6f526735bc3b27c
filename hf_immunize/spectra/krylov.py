"""Extreme eigenpairs of a positive semi-definite matrix without its full decomposition.

Block Krylov iteration (Musco and Musco 2015) from a fixed start, so that no global random state is touched, on the
matrix itself for its largest eigenvalue, and on the inverse by a Cholesky factor for its smallest. A pair is believed
only where residual and gap prove the vector (Davis and Kahan 1970); elsewhere, with repeated and nearly repeated
values above all, nothing is returned, and the full decomposition takes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


# Two vectors at least, or a repeated value would pass for a simple one. Four solve by a triangle as fast as two.
_BLOCK = 3
BOTTOM_BLOCK = 4
# Depths at which convergence is looked at: on the matrix, on its inverse, and on the inverse with a shift.
_TOP_DEPTHS = (4, 5, 6, 8, 10)
_BOTTOM_DEPTHS = (8, 11, 13, 15, 16, 17, 19, 22, 25)
_SHIFTED_DEPTHS = (4, 6, 7, 8, 9, 10, 12)
_SHIFTS = 3
_PANEL = 192  # columns to a block of a Cholesky factor


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
    for ritz in ritz_values(lambda rows: rows @ gram, start_rows(gram), _TOP_DEPTHS):
        value, gap = ritz.values[-1], ritz.values[-1] - ritz.values[-2]
        if ritz.unlikely(accuracy):
            continue
        vector = ritz.vectors(1)
        residual = float(torch.linalg.vector_norm(vector @ gram - value * vector))
        if residual <= accuracy * gap and gap > 4 * tie_tolerance(gram.shape[0], value):
            return Pair(value, vector.mT, residual)
    lack = lack_of(residual, gap)
    found = _smallest(gram, -1.0, ritz.vectors(_BLOCK), _SHIFTED_DEPTHS, -value, lack, lambda *_: accuracy)
    return None if found is None else found._replace(value=-found.value)


def smallest_pair(matrix: Tensor, accuracy: float, slack: float = 0.0) -> Pair | None:
    """The smallest eigenvalue of a positive definite matrix and its vector, where it is simple and both can be proved.

    Args:
        matrix: A, shape ``(n, n)``, float64.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.
        slack: For callers that need the vector u in ``value·uuᵀZ`` alone, ``A = ZᵀZ``, beside a matrix of the norm
            ``slack·√tr(A)`` or more: where the eigenvalue is small, a larger angle is allowed, at most 1e-3, that
            changes their sum by `accuracy`.

    Returns:
        The pair; None where it could not be proved, and where the matrix is not positive definite.
    """
    allowed = bottom_angle(matrix, accuracy, slack)
    return _smallest(matrix, 1.0, start_rows(matrix, BOTTOM_BLOCK), _BOTTOM_DEPTHS, 0.0, 0.0, allowed)


def bottom_angle(matrix: Tensor, accuracy: float, slack: float) -> Callable[[float, float], float]:
    """Sine of the largest angle allowed at the smallest pair, by its value and gap; see `smallest_pair`."""
    beside = slack * math.sqrt(max(0.0, float(matrix.diagonal().sum())))

    def allowed(value: float, gap: float) -> float:
        if value <= 0 or gap <= 0:
            return accuracy
        # An error e of the norm δ changes value·uuᵀZ by value·(‖Ze‖ + δ√value), and ‖Ze‖ ≤ δ√gap + δ√value where
        # the residual is δ·gap at most.
        return max(accuracy, min(1e-3, accuracy * beside / (value * (math.sqrt(gap) + 2 * math.sqrt(value)))))

    return allowed


def _smallest(
    matrix: Tensor,
    sign: float,
    start: Tensor,
    depths: tuple[int, ...],
    value: float,
    lack: float,
    allowed: Callable[[float, float], float],
) -> Pair | None:
    """The smallest pair, by the inverse of ``A − shift·I`` with shifts that come ever nearer from below.

    Args:
        matrix: A or −A, symmetric.
        sign: 1 for A, −1 for −A.
        start: Rows to begin with.
        depths: Of the first space; those after a shift are shorter.
        value: First estimate of the eigenvalue.
        lack: How far below it the eigenvalue may lie.
        allowed: Sine of the largest angle allowed, by the eigenvalue and its gap.
    """
    rounding = tie_tolerance(matrix.shape[0], float(torch.linalg.vector_norm(matrix)))  # or more
    factor: Tensor | None = None
    for _ in range(1 + _SHIFTS):
        # Only where the shift lies below every eigenvalue there is a Cholesky factor: that proves that it does.
        for candidate in (value - lack, value - 4 * lack) if lack else (value,):
            better = cholesky(shifted(matrix, sign, candidate))
            if better is not None:
                shift, factor = candidate, better
                break
        if factor is None:
            return None
        solve = solve_by(factor)
        for ritz in ritz_values(solve, start, depths):
            if ritz.values[-2] <= 0:
                return None
            first, second = (shift + 1 / ritz.values[-i] for i in (1, 2))
            if ritz.unlikely(allowed(first, second - first)):
                continue
            # Once more through the inverse: that damps what of large eigenvalues the space has left in the vector.
            vector = solve(ritz.vectors(1))
            vector = vector / torch.linalg.vector_norm(vector)
            image = sign * (vector @ matrix)
            value = float(image @ vector.mT)
            residual = float(torch.linalg.vector_norm(image - value * vector))
            gap = shift + 1 / ritz.values[-2] - value
            if gap > 4 * rounding and residual <= allowed(value, gap) * gap:
                return Pair(value, vector.mT, residual)
        if gap <= 4 * rounding:
            return None
        start, depths, lack = ritz.vectors(_BLOCK), _SHIFTED_DEPTHS, max(lack_of(residual, gap), rounding)
    return None


def lack_of(residual: float, gap: float) -> float:
    """What a Rayleigh quotient is off by, about, where the gap to the next value is known about."""
    return residual * min(1.0, residual / gap) if gap > 0 else residual


def shifted(matrix: Tensor, sign: float, shift: float) -> Tensor:
    """``sign·A − shift·I``."""
    result = sign * matrix
    result.diagonal().sub_(shift)
    return result


def cholesky(matrix: Tensor) -> Tensor | None:
    """L of ``A = LLᵀ`` in the place of A's lower triangle, the upper one left as it is; None where there is none.

    By blocks: `torch.linalg.cholesky_ex` writes zeros into the other triangle against the order of its memory, which
    takes longer than the factor.
    """
    n = matrix.shape[0]
    for left in range(0, n, _PANEL):
        right = min(left + _PANEL, n)
        corner, info = torch.linalg.cholesky_ex(matrix[left:right, left:right])
        if int(info):
            return None
        matrix[left:right, left:right] = corner
        panel = matrix[right:, left:right]
        panel.copy_(torch.linalg.solve_triangular(corner.mT, panel, upper=True, left=False))
        for top in range(right, n, _PANEL):
            rows, columns = panel[top - right :], panel[top - right : top - right + _PANEL]
            matrix[top:, top : top + _PANEL].addmm_(rows, columns.mT, alpha=-1)
    return matrix


def solve_by(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows times the inverse of ``LLᵀ``, L the lower triangle."""

    def solve(rows: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT

    return solve


class Ritz(NamedTuple):
    """Eigenvalues of an operator on a subspace, ascending, and the orthonormal rows that span it."""

    values: list[float]
    coordinates: Tensor
    basis: Tensor
    residual: float  # of the largest, as the recurrence has it: good enough to see that there is no need to look
    last: bool

    def unlikely(self, accuracy: float) -> bool:
        """Whether the largest value's vector is not worth a proof yet."""
        return not self.last and self.residual > 2 * accuracy * (self.values[-1] - self.values[-2])

    def vectors(self, count: int) -> Tensor:
        """Of the largest values, as rows of unit length, shape ``(count, n)``."""
        rows = self.coordinates[:, -count:].mT @ self.basis
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def ritz_values(times: Callable[[Tensor], Tensor], start: Tensor, depths: tuple[int, ...]) -> Iterator[Ritz]:
    """Rayleigh–Ritz on the Krylov spaces of a symmetric operator, which takes rows and gives new ones."""
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
            step.addmm_(part, known, alpha=-1)
        if depth in depths:
            values, coordinates = torch.linalg.eigh(projected[:end, :end])
            residual = float(torch.linalg.vector_norm(coordinates[-block:, -1] @ step))
            yield Ritz(values.tolist(), coordinates, known, residual, depth == depths[-1])
        basis[end : end + block] = torch.linalg.qr(step.mT).Q.mT


def start_rows(matrix: Tensor, block: int = _BLOCK) -> Tensor:
    """Random rows for a matrix, of its dtype, the same every time."""
    # A start from the vectors of the batch before, another draw of one population, was between 7 % faster and 7 %
    # slower in the whole of R_well (D = 768, N = 256 and 1,024), and would have to be kept in checkpoints.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(block, matrix.shape[0], dtype=torch.float64, generator=generator).to(matrix)
