"""Datasets as a user gives them, checked and made ready before anything runs."""

from __future__ import annotations

from typing import Any

from hf_immunize.errors import DataError
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.distributed import world_size
from hf_immunize.vision.columns import find_columns, validate_labels
from hf_immunize.vision.images import ImageRows
from hf_immunize.vision.pairing import PairedDataset


def image_rows(dataset: Any, name: str, args: ImmunizationArguments, num_labels: int, labels: str = "needed") -> Any:
    """A dataset as rows of an image (or pixel values) and a label.

    Args:
        dataset: A `datasets.Dataset`, or a map-style dataset of dictionaries.
        name: What to call it in an error.
        args: For the names of columns.
        num_labels: The number of the model's outputs.
        labels: "needed", "optional", or "ignored": then they are left out.

    Returns:
        An `ImageRows`; the dataset itself where it is one.

    Raises:
        DataError: If it is empty, lacks a column, or a label is out of range.
    """
    if isinstance(dataset, ImageRows):
        return dataset
    # A streamed dataset has no length; `find_columns` says what to do about it.
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError(f"Expected at least one image in {name}, found none. Check the split and its filters.")
    wanted = args.label_column_name if labels == "needed" else None
    image, label = find_columns(dataset, args.image_column_name, wanted, labels == "needed")
    if labels == "ignored" or label is None:
        return ImageRows(dataset, name, image)
    validate_labels(dataset, label, num_labels, name)
    return ImageRows(dataset, name, image, label, num_labels)


def paired_rows(benign: Any, harmful: Any, args: ImmunizationArguments) -> PairedDataset:
    """Benign and harmful rows as one dataset of pairs, long enough for a batch.

    Args:
        benign: Benign rows.
        harmful: Harmful rows.
        args: For the batch size.

    Returns:
        The pairs.

    Raises:
        DataError: If a side is missing or empty, or no batch of two or more images can be made.
    """
    # ImageRows of harmful data have no labels; items for a collator of the user's keep theirs.
    paired = PairedDataset(benign, harmful, harmful_labels=True)
    batch = args.train_batch_size * world_size()
    if batch < 2:
        raise DataError(
            "Expected a global batch of at least 2, found 1: κ of a single image is 1. Raise "
            "per_device_train_batch_size; gradient accumulation does not help, since κ is taken of each micro-batch."
        )
    if args.dataloader_drop_last and len(paired) < batch:
        raise DataError(
            f"Expected at least one full batch of {batch}, found {len(paired)} benign images. Lower "
            "per_device_train_batch_size or give more images."
        )
    return paired
