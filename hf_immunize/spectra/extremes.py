"""Spectrum and extreme eigenspaces of the small side, the one thing that the regularizers' gradients need."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.spectra.conditioning import rank_cutoff
from hf_immunize.spectra.krylov import Pair, largest_pair, smallest_pair, tie_tolerance
from hf_immunize.spectra.small_side import SmallSide, wide


# Up to these sizes a full decomposition is as fast as the iteration for the largest and for the smallest value, and
# finds repeated values for certain. The benchmark `growth` shows the crossover.
TOP_DENSE_LIMIT = 192
BOTTOM_DENSE_LIMIT = 352
COMPUTED_NOISE = torch.finfo(torch.float64).eps ** 0.5  # what a Gram matrix in float64 loses, in singular values


class Spectrum(NamedTuple):
    """Spectrum of the Hessian ``H = ZᵀZ`` on its small side, of size n.

    Attributes:
        values: The non-zero eigenvalues of H by the rank rule, descending; as many as the rank.
        vectors: Eigenvectors as columns, in the same order, shape ``(n, n)``; those beyond the rank span the
            null space.
    """

    values: list[float]
    vectors: Tensor


def hessian_spectrum(side: SmallSide) -> Spectrum:
    """All eigenpairs of the small side, with the rank by the rule of `rank_cutoff`.

    For float64 features the singular values of ``Z`` itself are taken; for coarser features, and where the Hessian
    alone is given, the float64 Gram matrix resolves what lies above their own rounding noise, at a fraction of the
    cost.

    Args:
        side: Finite and not zero.
    """
    if side.features is not None and side.dtype == torch.float64:
        u, sigma, vh = torch.linalg.svd(side.features, full_matrices=False)
        vectors, computed_noise = u if wide(side.features) else vh.mT, 0.0
        singular = sigma.tolist()
    else:
        values, vectors = torch.linalg.eigh(side.gram)
        vectors, computed_noise = vectors.flip(1), COMPUTED_NOISE
        # of a Hessian of few rows the eigenvalues beyond them are rounding
        singular = [math.sqrt(max(value, 0.0)) for value in reversed(values.tolist())][: side.rows]
    frobenius = math.sqrt(math.fsum(s * s for s in singular))
    cutoff = rank_cutoff(singular[0], frobenius, side.rows, side.dim, side.dtype)
    cutoff = max(cutoff, computed_noise * singular[0])
    return Spectrum([s * s for s in singular if s > cutoff], vectors)


def top_eigenspace(gram: Tensor, accuracy: float = 1e-8) -> tuple[float, Tensor]:
    """Largest eigenvalue of a positive semi-definite matrix and an orthonormal basis of its eigenspace.

    By `largest_pair`, and by the full decomposition of small matrices and of those where it proves nothing.

    Args:
        gram: Shape ``(n, n)``, float64.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.

    Returns:
        The eigenvalue and the basis, shape ``(n, m)``, m its multiplicity.
    """
    n = gram.shape[0]
    found = largest_pair(gram, accuracy) if n > TOP_DENSE_LIMIT else None
    if found is not None:
        return found.value, found.vector
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = eigenvalues.tolist()
    threshold = values[-1] - tie_tolerance(n, values[-1])
    return values[-1], vectors[:, sum(value < threshold for value in values) :]


def bottom_of_full_rank(side: SmallSide, accuracy: float, slack: float = 0.0) -> Pair | None:
    """The smallest eigenvalue of the small side and its vector, where the rank is full for certain.

    By `smallest_pair`, with an eigenvalue that lies above the rank rule's cut-off whatever the largest one is.

    Args:
        side: Finite and not zero.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.
        slack: See `smallest_pair`.

    Returns:
        The pair; None where the rank is not full, where the pair could not be proved, where a full decomposition is
        as fast, and for float64 features, which their Gram matrix does not resolve. `hessian_spectrum` then tells.
    """
    n = side.gram.shape[0]
    if n <= BOTTOM_DENSE_LIMIT or n > side.rows or side.dtype == torch.float64:
        return None
    found = smallest_pair(side.gram, accuracy, slack=slack)
    if found is None:
        return None
    frobenius = math.sqrt(float(side.gram.diagonal().sum()))
    largest = min(frobenius, math.sqrt(float(torch.linalg.vector_norm(side.gram))))  # σ_1 of Z at most
    cutoff = rank_cutoff(largest, frobenius, side.rows, side.dim, side.dtype)
    cutoff = max(cutoff, COMPUTED_NOISE * largest)
    return found if found.value - found.residual > cutoff**2 else None
