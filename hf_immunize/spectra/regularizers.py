"""The condition-number regularizers, with gradients in closed form.

    R_well(S) = ½‖S‖₂² − (1/2p)‖S‖_F²                    Eq. 3 of Zheng et al. 2025, from Nenov et al. 2024
    R_ill(S)  = 1 / ( (1/2k)‖S‖_F² − ½ σ_k² )            Eq. 12, k the rank, σ_k the smallest non-zero singular value

Lowering ``R_well`` lowers κ: ``κ(S) ≤ exp(p·R_well(S)/σ_k²)``. Lowering ``R_ill`` raises it:
``1/log κ(S) ≤ σ_1²·R_ill(S)``. The bounds need these factors; without them they fail
(S = diag(0.1, 0.01) and diag(100, 1)). No backward pass runs through a decomposition: the gradients need only the
extreme singular pair and the matrix, and average over the eigenspace where the extreme value is repeated.

The functions of features take their `Hessian` in the features' place. Away from the CPU they read no value back:
where they would raise NonFiniteError, RankError or PerfectConditioningError, their value is NaN instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_immunize.errors import RankError
from hf_immunize.spectra.checks import as_matrix, binary_scale, check_result, grid_cutoff, rank_cutoff, times_power
from hf_immunize.spectra.hessian_functions import (
    ClosedForm,
    Form,
    Hessian,
    Spectrum,
    hessian_function,
    perfect_conditioning,
    rounding,
    scale_free,
)


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
    return _matrix_function(matrix, _r_well, 2)


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
    return _matrix_function(matrix, _r_ill, -2)


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
    return hessian_function(features, _form(well_form, 2, scale_free), degree=0 if scale_free else 2)


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
    return hessian_function(features, _form(ill_form, -2, scale_free), degree=0 if scale_free else -2)


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
    return hessian_function(features, concentration_form)


def hessian_log_kappa(features: Tensor | Hessian) -> Tensor:
    """``log κ(H) = log σ_1 − log σ_k`` of the probing Hessian ``H = ZᵀZ``, σ_k its smallest non-zero eigenvalue."""
    return hessian_function(features, log_kappa_form)


def well_form(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """``½σ_1² − Σσ_i²/(2D)``, with ``2(σ_1·uuᵀ − G/D)``; homogeneous of degree 2."""
    values = spectrum.values
    # As a sum of differences, which cannot turn negative by cancellation; D − n values of H are zero.
    differences = (values[0].square() - values.square()).sum() + (spectrum.dim - len(values)) * values[0].square()
    return differences / (2 * spectrum.dim), 2 * (values[0] * spectrum.top() - spectrum.gram / spectrum.dim)


def ill_denominator(values: Tensor, smallest: Tensor, count: int | Tensor) -> Tensor:
    """``Σσ_i²/2k − σ_k²/2`` of Eq. 12, summed as differences so that nothing cancels."""
    return ((values - smallest) * (values + smallest)).sum() / (2 * count)


def ill_form(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """``1/d``, ``d = Σσ_i²/(2k) − ½σ_k²``, with ``2(σ_k·uuᵀ − G/k)/d²``; homogeneous of degree −2, NaN at κ = 1."""
    k, smallest = spectrum.kept.sum(), spectrum.smallest
    d = ill_denominator(torch.where(spectrum.kept, spectrum.values, smallest), smallest, k)
    d = torch.where(spectrum.all_equal(), torch.nan, d)
    return 1 / d, (2 / d.square()) * (smallest * spectrum.bottom() - spectrum.gram / k)


def concentration_form(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """``log((tr H − σ_1)/σ_1)``, with ``2(I − uuᵀ)/(tr H − σ_1) − 2uuᵀ/σ_1``, and no gradient at its floor."""
    # The others are summed: what a difference of trace and top leaves has lost as many digits as they are smaller.
    top, rest = spectrum.values[0], spectrum.values[1:].sum()
    floor = 64 * torch.finfo(torch.float64).eps * (top + rest)
    small = -2 * (1 / rest + 1 / top) * spectrum.top()
    small.diagonal().add_(2 / rest)
    return torch.log(torch.maximum(rest, floor) / top), torch.where(rest > floor, small, 0.0)


def log_kappa_form(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """``log σ_1 − log σ_k``, with ``2(u_1u_1ᵀ/σ_1 − u_ku_kᵀ/σ_k)``."""
    largest, smallest = spectrum.values[0], spectrum.smallest
    small = (2 / largest) * spectrum.top() - (2 / smallest) * spectrum.bottom()
    return torch.log(largest) - torch.log(smallest), small


def _form(form: Form, degree: int, wanted: bool) -> Form:
    return scale_free(form, degree) if wanted else form  # of which callers have an option of that name


def _matrix_function(
    matrix: Tensor, function: Callable[[Tensor, torch.dtype, float], tuple[Tensor, Tensor]], degree: int
) -> Tensor:
    """A function that is homogeneous of a degree, of what remains of a matrix when its scale is taken out."""
    matrix = as_matrix(matrix)
    kind = torch.promote_types(matrix.dtype, torch.float32)

    def scaled(detached: Tensor) -> tuple[Tensor, Tensor]:
        scale = binary_scale(detached)
        noise = grid_cutoff(detached.shape[0], detached.shape[1], detached.dtype) / scale
        value, gradient = function(detached.to(torch.float64) / scale, detached.dtype, noise)
        gradient = times_power(gradient, scale, degree - 1).to(kind)
        if matrix.requires_grad:
            check_result(gradient, "the gradient of a regularizer")
        return check_result(times_power(value, scale, degree).to(kind), "the value of a regularizer"), gradient

    return ClosedForm.apply(matrix, scaled, matrix.dtype)


def _r_well(s: Tensor, dtype: torch.dtype, noise: float) -> tuple[Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(s, full_matrices=False)
    ties = int((sigma >= sigma[0] - _tie_width(sigma)).sum())
    # As a sum of differences, which cannot turn negative by cancellation.
    value = (sigma[0].square() - sigma.square()).sum() / (2 * len(sigma))
    return value, (sigma[0] / ties) * (u[:, :ties] @ vh[:ties]) - s / len(sigma)


def _r_ill(s: Tensor, dtype: torch.dtype, noise: float) -> tuple[Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(s, full_matrices=False)
    cutoff = rank_cutoff(float(sigma[0]), float(sigma.norm()), s.shape[0], s.shape[1], dtype)
    kept = sigma[sigma > max(cutoff, noise)]
    if not len(kept):
        raise RankError(
            f"Expected a matrix of rank at least 1 in R_ill, found all of {tuple(s.shape)} values zero. Check what "
            "produced it."
        )
    k, width = len(kept), _tie_width(sigma)
    if kept[0] - kept[-1] <= max(width, rounding(dtype) * float(kept[0])):
        raise perfect_conditioning(f"all {k}")
    denominator = ill_denominator(kept, kept[-1], k)
    first = int((kept > kept[-1] + width).sum())
    extreme = (kept[-1] / (k - first)) * (u[:, first:k] @ vh[first:k])
    return 1 / denominator, (extreme - s / k) / denominator**2


def _tie_width(sigma: Tensor) -> float:
    return 16 * sigma.shape[0] * torch.finfo(sigma.dtype).eps * float(sigma[0])
