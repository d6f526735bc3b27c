"""A data set reduced to what the linear setting depends on: its row space and its singular values."""

from typing import Any, NamedTuple

import torch

from hf_immunize.errors import RankError
from hf_immunize.linear.checks import as_data, dtype_of_origin, keep_above_noise
from hf_immunize.spectra.checks import binary_scale, decomposing


class Factor(NamedTuple):
    """``X = U diag(s) Vᵀ`` without ``U`` and without the directions at rounding level.

    ``K = XᵀX = V diag(s²) Vᵀ``, so every Hessian ``θᵀKθ`` of the linear setting is that of :attr:`rows`. They have
    full row rank: no null direction of the data can come back as rounding noise through a large ``θ``.

    Attributes:
        s: ``(r,)`` singular values, falling.
        V: ``(D, r)`` orthonormal basis of the row space.
        num_samples: ``N`` of the data.
        eps: Machine epsilon of the dtype that produced the data.
    """

    s: torch.Tensor
    V: torch.Tensor
    num_samples: int
    eps: float

    @property
    def rank(self) -> int:
        """Rank of the data."""
        return len(self.s)

    @property
    def dim(self) -> int:
        """``D``, the number of columns."""
        return self.V.shape[0]

    def unit(self) -> tuple["Factor", float]:
        """The factor of the data divided by a power of two near their size, and that power."""
        scale = binary_scale(self.s)
        return self._replace(s=self.s / scale), scale

    @property
    def rows(self) -> torch.Tensor:
        """``diag(s) Vᵀ``, ``(r, D)``: the data up to a rotation of its samples."""
        return self.s[:, None] * self.V.T

    @property
    def kappa(self) -> float:
        """``κ(K)``, over the non-zero spectrum (Eq. 1 of Zheng et al., 2025)."""
        return float(self.s[0] / self.s[-1]) ** 2


def row_factor(X: Any, name: str = "X", *, produced_dtype: torch.dtype | None = None) -> Factor:
    """Reduce data ``(N, D)`` to its factor.

    Args:
        X: ``(N, D)`` data or features.
        name: What the caller calls them.
        produced_dtype: The dtype they were computed in, where it is not the one they carry.

    Raises:
        ShapeError: Not a matrix of at least two rows.
        NonFiniteError: A cell is NaN or infinite.
        RankError: All cells are zero.

    Example:
        >>> factor = row_factor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
        >>> factor.rank, factor.dim, factor.s
        (1, 3, tensor([5.], dtype=torch.float64))
    """
    matrix = as_data(X, name)
    origin = dtype_of_origin(X, produced_dtype)
    with decomposing(name):
        s, Vh = _right_decomposition(matrix)
    keep = keep_above_noise(s, matrix.shape, origin)
    if not keep.any():
        raise RankError(f"{name} is zero in every cell, so it has no spectrum; check how it was loaded.")
    return Factor(s[keep], Vh[keep].T, matrix.shape[0], torch.finfo(origin).eps)


def _right_decomposition(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A tall matrix loses nothing by a QR first, and the decomposition that follows no longer sees N.
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    _, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return s, Vh


def null_basis(V: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of the directions that the columns of ``V`` miss.

    Args:
        V: ``(D, r)`` orthonormal.

    Returns:
        ``(D, D − r)``.
    """
    if V.shape[1] == 0:
        return torch.eye(V.shape[0], dtype=V.dtype, device=V.device)
    return torch.linalg.qr(V, mode="complete").Q[:, V.shape[1] :]
