"""Stored images as rows, rows as batches of pixel values, and images known again by their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_immunize.data.columns import check_label, find_columns, is_stored_image, is_transformed
from hf_immunize.errors import DataError, ImageDecodeError, ShapeError
from hf_immunize.files import tensor_bytes


_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa")
# What pillow raises on damaged files: not only OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ImageRows(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset as rows ``{"image": PIL.Image in RGB, "labels": int}``, or with ``"pixel_values"`` ``(C, H, W)``."""

    def __init__(
        self,
        dataset: Any,
        name: str,
        image_column: str,
        label_column: str | None = None,
        num_labels: int | None = None,
        outputs: Sequence[int] | None = None,  # by label, where items have the model's outputs as labels
    ) -> None:
        self.name, self.image_column, self.label_column = name, image_column, label_column
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
            if self.outputs is not None and row["labels"] < 0:  # of a stream, which cannot be looked through
                raise DataError(
                    f"Expected classes that have an output by their name, found label {label} in row {index} of "
                    f"{self.name}. Filter such rows out, or name the outputs in model.config.id2label."
                )
        return row


# ---- streamed datasets, read by position, so that sampling, sharding and resuming work as for stored ones


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
        self.dataset, self.name = dataset, name
        self.first = _stored([first], dataset)  # by which columns are found
        # What `ImageRows` is told of columns and labels; None where rows are given as they are.
        self.about: tuple[Any, ...] | None = None
        if not raw:
            self.about = find_columns(self.first, image_column, label_column, need_label=False)
        self._length: int | None = None  # known after the first pass
        self._position = 0  # of the next row in this pass
        self._pass = 0
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._started = False

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row at a position, counted over all passes."""
        self._refuse_workers()
        return self._as_row(self._seek(position), position)

    def one_pass(self) -> Iterator[dict[str, Any]]:
        """The rows of one pass, in the stream's order."""
        self._refuse_workers()
        for position, row in enumerate(self.dataset):
            yield self._as_row(row, position)

    def _refuse_workers(self) -> None:
        if torch.utils.data.get_worker_info() is not None:
            raise DataError(
                f"Expected dataloader_num_workers=0 with {self.name}, which is streamed, found workers, among which "
                "its shards would be dealt out. Set it to 0 or store the data set."
            )

    def _as_row(self, row: dict[str, Any], position: int) -> dict[str, Any]:
        if self.about is None:
            return row
        return ImageRows([row], f"{self.name} (at position {position} of the stream)", *self.about)[0]

    def _seek(self, position: int) -> dict[str, Any]:
        while True:
            wanted_pass, wanted = (0, position) if self._length is None else divmod(position, self._length)
            if not self._started or wanted_pass != self._pass or wanted < self._position:
                self._rows, self._position = iter(self.dataset), 0
                self._pass, self._started = wanted_pass, True
            for row in self._rows:
                self._position += 1
                if self._position == wanted + 1:
                    return row
            self._end()

    def _end(self) -> None:
        if self._position == 0 or (self._length is not None and self._position != self._length):
            raise DataError(
                f"Expected {self.name} to have as many rows in each pass as in the first ({self._length}), found "
                f"{self._position}. Give a stream with a fixed order and length, or a stored data set."
            )
        self._length = self._position
        self._started = False


