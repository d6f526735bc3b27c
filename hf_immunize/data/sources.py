"""Image data from what a newcomer types: a folder, a parquet file, or a name on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
from PIL import Image

from hf_immunize.errors import DataError


# Folder names that stand for a split, as the Hub's own conventions have them.
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_image_dataset(source: str, split: str = "train") -> datasets.Dataset:
    """Load one split of an image dataset.

    Args:
        source: A folder of images (one subfolder a class, below ``train/``, ``test/`` or directly), a folder written
            by ``save_to_disk``, a parquet file or a folder of such, or the name of a dataset on the Hub.
        split: The split. Where the data has no splits, all of it is ``"train"``.

    Returns:
        The dataset.

    Raises:
        DataError: If there is no such data, or no such split; the message lists the splits.

    Examples:
        >>> load_image_dataset("./no/such/folder")
        Traceback (most recent call last):
        ...
        hf_immunize.errors.DataError: './no/such/folder' is neither an existing path nor the name of a dataset on the
        Hub, such as 'user/name'; check the spelling.
    """
    splits = load_image_splits(source)
    if split not in splits:
        found = ", ".join(repr(str(name)) for name in splits)
        raise DataError(f"{source!r} has no split {split!r}; choose one of {found}.")
    return splits[split]


def load_image_splits(source: str) -> dict[str, datasets.Dataset]:
    """Load all splits of an image dataset.

    Args:
        source: As for `load_image_dataset`.

    Returns:
        Name to split. Where the data has no splits, all of it is ``"train"``.

    Raises:
        DataError: If there is no such data.
    """
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return _load_file(path)
        if path.is_dir():
            return _load_folder(path)
        return _load_from_hub(source)
    except DataError:
        raise
    # Of datasets and pyarrow, on what is damaged, unfinished or of another kind.
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source!r} holds no image dataset that can be read ({_first_line(error)}); expected images in one "
            "subfolder a class, parquet files, or what save_to_disk writes."
        ) from error


def _load_file(path: Path) -> dict[str, datasets.Dataset]:
    if path.suffix != ".parquet":
        raise DataError(f"{str(path)!r} should be a parquet file or a folder; convert it, or give its folder.")
    return datasets.load_dataset("parquet", data_files={"train": str(path)})


def _load_folder(path: Path) -> dict[str, datasets.Dataset]:
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))
    if (path / "state.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        # Saved alone, a split has often kept its name; that no other is asked for by mistake matters more.
        return {"train" if dataset.split is None else str(dataset.split): dataset}
    if any(path.rglob("*.parquet")):
        return datasets.load_dataset(str(path))

    folders = {child.name: child for child in sorted(path.iterdir()) if child.is_dir()}
    splits = {SPLIT_FOLDERS[name]: folder for name, folder in folders.items() if name in SPLIT_FOLDERS}
    # Given as they are, folders would be split by any "train" or "test" in a class's or an image's name.
    places = splits or {"train": path}
    data_files = {split: f"{folder}/**" for split, folder in places.items()}
    loaded = datasets.load_dataset("imagefolder", data_files=data_files)
    if all(list(part.features) == ["image"] for part in loaded.values()) and _one_class(list(places.values())):
        # The builder leaves out labels that are all the same.
        return datasets.load_dataset("imagefolder", data_files=data_files, drop_labels=False)
    return loaded


def _one_class(folders: list[Path]) -> bool:
    """Whether all images lie directly in subfolders of a single name."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = [(file, root) for root in folders for file in root.rglob("*") if file.suffix.lower() in endings]
    places = {file.parent.relative_to(root) for file, root in images}
    return len(places) == 1 and len(places.pop().parts) == 1


def _load_from_hub(source: str) -> dict[str, datasets.Dataset]:
    if not _HUB_ID.fullmatch(source):
        raise DataError(
            f"{source!r} is neither an existing path nor the name of a dataset on the Hub, such as 'user/name'; check "
            f"the spelling."
        )
    try:
        return datasets.load_dataset(source)
    except (FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{source!r} is no existing path, and no dataset of that name could be loaded from the Hub "
            f"({_first_line(error)}); check the spelling, the connection, and the access."
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
