"""How two tasks lie to each other, and what Proposition 3.2 of the paper describes.

The proposition gives the singular values of ``H = θᵀKθ``, ``θ = UΣVᵀ``, as ``σ_θ,i² u_iᵀKu_i``. Those are the
*diagonal* entries of ``VᵀHV``. They are the eigenvalues only where ``U`` diagonalizes ``K`` and are majorized by them
otherwise (Schur–Horn). What the paper draws from it, that the angles between the eigenspaces decide, stays true; the
exact statement for two tasks is :func:`hf_immunize.linear.optimum.rir_ceiling`.
"""

from typing import Any

import torch

from hf_immunize.errors import ShapeError
from hf_immunize.linear.checks import as_data, same_columns
from hf_immunize.linear.factor import Factor, row_factor
from hf_immunize.spectra.checks import binary_scale, check_count, check_result, times_power


def principal_angles(X_benign: Any, X_harmful: Any, leading: int = 10) -> torch.Tensor:
    """Angles between the leading eigenspaces of the two Gram matrices, in degrees, rising.

    All near 0: both tasks live on the same directions, and slowing one slows the other. Near 90: each has its own. The
    angles come from sines where they are small and cosines where they are large (Björck & Golub, 1973), so both ends
    keep their digits.

    Args:
        X_benign: ``(N_P, D)``.
        X_harmful: ``(N_H, D)``.
        leading: How many leading eigenvectors of each; cut to the smaller rank.

    Returns:
        ``(min(leading, ranks),)`` float64.

    Raises:
        ArgumentError: ``leading`` below 1.
        ShapeError: Different numbers of columns.

    Example:
        >>> principal_angles([[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]], leading=1)
        tensor([45.0000], dtype=torch.float64)
    """
    P, H = row_factor(X_benign, "X_benign"), row_factor(X_harmful, "X_harmful")
    return factor_angles(P, H, leading)


def factor_angles(P: Factor, H: Factor, leading: int = 10) -> torch.Tensor:
    """:func:`principal_angles` of factors computed before."""
    same_columns(P.V.T, H.V.T, ("X_benign", "X_harmful"))
    check_count(leading, "leading")
    count = min(leading, P.rank, H.rank)
    A, B = P.V[:, :count], H.V[:, :count]
    cosines = torch.linalg.svdvals(A.T @ B).clamp(max=1.0)
    sines = torch.linalg.svdvals(B - A @ (A.T @ B)).flip(0).clamp(max=1.0)
    return torch.rad2deg(torch.where(sines < 0.5, sines.asin(), cosines.acos()))


def proposition_diagonal(X: Any, theta: Any) -> torch.Tensor:
    """The diagonal of ``VᵀHV`` that Proposition 3.2 takes for the singular values of ``H``: ``σ_θ,i² u_iᵀKu_i``.

    Args:
        X: ``(N, D)`` data, ``K = XᵀX``.
        theta: ``(D, D)`` map with singular value decomposition ``UΣVᵀ``.

    Returns:
        ``(D,)``, falling. Majorized by the true eigenvalues, equal to them where ``U`` diagonalizes ``K``.

    Raises:
        ShapeError: ``θ`` has another number of rows than the data have columns.

    Example:
        >>> proposition_diagonal([[1.0, 1.0], [0.0, 1.0]], torch.eye(2))  # the eigenvalues are 2.618 and 0.382
        tensor([2., 1.], dtype=torch.float64)
    """
    data, matrix = as_data(X, "X"), as_data(theta, "theta")
    if matrix.shape[0] != data.shape[1]:
        raise ShapeError(f"Expected theta with {data.shape[1]} rows, one a column of X, found {matrix.shape[0]}.")
    U, sigma, _ = torch.linalg.svd(matrix.to(data.device), full_matrices=False)
    scale = binary_scale(data)
    # Each factor brings its own size; the square of their product may be at hand where that of one is not.
    values = times_power((data / scale @ U).square().sum(0) * (sigma / sigma[0]).square(), scale * float(sigma[0]), 2)
    return check_result(values, "the diagonal").sort(descending=True).values
