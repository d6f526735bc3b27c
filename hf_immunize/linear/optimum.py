"""The ceiling of RIR over all linear maps, the map that reaches it, and what both mean for somebody about to train.

Let ``K_P``, ``K_H`` be the Gram matrices of the benign and the harmful data and ``A = K_P^{1/2} θ``. Then
``κ(H_P) = κ(A)²`` and, with ``M = K_P^{-1/2} K_H K_P^{-1/2}``, ``κ(H_H) ≤ κ(M) κ(A)²``. So every invertible ``θ`` has

    RIR(θ)  ≤  κ(M) · κ(K_P) / κ(K_H)

and ``θ = K_P^{-1/2} Q diag(s)`` with ``M = Q diag(μ) Qᵀ`` attains it for any ``s`` that increases with ``μ``. With
``s_i² = (μ_i/μ_min)^{log t / log κ(M)}`` one dial ``t`` runs along the frontier: ``κ(H_P) = t``, ``κ(H_H) = κ(M) t``.
This bound is this library's, not the paper's. Nothing here squares a matrix: ``M`` enters through the singular values
of ``X_H K_P^{-1/2}``. Every function takes data ``(N, D)`` or their `Factor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_immunize.errors import ArgumentError, RankError, ShapeError
from hf_immunize.linear.inputs import as_data, dtype_of_origin, keep_above_noise
from hf_immunize.spectra.checks import binary_scale, check_count, check_number, check_result, decomposing
from hf_immunize.spectra.ratio import ImmunizationRatio, relative_immunization_ratio


class Factor(NamedTuple):
    """``X = U diag(s) Vᵀ`` without ``U`` and the directions at rounding level; `rows` have the Hessians ``θᵀXᵀXθ``.

    They have full row rank: no null direction of the data can come back as rounding noise through a large ``θ``.
    """

    s: torch.Tensor  # (r,) singular values, falling
    V: torch.Tensor  # (D, r) orthonormal basis of the row space
    num_samples: int
    eps: float  # of the dtype that produced the data

    @property
    def rank(self) -> int:
        """Rank of the data."""
        return len(self.s)

    @property
    def dim(self) -> int:
        """The columns of the data."""
        return self.V.shape[0]

    def unit(self) -> tuple[Factor, float]:
        """The factor of the data divided by a power of two near their size, and that power."""
        scale = binary_scale(self.s)
        return self._replace(s=self.s / scale), scale

    @property
    def rows(self) -> torch.Tensor:
        """``diag(s) Vᵀ``, ``(r, D)``: the data up to a rotation of its samples."""
        return self.s[:, None] * self.V.T

    @property
    def kappa(self) -> float:
        """``κ(K)``, over the non-zero spectrum (Eq. 1 of Zheng et al., 2025)."""
        return float(self.s[0] / self.s[-1]) ** 2


def row_factor(X: Any, name: str = "X", *, produced_dtype: torch.dtype | None = None) -> Factor:
    """Reduce data ``(N, D)`` to its factor; a factor is returned as it is."""
    if isinstance(X, Factor):
        return X
    matrix = as_data(X, name)
    origin = dtype_of_origin(X, produced_dtype)
    with decomposing(name):
        # A tall matrix loses nothing by a QR first, and the decomposition that follows no longer sees N.
        tall = matrix.shape[0] > matrix.shape[1]
        _, s, Vh = torch.linalg.svd(torch.linalg.qr(matrix, mode="r").R if tall else matrix, full_matrices=False)
    keep = keep_above_noise(s, matrix.shape, origin)
    if not keep.any():
        raise RankError(f"Expected {name} with a spectrum, found zero in every cell. Check how it was loaded.")
    return Factor(s[keep], Vh[keep].T, matrix.shape[0], torch.finfo(origin).eps)


def factors(X_benign: Any, X_harmful: Any, produced_dtype: torch.dtype | None = None) -> tuple[Factor, Factor]:
    """The factors of both tasks, over the same columns."""
    P = row_factor(X_benign, "X_benign", produced_dtype=produced_dtype)
    H = row_factor(X_harmful, "X_harmful", produced_dtype=produced_dtype)
    if P.dim != H.dim:
        raise ShapeError(
            f"Expected X_benign and X_harmful of the same columns, found {P.dim} and {H.dim}. Encode both alike."
        )
    return P, H


def null_basis(V: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of the directions that the columns of ``V`` miss."""
    return torch.linalg.qr(V, mode="complete").Q[:, V.shape[1] :]


