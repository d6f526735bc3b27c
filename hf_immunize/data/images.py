"""Stored images as rows, and rows as batches of pixel values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from hf_immunize.data.columns import check_label, is_stored_image, is_transformed, read_labels
from hf_immunize.data.identity import image_hashes
from hf_immunize.errors import DataError, ImageDecodeError, ShapeError


logger = logging.get_logger(__name__)
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa")
# What pillow raises on damaged files: not only OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ImageRows(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset as rows ``{"image": PIL.Image in RGB, "labels": int}``, or with ``"pixel_values"`` ``(C, H, W)``.

    Errors name the row. With ``outputs``, the label of an item is the model's output for it, ``outputs[label]``.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        image_column: str,
        label_column: str | None = None,
        num_labels: int | None = None,
        outputs: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.image_column = image_column
        self.label_column = label_column
        self.num_labels = num_labels if outputs is None else len(outputs)
        self.outputs = outputs
        self._numbers: list[int] | None = None  # in the whole, of a subset's rows
        # A transform is the user's code; its ValueError is no damaged image.
        self._damage: tuple[type[Exception], ...] = (OSError, DataError)
        if isinstance(dataset, datasets.Dataset) and not is_transformed(dataset):
            columns = [image_column] + ([label_column] if label_column is not None else [])
            dataset = dataset.select_columns(columns)  # images in other columns would be decoded for nothing
            if isinstance(dataset.features[image_column], datasets.Image):
                self._damage = _DECODE_ERRORS
                dataset = dataset.with_format(None)  # a tensor could no longer be resized
                if not dataset.features[image_column].decode:
                    dataset = dataset.cast_column(image_column, datasets.Image())
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def hashes(self) -> np.ndarray | None:
        """A hash per stored image; see `image_hashes`."""
        return image_hashes(self.dataset, self.image_column)

    def all_labels(self) -> list[Any] | None:
        """Labels of all rows as stored; None where they are not stored."""
        if self.label_column is None:
            return None
        if isinstance(self.dataset, list):
            return [row[self.label_column] for row in self.dataset]
        stored = isinstance(self.dataset, datasets.Dataset) and self.label_column in self.dataset.features
        return read_labels(self.dataset, self.label_column) if stored else None

    def subset(self, numbers: list[int]) -> ImageRows:
        """Some of the rows; errors name them by their numbers here."""
        part = copy(self)
        part.__dict__.pop("hashes", None)
        if isinstance(self.dataset, datasets.Dataset):
            part.dataset = self.dataset.select(numbers)
        elif isinstance(self.dataset, list):
            part.dataset = [self.dataset[number] for number in numbers]
        else:
            part.dataset = torch.utils.data.Subset(self.dataset, numbers)
        part._numbers = numbers if self._numbers is None else [self._numbers[number] for number in numbers]
        return part

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        item_index, index = index, index if self._numbers is None else self._numbers[index]
        try:
            item = self.dataset[item_index]
            value = decoded(item[self.image_column])
            image = to_rgb(value) if isinstance(value, Image.Image) else None
        except self._damage as error:
            raise ImageDecodeError(
                f"Expected an image in row {index} of {self.name}, found what cannot be read ({type(error).__name__}: "
                f"{error}). Repair the file or drop the row, for example with dataset.select."
            ) from error
        if value is None:
            raise ImageDecodeError(f"Expected an image in row {index} of {self.name}, found none. Drop such rows.")
        row: dict[str, Any] = {"image": image} if image is not None else {"pixel_values": torch.as_tensor(value)}
        if image is None and not row["pixel_values"].is_floating_point():
            raise DataError(
                f"Expected floating-point pixel values in row {index} of {self.name}, found "
                f"{row['pixel_values'].dtype}. Give images and their processor, or normalise the values."
            )
        if self.label_column is not None:
            label = item[self.label_column]
            label = label.item() if isinstance(label, (Tensor, np.generic)) else label
            if self.num_labels is not None:
                check_label(label, self.num_labels, self.name, index)
            row["labels"] = label if self.outputs is None else self.outputs[int(label)]
        return row


class ImageCollator:
    """Rows of `ImageRows` to a batch: ``"pixel_values"`` ``(N, C, H, W)`` and, where rows have them, ``"labels"``."""

    def __init__(self, image_processor: Callable[..., Any] | None = None) -> None:
        self.image_processor = image_processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of N rows."""
        if "pixel_values" in rows[0]:
            pixels = [torch.as_tensor(row["pixel_values"]) for row in rows]
        elif self.image_processor is None:
            raise DataError(
                "Expected an image processor, as the dataset yields images, found none. Pass "
                "processing_class=AutoImageProcessor.from_pretrained(...)."
            )
        else:  # asked for one tensor, the processor would fail on unequal shapes without saying which
            processed = self.image_processor(images=[row["image"] for row in rows])["pixel_values"]
            pixels = [torch.as_tensor(image) for image in processed]
        odd = next((other for other in pixels if other.shape != pixels[0].shape), None)
        if odd is not None:
            raise ShapeError(
                f"Expected images of one shape (C, H, W), found {tuple(pixels[0].shape)} and {tuple(odd.shape)}. Use "
                "an image processor that resizes and crops to one size."
            )
        batch = {"pixel_values": torch.stack(pixels)}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([int(row["labels"]) for row in rows])
        return batch


def decoded(value: Any) -> Any:
    """The image behind stored bytes or a path, None where there is neither; any other value unchanged."""
    if not is_stored_image(value):
        return value
    return None if value["bytes"] is None and value["path"] is None else datasets.Image().decode_example(value)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; what is transparent becomes white, as on a page.

    More than 8 bits per channel say nothing of their range: it is the least of 8, 12 and 16 bits that holds the
    brightest pixel, and 0 to 1 for floating-point pixels up to 1.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image), floating=image.mode == "F"))
    elif image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        # Transparent pixels may have any colour.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(shades: np.ndarray, floating: bool) -> np.ndarray:
    low, high = (float(shades.min()), float(shades.max())) if shades.size else (0.0, 0.0)
    whole = next((bits for bits in (8, 12, 16) if high < 2**bits), None)
    if not (low >= 0 and whole is not None):  # NaN is neither
        raise DataError(
            f"Expected pixels from 0 to 65535, or from 0 to 1, found {low:g} to {high:g}. Scale them to one of these."
        )
    if floating and high <= 1:
        return (shades * 255).astype(np.uint8)
    if whole > 8:
        logger.warning_once(
            "Some images have more than 8 bits per channel: the range of each is the least of 8, 12 and 16 bits that "
            "holds its brightest pixel. To compare images by brightness, convert them to 8 bits by one scale."
        )
    return (shades / 2 ** (whole - 8)).astype(np.uint8)
