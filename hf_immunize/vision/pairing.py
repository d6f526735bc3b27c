"""Benign and harmful images side by side, from one DataLoader.

One loader keeps shuffling, sharding over processes and resuming the Trainer's own affair; two loaders zipped in the
loss would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError, DataError, ShapeError


class PairedSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Draw pairs of a benign and a harmful row; an epoch is one pass over the benign data.

    The benign order depends on ``(seed, epoch)`` alone. The harmful rows run through permutations of their own, on and
    on over the epochs, so that all are used equally often whichever set is larger. No global random state is used:
    every process draws the same pairs, and a resumed run the pairs of the interrupted one. (With ``drop_last``, the
    pairs of a last partial batch are skipped, not moved to the next epoch.)

    Accelerate 1.15 announces the epoch by `set_epoch`, as found by trying: ``DataLoaderShard.__iter__`` calls its own
    ``set_epoch``, which looks for a sampler in ``batch_sampler`` and in ``batch_sampler.batch_sampler``. That reaches
    a plain loader, a sharded one, and on one process a resumed one. With several processes, resuming within an epoch
    adds a third layer (skip, shard, batch), and neither accelerate nor the Trainer (transformers 5.23) finds the
    sampler: the rest of that epoch would follow the order of epoch 0. In that case accelerate does announce the epoch
    to the dataset, and `PairedDataset.set_epoch` passes it on to the sampler made by `PairedDataset.make_sampler`.

    Args:
        num_benign: The number of benign rows.
        num_harmful: The number of harmful rows.
        seed: The seed of both orders.
        shuffle: If False, both sets come in their stored order.

    Raises:
        ArgumentError: If a set is empty.

    Examples:
        >>> sampler = PairedSampler(num_benign=3, num_harmful=2, seed=0, shuffle=False)
        >>> list(sampler)
        [(0, 0), (1, 1), (2, 0)]
        >>> sampler.set_epoch(1)
        >>> list(sampler)
        [(0, 1), (1, 0), (2, 1)]
    """

    def __init__(self, num_benign: int, num_harmful: int, seed: int, shuffle: bool = True) -> None:
        if num_benign < 1 or num_harmful < 1:
            raise ArgumentError(
                f"Pairs need at least one benign and one harmful row, but there are {num_benign} and {num_harmful}."
            )
        self.num_benign = num_benign
        self.num_harmful = num_harmful
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose pairs the next iteration draws.

        Args:
            epoch: The epoch, counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_benign

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = self.epoch * self.num_benign
        harmful: list[int] = []
        for step, benign in enumerate(self._permutation(self.num_benign, kind=0, count=self.epoch)):
            cycle, within = divmod(start + step, self.num_harmful)
            if step == 0 or within == 0:
                harmful = self._permutation(self.num_harmful, kind=1, count=cycle)
            yield benign, harmful[within]

    def _permutation(self, length: int, kind: int, count: int) -> list[int]:
        if not self.shuffle:
            return list(range(length))
        # A generator of its own, seeded alike in every process; `kind` keeps the two sets' orders apart.
        return np.random.default_rng([self.seed, kind, count]).permutation(length).tolist()


class PairedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Benign and harmful rows, indexed by pairs.

    Args:
        benign: A map-style dataset of benign rows, such as `ImageRows`.
        harmful: A map-style dataset of harmful rows.
        harmful_labels: Keep the harmful rows' labels, which most objectives do not use.

    Raises:
        DataError: If one of them is empty.

    Examples:
        >>> pairs = PairedDataset([{"image": "cat", "labels": 0}], [{"image": "gun", "labels": 0}])
        >>> pairs[0, 0]
        {'benign': {'image': 'cat', 'labels': 0}, 'harmful': {'image': 'gun'}}
    """

    def __init__(self, benign: Any, harmful: Any, harmful_labels: bool = False) -> None:
        for name, data in (("benign", benign), ("harmful", harmful)):
            if len(data) == 0:
                raise DataError(f"The {name} dataset is empty; immunization needs at least one {name} image.")
        self.benign = benign
        self.harmful = harmful
        self.harmful_labels = harmful_labels
        self._sampler: PairedSampler | None = None

    def __len__(self) -> int:
        return len(self.benign)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        benign, harmful = pair
        row = self.harmful[harmful]
        if not self.harmful_labels:
            row = {column: value for column, value in row.items() if column != "labels"}
        return {"benign": self.benign[benign], "harmful": row}

    def make_sampler(self, seed: int, shuffle: bool = True) -> PairedSampler:
        """Make the sampler that draws this dataset's pairs, and keep its epoch current; see `set_epoch`.

        Args:
            seed: The seed of both orders.
            shuffle: If False, both sets come in their stored order.

        Returns:
            The sampler, to give to the DataLoader.
        """
        self._sampler = PairedSampler(len(self.benign), len(self.harmful), seed, shuffle)
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
        >>> from hf_immunize.vision.images import ImageCollator
        >>> row = {"pixel_values": torch.zeros(3, 8, 8)}
        >>> batch = PairedCollator(ImageCollator())([{"benign": row, "harmful": row}] * 4)
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
            For pairs ``{"benign": {...}, "harmful": {...}}``, else what the inner collator returns.

        Raises:
            ShapeError: If benign and harmful images differ in shape, so that they could not pass the model together.
        """
        if "benign" not in rows[0]:
            return self.inner(rows)
        batch = {side: self.inner([row[side] for row in rows]) for side in ("benign", "harmful")}
        benign, harmful = (tuple(batch[side]["pixel_values"].shape[1:]) for side in ("benign", "harmful"))
        if benign != harmful:
            raise ShapeError(
                f"Benign and harmful images should have one shape (C, H, W), but have {benign} and {harmful}; give "
                f"both sets the same image processor."
            )
        return batch
