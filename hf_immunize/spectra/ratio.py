"""The relative immunization ratio: how much worse harmful probing became, over how much worse benign probing became.

    RIR = (i)/(ii),   (i) = κ(H_H(θ_I))/κ(H_H(θ_0)),   (ii) = κ(H_P(θ_I))/κ(H_P(θ_0))

Eq. 15 and 17 of Zheng et al. 2025 (arXiv:2505.23760); θ_I are the immunized weights and θ_0 the reference: the
identity in the linear setting, the released weights before immunization for a network. RIR says what became of
*gradient descent on the features*; it is silent about least squares, earlier layers and fine-tuning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_immunize.errors import ProtocolError, RankError, ShapeError
from hf_immunize.spectra.checks import as_matrix, check_count, check_result
from hf_immunize.spectra.conditioning import Conditioning, feature_conditioning
from hf_immunize.spectra.streaming import FeatureFactor


PROTOCOLS = ("exact", "intercept", "groups", "reference")
# Of the paper's code: the multiple of the identity it adds, and the eigenvalue below which it looks away.
_REFERENCE_FLOOR = 1e-6
# The mean over more says no more.
_MOST_GROUPS = 10_000


@dataclass(frozen=True)
class ImmunizationRatio:
    """Relative immunization ratio and its two parts.

    Attributes:
        rir: (i)/(ii), dimensionless; the mean over groups where there are groups; NaN where `bound` is "undetermined".
        log10_rir: Its decimal logarithm.
        harmful_ratio: (i) = κ(H_H(θ_I))/κ(H_H(θ_0)); a bound where their rank changed.
        benign_ratio: (ii) = κ(H_P(θ_I))/κ(H_P(θ_0)); a bound where their rank changed.
        std: Standard deviation of `rir` over groups; None without groups.
        bound: None, or what `rir` is of the true value: "lower" (harmful rank was lost, or benign rank gained),
            "upper" (benign rank lost, or harmful rank gained), "undetermined" (one of each: no statement).
        protocol: "exact", "intercept", "groups" or "reference".
        harmful, harmful_reference, benign, benign_reference: The conditionings behind it, for the first two.

    Example:
        >>> Z, ill = [[1.0, 0.0], [0.0, 1.0]], [[10.0, 0.0], [0.0, 1.0]]
        >>> found = relative_immunization_ratio(harmful=ill, harmful_reference=Z, benign=Z, benign_reference=Z)
        >>> round(found.log10_rir, 6), found.bound
        (2.0, None)
    """

    rir: float
    log10_rir: float
    harmful_ratio: float
    benign_ratio: float
    std: float | None
    bound: str | None
    protocol: str
    harmful: Conditioning | None = None
    harmful_reference: Conditioning | None = None
    benign: Conditioning | None = None
    benign_reference: Conditioning | None = None

    def __str__(self) -> str:
        if self.bound == "undetermined":
            return "RIR undetermined: the ranks of harmful and benign features changed, and their bounds oppose"
        sign = {None: "=", "lower": "≥", "upper": "≤"}[self.bound]
        spread = "" if self.std is None else f" ± {self.std:.3g}"
        floored = ", noise-floored" if self.protocol == "reference" else ""
        return (
            f"RIR {sign} {self.rir:.4g}{spread} (harmful × {self.harmful_ratio:.4g}, "
            f"benign × {self.benign_ratio:.4g}; {self.protocol}{floored})"
        )

    def _repr_html_(self) -> str:
        """A notebook's view: the ratio, and the conditionings behind it where they are known."""
        sides = {"harmful": (self.harmful_reference, self.harmful), "benign": (self.benign_reference, self.benign)}
        cells = [[side, *map(str, pair)] for side, pair in sides.items() if None not in pair]
        rows = "".join(f"<tr><th>{'</th><td>'.join((row[0], '</td><td>'.join(row[1:])))}</td></tr>" for row in cells)
        table = f"<table><tr><th></th><th>before</th><th>after</th></tr>{rows}</table>" if rows else ""
        return f"<p><b>{self}</b></p>{table}"


