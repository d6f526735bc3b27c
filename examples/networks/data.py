"""The images of an experiment: splits, classes and subsets that its seed decides, kept for all runs.

`benign`, `harmful`, `unseen` (harmful classes that immunization does not see) and `unrelated` (a task that contributes
no image to training or distillation) have the splits "train" and "test"; `distillation` has "train".
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from examples.networks.files import read_json, write_json
from examples.networks.settings import digest
from examples.networks.sources import load_source, local_place
from hf_immunize.data.sources import split_benign_harmful


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


def prepare(spec: dict[str, Any], experiment: str, seed: int, data_path: str, shared: Path) -> Data:
    """Choose and keep the images of an experiment, unless they are kept already.

    Args:
        spec: The experiment.
        experiment: Its name.
        seed: Of splits, classes and subsets.
        data_path: Folder of the data sets.
        shared: Folder of what several runs need.

    Returns:
        Where they are.

    Raises:
        DataError: If a data set is missing.
    """
    sides = {side: spec[side] for side in SIDES if spec.get(side)}
    wanted = {"sides": sides, "seed": seed, "files": {side: _files(one, data_path) for side, one in sides.items()}}
    folder = shared / "data" / f"{experiment}-seed{seed}-{digest(wanted)}"
    about = read_json(folder / "about.json")
    if about is None:
        shutil.rmtree(folder, ignore_errors=True)  # begun and never finished
        about = {}
        for side, one in sides.items():
            for name, (source, splits, more) in _choose(side, one, seed, data_path).items():
                splits.save_to_disk(str(folder / name / source))
                counts = {split: len(part) for split, part in splits.items()}
                classes = len(splits["train"].features["label"].names)
                about[name] = {"source": source, "images": counts, "classes": classes, "digest": _hash(splits), **more}
        write_json(folder / "about.json", about)
    return Data({side: str(folder / side / one["source"]) for side, one in about.items()}, about)


def _files(spec: dict[str, Any], data_path: str) -> list[Any]:
    """Names and sizes of a source's files, so that other data at the same place are not taken for these."""
    names = [spec["source"]] if isinstance(spec["source"], str) else spec["source"]
    places = [place for name in names if (place := local_place(name, data_path)) is not None]
    files = [file for place in places[:1] for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return [[file.name, os.path.getsize(file)] for file in files if file.is_file()]


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
        rows = draw.permutation(len(splits["train"]))
        test = sorted(rows[: round(len(rows) * spec.get("test_fraction", 0.3))].tolist())
        train = np.setdiff1d(rows, test).tolist()
        whole = splits["train"]
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
        stored = splits[split].cast_column("image", datasets.Image(decode=False))
        for row in stored:
            content = row["image"]["bytes"]
            total.update(content if content is not None else Path(row["image"]["path"]).read_bytes())
            total.update(str(row["label"]).encode())
    return total.hexdigest()
