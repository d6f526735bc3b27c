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
