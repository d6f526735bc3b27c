"""Views of images: draws of a random transform that come out the same whenever they are drawn again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import DataError


class RowViews(torch.utils.data.Dataset[tuple[int, Any]]):
    """All views of all rows, the views of a row side by side.

    Each item is drawn under a seed of its own, which the global random generators do not see.

    Args:
        rows: A map-style dataset of rows with ``"image"`` or ``"pixel_values"``.
        views: The number of views of each row.
        augment: Takes an image and a `torch.Generator`, and returns another image; the first view is without.
        seed: The seed of all draws.

    Examples:
        >>> rows = RowViews([{"pixel_values": torch.zeros(1)}], 2, lambda image, generator: image + 1)
        >>> rows[0][1], rows[1][1]
        ({'pixel_values': tensor([0.])}, {'pixel_values': tensor([1.])})
    """

    def __init__(
        self,
        rows: Any,
        views: int = 1,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.rows = rows
        self.views = views
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows) * self.views

    def __getitem__(self, position: int) -> tuple[int, Any]:
        """Draw a view.

        Args:
            position: Row times the number of views, plus the view.

        Returns:
            The seed it was drawn with, and the row.
        """
        row, view = divmod(position, self.views)
        seed = int(np.random.default_rng([self.seed, row, view]).integers(2**32))
        with _seeded(seed):
            item = self.rows[row]
            if self.augment is not None and view > 0:
                column = "image" if "image" in item else "pixel_values"
                generator = torch.Generator().manual_seed(seed)
                item = item | {column: self.augment(item[column], generator)}
        return seed, item


class ViewCollator:
    """Collate views with a collator that may itself be random.

    Args:
        inner: A collator of rows.

    Raises:
        DataError: If it gives more than ``pixel_values`` and one label a row.
    """

    def __init__(self, inner: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.inner = inner

    def __call__(self, views: list[tuple[int, Any]]) -> dict[str, Tensor]:
        """Collate N views.

        Args:
            views: Items of `RowViews`.

        Returns:
            ``"pixel_values"``, ``(N, C, H, W)``, and where the rows have labels, ``"labels"``, ``(N,)``.
        """
        with _seeded(views[0][0]):
            batch = dict(self.inner([row for _, row in views]))
        labels = batch.get("labels")
        if not {"pixel_values"} <= batch.keys() <= {"pixel_values", "labels"}:
            raise DataError(
                f"Expected batches of pixel_values and labels for a cached trunk, found {', '.join(sorted(batch))}. "
                "Leave out the other columns, or train without (cache_trunk='no')."
            )
        if labels is not None and (labels.shape != (len(views),) or labels.is_floating_point()):
            raise DataError(
                f"Expected one class a row for a cached trunk, found labels of the shape {tuple(labels.shape)} and "
                f"type {labels.dtype}. Mix labels without a cached trunk (cache_trunk='no')."
            )
        return batch


def differs_between_draws(views: RowViews, collate: ViewCollator, rows: int = 4, draws: int = 4) -> bool:
    """Tell whether rows are random, from a few draws of a few of them.

    A flip of every other image goes unseen with a probability of 1 in 4,096.

    Args:
        views: Views, whose `augment` is left out of this.
        collate: Their collator.
        rows: How many rows to draw.
        draws: How many times to draw each.

    Returns:
        Whether any two draws of a row differ.
    """
    for row in sorted({round(step * (len(views.rows) - 1) / max(rows - 1, 1)) for step in range(rows)}):
        first = None
        for draw in range(draws):
            one = collate([RowViews(views.rows, seed=views.seed + draw)[row]])["pixel_values"]
            first = one if first is None else first
            if one.shape != first.shape or not torch.equal(one, first):
                return True
    return False


def has_random_rows(rows: Any, collate: Any) -> bool:
    """Tell whether a data set's rows differ from access to access, as those of a random transform do.

    Args:
        rows: A map-style dataset.
        collate: Its collator.

    Returns:
        Whether a few draws of a few rows differ.
    """
    return differs_between_draws(RowViews(rows, 2), ViewCollator(collate))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that transforms draw from, and put them back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
