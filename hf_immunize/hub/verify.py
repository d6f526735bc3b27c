"""Measuring an immunized checkpoint again and comparing with its record: what is reported, measuring, comparing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoImageProcessor

from hf_immunize.data import sources
from hf_immunize.data.columns import find_columns, has_classes, label_outputs
from hf_immunize.data.images import ImageRows
from hf_immunize.errors import DataError
from hf_immunize.features.extract import Measurement, extract, of_side
from hf_immunize.hub.collect import (
    describe_side,
    drawn_again,
    exact_ratio,
    intercept_ratio,
    recorded_draw,
    refuse_training_images,
)
from hf_immunize.hub.load import changed_weights, fetch, load_model
from hf_immunize.hub.record import (
    ConditioningRecord,
    DataRecord,
    ImmunizationRecord,
    ProbingRecord,
    RatioRecord,
    SideRecord,
    read_record,
)
from hf_immunize.text import library_words


if TYPE_CHECKING:
    from transformers import PreTrainedModel


AGREES, DIFFERS, CANNOT_SAY = "agrees", "differs", "cannot say"
# The exit code, and the words; 2 is what every command of the library ends with on an error.
_OUTCOMES = {
    AGREES: (0, "Measured again, the figures agree with the record."),
    DIFFERS: (3, "Measured again, the figures or the weights differ from the record."),
    CANNOT_SAY: (4, "Whether the record holds cannot be said from these images."),
}
LOG10_TOLERANCE = 1e-3
# Of the accuracy: half a point, or one image where that is more; two points where it was evaluated in half precision.
_ACCURACY_TOLERANCE, _HALF_PRECISION_TOLERANCE = 0.005, 0.02
# Of the steps of a probe: one step, or this share where that is more.
_STEPS_TOLERANCE = 0.01
_BOUND_WORDS = {None: "a number", "lower": "a bound from below", "upper": "a bound from above"}


@dataclass(frozen=True)
class Figure:
    """One claim against one measurement; None where nothing is claimed, or nothing could be measured."""

    name: str
    claimed: float | None
    measured: float | None
    outcome: str  # "agrees", "differs" or "cannot say"
    note: str = ""  # why it cannot be said, or what else to know


@dataclass(frozen=True)
class Verification:
    """What came of measuring again."""

    outcome: str  # "agrees", "differs" or "cannot say"
    figures: list[Figure]  # every claim against its measurement
    reasons: list[str]  # sentences for the reader

    @property
    def exit_code(self) -> int:
        """0 agrees, 3 differs, 4 cannot say."""
        return _OUTCOMES[self.outcome][0]

    def __str__(self) -> str:
        return " ".join([_OUTCOMES[self.outcome][1], *self.reasons])


def verify(
    repo_or_folder: str | os.PathLike[str],
    *,
    benign: Any,
    harmful: Any,
    reference: str | os.PathLike[str] | PreTrainedModel | None = None,
    image_processor: Any = None,
    batch_size: int = 64,
    head_module: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Verification:
    """Measure an immunized checkpoint again and compare with what its record claims.

    On the images the record was made of (as many, with the same pixel values), decimal logarithms of the protocol
    "exact" agree within 1e-3, or within what rounding leaves open, steps of a probe within one or 1 %. On other images
    nothing can be said. Weights other than the recorded ones differ, whatever their figures.

    Without `reference` the κ's before immunization, into which RIR is divided, are the record's own, on trust, and
    neither steps of a probe nor RIR with an intercept can be measured again.

    Args:
        repo_or_folder: Id on the Hub, or a folder.
        benign: Benign images: a `datasets.Dataset`, rows of ``pixel_values``, or what `load_image_dataset` takes; then
            the validation split is used, else the test split, else what training held out by the record.
        harmful: Harmful images.
        reference: The model before immunization, or where to load it from, to measure its κ's too.
        image_processor: In place of the one beside the weights.
        batch_size: Images per batch.
        head_module: The classifier's name, where it cannot be found.
        revision: Branch, tag or commit on the Hub.
        token: In place of the one you are logged in with.
        trust_remote_code: Run code that comes with the model. Read it first.
        progress: Whether to show progress bars.

    Returns:
        `Verification`, claimed against measured.

    Raises:
        RecordError: If there is no record, or it is damaged or of a newer schema (`RecordVersionError`).
        WeightsError: If there are no weights in safetensors.
        DataError: If the data cannot be read.
        TrainingImagesError: If the model was trained on these images and not measured on them.
        HubError: If the Hub does not give the model.
    """
    folder = fetch(repo_or_folder, revision=revision, token=token, with_code=trust_remote_code)
    record = read_record(folder)
    changed = changed_weights(folder, record.weights)
    model = load_model(folder, trust_remote_code)
    before: Any = reference
    if isinstance(reference, str | os.PathLike):
        before = load_model(fetch(reference, token=token))
    options: dict[str, Any] = {"batch_size": batch_size, "head_module": head_module, "progress": progress}
    found: dict[str, Pair] = {}
    for side, data in (("benign", benign), ("harmful", harmful)):
        claimed: DataRecord | None = getattr(record, side)
        if isinstance(data, (str, os.PathLike)):
            data = drawn_again(sources.measured(str(data), recorded_draw(claimed)), record, side)
        probing = getattr(record, f"{side}_features").probing
        labels = "outputs" if side == "benign" else "own" if probing and probing.targets == "classes" else "none"
        rows = image_rows(data, side, model, labels)
        refuse_training_images(claimed, rows, side)
        if image_processor is None and "pixel_values" not in rows[0]:
            image_processor = _processor(folder, record.image_processor, trust_remote_code)
        compared = before is not None
        now = measure(model, rows, image_processor, name=side, compared=compared, **options)
        then = measure(before, rows, image_processor, name=f"{side} reference", **options) if compared else None
        found[side] = now, then
    processor = None if image_processor is None else type(image_processor).__name__
    return compare(record, found["benign"], found["harmful"], changed, processor)


def _processor(folder: Path, recorded: str | None, trust_remote_code: bool) -> Any:
    """The image processor beside the weights, of the library that resized the record's images."""
    # Left to itself transformers takes torchvision's wherever there is one, which resizes a little otherwise.
    library = {"backend": "pil"} if (recorded or "").endswith("Pil") else {}
    try:
        # Said in so many words: where transformers is told nothing, it asks at the keyboard.
        return AutoImageProcessor.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **library
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Expected an image processor beside the weights, found: {library_words(error)}. Pass image_processor=, "
            "the one the model was trained with."
        ) from error


