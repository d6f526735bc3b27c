"""The condition-number regularizers of a matrix and of the probing Hessian ``H = ZᵀZ``.

    R_well(S) = ½‖S‖₂² − (1/2p)‖S‖_F²                    Eq. 3 of Zheng et al. 2025, from Nenov et al. 2024
    R_ill(S)  = 1 / ( (1/2k)‖S‖_F² − ½ σ_k² )            Eq. 12, k the rank, σ_k the smallest non-zero singular value

Lowering ``R_well`` lowers κ: ``κ(S) ≤ exp(p·R_well(S)/σ_k²)``. Lowering ``R_ill`` raises it:
``1/log κ(S) ≤ σ_1²·R_ill(S)``. Without these factors the bounds fail (S = diag(0.1, 0.01) and diag(100, 1)). The
gradients average over the eigenspace where the extreme value is repeated.

``ZᵀZ`` (D×D) and ``ZZᵀ`` (N×N) share their non-zero spectrum. The smaller of the two is formed in float64
and its eigenvalues are taken. Their gradient, ``uuᵀ`` for each, divides by no difference of eigenvalues.
Float64 features hold more than their Gram matrix can: of these, singular values are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.errors import NonFiniteError, PerfectConditioningError, RankError
from hf_immunize.spectra.checks import (
    as_matrix,
    binary_scale,
    check_result,
    decomposing,
    grid_cutoff,
    rank_cutoff,
)


# Sizes of features of which the eighth power, which R_ill's gradient takes, neither overflows nor vanishes.
_ORDINARY = (1e-30, 1e30)
# What a Gram matrix in float64 loses, in singular values.
_GRAM_NOISE = torch.finfo(torch.float64).eps ** 0.5


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, on devices that know it."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def gram_matrix(tall: Tensor) -> Tensor:
    """``AᵀA`` in float64; its gradient is cast to the dtype of A after whatever weight it has."""
    wide = tall.to(torch.float64)
    return wide.mT @ wide


@dataclass(frozen=True)
class Hessian:
    """``H = ZᵀZ`` in the place of Z: where processes hold a share of the rows each, the sum of their ``ZᵀZ``.

    It resolves singular values of Z down to ``√eps·σ_1`` (1.5e-8), enough for float32 features; give float64 ones as
    they are. The gradient flows to `matrix`: with ``∂f/∂Z = Z·M`` it is the symmetric ``∂f/∂H = M/2``, in float64.
    """

    matrix: Tensor  # H, (D, D), float64, symmetric, summed over all rows of all processes
    rows: int  # N, of all processes: the rank of H is at most N
    dtype: torch.dtype  # of the features, which says where their rounding noise lies

    @classmethod
    def of(cls, features: Tensor) -> Hessian:
        """The Hessian of one process's features, shape ``(N, D)``; differentiable."""
        return cls(gram_matrix(features), features.shape[0], features.dtype)


class Spectrum(NamedTuple):
    """Eigenvalues of the smaller Gram matrix, in the autograd graph, with the rank rule as a mask."""

    values: Tensor  # (n,), descending, float64
    kept: Tensor  # (n,), which values the rank rule keeps
    dim: int  # D, the dimension of the features
    noise: float  # relative spread of equal eigenvalues once the features are rounded to their dtype

    def top(self) -> Tensor:
        """The largest value; its gradient is averaged over its eigenspace."""
        return _one_of(self.values, self.values >= self.values[0] * (1 - self.tie), self.values[0])

    def bottom(self) -> Tensor:
        """The smallest value that is not zero, likewise."""
        smallest = self.values[self.kept][-1]
        return _one_of(self.values, self.kept & (self.values <= smallest + self.tie * self.values[0]), smallest)

    def all_equal(self) -> bool:
        """Whether all non-zero values count as one."""
        spread = self.values[0] - self.values[self.kept][-1]
        return bool(spread <= max(self.tie, self.noise) * self.values[0])

    @property
    def tie(self) -> float:
        """Relative distance below which two eigenvalues computed in float64 count as one repeated value."""
        return 16 * len(self.values) * torch.finfo(torch.float64).eps


def _one_of(values: Tensor, alike: Tensor, value: Tensor) -> Tensor:
    """A value with the mean gradient of all that are alike."""
    mean = values[alike].mean()
    return value.detach() + (mean - mean.detach())


def hessian_function(
    features: Tensor | Hessian, form: Callable[[Spectrum], Tensor], *, scale_free: bool = False
) -> Tensor:
    """A function of the spectrum of H, or of ``H·D/tr(H)``, in float32 at least; differentiable once."""
    if isinstance(features, Hessian):
        matrix, name, dtype, degree = as_matrix(features.matrix, "the Hessian"), "the Hessian", features.dtype, 2
    else:
        matrix = as_matrix(features, "features")
        name, dtype, degree = "features", matrix.dtype, 1
    least, most = (limit**degree for limit in _ORDINARY)
    if not least < binary_scale(matrix) < most:
        raise NonFiniteError(
            f"Expected {name} of numbers between {least:g} and {most:g}, found {binary_scale(matrix):g}. Divide them "
            "by their scale first, or powers of them leave the range of float64."
        )
    with without_autocast(matrix.device), decomposing(name):
        spectrum = _spectrum(features if isinstance(features, Hessian) else matrix, dtype)
        if not bool(spectrum.kept.any()):
            raise RankError(
                f"Expected {name} of rank at least 1, found rank 0: all of {tuple(matrix.shape)} is zero or rounding. "
                "Check that the network is not dead and the right layer is read."
            )
        if scale_free:
            spectrum = spectrum._replace(values=spectrum.values * (spectrum.dim / spectrum.values.sum()))
        value = form(spectrum)
    return check_result(value.to(torch.promote_types(dtype, torch.float32)), "the value of a regularizer")


def _spectrum(given: Tensor | Hessian, dtype: torch.dtype) -> Spectrum:
    if isinstance(given, Hessian):
        rows, dim = given.rows, len(given.matrix)
        # Of a Hessian of few rows the eigenvalues beyond them are rounding.
        within = torch.arange(dim, device=given.matrix.device) < rows
        values, lost = _eigenvalues(given.matrix) * within, _GRAM_NOISE
    else:
        rows, dim = given.shape
        if dtype == torch.float64:
            values, lost = torch.linalg.svdvals(given).square(), 0.0
        else:
            values, lost = _eigenvalues(gram_matrix(given.mT if rows <= dim else given)), _GRAM_NOISE
    singular = values.detach().sqrt()
    # `rank_cutoff` is the larger of a multiple of either argument.
    of_frobenius = rank_cutoff(0.0, 1.0, rows, dim, dtype) * torch.linalg.vector_norm(singular)
    of_largest = max(rank_cutoff(1.0, 0.0, rows, dim, dtype), lost) * singular[0]
    kept = singular > torch.maximum(of_frobenius, of_largest).clamp(min=grid_cutoff(rows, dim, dtype))
    return Spectrum(values, kept, dim, 8 * torch.finfo(dtype).eps)


def _eigenvalues(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


# ---- functions of it ----


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
