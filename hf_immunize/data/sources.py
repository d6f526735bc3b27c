"""Where images come from: loaded, divided into those to learn from and to measure on, and split by class."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from hf_immunize.data.columns import find_stored_label_column, listed, read_labels
from hf_immunize.errors import DataError
from hf_immunize.text import printable


# Folder names that stand for a split, as the Hub's own conventions have them.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


def load_image_dataset(source: str, split: str = "train") -> datasets.Dataset:
    """One split of an image dataset; where the data has no splits, all of it is "train"."""
    return _split(load_image_splits(source), split, repr(source))


def _split(splits: dict[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise DataError(
            f"Expected a split {split!r} in {name}, found {listed(map(str, splits))}. Name or give that split."
        )
    return splits[split]


def load_image_splits(source: str) -> dict[str, datasets.Dataset]:
    """All splits of an image dataset: a folder of images, what save_to_disk writes, parquet files, a Hub name."""
    path = Path(source).expanduser()
    try:
        if path.is_file() and path.suffix != ".parquet":
            raise DataError(f"Expected a parquet file or a folder, found {source!r}. Convert it, or give its folder.")
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)})
        if path.is_dir():
            return _load_folder(path)
        return datasets.load_dataset(source)
    except DataError:
        raise
    # Of datasets and pyarrow, on what is absent, damaged, unfinished or of another kind.
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"Expected images in one subfolder per class, parquet files, what save_to_disk writes, or a Hub name "
            f"under {source!r}, found none that can be read ({type(error).__name__}: {printable(error)[:200]}). Check "
            "the spelling, the data, the connection and the access."
        ) from error


def _load_folder(path: Path) -> dict[str, datasets.Dataset]:
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))
    if (path / "state.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        # A split saved alone has often kept its name, so that no other is used by mistake.
        return {"train" if dataset.split is None else str(dataset.split): dataset}
    if any(path.rglob("*.parquet")):
        return datasets.load_dataset(str(path))

    folders = {child.name: child for child in sorted(path.iterdir()) if child.is_dir()}
    splits = {SPLIT_FOLDERS[name]: folder for name, folder in folders.items() if name in SPLIT_FOLDERS}
    # By itself the builder would split by any "train" or "test" in the name of a class or an image.
    data_files = {split: f"{folder}/**" for split, folder in (splits or {"train": path}).items()}
    return datasets.load_dataset("imagefolder", data_files=data_files)


# Splits to measure on, the preferred one first.
MEASURED_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class HeldOut:
    """How images to measure on are drawn where the data have no validation or test split."""

    fraction: float = 0.3
    seed: int = 42  # the default of `TrainingArguments`


AS_USUAL = HeldOut()


@dataclass(frozen=True)
class Parts:
    """Images of one source: to learn from, and to measure on."""

    train: Any
    test: Any
    held_out: HeldOut | None = None  # how the latter were drawn; None where they are a split or a source of their own


def divide(source: Any, draw: HeldOut = AS_USUAL, *, test: Any = None, name: str = "images") -> Parts:
    """Images of a source to learn from, and to measure on: `test`, else its validation or test split, else a draw."""
    if isinstance(source, Parts):
        return source
    splits = load_image_splits(str(source)) if isinstance(source, (str, Path)) else source
    splits = {"train": source} if isinstance(source, datasets.Dataset) else splits
    if test is not None:
        train = _split(splits, "train", f"the {name}") if isinstance(splits, dict) else source
        return Parts(train, load_image_dataset(str(test)) if isinstance(test, (str, Path)) else test)
    if not isinstance(splits, dict):
        raise DataError(
            f"Expected the {name} as a path, a name on the Hub or a datasets.Dataset, found {type(source).__name__}. "
            "Give one of these, or images to measure on as well."
        )
    train = _split(splits, "train", f"the {name}")
    found = next((split for split in MEASURED_SPLITS if split in splits), None)
    if found is not None:
        return Parts(train, splits[found])
    if len(train) < 2:
        raise DataError(f"Expected at least two {name} to hold some out, found {len(train)}. Give more images.")
    # By image. Not stratified: many data sets have classes with a single image.
    parts = train.train_test_split(draw.fraction, seed=draw.seed)
    return Parts(parts["train"], parts["test"], draw)


def measured(source: str, draw: HeldOut | None = None) -> Any:
    """The images of a source to measure on, as `divide` finds them; without a draw, all of it."""
    splits = load_image_splits(source)
    if draw is not None:
        return divide(datasets.DatasetDict(splits), draw).test
    return next(splits[name] for name in (*MEASURED_SPLITS, *splits) if name in splits)


def divide_classes(
    parts: Parts, harmful_classes: Sequence[str | int], label_column: str | None = None
) -> tuple[Parts, Parts]:
    """The benign and the harmful parts of divided images; classes as typed, see `class_keys`."""
    keys = class_keys(parts.train, harmful_classes, label_column)
    # Both in one call, so that a class has the same number in both.
    both = datasets.DatasetDict({"train": parts.train, "test": parts.test})
    benign, harmful = split_benign_harmful(both, keys, label_column)
    return tuple(Parts(side["train"], side["test"], parts.held_out) for side in (benign, harmful))  # type: ignore[return-value]


def class_keys(dataset: Any, typed: Sequence[str | int], label_column: str | None = None) -> list[str | int]:
    """Classes as typed, one each: a name where there is such a name, else a number."""
    column = find_stored_label_column(dataset, label_column)
    names = getattr(dataset.features[column], "names", None) or set(read_labels(dataset, column))
    return [int(word) if word not in names and word.isdigit() else word for word in map(str, typed)]


def choose(count: int, limit: int | None, seed: int) -> list[int]:
    """Numbers of at most ``limit`` rows, the same for the same seed."""
    if limit is None or count <= limit:
        return list(range(count))
    return np.random.default_rng(seed).permutation(count)[:limit].tolist()


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
        label_column: The column that holds the labels, where neither its type nor its name shows it.

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
    splits: Any = {"": dataset} if isinstance(dataset, datasets.Dataset) else dataset
    if not isinstance(dataset, (datasets.Dataset, datasets.DatasetDict)) or not splits:
        raise DataError(
            f"Expected a datasets.Dataset or a DatasetDict with splits, found {type(dataset).__name__}. Load the data "
            "without streaming."
        )
    first = next(iter(splits.values()))
    column = find_stored_label_column(first, label_column)
    values = {split: read_labels(data, column) for split, data in splits.items()}
    names = _class_names(first, column, values)
    codes = {split: _codes(labels, names, split) for split, labels in values.items()}
    present = set(np.concatenate(list(codes.values())).tolist())
    harmful = _harmful_codes(harmful_classes, names, present)
    if not present - harmful:
        raise DataError(f"Expected a benign class, found all {len(present)} to be harmful. Leave one out.")

    parts = []
    for side in (False, True):
        kept = [code for code in range(len(names)) if (code in harmful) == side]
        taken = {k: _take_classes(data, column, codes[k], list(names.values()), kept) for k, data in splits.items()}
        parts.append(taken[""] if isinstance(dataset, datasets.Dataset) else datasets.DatasetDict(taken))
    return parts[0], parts[1]


def _class_names(dataset: datasets.Dataset, column: str, values: dict[str, list[Any]]) -> dict[Any, str]:
    """Map each label to its class name, in the order of the classes."""
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    found = {value for labels in values.values() for value in labels if value is not None}
    if not all(isinstance(value, (int, str)) for value in found):
        raise DataError(f"Expected integers or names in the column {column!r}, found {feature}. Convert the labels.")
    return {value: str(value) for value in sorted(found)}


def _codes(labels: list[Any], names: dict[Any, str], split: str) -> np.ndarray:
    order = {label: code for code, label in enumerate(names)}
    for row, label in enumerate(labels):
        if label not in order:
            where = f" of split {split!r}" if split else ""
            raise DataError(
                f"Expected labels out of {listed(names.values())}, found {label!r} in row {row}{where}. Drop the rows "
                "without a valid label."
            )
    return np.array([order[label] for label in labels], dtype=np.int64)


def _harmful_codes(harmful_classes: Sequence[str | int], names: dict[Any, str], present: set[int]) -> set[int]:
    several = isinstance(harmful_classes, Iterable) and not isinstance(harmful_classes, str | bytes)
    wanted_classes = list(harmful_classes) if several else []
    if not wanted_classes:
        raise DataError(f"Expected a list of classes out of {listed(names.values())}, found {harmful_classes!r}.")
    by_name = {name: code for code, name in enumerate(names.values())}
    by_label = {label: code for code, label in enumerate(names)}
    harmful = set()
    for wanted in wanted_classes:
        known: dict[Any, int] = by_name if isinstance(wanted, str) else by_label
        code = known.get(wanted) if isinstance(wanted, Hashable) else None
        if code not in present:
            there = [name for code, name in enumerate(names.values()) if code in present]
            raise DataError(f"Expected harmful classes out of {listed(there)}, found {wanted!r}. Choose one of these.")
        harmful.add(code)
    return harmful


def _take_classes(
    dataset: datasets.Dataset, column: str, codes: np.ndarray, names: list[str], kept: list[int]
) -> datasets.Dataset:
    relabel = np.zeros(len(names), dtype=np.int64)
    relabel[kept] = np.arange(len(kept))
    feature = datasets.ClassLabel(names=[names[code] for code in kept])
    # The column is replaced before the rows are chosen: that way images are neither copied nor decoded.
    old = f"{column} before the split"
    relabelled = dataset.rename_column(column, old).add_column(column, relabel[codes], feature=feature)
    relabelled = relabelled.remove_columns(old)
    return relabelled.select(np.flatnonzero(np.isin(codes, kept)))
