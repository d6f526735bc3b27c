"""The tasks under attack, found and checked before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_immunize.audit.result import TaskSummary
from hf_immunize.data.columns import find_columns, listed, stored_labels
from hf_immunize.data.images import ImageCollator, ImageRows, sampled
from hf_immunize.data.sources import AS_USUAL, HeldOut, Parts, choose, divide
from hf_immunize.errors import DataError


# Images in one forward pass.
_BATCH = 64


@dataclass
class Images:
    """Some images of a task with their class numbers."""

    rows: ImageRows  # the data set
    indices: list[int]  # of its rows
    labels: Tensor  # their class numbers, (n,)
    hashes: list[bytes] = field(default_factory=list)  # of the pixel values as the model sees them; none before `load`
    _held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, processor: Any, memory: int, progress: bool = True) -> int:
        """Decode and process images once, for their hashes, and hold them if they fit; returns the bytes held."""
        held: Tensor | None = None
        done = 0
        for batch in self._decode(processor, _BATCH, progress):
            self.hashes += [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in batch]
            if not done and batch[0].numel() * batch.element_size() * len(self) <= memory:
                held = batch.new_empty(len(self), *batch.shape[1:])
            if held is not None:
                if batch.shape[1:] != held.shape[1:]:
                    raise DataError(
                        f"Expected images of one size after processing in {self.rows.name}, found "
                        f"{tuple(held.shape[1:])} and {tuple(batch.shape[1:])}; use a processor that crops."
                    )
                held[done : done + len(batch)] = batch
            done += len(batch)
        self._held = held
        return 0 if held is None else held.nbytes

    def batches(
        self, processor: Any, size: int = _BATCH, description: str = "", progress: bool = True
    ) -> Iterator[Tensor]:
        """Pixel values, batch by batch, in order."""
        if self._held is None:
            yield from self._decode(processor, size, progress, description)
        else:
            parts = self._held.split(size)
            yield from tqdm(parts, desc=description, disable=not progress, leave=False)

    def pixels(self, processor: Any, chosen: Tensor) -> Tensor:
        """Pixel values of chosen rows, ``(k, C, H, W)``."""
        if self._held is not None:
            return self._held[chosen]
        part = Images(self.rows, [self.indices[i] for i in chosen.tolist()], self.labels[chosen])
        return torch.cat(list(part._decode(processor, _BATCH, False)))

    def _decode(self, processor: Any, size: int, progress: bool, description: str = "images") -> Iterator[Tensor]:
        subset = torch.utils.data.Subset(self.rows, self.indices)
        loader = torch.utils.data.DataLoader(subset, batch_size=size, collate_fn=ImageCollator(processor))
        for batch in tqdm(loader, desc=description or "images", disable=not progress, leave=False):
            yield batch["pixel_values"].contiguous()


@dataclass
class AttackedTask:
    """A task: images to learn from and images to measure on."""

    name: str  # "harmful", "unseen", "benign" or "unrelated"
    dataset: str  # what reports call it
    train: Images
    test: Images  # less those of classes that the training images lack
    num_classes: int
    utility: Images  # all test images with the labels as the data set has them, for the classifier's accuracy
    label_names: list[str]  # of each label as the data set has it, where it has names
    problem: str = ""  # why the task cannot be learned from these images; empty if it can
    held_out: HeldOut | None = None  # how the test images were drawn; None where they are a split of their own

    def describe(self) -> TaskSummary:
        """The task as reports have it."""
        labels = self.test.labels if len(self.test) else self.utility.labels
        chance = float(torch.bincount(labels).max() / len(labels)) if len(labels) else 0.0
        return TaskSummary(self.name, self.dataset, len(self.train), len(self.test), self.num_classes, chance)


def load_task(
    name: str,
    source: Any,
    warnings: list[str],
    *,
    draw: HeldOut = AS_USUAL,
    image_column: str | None = None,
    label_column: str | None = None,
    max_images: int | None = None,
    seed: int = HeldOut.seed,
    required: bool = True,
) -> AttackedTask:
    """Find and check the images of a task, without decoding any."""
    parts = _divided(name, source, draw)
    sides = [
        _side(
            sampled(part, max_images, seed, f"the {name} data"), f"the {name} {side} data", image_column, label_column
        )
        for part, side in ((parts.train, "training"), (parts.test, "test"))
    ]
    (train_rows, train_labels, train_names), (test_rows, test_labels, test_names) = sides
    spoken = train_names is not None and test_names is not None
    keys = [
        [names[value] if spoken and names is not None else value for value in labels]
        for labels, names in ((train_labels, train_names), (test_labels, test_names))
    ]
    present = set(keys[0])
    classes = [key for key in (train_names if spoken and train_names else sorted(present)) if key in present]
    code = {key: index for index, key in enumerate(classes)}
    chosen = sorted(choose(len(keys[1]), max_images, seed))
    known = [row for row in chosen if keys[1][row] in code]
    absent = sorted({str(key) for key in keys[1] if key not in code})
    problem = ""
    if len(classes) < 2:
        problem = f"Expected at least two classes in the {name} training data, found {listed(map(str, classes))}"
    elif not known:
        problem = (
            f"Expected classes of the {name} training data in its test data too, found {listed(absent, 5)} for "
            f"{listed(map(str, classes), 5)}"
        )
    if problem and required:
        raise DataError(f"{problem}; check both label columns.")
    if absent and known:
        warnings.append(
            f"{len(absent)} classes of the {name} test images are not among the training ones ({listed(absent, 3)}); "
            f"{len(chosen) - len(known)} test images were left out."
        )
    rows = sorted(choose(len(keys[0]), max_images, seed))
    train_images = Images(train_rows, rows, torch.tensor([code[keys[0][row]] for row in rows]))
    test_images = Images(test_rows, known, torch.tensor([code[keys[1][row]] for row in known], dtype=torch.long))
    utility, label_names = _utility(test_rows, test_labels, test_names or [], chosen if name == "benign" else [])
    typed = source[0] if isinstance(source, (tuple, list)) else source
    called = str(typed) if isinstance(typed, (str, Path)) else f"{name} images"
    found = train_images, test_images, len(classes), utility, label_names, problem, parts.held_out
    return AttackedTask(name, called, *found)


def _utility(rows: ImageRows, labels: list[Any], names: list[str], every: list[int]) -> tuple[Images, list[str]]:
    """Test images with the labels as the data set has them, and the names of these."""
    if every and not names and any(isinstance(label, str) for label in labels):
        names = sorted(set(map(str, labels)))
    place = {name: index for index, name in enumerate(names)}
    numbers = [place.get(labels[row], -1) if isinstance(labels[row], str) else labels[row] for row in every]
    return Images(rows, every, torch.tensor(numbers, dtype=torch.long)), names


def overlaps(tasks: list[AttackedTask]) -> list[str]:
    """Sentences on images that occur where they should not: in training and test data, or in two tasks."""
    sentences = []
    hashes = {task.name: (set(task.train.hashes), set(task.test.hashes)) for task in tasks}
    for task in tasks:
        train, test = hashes[task.name]
        if both := len(train & test):
            sentences.append(
                f"{both} {task.name} test images are training images as well: accuracies on them are too high, before "
                "and after immunization."
            )
    for i, one in enumerate(tasks):
        for other in tasks[i + 1 :]:
            shared = len(set().union(*hashes[one.name]) & set().union(*hashes[other.name]))
            if shared:
                sentences.append(
                    f"{shared} images are both {one.name} and {other.name}: raising κ for one and keeping it for the "
                    "other contradict each other on them."
                )
    return sentences


def _divided(name: str, source: Any, draw: HeldOut) -> Parts:
    pair = isinstance(source, (tuple, list)) and len(source) == 2 and not isinstance(source[0], dict)
    source, test = source if pair else (source, None)
    return divide(source, draw, test=test, name=f"{name} data")


def _side(
    part: Any, called: str, image_column: str | None, label_column: str | None
) -> tuple[ImageRows, list[Any], list[str] | None]:
    """Images, labels and class names of training or test data."""
    if len(part) == 0:
        raise DataError(f"Expected at least one image in {called}, found none. Check the split and its filters.")
    image, label = find_columns(part, image_column, label_column)
    assert label is not None
    return ImageRows(part, called, image), _labels(part, label, called), _names(part, label)


def _labels(dataset: Any, column: str, called: str) -> list[Any]:
    values = stored_labels(dataset, column) or [dataset[row][column] for row in range(len(dataset))]
    labels = [value.item() if isinstance(value, (Tensor, np.generic)) else value for value in values]
    for row, label in enumerate(labels):
        if not isinstance(label, (int, str)) or (isinstance(label, int) and label < 0):
            raise DataError(
                f"Row {row} of {called} has the label {label!r}; labels are whole numbers from 0 or names. Drop the "
                "rows without a valid label."
            )
    return labels


def _names(dataset: Any, column: str) -> list[str] | None:
    features = getattr(dataset, "features", None) or {}
    return getattr(features.get(column), "names", None)
