"""Benign and harmful images, and images to distil on, paired in one DataLoader; and sides that no training can use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from hf_immunize.data.columns import stored_labels
from hf_immunize.data.images import ImageRows
from hf_immunize.errors import DataError, ShapeError


logger = logging.get_logger(__name__)

# A benign row with the harmful and the distillation rows that come with it.
Draw = tuple[int, tuple[int, ...], tuple[int, ...]]
# The sides in addition to the benign one, in this order.
BESIDE = ("harmful", "distillation")


@dataclass(frozen=True)
class BatchSizes:
    """Rows of each side in one process's micro-batch; 0 for a side without a set."""

    benign: int = 1
    harmful: int = 1
    distillation: int = 0


ONE_EACH = BatchSizes()


class PairedSampler(torch.utils.data.Sampler[Draw]):
    """Draw benign rows, each with rows of the other sides; an epoch is one pass over the benign data."""

    # The benign order depends on (seed, epoch) alone. The other sides run through permutations of their own, cycling
    # across epochs, so that all rows are used equally often whichever set is larger. No global random state: every
    # process draws the same rows, and a resumed run those of the interrupted one.
    #
    # With several processes, resuming within an epoch wraps the sampler once more than accelerate 1.15 looks into, and
    # the rest of the epoch would follow the order of epoch 0. Accelerate then announces the epoch to the dataset, and
    # `PairedDataset.set_epoch` passes it on.

    def __init__(
        self,
        num_benign: int,
        num_harmful: int | None,  # None for a stream, whose rows are counted without end
        seed: int,
        shuffle: bool = True,
        *,
        num_distillation: int | None = 0,
        batch_sizes: BatchSizes = ONE_EACH,
        streamed: bool = False,  # benign rows, which then come in their order
    ) -> None:
        self.streamed = streamed
        self.num_benign, self.num_harmful, self.num_distillation = num_benign, num_harmful, num_distillation
        self.batch_sizes = batch_sizes
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose rows the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_benign

    def __iter__(self) -> Iterator[Draw]:
        benign: Iterable[int] = range(self.epoch * self.num_benign, (self.epoch + 1) * self.num_benign)
        if not self.streamed:
            benign = self._permutation(self.num_benign, kind=0, count=self.epoch)
        harmful = self._beside(self.num_harmful, self.batch_sizes.harmful, kind=1)
        distillation = self._beside(self.num_distillation, self.batch_sizes.distillation, kind=2)
        yield from zip(benign, harmful, distillation, strict=True)

    def _beside(self, length: int | None, batch_size: int, kind: int) -> Iterator[tuple[int, ...]]:
        """Rows of another side, for each benign row of this epoch."""
        position = self.epoch * self._drawn(self.num_benign, batch_size)
        order: list[int] = []
        cycle = -1
        for step in range(self.num_benign):
            rows: list[int] = []
            for _ in range(self._drawn(step + 1, batch_size) - self._drawn(step, batch_size)):
                if length is not None and position // length != cycle:
                    cycle = position // length
                    order = self._permutation(length, kind, cycle)
                rows.append(position if length is None else order[position % length])
                position += 1
            yield tuple(rows)

    def _drawn(self, steps: int, batch_size: int) -> int:
        """How many rows of another side go with so many benign rows."""
        return steps * batch_size // self.batch_sizes.benign

    def _permutation(self, length: int, kind: int, count: int) -> list[int]:
        if not self.shuffle:
            return list(range(length))
        # A generator of its own, seeded alike in every process; `kind` keeps the sets' orders apart.
        return np.random.default_rng([self.seed, kind, count]).permutation(length).tolist()


class PairedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Benign rows with rows of the other sides, indexed by what `PairedSampler` draws."""

    def __init__(
        self,
        benign: Any,
        harmful: Any,
        harmful_labels: bool = False,
        distillation: Any = None,
        batch_sizes: BatchSizes = ONE_EACH,
        count: int = 0,  # benign rows to an epoch, of a stream
    ) -> None:
        sides = {"benign": benign, "harmful": harmful, "distillation": distillation}
        for name, data in sides.items():
            if data is not None and _length(data) == 0:
                raise DataError(f"Expected at least one {name} image, found an empty {name} dataset. Give images.")
        self.benign, self.harmful, self.distillation = benign, harmful, distillation
        self.harmful_labels, self.batch_sizes, self.count = harmful_labels, batch_sizes, count
        self._sampler: PairedSampler | None = None

    def __len__(self) -> int:
        return self.count or len(self.benign)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        if not isinstance(draw, tuple):
            raise DataError(
                f"Expected rows of all sides as PairedSampler draws them, found {draw!r}. Leave the Trainer's; for "
                "your own order, sort train_dataset and set train_sampling_strategy='sequential'."
            )
        benign, harmful, distillation = draw
        return {
            "benign": self.benign[benign],
            "harmful": [_read(self.harmful, row, self.harmful_labels) for row in harmful],
            "distillation": [_read(self.distillation, row, labelled=False) for row in distillation],
        }

    def make_sampler(self, seed: int, shuffle: bool = True) -> PairedSampler:
        """Make the sampler that draws this dataset's rows, and keep its epoch current; see `set_epoch`."""
        none = self.distillation is None
        self._sampler = PairedSampler(
            len(self),
            _length(self.harmful),
            seed,
            shuffle,
            num_distillation=0 if none else _length(self.distillation),
            batch_sizes=replace(self.batch_sizes, distillation=0) if none else self.batch_sizes,
            streamed=self.count > 0,
        )
        return self._sampler

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler, where accelerate announces it to the dataset alone."""
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)


class PairedCollator:
    """Collate pairs as a batch of each side, and rows that are not paired (in evaluation) as one."""

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> None:
        self.inner = inner

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Batches by side, ``{"benign": {...}, "harmful": {...}, ...}``."""
        if "benign" not in rows[0]:
            return self.inner(rows)
        batch = {"benign": self.inner([row["benign"] for row in rows])}
        for side in BESIDE:
            side_rows = [one for row in rows for one in row.get(side, ())]
            if side_rows:
                batch[side] = self.inner(side_rows)
        check_one_shape(batch)
        return batch


