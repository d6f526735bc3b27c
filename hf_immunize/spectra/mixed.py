"""Extreme eigenpairs of a Gram matrix from its float32 rounding, refined in float64 by products with the features.

For float32 features ``ZᵀZ`` formed in float32 is off by their own rounding: enough for all of the
regularizers' gradients but the extreme pair, and for a first estimate of this. The estimate is corrected as Davidson
(1975) does: the residual, by products with Z in float64, is divided by ``G − θI`` as far as float32 knows it, and a
Rayleigh–Ritz step in float64 takes the best of the space so far. Accepted is only what residual and gap prove, as in
`krylov`; where nothing is, the Gram matrix in float64 takes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_immunize.spectra.gram import CHUNK, gram_matrix
from hf_immunize.spectra.krylov import (
    BOTTOM_BLOCK,
    Pair,
    Ritz,
    bottom_angle,
    cholesky,
    lack_of,
    ritz_values,
    shifted,
    solve_by,
    start_rows,
)
from hf_immunize.spectra.small_side import wide


# Up to this size of the Gram matrix float64 throughout is as fast.
SINGLE_LIMIT = 320
# Depths of the Krylov spaces in float32.
_TOP_DEPTHS = (5, 7)
_BOTTOM_DEPTHS = (5, 7)
_NEAR = 1e-5  # residual to gap of an estimate that float32 hardly betters
_WIDE_GAP = 0.1  # of the largest eigenvalue; below it polynomials of a higher degree and a factor of θI − G pay
_DEGREE = 15  # of those polynomials
_STEPS = 10
_MOST_ROWS = 2**14  # whose products are added in float32
_KEPT_CAST = 2**20  # entries of features up to which they are kept in float64 between products
# The trace times the inverse's largest eigenvalue up to which float32 holds the inverse to a hundredth.
_MOST_KAPPA = 1e5
# The probe of the conditioning: some columns, and how much of their mean square the others must leave unexplained.
_PROBE, _UNEXPLAINED = 96, 0.25


def estimable(features: Tensor, *, inverse: bool) -> bool:
    """Whether an estimate in float32 is worth a trial: features of that dtype, of moderate length, with a large side.

    Args:
        features: Z, shape ``(N, D)``.
        inverse: Whether the inverse of the Gram matrix is wanted. A look at some columns then tells whether float32
            may hold it. It is a guess that decides about time alone: what it lets through is proved or refused later.
    """
    if features.dtype != torch.float32 or min(features.shape) <= SINGLE_LIMIT or max(features.shape) > _MOST_ROWS:
        return False
    if not inverse:
        return True
    tall = features.mT if wide(features) else features
    corner = gram_matrix(tall[:, :_PROBE], torch.float32)
    mean = float(corner.diagonal().mean())
    factor = cholesky(corner) if 0 < mean < math.inf else None
    return factor is not None and float(factor.diagonal().min()) ** 2 > _UNEXPLAINED * mean


def largest_pair_by_features(single: Tensor, tall: Tensor, accuracy: float) -> Pair | None:
    """The largest eigenvalue of ``AᵀA`` and its vector, where it is simple and both can be proved.

    Args:
        single: ``AᵀA`` in float32, shape ``(n, n)``.
        tall: A, shape ``(m, n)``, float32.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.
    """
    for ritz in ritz_values(lambda rows: rows @ single, start_rows(single), _TOP_DEPTHS):
        top, gap = ritz.values[-1], ritz.values[-1] - ritz.values[-2]
        if ritz.residual <= _NEAR * gap or gap <= _WIDE_GAP * top:
            break
    if ritz.residual > _NEAR * gap and top > 0:
        ritz = _chebyshev(single, ritz.vectors(3), top)
        top, gap = ritz.values[-1], ritz.values[-1] - ritz.values[-2]
    if gap > _WIDE_GAP * top:
        near: Callable[[Tensor], Tensor] | None = _by_ritz(ritz)
    else:
        near = _by_cholesky(single, -1.0, -top, max(lack_of(ritz.residual, gap), 1e-4 * top))
    divide = near and _twice(near, single, -1.0, -top)
    found = divide and _refined(_gram_product(tall, -1.0), divide, ritz.vectors(2), lambda *_: accuracy)
    return found._replace(value=-found.value) if found else None


def smallest_pair_by_features(single: Tensor, tall: Tensor, accuracy: float, slack: float) -> Pair | None:
    """The smallest eigenvalue of ``AᵀA`` and its vector, where both can be proved and float32 resolves the inverse.

    Args:
        single: ``AᵀA`` in float32, shape ``(n, n)``.
        tall: A, shape ``(m, n)``, float32.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.
        slack: See `smallest_pair`.
    """
    factor = cholesky(single.clone())
    if factor is None:
        return None
    for ritz in ritz_values(solve_by(factor), start_rows(single, BOTTOM_BLOCK), _BOTTOM_DEPTHS):
        largest, gap = ritz.values[-1], ritz.values[-1] - ritz.values[-2]  # of the inverse
        if ritz.residual <= _NEAR * gap:
            break
    if not 0 < largest < _MOST_KAPPA / float(single.diagonal().sum()):
        return None
    lack = max(lack_of(ritz.residual, gap) / largest**2, 1e-3 / largest)
    near = _by_cholesky(single, 1.0, 1 / largest, lack)
    allowed = bottom_angle(single, accuracy, slack)
    divide = near and _twice(near, single, 1.0, 1 / largest)
    return divide and _refined(_gram_product(tall, 1.0), divide, ritz.vectors(2), allowed)


def _chebyshev(single: Tensor, start: Tensor, top: float) -> Ritz:
    """Rayleigh–Ritz on a Krylov space spanned by Chebyshev polynomials of G, for its largest eigenvalues.

    On ``[0, top]`` they stay bounded and independent, so that float32 needs to make them orthogonal but once.
    """
    (block, n), size = start.shape, _DEGREE + 1
    doubled = single * (4 / top)
    doubled.diagonal().sub_(2)
    spanning = single.new_empty(size, block, n)
    spanning[0] = start
    torch.mm(start, doubled, out=spanning[1]).div_(2)
    for i in range(2, size):
        torch.addmm(spanning[i - 2], spanning[i - 1], doubled, beta=-1, out=spanning[i])
    basis = torch.linalg.qr(spanning.view(-1, n).mT).Q.mT
    images = basis @ single
    values, coordinates = torch.linalg.eigh(images @ basis.mT)
    first = coordinates[:, -1]
    residual = float(torch.linalg.vector_norm(first @ images - values[-1] * (first @ basis)))
    return Ritz(values.tolist(), coordinates, basis, residual, True)


def _refined(
    times: Callable[[Tensor], Tensor],
    divide: Callable[[Tensor], Tensor],
    start: Tensor,
    allowed: Callable[[float, float], float],
) -> Pair | None:
    """Davidson's iteration for the two smallest pairs; the second bounds the gap."""
    basis = torch.linalg.qr(start.to(torch.float64).mT).Q.mT
    images = times(basis)
    for step in range(_STEPS):
        values, coordinates = torch.linalg.eigh(images @ basis.mT)
        vectors, residuals = (coordinates[:, :2].mT @ rows for rows in (basis, images))
        residuals = residuals - values[:2, None] * vectors
        first, second = torch.linalg.vector_norm(residuals, dim=1).tolist()
        # the second value lies no lower than its residual says
        value, gap = float(values[0]), float(values[1] - values[0]) - second
        if first <= allowed(value, gap) * gap:
            vector = vectors[:1].mT
            return Pair(value, vector / torch.linalg.vector_norm(vector), first)
        if step + 1 == _STEPS:
            break
        more = divide(residuals)
        for _ in range(2):
            more.addmm_(more @ basis.mT, basis, alpha=-1)
        more = torch.linalg.qr(more.mT).Q.mT
        basis, images = torch.cat([basis, more]), torch.cat([images, times(more)])
    return None


