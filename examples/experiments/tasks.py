"""The images of a run: where they come from; splits, classes and subsets that its seed decides, kept for all runs.

`benign`, `harmful`, `unseen` (harmful classes that immunization does not see) and `unrelated` (a task that contributes
no image to training or distillation) have the splits "train" and "test"; `distillation` has "train".

To add a task: an entry in settings.yaml; where its images are neither in a folder nor on the Hub, a function in
`SOURCES`.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from examples.experiments.files import alone, read_json, write_json
from examples.experiments.settings import Run, digest
from hf_immunize.cli.demo import all_digits
from hf_immunize.data.columns import find_columns
from hf_immunize.data.sources import load_image_dataset, split_benign_harmful
from hf_immunize.errors import DataError


SIDES = ("benign", "harmful", "unseen", "unrelated", "distillation")


@dataclass(frozen=True)
class Data:
    """The images of one experiment and seed.

    Attributes:
        paths: Side to folder, as `load_image_dataset` takes it.
        about: Side to plain values: source, images, classes, digest; of benign, the rows that are tested.
    """

    paths: dict[str, str]
    about: dict[str, dict[str, Any]]

    def load(self, side: str, split: str) -> datasets.Dataset:
        """Images of a side."""
        return datasets.load_from_disk(self.paths[side])[split]

    def settings(self) -> dict[str, Any]:
        """What tells these images from others."""
        return {side: {k: v for k, v in about.items() if k != "test_rows"} for side, about in self.about.items()}


def prepare(run: Run) -> Data:
    """Choose and keep the images of a run, unless they are kept already."""
    spec = run.spec()
    sides = {side: spec[side] for side in SIDES if spec.get(side)}
    files = {side: _files(one, run.data_path) for side, one in sides.items()}
    wanted = {"sides": sides, "seed": run.seed, "files": files}
    folder = run.shared / "data" / f"{run.experiment}-seed{run.seed}-{digest(wanted)}"
    with alone(run.shared):
        about = read_json(folder / "about.json")
        if about is None:
            shutil.rmtree(folder, ignore_errors=True)  # begun and never finished
            about = {}
            for side, one in sides.items():
                for name, (source, splits, more) in _choose(side, one, run.seed, run.data_path).items():
                    splits.save_to_disk(str(folder / name / source))
                    counts = {split: len(part) for split, part in splits.items()}
                    found = {"source": source, "images": counts, "digest": _hash(splits), **more}
                    about[name] = found | {"classes": len(splits["train"].features["label"].names)}
            write_json(folder / "about.json", about)
    return Data({side: str(folder / side / one["source"]) for side, one in about.items()}, about)


def load_source(spec: dict[str, Any], data_path: str) -> tuple[str, datasets.DatasetDict]:
    """Name and splits ("train" and, where there is one, "test") of the first source that is there."""
    for name in _names(spec):
        if name in SOURCES:
            return name, datasets.DatasetDict({"train": SOURCES[name]()})
        place = _local(name, data_path)
        if place is not None or "/" in name:
            return name.split("/")[-1], _splits(str(place or name), spec.get("columns") or {})
    raise DataError(
        f"Expected {' or '.join(_names(spec))} in the folder {data_path}, found neither. Put a folder of that name "
        "there, of parquet files or of images (train/ and test/, one subfolder a class), and name its parent as "
        "--data_path."
    )


def digits() -> datasets.Dataset:
    """scikit-learn's handwritten digits, of 8 by 8 pixels, as RGB images of 64 by 64, like photos."""
    small = all_digits()
    images = [image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC) for image in small["image"]]
    return datasets.Dataset.from_dict({"image": images, "label": list(small["label"])}, features=small.features)


SOURCES = {"digits": digits}


def _names(spec: dict[str, Any]) -> list[str]:
    return [spec["source"]] if isinstance(spec["source"], str) else list(spec["source"])


def _local(name: str, data_path: str) -> Path | None:
    """The folder of a data set in `data_path`, by its name or the last part of it."""
    root = Path(data_path).expanduser()
    return next((place for place in (root / name, root / name.split("/")[-1]) if place.exists()), None)


def _files(spec: dict[str, Any], data_path: str) -> list[Any]:
    """Names and sizes of a source's files, so that other data at the same place are not taken for these."""
    places = [place for name in _names(spec) if (place := _local(name, data_path)) is not None]
    files = [file for place in places[:1] for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return [[file.name, os.path.getsize(file)] for file in files if file.is_file()]


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


def _choose(
    side: str, spec: dict[str, Any], seed: int, data_path: str
) -> dict[str, tuple[str, datasets.DatasetDict, dict[str, Any]]]:
    """Name of a side (and of the unseen part of it) to its source, its images, and what to say of them."""
    source, splits = load_source(spec, data_path)
    draw = np.random.default_rng([seed, SIDES.index(side)])
    more: dict[str, Any] = {}
    if spec.get("classes"):
        splits = split_benign_harmful(splits, spec["classes"])[1]
        source = f"{source}-{len(spec['classes'])}-classes"
    if side == "distillation":
        train = _subset(splits["train"], spec.get("max_images"), draw)
        return {side: (source, datasets.DatasetDict({"train": train}), more)}
    if "test" not in splits:
        whole = splits["train"]
        rows = draw.permutation(len(whole))
        test = sorted(rows[: round(len(rows) * spec.get("test_fraction", 0.3))].tolist())
        train = np.setdiff1d(rows, test).tolist()
        splits = datasets.DatasetDict({"train": whole.select(train), "test": whole.select(test)})
        more = {"test_rows": " ".join(map(str, test))} if side == "benign" else {}
    limits = {"train": spec.get("max_images"), "test": spec.get("max_test_images")}
    splits = datasets.DatasetDict({split: _subset(part, limits[split], draw) for split, part in splits.items()})
    used = spec.get("classes_used")
    if not used:
        return {side: (source, splits, more)}
    names = splits["train"].features["label"].names
    chosen = [names[index] for index in sorted(draw.permutation(len(names))[:used])]
    others, seen = split_benign_harmful(splits, chosen)
    return {
        side: (f"{source}-{used}-of-{len(names)}-classes", seen, more),
        "unseen": (f"{source}-{len(names) - used}-other-classes", others, {}),
    }


def _subset(dataset: datasets.Dataset, limit: int | None, draw: np.random.Generator) -> datasets.Dataset:
    if limit is None or len(dataset) <= limit:
        return dataset
    return dataset.select(sorted(draw.permutation(len(dataset))[:limit].tolist()))


def _hash(splits: datasets.DatasetDict) -> str:
    """Of images and labels."""
    total = hashlib.blake2b(digest_size=8)
    for split in sorted(splits):
        for row in splits[split].cast_column("image", datasets.Image(decode=False)):
            content = row["image"]["bytes"]
            total.update(content if content is not None else Path(row["image"]["path"]).read_bytes())
            total.update(str(row["label"]).encode())
    return total.hexdigest()
