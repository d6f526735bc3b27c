"""Measuring an immunized checkpoint again and comparing with its record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoImageProcessor

from hf_immunize.data.splits import measured
from hf_immunize.errors import DataError
from hf_immunize.hub.collect import recorded_draw, refuse_training_images
from hf_immunize.hub.comparison import Verification, compare
from hf_immunize.hub.hashes import changed_weights
from hf_immunize.hub.load import fetch
from hf_immunize.hub.measure import Measured, image_rows, measure
from hf_immunize.hub.parts import DataRecord
from hf_immunize.hub.record import read_record
from hf_immunize.hub.whole import load_model
from hf_immunize.text import library_words


if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    On the images the record was made of (the same number, with the same pixel values), figures of the
    protocol "exact" agree when their decimal logarithms lie within 1e-3, and those of "groups" when the new mean
    lies within the recorded spread. Where the smallest singular value of float32 features lies so near rounding noise
    that machines differ by more than 1e-3, a difference of that size is no statement. On other images nothing can be
    said. Weights other than the recorded ones differ, whatever their figures.

    Without `reference` the κ's before immunization, into which RIR is divided, are the record's own, on trust.

    Args:
        repo_or_folder: Id on the Hub, or a folder.
        benign: Benign images: a `datasets.Dataset`, rows of ``pixel_values``, or what `load_image_dataset` takes; then
            the validation split is used, else the test split, else what training held out by the record.
        harmful: Harmful images.
        reference: The model before immunization, or where to load it from, to measure its κ's too.
        image_processor: In place of the one beside the weights.
        batch_size: Images a batch.
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
    processor = image_processor or _processor(folder, trust_remote_code)
    before: PreTrainedModel | None = None
    if reference is not None:
        before = reference if isinstance(reference, torch.nn.Module) else load_model(fetch(reference, token=token))
    options: dict[str, Any] = {"batch_size": batch_size, "head_module": head_module, "progress": progress}
    options["keep_features"] = before is not None and "groups" in record.ratios
    found: dict[str, tuple[Measured, Measured | None]] = {}
    for side, data in (("benign", benign), ("harmful", harmful)):
        claimed: DataRecord | None = getattr(record, side)
        if isinstance(data, (str, os.PathLike)):
            data = measured(str(data), recorded_draw(claimed))
        rows = image_rows(data, side, model, labels=side == "benign")
        refuse_training_images(claimed, rows, side)
        if processor is None and "pixel_values" not in rows[0]:
            raise DataError(
                f"Expected an image processor beside the weights, found none, and {side} data with images. Pass "
                "image_processor=, the one the model was trained with."
            )
        now = measure(model, rows, processor, name=side, **options)
        then = None if before is None else measure(before, rows, processor, name=f"{side} reference", **options)
        found[side] = now, then
    return compare(record, found["benign"], found["harmful"], changed)


def _processor(folder: Path, trust_remote_code: bool) -> Any:
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        # Said in so many words: where transformers is told nothing, it asks at the keyboard.
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Expected an image processor beside the weights, found: {library_words(error)}. Pass image_processor=, "
            "the one the model was trained with."
        ) from error
