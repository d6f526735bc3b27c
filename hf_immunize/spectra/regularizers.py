"""The condition-number regularizers, with gradients in closed form.

    R_well(S) = ½‖S‖₂² − (1/2p)‖S‖_F²                    Eq. 3 of Zheng et al. 2025, from Nenov et al. 2024
    R_ill(S)  = 1 / ( (1/2k)‖S‖_F² − ½ σ_k² )            Eq. 12, k the rank, σ_k the smallest non-zero singular value

Lowering ``R_well`` lowers κ: ``κ(S) ≤ exp(p·R_well(S)/σ_k²)``. Lowering ``R_ill`` raises it:
``1/log κ(S) ≤ σ_1²·R_ill(S)``. The bounds need these factors; without them they fail
(S = diag(0.1, 0.01) and diag(100, 1)). No backward pass runs through a decomposition: the gradients need only the
extreme singular pair and the matrix, and average over the eigenspace where the extreme value is repeated.

The functions of features take their `Hessian` in the features' place. Away from the CPU they read no value back:
where they would raise NonFiniteError, RankError or PerfectConditioningError, their value is NaN instead (see
`device_forms`).
"""

import math

import torch
from torch import Tensor

from hf_immunize.errors import RankError
from hf_immunize.spectra.closed_form import ClosedForm, ValueAndGradient, hessian_function
from hf_immunize.spectra.conditioning import as_matrix, rank_cutoff
from hf_immunize.spectra.forms import CONCENTRATION, R_ILL, R_WELL, SCALE_FREE_R_ILL, SCALE_FREE_R_WELL
from hf_immunize.spectra.hessian import Hessian
from hf_immunize.spectra.small_forms import ill_denominator, rounding


def r_well(matrix: Tensor) -> Tensor:
    """``R_well(S) = ½‖S‖₂² − (1/2p)‖S‖_F²``, p = min(m, n): zero exactly when every singular value is equal.

    Eq. 3 of Zheng et al. 2025 (arXiv:2505.23760), from Nenov et al. 2024 (arXiv:2410.00169). Gradient:
    ``σ_1 u_1 v_1ᵀ − S/p``.

    Args:
        matrix: S, shape ``(m, n)``, any real floating-point dtype.

    Returns:
        0-D tensor, non-negative, in the units of S squared; differentiable once.

    Raises:
        ShapeError: If S is not a non-empty matrix.
        NonFiniteError: If S holds NaN or infinity.

    Example:
        >>> r_well(torch.diag(torch.tensor([3.0, 1.0]))).item()
        2.0
    """
    return _matrix_function(matrix, _r_well)


def r_ill(matrix: Tensor) -> Tensor:
    """``R_ill(S) = 1 / ((1/2k)‖S‖_F² − ½σ_k²)``, k the rank of S and σ_k its smallest non-zero singular value.

    Eq. 12 of Zheng et al. 2025 (arXiv:2505.23760). Gradient: ``(σ_k u_k v_kᵀ − S/k)/d²`` with d the denominator.

    Args:
        matrix: S, shape ``(m, n)``, any real floating-point dtype.

    Returns:
        0-D tensor, positive, in the units of 1/S²; differentiable once.

    Raises:
        ShapeError: If S is not a non-empty matrix.
        NonFiniteError: If S holds NaN or infinity.
        RankError: If S is zero.
        PerfectConditioningError: If κ(S) = 1, where it is undefined.

    Example:
        >>> r_ill(torch.diag(torch.tensor([3.0, 1.0]))).item()
        0.5
    """
    return _matrix_function(matrix, _r_ill)


def hessian_r_well(features: Tensor | Hessian, *, scale_free: bool = False) -> Tensor:
    """``R_well`` of the probing Hessian ``H = ZᵀZ``, p = D, computed on the smaller of ``ZᵀZ`` and ``ZZᵀ``.

    Gradient with respect to Z: ``2(σ_1 uuᵀ − G/D) Z``, ``G = ZZᵀ`` and u its top eigenvector (N ≤ D), or the same with
    H from the right. Only the top pair is needed.

    Args:
        features: Z, shape ``(N, D)``, any real floating-point dtype, or their `Hessian`; computed in float64.
        scale_free: Take it of ``H·D/tr(H)``, which does not change when the features are scaled.

    Returns:
        0-D tensor, non-negative; in the units of the features to the fourth power unless scale-free. Differentiable
        once. It is zero exactly when κ(H) = 1 and the column rank is full.

    Raises:
        ShapeError: If the features are not ``(N, D)``.
        NonFiniteError: If they hold NaN or infinity.
        RankError: If they are zero.

    Example:
        >>> hessian_r_well(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item()
        3.75
    """
    return hessian_function(features, SCALE_FREE_R_WELL if scale_free else R_WELL)


