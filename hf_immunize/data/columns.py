"""Finding the image and the label column of a dataset, and checking its labels before training starts.

Nothing here decodes an image, save for one row where the columns cannot be known otherwise.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from hf_immunize.errors import DataError


LABEL_NAMES = ("labels", "label")


def find_columns(
    dataset: Any, image_column: str | None = None, label_column: str | None = None, need_label: bool = True
) -> tuple[str, str | None]:
    """Find the column with the images and the one with the labels.

    Images are ``pixel_values`` where present (a dataset with a transform, a dataset of tensors), else the one column
    of images. Labels are the one ``ClassLabel`` column, else the one named ``labels`` or ``label``.

    Args:
        dataset: A ``datasets.Dataset``, or any map-style dataset whose items are dictionaries.
        image_column: The image column, where it cannot be found.
        label_column: The label column, where it cannot be found.
        need_label: Whether missing labels are an error.

    Returns:
        The image column and the label column; the latter is None where no label is needed and none was found.

    Raises:
        DataError: If a column is missing or ambiguous; the message lists the columns.

    Examples:
        >>> import torch
        >>> find_columns([{"pixel_values": torch.zeros(3, 8, 8), "labels": 1}])
        ('pixel_values', 'labels')
    """
    kinds = _column_kinds(dataset)
    return (
        _find_image_column(kinds, image_column),
        _find_label_column(kinds, label_column, need_label),
    )


def validate_labels(dataset: Any, label_column: str, num_labels: int, name: str) -> None:
    """Check that all labels are integers in ``range(num_labels)``.

    Only the label column is read. Where labels exist only in items made on the fly (a transform, a torch dataset),
    nothing is checked here, since that would load every image; `ImageRows` then checks each item as it comes.

    Args:
        dataset: The dataset.
        label_column: Its label column.
        num_labels: The number of the model's outputs.
        name: How messages call the dataset, such as ``"train_dataset"``.

    Raises:
        DataError: If a label is missing, no integer or out of range; the message names the first such row.

    Examples:
        >>> from datasets import Dataset
        >>> validate_labels(Dataset.from_dict({"label": [0, 1, 5]}), "label", num_labels=3, name="train_dataset")
        Traceback (most recent call last):
        ...
        hf_immunize.errors.DataError: Row 2 of train_dataset has the label 5, but the model has 3 outputs, so labels
        are integers from 0 to 2; load the model with num_labels=6, one for each class, or relabel the data.
    """
    if not isinstance(dataset, datasets.Dataset) or is_transformed(dataset) or label_column not in dataset.features:
        return
    labels = read_labels(dataset, label_column)
    names = getattr(dataset.features[label_column], "names", None)
    numbers = [label for label in labels if isinstance(label, (int, np.integer))]
    classes = len(names) if names else max(numbers, default=0) + 1
    for row, label in enumerate(labels):
        check_label(label, num_labels, name, row, classes)


def check_label(label: Any, num_labels: int, name: str, row: int, classes: int | None = None) -> None:
    """Check one label; see `validate_labels`, which says what is raised.

    Args:
        label: The label.
        num_labels: The number of the model's outputs.
        name: How messages call the dataset.
        row: The row the label belongs to.
        classes: The number of the data's classes, where it is known.
    """
    is_integer = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
    if is_integer and 0 <= label < num_labels:
        return
    if label is None:
        remedy = "drop the rows without a label"
    elif not is_integer:
        remedy = "turn the labels into integers, for example by dataset.class_encode_column"
    elif label < 0:
        remedy = "drop the rows without a valid label"
    elif classes is None:
        remedy = f"load the model with num_labels= of all classes, {label + 1} at least, or relabel the data"
    else:
        remedy = f"load the model with num_labels={classes}, one for each class, or relabel the data"
    raise DataError(
        f"Row {row} of {name} has the label {label!r}, but the model has {num_labels} outputs, so labels are integers "
        f"from 0 to {num_labels - 1}; {remedy}."
    )


def is_transformed(dataset: Any) -> bool:
    """Tell whether a ``datasets.Dataset`` makes its items by ``with_transform``, whatever its stored columns.

    Args:
        dataset: Any dataset.

    Returns:
        Whether it is a ``datasets.Dataset`` with a transform.
    """
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def is_stored_image(value: Any) -> bool:
    """Tell whether a value is an image as `datasets` stores it: its bytes, or the path of its file.

    Args:
        value: A cell of a column.

    Returns:
        Whether it is.
    """
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def find_stored_label_column(dataset: datasets.Dataset, label_column: str | None = None) -> str:
    """Find the label column among the stored columns, leaving aside a transform.

    Args:
        dataset: The dataset.
        label_column: The column, where it cannot be found.

    Returns:
        The column's name.

    Raises:
        DataError: If it is missing or ambiguous.
    """
    column = _find_label_column(_column_kinds(dataset.with_format(None)), label_column, needed=True)
    assert column is not None
    return column


def read_labels(dataset: datasets.Dataset, column: str) -> list[Any]:
    """Read one stored column whole, without the others and without a transform.

    Args:
        dataset: The dataset.
        column: The column's name.

    Returns:
        Its values, one a row.
    """
    return dataset.with_format(None)[column][:]


def listed(names: Any, limit: int = 20) -> str:
    """Join names for an error message.

    Args:
        names: Any iterable of names.
        limit: How many are written out.

    Returns:
        The names in quotes, or "none".
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more if names else "none"


