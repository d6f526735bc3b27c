"""Knowing images again by their stored bytes, whatever their files, rows and data sets are called.

A record cannot hold a hash of every image. It holds the smallest of them, a sketch: a uniform sample by content, so
that a share of a set that was trained on shows up in the sketch as that share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from hf_immunize.tensor_hash import tensor_bytes


# Hashes in a sketch: 4 KiB of text.
_SIZE = 256
_DIGITS = 16


def image_hashes(dataset: Any, column: str) -> np.ndarray | None:
    """A hash of every stored image or array, without decoding any.

    Args:
        dataset: A `datasets.Dataset` (its stored column, whatever its transform), or a list of dictionaries.
        column: The column of images or pixel values.

    Returns:
        One 64-bit number a row, equal for equal bytes; None where rows are made on the fly, as by a torch dataset.

    Examples:
        >>> rows = [{"pixel_values": torch.zeros(3, 2, 2)}, {"pixel_values": torch.ones(3, 2, 2)}]
        >>> one, two = image_hashes(rows, "pixel_values"), image_hashes(rows[1:], "pixel_values")
        >>> len(one), bool(one[1] == two[0]), bool(one[0] == two[0])
        (2, True, False)
    """
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
    """The sketch of a set of images.

    Args:
        rows: `ImageRows`, or anything else.

    Returns:
        Hexadecimal digits, the smallest hash first; None where images cannot be known again.
    """
    hashes = getattr(rows, "hashes", None)
    return None if hashes is None else "".join(f"{each:0{_DIGITS}x}" for each in np.unique(hashes)[:_SIZE].tolist())


def count_trained(hashes: np.ndarray | None, train_sketch: str, sketch: str | None) -> int:
    """How many images are known to be training images, those aside that training itself measured on.

    A data set may hold an image twice, on either side of its split: those were not told apart in training either.

    Args:
        hashes: Of the images, from `image_hashes`; None where they cannot be known again.
        train_sketch: Of the training images.
        sketch: Of the images that training measured on.

    Returns:
        A number from below: all of them where the sketch holds all training images.

    Examples:
        >>> import types
        >>> trained, measured, tested = (np.array(of, np.uint64) for of in ([1, 2, 3], [3, 4], [2, 3, 4, 5]))
        >>> sketches = [sketch_of(types.SimpleNamespace(hashes=of)) for of in (trained, measured)]
        >>> count_trained(tested, *sketches)
        1
    """
    if hashes is None:
        return 0
    trained, measured = _read(train_sketch), _read(sketch or "")
    if len(measured) == _SIZE:
        trained = trained[trained <= measured[-1]]  # of larger ones it is not known whether they were measured on
    return int(np.isin(hashes, np.setdiff1d(trained, measured)).sum())


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
