"""One update of Algorithm 1, without an inverse, and the step sizes that provably move κ the right way.

The paper preconditions the gradient of ``R(H)``, ``H = θᵀKθ``, with ``K⁻¹`` (Zheng et al., ICML 2025, Algorithm 1).
The chain rule gives ``∇_θ R = 2Kθ ∇_H R``, so the preconditioner cancels and the update is ``θ ← θ − 2ηθ ∇_H R``. It
needs neither ``K`` nor its inverse and holds where ``K`` is singular.

Both regularizers have a gradient that the eigenvectors of ``H = ZᵀZ`` diagonalize. With ``Z = U diag(√σ) Vᵀ`` an
update multiplies ``θv_i`` by ``1 − 2η b_i σ_i``, where only the weights ``b`` tell the regularizers apart:

    R_well: b_i = [i in top eigenspace]/m − 1/D         R_ill: b_i = ([i = k] − 1/k) / d²

(``m`` multiplicity of the largest eigenvalue, ``k`` the rank, ``d = ‖H‖_F²/2k − σ_k²/2``.) In features the whole
update is ``θ ← θ − 2η (θZᵀ) U diag(b) Uᵀ Z``: products with ``n`` rows, and one decomposition of the ``n × n`` Gram
matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_immunize.errors import ArgumentError, PerfectConditioningError, RankError


# Below this ratio the small eigenvalues of the Gram matrix carry too few digits, and the SVD of the features decides.
_GRAM_IS_ENOUGH = 1e-10
# Eigenvalues this close (relative) to the largest are one eigenspace for R_well: otherwise a gap that closes
# geometrically keeps every step tiny. Once all of them are, the distance shrinks.
TIE = 0.3


class Spectrum(NamedTuple):
    """Non-zero eigenvalues of ``H = ZᵀZ`` and the left singular vectors of ``Z``.

    Attributes:
        values: ``(k,)``, falling.
        left: ``(n, k)``.
    """

    values: torch.Tensor
    left: torch.Tensor


def feature_spectrum(Z: torch.Tensor) -> Spectrum:
    """Decompose features ``(n, D)``, at best with ``n ≤ D`` rows.

    The Gram matrix serves while its smallest eigenvalue keeps six digits; below that, or with dependent rows, the
    singular value decomposition of ``Z`` itself.

    Args:
        Z: ``(n, D)`` features in float64.

    Raises:
        RankError: All features are zero.

    Example:
        >>> feature_spectrum(torch.diag(torch.tensor([1.0, 3.0, 0.0]).double())).values
        tensor([9., 1.], dtype=torch.float64)
    """
    if Z.shape[0] <= Z.shape[1]:
        values, left = torch.linalg.eigh(Z @ Z.T)
        if values[0] > _GRAM_IS_ENOUGH * values[-1]:
            return Spectrum(values.flip(0), left.flip(1))
    left, sigma, _ = torch.linalg.svd(Z, full_matrices=False)
    # Ten units of rounding, as in the rank rule; features here are computed in the same float64.
    keep = sigma > 10 * torch.finfo(Z.dtype).eps * sigma[0]
    if not keep.any():
        raise RankError(
            "All features are zero, so they have no condition number; θ has collapsed or the data are zero."
        )
    return Spectrum(sigma[keep].square(), left[:, keep])


def tied(values: torch.Tensor, tie: float = TIE) -> int:
    """How many of the falling eigenvalues count as the largest one: all within ``tie``, or a smaller distance."""
    top = int((values >= (1 - tie) * values[0]).sum())
    while top == len(values) and tie > 1e-12:
        tie /= 10
        top = int((values >= (1 - tie) * values[0]).sum())
    return top


def well_weights(values: torch.Tensor, dim: int, tie: float = TIE) -> torch.Tensor:
    """The weights ``b`` of ``R_well`` (module docstring), averaged over the top eigenspace where it is repeated.

    Args:
        values: ``(k,)`` falling eigenvalues of ``H``.
        dim: ``D``, the ``p`` of Eq. 3.
        tie: Relative distance within which eigenvalues count as repeated.
    """
    top = tied(values, tie)
    weights = values.new_full(values.shape, -1 / dim)
    weights[:top] += 1 / top
    return weights


def well_step(values: torch.Tensor, dim: int, tie: float = TIE) -> float:
    """The largest step of ``R_well`` for which κ(H_P) provably falls (or stays, at κ = 1).

    The top eigenspace of ``m`` values must not sink below the next eigenvalue, nor change order within itself:

        η ≤ (1 − r) / (2σ_m(1/m − 1/D) + 2rσ_{m+1}/D),   r = √(σ_{m+1}/σ_m)      and, for m > 1,
        η ≤ 1 / (6σ_1(1/m − 1/D))

    Then every eigenvalue outside the top eigenspace grows and the largest falls. (The range of the paper's Theorem 4.3
    lets the largest eigenvalue be annihilated, after which κ jumps up; tests keep such cases.)

    Args:
        values: ``(k,)`` falling eigenvalues of ``H``.
        dim: ``D``.
        tie: As in :func:`well_weights`.

    Returns:
        The step, 0 where the whole spectrum is one eigenspace of full rank, which leaves nothing to gain.

    Example:
        >>> round(well_step(torch.tensor([4.0, 1.0]), 2), 4)
        0.1111
    """
    top = tied(values, tie)
    share = 1 / top - 1 / dim
    if share <= 0:
        return 0.0
    first, last = float(values[0]), float(values[top - 1])
    limit = 1 / (6 * first * share) if top > 1 else float("inf")
    if top < len(values):
        after = float(values[top])
        r = (after / last) ** 0.5
        limit = min(limit, (1 - r) / (2 * last * share + 2 * r * after / dim))
    return limit if top < len(values) else 0.0


def ill_denominator(values: torch.Tensor) -> float:
    """``d = ‖H‖_F²/2k − σ_k²/2`` of Eq. 12, summed as differences so that nothing cancels.

    Raises:
        PerfectConditioningError: κ(H) = 1, where ``R_ill`` is undefined.
    """
    spread = (values - values[-1]) * (values + values[-1])
    d = float(spread.sum()) / (2 * len(values))
    if d <= 1e-14 * float(values[0].square()):
        raise PerfectConditioningError(
            "R_ill is undefined where the harmful features are perfectly conditioned (κ = 1, its denominator is 0); "
            "start from another θ than one that whitens them, for example theta_init='random'."
        )
    return d


def ill_weights(values: torch.Tensor) -> torch.Tensor:
    """The weights ``b`` of ``R_ill`` (module docstring).

    Args:
        values: ``(k,)`` falling eigenvalues of ``H``.

    Raises:
        PerfectConditioningError: κ(H) = 1.
    """
    weights = values.new_full(values.shape, -1 / len(values))
    weights[-1] += 1
    return weights / ill_denominator(values) ** 2


def ill_step_limit(values: torch.Tensor) -> float:
    """``d²/(2(1 − 1/k)σ_k)``: below it the smallest eigenvalue shrinks but stays, so κ(H_H) rises.

    At the limit it is annihilated, the rank drops, and a κ over the non-zero spectrum *falls*.

    Raises:
        PerfectConditioningError: κ(H) = 1.
    """
    return ill_denominator(values) ** 2 / (2 * (1 - 1 / len(values)) * float(values[-1]))


def ill_step(values: torch.Tensor, growth: float) -> float:
    """The step of ``R_ill`` after which κ(H_H) is ``growth`` times what it was, always inside the provable range.

    With ``a`` the fraction of :func:`ill_step_limit`, the extremes are multiplied by ``(1 − a)²`` and
    ``(1 + aκ/(k−1))²``; setting their ratio to ``growth`` is linear in ``a``.

    Args:
        values: ``(k,)`` falling eigenvalues of ``H``.
        growth: Above 1.

    Raises:
        ArgumentError: ``growth`` is not above 1.
        PerfectConditioningError: κ(H) = 1.
    """
    if not growth > 1:
        raise ArgumentError(f"growth must be above 1, found {growth!r}: it is the factor by which κ(H_H) rises.")
    limit = ill_step_limit(values)
    q = float(values[0] / values[-1]) / (len(values) - 1)
    root = growth**0.5
    return (root - 1) / (q + root) * limit


class Direction(NamedTuple):
    """A ``(D, D)`` direction as the product of its thin factors: never formed, only subtracted.

    Attributes:
        tall: ``(D, k)``.
        flat: ``(k, D)``.
    """

    tall: torch.Tensor
    flat: torch.Tensor

    def norm(self) -> float:
        """Frobenius norm, from ``k × k`` products."""
        square = ((self.tall.T @ self.tall) * (self.flat @ self.flat.T)).sum()
        return float(square.clamp(min=0)) ** 0.5


def direction(theta: torch.Tensor, Z: torch.Tensor, left: torch.Tensor, weights: torch.Tensor) -> Direction:
    """The direction ``2θ ∇_H R = 2(θZᵀ) U diag(b) Uᵀ Z`` that the update subtracts.

    Args:
        theta: ``(D, D)``.
        Z: ``(n, D)`` features ``Xθ``.
        left: ``(n, k)`` left singular vectors.
        weights: ``(k,)`` the ``b`` of a regularizer.
    """
    return directions(theta, [(Z, left, weights)])[0]


def directions(
    theta: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> list[Direction]:
    """:func:`direction` of several features at once, so that the large ``θ`` is read a single time.

    Args:
        theta: ``(D, D)``.
        parts: ``Z``, ``left`` and ``weights`` of each.
    """
    inner = [left.T @ Z for Z, left, _ in parts]
    tall = (torch.cat(inner) @ theta.T).mul_(2).T
    pieces = tall.split([len(rows) for rows in inner], dim=1)
    return [
        Direction(piece, weights[:, None] * rows)
        for piece, rows, (_, _, weights) in zip(pieces, inner, parts, strict=True)
    ]


def subtract_(theta: torch.Tensor, parts: Sequence[tuple[float, Direction]]) -> torch.Tensor:
    """``θ ← θ − Σ step · direction``, in place, as one product without a ``D × D`` temporary.

    Args:
        theta: ``(D, D)``, changed.
        parts: Steps and directions.

    Returns:
        ``theta``.
    """
    tall = torch.cat([step * part.tall for step, part in parts], dim=1)
    return theta.addmm_(tall, torch.cat([part.flat for _, part in parts]), alpha=-1)
