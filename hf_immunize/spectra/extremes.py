"""Extreme eigenpairs of Gram matrices, the one thing that the regularizers' gradients need."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.spectra.conditioning import rank_cutoff
from hf_immunize.spectra.small_side import SmallSide, wide


# Up to this size a full decomposition is as fast as an iteration and finds repeated values for certain.
_DENSE_LIMIT = 320
_KRYLOV_BLOCK = 3
_KRYLOV_CHECKS = (4, 8, 16, 28)  # depths at which convergence is looked at; after the last the full decomposition


class Spectrum(NamedTuple):
    """Spectrum of the Hessian ``H = ZᵀZ`` on its small side, of size n.

    Attributes:
        values: The non-zero eigenvalues of H by the rank rule, descending; as many as the rank.
        vectors: Eigenvectors as columns, in the same order, shape ``(n, n)``; those beyond the rank span the
            null space.
    """

    values: list[float]
    vectors: Tensor


def tie_tolerance(size: int, largest: float) -> float:
    """Distance below which two eigenvalues computed in float64 count as one repeated value."""
    return 16 * size * torch.finfo(torch.float64).eps * largest


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
        vectors, computed_noise = vectors.flip(1), torch.finfo(torch.float64).eps ** 0.5
        # of a Hessian of few rows the eigenvalues beyond them are rounding
        singular = [math.sqrt(max(value, 0.0)) for value in reversed(values.tolist())][: side.rows]
    frobenius = math.sqrt(math.fsum(s * s for s in singular))
    cutoff = rank_cutoff(singular[0], frobenius, side.rows, side.dim, side.dtype)
    cutoff = max(cutoff, computed_noise * singular[0])
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
