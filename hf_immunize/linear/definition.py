"""Definition 3.1 of the paper as a check: which of its three parts a given map meets.

(a) κ(H_H(θ_I)) ≫ κ(H_H(I))     probing the harmful task becomes much slower,
(b) κ(H_P(θ_I)) ≤ κ(H_P(I))     probing the benign task becomes no slower,
(c) min_ω L(D_P, ω, θ_I) ≈ min_{ω,θ} L(D_P, ω, θ)     and the benign task can still be solved as well.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from hf_immunize.errors import ShapeError
from hf_immunize.linear.inputs import as_data, as_targets
from hf_immunize.linear.optimum import Factor, factors
from hf_immunize.linear.probe import least_squares_probe
from hf_immunize.spectra.checks import binary_scale, check_number, check_result
from hf_immunize.spectra.ratio import ImmunizationRatio, relative_immunization_ratio


@dataclass(frozen=True)
class Definition31:
    """The three parts of Definition 3.1 for one map."""

    slower_harmful: bool  # (a): the harmful ratio is at least `much_larger`
    benign_kept: bool  # (b): the benign ratio is at most 1, up to rounding
    utility_kept: bool  # (c): the best benign loss rose by no more than the tolerance
    ratio: ImmunizationRatio
    # Best benign squared loss per sample of a linear probe with intercept, on X and on Xθ; NaN without targets. Any
    # invertible θ attains the first, so it is the minimum over ω and θ.
    loss_before: float
    loss_after: float
    benign_rank_lost: int  # directions of the benign data that θ removed

    @property
    def immunized(self) -> bool:
        """All three parts hold."""
        return self.slower_harmful and self.benign_kept and self.utility_kept

    def __str__(self) -> str:
        a, b, c = ("yes" if holds else "no" for holds in (self.slower_harmful, self.benign_kept, self.utility_kept))
        loss = f"best benign loss {self.loss_before:.4g} → {self.loss_after:.4g}"
        loss = "no targets given" if math.isnan(self.loss_before) else loss
        harmful, benign = self.ratio.harmful_ratio, self.ratio.benign_ratio
        return f"(a) harmful κ × {harmful:.4g}: {a}; (b) benign κ × {benign:.4g}: {b}; (c) {loss}: {c}"


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


def check_definition(
    X_benign: Any,
    X_harmful: Any,
    theta: Any,
    y_benign: Any = None,
    *,
    rows: Any = None,
    much_larger: float = 10.0,
    utility_tolerance: float = 0.01,
) -> Definition31:
    """Say which parts of Definition 3.1 a linear map ``(D, D')`` meets; without targets (c) is judged by the rank.

    Data may be given by their `Factor`; targets then need the benign data themselves as `rows`.

    >>> benign, harmful = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0]))
    >>> print(check_definition(benign, harmful, torch.eye(2)))
    (a) harmful κ × 1: no; (b) benign κ × 1: yes; (c) no targets given: yes
    """
    P, H = factors(X_benign, X_harmful)
    theta = as_data(theta, "theta").to(P.V.device)
    if theta.shape[0] != P.dim:
        raise ShapeError(f"Expected theta with {P.dim} rows, one per column of the data, found {theta.shape[0]}.")
    check_number(much_larger, "much_larger", 1)
    check_number(utility_tolerance, "utility_tolerance", 0)
    ratio = map_ratio(P, H, theta)
    assert ratio.benign is not None
    lost = P.rank - ratio.benign.rank
    before, after, kept = math.nan, math.nan, lost == 0
    if y_benign is not None:
        X = as_data(X_benign if rows is None else rows, "X_benign")
        targets = as_targets(y_benign, len(X), "y_benign").to(X.device)
        # Through the row space, so that rounding in the null directions of X is not blown up into new features.
        inside = X @ P.V
        before, after = _best_loss(inside, targets), _best_loss(inside @ (P.V.T @ theta), targets)
        scale = float((targets - targets.mean(0)).square().sum(1).mean())
        # A loss of zero leaves no room for a relative tolerance; rounding of the targets' own size is allowed.
        kept = after <= before * (1 + utility_tolerance) + 1e-9 * scale
    return Definition31(
        slower_harmful=ratio.harmful_ratio >= much_larger,
        benign_kept=ratio.benign_ratio <= 1 + 1e-6 and not ratio.benign.is_bound,
        utility_kept=kept,
        ratio=ratio,
        loss_before=before,
        loss_after=after,
        benign_rank_lost=lost,
    )


def _best_loss(Z: torch.Tensor, y: torch.Tensor) -> float:
    residual = y - least_squares_probe(Z, y, intercept=True).predict(Z)
    return float(check_result(residual.square().sum(1).mean(), "the benign loss"))
