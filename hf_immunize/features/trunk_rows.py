"""Stored activations as the rows, pairs and views that training draws."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import datasets
import numpy as np
import torch

from hf_immunize.data.pairing import ONE_EACH, BatchSizes, PairedDataset, PairedSampler


class CachedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Stored activations in place of images; memory-mapped, so that little of them is in memory.

    An index is a row, of which the first view is given, or a pair of a row and a view.

    Args:
        dataset: One row for each pair of a row and a view (views of a row side by side), with a column
            ``"activation"`` and, where there are labels, one ``"labels"``.
        shape: Shape of an activation.
        views: The number of views of each row.

    Examples:
        >>> features = datasets.Features({"activation": datasets.List(datasets.Value("float32"), length=2)})
        >>> dataset = datasets.Dataset.from_dict({"activation": [[0, 1], [2, 3], [4, 5], [6, 7]]}, features=features)
        >>> rows = CachedRows(dataset, shape=(2,), views=2)
        >>> len(rows), rows[1]["pixel_values"], rows[1, 1]["pixel_values"]
        (2, tensor([4., 5.]), tensor([6., 7.]))
    """

    def __init__(self, dataset: datasets.Dataset, shape: tuple[int, ...], views: int = 1) -> None:
        self.dataset = dataset
        self.shape = shape
        self.views = views
        self._blocks: list[np.ndarray] | None = None
        self._starts: list[int] = []
        self._labels = dataset.data.column("labels").to_numpy() if "labels" in dataset.column_names else None

    def __len__(self) -> int:
        return len(self.dataset) // self.views

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        row, view = index if isinstance(index, tuple) else (int(index), 0)
        if not (0 <= row < len(self) and 0 <= view < self.views):
            raise IndexError(f"row {row}, view {view} of {len(self)} rows with {self.views} views")
        position = row * self.views + view
        blocks = self._memory_mapped()
        block = bisect_right(self._starts, position) - 1
        values = blocks[block][position - self._starts[block]]
        item: dict[str, Any] = {"pixel_values": torch.from_numpy(values.copy()).view(self.shape)}
        if self._labels is not None:
            item["labels"] = int(self._labels[position])
        return item

    def __getstate__(self) -> dict[str, Any]:
        # The dataset travels to another process as the name of its file; the views of the memory map would as numbers.
        return self.__dict__ | {"_blocks": None, "_starts": []}

    def _memory_mapped(self) -> list[np.ndarray]:
        if self._blocks is None:
            # Arrow's own memory; the formats of `datasets` would make a list of each row.
            chunks = self.dataset.data.column("activation").chunks
            width = int(np.prod(self.shape))
            self._blocks = [c.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for c in chunks if len(c)]
            self._starts = np.cumsum([0, *(len(block) for block in self._blocks)])[:-1].tolist()
        return self._blocks


class CachedPairs(PairedDataset):
    """Stored activations of all sides, drawn in the order of the images they stand for.

    Args:
        benign: Stored benign rows.
        harmful: Stored harmful rows.
        distillation: Stored rows of the distillation set, if there is one.
        batch_sizes: Rows of each side in a batch.
        held_out: Stored held-out benign rows, if there are any.

    Examples:
        >>> features = datasets.Features({"activation": datasets.List(datasets.Value("float32"), length=1)})
        >>> dataset = datasets.Dataset.from_dict({"activation": [[0], [1], [2], [3]]}, features=features)
        >>> pairs = CachedPairs(CachedRows(dataset, (1,), views=2), CachedRows(dataset, (1,), views=2))
        >>> list(pairs.make_sampler(seed=0, shuffle=False))
        [((0, 1), ((0, 1),), (), ()), ((1, 1), ((1, 1),), (), ())]
    """

    def __init__(
        self,
        benign: CachedRows,
        harmful: CachedRows,
        distillation: CachedRows | None = None,
        batch_sizes: BatchSizes = ONE_EACH,
        held_out: CachedRows | None = None,
    ) -> None:
        super().__init__(benign, harmful, True, distillation, batch_sizes, held_out)

    def make_sampler(self, seed: int, shuffle: bool = True) -> PairedSampler:
        """As `PairedDataset.make_sampler`, with a view for each row.

        Args:
            seed: The seed of all orders and of the views.
            shuffle: If False, all sets come in their stored order.

        Returns:
            The sampler; without several views, that of the images.
        """
        sampler = super().make_sampler(seed, shuffle)
        sides = (self.benign, self.harmful, self.distillation, self.held_out)
        sampler.views = tuple(1 if rows is None else rows.views for rows in sides)
        return sampler
