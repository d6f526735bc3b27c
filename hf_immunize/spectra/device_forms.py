"""The regularizers on a device that computes behind the host's back: tensors alone, no branch on a value.

The same functions as `small_forms`, for GPUs. To read a number back makes the host wait for all that was queued before
it, so nothing is read: ties and the rank are masks, and what the host's route raises shows in the value, which is NaN
where the features hold NaN or infinity, are zero, or, for R_ill, have κ = 1. With features that are finite the
gradient is then zero, so that the weights survive until the NaN is read.

`top_projector` needs matrix products alone. The smallest non-zero eigenvalue needs all of them, and so do float64
features: there `torch.linalg.eigh` and `torch.linalg.svd` run on the device, and on a GPU torch reads their status
back to check it for errors, one wait each that is torch's own. So `hessian_r_well` and `spectral_concentration` of
float32 and coarser features queue their work without a wait, and `hessian_r_ill` and `hessian_log_kappa` have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.spectra.conditioning import rank_cutoff
from hf_immunize.spectra.extremes import COMPUTED_NOISE
from hf_immunize.spectra.gram import product_by_rows
from hf_immunize.spectra.krylov import tie_tolerance
from hf_immunize.spectra.small_forms import rounding, times_small
from hf_immunize.spectra.small_side import SmallSide, wide


# (1 − δ)^(2^28) falls below 1e-8 at δ = 7e-8, the rounding of float32 features. More squarings would tell values apart
# that the features do not, and double the rounding errors between equal ones once more each.
_SQUARINGS = 28


class DenseGradient(NamedTuple):
    """The matrix M of `small_forms`, formed.

    Attributes:
        small: M, shape ``(n, n)``, float64.
        exact: Whether its product with Z is a difference of larger numbers, to be taken in float64.
    """

    small: Tensor
    exact: bool

    def matrix(self, gram: Tensor) -> Tensor:
        """M."""
        return self.small

    def times(self, z: Tensor, gram: Tensor) -> Tensor:
        """``M·Z`` or ``Z·M``, whichever side is the small one, in the features' dtype, float32 at least."""
        if not self.exact:
            return times_small(z, self.small)
        return product_by_rows(z, lambda rows: rows @ self.small, torch.float64, transposed=wide(z))


class MaskedSpectrum(NamedTuple):
    """All eigenpairs of a small side, descending.

    Attributes:
        values: Eigenvalues, shape ``(n,)``.
        vectors: Columns, shape ``(n, n)``.
        kept: Which values the rank rule keeps, shape ``(n,)``, boolean.
        smallest: The smallest of these, 0-D.
    """

    values: Tensor
    vectors: Tensor
    kept: Tensor
    smallest: Tensor

    def projector(self, mask: Tensor) -> Tensor:
        """Average of uuᵀ over the vectors that a mask tells."""
        weights = mask.to(self.vectors.dtype)  # of booleans the quotient would be in float32
        return (self.vectors * (weights / weights.sum())) @ self.vectors.mT

    def top(self) -> Tensor:
        """Which values count as the largest."""
        return self.values >= self.values[0] * (1 - tie_tolerance(len(self.values), 1.0))

    def bottom(self) -> Tensor:
        """Which values count as the smallest that is not zero."""
        return self.kept & (self.values <= self.smallest + tie_tolerance(len(self.values), 1.0) * self.values[0])


def masked_spectrum(side: SmallSide) -> MaskedSpectrum:
    """All eigenpairs of the small side, with the rank rule as a mask; see `hessian_spectrum`.

    Args:
        side: Finite and not zero.
    """
    n = side.gram.shape[0]
    if side.features is not None and side.dtype == torch.float64:
        u, singular, vh = torch.linalg.svd(side.features, full_matrices=False)
        vectors, computed_noise = u if wide(side.features) else vh.mT, 0.0
    else:
        values, vectors = torch.linalg.eigh(side.gram)
        singular, vectors, computed_noise = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1), COMPUTED_NOISE
        singular = singular * (torch.arange(n, device=singular.device) < side.rows)
    # rank_cutoff is the larger of a multiple of either argument
    of_frobenius = rank_cutoff(0.0, 1.0, side.rows, side.dim, side.dtype)
    of_largest = max(rank_cutoff(1.0, 0.0, side.rows, side.dim, side.dtype), computed_noise)
    cutoff = torch.maximum(of_frobenius * torch.linalg.vector_norm(singular), of_largest * singular[0])
    values, kept = singular.square(), singular > cutoff
    return MaskedSpectrum(values, vectors, kept, torch.where(kept, values, torch.inf).min())


