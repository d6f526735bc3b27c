"""Finding the image and the label column of a dataset, and checking its labels before training starts.

Nothing here decodes an image, save for one row where the columns cannot be known otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from hf_immunize.errors import DataError


logger = logging.get_logger(__name__)


def outputs_by_name(names: Sequence[str], config: Any) -> list[int] | None:
    """For each class, the output that bears its name."""
    held = _model_names(config)
    count = Counter(held.values())
    # A name that two outputs bear tells nothing, unless the classes stand in the model's own order.
    alone = {name: index for index, name in held.items() if count[name] == 1}
    found = [index if held.get(index) == name else alone.get(name, -1) for index, name in enumerate(names)]
    return None if all(index < 0 for index in found) else found


def label_outputs(dataset: Any, label_column: str, config: Any, name: str) -> list[int] | None:
    """For each label of a data set, the output that stands for its class."""
    features = getattr(dataset, "features", None) or {}
    names = getattr(features.get(label_column), "names", None)
    if not names:
        if is_transformed(dataset):
            _warn_of_order([feature.names for feature in features.values() if hasattr(feature, "names")], config, name)
        return None
    outputs = outputs_by_name(names, config)
    held = list(_model_names(config).values())
    if outputs is None:
        if len(names) < config.num_labels:
            raise DataError(
                f"Expected the classes of {name} among the model's {config.num_labels}"
                f"{f' ({listed(held, 3)})' if held else ', which have no names'}, found {len(names)} others "
                f"({listed(names, 3)}). Name the model's outputs in model.config.id2label, rename the classes, or "
                f"load the model with a new head of num_labels={len(names)} (--new_head True on the command line)."
            )
        if held:
            logger.warning_once(
                f"No class of {name} ({listed(names, 3)}) is named like one of the model's ({listed(held, 3)}): label "
                "i is taken for output i. Rename the classes, or give the model a new head for another task."
            )
        return None
    unknown = {label for label, output in enumerate(outputs) if output < 0}
    if unknown and not is_transformed(dataset):
        unknown &= set(read_labels(dataset, label_column))
    if unknown:
        raise DataError(
            f"Expected all classes of {name} among the model's, found {listed((names[i] for i in sorted(unknown)), 5)}"
            " that are not. Rename them, drop them, or give the model a new head (--new_head True on the command "
            "line)."
        )
    return None if outputs == list(range(len(outputs))) else outputs


def _warn_of_order(stored: list[list[str]], config: Any, name: str) -> None:
    """A transform makes the labels, and nobody knows whether it numbers classes as the model does."""
    outputs = outputs_by_name(stored[0], config) if len(stored) == 1 else None
    if outputs is not None and outputs != list(range(len(outputs))):
        logger.warning_once(
            f"The classes of {name} stand in another order than the model's, and a transform makes the labels: they "
            "are taken for outputs as they come. Let the transform number them as model.config.id2label does."
        )


def _model_names(config: Any) -> dict[int, str]:
    """Names of the outputs; empty where they are those that transformers gives for want of others."""
    held = {int(index): str(name) for index, name in (getattr(config, "id2label", None) or {}).items()}
    return {} if all(name == f"LABEL_{index}" for index, name in held.items()) else held


LABEL_NAMES = ("labels", "label")


def find_columns(
    dataset: Any, image_column: str | None = None, label_column: str | None = None, need_label: bool = True
) -> tuple[str, str | None]:
    """Find the column with the images and the one with the labels."""
    kinds = _column_kinds(dataset)
    return (
        _find_image_column(kinds, image_column),
        _find_label_column(kinds, label_column, need_label),
    )


def validate_labels(dataset: Any, label_column: str, num_labels: int, name: str) -> None:
    """Check that all labels are integers in ``range(num_labels)``."""
    if not isinstance(dataset, datasets.Dataset) or is_transformed(dataset) or label_column not in dataset.features:
        return
    labels = read_labels(dataset, label_column)
    names = getattr(dataset.features[label_column], "names", None)
    numbers = [label for label in labels if isinstance(label, (int, np.integer))]
    classes = len(names) if names else max(numbers, default=0) + 1
    for row, label in enumerate(labels):
        check_label(label, num_labels, name, row, classes)


def check_label(label: Any, num_labels: int, name: str, row: int, classes: int | None = None) -> None:
    """Check one label; see `validate_labels`, which says what is raised."""
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
    """Tell whether a ``datasets.Dataset`` makes its items by ``with_transform``, whatever its stored columns."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def is_stored_image(value: Any) -> bool:
    """Tell whether a value is an image as `datasets` stores it: its bytes, or the path of its file."""
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def find_stored_label_column(dataset: datasets.Dataset, label_column: str | None = None) -> str:
    """Find the label column among the stored columns, leaving aside a transform."""
    column = _find_label_column(_column_kinds(dataset.with_format(None)), label_column, needed=True)
    assert column is not None
    return column


def read_labels(dataset: datasets.Dataset, column: str) -> list[Any]:
    """Read one stored column whole, without the others and without a transform."""
    return dataset.with_format(None)[column][:]


def listed(names: Any, limit: int = 20) -> str:
    """Join names for an error message."""
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