def relative_immunization_ratio(
    *,
    harmful: Any,
    harmful_reference: Any,
    benign: Any,
    benign_reference: Any,
    protocol: str = "exact",
    num_groups: int | None = None,
    group_size: int = 100,
    seed: int = 0,
) -> ImmunizationRatio:
    """Relative immunization ratio (Eq. 15 and 17 of Zheng et al. 2025) under one of three protocols.

    - ``"exact"``: exact, rank-aware κ of ``ZᵀZ`` over all rows: the paper's definition. The default.
    - ``"intercept"``: the same of ``Z_cᵀZ_c``, ``Z_c = Z − mean``: of a probe with an intercept. The number to quote
      of a network, where a direction that is constant over all images (each LayerNorm has one) rules the former.
    - ``"groups"``: exact κ in each of 20 random groups of 100 rows, mean and standard deviation over groups. With
      100 < D it describes samples of that size, not the task.
    - ``"reference"``: the recipe of the paper's code, for comparison with its tables only: the float64 Gram matrix
      plus 1e-6 times the identity, its smallest eigenvalue above 1e-6. In a rank-deficient matrix that eigenvalue is
      rounding noise on the floor of 1e-6, so the number is **noise-floored**, good to about three digits, and not
      scale-free. Over all rows, or over `num_groups` groups as in the paper's network tables.

    Args:
        harmful: Harmful features through the immunized weights, Z_H, shape ``(N_H, D)``; for "exact" and "intercept" a
            `FeatureFactor` or a `Conditioning` does as well.
        harmful_reference: The same data through the reference weights, same number of rows.
        benign: Benign features through the immunized weights, Z_P, shape ``(N_P, D)``.
        benign_reference: The same data through the reference weights.
        protocol: "exact", "intercept", "groups" or "reference".
        num_groups: Number of groups; by default for "groups" 20, or as many disjoint ones as the rows give, for
            "reference" none (all rows). More than that, where asked for, share rows, and their spread says less.
        group_size: Rows a group, drawn without replacement; the same rows of immunized and reference features.
        seed: Seed of the draw.

    Returns:
        `ImmunizationRatio`.

    Raises:
        ProtocolError: If the protocol is unknown, or groups are asked of factors, of too few rows, or over 10,000.
        ShapeError: If immunized and reference features differ in shape.
        ArgumentError, NonFiniteError, RankError: If features are no numbers, hold NaN or infinity, or are zero.

    Example:
        >>> import torch
        >>> Z = torch.eye(3, dtype=torch.float64)[:, :2]
        >>> ill = Z @ torch.diag(torch.tensor([10.0, 1.0], dtype=torch.float64))
        >>> ratio = relative_immunization_ratio(harmful=ill, harmful_reference=Z, benign=Z, benign_reference=Z)
        >>> print(ratio)
        RIR = 100 (harmful × 100, benign × 1; exact)
    """
    if protocol not in PROTOCOLS:
        raise ProtocolError(f"Expected a protocol out of {', '.join(PROTOCOLS)}, found {protocol!r}.")
    if num_groups is not None:
        check_count(num_groups, "num_groups", most=_MOST_GROUPS, error=ProtocolError)
    check_count(group_size, "group_size", least=2, error=ProtocolError)
    check_count(seed, "seed", least=-(2**63), most=2**63 - 1)
    if protocol in ("exact", "intercept"):
        pairs = []
        for features, reference in ((harmful, harmful_reference), (benign, benign_reference)):
            before = _conditioning(reference, None, protocol)
            pairs.append((_conditioning(features, before, protocol), before))
        return _exact_ratio(*pairs[0], *pairs[1], protocol)
    sides = [
        _feature_pair("harmful", harmful, harmful_reference),
        _feature_pair("benign", benign, benign_reference),
    ]
    draws = [[pair] for pair in sides]
    if protocol == "groups" or num_groups is not None:
        fewest = min(len(z) for z, _ in sides)
        count = num_groups or max(1, min(20, fewest // group_size))
        draws = [[(z[rows], z0[rows]) for rows in _groups(len(z), count, group_size, seed)] for z, z0 in sides]
    parts: list[tuple[float, float, str | None]] = []
    for (h, h0), (b, b0) in zip(*draws, strict=True):
        if protocol == "groups":
            one = relative_immunization_ratio(harmful=h, harmful_reference=h0, benign=b, benign_reference=b0)
            parts.append((one.harmful_ratio, one.benign_ratio, one.bound))
        else:
            kappas = [reference_condition_number(z) for z in (h, h0, b, b0)]
            parts.append((kappas[0] / kappas[1], kappas[2] / kappas[3], None))
    return _mean_ratio(parts, protocol)


def reference_condition_number(features: Any) -> float:
    """κ of ``ZᵀZ`` by the recipe of the paper's code: noise-floored, for comparison with its tables only."""
    z = as_matrix(features, "features").detach().cpu().to(torch.float64)
    gram = check_result(z.mT @ z, "the squares of features under protocol 'reference'")
    eigenvalues = torch.linalg.eigvalsh(gram + _REFERENCE_FLOOR * torch.eye(z.shape[1], dtype=torch.float64))
    above = eigenvalues[eigenvalues > _REFERENCE_FLOOR]
    if above.numel() == 0:
        raise RankError(
            "Expected an eigenvalue above 1e-6 in the reference protocol, found none: every feature is zero, or far "
            "below 1e-3. Check that the network is not dead and the right layer is read."
        )
    return float(above[-1] / above[0])


def _conditioning(value: Any, reference: Conditioning | None, protocol: str) -> Conditioning:
    intercept = protocol == "intercept"
    if isinstance(value, FeatureFactor):
        return value.conditioning(reference, intercept=intercept)
    if isinstance(value, Conditioning):
        if value.intercept != intercept:
            raise ProtocolError(
                f"Expected a Conditioning taken with intercept={intercept} for protocol={protocol!r}, found one with "
                f"intercept={value.intercept}. Pass the features, or choose the other protocol."
            )
        if reference is not None and (value.num_samples, value.dim) != (reference.num_samples, reference.dim):
            raise ShapeError(
                f"Expected a Conditioning of ({reference.num_samples}, {reference.dim}) features like its reference, "
                f"found ({value.num_samples}, {value.dim}). Pass the same images through both weights."
            )
        if reference is not None and not value.is_bound and value.rank < reference.rank:
            raise ProtocolError(
                f"Expected a Conditioning taken with reference=, as the rank fell from {reference.rank} to "
                f"{value.rank}, found one without. Call feature_conditioning(Z, reference=...)."
            )
        return value
    return feature_conditioning(value, reference=reference, intercept=intercept)


def _exact_ratio(
    h: Conditioning, h0: Conditioning, b: Conditioning, b0: Conditioning, protocol: str
) -> ImmunizationRatio:
    log_harmful, harmful_below, harmful_above = _growth(h, h0)
    log_benign, benign_below, benign_above = _growth(b, b0)
    # A numerator bounded from below bounds the ratio from below, a denominator so bounded from above.
    bound = _bound(harmful_below or benign_above, harmful_above or benign_below)
    log_rir = math.nan if bound == "undetermined" else log_harmful - log_benign
    return ImmunizationRatio(
        rir=_exp(log_rir),
        log10_rir=log_rir / math.log(10.0),
        harmful_ratio=_exp(log_harmful),
        benign_ratio=_exp(log_benign),
        std=None,
        bound=bound,
        protocol=protocol,
        harmful=h,
        harmful_reference=h0,
        benign=b,
        benign_reference=b0,
    )


def _growth(now: Conditioning, before: Conditioning) -> tuple[float, bool, bool]:
    """``log κ`` now less before, and whether that bounds the truth from below, and from above."""
    gained = now.rank > before.rank
    log_before = 2 * math.log(before.sigma_max / before.cutoff) if gained else before.log_kappa
    return now.log_kappa - log_before, now.is_bound, gained or before.is_bound


def _mean_ratio(parts: Sequence[tuple[float, float, str | None]], protocol: str) -> ImmunizationRatio:
    bounds = {bound for _, _, bound in parts}
    bound = _bound(bool(bounds & {"lower", "undetermined"}), bool(bounds & {"upper", "undetermined"}))
    rirs = torch.tensor([harmful / benign for harmful, benign, _ in parts], dtype=torch.float64)
    mean = math.nan if bound == "undetermined" else float(rirs.mean())
    return ImmunizationRatio(
        rir=mean,
        log10_rir=math.log10(mean) if mean > 0 else math.nan,
        harmful_ratio=math.fsum(harmful for harmful, _, _ in parts) / len(parts),
        benign_ratio=math.fsum(benign for _, benign, _ in parts) / len(parts),
        std=float(rirs.std()) if len(parts) > 1 else None,
        bound=bound,
        protocol=protocol,
    )


def _bound(from_below: bool, from_above: bool) -> str | None:
    if from_below and from_above:
        return "undetermined"
    return "lower" if from_below else "upper" if from_above else None


def _feature_pair(name: str, features: Any, reference: Any) -> tuple[Tensor, Tensor]:
    z, z0 = as_matrix(features, f"{name} features"), as_matrix(reference, f"{name} reference features")
    if z.shape != z0.shape:
        raise ShapeError(
            f"Expected {name} features and their reference of one shape, found {tuple(z.shape)} and {tuple(z0.shape)}."
            " Pass the same images, in the same order, through both weights."
        )
    return z, z0


def _groups(rows: int, num_groups: int, group_size: int, seed: int) -> list[Tensor]:
    """Random row numbers; groups do not overlap while the rows last."""
    if rows < group_size:
        raise ProtocolError(
            f"Expected groups of at most {rows} rows, as many as there are, found group_size = {group_size}. Use "
            "smaller groups or protocol='exact'."
        )
    generator = torch.Generator().manual_seed(int(seed))
    drawn, stock = [], torch.empty(0, dtype=torch.long)
    for _ in range(num_groups):
        if stock.shape[0] < group_size:
            stock = torch.randperm(rows, generator=generator)
        drawn.append(stock[:group_size])
        stock = stock[group_size:]
    return drawn


def _exp(value: float) -> float:
    return math.exp(min(value, 709.0))  # which would raise beyond the largest float
