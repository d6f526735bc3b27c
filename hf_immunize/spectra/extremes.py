"""Extreme eigenpairs of Gram matrices, the one thing that the regularizers' gradients need.

For features ``Z`` of shape ``(N, D)`` the matrices ``ZᵀZ`` (D×D) and ``ZZᵀ`` (N×N) share their non-zero spectrum;
everything here works on the smaller of the two, the *small side*, in float64.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.errors import NonFiniteError, RankError
from hf_immunize.spectra.conditioning import as_matrix, rank_cutoff


# Up to this size a full decomposition is as fast as an iteration and finds repeated values for certain.
_DENSE_LIMIT = 320
_KRYLOV_BLOCK = 3
_KRYLOV_CHECKS = (4, 8, 16, 28)  # depths at which convergence is looked at; after the last the full decomposition


class Spectrum(NamedTuple):
    """Spectrum of the Hessian ``H = ZᵀZ`` on its small side, of size n = min(N, D).

    Attributes:
        values: The non-zero eigenvalues of H by the rank rule, descending; as many as the rank.
        vectors: Eigenvectors as columns, in the same order, shape ``(n, n)``; those beyond the rank span the
            null space.
    """

    values: list[float]
    vectors: Tensor


def wide(features: Tensor) -> bool:
    """Whether ``ZZᵀ`` (N×N) is the small side."""
    return features.shape[0] <= features.shape[1]


def small_gram(features: Tensor) -> Tensor:
    """``ZZᵀ`` or ``ZᵀZ``, whichever is smaller, in float64, shape ``(n, n)``.

    Raises:
        NonFiniteError: If the features hold NaN or infinity, or their squares overflow.
        RankError: If they are zero.
    """
    z = features.detach().to(torch.float64)
    gram = z @ z.mT if wide(features) else z.mT @ z
    # Every entry of Z stands in the trace, squared: one look at n numbers tells what a look at N·D would.
    trace = float(gram.diagonal().sum())
    if not math.isfinite(trace):
        as_matrix(features, "features")  # names the entry
        raise NonFiniteError(
            f"Expected features whose squares are finite in float64, found values up to "
            f"{float(features.detach().abs().max()):.3g}. Divide them by their scale first."
        )
    if trace == 0:
        raise RankError(
            f"Expected features of rank at least 1, found rank 0: all of {tuple(features.shape)} values are zero. "
            "Check that the network is not dead and the right layer is read."
        )
    return gram


def tie_tolerance(size: int, largest: float) -> float:
    """Distance below which two eigenvalues computed in float64 count as one repeated value."""
    return 16 * size * torch.finfo(torch.float64).eps * largest


def hessian_spectrum(features: Tensor, gram: Tensor) -> Spectrum:
    """All eigenpairs of the small side, with the rank by the rule of `rank_cutoff`.

    For float64 features the singular values of ``Z`` itself are taken; for coarser features the float64 Gram matrix
    resolves what lies above their own rounding noise, at a fraction of the cost.

    Args:
        features: ``Z``, shape ``(N, D)``, finite and not zero.
        gram: Its `small_gram`.
    """
    n, d = features.shape
    if features.dtype == torch.float64:
        u, sigma, vh = torch.linalg.svd(features.detach(), full_matrices=False)
        vectors, computed_noise = u if wide(features) else vh.mT, 0.0
        singular = sigma.tolist()
    else:
        values, vectors = torch.linalg.eigh(gram)
        vectors, computed_noise = vectors.flip(1), torch.finfo(torch.float64).eps ** 0.5
        singular = [math.sqrt(max(value, 0.0)) for value in reversed(values.tolist())]
    frobenius = math.sqrt(math.fsum(s * s for s in singular))
    cutoff = max(rank_cutoff(singular[0], frobenius, n, d, features.dtype), computed_noise * singular[0])
    return Spectrum([s * s for s in singular if s > cutoff], vectors)


def top_eigenspace(gram: Tensor, accuracy: float = 1e-8) -> tuple[float, Tensor]:
    """Largest eigenvalue of a positive semi-definite matrix and an orthonormal basis of its eigenspace.

    Block Krylov iteration (Musco and Musco 2015) from a fixed start, so that no global random state is touched. It is
    believed only where residual and gap prove the vector (Davis and Kahan 1970); elsewhere, with repeated and nearly
    repeated values above all, the full decomposition takes over.

    Args:
        gram: Shape ``(n, n)``, float64.
        accuracy: Sine of the largest angle allowed between the vector found and the true one.

    Returns:
        The eigenvalue and the basis, shape ``(n, m)``, m its multiplicity.
    """
    n = gram.shape[0]
    found = _krylov_top(gram, accuracy) if n > _DENSE_LIMIT else None
    if found is not None:
        return found
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = eigenvalues.tolist()
    threshold = values[-1] - tie_tolerance(n, values[-1])
    return values[-1], vectors[:, sum(value < threshold for value in values) :]


def _krylov_top(gram: Tensor, accuracy: float) -> tuple[float, Tensor] | None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[0], _KRYLOV_BLOCK, dtype=torch.float64, generator=generator).to(gram.device)
    basis = torch.linalg.qr(start).Q
    image = gram @ basis
    for depth in range(2, _KRYLOV_CHECKS[-1] + 1):
        step = image[:, -_KRYLOV_BLOCK:]
        for _ in range(2):  # twice is enough to stay orthogonal in floating point
            step = step - basis @ (basis.mT @ step)
        basis = torch.cat([basis, torch.linalg.qr(step).Q], dim=1)
        image = torch.cat([image, gram @ basis[:, -_KRYLOV_BLOCK:]], dim=1)
        if depth in _KRYLOV_CHECKS:
            values, coordinates = torch.linalg.eigh(basis.mT @ image)
            vector = basis @ coordinates[:, -1:]
            residual = torch.linalg.vector_norm(image @ coordinates[:, -1:] - values[-1] * vector)
            if bool(residual <= accuracy * (values[-1] - values[-2])):
                return float(values[-1]), vector / torch.linalg.vector_norm(vector)
    return None
