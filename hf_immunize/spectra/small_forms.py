"""The regularizers on the small side: value, and what makes the gradient.

Every function here takes a `SmallSide`, a Gram matrix G of features Z, and a factor on the result, and returns the
value with the symmetric matrix M of G's size for which the gradient is ``∂f/∂Z = M·Z`` (G = ZZᵀ) or ``Z·M``
(G = ZᵀZ). The features' side and the Hessian's side share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.errors import PerfectConditioningError
from hf_immunize.spectra.extremes import bottom_of_full_rank, hessian_spectrum, top_eigenspace
from hf_immunize.spectra.gram import CHUNK, product_by_rows
from hf_immunize.spectra.krylov import tie_tolerance
from hf_immunize.spectra.mixed import largest_pair_by_features, smallest_pair_by_features
from hf_immunize.spectra.small_side import SmallSide, wide


# The largest diagonal entry of a Gram matrix in float32 of which squares neither overflow nor vanish.
_ORDINARY = (1e-12, 1e12)
# How far its trace may be off: a third of what a value in float32 is rounded by.
_BIAS = 4e-8


class SpaceGradient(NamedTuple):
    """``M = gram·G + identity·I + Σ_j weight_j·P_j``, P_j the average of uuᵀ over the columns u of a basis.

    Attributes:
        gram: Factor of G.
        identity: Factor of I.
        spaces: Orthonormal bases, each of shape ``(n, m_j)``, with their weights.
    """

    gram: float
    identity: float
    spaces: tuple[tuple[Tensor, float], ...]

    def matrix(self, gram: Tensor) -> Tensor:
        """M, shape ``(n, n)``, in the dtype of G."""
        return self._over(gram.clone())

    def _over(self, gram: Tensor) -> Tensor:
        """M in the place of G."""
        scale = self.gram
        for basis, weight in self.spaces:
            basis = basis.to(gram.dtype)
            gram.addmm_(basis, basis.mT, beta=scale, alpha=weight / basis.shape[1])
            scale = 1.0
        if not self.spaces:
            gram.mul_(scale)
        if self.identity:
            gram.diagonal().add_(self.identity)
        return gram

    def times(self, z: Tensor, gram: Tensor) -> Tensor:
        """``M·Z`` or ``Z·M``, whichever side is the small one, in the features' dtype, float32 at least; G is lost."""
        if self.gram:
            return times_small(z, self._over(gram))

        def times(rows: Tensor) -> Tensor:
            product = self.identity * rows
            for basis, weight in self.spaces:
                product.addmm_(rows @ basis, basis.mT, alpha=weight / basis.shape[1])
            return product

        # Without G it is a product with a few vectors. What is left of Z beside them, and what a vector of a small
        # singular value finds in it, are differences of larger numbers: in float64.
        return product_by_rows(z, times, torch.float64, transposed=wide(z))


def times_small(z: Tensor, small: Tensor) -> Tensor:
    """``M·Z`` or ``Z·M``, M symmetric, in the features' dtype, float32 at least."""
    work = torch.promote_types(z.dtype, torch.float32)
    small = small.to(work)
    if z.dtype == work:
        return small @ z if wide(z) else z @ small
    return product_by_rows(z, lambda rows: rows @ small, work, transposed=wide(z))


# The factor enters before anything is rounded to the features' dtype: without it the gradient of R_ill, of degree −5
# in the features, leaves the range of float32 while the scale-free one is of ordinary size.
def small_r_well(side: SmallSide, factor: float = 1.0) -> tuple[float, SpaceGradient]:
    """``½σ_1² − tr(G²)/2D`` and ``2(σ_1 uuᵀ − G/D)``."""
    top, basis = top_eigenspace(side.gram, vector_accuracy(side.dtype))
    value = max(0.0, top**2 / 2 - float(torch.linalg.vector_norm(side.gram)) ** 2 / (2 * side.dim))
    return factor * value, SpaceGradient(-2 * factor / side.dim, 0.0, ((basis, 2 * factor * top),))


