"""Where images come from: a folder of data sets, the Hub, or scikit-learn."""

from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_immunize.cli.demo import all_digits
from hf_immunize.data.columns import find_columns
from hf_immunize.data.sources import load_image_dataset
from hf_immunize.errors import DataError


def load_source(spec: dict[str, Any], data_path: str) -> tuple[str, datasets.DatasetDict]:
    """The images of one side of an experiment, with columns ``image`` and ``label`` and class names.

    Args:
        spec: With ``source`` (a name or several, of which the first that is there is taken) and, where columns have
            other names, ``columns``.
        data_path: Folder with a file or folder of that name: parquet files, folders of images, what ``save_to_disk``
            writes. A name with a slash is looked for on the Hub, where the folder lacks it.

    Returns:
        The name, and the split "train" with, where there is one, "test".

    Raises:
        DataError: If none is there.
    """
    names = [spec["source"]] if isinstance(spec["source"], str) else list(spec["source"])
    for name in names:
        if name == "digits":
            return name, datasets.DatasetDict({"train": digits()})
        place = local_place(name, data_path)
        if place is not None or "/" in name:
            return name.split("/")[-1], _splits(str(place or name), spec.get("columns") or {})
    raise DataError(
        f"Expected {' or '.join(names)} in the folder {data_path}, found neither. Put a folder of that name there, of "
        "parquet files or of images (train/ and test/, one subfolder a class), and name its parent as --data_path."
    )


def local_place(name: str, data_path: str) -> Path | None:
    """The folder of a data set in `data_path`, by its name or the last part of it."""
    root = Path(data_path).expanduser()
    return next((place for place in (root / name, root / name.split("/")[-1]) if place.exists()), None)


def digits() -> datasets.Dataset:
    """scikit-learn's handwritten digits, of 8 by 8 pixels, as RGB images of 64 by 64, like photos."""
    small = all_digits()
    images = [image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC) for image in small["image"]]
    return datasets.Dataset.from_dict({"image": images, "label": list(small["label"])}, features=small.features)


def _splits(source: str, columns: dict[str, str]) -> datasets.DatasetDict:
    found = {"train": _plain(load_image_dataset(source), columns)}
    for split in ("validation", "test"):
        try:
            found["test"] = _plain(load_image_dataset(source, split), columns)
            break
        except DataError:  # no such split
            continue
    return datasets.DatasetDict(found)


def _plain(dataset: datasets.Dataset, columns: dict[str, str]) -> datasets.Dataset:
    """Image and label under these names, all else dropped."""
    image, label = find_columns(dataset, columns.get("image"), columns.get("label"))
    dataset = dataset.select_columns([image, label])
    dataset = dataset.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    if not isinstance(dataset.features["label"], datasets.ClassLabel):
        dataset = dataset.class_encode_column("label")
    return dataset
