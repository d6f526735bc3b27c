"""Which images are learned from and which are measured on: one answer for training, audit and verification.

Images are divided first and classes are parted afterwards, so that the same data, fraction and seed give the same
images to every command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_immunize.data.columns import find_stored_label_column, listed, read_labels
from hf_immunize.data.data import split_benign_harmful
from hf_immunize.data.sources import load_image_splits
from hf_immunize.errors import DataError


# Splits to measure on, the preferred one first.
MEASURED_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class HeldOut:
    """How images to measure on are held out where the data have no validation or test split.

    Attributes:
        fraction: The part held out.
        seed: The seed of the draw; that of `TrainingArguments` by default.
    """

    fraction: float = 0.3
    seed: int = 42


AS_USUAL = HeldOut()


@dataclass(frozen=True)
class Parts:
    """Images of one source.

    Attributes:
        train: Those to learn from.
        test: Those to measure on.
        held_out: How the latter were drawn from the training split; None where they are a split or a source of their
            own.
    """

    train: Any
    test: Any
    held_out: HeldOut | None = None


def divide(source: Any, draw: HeldOut = AS_USUAL, *, test: Any = None, name: str = "images") -> Parts:
    """Divide the images of a source into those to learn from and those to measure on.

    The latter are `test` where it is given, else the source's validation split, else its test split, else a part of
    the training split.

    Args:
        source: A name or path as `load_image_dataset` takes it, a ``DatasetDict``, a ``Dataset``, or what is divided.
        draw: How that part is drawn.
        test: Images to measure on that come from elsewhere: a name or path, or any data set.
        name: What to call the images in an error.

    Returns:
        Both parts; nothing is decoded.

    Raises:
        DataError: If there is no such data, no training split, or a single image to divide.

    Examples:
        >>> data = datasets.Dataset.from_dict({"label": list(range(10))})
        >>> parts = divide(data, HeldOut(0.3, seed=0))
        >>> len(parts.train), len(parts.test), parts.held_out.fraction
        (7, 3, 0.3)
        >>> splits = datasets.DatasetDict({"train": data, "test": data.select([0]), "validation": data.select([1, 2])})
        >>> len(divide(splits).test)
        2
    """
    if isinstance(source, Parts):
        return source
    splits = _splits_of(source)
    if test is not None:
        train = _training(splits, name) if isinstance(splits, dict) else source
        return Parts(train, _training(load_image_splits(str(test)), name) if _is_place(test) else test)
    if not isinstance(splits, dict):
        raise DataError(
            f"Expected the {name} as a path, a name on the Hub, a datasets.Dataset, a DatasetDict, or with images to "
            f"measure on beside them, found {type(source).__name__}. Give one of these."
        )
    train = _training(splits, name)
    found = next((split for split in MEASURED_SPLITS if split in splits), None)
    if found is not None:
        return Parts(train, splits[found])
    if len(train) < 2:
        raise DataError(f"Expected at least two {name} to hold some out, found {len(train)}. Give more images.")
    # By image. Not stratified: many data sets have classes with a single image.
    parts = train.train_test_split(draw.fraction, seed=draw.seed)
    return Parts(parts["train"], parts["test"], draw)


def measured(source: str, draw: HeldOut | None = None, split: str | None = None) -> Any:
    """The images of a source to measure on, where none are learned from.

    Args:
        source: As for `load_image_dataset`.
        draw: How they were held out of the training split; None takes all of it where there is no other.
        split: A split by name, or the one they were held out of.

    Returns:
        What `divide` gives as test images; with a `split`, that split or the part of it.

    Raises:
        DataError: If there is no such data or split.
    """
    splits = load_image_splits(source)
    if split is not None:
        if split not in splits:
            raise DataError(f"Expected a split {split!r} in {source!r}, found {listed(splits)}. Choose one of these.")
        splits = {"train": splits[split]}
    if draw is not None:
        return divide(datasets.DatasetDict(splits), draw).test
    return next(splits[name] for name in (*MEASURED_SPLITS, *splits) if name in splits)


def divide_classes(
    parts: Parts, harmful_classes: Sequence[str | int], label_column: str | None = None
) -> tuple[Parts, Parts]:
    """Part the classes of divided images.

    Args:
        parts: From `divide`.
        harmful_classes: The harmful classes as typed; see `class_keys`.
        label_column: The label column, where it cannot be found.

    Returns:
        The benign and the harmful parts.

    Raises:
        DataError: If a class is not in the data, or none is left on a side.
    """
    keys = class_keys(parts.train, harmful_classes, label_column)
    # Both in one call, so that a class has the same number in both.
    both = datasets.DatasetDict({"train": parts.train, "test": parts.test})
    benign, harmful = split_benign_harmful(both, keys, label_column)
    return tuple(Parts(side["train"], side["test"], parts.held_out) for side in (benign, harmful))  # type: ignore[return-value]


def class_keys(dataset: Any, asked: Sequence[str | int], label_column: str | None = None) -> list[str | int]:
    """Classes as typed, told apart: a name where there is such a name, else several between commas, else a number.

    Args:
        dataset: A `datasets.Dataset`.
        asked: What was typed; of names that hold commas themselves, the longest that exists is taken.
        label_column: The label column, where it cannot be found.

    Returns:
        Names and numbers, as `split_benign_harmful` takes them; what is neither is left for it to refuse.

    Examples:
        >>> features = datasets.Features({"label": datasets.ClassLabel(names=["tench, Tinca", "rifle", "7"])})
        >>> data = datasets.Dataset.from_dict({"label": [0]}, features=features)
        >>> class_keys(data, ["tench, Tinca,rifle", "7", "1"])
        ['tench, Tinca', 'rifle', '7', 1]
    """
    column = find_stored_label_column(dataset, label_column)
    names = getattr(dataset.features[column], "names", None) or set(read_labels(dataset, column))
    keys: list[str | int] = []
    for words in map(str, asked):
        pieces = words.split(",")
        while pieces:
            joined = [",".join(pieces[:end]).strip() for end in range(len(pieces), 0, -1)]
            key = next((name for name in joined if name in names), joined[-1])
            pieces = pieces[key.count(",") + 1 :]
            keys.append(int(key) if key not in names and key.isdigit() else key)
    return keys


def choose(count: int, limit: int | None, seed: int) -> list[int]:
    """At most so many of the rows, the same for the same seed.

    Args:
        count: Number of rows.
        limit: At most so many; None takes all of them in their order.
        seed: Seed of the draw.

    Returns:
        Row numbers.
    """
    if limit is None or count <= limit:
        return list(range(count))
    return np.random.default_rng(seed).permutation(count)[:limit].tolist()


def _is_place(source: Any) -> bool:
    return isinstance(source, (str, Path))


def _splits_of(source: Any) -> Any:
    if _is_place(source):
        return load_image_splits(str(source))
    return {"train": source} if isinstance(source, datasets.Dataset) else source


def _training(splits: dict[str, Any], name: str) -> Any:
    if "train" not in splits:
        raise DataError(f"Expected a split 'train' in the {name}, found {listed(splits)}. Name or give that split.")
    return splits["train"]