# ---- measuring ----


@dataclass
class Measured:
    """One data set through one model."""

    measurement: Measurement = field(default_factory=Measurement)
    accuracy: float | None = None  # top-1; None where the rows have no labels that are the model's


# Through the immunized model, and through the reference where there is one.
Pair = tuple[Measured, Measured | None]


def image_rows(data: Any, name: str, model: PreTrainedModel, labels: str = "outputs") -> Any:
    """Rows for `measure` from a data set, with its "own" labels, or "none", or those of the model's "outputs"."""
    if isinstance(data, ImageRows):
        return data
    if hasattr(data, "__len__") and len(data) == 0:
        raise DataError(f"Expected at least one image in the {name} data, found none. Check the split.")
    image, label = find_columns(data, None, None, False)
    if label is None or labels == "none":
        return ImageRows(data, name, image)
    if labels == "own":
        return ImageRows(data, name, image, label if has_classes(data, label) else None)
    try:
        outputs = label_outputs(data, label, model.config, name)
    except DataError:
        return ImageRows(data, name, image)
    return ImageRows(data, name, image, label, outputs=outputs)


def measure(
    model: PreTrainedModel,
    rows: Any,
    image_processor: Any = None,
    *,
    name: str = "images",
    batch_size: int = 64,
    head_module: str | None = None,
    progress: bool = True,
    compared: bool = True,
) -> Measured:
    """Run rows through a model and fold up its features, to be compared with a reference's or not."""
    found = Measured(Measurement(compared=compared))
    right = seen = 0
    description = f"κ of {name} features"
    options = {"batch_size": batch_size, "head_module": head_module, "progress": progress}
    for batch in extract(model, rows, image_processor, description=description, **options):  # type: ignore[arg-type]
        with of_side(name):
            found.measurement.update(batch.features, batch.pixel_values, batch.labels)
        if batch.labels is not None:
            right += int((batch.logits.argmax(-1) == batch.labels).sum())
            seen += len(batch.labels)
    if seen and seen == found.measurement.factor.num_samples:
        found.accuracy = right / seen
    return found


