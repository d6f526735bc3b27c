"""One update of Algorithm 1, without an inverse, and the step sizes that provably move κ the right way.

The paper preconditions the gradient of ``R(H)``, ``H = θᵀKθ``, with ``K⁻¹``. As ``∇_θ R = 2Kθ ∇_H R`` it cancels: the
update is ``θ ← θ − 2ηθ ∇_H R``, also where ``K`` is singular.

Both regularizers have a gradient that the eigenvectors of ``H = ZᵀZ`` diagonalize. With ``Z = U diag(√σ) Vᵀ`` an
update multiplies ``θv_i`` by ``1 − 2η b_i σ_i``, where only the weights ``b`` tell the regularizers apart:

    R_well: b_i = [i in top eigenspace]/m − 1/D         R_ill: b_i = ([i = k] − 1/k) / d²

(``m`` multiplicity of the largest eigenvalue, ``k`` the rank, ``d = ‖H‖_F²/2k − σ_k²/2``.) In features the whole
update is ``θ ← θ − 2η (θZᵀ) U diag(b) Uᵀ Z``: products with ``n`` rows, and one decomposition of the ``n × n`` Gram
matrix. Eigenvalues ``(k,)`` are falling throughout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.errors import PerfectConditioningError, RankError
from hf_immunize.spectra.regularizers import ill_denominator


# Below this ratio the small eigenvalues of the Gram matrix carry too few digits.
_GRAM_IS_ENOUGH = 1e-10
# Eigenvalues this close (relative) to the largest are one eigenspace for R_well: otherwise a gap that closes
# geometrically keeps every step tiny. Once all of them are, the distance shrinks.
TIE = 0.3


class RowSpectrum(NamedTuple):
    """Non-zero eigenvalues of ``H = ZᵀZ`` and the left singular vectors of ``Z``."""

    values: Tensor  # (k,), falling
    left: Tensor  # (n, k)

    @property
    def kappa(self) -> float:
        """Of H."""
        return float(self.values[0] / self.values[-1])


def feature_spectrum(Z: Tensor) -> RowSpectrum:
    """Decompose features ``(n, D)`` in float64, at best with ``n ≤ D`` rows."""
    if Z.shape[0] <= Z.shape[1]:
        values, left = torch.linalg.eigh(Z @ Z.T)
        if values[0] > _GRAM_IS_ENOUGH * values[-1]:
            return RowSpectrum(values.flip(0), left.flip(1))
    left, sigma, _ = torch.linalg.svd(Z, full_matrices=False)
    # Ten units of rounding, as in the rank rule; features here are computed in the same float64.
    keep = sigma > 10 * torch.finfo(Z.dtype).eps * sigma[0]
    if not keep.any():
        raise RankError("Expected features with a spectrum, found all zero: θ has collapsed or the data are zero.")
    return RowSpectrum(sigma[keep].square(), left[:, keep])


def tied(values: Tensor) -> int:
    """How many of the eigenvalues count as the largest one: all within `TIE`, or a smaller distance."""
    top, tie = len(values), 10 * TIE
    while top == len(values) and tie > 1e-12:
        tie /= 10
        top = int((values >= (1 - tie) * values[0]).sum())
    return top


def well_weights(values: Tensor, dim: int) -> Tensor:
    """The weights ``b`` of ``R_well``, averaged over the top eigenspace where it is repeated; D is the p of Eq. 3."""
    top = tied(values)
    weights = values.new_full(values.shape, -1 / dim)
    weights[:top] += 1 / top
    return weights


def well_step(values: Tensor, dim: int) -> float:
    """The largest step of ``R_well`` for which κ(H_P) provably falls (or stays, at κ = 1, where it is 0).

    The top eigenspace of ``m`` values must not sink below the next eigenvalue, nor change order within itself:
    ``η ≤ (1 − r)/(2σ_m(1/m − 1/D) + 2rσ_{m+1}/D)``, ``r = √(σ_{m+1}/σ_m)``, and for m > 1 ``η ≤ 1/(6σ_1(1/m − 1/D))``.
    (The range of the paper's Theorem 4.3 lets the largest eigenvalue be annihilated, after which κ jumps up.)
    """
    top = tied(values)
    share = 1 / top - 1 / dim
    if share <= 0 or top == len(values):
        return 0.0
    last, after = float(values[top - 1]), float(values[top])
    r = (after / last) ** 0.5
    limit = (1 - r) / (2 * last * share + 2 * r * after / dim)
    return min(limit, 1 / (6 * float(values[0]) * share)) if top > 1 else limit


def _denominator(values: Tensor) -> float:
    d = float(ill_denominator(values, values[-1], len(values)))
    if d <= 1e-14 * float(values[0].square()):
        raise PerfectConditioningError(
            "Expected harmful features with κ > 1, found κ = 1, where R_ill is undefined. Start from another θ, as by "
            "theta_init='random'."
        )
    return d


def ill_weights(values: Tensor) -> Tensor:
    """The weights ``b`` of ``R_ill``."""
    weights = values.new_full(values.shape, -1 / len(values))
    weights[-1] += 1
    return weights / _denominator(values) ** 2


def ill_step_limit(values: Tensor) -> float:
    """``d²/(2(1 − 1/k)σ_k)``: below it the smallest eigenvalue shrinks, so κ(H_H) rises; at it, it is annihilated."""
    return _denominator(values) ** 2 / (2 * (1 - 1 / len(values)) * float(values[-1]))


def ill_step(values: Tensor, growth: float) -> float:
    """The step of ``R_ill`` after which κ(H_H) is ``growth`` > 1 times what it was, inside the provable range."""
    # At the fraction a of the limit the extremes are multiplied by (1 − a)² and (1 + aκ/(k−1))².
    limit, root = ill_step_limit(values), growth**0.5
    return (root - 1) / (float(values[0] / values[-1]) / (len(values) - 1) + root) * limit


class Direction(NamedTuple):
    """A ``(D, D)`` direction as the product of thin factors: never formed, only subtracted."""

    tall: Tensor  # (D, k)
    flat: Tensor  # (k, D)

    def norm(self) -> float:
        """Frobenius norm, from ``k × k`` products."""
        square = ((self.tall.T @ self.tall) * (self.flat @ self.flat.T)).sum()
        return float(square.clamp(min=0)) ** 0.5


def directions(theta: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Direction]:
    """``2θ ∇_H R = 2(θZᵀ) U diag(b) Uᵀ Z``, which the update subtracts, for each ``Z``, ``U`` and ``b``."""
    # All at once, so that the large θ is read a single time.
    inner = [left.T @ Z for Z, left, _ in parts]
    tall = (torch.cat(inner) @ theta.T).mul_(2).T
    pieces = tall.split([len(rows) for rows in inner], dim=1)
    return [
        Direction(piece, weights[:, None] * rows)
        for piece, rows, (_, _, weights) in zip(pieces, inner, parts, strict=True)
    ]


def subtract_(theta: Tensor, parts: Sequence[tuple[float, Direction]]) -> Tensor:
    """``θ ← θ − Σ step · direction``, in place, as one product without a ``D × D`` temporary."""
    tall = torch.cat([step * part.tall for step, part in parts], dim=1)
    return theta.addmm_(tall, torch.cat([part.flat for _, part in parts]), alpha=-1)