class OnePass(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A stream to measure on: its rows once, in its own order."""

    def __init__(self, dataset: StreamedRows) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.dataset.one_pass()


def sampled(dataset: Any, count: int | None, seed: int, name: str) -> Any:
    """Rows of a stream as a stored set, at most ``count`` drawn evenly over all of it; another set as it is."""
    if not is_stream(dataset):
        return dataset
    if count is None:
        raise DataError(
            f"Expected max_images with {name}, which are streamed, found none. Say how many to draw of each task, or "
            "store them."
        )
    generator, kept = np.random.default_rng(seed), []
    for number, row in enumerate(dataset):
        if number < count:
            kept.append(row)
        elif (place := int(generator.integers(number + 1))) < count:
            kept[place] = row
    return _stored(kept, dataset)


def _stored(rows: list[Any], stream: Any) -> Any:
    """Rows of a stream, with what it knows of its columns."""
    features = stream.features if isinstance(stream, datasets.IterableDataset) else None
    if features is None or any(isinstance(value, Tensor) for row in rows for value in row.values()):
        return rows
    return datasets.Dataset.from_list(rows, features=features)


# ---- batches


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
    """An image of 8 bits per channel as RGB; what is transparent becomes white, as on a page."""
    if image.mode.startswith("I") or image.mode == "F":  # whose range nothing tells
        raise DataError(f"Expected 8 bits per channel, found an image of mode {image.mode}. Scale and convert it.")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        # Transparent pixels may have any colour.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# ---- knowing images again by their stored bytes, whatever their files, rows and data sets are called

# A record cannot hold a hash of every image. It holds the smallest of them, a sketch (4 KiB of text): a uniform sample
# by content, so that a share of a set that was trained on shows up in the sketch as that share.
_SIZE, _DIGITS = 256, 16


def image_hashes(dataset: Any, column: str) -> np.ndarray | None:
    """A hash of every stored image or array, without decoding any."""
    if isinstance(dataset, list):
        return _hashed(row.get(column) for row in dataset)
    if not isinstance(dataset, datasets.Dataset):
        return None
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    stored = column if column in dataset.features else images[0] if len(images) == 1 else None
    if stored is None:
        return None
    dataset = dataset.select_columns([stored])
    if stored in images:
        dataset = dataset.with_format(None).cast_column(stored, datasets.Image(decode=False))
    else:
        dataset = dataset.with_format("numpy")
    return _hashed(value for batch in dataset.iter(batch_size=100) for value in batch[stored])


def sketch_of(rows: Any) -> str | None:
    """The sketch of a set of images."""
    hashes = getattr(rows, "hashes", None)
    return None if hashes is None else "".join(f"{each:0{_DIGITS}x}" for each in np.unique(hashes)[:_SIZE].tolist())


def count_trained(hashes: np.ndarray | None, train_sketch: str, sketch: str | None) -> int:
    """How many images are known to be training images, those aside that training itself measured on."""
    if hashes is None:
        return 0
    trained, measured = _read(train_sketch), _read(sketch or "")
    if len(measured) == _SIZE:
        trained = trained[trained <= measured[-1]]  # of larger ones it is not known whether they were measured on
    return int(np.isin(hashes, np.setdiff1d(trained, measured)).sum())


def all_measured(hashes: np.ndarray | None, sketch: str | None) -> bool:
    """Whether images are known to be of those that training itself measured on."""
    measured = _read(sketch or "")
    if hashes is not None and len(measured) == _SIZE:
        hashes = hashes[hashes <= measured[-1]]  # of larger ones it is not known
    return hashes is not None and len(hashes) > 0 and bool(np.isin(hashes, measured).all())


def _read(sketch: str) -> np.ndarray:
    return np.array([int(sketch[i : i + _DIGITS], 16) for i in range(0, len(sketch), _DIGITS)], dtype=np.uint64)


def _hashed(values: Iterator[Any]) -> np.ndarray:
    digests = (hashlib.blake2b(_content(value), digest_size=_DIGITS // 2).digest() for value in values)
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def _content(value: Any) -> bytes:
    if isinstance(value, dict):
        content = value.get("bytes")
        if content is None and value.get("path"):
            path = Path(value["path"])
            content = path.read_bytes() if path.is_file() else str(path).encode()
        return content or b""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size}".encode() + value.tobytes()
    if isinstance(value, torch.Tensor):
        value = tensor_bytes(value)
    return b"" if value is None else np.ascontiguousarray(value).tobytes()
