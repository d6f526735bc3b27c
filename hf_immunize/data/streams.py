"""Streamed datasets, read by position, so that sampling, sharding and resuming work as for stored ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageRows
from hf_immunize.errors import DataError


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can be iterated but has no length."""
    return dataset is not None and not hasattr(dataset, "__len__") and hasattr(dataset, "__iter__")


class StreamedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """A stream as rows by position over all passes, in its own order; going back reads it again."""

    def __init__(
        self,
        dataset: Any,
        name: str,
        image_column: str | None = None,
        label_column: str | None = None,
        *,
        raw: bool = False,  # rows as the stream has them, else as `ImageRows` gives them
    ) -> None:
        if iter(dataset) is dataset:
            raise DataError(
                f"Expected {name} to be readable more than once, found an iterator. Give a datasets.IterableDataset, "
                "for example from load_dataset(..., streaming=True)."
            )
        first = next(iter(dataset), None)
        if first is None:
            raise DataError(f"Expected at least one image in {name}, found an empty stream. Check the split.")
        self.dataset, self.name, self._raw = dataset, name, raw
        if not raw:
            self._image, self._label = find_columns([first], image_column, label_column, need_label=False)
        self._length: int | None = None  # known after the first pass
        self._position = 0  # of the next row in this pass
        self._pass = 0
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._started = False

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row at a position, counted over all passes."""
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
            wanted_pass, wanted = (0, position) if self._length is None else divmod(position, self._length)
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