def hessian_r_ill(features: Tensor | Hessian, *, scale_free: bool = False) -> Tensor:
    """``R_ill`` of the probing Hessian ``H = ZᵀZ``, k = rank(H), computed on the smaller of ``ZᵀZ`` and ``ZZᵀ``.

    Gradient with respect to Z: ``2((σ_k uuᵀ − G/k)/d²) Z``, ``G = ZZᵀ``, u the eigenvector of its smallest non-zero
    eigenvalue σ_k and d the denominator of R_ill (N ≤ D), or the same with H from the right.

    Args:
        features: Z, shape ``(N, D)``, any real floating-point dtype, or their `Hessian`; computed in float64.
        scale_free: Take it of ``H·D/tr(H)``, which does not change when the features are scaled.

    Returns:
        0-D tensor, positive; in the units of the features to the power −4 unless scale-free. Differentiable once.

    Raises:
        ShapeError: If the features are not ``(N, D)``.
        NonFiniteError: If they hold NaN or infinity.
        RankError: If they are zero.
        PerfectConditioningError: If κ(H) = 1, a single sample above all.

    Example:
        >>> hessian_r_ill(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item() == 1 / 3.75
        False
        >>> round(hessian_r_ill(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item(), 6)  # 1/(17/4 − 1/2)
        0.266667
    """
    return hessian_function(features, SCALE_FREE_R_ILL if scale_free else R_ILL)


def spectral_concentration(features: Tensor | Hessian) -> Tensor:
    """``C(Z) = log((tr H − σ_1)/σ_1)``, H = ZᵀZ and σ_1 its largest eigenvalue: scale-free, from the top pair alone.

    Lowering it raises a lower bound of κ: ``log κ(H) ≥ log(k − 1) − C(Z)``, k = rank(H), since the smallest of the
    other k − 1 eigenvalues is at most their mean. It needs no smallest eigenvalue, hence has no trouble with N < D.
    Gradient: ``2(Z − uuᵀZ)/(tr H − σ_1) − 2uuᵀZ/σ_1``. Below ``tr H − σ_1 = 64·eps·tr H`` (float64 rounding),
    where nothing is left to gain, the value stays at the floor and the gradient is zero.

    Args:
        features: Z, shape ``(N, D)``, any real floating-point dtype, or their `Hessian`; computed in float64.

    Returns:
        0-D tensor, dimensionless; differentiable once.

    Raises:
        ShapeError: If the features are not ``(N, D)``.
        NonFiniteError: If they hold NaN or infinity.
        RankError: If they are zero.

    Example:
        >>> round(spectral_concentration(torch.diag(torch.tensor([10.0, 1.0]))).item(), 4)  # log(1/100)
        -4.6052
    """
    return hessian_function(features, CONCENTRATION)


def _matrix_function(matrix: Tensor, function: ValueAndGradient) -> Tensor:
    matrix = as_matrix(matrix)
    return ClosedForm.apply(matrix, function, matrix.dtype)


def _r_well(s: Tensor) -> tuple[float, Tensor]:
    u, sigma, vh = torch.linalg.svd(s.to(torch.float64), full_matrices=False)
    values = sigma.tolist()
    p = len(values)
    ties = sum(value >= values[0] - _tie_width(sigma) for value in values)
    # As a sum of differences, which cannot turn negative by cancellation.
    value = math.fsum(values[0] ** 2 - v**2 for v in values) / (2 * p)
    gradient = (values[0] / ties) * (u[:, :ties] @ vh[:ties]) - s.to(sigma.dtype) / p
    return value, gradient.to(_work_dtype(s))


def _r_ill(s: Tensor) -> tuple[float, Tensor]:
    u, sigma, vh = torch.linalg.svd(s.to(torch.float64), full_matrices=False)
    values = sigma.tolist()
    cutoff = rank_cutoff(values[0], math.hypot(*values), s.shape[0], s.shape[1], s.dtype)
    kept = [value for value in values if value > cutoff]
    if not kept:
        raise RankError(
            f"Expected a matrix of rank at least 1 in R_ill, found all of {tuple(s.shape)} values zero. Check what "
            "produced it."
        )
    k, width = len(kept), _tie_width(sigma)
    denominator = ill_denominator(kept, max(width, rounding(s.dtype) * kept[0]))
    first = sum(value > kept[-1] + width for value in kept)
    extreme = (kept[-1] / (k - first)) * (u[:, first:k] @ vh[first:k])
    gradient = (extreme - s.to(sigma.dtype) / k) / denominator**2
    return 1 / denominator, gradient.to(_work_dtype(s))


def _work_dtype(s: Tensor) -> torch.dtype:
    return torch.promote_types(s.dtype, torch.float32)


def _tie_width(sigma: Tensor) -> float:
    return 16 * sigma.shape[0] * torch.finfo(sigma.dtype).eps * float(sigma[0])


def kappa_floor(concentration: float, rank: int) -> float:
    """Lower bound of ``log κ(H)`` from the spectral concentration: ``log(k − 1) − C(Z)``, k = rank(H) ≥ 2.

    Args:
        concentration: Value of `spectral_concentration`.
        rank: k.

    Returns:
        The bound on the natural logarithm of κ(H).
    """
    if rank < 2:
        raise RankError(f"Expected a rank of at least 2 for the bound, found {rank}.")
    return math.log(rank - 1) - concentration
