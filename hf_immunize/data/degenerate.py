"""Data of which no training can make anything, told before the first step: κ and RIR of them say nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from hf_immunize.data.columns import is_transformed
from hf_immunize.data.images import ImageRows
from hf_immunize.errors import DataError


logger = logging.get_logger(__name__)
# Fewer different images have next to no spectrum; of more rows than these, reading all would take too long here.
_FEWEST, _MOST = 2, 100_000
# Images looked at for whether they show anything.
_LOOKED_AT = 8


def degenerate_sides(trained: Any, measured: Any) -> list[str]:
    """Say what is wrong with the images of both sides as a whole, in the log.

    Only what is stored is looked at, so that no random transform of the user's own is run.

    Args:
        trained: Benign and harmful rows to train on; None, or anything else than `ImageRows`, is not looked at.
        measured: Those to measure on, told of where nothing is wrong with the others.

    Returns:
        The sentences, each with a remedy; none where nothing is wrong.

    Examples:
        >>> import torch
        >>> one, two = ({"pixel_values": shade * torch.arange(12.0).reshape(3, 2, 2)} for shade in (1.0, 2.0))
        >>> rows = ImageRows([one, two], "both", "pixel_values")
        >>> degenerate_sides((rows, rows), None)  # doctest: +ELLIPSIS
        ['All 2 harmful images are benign ones too: ...']
    """
    for kind, sides in (("", trained), (" evaluation", measured)):
        benign, harmful = (sides or (None, None))[:2]
        found = _of_both(f"benign{kind}", benign, f"harmful{kind}", harmful)
        for sentence in found:
            logger.warning(sentence)
        if found:
            return found
    return []


def _of_both(benign_name: str, benign: Any, harmful_name: str, harmful: Any) -> list[str]:
    sentences: list[str] = []
    different: list[np.ndarray] = []
    for name, rows in ((benign_name, benign), (harmful_name, harmful)):
        if isinstance(rows, ImageRows) and 0 < len(rows) <= _MOST and rows.hashes is not None:
            different.append(np.unique(rows.hashes))
            sentences += _of_one_side(name, rows, len(different[-1]))
    if len(different) == 2 and (shared := np.intersect1d(different[0], different[1]).size):
        count = len(different[1])
        sentences.append(
            f"{f'All {count}' if shared == count else f'{shared} of {count}'} {harmful_name} images are benign ones "
            "too: what is asked of the one side and of the other contradict each other on them, and RIR stays near 1. "
            "Take them out of one side."
        )
    labels = benign.all_labels() if isinstance(benign, ImageRows) else None
    if labels and len(set(labels)) == 1:
        sentences.append(
            f"All {benign_name} images are of one class: whatever the weights, accuracy on them says nothing of the "
            "task to keep. Give images of all of its classes."
        )
    return sentences


def _of_one_side(side: str, rows: ImageRows, different: int) -> list[str]:
    if different < _FEWEST:
        return [
            f"The {side} images are one single image ({len(rows)} times): κ of one image is 1, whatever the weights. "
            "Give different images, at least as many as the features have dimensions."
        ]
    sentences = []
    if 2 * different <= len(rows):
        sentences.append(
            f"Of {len(rows)} {side} images only {different} differ, and κ is of these few. Take out the duplicates, "
            "and give more images."
        )
    if _shows_nothing(rows):
        sentences.append(
            f"The {side} images looked at are of one colour each, such as all black: their features hardly differ. "
            "Check how they were read and scaled."
        )
    return sentences


def _shows_nothing(rows: ImageRows) -> bool:
    if is_transformed(rows.dataset):
        return False
    seen = []
    for index in np.linspace(0, len(rows) - 1, _LOOKED_AT).astype(int):
        try:
            row = rows[index]
        except DataError:  # the step that reads it says so
            continue
        pixels = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) if "image" in row else row["pixel_values"]
        seen.append(bool((pixels.flatten(1) == pixels.flatten(1)[:, :1]).all()))
    return bool(seen) and all(seen)
