"""From stored images to batches of pixel values."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_immunize.errors import DataError, ImageDecodeError, ShapeError
from hf_immunize.vision.columns import check_label, is_transformed
from hf_immunize.vision.identity import image_hashes


# What pillow raises on damaged files: not only OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ImageRows(torch.utils.data.Dataset[dict[str, Any]]):
    """View a dataset as rows of RGB images or pixel values, with errors that name the row.

    Args:
        dataset: A ``datasets.Dataset``, or any map-style dataset whose items are dictionaries.
        name: How messages call the dataset, such as ``"train_dataset"``.
        image_column: The column with images or pixel values, as found by `find_columns`.
        label_column: The column with labels; without it, items have none.
        num_labels: If given, each label is checked to be in ``range(num_labels)``.

    Items are ``{"image": PIL.Image in RGB, "labels": int}``, or ``{"pixel_values": Tensor (C, H, W), "labels": int}``
    for what is no longer an image.

    Raises:
        ImageDecodeError: On access to a row whose image cannot be read.
        DataError: On access to a row whose label is out of range.

    Examples:
        >>> rows = ImageRows([{"image": Image.new("L", (8, 8)), "label": 1}], "train_dataset", "image", "label")
        >>> rows[0]["image"].mode, rows[0]["labels"]
        ('RGB', 1)
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        image_column: str,
        label_column: str | None = None,
        num_labels: int | None = None,
    ) -> None:
        self.name = name
        self.image_column = image_column
        self.label_column = label_column
        self.num_labels = num_labels
        self._numbers: list[int] | None = None  # of the rows, where these are some of another's
        # A transform is the user's own code; its ValueError is no damaged image.
        self._damage: tuple[type[Exception], ...] = (OSError,)
        if isinstance(dataset, datasets.Dataset) and not is_transformed(dataset):
            columns = [image_column] + ([label_column] if label_column is not None else [])
            dataset = dataset.select_columns(columns)  # Other columns may hold images, which would be decoded in vain.
            if isinstance(dataset.features[image_column], datasets.Image):
                self._damage = _DECODE_ERRORS
                dataset = dataset.with_format(None)  # As a tensor, an image could no longer be resized.
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def hashes(self) -> np.ndarray | None:
        """By which to know stored images again, one number a row; see `image_hashes`."""
        return image_hashes(self.dataset, self.image_column)

    def subset(self, numbers: list[int]) -> ImageRows:
        """Some of the rows, which messages go on calling by the numbers they have here.

        Args:
            numbers: Row numbers.

        Returns:
            Rows in the order of the numbers.
        """
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
            value = item[self.image_column]
            image = to_rgb(value) if isinstance(value, Image.Image) else None
        except self._damage as error:
            raise ImageDecodeError(
                f"The image in row {index} of {self.name} cannot be read: {type(error).__name__}: {error}; repair the "
                f"file or drop the row, for example with dataset.select."
            ) from error
        if value is None:
            raise ImageDecodeError(f"Row {index} of {self.name} holds no image; drop the rows without an image.")

        row: dict[str, Any] = {"pixel_values": torch.as_tensor(value)} if image is None else {"image": image}
        if self.label_column is not None:
            label = item[self.label_column]
            label = label.item() if isinstance(label, (Tensor, np.generic)) else label
            if self.num_labels is not None:
                check_label(label, self.num_labels, self.name, index)
            row["labels"] = label
        return row


class ImageCollator:
    """Turn rows of `ImageRows` into a batch.

    Args:
        image_processor: A transformers image processor; not needed where all rows hold pixel values.

    Examples:
        >>> batch = ImageCollator()([{"pixel_values": torch.zeros(3, 8, 8), "labels": 1}] * 4)
        >>> batch["pixel_values"].shape, batch["labels"]
        (torch.Size([4, 3, 8, 8]), tensor([1, 1, 1, 1]))
    """

    def __init__(self, image_processor: Callable[..., Any] | None = None) -> None:
        self.image_processor = image_processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate N rows.

        Args:
            rows: Rows with ``"image"`` or ``"pixel_values"``, and with or without ``"labels"``.

        Returns:
            ``"pixel_values"``, ``(N, C, H, W)``, and where the rows have labels, ``"labels"``, ``(N,)``.

        Raises:
            ShapeError: If images differ in shape after processing.
            DataError: If rows hold images and there is no processor.
        """
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB.

    Args:
        image: Any image: greyscale, palette, with transparency (which is dropped), or of 16 bits.

    Returns:
        The image with three channels of 8 bits.

    Examples:
        >>> to_rgb(Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))).getpixel((0, 0))
        (128, 128, 128)
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # Pillow clips 16 bits at 255, which turns nearly every such image white.
        shades = np.clip(np.asarray(image), 0, 65535) // 256
        image = Image.fromarray(shades.astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # The palette may hold transparency, which pillow asks to resolve first.
    return image.convert("RGB")
