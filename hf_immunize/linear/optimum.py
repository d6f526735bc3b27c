"""The ceiling of RIR over all linear maps, and the map that reaches it.

Let ``K_P``, ``K_H`` be the Gram matrices of the benign and the harmful data and ``A = K_P^{1/2} θ``. Then
``κ(H_P) = κ(A)²`` and, with ``M = K_P^{-1/2} K_H K_P^{-1/2}``, ``κ(H_H) ≤ κ(M) κ(A)²``. So every invertible ``θ`` has

    RIR(θ)  ≤  κ(M) · κ(K_P) / κ(K_H)

and ``θ = K_P^{-1/2} Q diag(s)`` with ``M = Q diag(μ) Qᵀ`` attains it for any ``s`` that increases with ``μ``. With
``s_i² = (μ_i/μ_min)^{log t / log κ(M)}`` one dial ``t`` runs along the frontier: ``κ(H_P) = t``, ``κ(H_H) = κ(M) t``.
This bound is this library's, not the paper's.

Nothing here squares a matrix: ``M`` enters through the singular values of ``X_H K_P^{-1/2}``, so ratios up to the
inverse of rounding keep their digits.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from hf_immunize.errors import ArgumentError
from hf_immunize.linear.checks import same_columns
from hf_immunize.linear.factor import Factor, null_basis, row_factor
from hf_immunize.spectra.checks import check_count, check_number, check_result


@dataclass(frozen=True)
class Ceiling:
    """What a linear map behind the given features could reach, known before any training.

    Attributes:
        value: The largest RIR of any invertible ``θ``; infinite where the harmful data have directions of their own.
        common_value: The finite ceiling of both data sets projected on the directions they share; the same number as
            ``value`` where both have full rank, NaN where they share none.
        harmful_only: How many directions of the harmful data the benign data do not have. A map scales them freely, at
            no cost to the benign task.
        benign_rank: Rank of the benign data.
        harmful_rank: Rank of the harmful data.
        common_rank: How many directions they share.
        benign_kappa: ``κ(K_P)``.
        harmful_kappa: ``κ(K_H)``.
        pencil_kappa: ``κ(M)`` over the non-zero spectrum, of the shared directions where ``value`` is infinite.
        common_benign_kappa: ``κ(K_P)`` of the projected data.
        common_harmful_kappa: ``κ(K_H)`` of the projected data.
        tolerance: Sine of the angle above which a harmful direction counts as outside the benign row space.
        dim: ``D``.
        num_benign: Benign samples. With fewer than ``dim`` the numbers describe the sample rather than the task.
        num_harmful: Harmful samples.
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

        Where the benign data have every harmful direction (``harmful_only`` is 0), every map lies on or below this
        line, which is straight through the origin in linear axes and of slope 1 in logarithmic ones:
        ``(i) = value · (ii)``. A single harmful direction has κ = 1 under every map, so there ``(i) = 1``.

        Where some are absent there is no such line for all the data. What is returned is then the line of both data
        sets projected on the shared directions, ``(i) = common_value · (ii)`` for ``t`` up to ``common_benign_kappa``;
        it is empty where they share none.
        """
        check_count(points, "points")
        slope, kappa = self.value, self.benign_kappa
        if self.harmful_only:
            slope, kappa = self.common_value, self.common_benign_kappa
        if not math.isfinite(slope):
            return []
        top = math.log(max(kappa, 1.0))
        dials = [math.exp(top * i / max(points - 1, 1)) for i in range(points)]
        flat = self.harmful_rank == 1
        return [(t, t / kappa, 1.0 if flat else slope * t / kappa) for t in dials]


def rir_ceiling(
    X_benign: Any,
    X_harmful: Any,
    *,
    tolerance: float | None = None,
    produced_dtype: torch.dtype | None = None,
) -> Ceiling:
    """How far any invertible linear map can immunize features against a linear probe: the ceiling of RIR.

    Args:
        X_benign: ``(N_P, D)`` benign data or features, as they are (not centred).
        X_harmful: ``(N_H, D)`` harmful ones, the same columns.
        tolerance: Sine of the angle above which a harmful direction lies outside the benign row space. Default: the
            square root of the machine epsilon of the dtype that produced the data.
        produced_dtype: The dtype they were computed in, where it is not the one they carry.

    Returns:
        The ceiling and everything it is made of.

    Raises:
        ShapeError: Different numbers of columns, fewer than two rows, not a matrix.
        NonFiniteError: A cell is NaN or infinite; the message names row and column.
        RankError: One data set is all zero.
        ArgumentError: A tolerance outside (0, 1).

    Example:
        >>> benign, harmful = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0]))
        >>> ceiling = rir_ceiling(benign, harmful)
        >>> round(ceiling.value, 4), ceiling.harmful_only  # κ(M) = 36, κ(K_P) = 4, κ(K_H) = 9
        (16.0, 0)
    """
    P = row_factor(X_benign, "X_benign", produced_dtype=produced_dtype)
    H = row_factor(X_harmful, "X_harmful", produced_dtype=produced_dtype)
    return factor_ceiling(P, H, tolerance)


def factor_ceiling(P: Factor, H: Factor, tolerance: float | None = None) -> Ceiling:
    """:func:`rir_ceiling` of factors computed before."""
    same_columns(P.V.T, H.V.T, ("X_benign", "X_harmful"))
    tolerance = _tolerance(P, H, tolerance)
    (P, _), (H, _) = P.unit(), H.unit()  # of which the ceiling does not depend
    common = common_basis(P, H, tolerance)
    outside = H.rank - common.shape[1]
    common_kappas = _projected(P, H, common) if common.shape[1] else (math.nan,) * 3
    m, kp, kh = common_kappas
    pencil = m
    if outside == 0:
        pencil = _kappa(torch.linalg.svdvals(H.rows @ whitener(P))[: H.rank])
        value = pencil * P.kappa / H.kappa
    elif H.rank == 1:
        # One harmful direction has κ = 1 under every map: only the benign side can still gain.
        value = P.kappa
    else:
        value = math.inf
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
    tolerance = (
        max(P.eps, H.eps) ** 0.5 if given is None else check_number(given, "tolerance, the sine of an angle,", 0, 1)
    )
    if not 0 < tolerance < 1:
        raise ArgumentError(f"tolerance is the sine of an angle, so it lies between 0 and 1, found {tolerance!r}.")
    return tolerance


def _kappa(sigma: torch.Tensor) -> float:
    return float(sigma[0] / sigma[-1]) ** 2


def _projected(P: Factor, H: Factor, basis: torch.Tensor) -> tuple[float, float, float]:
    """``κ(M)``, ``κ(K_P)`` and ``κ(K_H)`` of the data projected on ``basis``, where both have full column rank."""
    _, s, Wh = torch.linalg.svd(P.rows @ basis, full_matrices=False)
    harmful = H.rows @ basis
    whitened = torch.linalg.svdvals(harmful @ (Wh.T / s))
    return _kappa(whitened), _kappa(s), _kappa(torch.linalg.svdvals(harmful))


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


def optimal_map(
    X_benign: Any,
    X_harmful: Any,
    *,
    t: float | None = None,
    harmful_gain: float = 1e3,
    tolerance: float | None = None,
    produced_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The ``θ`` that attains the ceiling, in closed form.

    Where the harmful data have directions of their own the ceiling is infinite and no ``θ`` attains it. The map then
    puts them above the rest: their smallest singular value is ``harmful_gain`` times the largest one of the shared
    directions. The shared part stays optimal in what those directions leave of the harmful features.

    Args:
        X_benign: ``(N_P, D)``.
        X_harmful: ``(N_H, D)``.
        t: The dial, at least 1: the benign condition number ``κ(H_P)`` after the map. 1 makes benign probing perfectly
            conditioned; the default, ``κ(K_P)``, leaves it as it was and puts everything into the harmful task.
            Without effect where ``κ(M) = 1`` or nothing is shared: there only whitening is left to do.
        harmful_gain: At least 1; above. Without effect where there are no such directions.
        tolerance: As in :func:`rir_ceiling`.
        produced_dtype: As in :func:`rir_ceiling`.

    Returns:
        ``(D, D)`` float64, invertible.

    Raises:
        ArgumentError: A dial or a gain below 1.
        ShapeError: As in :func:`rir_ceiling`.

    Example:
        >>> theta = optimal_map(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0])), t=1.0)
        >>> (theta.T @ torch.diag(torch.tensor([4.0, 1.0]).double()) @ theta).round(decimals=6)  # K_P is whitened
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    P = row_factor(X_benign, "X_benign", produced_dtype=produced_dtype)
    H = row_factor(X_harmful, "X_harmful", produced_dtype=produced_dtype)
    return factor_map(P, H, t=t, harmful_gain=harmful_gain, tolerance=tolerance)


def factor_map(
    P: Factor, H: Factor, *, t: float | None = None, harmful_gain: float = 1e3, tolerance: float | None = None
) -> torch.Tensor:
    """:func:`optimal_map` of factors computed before."""
    same_columns(P.V.T, H.V.T, ("X_benign", "X_harmful"))
    t = P.kappa if t is None else check_number(t, "t, the benign condition number to end with,", 1)
    check_number(harmful_gain, "harmful_gain", 1)
    tolerance = _tolerance(P, H, tolerance)
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
    shared = (whitener(P) @ Qh.T) * _dial(sigma, rank, P.rank, t)
    theta = torch.cat([shared, null @ _outer(Wh, strengths, outside, H, shared, harmful_gain)], dim=1)
    return check_result(theta / scale, "the map")


def _dial(sigma: torch.Tensor, rank: int, size: int, t: float) -> torch.Tensor:
    """``s``, between 1 and √t, increasing with the harmful singular values ``sigma = √μ``."""
    scale = sigma.new_ones(size)
    if rank == 0:
        return scale
    log_mu = 2 * sigma[:rank].log()
    span = float(log_mu[0] - log_mu[-1])
    # κ(M) = 1 up to rounding: the dial is 0/0, and whitening alone is optimal.
    if span > 1e-12:
        scale[:rank] = torch.exp(0.5 * math.log(t) * (log_mu - log_mu[-1]) / span)
    return scale


def _outer(
    Wh: torch.Tensor, strengths: torch.Tensor, outside: int, H: Factor, shared: torch.Tensor, gain: float
) -> torch.Tensor:
    """Scales for the directions the benign data do not have, so that θ stays invertible."""
    # Directions that neither task sees get the typical size of the rest of θ.
    usual = float(torch.linalg.svdvals(shared).log().mean().exp()) if shared.numel() else 1.0
    scale = Wh.new_full((Wh.shape[0],), usual)
    if outside:
        reference = float(torch.linalg.matrix_norm(H.rows @ shared, 2)) if shared.numel() else float(H.s[0])
        scale[:outside] = gain * reference / strengths[:outside]
    return Wh.T * scale
