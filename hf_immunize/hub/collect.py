"""From data sets, models and measurements to the parts of a record. No path, user name or image gets in."""

from __future__ import annotations

import math
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_immunize import __version__
from hf_immunize.data.images import count_trained, sketch_of
from hf_immunize.data.sources import HeldOut, choose
from hf_immunize.errors import RankError, TrainingImagesError
from hf_immunize.features.extract import Measurement, probing_steps
from hf_immunize.hub.record import (
    BaseModelRecord,
    ConditioningRecord,
    DataRecord,
    ImmunizationRecord,
    ProbingRecord,
    RatioRecord,
    SideRecord,
)
from hf_immunize.spectra.ratio import ImmunizationRatio, relative_immunization_ratio
from hf_immunize.text import printable, public_name


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{40})/")
_LIBRARIES = ("torch", "transformers", "datasets", "huggingface_hub", "safetensors")


def is_hub_id(source: Any) -> bool:
    """Whether a source is the id of a repository rather than a path.

    >>> is_hub_id("google/vit-base-patch16-224"), is_hub_id("./runs/mine"), is_hub_id("runs")
    (True, False, False)
    """
    return bool(HUB_ID.fullmatch(str(source))) and not Path(str(source)).expanduser().exists()


def describe_base_model(name: Any, revision: str | None = None) -> BaseModelRecord:
    """The model before immunization, from what was given to ``from_pretrained``."""
    if not str(name or ""):
        return BaseModelRecord("a model made in memory")
    on_hub = is_hub_id(name)
    return BaseModelRecord(public_name(name), revision if on_hub else None, on_hub)


def describe_dataset(dataset: Any, train: Any = None) -> DataRecord | None:
    """One task's data, from what `datasets` knows of them."""
    inner = innermost(dataset if dataset is not None else train)
    if inner is None:
        return None
    source, split = _hub_source(inner), getattr(inner, "split", None)
    return DataRecord(
        name=dataset_name(inner),
        on_hub=source is not None,
        revision=source[2] if source else None,
        split=printable(split) if split is not None else None,
        fingerprint=getattr(innermost(dataset), "_fingerprint", None),
        train_size=_size(train),
        size=_size(dataset),
        train_sketch=sketch_of(train),
        sketch=sketch_of(dataset),
    )


def dataset_name(dataset: Any) -> str:
    """The name that `datasets` knows of images."""
    inner = innermost(dataset)
    source = _hub_source(inner)
    return public_name(
        source[1] if source else getattr(getattr(inner, "info", None), "dataset_name", None) or "unnamed images"
    )


def _hub_source(inner: Any) -> re.Match[str] | None:
    """Name and revision on the Hub, where the images are from there."""
    files = getattr(getattr(inner, "info", None), "download_checksums", None) or {}
    return next((match for file in files if (match := _HUB_FILE.match(str(file)))), None)


def recorded_draw(data: DataRecord | None) -> HeldOut | None:
    """How images to measure on were held out in training; None where they were not, or the record does not say."""
    if data is None or data.held_out_fraction is None or data.held_out_seed is None:
        return None
    return HeldOut(data.held_out_fraction, data.held_out_seed)


def drawn_again(images: Any, record: ImmunizationRecord, side: str) -> Any:
    """Of one task's images, those that training drew by its option ``max_images``."""
    data: DataRecord | None = getattr(record, side)
    limit = None if data is None else data.size
    return images.select(choose(len(images), limit, record.method.seed))


def draw_like(record: ImmunizationRecord | None, side: str, fraction: float | None, seed: int | None) -> HeldOut:
    """How training held out images to measure on, by its record, save for what is given."""
    usual = HeldOut() if record is None else HeldOut(seed=record.method.seed)
    draw = recorded_draw(getattr(record, side, None)) or usual
    return HeldOut(draw.fraction if fraction is None else fraction, draw.seed if seed is None else seed)


def refuse_training_images(data: DataRecord | None, rows: Any, name: str) -> None:
    """Refuse to measure a model on images that it was trained on, by its record."""
    if data is None or data.train_sketch is None:
        return
    found = count_trained(rows.hashes, data.train_sketch, data.sketch)
    if found:
        raise TrainingImagesError(
            f"Expected {name} images that the model was not trained on, found at least {found} of {len(rows)} among "
            "its training images by its record. Give the data that training had, with the fraction and the seed that "
            "it held out by (the default of audit and verify), or a test split that it never saw."
        )


def describe_side(now: Measurement | None, before: Measurement | None) -> SideRecord:
    """κ of one task before and after."""
    if now is None:
        return SideRecord()
    start = before.factor.conditioning() if before is not None and now.same_data(before) else None
    after = now.factor.conditioning(start)
    steps = probing_steps(now, before)
    probing = None if steps is None else ProbingRecord(*steps)
    return SideRecord(None if start is None else ConditioningRecord.of(start), ConditioningRecord.of(after), probing)


def exact_ratio(benign: SideRecord, harmful: SideRecord) -> RatioRecord | None:
    """RIR over all images, from the conditionings of both tasks; None unless all four are known."""
    known = [part.conditioning() for side in (harmful, benign) for part in (side.after, side.before) if part]
    if len(known) < 4:
        return None
    h, h0, b, b0 = known
    return describe_ratio(relative_immunization_ratio(harmful=h, harmful_reference=h0, benign=b, benign_reference=b0))


def intercept_ratio(
    benign: tuple[Measurement | None, Measurement | None], harmful: tuple[Measurement | None, Measurement | None]
) -> RatioRecord | None:
    """RIR of a probe with an intercept, from what was measured now and before; None unless all four are known."""
    known: dict[str, Any] = {}
    try:
        for side, (now, before) in (("benign", benign), ("harmful", harmful)):
            start = None if now is None else now.reference_conditioning(before, intercept=True)
            if now is None or start is None:
                return None
            known[f"{side}_reference"], known[side] = start, now.factor.conditioning(start, intercept=True)
    except RankError:  # the starting model has one feature for all images
        return None
    return describe_ratio(relative_immunization_ratio(**known, protocol="intercept"))


def describe_ratio(ratio: ImmunizationRatio) -> RatioRecord:
    """A ratio as a record keeps it: logarithms, which stay finite."""
    told = ratio.bound != "undetermined" and math.isfinite(ratio.log10_rir)
    return RatioRecord(
        log10_rir=ratio.log10_rir if told else None,
        log10_harmful_ratio=_log10(ratio.harmful_ratio),
        log10_benign_ratio=_log10(ratio.benign_ratio),
        bound=ratio.bound if told else "undetermined",
    )


def software_versions() -> dict[str, str]:
    """Versions of the libraries that decide the figures."""
    own = {"hf_immunize": __version__, "python": platform.python_version()}
    return own | {library: version(library) for library in _LIBRARIES}


def innermost(dataset: Any) -> Any:
    """The data set within wrappers such as `ImageRows`."""
    for _ in range(8):
        inner = getattr(dataset, "dataset", None)
        if inner is None or hasattr(dataset, "_fingerprint"):
            return dataset
        dataset = inner
    return dataset


def _log10(value: float) -> float | None:
    return math.log10(value) if value > 0 and math.isfinite(value) else None


def _size(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
