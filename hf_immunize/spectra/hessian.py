"""The probing Hessian in the place of the features it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError, ShapeError
from hf_immunize.spectra.conditioning import as_matrix
from hf_immunize.spectra.gram import Gram


@dataclass(frozen=True)
class Hessian:
    """``H = ZᵀZ`` of features ``Z`` of shape ``(N, D)``, for functions of Z that depend on it through H alone.

    Where many processes hold a share of the rows each, the sum of their ``ZᵀZ`` is D×D numbers whatever N is, and
    every function that takes features takes it in their place. The gradient flows to `matrix`: with ``∂f/∂Z = Z·M``
    it is the symmetric ``∂f/∂H = M/2``, in float64.

    A Gram matrix in float64 resolves singular values of Z down to ``√eps·σ_1`` (1.5e-8), what float32 and half
    precision features hold above their own rounding. Float64 features hold more, and their smaller singular values
    are lost here: give such features themselves.

    Attributes:
        matrix: H, shape ``(D, D)``, float64, symmetric, summed over all rows of all processes.
        rows: N, the rows of all processes: the rank of H is at most N, and the rank rule needs it.
        dtype: The dtype in which the features were computed, which says where their rounding noise lies.

    Raises:
        ShapeError: If the matrix is not square, or N is not positive.
        ArgumentError: If the matrix is not of float64.

    Example:
        >>> from hf_immunize.spectra.regularizers import hessian_r_well
        >>> Z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> parts = [Hessian.of(rows) for rows in Z.split(1)]  # one process each
        >>> H = Hessian(sum(part.matrix for part in parts), rows=2, dtype=Z.dtype)
        >>> hessian_r_well(H).item(), hessian_r_well(Z).item()
        (3.75, 3.75)
    """

    matrix: Tensor
    rows: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        as_matrix(self.matrix, "a Hessian", check_finite=False)
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ShapeError(f"Expected a Hessian of shape (D, D), found {tuple(self.matrix.shape)}. Pass ZᵀZ.")
        if self.matrix.dtype != torch.float64:
            raise ArgumentError(
                f"Expected a Hessian in float64, found {self.matrix.dtype}, in which small eigenvalues are lost. Form "
                "ZᵀZ of features cast to float64."
            )
        if self.rows < 1:
            raise ShapeError(f"Expected a Hessian of at least one row of features, found rows={self.rows}.")

    @classmethod
    def of(cls, features: Tensor) -> Hessian:
        """The Hessian of one process's features.

        Args:
            features: Z, shape ``(N, D)``, any real floating-point dtype.

        Returns:
            ``ZᵀZ``, differentiable.

        Raises:
            ShapeError: If the features are not ``(N, D)``.
        """
        features = as_matrix(features, "features", check_finite=False)
        return cls(Gram.apply(features), features.shape[0], features.dtype)
