"""What the ceiling of RIR means for somebody about to train, in one plain sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_immunize.errors import ArgumentError, RankError, ShapeError
from hf_immunize.linear.inputs import as_data, dtype_of_origin, keep_above_noise, same_columns
from hf_immunize.spectra.checks import binary_scale, check_count, check_number, check_result, decomposing, times_power


class Factor(NamedTuple):
    """``X = U diag(s) Vᵀ`` without ``U`` and without the directions at rounding level.

    ``K = XᵀX = V diag(s²) Vᵀ``, so every Hessian ``θᵀKθ`` of the linear setting is that of :attr:`rows`. They have
    full row rank: no null direction of the data can come back as rounding noise through a large ``θ``.

    Attributes:
        s: ``(r,)`` singular values, falling.
        V: ``(D, r)`` orthonormal basis of the row space.
        num_samples: ``N`` of the data.
        eps: Machine epsilon of the dtype that produced the data.
    """

    s: torch.Tensor
    V: torch.Tensor
    num_samples: int
    eps: float

    @property
    def rank(self) -> int:
        """Rank of the data."""
        return len(self.s)

    @property
    def dim(self) -> int:
        """``D``, the number of columns."""
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
    """Reduce data ``(N, D)`` to its factor.

    Args:
        X: ``(N, D)`` data or features.
        name: What the caller calls them.
        produced_dtype: The dtype they were computed in, where it is not the one they carry.

    Raises:
        ShapeError: Not a matrix of at least two rows.
        NonFiniteError: A cell is NaN or infinite.
        RankError: All cells are zero.

    Example:
        >>> factor = row_factor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
        >>> factor.rank, factor.dim, factor.s
        (1, 3, tensor([5.], dtype=torch.float64))
    """
    matrix = as_data(X, name)
    origin = dtype_of_origin(X, produced_dtype)
    with decomposing(name):
        s, Vh = _right_decomposition(matrix)
    keep = keep_above_noise(s, matrix.shape, origin)
    if not keep.any():
        raise RankError(f"{name} is zero in every cell, so it has no spectrum; check how it was loaded.")
    return Factor(s[keep], Vh[keep].T, matrix.shape[0], torch.finfo(origin).eps)


def _right_decomposition(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A tall matrix loses nothing by a QR first, and the decomposition that follows no longer sees N.
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    _, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return s, Vh


def null_basis(V: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of the directions that the columns of ``V`` miss.

    Args:
        V: ``(D, r)`` orthonormal.

    Returns:
        ``(D, D − r)``.
    """
    if V.shape[1] == 0:
        return torch.eye(V.shape[0], dtype=V.dtype, device=V.device)
    return torch.linalg.qr(V, mode="complete").Q[:, V.shape[1] :]


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


def principal_angles(X_benign: Any, X_harmful: Any, leading: int = 10) -> torch.Tensor:
    """Angles between the leading eigenspaces of the two Gram matrices, in degrees, rising.

    All near 0: both tasks live on the same directions, and slowing one slows the other. Near 90: each has its own. The
    angles come from sines where they are small and cosines where they are large (Björck & Golub, 1973), so both ends
    keep their digits.

    Args:
        X_benign: ``(N_P, D)``.
        X_harmful: ``(N_H, D)``.
        leading: How many leading eigenvectors of each; cut to the smaller rank.

    Returns:
        ``(min(leading, ranks),)`` float64.

    Raises:
        ArgumentError: ``leading`` below 1.
        ShapeError: Different numbers of columns.

    Example:
        >>> principal_angles([[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]], leading=1)
        tensor([45.0000], dtype=torch.float64)
    """
    P, H = row_factor(X_benign, "X_benign"), row_factor(X_harmful, "X_harmful")
    return factor_angles(P, H, leading)


def factor_angles(P: Factor, H: Factor, leading: int = 10) -> torch.Tensor:
    """:func:`principal_angles` of factors computed before."""
    same_columns(P.V.T, H.V.T, ("X_benign", "X_harmful"))
    check_count(leading, "leading")
    count = min(leading, P.rank, H.rank)
    A, B = P.V[:, :count], H.V[:, :count]
    cosines = torch.linalg.svdvals(A.T @ B).clamp(max=1.0)
    sines = torch.linalg.svdvals(B - A @ (A.T @ B)).flip(0).clamp(max=1.0)
    return torch.rad2deg(torch.where(sines < 0.5, sines.asin(), cosines.acos()))


def proposition_diagonal(X: Any, theta: Any) -> torch.Tensor:
    """The diagonal of ``VᵀHV`` that Proposition 3.2 takes for the singular values of ``H``: ``σ_θ,i² u_iᵀKu_i``.

    Args:
        X: ``(N, D)`` data, ``K = XᵀX``.
        theta: ``(D, D)`` map with singular value decomposition ``UΣVᵀ``.

    Returns:
        ``(D,)``, falling. Majorized by the true eigenvalues, equal to them where ``U`` diagonalizes ``K``.

    Raises:
        ShapeError: ``θ`` has another number of rows than the data have columns.

    Example:
        >>> proposition_diagonal([[1.0, 1.0], [0.0, 1.0]], torch.eye(2))  # the eigenvalues are 2.618 and 0.382
        tensor([2., 1.], dtype=torch.float64)
    """
    data, matrix = as_data(X, "X"), as_data(theta, "theta")
    if matrix.shape[0] != data.shape[1]:
        raise ShapeError(f"Expected theta with {data.shape[1]} rows, one a column of X, found {matrix.shape[0]}.")
    U, sigma, _ = torch.linalg.svd(matrix.to(data.device), full_matrices=False)
    scale = binary_scale(data)
    # Each factor brings its own size; the square of their product may be at hand where that of one is not.
    values = times_power((data / scale @ U).square().sum(0) * (sigma / sigma[0]).square(), scale * float(sigma[0]), 2)
    return check_result(values, "the diagonal").sort(descending=True).values


# From which ceiling on immunization by conditioning is worth trying; the paper's own results start at 3 and reach 350.
_HARDLY, _WORTHWHILE = 2.0, 10.0


def advice(ceiling: Ceiling) -> str:
    """One sentence: can these two tasks be told apart by conditioning at all, and what limits it.

    Args:
        ceiling: Of the two tasks.

    Example:
        >>> from hf_immunize.linear.optimum import rir_ceiling
        >>> advice(rir_ceiling([[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]))
        'No linear map can immunize here: both tasks use the same directions in the same proportions (ceiling 1), ...'
    """
    if math.isinf(ceiling.value):
        share = ceiling.harmful_only / ceiling.harmful_rank
        text = (
            f"A linear map can immunize without limit here, because {ceiling.harmful_only} of the "
            f"{ceiling.harmful_rank} harmful directions ({100 * share:.0f} %) do not occur in the benign data"
        )
        if ceiling.num_benign < ceiling.dim:
            return (
                f"{text}, but with {ceiling.num_benign} benign samples in {ceiling.dim} dimensions that may only mean "
                "that samples are missing: add benign data and look again."
            )
        if ceiling.common_rank == 0:
            return f"{text}; the two tasks share no direction at all."
        return f"{text}; on the directions that both use the ceiling is {ceiling.common_value:.3g}."
    if ceiling.value < _HARDLY:
        how = "the same" if ceiling.value < 1.01 else "almost the same"
        return (
            f"No linear map can immunize here: both tasks use the same directions in {how} proportions (ceiling "
            f"{ceiling.value:.3g}), so change the features, not the map behind them."
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
