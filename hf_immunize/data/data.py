"""Splitting labelled images into benign and harmful classes, without reading the images."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

import datasets
import numpy as np

from hf_immunize.data.columns import find_stored_label_column, listed, read_labels
from hf_immunize.errors import DataError


SplitData = TypeVar("SplitData", datasets.Dataset, datasets.DatasetDict)


def split_benign_harmful(
    dataset: SplitData, harmful_classes: Sequence[str | int], label_column: str | None = None
) -> tuple[SplitData, SplitData]:
    """Split a labelled dataset by class into a benign and a harmful one.

    Only the label column is read. Each part is relabelled 0..k-1 in the order of the original classes, and its label
    column becomes a ``ClassLabel`` with their names; the splits of a ``DatasetDict`` share their labels.

    Args:
        dataset: A ``Dataset``, or a ``DatasetDict`` whose splits are all divided.
        harmful_classes: The harmful classes, by name or by integer label.
        label_column: The column that holds the labels, where it cannot be told by its type or name.

    Returns:
        The benign and the harmful part, of the same type as ``dataset``.

    Raises:
        DataError: If there is no label column, a class is not in the data, no class or every class is harmful, or a
            row has no valid label.

    Examples:
        >>> from datasets import ClassLabel, Dataset, Features
        >>> features = Features({"label": ClassLabel(names=["cat", "gun", "dog"])})
        >>> data = Dataset.from_dict({"label": [0, 1, 2, 1]}, features=features)
        >>> benign, harmful = split_benign_harmful(data, harmful_classes=["gun"])
        >>> benign["label"][:], benign.features["label"].names, len(harmful)
        ([0, 1], ['cat', 'dog'], 2)
    """
    if isinstance(dataset, datasets.Dataset):
        splits = {"": dataset}
    elif isinstance(dataset, datasets.DatasetDict) and dataset:
        splits = dict(dataset)
    else:
        raise DataError(
            f"split_benign_harmful expects a datasets.Dataset or a DatasetDict with splits, but got "
            f"{type(dataset).__name__}; load the data without streaming."
        )

    column = find_stored_label_column(next(iter(splits.values())), label_column)
    values = {split: read_labels(data, column) for split, data in splits.items()}
    names = _class_names(next(iter(splits.values())), column, values)
    codes = {split: _codes(labels, names, split) for split, labels in values.items()}
    present = set().union(*(set(code.tolist()) for code in codes.values()))
    harmful = _harmful_codes(harmful_classes, names, present)
    if not present - harmful:
        raise DataError(
            f"All {len(present)} classes of the data are harmful, so no benign one is left to keep useful; "
            f"leave at least one class out of harmful_classes."
        )

    parts: tuple[dict[str, datasets.Dataset], dict[str, datasets.Dataset]] = ({}, {})
    for split, data in splits.items():
        for part, is_harmful in zip(parts, (False, True), strict=True):
            part[split] = _take_classes(data, column, codes[split], names, is_harmful, harmful)
    if isinstance(dataset, datasets.Dataset):
        return parts[0][""], parts[1][""]
    return datasets.DatasetDict(parts[0]), datasets.DatasetDict(parts[1])


def _class_names(dataset: datasets.Dataset, column: str, values: dict[str, list[Any]]) -> dict[Any, str]:
    """Map each label to its class name, in the order of the classes."""
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    found = {value for labels in values.values() for value in labels if value is not None}
    if not all(isinstance(value, (int, str)) for value in found):
        raise DataError(f"The label column {column!r} should hold integers or names, but has the type {feature}.")
    return {value: str(value) for value in sorted(found)}


def _codes(labels: list[Any], names: dict[Any, str], split: str) -> np.ndarray:
    order = {label: code for code, label in enumerate(names)}
    for row, label in enumerate(labels):
        if label not in order:
            where = f" of split {split!r}" if split else ""
            raise DataError(
                f"Row {row}{where} has the label {label!r}, which is none of {listed(names.values())}; drop the rows "
                f"without a valid label before splitting."
            )
    return np.array([order[label] for label in labels], dtype=np.int64)


def _harmful_codes(harmful_classes: Sequence[str | int], names: dict[Any, str], present: set[int]) -> set[int]:
    listed_classes = isinstance(harmful_classes, Iterable) and not isinstance(harmful_classes, str | bytes)
    harmful_classes = list(harmful_classes) if listed_classes else harmful_classes
    if not isinstance(harmful_classes, list) or not harmful_classes:
        raise DataError(
            f"harmful_classes should be a list with at least one class, but is {harmful_classes!r}; the classes are "
            f"{listed(names.values())}."
        )
    by_name = {name: code for code, name in enumerate(names.values())}
    by_label = {label: code for code, label in enumerate(names)}
    harmful = set()
    for wanted in harmful_classes:
        if isinstance(wanted, str):
            code = by_name.get(wanted)
        else:
            code = by_label.get(wanted) if isinstance(wanted, Hashable) else None
        if code is None or code not in present:
            there = [name for code, name in enumerate(names.values()) if code in present]
            raise DataError(f"The class {wanted!r} is not in the data; the classes there are {listed(there)}.")
        harmful.add(code)
    return harmful


def _take_classes(
    dataset: datasets.Dataset,
    column: str,
    codes: np.ndarray,
    names: dict[Any, str],
    is_harmful: bool,
    harmful: set[int],
) -> datasets.Dataset:
    kept = [code for code in range(len(names)) if (code in harmful) == is_harmful]
    relabel = np.zeros(len(names), dtype=np.int64)
    relabel[kept] = np.arange(len(kept))
    all_names = list(names.values())
    feature = datasets.ClassLabel(names=[all_names[code] for code in kept])
    # The column is replaced before the rows are chosen: that way images are neither copied nor decoded.
    old = f"{column} before the split"
    relabelled = dataset.rename_column(column, old).add_column(column, relabel[codes], feature=feature)
    relabelled = relabelled.remove_columns(old)
    return relabelled.select(np.flatnonzero(np.isin(codes, kept)))
