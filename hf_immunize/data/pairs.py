"""Benign and harmful images, and images to distil on, side by side, from one DataLoader.

One loader keeps shuffling, sharding over processes and resuming the Trainer's own affair; two loaders zipped in the
loss would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError, DataError, ShapeError


# A row, or a row and which of its stored views.
Row = int | tuple[int, int]
# A benign row with the harmful, the distillation and the held-out rows that come along with it.
Draw = tuple[Row, tuple[Row, ...], tuple[Row, ...], tuple[Row, ...]]
# The sides that come beside the benign one, in this order.
BESIDE = ("harmful", "distillation", "held_out")


@dataclass(frozen=True)
class BatchSizes:
    """How many rows of each side one process takes in a micro-batch.

    Attributes:
        benign: Benign rows.
        harmful: Harmful rows.
        distillation: Rows of the distillation set; 0 without one.
        held_out: Benign rows that are measured and not trained on; 0 without.
    """

    benign: int = 1
    harmful: int = 1
    distillation: int = 0
    held_out: int = 0


ONE_EACH = BatchSizes()


class PairedSampler(torch.utils.data.Sampler[Draw]):
    """Draw benign rows with the rows of the other sides beside them; an epoch is one pass over the benign data.

    The benign order depends on ``(seed, epoch)`` alone. The rows of the other sides run through permutations of their
    own, on and on over the epochs, so that all are used equally often whichever set is larger. Where batches differ in
    size, the other side's rows are spread over the benign rows of a batch. No global random state is used: every
    process draws the same rows, and a resumed run the rows of the interrupted one. (With ``drop_last``, the rows of a
    last partial batch are skipped, not moved to the next epoch.)

    Accelerate 1.15 announces the epoch by `set_epoch`, as found by trying: ``DataLoaderShard.__iter__`` calls its own
    ``set_epoch``, which looks for a sampler in ``batch_sampler`` and in ``batch_sampler.batch_sampler``. That reaches
    a plain loader, a sharded one, and on one process a resumed one. With several processes, resuming within an epoch
    adds a third layer (skip, shard, batch), and neither accelerate nor the Trainer (transformers 5.23) finds the
    sampler: the rest of that epoch would follow the order of epoch 0. In that case accelerate does announce the epoch
    to the dataset, and `PairedDataset.set_epoch` passes it on to the sampler made by `PairedDataset.make_sampler`.

    Args:
        num_benign: The number of benign rows.
        num_harmful: The number of harmful rows; None for a stream, whose rows are then counted on and on.
        seed: The seed of all orders.
        shuffle: If False, all sets come in their stored order.
        num_distillation: The number of distillation rows; None for a stream.
        num_held_out: The number of held-out benign rows.
        batch_sizes: Rows of each side in a batch.

    Raises:
        ArgumentError: If a set is empty.

    Examples:
        >>> sampler = PairedSampler(num_benign=3, num_harmful=2, seed=0, shuffle=False)
        >>> list(sampler)
        [(0, (0,), (), ()), (1, (1,), (), ()), (2, (0,), (), ())]
        >>> sampler.set_epoch(1)
        >>> list(sampler)
        [(0, (1,), (), ()), (1, (0,), (), ()), (2, (1,), (), ())]
        >>> list(PairedSampler(4, 9, seed=0, shuffle=False, batch_sizes=BatchSizes(benign=4, harmful=6)))
        [(0, (0,), (), ()), (1, (1, 2), (), ()), (2, (3,), (), ()), (3, (4, 5), (), ())]
    """

    def __init__(
        self,
        num_benign: int,
        num_harmful: int | None,
        seed: int,
        shuffle: bool = True,
        *,
        num_distillation: int | None = 0,
        num_held_out: int = 0,
        batch_sizes: BatchSizes = ONE_EACH,
    ) -> None:
        if num_benign < 1 or num_harmful == 0:
            raise ArgumentError(
                f"Pairs need at least one benign and one harmful row, but there are {num_benign} and {num_harmful}."
            )
        self.num_benign = num_benign
        self.num_harmful = num_harmful
        self.num_distillation = num_distillation
        self.num_held_out = num_held_out
        self.batch_sizes = batch_sizes
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.views: tuple[int, ...] = (1, 1, 1, 1)  # of the benign rows and those beside them

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose rows the next iteration draws.

        Args:
            epoch: The epoch, counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_benign

    def __iter__(self) -> Iterator[Draw]:
        order = self._permutation(self.num_benign, kind=0, count=self.epoch)
        benign = [self._shown(row, kind=0, turn=self.epoch) for row in order]
        harmful = self._beside(self.num_harmful, self.batch_sizes.harmful, kind=1)
        distillation = self._beside(self.num_distillation, self.batch_sizes.distillation, kind=2)
        held_out = self._beside(self.num_held_out, self.batch_sizes.held_out, kind=3)
        yield from zip(benign, harmful, distillation, held_out, strict=True)

    def _beside(self, length: int | None, batch_size: int, kind: int) -> Iterator[tuple[Row, ...]]:
        """Rows of another side, for each benign row of this epoch."""
        position = self.epoch * self._drawn(self.num_benign, batch_size)
        order: list[int] = []
        cycle = -1
        for step in range(self.num_benign):
            rows: list[Row] = []
            for _ in range(self._drawn(step + 1, batch_size) - self._drawn(step, batch_size)):
                if length is None:
                    rows.append(position)
                else:
                    if position // length != cycle:
                        cycle = position // length
                        order = self._permutation(length, kind, cycle)
                    rows.append(self._shown(order[position % length], kind, cycle))
                position += 1
            yield tuple(rows)

    def _shown(self, row: int, kind: int, turn: int) -> Row:
        views = self.views[kind]
        return (row, view_of(self.seed, turn, row, views)) if views > 1 else row

    def _drawn(self, steps: int, batch_size: int) -> int:
        """How many rows of another side go with so many benign rows."""
        return steps * batch_size // self.batch_sizes.benign

    def _permutation(self, length: int, kind: int, count: int) -> list[int]:
        if not self.shuffle:
            return list(range(length))
        # A generator of its own, seeded alike in every process; `kind` keeps the sets' orders apart.
        return np.random.default_rng([self.seed, kind, count]).permutation(length).tolist()


def view_of(seed: int, turn: int, row: int, views: int) -> int:
    """Choose the view of a row, so that over ``views`` turns each row shows all of its views.

    Args:
        seed: The run's seed.
        turn: How many times all rows were drawn before; the epoch.
        row: The row.
        views: The number of views.

    Returns:
        The view, a function of the arguments alone.

    Examples:
        >>> [view_of(seed=0, turn=epoch, row=5, views=3) for epoch in range(4)]
        [2, 0, 1, 2]
    """
    return (int(np.random.default_rng([seed, row]).integers(views)) + turn) % views if views > 1 else 0


class PairedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Benign rows with harmful, and maybe distillation rows beside them, indexed by what `PairedSampler` draws.

    Args:
        benign: A map-style dataset of benign rows, such as `ImageRows`.
        harmful: A map-style dataset of harmful rows, or `StreamedRows`.
        harmful_labels: Keep the harmful rows' labels, which most objectives do not use.
        distillation: Rows of any images, whose labels are not used; likewise.
        held_out: Benign rows to measure, which are not among `benign`.
        batch_sizes: Rows of each side in a batch.

    Raises:
        DataError: If one of them is empty.

    Examples:
        >>> pairs = PairedDataset([{"image": "cat", "labels": 0}], [{"image": "gun", "labels": 0}])
        >>> sorted(pairs[0, (0,), (), ()].items())  # doctest: +ELLIPSIS
        [('benign', {'image': 'cat', 'labels': 0}), ('distillation', []), ('harmful', [{'image': 'gun'}]), ...]
    """

    def __init__(
        self,
        benign: Any,
        harmful: Any,
        harmful_labels: bool = False,
        distillation: Any = None,
        batch_sizes: BatchSizes = ONE_EACH,
        held_out: Any = None,
    ) -> None:
        sides = {"benign": benign, "harmful": harmful, "distillation": distillation, "held-out": held_out}
        for name, data in sides.items():
            if data is not None and _length(data) == 0:
                raise DataError(f"The {name} dataset is empty; immunization needs at least one {name} image.")
        self.benign = benign
        self.harmful = harmful
        self.harmful_labels = harmful_labels
        self.distillation = distillation
        self.held_out = held_out
        self.batch_sizes = batch_sizes
        self._sampler: PairedSampler | None = None

    def __len__(self) -> int:
        return len(self.benign)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        if not isinstance(draw, tuple):
            raise DataError(
                f"Expected rows of all sides as PairedSampler draws them, found {draw!r}, as of a sampler of your "
                "own, which does not say what harmful images go with it. Leave the Trainer's as it is; for your own "
                "order, sort train_dataset and set train_sampling_strategy='sequential'."
            )
        benign, harmful, distillation, held_out = draw
        harmful_rows = [self.harmful[row] for row in harmful]
        return {
            "benign": self.benign[benign],
            "harmful": harmful_rows if self.harmful_labels else [_unlabelled(row) for row in harmful_rows],
            "distillation": [_unlabelled(self.distillation[row]) for row in distillation],
            "held_out": [self.held_out[row] for row in held_out],
        }

    def make_sampler(self, seed: int, shuffle: bool = True) -> PairedSampler:
        """Make the sampler that draws this dataset's rows, and keep its epoch current; see `set_epoch`.

        Args:
            seed: The seed of all orders.
            shuffle: If False, all sets come in their stored order.

        Returns:
            The sampler, to give to the DataLoader.
        """
        self._sampler = PairedSampler(
            len(self.benign),
            _length(self.harmful),
            seed,
            shuffle,
            num_distillation=0 if self.distillation is None else _length(self.distillation),
            num_held_out=0 if self.held_out is None else len(self.held_out),
            batch_sizes=replace(
                self.batch_sizes,
                distillation=0 if self.distillation is None else self.batch_sizes.distillation,
                held_out=0 if self.held_out is None else self.batch_sizes.held_out,
            ),
        )
        return self._sampler

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler, where accelerate announces it to the dataset alone.

        Args:
            epoch: The epoch, counted from 0.
        """
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)


class PairedCollator:
    """Collate pairs as two batches, and rows that are not paired (in evaluation) as one.

    Args:
        inner: The collator of either side, such as `ImageCollator`.

    Examples:
        >>> from hf_immunize.data.images import ImageCollator
        >>> row = {"pixel_values": torch.zeros(3, 8, 8)}
        >>> batch = PairedCollator(ImageCollator())([{"benign": row, "harmful": [row]}] * 4)
        >>> batch["harmful"]["pixel_values"].shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> None:
        self.inner = inner

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate N rows.

        Args:
            rows: Pairs from a `PairedDataset`, or single rows.

        Returns:
            For pairs ``{"benign": {...}, "harmful": {...}}``, and those of `BESIDE` where there are such rows, else
            what the inner collator returns.

        Raises:
            ShapeError: If benign and harmful images differ in shape, so that they could not pass the model together.
        """
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
    """Check that the images of all sides can pass the model together.

    Args:
        batch: Side to its collated batch.

    Raises:
        DataError: If a side has no pixel values, or whole numbers.
        ShapeError: If sides differ in shape.
    """
    for side, collated in batch.items():
        if "pixel_values" not in collated:
            raise DataError(
                f"Expected pixel_values in a collated batch of {side} images, found {', '.join(collated) or 'none'}. "
                "Let data_collator give them under that name, with labels beside them."
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
                f"Benign and {side} images should have one shape (C, H, W), but have {benign} and {shape}; give both "
                f"sets the same image processor."
            )


def _length(data: Any) -> int | None:
    """The number of rows; None for a stream."""
    return len(data) if hasattr(data, "__len__") else None


def _unlabelled(row: dict[str, Any]) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column != "labels"}
