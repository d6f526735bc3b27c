"""The condition-number regularizers, with gradients in closed form.

    R_well(S) = ½‖S‖₂² − (1/2p)‖S‖_F²                    Eq. 3 of Zheng et al. 2025, from Nenov et al. 2024
    R_ill(S)  = 1 / ( (1/2k)‖S‖_F² − ½ σ_k² )            Eq. 12, k the rank, σ_k the smallest non-zero singular value

Lowering ``R_well`` lowers κ: ``κ(S) ≤ exp(p·R_well(S)/σ_k²)``. Lowering ``R_ill`` raises it:
``1/log κ(S) ≤ σ_1²·R_ill(S)``. Without these factors the bounds fail (S = diag(0.1, 0.01) and diag(100, 1)). The
gradients average over the eigenspace where the extreme value is repeated.

The functions of features take their `Hessian` in the features' place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_immunize.errors import PerfectConditioningError
from hf_immunize.spectra.checks import as_matrix
from hf_immunize.spectra.hessian_functions import Hessian, Spectrum, hessian_function


def r_well(matrix: Tensor) -> Tensor:
    """``R_well(S) = ½‖S‖₂² − (1/2p)‖S‖_F²``, p = min(m, n): zero exactly when every singular value is equal.

    Eq. 3 of Zheng et al. 2025 (arXiv:2505.23760), from Nenov et al. 2024 (arXiv:2410.00169). Gradient:
    ``σ_1 u_1 v_1ᵀ − S/p``.

    Args:
        matrix: S, shape ``(m, n)``, any real floating-point dtype.

    Returns:
        0-D tensor, non-negative, in the units of S squared; differentiable once.

    Raises:
        ShapeError, NonFiniteError: If S is not a non-empty matrix, or holds NaN or infinity.

    Example:
        >>> r_well(torch.diag(torch.tensor([3.0, 1.0]))).item()
        2.0
    """
    matrix = as_matrix(matrix)
    if not matrix.any():
        return (0 * matrix).sum(dtype=torch.promote_types(matrix.dtype, torch.float32))
    return hessian_function(matrix, _matrix_well)


def r_ill(matrix: Tensor) -> Tensor:
    """``R_ill(S) = 1 / ((1/2k)‖S‖_F² − ½σ_k²)``, k the rank of S and σ_k its smallest non-zero singular value.

    Eq. 12 of Zheng et al. 2025 (arXiv:2505.23760). Gradient: ``(σ_k u_k v_kᵀ − S/k)/d²`` with d the denominator.

    Args:
        matrix: S, shape ``(m, n)``, any real floating-point dtype.

    Returns:
        0-D tensor, positive, in the units of 1/S²; differentiable once.

    Raises:
        ShapeError, NonFiniteError: If S is not a non-empty matrix, or holds NaN or infinity.
        RankError, PerfectConditioningError: If S is zero, or κ(S) = 1, where it is undefined.

    Example:
        >>> r_ill(torch.diag(torch.tensor([3.0, 1.0]))).item()
        0.5
    """
    return hessian_function(matrix, _matrix_ill)


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
        ShapeError, NonFiniteError, RankError: If they are not ``(N, D)``, hold NaN or infinity, or are zero.

    Example:
        >>> hessian_r_well(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item()
        3.75
    """
    return hessian_function(features, _well, scale_free=scale_free)


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
        ShapeError, NonFiniteError, RankError: If they are not ``(N, D)``, hold NaN or infinity, or are zero.
        PerfectConditioningError: If κ(H) = 1, a single sample above all.

    Example:
        >>> round(hessian_r_ill(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item(), 6)  # 1/(17/4 − 1/2)
        0.266667
    """
    return hessian_function(features, _ill, scale_free=scale_free)


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
        ShapeError, NonFiniteError, RankError: If they are not ``(N, D)``, hold NaN or infinity, or are zero.

    Example:
        >>> round(spectral_concentration(torch.diag(torch.tensor([10.0, 1.0]))).item(), 4)  # log(1/100)
        -4.6052
    """
    return hessian_function(features, _concentration)


def hessian_log_kappa(features: Tensor | Hessian) -> Tensor:
    """``log κ(H) = log σ_1 − log σ_k`` of the probing Hessian ``H = ZᵀZ``, σ_k its smallest non-zero eigenvalue."""
    return hessian_function(features, lambda spectrum: spectrum.top().log() - spectrum.bottom().log())


def _matrix_well(spectrum: Spectrum) -> Tensor:
    """Of the eigenvalues λ = σ² of SSᵀ; as a sum of differences, which cannot turn negative by cancellation."""
    return (spectrum.top() - spectrum.values).sum() / (2 * len(spectrum.values))


def _matrix_ill(spectrum: Spectrum) -> Tensor:
    _check_spread(spectrum)
    kept = spectrum.values[spectrum.kept]
    return 2 * len(kept) / (kept - spectrum.bottom()).sum()


def _well(spectrum: Spectrum) -> Tensor:
    values, top = spectrum.values, spectrum.top().square()
    # As a sum of differences, likewise; D − n values of H are zero.
    return ((top - values.square()).sum() + (spectrum.dim - len(values)) * top) / (2 * spectrum.dim)


def _ill(spectrum: Spectrum) -> Tensor:
    _check_spread(spectrum)
    kept = spectrum.values[spectrum.kept]
    return 1 / ill_denominator(kept, spectrum.bottom(), len(kept))


def ill_denominator(values: Tensor, smallest: Tensor, count: int) -> Tensor:
    """``Σσ_i²/2k − σ_k²/2`` of Eq. 12, summed as differences so that nothing cancels."""
    return ((values - smallest) * (values + smallest)).sum() / (2 * count)


def _check_spread(spectrum: Spectrum) -> None:
    if spectrum.all_equal():
        raise PerfectConditioningError(
            "Expected κ > 1 in R_ill, found all non-zero singular values equal, where R_ill is undefined. Use at "
            "least two different samples in a harmful batch."
        )


def _concentration(spectrum: Spectrum) -> Tensor:
    # The others are summed: what a difference of trace and top leaves has lost as many digits as they are smaller.
    top = spectrum.top()
    rest = spectrum.values[1:].sum() + (spectrum.values[0] - top)
    floor = 64 * torch.finfo(torch.float64).eps * (top + rest).detach()
    return (rest / top).log() if rest > floor else (floor / top.detach()).log() + 0 * top
