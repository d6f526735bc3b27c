"""Claims against measurements: what agrees, what differs, and of what nothing can be said."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_immunize.hub.collect import describe_side, ratio_of
from hf_immunize.hub.measure import Measured, groups_ratio
from hf_immunize.hub.parts import ConditioningRecord, DataRecord, MetricRecord, RatioRecord, SideRecord
from hf_immunize.hub.record import ImmunizationRecord
from hf_immunize.spectra.conditioning import Conditioning


if TYPE_CHECKING:
    pass


AGREES, DIFFERS, CANNOT_SAY = "agrees", "differs", "cannot say"
# 2 is what every command of the library ends with on an error.
EXIT_CODES = {AGREES: 0, DIFFERS: 3, CANNOT_SAY: 4}
LOG10_TOLERANCE = 1e-3
# Of the accuracy: half a point, or one image where that is more; two points where it was evaluated in half precision.
_ACCURACY_TOLERANCE = 0.005
_HALF_PRECISION_TOLERANCE = 0.02


@dataclass(frozen=True)
class Figure:
    """One claim against one measurement.

    Attributes:
        name: What it is.
        claimed: By the record; None where it claims nothing.
        measured: Now; None where it could not be measured.
        tolerance: How far they may lie apart.
        outcome: "agrees", "differs" or "cannot say".
        note: Why it cannot be said, or what else to know.
    """

    name: str
    claimed: float | None
    measured: float | None
    tolerance: float
    outcome: str
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """What came of measuring again.

    Attributes:
        outcome: "agrees", "differs" or "cannot say".
        figures: Every claim against its measurement.
        reasons: Sentences for the reader.
    """

    outcome: str
    figures: list[Figure] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 agrees, 3 differs, 4 cannot say."""
        return EXIT_CODES[self.outcome]

    def __str__(self) -> str:
        sentence = {
            AGREES: "Measured again, the figures agree with the record.",
            DIFFERS: "Measured again, the figures or the weights differ from the record.",
            CANNOT_SAY: "Whether the record holds cannot be said from these images.",
        }[self.outcome]
        return " ".join([sentence, *self.reasons])


def compare(
    record: ImmunizationRecord,
    benign: tuple[Measured, Measured | None],
    harmful: tuple[Measured, Measured | None],
    changed: list[str],
) -> Verification:
    """Compare what was measured with what a record claims.

    Args:
        record: The claim.
        benign: Through the immunized model, and through the reference where there is one.
        harmful: Likewise.
        changed: Differences of the weights, as `changed_weights` gives them.

    Returns:
        The verification.
    """
    figures: list[Figure] = []
    reasons: list[str] = []
    sides: dict[str, SideRecord] = {}
    same = True
    for side, (now, then) in (("benign", benign), ("harmful", harmful)):
        other = _other_data(getattr(record, side), now)
        same = same and other is None
        if other is not None:
            reasons.append(f"The {side} images are not those of the record: {other}.")
        claimed: SideRecord = getattr(record, f"{side}_features")
        sides[side] = _measured_side(now, then, claimed)
        parts = [("before", claimed.before, sides[side].before)] * (then is not None)
        for moment, claim, part in [*parts, ("after", claimed.after, sides[side].after)]:
            figures.append(_conditioning_figure(f"log10 κ of {side} features, {moment}", claim, part, other))
    if record.metric is not None and record.metric.name == "accuracy":
        figures.insert(0, _accuracy_figure(record.metric, benign[0], _other_data(record.benign, benign[0])))
    figures.append(_exact_figure(record.ratios.get("exact"), sides, same))
    if "groups" in record.ratios:
        figures.append(_groups_figure(record.ratios["groups"], benign, harmful, same))
    if harmful[1] is None:
        reasons.append(
            "The κ's before immunization are the record's own, taken on trust; give the reference model to measure "
            "them too."
        )
    if changed:
        reasons.insert(0, f"The weights are not those of the record: {'; '.join(changed)}.")
    decisive = [figure for figure in figures if figure.claimed is not None and not figure.name.startswith("groups")]
    if changed or any(figure.outcome == DIFFERS for figure in figures):
        outcome = DIFFERS
    elif decisive and all(figure.outcome == AGREES for figure in decisive):
        outcome = AGREES
    else:
        outcome = CANNOT_SAY
    return Verification(outcome, figures, reasons)


def rounding_allowance(conditioning: Conditioning) -> float:
    """How far log10 κ of the same weights and images may differ between machines.

    Features carry rounding noise of the dtype they were computed in, which moves a singular value by at most its norm;
    the rank rule's cut-off bounds that norm (see `rank_cutoff`). A smallest singular value near it moves a lot.

    Args:
        conditioning: As measured.

    Returns:
        A difference of log10 κ; next to nothing for healthy features.

    Example:
        >>> import torch
        >>> from hf_immunize import feature_conditioning
        >>> round(rounding_allowance(feature_conditioning(torch.eye(3))), 5)
        0.0
    """
    # A bound is taken at the cut-off, which follows from the features' size and is as good as that.
    return 0.0 if conditioning.is_bound else 2 * math.log10(1 + conditioning.cutoff / conditioning.sigma_min)


def _other_data(data: DataRecord | None, now: Measured) -> str | None:
    """Why these are not the record's images; None where they are."""
    if data is None or data.checksum is None or data.size is None:
        return "it does not say by which checksum to know them"
    count = now.measurement.factor.num_samples
    if count != data.size:
        return f"{data.size} images then, {count} now"
    if not math.isclose(now.measurement.checksum, data.checksum, rel_tol=1e-6):
        if data.fingerprint is not None and data.fingerprint == now.fingerprint:
            return "the same data set, but with other pixel values, as another image processor makes them"
        return "as many, but with other pixel values (other images, or another image processor)"
    return None


