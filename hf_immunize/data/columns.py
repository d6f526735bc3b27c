"""The image and the label column of a dataset, its labels, and the model's outputs that stand for them."""

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
    """For each class, the output of its name, or −1; None where no output has the name of a class."""
    known = _model_names(config)
    count = Counter(known.values())
    # A name of two outputs says nothing, unless the classes come in the model's own order.
    unique = {name: index for index, name in known.items() if count[name] == 1}
    found = [index if known.get(index) == name else unique.get(name, -1) for index, name in enumerate(names)]
    return None if all(index < 0 for index in found) else found


def label_outputs(dataset: Any, label_column: str, config: Any, name: str) -> list[int] | None:
    """For each label of a data set, the output that stands for its class; None where label i is output i."""
    features = getattr(dataset, "features", None) or {}
    names = getattr(features.get(label_column), "names", None)
    if not names:
        if is_transformed(dataset):
            stored = [feature.names for feature in features.values() if hasattr(feature, "names")]
            outputs = outputs_by_name(stored[0], config) if len(stored) == 1 else None
            if outputs is not None and outputs != list(range(len(outputs))):
                logger.warning_once(
                    f"The classes of {name} have another order than the model's, and a transform makes the labels: "
                    "they are taken for outputs as they come. Let it number them as model.config.id2label does."
                )
        return None
    outputs, known = outputs_by_name(names, config), list(_model_names(config).values())
    if outputs is None and len(names) >= config.num_labels:
        if known:
            logger.warning_once(
                f"No class of {name} ({listed(names, 3)}) has the name of one of the model's ({listed(known, 3)}): "
                "label i is taken for output i. Rename the classes, or give the model a new head."
            )
        return None
    outputs = outputs or [-1] * len(names)
    unknown = {label for label, output in enumerate(outputs) if output < 0}
    if unknown and not is_transformed(dataset):
        unknown &= set(read_labels(dataset, label_column))
    if unknown:
        raise DataError(
            f"Expected classes of {name} among the model's {config.num_labels} ({listed(known, 3)}), found "
            f"{listed(map(names.__getitem__, unknown), 5)} too. Rename or drop them, name the outputs in "
            f"model.config.id2label, or load the model with a new head (--new_head) of num_labels={len(names)}."
        )
    return None if outputs == list(range(len(outputs))) else outputs


def _model_names(config: Any) -> dict[int, str]:
    """Names of the outputs; empty where they are the defaults of transformers."""
    names = {int(index): str(name) for index, name in (getattr(config, "id2label", None) or {}).items()}
    return {} if all(name == f"LABEL_{index}" for index, name in names.items()) else names


LABEL_NAMES = ("labels", "label")


def find_columns(
    dataset: Any, image_column: str | None = None, label_column: str | None = None, need_label: bool = True
) -> tuple[str, str | None]:
    """Names of the columns with images and with labels; no label column only where none is needed."""
    kinds = _column_kinds(dataset)
    return _find_image_column(kinds, image_column), _find_label_column(kinds, label_column, need_label)


def validate_labels(dataset: Any, label_column: str, num_labels: int, name: str) -> None:
    """Check that all stored labels are integers in ``range(num_labels)``."""
    # Those of other items `ImageRows` checks as they come.
    labels = stored_labels(dataset, label_column) if isinstance(dataset, datasets.Dataset) else None
    for row, label in enumerate(labels or []):
        check_label(label, num_labels, name, row)


def check_label(label: Any, num_labels: int, name: str, row: int) -> None:
    """Check the label of one row."""
    is_integer = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
    if is_integer and 0 <= label < num_labels:
        return
    remedy = "Drop such rows, or make integers of names by dataset.class_encode_column"
    if is_integer and label > 0:
        remedy = f"Load the model with one output per class (num_labels={label + 1} or more), or relabel the data"
    raise DataError(
        f"Expected labels from 0 to {num_labels - 1}, as the model has {num_labels} outputs, found {label!r} in row "
        f"{row} of {name}. {remedy}."
    )


def is_transformed(dataset: Any) -> bool:
    """Whether a ``datasets.Dataset`` makes its items by ``with_transform``, whatever its stored columns."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def is_stored_image(value: Any) -> bool:
    """Whether a value is an image as `datasets` stores it: its bytes, or the path of its file."""
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def find_stored_label_column(dataset: datasets.Dataset, label_column: str | None = None) -> str:
    """The label column among the stored columns, whatever a transform makes of them."""
    column = _find_label_column(_column_kinds(dataset.with_format(None)), label_column, needed=True)
    assert column is not None
    return column


def read_labels(dataset: datasets.Dataset, column: str) -> list[Any]:
    """One stored column, without the others and without a transform."""
    return dataset.with_format(None)[column][:]


def stored_labels(dataset: Any, column: str) -> list[Any] | None:
    """The labels of all rows; None where items are made on the fly, and to know them would load every image."""
    if isinstance(dataset, list):
        return [row.get(column) for row in dataset]
    stored = isinstance(dataset, datasets.Dataset) and not is_transformed(dataset) and column in dataset.features
    return read_labels(dataset, column) if stored else None


def has_classes(dataset: Any, column: str) -> bool:
    """Whether every row has a class number, as far as that is known without loading images."""
    labels = stored_labels(dataset, column)
    return labels is not None and all(isinstance(label, int) and label >= 0 for label in labels)


def listed(names: Any, limit: int = 20) -> str:
    """Names for an error message, at most ``limit`` of them."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more if names else "none"


def _column_kinds(dataset: Any) -> dict[str, str]:
    """Map each column to "image", "class" or "other"."""
    if isinstance(dataset, dict):
        raise DataError(f"Expected one dataset, found several, {listed(dataset)}. Give one, as in data['train'].")
    streamed = isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset))
    if streamed or not hasattr(dataset, "__getitem__") or isinstance(dataset, str):
        remedy = "Load the data without streaming" if streamed else "Load it first"
        raise DataError(f"Expected a dataset of images by row, found {type(dataset).__name__}. {remedy}.")
    if isinstance(dataset, datasets.Dataset) and not is_transformed(dataset):
        kinds = {datasets.Image: "image", datasets.ClassLabel: "class"}
        return {column: kinds.get(type(feature), "other") for column, feature in dataset.features.items()}
    if len(dataset) == 0:
        raise DataError("Expected at least one image, found an empty dataset. Give images.")
    item = dataset[0]
    if not isinstance(item, dict):
        raise DataError(
            f"Expected a dataset of dictionaries, found a {type(item).__name__} as its first item. Let it yield "
            "{'pixel_values': ..., 'labels': ...}."
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
        raise DataError(
            f"Expected one column of images or 'pixel_values', found {len(images)} among {listed(kinds)}. Name it "
            "with image_column= (image_column_name= in ImmunizationArguments) or cast it to datasets.Image()."
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
    remedy = "Name it with label_column= (label_column_name= in ImmunizationArguments)"
    if list(kinds.values()) == ["image"]:
        remedy = "Add one, or, in a folder of images, give each class a subfolder with its images directly in it"
    raise DataError(
        f"Expected one label column, a ClassLabel or named 'label' or 'labels', found {listed(classes)} among "
        f"{listed(kinds)}. {remedy}."
    )


def _existing(kinds: dict[str, str], column: str, option: str) -> str:
    if not isinstance(column, str) or column not in kinds:
        raise DataError(f"Expected {option}= out of {listed(kinds)}, found {column!r}. Name one of these.")
    return column