@dataclass(frozen=True)
class Ceiling:
    """What a linear map after the given features could reach, known before any training.

    Attributes:
        value: The largest RIR of any invertible ``θ``; infinite where the harmful data have directions of their own.
        common_value: The finite ceiling of both data sets projected on the directions they share; the same number as
            ``value`` where both have full rank, NaN where they share none.
        harmful_only: How many harmful directions the benign data do not have. A map scales them freely.
        benign_rank, harmful_rank, common_rank: Ranks of the data, and how many directions they share.
        benign_kappa, harmful_kappa: ``κ(K_P)`` and ``κ(K_H)``.
        pencil_kappa: ``κ(M)`` over the non-zero spectrum, of the shared directions where ``value`` is infinite.
        common_benign_kappa, common_harmful_kappa: ``κ(K_P)`` and ``κ(K_H)`` of the projected data.
        tolerance: Sine of the angle above which a harmful direction counts as outside the benign row space.
        dim: ``D``.
        num_benign, num_harmful: Samples. With fewer than ``dim`` the numbers describe the sample, not the task.

    Example:
        >>> found = rir_ceiling(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0])))
        >>> [round(number, 6) for point in found.frontier(2) for number in point]
        [1.0, 0.25, 4.0, 4.0, 1.0, 16.0]
    """

    value: float
    common_value: float
    harmful_only: int
    benign_rank: int
    harmful_rank: int
    common_rank: int
    benign_kappa: float
    harmful_kappa: float
    pencil_kappa: float
    common_benign_kappa: float
    common_harmful_kappa: float
    tolerance: float
    dim: int
    num_benign: int
    num_harmful: int

    def frontier(self, points: int = 50) -> list[tuple[float, float, float]]:
        """The best pairs of the two ratios: ``(t, (ii), (i))`` for ``t`` from 1 to κ(K_P).

        Where ``harmful_only`` is 0, every map lies on or below this line, ``(i) = value · (ii)``; a single harmful
        direction has κ = 1 under every map, so there ``(i) = 1``. Else it is the line of both data sets projected on
        the directions they share, ``(i) = common_value · (ii)``; empty where they share none.
        """
        check_count(points, "points")
        whole, shared = (self.value, self.benign_kappa), (self.common_value, self.common_benign_kappa)
        slope, kappa = shared if self.harmful_only else whole
        if not math.isfinite(slope):
            return []
        top = math.log(max(kappa, 1.0))
        dials = [math.exp(top * i / max(points - 1, 1)) for i in range(points)]
        flat = self.harmful_rank == 1
        return [(t, t / kappa, 1.0 if flat else slope * t / kappa) for t in dials]