def top_projector(side: SmallSide) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue and the average of uuᵀ over its eigenspace, by squaring the matrix again and again.

    Normalized to trace 1, ``G^(2^j)`` tends to that average itself, however often the value is repeated. Values within
    7e-8 of the largest, which float32 features do not tell from it, are averaged over as well.

    Args:
        side: Finite and not zero.

    Returns:
        0-D, and shape ``(n, n)``.
    """
    if side.dtype == torch.float64:
        spectrum = masked_spectrum(side)
        return spectrum.values[0], spectrum.projector(spectrum.top())
    power = side.gram / side.gram.diagonal().sum()
    for _ in range(_SQUARINGS):
        power = power @ power.mT  # symmetric and positive whatever the rounding
        power = power / power.diagonal().sum()
    return (side.gram * power).sum(), power


def device_r_well(side: SmallSide, factor: float | Tensor = 1.0) -> tuple[Tensor, DenseGradient]:
    """See `small_r_well`."""
    side, sound = _sound(side)
    top, projector = top_projector(side)
    value = (top.square() / 2 - side.gram.square().sum() / (2 * side.dim)).clamp(min=0)
    return _where(sound, factor * value, 2 * factor * (top * projector - side.gram / side.dim), exact=False)


def device_r_ill(side: SmallSide, factor: float | Tensor = 1.0) -> tuple[Tensor, DenseGradient]:
    """See `small_r_ill`."""
    side, sound = _sound(side)
    spectrum = masked_spectrum(side)
    values, smallest, k = spectrum.values, spectrum.smallest, spectrum.kept.sum()
    width = max(tie_tolerance(len(values), 1.0), rounding(side.dtype)) * values[0]
    sound = sound & (values[0] - smallest > width)
    denominator = torch.where(spectrum.kept, values.square() - smallest.square(), 0.0).sum() / (2 * k)
    small = smallest * spectrum.projector(spectrum.bottom()) - side.gram / k
    return _where(sound, factor / denominator, (2 * factor / denominator.square()) * small, exact=False)


def device_concentration(side: SmallSide) -> tuple[Tensor, DenseGradient]:
    """See `small_concentration`."""
    side, sound = _sound(side)
    top, projector = top_projector(side)
    trace = side.gram.diagonal().sum()
    rest, floor = trace - top, 64 * torch.finfo(torch.float64).eps * trace
    small = -2 * (1 / rest + 1 / top) * projector
    small.diagonal().add_(2 / rest)
    small = torch.where(rest > floor, small, 0.0)
    return _where(sound, torch.log(torch.maximum(rest, floor) / top), small, exact=True)


def device_log_kappa(side: SmallSide) -> tuple[Tensor, DenseGradient]:
    """See `small_log_kappa`."""
    side, sound = _sound(side)
    spectrum = masked_spectrum(side)
    largest, smallest = spectrum.values[0], spectrum.smallest
    top, bottom = spectrum.projector(spectrum.top()), spectrum.projector(spectrum.bottom())
    small = (2 / largest) * top - (2 / smallest) * bottom
    return _where(sound, torch.log(largest) - torch.log(smallest), small, exact=True)


def device_scale_free(
    function: Callable[[SmallSide, Tensor], tuple[Tensor, DenseGradient]], degree: int
) -> Callable[[SmallSide], tuple[Tensor, DenseGradient]]:
    """See `scale_free`."""

    def scaled(side: SmallSide) -> tuple[Tensor, DenseGradient]:
        trace = side.gram.diagonal().sum()
        value, gradient = function(side, (side.dim / trace) ** degree)
        of_factor = torch.where(torch.isfinite(value), -2 * degree * value / trace, 0.0)
        gradient.small.diagonal().add_(of_factor)
        return value, gradient

    return scaled


def _sound(side: SmallSide) -> tuple[SmallSide, Tensor]:
    """The side, or the identity in its place, and whether it is finite and not zero."""
    sound = torch.isfinite(side.gram).all() & (side.gram.diagonal().sum() > 0)
    gram = torch.where(sound, side.gram, torch.eye(len(side.gram), dtype=torch.float64, device=side.gram.device))
    features = side.features
    if features is not None:
        identity = torch.eye(*features.shape, dtype=features.dtype, device=features.device)
        features = torch.where(sound, features, identity)
    return side._replace(gram=gram, features=features), sound


def _where(sound: Tensor, value: Tensor, small: Tensor, exact: bool) -> tuple[Tensor, DenseGradient]:
    return torch.where(sound, value, torch.nan), DenseGradient(torch.where(sound, small, 0.0), exact)