def _column_kinds(dataset: Any) -> dict[str, str]:
    """Map each column to "image", "class" or "other"."""
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"Expected one dataset, but got splits; choose one of {listed(dataset)}, as in data['train'].")
    if isinstance(dataset, dict):
        raise DataError(f"Expected one dataset, but got a dictionary with {listed(dataset)}; give one of its values.")
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, str):
        raise DataError(f"Expected a dataset of images, but got {type(dataset).__name__}; load it first.")
    if isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        raise DataError(
            f"Expected a dataset with rows that can be looked up, but got {type(dataset).__name__}; load the data "
            f"without streaming."
        )
    if isinstance(dataset, datasets.Dataset) and not is_transformed(dataset):
        kinds = {datasets.Image: "image", datasets.ClassLabel: "class"}
        return {column: kinds.get(type(feature), "other") for column, feature in dataset.features.items()}
    if len(dataset) == 0:
        raise DataError("The dataset is empty, so it has no columns; give at least one image.")
    item = dataset[0]
    if not isinstance(item, dict):
        raise DataError(
            f"A dataset should yield dictionaries such as {{'pixel_values': ..., 'labels': ...}}, but its first item "
            f"is a {type(item).__name__}."
        )
    return {
        column: "image" if isinstance(value, Image.Image) or is_stored_image(value) else "other"
        for column, value in item.items()
    }


def _find_image_column(kinds: dict[str, str], asked: str | None) -> str:
    if asked is not None:
        return _existing(kinds, asked, "image_column")
    if "pixel_values" in kinds:
        return "pixel_values"
    images = [column for column, kind in kinds.items() if kind == "image"]
    if len(images) != 1:
        found = f"{len(images)} image columns" if images else "no image column (and no 'pixel_values')"
        raise DataError(
            f"Expected one column of images, but found {found} among {listed(kinds)}; name it with image_column=... "
            f"(image_column_name= in ImmunizationArguments) or cast it with dataset.cast_column(name, "
            f"datasets.Image())."
        )
    return images[0]


def _find_label_column(kinds: dict[str, str], asked: str | None, needed: bool) -> str | None:
    if asked is not None:
        return _existing(kinds, asked, "label_column")
    classes = [column for column, kind in kinds.items() if kind == "class"]
    named = [column for column in LABEL_NAMES if column in kinds]
    if len(classes) == 1:
        return classes[0]
    if len(named) == 1 or (named and not classes):
        return named[0]
    if not needed:
        return None
    found = f"several: {listed(classes)}" if classes else "none"
    remedy = "name it with label_column=... (label_column_name= in ImmunizationArguments)"
    if list(kinds.values()) == ["image"]:
        remedy = (
            "add one, or, of a folder of images, give each class a subfolder of its own with all of its images "
            "directly in it"
        )
    raise DataError(
        f"Expected one label column, of type ClassLabel or named 'label' or 'labels', but found {found} among "
        f"{listed(kinds)}; {remedy}."
    )


def _existing(kinds: dict[str, str], column: str, option: str) -> str:
    if not isinstance(column, str) or column not in kinds:
        raise DataError(f"{option}={column!r} is not in the dataset; its columns are {listed(kinds)}.")
    return column