def rir_ceiling(
    X_benign: Any, X_harmful: Any, *, tolerance: float | None = None, produced_dtype: torch.dtype | None = None
) -> Ceiling:
    """How far any invertible linear map can immunize features against a linear probe: the ceiling of RIR.

    Args:
        X_benign: ``(N_P, D)`` benign data or features, as they are (not centred).
        X_harmful: ``(N_H, D)`` harmful ones, the same columns.
        tolerance: Sine of the angle above which a harmful direction lies outside the benign row space; by default the
            square root of the machine epsilon of the dtype that produced the data.
        produced_dtype: The dtype they were computed in, where it is not the one they carry.

    Returns:
        The ceiling and everything it is made of.

    Raises:
        ShapeError, NonFiniteError, RankError: The data do not fit, are not finite, or all zero.
        ArgumentError: A tolerance outside (0, 1).

    Example:
        >>> benign, harmful = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0]))
        >>> ceiling = rir_ceiling(benign, harmful)
        >>> round(ceiling.value, 4), ceiling.harmful_only  # κ(M) = 36, κ(K_P) = 4, κ(K_H) = 9
        (16.0, 0)
    """
    P, H = factors(X_benign, X_harmful, produced_dtype)
    tolerance = _tolerance(P, H, tolerance)
    (P, _), (H, _) = P.unit(), H.unit()  # of which the ceiling does not depend
    common = common_basis(P, H, tolerance)
    outside = H.rank - common.shape[1]
    m = kp = kh = math.nan
    if common.shape[1]:  # κ(M), κ(K_P) and κ(K_H) of the projected data, where both have full column rank
        _, s, Wh = torch.linalg.svd(P.rows @ common, full_matrices=False)
        shared = H.rows @ common
        m, kp, kh = (
            _kappa(sigma) for sigma in (torch.linalg.svdvals(shared @ (Wh.T / s)), s, torch.linalg.svdvals(shared))
        )
    # One harmful direction has κ = 1 under every map: only the benign side can still gain.
    pencil, value = m, P.kappa if H.rank == 1 else math.inf
    if outside == 0:
        pencil = _kappa(torch.linalg.svdvals(H.rows @ whitener(P))[: H.rank])
        value = pencil * P.kappa / H.kappa
    return Ceiling(
        value=value,
        common_value=m * kp / kh,
        harmful_only=outside,
        benign_rank=P.rank,
        harmful_rank=H.rank,
        common_rank=common.shape[1],
        benign_kappa=P.kappa,
        harmful_kappa=H.kappa,
        pencil_kappa=pencil,
        common_benign_kappa=kp,
        common_harmful_kappa=kh,
        tolerance=tolerance,
        dim=P.dim,
        num_benign=P.num_samples,
        num_harmful=H.num_samples,
    )


def _tolerance(P: Factor, H: Factor, given: float | None) -> float:
    """The sine from which a harmful direction counts as outside, strictly between 0 and 1."""
    if given is None:
        return max(P.eps, H.eps) ** 0.5
    tolerance = check_number(given, "tolerance, the sine of an angle,", 0, 1)
    if tolerance in (0, 1):
        raise ArgumentError(f"Expected tolerance, the sine of an angle, between 0 and 1, found {given!r}.")
    return tolerance


def _kappa(sigma: torch.Tensor) -> float:
    return float(sigma[0] / sigma[-1]) ** 2


def common_basis(P: Factor, H: Factor, tolerance: float) -> torch.Tensor:
    """Orthonormal basis ``(D, c)`` of the harmful directions that lie in the benign row space."""
    if P.rank == P.dim:
        return H.V
    # Right singular vectors in rising order of the sine: those that VH shares with the benign row space come first.
    _, sines, Wh = torch.linalg.svd(null_basis(P.V).T @ H.V, full_matrices=True)
    outside = int((sines > tolerance).sum())
    return H.V @ Wh[outside:].T


def whitener(P: Factor) -> torch.Tensor:
    """``(D, r)`` map after which the benign features are orthonormal: ``K_P^{-1/2}`` on its range, up to rotation."""
    return P.V / P.s


# How far the map lifts harmful directions that the benign data do not have above the shared ones.
_GAIN = 1e3


