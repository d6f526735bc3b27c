"""Condition numbers that know their rank, from singular values: a squared matrix loses all below ``sqrt(eps)·σ_max``.

Linear probing on features ``Z`` has the Hessian ``H = ZᵀZ`` (squared loss), and gradient descent on it is as slow as
its condition number κ(H) is large (Boyd and Vandenberghe 2004; Zheng et al. 2025).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError, RankError, ShapeError
from hf_immunize.spectra.checks import as_matrix, check_dtype, check_result, decomposing, grid_cutoff, rank_cutoff


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of the probing Hessian ``H = ZᵀZ`` of features ``Z`` of shape ``(N, D)``.

    Attributes:
        kappa: κ(H) = (σ_max(Z)/σ_min⁺(Z))², dimensionless; a lower bound of it where `is_bound`.
        log_kappa: natural logarithm of `kappa`.
        rank: Number of singular values of ``Z`` above `cutoff`; 0 where only the reference's are not all zero.
        num_samples, dim: N and D. With N < D the number describes the sample, not the task.
        effective_rank: ``exp`` of the entropy of ``σ_i / Σ_j σ_j``, between 1 and min(N, D); 0 of rank 0.
        sigma_max, sigma_min: Largest singular value of ``Z``, and smallest above `cutoff`, in units of the features.
        cutoff: The rank rule's threshold on singular values of ``Z`` (see `rank_cutoff`).
        is_bound: Whether the rank fell below the reference's, so that `kappa` only bounds κ from below.
        reference_rank: Rank of the reference features, if one was given.
        intercept: Whether all this is of ``Z − mean`` in place of ``Z``: of a probe with an intercept, whose Hessian
            is ``Z_cᵀZ_c`` once the intercept is eliminated.
        set_by_norm: Whether σ_min is of the one direction in which all features are the same, as a LayerNorm makes
            them: of ``Z − mean`` it is gone. Such a κ says nothing of the task; take the one with an intercept.

    Example:
        >>> print(feature_conditioning(torch.diag(torch.tensor([3.0, 1.0]))))
        κ = 9 (rank 2, N = 2, D = 2)
    """

    kappa: float
    log_kappa: float
    rank: int
    num_samples: int
    dim: int
    effective_rank: float
    sigma_max: float
    sigma_min: float
    cutoff: float
    is_bound: bool = False
    reference_rank: int | None = None
    intercept: bool = False
    set_by_norm: bool = False

    @property
    def log10_kappa(self) -> float:
        """Decimal logarithm of `kappa`."""
        return self.log_kappa / math.log(10.0)

    def __str__(self) -> str:
        sign = "≥" if self.is_bound else "="
        lost = f" of {self.reference_rank} before" if self.is_bound else ""
        of = ", with intercept" if self.intercept else ""
        return f"κ {sign} {self.kappa:.4g} (rank {self.rank}{lost}, N = {self.num_samples}, D = {self.dim}{of})"


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in float64, descending, shape ``(min(N, D),)``; on the CPU where the device has no float64."""
    device = "cpu" if matrix.device.type == "mps" else matrix.device
    with torch.autocast(matrix.device.type, enabled=False), decomposing("a matrix"):
        return torch.linalg.svdvals(matrix.detach().to(device=device, dtype=torch.float64))


def summarize_spectrum(
    sigma: Tensor,
    num_samples: int,
    dim: int,
    produced_dtype: torch.dtype,
    reference: Conditioning | None = None,
    name: str = "features",
    folds: int = 1,
    centred: Tensor | None = None,
    intercept: bool = False,
) -> Conditioning:
    """Apply the rank rule to singular values of ``Z`` and describe the conditioning of ``ZᵀZ``.

    With an intercept it is of ``Z_cᵀZ_c``, by the singular values of ``Z − mean``; rounding noise stays that of Z.
    """
    given = sigma.tolist()
    frobenius = check_result(math.hypot(*given), f"the norm of {name}")
    cutoff = rank_cutoff(given[0], frobenius, num_samples, dim, produced_dtype, folds=folds)
    about_mean = [] if centred is None else centred.tolist()
    values = about_mean or [0.0] if intercept else given  # of one sample nothing is left
    sigma_max = values[0]
    cutoff = max(cutoff, grid_cutoff(num_samples, dim, produced_dtype))
    kept = [v for v in values if v > cutoff]
    if not kept and reference is None:
        raise RankError(
            f"Expected {name} of rank at least 1, found rank 0 (N = {num_samples}, D = {dim}): all is "
            f"{'alike' if intercept else 'zero'} or rounding noise, so κ is undefined. Check that the network "
            "is not dead and the right layer is read."
        )
    parts = [v / sigma_max for v in values if v]
    total = math.fsum(parts)
    shares = [share for part in parts if (share := part / total) > 0]
    effective_rank = math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0
    is_bound = False
    if reference is not None:
        if not isinstance(reference, Conditioning):
            raise ArgumentError(
                f"Expected the reference as a Conditioning, found {type(reference).__name__}. Pass what "
                "feature_conditioning or FeatureFactor.conditioning gives."
            )
        if reference.intercept != intercept:
            raise ArgumentError("Expected the reference with the same intercept=, found the other. Take both alike.")
        if (reference.num_samples, reference.dim) != (num_samples, dim):
            raise ShapeError(
                f"Expected reference features of shape ({num_samples}, {dim}), found ({reference.num_samples}, "
                f"{reference.dim}). Pass the same images through the reference weights."
            )
        is_bound = len(kept) < reference.rank
    # Directions lost against the reference lie somewhere below the cut-off: by the pseudo-inverse they would vanish
    # from κ, and a collapse to one direction would read κ = 1. At the cut-off they bound κ from below.
    if kept:
        log_kappa = 2.0 * math.log(sigma_max / (cutoff if is_bound else kept[-1]))
    else:
        # All are lost: one direction that shrinks to nothing has this bound all the way.
        log_kappa = -2.0 * math.log(rank_cutoff(1.0, 1.0, num_samples, dim, produced_dtype, folds=folds))
    return Conditioning(
        kappa=math.exp(min(log_kappa, 709.0)),
        log_kappa=log_kappa,
        rank=len(kept),
        num_samples=num_samples,
        dim=dim,
        effective_rank=effective_rank,
        sigma_max=sigma_max,
        sigma_min=kept[-1] if kept else 0.0,
        cutoff=cutoff,
        is_bound=is_bound,
        reference_rank=None if reference is None else reference.rank,
        intercept=intercept,
        # With fewer samples than dimensions centring takes one direction from any features.
        set_by_norm=not intercept
        and len(kept) < num_samples
        and 0 < sum(v > cutoff for v in about_mean) == len(kept) - 1,
    )


def condition_number(matrix: Any) -> float:
    """κ(S) = σ_max/σ_min⁺, the ratio of the extreme non-zero singular values.

    Eq. 1 of Zheng et al. 2025 (arXiv:2505.23760), with the rank decided by `rank_cutoff`, in float64.

    Args:
        matrix: S, of any shape ``(m, n)`` and any real floating-point dtype.

    Returns:
        κ(S) ≥ 1, dimensionless.

    Raises:
        ShapeError, NonFiniteError, RankError: If it is not a non-empty matrix, holds NaN or infinity, or is zero.

    Example:
        >>> import torch
        >>> round(condition_number(torch.diag(torch.tensor([100.0, 1.0, 0.0]))), 6)
        100.0
    """
    matrix = as_matrix(matrix)
    rows, columns = matrix.shape
    summary = summarize_spectrum(singular_values(matrix), rows, columns, matrix.dtype, name="a matrix")
    return summary.sigma_max / summary.sigma_min


def feature_conditioning(
    features: Any, *, reference: Any = None, produced_dtype: torch.dtype | None = None, intercept: bool = False
) -> Conditioning:
    """Conditioning of the linear-probing Hessian ``ZᵀZ``, exact and rank-aware.

    κ(ZᵀZ) = (σ_max(Z)/σ_min⁺(Z))² (Eq. 1 of Zheng et al. 2025), from the singular values of ``Z`` in float64. Collapse
    is not good conditioning: where the rank is below that of `reference`, κ is reported as the bound
    ``κ ≥ (σ_max/cut-off)²``.

    Args:
        features: ``Z``, shape ``(N, D)``, any real floating-point dtype, on any device.
        reference: The same data through the reference weights: features of shape ``(N, D)``, or their `Conditioning`.
        produced_dtype: The dtype in which the features were computed, where they have been cast since.
        intercept: Of a probe with an intercept: ``Z_cᵀZ_c``, ``Z_c = Z − mean``. A direction in which all features
            are the same then counts for nothing. Every network that ends in a LayerNorm has one, small and arbitrary,
            which is the smallest singular value of ``Z`` and says nothing of the task.

    Returns:
        `Conditioning`, κ together with rank, N and D.

    Raises:
        ShapeError, NonFiniteError: If they are not ``(N, D)`` like the reference's, or hold NaN or infinity.
        RankError: If they are zero, without a reference, or the reference is.

    Example:
        >>> import torch
        >>> Z = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> print(feature_conditioning(Z))
        κ = 9 (rank 2, N = 3, D = 2)
        >>> collapsed = Z * torch.tensor([1.0, 0.0])
        >>> feature_conditioning(collapsed).kappa, feature_conditioning(collapsed, reference=Z).is_bound
        (1.0, True)
    """
    features, produced_dtype = as_matrix(features, "features"), check_dtype(produced_dtype)
    if reference is not None and not isinstance(reference, Conditioning):
        reference = as_matrix(reference, "reference features")
        reference = feature_conditioning(reference, produced_dtype=produced_dtype, intercept=intercept)
    n, d = features.shape
    centred = singular_values(centred_rows(features)) if intercept or n > d else None
    of_rows = singular_values(features), n, d, produced_dtype or features.dtype
    return summarize_spectrum(*of_rows, reference, centred=centred, intercept=intercept)


def centred_rows(features: Tensor) -> Tensor:
    """``Z − mean`` in float64, on the CPU where the device has none."""
    wide = features.detach().to("cpu" if features.device.type == "mps" else features.device, torch.float64)
    # The mean of large numbers, without their sum.
    return wide - (wide / len(wide)).sum(dim=0)
