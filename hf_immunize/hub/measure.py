"""Measuring a saved model anew: κ of its features, its benign accuracy, RIR over groups of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_immunize.data.class_names import label_outputs
from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageRows
from hf_immunize.errors import DataError
from hf_immunize.features.extraction import extract
from hf_immunize.features.measurement import Measurement, of_side
from hf_immunize.hub.collect import describe_ratio, innermost
from hf_immunize.hub.parts import RatioRecord
from hf_immunize.spectra.ratio import relative_immunization_ratio


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Measured:
    """One data set through one model.

    Attributes:
        measurement: Its features' QR factor and the images' checksum.
        accuracy: Top-1 accuracy; None where the rows have no labels that are the model's.
        features: The features, shape ``(N, D)``, where they were asked for.
        fingerprint: The `datasets` fingerprint of the rows, if they have one.
    """

    measurement: Measurement = field(default_factory=Measurement)
    accuracy: float | None = None
    features: Tensor | None = None
    fingerprint: str | None = None


def measure(
    model: PreTrainedModel,
    rows: Any,
    image_processor: Any = None,
    *,
    name: str = "images",
    batch_size: int = 64,
    head_module: str | None = None,
    keep_features: bool = False,
    progress: bool = True,
) -> Measured:
    """Run a data set through a model and fold up its features.

    Args:
        model: An image classifier.
        rows: As `image_rows` gives them.
        image_processor: Turns images into pixel values.
        name: What to call the data at the progress bar.
        batch_size: Images a batch.
        head_module: The classifier's name, where it cannot be found.
        keep_features: Whether to keep all features, N·D numbers.
        progress: Whether to show a progress bar.

    Returns:
        `Measured`.
    """
    found = Measured(fingerprint=getattr(innermost(rows), "_fingerprint", None))
    kept: list[Tensor] = []
    right = seen = 0
    description = f"κ of {name} features"
    options = {"batch_size": batch_size, "head_module": head_module, "progress": progress}
    for batch in extract(model, rows, image_processor, description=description, **options):  # type: ignore[arg-type]
        with of_side(name):
            found.measurement.update(batch.features, batch.pixel_values)
        if batch.labels is not None:
            right += int((batch.logits.argmax(-1) == batch.labels).sum())
            seen += len(batch.labels)
        if keep_features:
            kept.append(batch.features.cpu())
    if seen and seen == found.measurement.factor.num_samples:
        found.accuracy = right / seen
    found.features = torch.cat(kept) if keep_features else None
    return found


def groups_ratio(
    harmful: tuple[Measured, Measured],
    benign: tuple[Measured, Measured],
    *,
    num_groups: int | None = None,
    group_size: int = 100,
    seed: int = 0,
) -> RatioRecord | None:
    """RIR over random groups of images, with its spread (protocol "groups").

    Args:
        harmful: Through the immunized and the reference model, with features.
        benign: Likewise.
        num_groups: Number of groups; by default 20, or as many disjoint ones as the rows give.
        group_size: Images a group.
        seed: Seed of the draw.

    Returns:
        The ratio; None where there are fewer images than a group needs.
    """
    fewest = min(harmful[0].measurement.factor.num_samples, benign[0].measurement.factor.num_samples)
    if fewest < group_size:
        return None
    count = max(1, min(20, fewest // group_size)) if num_groups is None else num_groups
    ratio = relative_immunization_ratio(
        harmful=harmful[0].features,
        harmful_reference=harmful[1].features,
        benign=benign[0].features,
        benign_reference=benign[1].features,
        protocol="groups",
        num_groups=count,
        group_size=group_size,
        seed=seed,
    )
    return describe_ratio(ratio, num_groups=count, group_size=group_size, seed=seed)


def image_rows(data: Any, name: str, model: PreTrainedModel, labels: bool = True) -> Any:
    """Rows to measure on, from a data set.

    Args:
        data: A `datasets.Dataset` with images, or rows of ``pixel_values``.
        name: What to call it in an error.
        model: Its class names number the labels where the data have the same names.
        labels: Whether they are wanted.

    Returns:
        Rows for `measure`; labels that are not the model's are left out.

    Raises:
        DataError: If it is empty or lacks images.
    """
    if isinstance(data, ImageRows):
        return data
    if hasattr(data, "__len__") and len(data) == 0:
        raise DataError(f"Expected at least one image in the {name} data, found none. Check the split.")
    image, label = find_columns(data, None, None, False)
    if label is None or not labels:
        return ImageRows(data, name, image)
    try:
        outputs = label_outputs(data, label, model.config, name)
    except DataError:
        return ImageRows(data, name, image)
    return ImageRows(data, name, image, label, outputs=outputs)