# ---- comparing ----


def compare(
    record: ImmunizationRecord, benign: Pair, harmful: Pair, changed: list[str], processor: str | None = None
) -> Verification:
    """Compare what was measured, on images of `processor`, with a record; `changed` are differences of the weights."""
    reasons = [f"The weights are not those of the record: {'; '.join(changed)}."] if changed else []
    found = {"benign": benign, "harmful": harmful}
    processors = record.image_processor, processor
    other = {side: _other_data(getattr(record, side), now, processors) for side, (now, _) in found.items()}
    reasons += [f"The {side} images are not those of the record: {why}." for side, why in other.items() if why]
    if harmful[1] is None:
        reasons.append(
            "The κ's before immunization are the record's own, taken on trust; give the reference model to measure "
            "them too."
        )
    figures = list(_figures(record, found, {side: why is None for side, why in other.items()}))
    decisive = [figure for figure in figures if figure.claimed is not None]
    outcome = CANNOT_SAY
    if changed or any(figure.outcome == DIFFERS for figure in figures):
        outcome = DIFFERS
    elif decisive and all(figure.outcome == AGREES for figure in decisive):
        outcome = AGREES
    return Verification(outcome, figures, reasons)


def _figures(record: ImmunizationRecord, found: dict[str, Pair], same: dict[str, bool]) -> Iterator[Figure]:
    """Every claim against its measurement, in the order in which they are reported; `same` are the record's images."""
    if (metric := record.metric) is not None and metric.name == "accuracy":
        now = found["benign"][0]
        least = _ACCURACY_TOLERANCE if metric.precision in (None, "no") else _HALF_PRECISION_TOLERANCE
        tolerance = max(least, 1.0 / max(now.measurement.factor.num_samples, 1)) + 1e-12
        yield _judged("benign accuracy", metric.after, now.accuracy, same["benign"], tolerance=tolerance)
    sides: dict[str, SideRecord] = {}
    for side, (now, then) in found.items():
        claimed: SideRecord = getattr(record, f"{side}_features")
        sides[side] = _measured_side(now, then, claimed)
        for moment in ("before", "after") if then is not None else ("after",):
            claim, part = getattr(claimed, moment), getattr(sides[side], moment)
            old, new = (None if each is None else each.log10_kappa for each in (claim, part))
            note = "" if part is None else f"rank {part.rank}{', a bound from below' if part.is_bound else ''}"
            name = f"log10 κ of {side} features, {moment}"
            yield _judged(name, old, new, same[side], note, allowance=rounding_allowance(part))
        if then is not None and claimed.probing is not None:
            yield from _probing_figures(side, claimed.probing, sides[side], same[side])
    ratios = {"exact": exact_ratio(sides["benign"], sides["harmful"]), "intercept": _intercept_ratio(found)}
    for protocol, ratio in ratios.items():
        recorded = record.ratios.get(protocol)
        if protocol == "exact" or (recorded is not None and ratio is not None):  # the other needs a reference model
            allowance = sum(rounding_allowance(side.after) for side in sides.values())
            yield _ratio_figure(f"log10 RIR ({protocol})", recorded, ratio, all(same.values()), allowance)


def _probing_figures(side: str, claim: ProbingRecord, found: SideRecord, same: bool) -> Iterator[Figure]:
    """Steps of a probe, claimed and measured; those that do not suffice count as the budget."""
    now = found.probing if found.probing is not None and found.probing.targets == claim.targets else None
    for moment in ("before", "after"):
        # No direction is learned later by more than κ grows.
        allowance = 10 ** rounding_allowance(getattr(found, moment)) - 1
        for method, name in (("", moment), (" by conjugate gradient", f"conjugate_{moment}")):
            if method and claim.conjugate_before is None:
                continue
            taken = getattr(claim, name) or claim.max_steps
            again = None if now is None else getattr(now, name) or now.max_steps
            tolerance = max(1.0, _STEPS_TOLERANCE * taken)
            note = f"the record's are of {claim.targets}, these not" if now is None else ""
            title = f"steps of a {side} probe{method}, {moment}"
            yield _judged(title, taken, again, same, note, tolerance=tolerance, allowance=allowance * taken)


