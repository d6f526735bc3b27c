"""Streamed data sets, read by position so that sampling, sharding and resuming stay as for stored ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageRows
from hf_immunize.errors import DataError


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning on.

    Args:
        dataset: Any data set.

    Returns:
        True for a ``datasets.IterableDataset`` and whatever else can be iterated but has no length.

    Example:
        >>> is_stream([1, 2]), is_stream(row for row in [1, 2])
        (False, True)
    """
    return dataset is not None and not hasattr(dataset, "__len__") and hasattr(dataset, "__iter__")


class StreamedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """A stream as rows by position, which may only grow; it begins anew when it ends.

    A resumed run skips to its position (`datasets.IterableDataset.skip`, where there is one). Shuffle the stream with
    a seed before (`dataset.shuffle(seed=0)`): its order is taken as it comes. It is read in the main process alone,
    since `datasets` would deal out its shards among the workers of a DataLoader, and positions with them.

    Args:
        dataset: A ``datasets.IterableDataset``, or any object whose iteration can be started again and gives
            dictionaries.
        name: How messages call it, such as ``"harmful_dataset"``.
        image_column: The image column, where it cannot be found.
        label_column: The label column, where it cannot be found.
        raw: Give the stream's own rows, for a collator of the user's own, rather than items as of `ImageRows`.

    Raises:
        DataError: If it is empty, cannot be read a second time, or has no image column; when it is read in a worker.

    Example:
        >>> import datasets
        >>> stored = datasets.Dataset.from_dict({"pixel_values": [[[[0.0]]], [[[1.0]]], [[[2.0]]]]})
        >>> rows = StreamedRows(stored.to_iterable_dataset(), "harmful_dataset")
        >>> [rows[position]["pixel_values"].item() for position in (0, 2, 3, 7)]
        [0.0, 2.0, 0.0, 1.0]
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        image_column: str | None = None,
        label_column: str | None = None,
        *,
        raw: bool = False,
    ) -> None:
        if iter(dataset) is dataset:
            raise DataError(
                f"Expected {name} to be readable more than once, found an iterator, which is used up by one pass. "
                "Give a datasets.IterableDataset, for example from load_dataset(..., streaming=True)."
            )
        first = next(iter(dataset), None)
        if first is None:
            raise DataError(f"Expected at least one image in {name}, found an empty stream. Check the split.")
        self.dataset = dataset
        self.name = name
        self._raw = raw
        if not raw:
            self._image, self._label = find_columns([first], image_column, label_column, need_label=False)
        self._length: int | None = None  # known once the end was seen
        self._position = 0  # of the row that comes next, counted from the beginning of this pass
        self._pass = 0
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._started = False

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row at a position, counted over all passes.

        Args:
            position: At least that of the last call, or reading starts again.

        Returns:
            As an item of `ImageRows`, or as the stream has it.
        """
        if torch.utils.data.get_worker_info() is not None:
            raise DataError(
                f"Expected dataloader_num_workers=0 with {self.name}, which is streamed, found workers, among which "
                "its shards would be dealt out. Set it to 0 or store the data set."
            )
        row = self._seek(position)
        if self._raw:
            return row
        rows = ImageRows([row], f"{self.name} (at position {position} of the stream)", self._image, self._label)
        return rows[0]

    def _seek(self, position: int) -> dict[str, Any]:
        while True:
            if self._length is not None:
                wanted_pass, wanted = divmod(position, self._length)
            else:
                wanted_pass, wanted = 0, position
            if not self._started or wanted_pass != self._pass or wanted < self._position:
                self._restart(wanted_pass, wanted)
            for row in self._rows:
                self._position += 1
                if self._position == wanted + 1:
                    return row
            self._end(wanted)

    def _restart(self, wanted_pass: int, wanted: int) -> None:
        # Skipping by the data set's own means is only safe where it cannot skip past an end not seen yet.
        skips = hasattr(self.dataset, "skip") and self._length is not None
        self._rows = iter(self.dataset.skip(wanted) if skips else self.dataset)
        self._position = wanted if skips else 0
        self._pass, self._started = wanted_pass, True

    def _end(self, wanted: int) -> None:
        if self._position == 0 or (self._length is not None and self._position != self._length):
            raise DataError(
                f"Expected {self.name} to have as many rows in each pass as in the first ({self._length}), found "
                f"{self._position}. Give a stream with a fixed order and length, or a stored data set."
            )
        self._length = self._position
        self._started = False