def _measured_side(now: Measured, then: Measured | None, claimed: SideRecord) -> SideRecord:
    if then is not None:
        return describe_side(now.measurement, then.measurement)
    factor = now.measurement.factor
    before = claimed.before
    usable = before is not None and (before.num_samples, before.dim) == (factor.num_samples, factor.dim)
    start = before.conditioning() if before is not None and usable else None
    return SideRecord(before if usable else None, ConditioningRecord.of(factor.conditioning(start)))


def _conditioning_figure(
    name: str, claim: ConditioningRecord | None, part: ConditioningRecord | None, other: str | None
) -> Figure:
    claimed = None if claim is None else claim.log10_kappa
    measured = None if part is None else part.log10_kappa
    if claimed is None or measured is None or claim is None or part is None:
        return Figure(name, claimed, measured, LOG10_TOLERANCE, CANNOT_SAY, "one of the two is missing")
    note = f"rank {part.rank} of {min(part.num_samples, part.dim)}"
    note += "" if claim.rank == part.rank else f", {claim.rank} by the record"
    note += ", a bound from below" if part.is_bound else ""
    if other is not None:
        return Figure(name, claimed, measured, LOG10_TOLERANCE, CANNOT_SAY, "other images")
    return _judged(name, claimed, measured, rounding_allowance(part.conditioning()), note)


def _judged(name: str, claimed: float, measured: float, allowance: float, note: str) -> Figure:
    apart = abs(claimed - measured)
    if apart <= LOG10_TOLERANCE:
        return Figure(name, claimed, measured, LOG10_TOLERANCE, AGREES, note)
    if apart <= allowance:
        note += f"; so near rounding noise that machines may differ by {allowance:.2g}"
        return Figure(name, claimed, measured, LOG10_TOLERANCE, CANNOT_SAY, note)
    return Figure(name, claimed, measured, LOG10_TOLERANCE, DIFFERS, note)


def _accuracy_figure(claim: MetricRecord, now: Measured, other: str | None) -> Figure:
    name, claimed = "benign accuracy", claim.after
    least = _ACCURACY_TOLERANCE if claim.precision in (None, "no") else _HALF_PRECISION_TOLERANCE
    tolerance = max(least, 1.0 / max(now.measurement.factor.num_samples, 1))
    if now.accuracy is None:
        return Figure(name, None, None, tolerance, CANNOT_SAY, f"{claimed:.4f} claimed; the images have no labels")
    if other is not None:
        return Figure(name, claimed, now.accuracy, tolerance, CANNOT_SAY, "other images")
    outcome = AGREES if abs(claimed - now.accuracy) <= tolerance + 1e-12 else DIFFERS
    return Figure(name, claimed, now.accuracy, tolerance, outcome)


def _exact_figure(claim: RatioRecord | None, sides: dict[str, SideRecord], same: bool) -> Figure:
    name = "log10 RIR (exact)"
    claimed = None if claim is None else claim.log10_rir
    h, h0, b, b0 = (part for side in ("harmful", "benign") for part in (sides[side].after, sides[side].before))
    if h is None or h0 is None or b is None or b0 is None:
        return Figure(name, claimed, None, LOG10_TOLERANCE, CANNOT_SAY, "no κ before immunization to divide by")
    now = ratio_of(h.conditioning(), h0.conditioning(), b.conditioning(), b0.conditioning())
    words = {None: "", "lower": "a bound from below", "upper": "a bound from above", "undetermined": "undetermined"}
    note = words[now.bound]
    if now.bound == "undetermined" or not math.isfinite(now.log10_rir):
        agreed = claim is not None and claim.bound == "undetermined" and same
        return Figure(name, claimed, None, LOG10_TOLERANCE, AGREES if agreed else CANNOT_SAY, note or "undetermined")
    if claim is None or claimed is None or not same:
        note = "other images" if claim is not None and not same else note or "not claimed"
        return Figure(name, claimed, now.log10_rir, LOG10_TOLERANCE, CANNOT_SAY, note)
    if claim.bound != now.bound:
        note = f"{note or 'a number'} now, {words.get(claim.bound, '') or 'a number'} by the record"
        return Figure(name, claimed, now.log10_rir, LOG10_TOLERANCE, DIFFERS, note)
    allowance = sum(rounding_allowance(part.conditioning()) for part in (h, b))
    return _judged(name, claimed, now.log10_rir, allowance, note)


def _groups_figure(
    claim: RatioRecord, benign: tuple[Measured, Measured | None], harmful: tuple[Measured, Measured | None], same: bool
) -> Figure:
    name = "groups: mean RIR"
    claimed = None if claim.log10_rir is None else 10.0 ** min(claim.log10_rir, 300)
    spread = (claimed or 0.0) * (claim.relative_std or 0.0)
    if benign[1] is None or harmful[1] is None:
        return Figure(name, claimed, None, spread, CANNOT_SAY, "needs the reference model")
    drawn = {"num_groups": claim.num_groups, "group_size": claim.group_size or 100, "seed": claim.seed or 0}
    now = groups_ratio((harmful[0], harmful[1]), (benign[0], benign[1]), **drawn)  # type: ignore[arg-type]
    if now is None or now.log10_rir is None or claimed is None or not same:
        return Figure(name, claimed, None, spread, CANNOT_SAY, "other images" if not same else "undetermined")
    measured = 10.0 ** min(now.log10_rir, 300)
    # With one group there is no spread; then the figure must be met as an exact one is.
    close = abs(measured - claimed) <= max(spread, claimed * (10**LOG10_TOLERANCE - 1))
    return Figure(name, claimed, measured, spread, AGREES if close else DIFFERS, f"within ± {spread:.3g}")