def _by_ritz(ritz: Ritz) -> Callable[[Tensor], Tensor]:
    """Rows divided by ``θI − G`` where G is known by its Ritz pairs, and as zero beside them; θ is the largest."""
    values, top = torch.tensor(ritz.values[:-1]), ritz.values[-1]
    known = ritz.coordinates[:, :-1].mT @ ritz.basis
    weights = 1 / (top - values).clamp(min=1e-3 * top) - 1 / top
    return lambda rows: (rows / top).addmm_((rows @ known.mT) * weights, known)


def _by_cholesky(single: Tensor, sign: float, value: float, lack: float) -> Callable[[Tensor], Tensor] | None:
    """Rows divided by ``A − θI``, ``A = ±G``, by a Cholesky factor in float32, θ a little below A's smallest value.

    Args:
        single: G.
        sign: Of A.
        value: An estimate of that eigenvalue.
        lack: How far below it the eigenvalue may lie.
    """
    for below in (lack, 4 * lack, 16 * lack):
        factor = cholesky(shifted(single, sign, value - below))
        if factor is not None:
            return solve_by(factor)
    return None


def _twice(near: Callable[[Tensor], Tensor], single: Tensor, sign: float, value: float) -> Callable[[Tensor], Tensor]:
    """Rows in float64 divided by ``A − θI``, ``A = ±G``, by a near division in float32 and again what it leaves.

    The second division costs less than the product with the features in float64 that it saves.
    """

    def divide(rows: Tensor) -> Tensor:
        scale = float(rows.abs().max()) or 1.0  # a small residual would leave the range of float32
        rows = (rows / scale).to(torch.float32)
        more = near(rows)
        left = torch.addmm(rows, more, single, alpha=-sign).add_(more, alpha=value)
        return more.add_(near(left)).to(torch.float64)

    return divide


def _gram_product(tall: Tensor, sign: float) -> Callable[[Tensor], Tensor]:
    """Rows times ``±AᵀA`` in float64, without forming it; A is cast by chunks of rows where it is large."""
    kept = tall.numel() <= _KEPT_CAST
    chunks = [tall.to(torch.float64)] if kept else tall.split(CHUNK)

    def times(rows: Tensor) -> Tensor:
        product = torch.zeros_like(rows)
        for chunk in chunks:
            chunk = chunk.to(torch.float64)
            product.addmm_(rows @ chunk.mT, chunk, alpha=sign)
        return product

    return times
