"""Definition 3.1 of the paper as a check: which of its three parts a given map meets, with the figures.

Zheng et al. (ICML 2025) call a model immunized when

    (a) κ(H_H(θ_I)) ≫ κ(H_H(I))     probing the harmful task becomes much slower,
    (b) κ(H_P(θ_I)) ≤ κ(H_P(I))     probing the benign task becomes no slower,
    (c) min_ω L(D_P, ω, θ_I) ≈ min_{ω,θ} L(D_P, ω, θ)     and the benign task can still be solved as well.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hf_immunize.errors import ShapeError
from hf_immunize.linear.inputs import as_data, as_targets, same_columns
from hf_immunize.linear.optimum import Factor, row_factor
from hf_immunize.linear.probe import least_squares_probe
from hf_immunize.spectra.checks import binary_scale, check_number, check_result
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.spectra.ratio import ImmunizationRatio, relative_immunization_ratio


@dataclass(frozen=True)
class Definition31:
    """The three parts of Definition 3.1 for one map.

    Attributes:
        slower_harmful: (a) holds: the harmful ratio (i) is at least ``much_larger``.
        benign_kept: (b) holds: the benign ratio (ii) is at most 1, up to rounding.
        utility_kept: (c) holds: the best benign loss rose by no more than the tolerance.
        harmful_ratio: (i), exact; a lower bound where harmful rank was lost.
        benign_ratio: (ii), exact; a lower bound where benign rank was lost.
        rir: (i)/(ii).
        loss_before: Best benign squared loss of a linear probe with intercept on ``X``, per sample; NaN without
            targets. Any invertible ``θ`` attains it, so it is the minimum over ``ω`` and ``θ``.
        loss_after: The same on ``Xθ``.
        benign_rank_lost: Directions of the benign data that ``θ`` removed.
        bound: What ``rir`` is of the true value where rank was lost (see :class:`ImmunizationRatio`).
    """

    slower_harmful: bool
    benign_kept: bool
    utility_kept: bool
    harmful_ratio: float
    benign_ratio: float
    rir: float
    loss_before: float
    loss_after: float
    benign_rank_lost: int
    bound: str | None

    @property
    def immunized(self) -> bool:
        """All three parts hold."""
        return self.slower_harmful and self.benign_kept and self.utility_kept

    def __str__(self) -> str:
        def mark(holds: bool) -> str:
            return "yes" if holds else "no"

        loss = (
            "no targets given"
            if self.loss_before != self.loss_before
            else (f"best benign loss {self.loss_before:.4g} → {self.loss_after:.4g}")
        )
        return (
            f"(a) harmful κ × {self.harmful_ratio:.4g}: {mark(self.slower_harmful)}; "
            f"(b) benign κ × {self.benign_ratio:.4g}: {mark(self.benign_kept)}; "
            f"(c) {loss}: {mark(self.utility_kept)}"
        )


def map_ratio(P: Factor, H: Factor, theta: torch.Tensor) -> ImmunizationRatio:
    """Exact RIR of the map ``θ`` against the identity (Eq. 15), by a decomposition of the features.

    Args:
        P: Factor of the benign data.
        H: Factor of the harmful data.
        theta: ``(D, D')``.
    """
    # The rank rule compares features of equal width, and a map may change it; columns of zeros leave κ alone.
    width = max(theta.shape)
    units, theta = [F.unit()[0].rows for F in (P, H)], theta / binary_scale(theta)
    rows = [torch.nn.functional.pad(F, (0, width - F.shape[1])) for F in units]
    mapped = [torch.nn.functional.pad(F @ theta, (0, width - theta.shape[1])) for F in units]
    before_p, before_h = (feature_conditioning(Z) for Z in rows)
    return relative_immunization_ratio(
        benign=feature_conditioning(mapped[0], reference=before_p),
        benign_reference=before_p,
        harmful=feature_conditioning(mapped[1], reference=before_h),
        harmful_reference=before_h,
    )


def check_definition(
    X_benign: Any,
    X_harmful: Any,
    theta: Any,
    y_benign: Any = None,
    *,
    much_larger: float = 10.0,
    utility_tolerance: float = 0.01,
) -> Definition31:
    """Say which parts of Definition 3.1 a linear map meets.

    The paper leaves ``≫`` and ``≈`` open; here they are numbers that the caller may set.

    Args:
        X_benign: ``(N_P, D)``.
        X_harmful: ``(N_H, D)``.
        theta: ``(D, D')`` map.
        y_benign: ``(N_P,)`` or ``(N_P, C)`` targets, one-hot rows for classes. Without them (c) is judged by the rank:
            a map that keeps the row space of the data keeps every attainable linear loss.
        much_larger: The factor from which (i) counts as ``≫``.
        utility_tolerance: Relative rise of the best benign loss that still counts as ``≈``.

    Raises:
        ShapeError: Columns, rows of ``θ`` or targets do not fit.
        ArgumentError: A threshold below 1, or a negative tolerance.

    Example:
        >>> benign, harmful = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0]))
        >>> print(check_definition(benign, harmful, torch.eye(2)))
        (a) harmful κ × 1: no; (b) benign κ × 1: yes; (c) no targets given: yes
    """
    P, H = row_factor(X_benign, "X_benign"), row_factor(X_harmful, "X_harmful")
    same_columns(P.V.T, H.V.T, ("X_benign", "X_harmful"))
    theta = as_data(theta, "theta").to(P.V.device)
    if theta.shape[0] != P.dim:
        raise ShapeError(f"Expected theta with {P.dim} rows, one for each column of the data, found {theta.shape[0]}.")
    inside = targets = None
    if y_benign is not None:
        X = as_data(X_benign, "X_benign")
        targets = as_targets(y_benign, len(X), "y_benign").to(X.device)
        # Through the row space, so that rounding in the null directions of X is not blown up into new features.
        inside = X @ P.V
    return factor_definition(
        P, H, theta, inside, targets, much_larger=much_larger, utility_tolerance=utility_tolerance
    )


def factor_definition(
    P: Factor,
    H: Factor,
    theta: torch.Tensor,
    inside: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    *,
    much_larger: float = 10.0,
    utility_tolerance: float = 0.01,
) -> Definition31:
    """:func:`check_definition` of factors computed before.

    Args:
        P: Factor of the benign data.
        H: Factor of the harmful data.
        theta: ``(D, D')`` map.
        inside: ``(N_P, r)`` coordinates ``X V`` of the benign data in their row space, with ``targets``.
        targets: ``(N_P, C)``.
        much_larger: As in :func:`check_definition`.
        utility_tolerance: As in :func:`check_definition`.
    """
    check_number(much_larger, "much_larger", 1)
    check_number(utility_tolerance, "utility_tolerance", 0)
    ratio = map_ratio(P, H, theta)
    assert ratio.benign is not None
    lost = P.rank - ratio.benign.rank
    before = after = float("nan")
    kept = lost == 0
    if inside is not None and targets is not None:
        before, after = _best_loss(inside, targets), _best_loss(inside @ (P.V.T @ theta), targets)
        scale = float((targets - targets.mean(0)).square().sum(1).mean())
        # A loss of zero leaves no room for a relative tolerance; rounding of the targets' own size is allowed.
        kept = after <= before * (1 + utility_tolerance) + 1e-9 * scale
    return Definition31(
        slower_harmful=ratio.harmful_ratio >= much_larger,
        benign_kept=ratio.benign_ratio <= 1 + 1e-6 and not ratio.benign.is_bound,
        utility_kept=kept,
        harmful_ratio=ratio.harmful_ratio,
        benign_ratio=ratio.benign_ratio,
        rir=ratio.rir,
        loss_before=before,
        loss_after=after,
        benign_rank_lost=lost,
        bound=ratio.bound,
    )


def _best_loss(Z: torch.Tensor, y: torch.Tensor) -> float:
    residual = y - least_squares_probe(Z, y, intercept=True).predict(Z)
    return float(check_result(residual.square().sum(1).mean(), "the benign loss"))