def check_one_shape(batch: dict[str, dict[str, Any]]) -> None:
    """Check that the images of all sides can pass the model together."""
    for side, collated in batch.items():
        if "pixel_values" not in collated:
            raise DataError(
                f"Expected pixel_values in a collated batch of {side} images, found {', '.join(collated) or 'none'}. "
                "Let data_collator give them under that name."
            )
        if not collated["pixel_values"].is_floating_point():
            raise DataError(
                f"Expected floating-point pixel values in a batch of {side} images, found "
                f"{collated['pixel_values'].dtype}. Let the image processor or data_collator rescale and normalise."
            )
    benign = tuple(batch["benign"]["pixel_values"].shape[1:])
    for side in batch:
        shape = tuple(batch[side]["pixel_values"].shape[1:])
        if shape != benign:
            raise ShapeError(
                f"Expected benign and {side} images of one shape (C, H, W), found {benign} and {shape}. Give both the "
                "same image processor."
            )


def _length(data: Any) -> int | None:
    """The number of rows; None for a stream."""
    return len(data) if hasattr(data, "__len__") else None


def _read(rows: Any, number: int, labelled: bool) -> dict[str, Any]:
    return {column: value for column, value in rows[number].items() if labelled or column != "labels"}


# To read more rows than these would take too long.
_MOST = 100_000


def degenerate_sides(trained: Any, measured: Any) -> list[str]:
    """Sentences, also logged, on images of which the figures say little: those trained on, else those measured."""
    # Only `ImageRows` that are stored are read, so that no random transform of a user's runs.
    found: list[str] = []
    for kind, sides in (("", trained), (" evaluation", measured)):
        benign, harmful = (sides or (None, None))[:2]
        found = found or _of_both(f"benign{kind}", benign, f"harmful{kind}", harmful)
    found = found or _unseen(*(sides[0] if sides else None for sides in (trained, measured)))
    for sentence in found:
        logger.warning(sentence)
    return found


def _classes(rows: Any) -> list[Any] | None:
    """The classes of stored images, one an image; None where they are not known."""
    known = isinstance(rows, ImageRows) and rows.label_column is not None
    return stored_labels(rows.dataset, rows.label_column) if known else None


def _unseen(trained: Any, measured: Any) -> list[str]:
    """Whether benign images are measured of classes that none of those trained on is of."""
    shown, asked = _classes(trained), _classes(measured)
    if not shown or not asked or not (missing := set(asked) - set(shown)):
        return []
    count = sum(label in missing for label in asked)
    return [
        f"{count} of {len(asked)} benign evaluation images are of classes that no benign training image is of "
        f"({len(missing)} of {len(set(asked))}): nothing holds what the model knows of them, and their accuracy may "
        "fall. Give benign images of every class."
    ]


def _of_both(benign_name: str, benign: Any, harmful_name: str, harmful: Any) -> list[str]:
    sentences: list[str] = []
    different: list[np.ndarray] = []
    for name, rows in ((benign_name, benign), (harmful_name, harmful)):
        if isinstance(rows, ImageRows) and 0 < len(rows) <= _MOST and rows.hashes is not None:
            different.append(np.unique(rows.hashes))
            count = len(different[-1])
            if count == 1 or 2 * count <= len(rows):
                sentences.append(
                    f"Of {len(rows)} {name} images {count} differ, and κ is of these. Remove the duplicates, and "
                    "give more images, at least as many as the features have dimensions."
                )
    if len(different) == 2 and (shared := np.intersect1d(different[0], different[1]).size):
        share = f"All {shared}" if shared == len(different[1]) else f"{shared} of {len(different[1])}"
        sentences.append(
            f"{share} {harmful_name} images are benign ones too: the goals of the two sides contradict each other on "
            "them, and RIR stays near 1. Remove them from one side."
        )
    labels = _classes(benign)
    if labels and len(set(labels)) == 1:
        sentences.append(
            f"All {benign_name} images are of one class: whatever the weights, their accuracy says nothing about the "
            "benign task. Give images of all of its classes."
        )
    return sentences