def single_r_well(side: SmallSide, factor: float = 1.0) -> tuple[float, SpaceGradient] | None:
    """`small_r_well` from G in float32; None where its rounding would be seen.

    Of the value and of the gradient G gives the smaller part, unless the eigenvalues are all but equal. The top pair
    is found to the accuracy that float64 gives.
    """
    squares = _single_squares(side)
    if squares is None:
        return None
    found = largest_pair_by_features(side.gram, _tall(side), vector_accuracy(side.dtype))
    if found is None or squares / side.dim > found.value**2 / 2:
        return None
    gradient = SpaceGradient(-2 * factor / side.dim, 0.0, ((found.vector, 2 * factor * found.value),))
    return factor * (found.value**2 - squares / side.dim) / 2, gradient


def single_r_ill(side: SmallSide, factor: float = 1.0) -> tuple[float, SpaceGradient] | None:
    """`small_r_ill` from G in float32, where the rank is full by far; None where its rounding would be seen."""
    n, squares = side.gram.shape[0], _single_squares(side)
    if squares is None:
        return None
    slack = squares / float(side.gram.diagonal().sum()) / n
    found = smallest_pair_by_features(side.gram, _tall(side), vector_accuracy(side.dtype), slack)
    if found is None or squares <= 2 * n * found.value**2:
        return None
    denominator = (squares - n * found.value**2) / (2 * n)
    scale = 2 * factor / denominator**2
    return factor / denominator, SpaceGradient(-scale / n, 0.0, ((found.vector, scale * found.value),))


def _tall(side: SmallSide) -> Tensor:
    assert side.features is not None, "an estimate in float32 is made of features"
    return side.features.mT if wide(side.features) else side.features