def optimal_map(X_benign: Any, X_harmful: Any, *, t: float | None = None) -> torch.Tensor:
    """The ``θ`` that attains the ceiling, in closed form: ``(D, D)`` float64, invertible.

    The dial ``t`` is the benign ``κ(H_P)`` after the map; by default ``κ(K_P)``, as it was. Where the harmful data
    have directions of their own the ceiling is infinite and no ``θ`` attains it: the map then lifts their smallest
    singular value to a thousand times the largest of the shared ones, and the shared part stays optimal.

    >>> theta = optimal_map(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0])), t=1.0)
    >>> (theta.T @ torch.diag(torch.tensor([4.0, 1.0]).double()) @ theta).round(decimals=6)  # K_P is whitened
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    P, H = factors(X_benign, X_harmful)
    t = P.kappa if t is None else check_number(t, "t, the benign condition number to end with,", 1)
    tolerance = _tolerance(P, H, None)
    (P, scale), (H, _) = P.unit(), H.unit()
    null = null_basis(P.V)
    unseen = H.rows @ null
    U, strengths, Wh = torch.linalg.svd(unseen, full_matrices=True)
    outside = H.rank - common_basis(P, H, tolerance).shape[1]
    # The harmful-only directions are decided; what they explain of the samples is no longer the shared part's.
    own = U[:, :outside]
    whitened = H.rows @ whitener(P)
    rest = whitened - own @ (own.T @ whitened)
    _, sigma, Qh = torch.linalg.svd(rest, full_matrices=True)
    rank = min(H.rank - outside, len(sigma))
    dial = sigma.new_ones(P.rank)  # s, between 1 and √t, increasing with the harmful singular values √μ
    log_mu = 2 * sigma[:rank].log()
    # κ(M) = 1 up to rounding: the dial is 0/0, and whitening alone is optimal.
    if rank and float(log_mu[0] - log_mu[-1]) > 1e-12:
        dial[:rank] = torch.exp(0.5 * math.log(t) * (log_mu - log_mu[-1]) / (log_mu[0] - log_mu[-1]))
    shared = (whitener(P) @ Qh.T) * dial
    # Directions that neither task sees get the typical size of the rest of θ, which stays invertible.
    outer = Wh.new_full((Wh.shape[0],), float(torch.linalg.svdvals(shared).log().mean().exp()))
    if outside:
        # Without a shared direction there is nothing to exceed but rounding.
        largest = H.s[0] if outside == H.rank else torch.linalg.matrix_norm(H.rows @ shared, 2)
        outer[:outside] = _GAIN * largest / strengths[:outside]
    return check_result(torch.cat([shared, null @ (Wh.T * outer)], dim=1) / scale, "the map")


def map_ratio(P: Factor, H: Factor, theta: torch.Tensor) -> ImmunizationRatio:
    """Exact RIR of the map ``θ``, ``(D, D')``, against the identity (Eq. 15), by a decomposition of the features."""
    # The rank rule compares features of equal width, and a map may change it; columns of zeros leave κ alone.
    width, theta = max(theta.shape), theta / binary_scale(theta)
    before = [F.unit()[0].rows for F in (P, H)]
    benign, harmful, benign_reference, harmful_reference = (
        torch.nn.functional.pad(Z, (0, width - Z.shape[1])) for Z in (*(Z @ theta for Z in before), *before)
    )
    return relative_immunization_ratio(
        harmful=harmful, harmful_reference=harmful_reference, benign=benign, benign_reference=benign_reference
    )


# From which ceiling on immunization by conditioning is worth trying; the paper's own results start at 3 and reach 350.
_HARDLY, _WORTHWHILE = 2.0, 10.0


def advice(ceiling: Ceiling) -> str:
    """One sentence: are these two tasks separable by conditioning at all, and what limits it."""
    if math.isinf(ceiling.value):
        text = (
            f"A linear map can immunize without limit here, because {ceiling.harmful_only} of the "
            f"{ceiling.harmful_rank} harmful directions do not occur in the benign data"
        )
        if ceiling.num_benign < ceiling.dim:
            few = f"{ceiling.num_benign} benign samples in {ceiling.dim} dimensions"
            return f"{text}, but with {few} some may only be missing: add benign data and look again."
        if ceiling.common_rank == 0:
            return f"{text}; the two tasks share no direction at all."
        return f"{text}; on the directions that both use the ceiling is {ceiling.common_value:.3g}."
    if ceiling.value < _HARDLY:
        how = "the same" if ceiling.value < 1.01 else "almost the same"
        return (
            f"No linear map can immunize here: both tasks use the same directions in {how} proportions (ceiling "
            f"{ceiling.value:.3g}), so change the features, not the map after them."
        )
    if ceiling.value < _WORTHWHILE:
        return (
            f"A linear map can immunize only weakly here (ceiling {ceiling.value:.3g}): expect little from "
            "conditioning unless earlier layers of the network move as well."
        )
    return (
        f"A linear map can immunize here: harmful probing can become {ceiling.value:.3g} times worse conditioned "
        "while benign probing stays as it is."
    )