def _judged(
    name: str,
    claimed: float | None,
    measured: float | None,
    same: bool,
    note: str = "",
    tolerance: float = LOG10_TOLERANCE,
    allowance: float = 0.0,
) -> Figure:
    """Two numbers of the same images; beyond the tolerance, a difference within the allowance is no statement."""
    outcome = CANNOT_SAY
    if not same:
        note = "other images"
    elif claimed is None or measured is None:
        note = note or "one of the two is missing"
    elif abs(claimed - measured) <= tolerance:
        outcome = AGREES
    elif abs(claimed - measured) <= allowance:
        note += f"; so near rounding noise that machines may differ by {allowance:.2g}"
    else:
        outcome = DIFFERS
    return Figure(name, claimed, measured, outcome, note)


def rounding_allowance(part: ConditioningRecord | None) -> float:
    """How far log10 κ of the same weights and images may differ between machines; about 0 for healthy features.

    Features carry rounding noise of the dtype they were computed in, which moves a singular value by at most its norm;
    the rank rule's cut-off bounds that norm (see `rank_cutoff`). A smallest singular value near it moves a lot.
    """
    # A bound is taken at the cut-off, which follows from the features' size and is as good as that.
    if part is None or part.is_bound or part.cutoff is None or part.sigma_min is None:
        return 0.0
    return 2 * math.log10(1 + part.cutoff / part.sigma_min)


def _other_data(data: DataRecord | None, now: Measured, processors: tuple[str | None, str | None]) -> str | None:
    """Why these are not the record's images, whose image processor may be another; None where they are."""
    if data is None or data.checksum is None or data.size is None:
        return "it does not say by which checksum to know them"
    count = now.measurement.factor.num_samples
    if count != data.size:
        return f"{data.size} images then, {count} now"
    if math.isclose(now.measurement.checksum, data.checksum, rel_tol=1e-6):
        return None
    then, here = processors
    if then is None or here is None or then == here:
        return "as many, but with other pixel values (other images, or another image processor)"
    remedy = f". Install torchvision for {then}" * (here == f"{then}Pil")
    return f"as many, but with other pixel values, of {here} and not {then}{remedy}"


def _measured_side(now: Measured, then: Measured | None, claimed: SideRecord) -> SideRecord:
    """κ before and after; without a reference model, the κ before is the record's, if it is of as many images."""
    if then is not None:
        return describe_side(now.measurement, then.measurement)
    factor, before = now.measurement.factor, claimed.before
    if before is None or (before.num_samples, before.dim) != (factor.num_samples, factor.dim):
        return SideRecord(None, ConditioningRecord.of(factor.conditioning(None)))
    return SideRecord(before, ConditioningRecord.of(factor.conditioning(before.conditioning())))


def _intercept_ratio(found: dict[str, Pair]) -> RatioRecord | None:
    sides = [(now.measurement, None if then is None else then.measurement) for now, then in found.values()]
    return intercept_ratio(*sides)


def _ratio_figure(
    name: str, claim: RatioRecord | None, now: RatioRecord | None, same: bool, allowance: float
) -> Figure:
    claimed, measured = (None if ratio is None else ratio.log10_rir for ratio in (claim, now))
    if now is None:
        return _judged(name, claimed, None, same, "no κ before immunization to divide by")
    found, recorded = (_BOUND_WORDS.get(ratio.bound if ratio else None, "undetermined") for ratio in (now, claim))
    if claim is not None and same and (claim.bound != now.bound or measured is None):
        outcome = AGREES if claim.bound == now.bound else DIFFERS
        return Figure(name, claimed, measured, outcome, f"{found} now, {recorded} by the record")
    return _judged(name, claimed, measured, same, "" if now.bound is None else found, allowance=allowance)
