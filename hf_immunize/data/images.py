"""From stored images to batches of pixel values."""

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
    """View a dataset as rows of RGB images or pixel values, with errors that name the row."""

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
        self._numbers: list[int] | None = None  # of the rows, where these are some of another's
        # A transform is the user's own code; its ValueError is no damaged image.
        self._damage: tuple[type[Exception], ...] = (OSError, DataError)
        if isinstance(dataset, datasets.Dataset) and not is_transformed(dataset):
            columns = [image_column] + ([label_column] if label_column is not None else [])
            dataset = dataset.select_columns(columns)  # Other columns may hold images, which would be decoded in vain.
            if isinstance(dataset.features[image_column], datasets.Image):
                self._damage = _DECODE_ERRORS
                dataset = dataset.with_format(None)  # As a tensor, an image could no longer be resized.
                if not dataset.features[image_column].decode:
                    dataset = dataset.cast_column(image_column, datasets.Image())
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def hashes(self) -> np.ndarray | None:
        """By which to know stored images again, one number a row; see `image_hashes`."""
        return image_hashes(self.dataset, self.image_column)

    def all_labels(self) -> list[Any] | None:
        """Labels of all rows as they are stored; None where they are not, or there are none."""
        if self.label_column is None:
            return None
        if isinstance(self.dataset, list):
            return [row[self.label_column] for row in self.dataset]
        stored = isinstance(self.dataset, datasets.Dataset) and self.label_column in self.dataset.features
        return read_labels(self.dataset, self.label_column) if stored else None

    def subset(self, numbers: list[int]) -> ImageRows:
        """Some of the rows, which messages go on calling by the numbers they have here."""
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
                f"The image in row {index} of {self.name} cannot be read: {type(error).__name__}: {error}; repair the "
                f"file or drop the row, for example with dataset.select."
            ) from error
        if value is None:
            raise ImageDecodeError(f"Row {index} of {self.name} holds no image; drop the rows without an image.")

        row: dict[str, Any] = {"image": image}
        if image is None:
            row = {"pixel_values": torch.as_tensor(value)}
            if not row["pixel_values"].is_floating_point():
                raise DataError(
                    f"Expected floating-point pixel values in row {index} of {self.name}, as an image processor makes "
                    f"them, found {row['pixel_values'].dtype}. Give images and the processor, or normalise the values."
                )
        if self.label_column is not None:
            label = item[self.label_column]
            label = label.item() if isinstance(label, (Tensor, np.generic)) else label
            if self.num_labels is not None:
                check_label(label, self.num_labels, self.name, index)
            row["labels"] = label if self.outputs is None else self.outputs[int(label)]
        return row


class ImageCollator:
    """Turn rows of `ImageRows` into a batch."""

    def __init__(self, image_processor: Callable[..., Any] | None = None) -> None:
        self.image_processor = image_processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate N rows."""
        pixels = self._pixels(rows)
        odd = next((other for other in pixels if other.shape != pixels[0].shape), None)
        if odd is not None:
            raise ShapeError(
                f"The images of a batch should have one shape (C, H, W), but some have {tuple(pixels[0].shape)} and "
                f"some {tuple(odd.shape)}; use an image processor that resizes and crops to one size."
            )
        batch = {"pixel_values": torch.stack(pixels)}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([int(row["labels"]) for row in rows])
        return batch

    def _pixels(self, rows: list[dict[str, Any]]) -> list[Tensor]:
        if "pixel_values" in rows[0]:
            return [torch.as_tensor(row["pixel_values"]) for row in rows]
        if self.image_processor is None:
            raise DataError(
                "The dataset yields images, but there is no image processor to turn them into pixel values; pass "
                "processing_class=AutoImageProcessor.from_pretrained(...)."
            )
        # Asked for one tensor, the processor itself fails on unequal shapes, and without saying which.
        processed = self.image_processor(images=[row["image"] for row in rows])["pixel_values"]
        return [torch.as_tensor(pixels) for pixels in processed]


def decoded(value: Any) -> Any:
    """The image behind stored bytes or a path, None where there is neither; any other value unchanged."""
    if not is_stored_image(value):
        return value
    return None if value["bytes"] is None and value["path"] is None else datasets.Image().decode_example(value)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image), floating=image.mode == "F"))
    elif image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        # Beneath what cannot be seen there may be any colour.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(shades: np.ndarray, floating: bool) -> np.ndarray:
    low, high = (float(shades.min()), float(shades.max())) if shades.size else (0.0, 0.0)
    whole = next((bits for bits in (8, 12, 16) if high < 2**bits), None)
    if not (low >= 0 and whole is not None):  # NaN is neither
        raise DataError(
            f"Expected pixels from 0 to 65535, or from 0 to 1, found some from {low:g} to {high:g}. Scale them to one "
            "of these ranges."
        )
    if floating and high <= 1:
        return (shades * 255).astype(np.uint8)
    if whole > 8:
        logger.warning_once(
            "Some images have more than 8 bits a channel: the range of each is taken to be the least of 8, 12 and 16 "
            "bits that holds its brightest pixel. Where images are to be compared by brightness, convert them to 8 "
            "bits by one scale."
        )
    return (shades / 2 ** (whole - 8)).astype(np.uint8)