def _single_squares(side: SmallSide) -> float | None:
    """``tr(G²)`` of G in float32; None where G is not to be trusted: out of range, not finite, or biased.

    Rounding errors of long sums add up where the features lie on a coarse grid, as those do that came from bfloat16,
    and cancel elsewhere. The trace, which the features tell exactly, shows which.
    """
    features, largest = side.features, float(side.gram.diagonal().max())
    assert features is not None, "an estimate in float32 is made of features"
    if not _ORDINARY[0] < largest < _ORDINARY[1]:
        return None
    entries = (rows.to(torch.float64).flatten() for rows in features.split(CHUNK // 8))  # in the cache
    trace = math.fsum(float(part @ part) for part in entries)
    if abs(float(side.gram.diagonal().sum(dtype=torch.float64)) - trace) > _BIAS * trace:
        return None
    # norms of rows in float32, the sum of their squares in float64: a long sum in float32 would be off
    return float(torch.linalg.vector_norm(side.gram, dim=1).to(torch.float64).square().sum())


def small_r_ill(side: SmallSide, factor: float = 1.0) -> tuple[float, SpaceGradient]:
    """``1/d``, ``d = Σ(σ_i² − σ_k²)/2k``, and ``2(σ_k uuᵀ − G/k)/d²``."""
    n = side.gram.shape[0]
    squares = float(torch.linalg.vector_norm(side.gram)) ** 2
    # The vector's part of the gradient is σ_k to the whole's σ_1/n at least, and σ_1 ≥ tr(G²)/tr(G).
    slack = squares / float(side.gram.diagonal().sum()) / n
    found = bottom_of_full_rank(side, vector_accuracy(side.dtype), slack)
    # Near κ = 1 the sum of squares less the smallest is all cancellation, and κ = 1 itself is to be told from it.
    if found is not None and squares > 2 * n * found.value**2:
        k, smallest, basis = n, found.value, found.vector
        denominator = (squares - n * smallest**2) / (2 * n)
    else:
        values, vectors = hessian_spectrum(side)
        k, smallest, width = len(values), values[-1], tie_tolerance(n, values[0])
        denominator = ill_denominator(values, max(width, rounding(side.dtype) * values[0]))
        basis = vectors[:, sum(value > smallest + width for value in values) : k]
    scale = 2 * factor / denominator**2
    return factor / denominator, SpaceGradient(-scale / k, 0.0, ((basis, scale * smallest),))


def small_concentration(side: SmallSide) -> tuple[float, SpaceGradient]:
    """``log((tr G − σ_1)/σ_1)`` and ``2(I − uuᵀ)/(tr G − σ_1) − 2uuᵀ/σ_1``."""
    top, basis = top_eigenspace(side.gram, vector_accuracy(side.dtype))
    trace = float(side.gram.diagonal().sum())
    rest, floor = trace - top, 64 * torch.finfo(torch.float64).eps * trace
    if rest <= floor:
        return math.log(floor / top), SpaceGradient(0.0, 0.0, ())
    return math.log(rest / top), SpaceGradient(0.0, 2 / rest, ((basis, -2 * (1 / rest + 1 / top)),))


def small_log_kappa(side: SmallSide) -> tuple[float, SpaceGradient]:
    """``log σ_1 − log σ_k`` and ``2(u_1u_1ᵀ/σ_1 − u_ku_kᵀ/σ_k)``."""
    accuracy = vector_accuracy(side.dtype)
    found = bottom_of_full_rank(side, accuracy)
    if found is not None:
        smallest, bottom = found.value, found.vector
        largest, top = top_eigenspace(side.gram, accuracy)
    else:
        values, vectors = hessian_spectrum(side)
        largest, smallest, width = values[0], values[-1], tie_tolerance(vectors.shape[0], values[0])
        top = vectors[:, : sum(value >= largest - width for value in values)]
        bottom = vectors[:, sum(value > smallest + width for value in values) : len(values)]
    spaces = ((top, 2 / largest), (bottom, -2 / smallest))
    return math.log(largest) - math.log(smallest), SpaceGradient(0.0, 0.0, spaces)


def scale_free(
    function: Callable[[SmallSide, float], tuple[float, SpaceGradient]], degree: int
) -> Callable[[SmallSide], tuple[float, SpaceGradient]]:
    """The function of ``cH``, ``c = D/tr H``, where it is homogeneous in H of the given degree."""

    def scaled(side: SmallSide) -> tuple[float, SpaceGradient]:
        trace = float(side.gram.diagonal().sum())
        value, gradient = function(side, (side.dim / trace) ** degree)
        return value, gradient._replace(identity=gradient.identity - 2 * degree * value / trace)

    return scaled


def single_scale_free(
    function: Callable[[SmallSide, float], tuple[float, SpaceGradient] | None], degree: int
) -> Callable[[SmallSide], tuple[float, SpaceGradient] | None]:
    """`scale_free` of a function that may give None."""

    def scaled(side: SmallSide) -> tuple[float, SpaceGradient] | None:
        trace = float(side.gram.diagonal().sum(dtype=torch.float64))
        found = function(side, (side.dim / trace) ** degree) if trace > _ORDINARY[0] else None
        if found is None:
            return None
        value, gradient = found
        return value, gradient._replace(identity=gradient.identity - 2 * degree * value / trace)

    return scaled


def ill_denominator(values: list[float], width: float) -> float:
    """``(1/2k)Σσ_i² − ½σ_k²`` as a sum of differences, which loses nothing by cancellation.

    Args:
        values: The non-zero values, descending.
        width: Spread within which they all count as one.

    Raises:
        PerfectConditioningError: If they do, where the denominator vanishes.
    """
    if values[0] - values[-1] <= width:
        raise PerfectConditioningError(
            f"Expected κ > 1 in R_ill, found {len(values)} equal non-zero singular value(s) ({values[0]:.3g}), where "
            "R_ill is undefined. Use at least two different samples in a harmful batch."
        )
    return math.fsum(value**2 - values[-1] ** 2 for value in values) / (2 * len(values))


def vector_accuracy(dtype: torch.dtype) -> float:
    """Float32 gradients need no vector beyond float32; float64 ones are compared with references to 1e-10."""
    return 1e-12 if dtype == torch.float64 else 1e-8


def rounding(dtype: torch.dtype) -> float:
    """Relative spread of equal eigenvalues once the features are rounded to their dtype."""
    return 8 * torch.finfo(dtype).eps
