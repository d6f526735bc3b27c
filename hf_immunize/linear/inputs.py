"""Two matrices from two files: arrays, tables or images."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from hf_immunize.errors import (
    ArgumentError,
    DataError,
    ImageDecodeError,
    ImmunizationError,
    NonFiniteError,
    ShapeError,
)
from hf_immunize.spectra.checks import as_matrix, as_values, check_dtype, check_result, grid_cutoff, rank_cutoff


def as_data(values: Any, name: str = "Z") -> torch.Tensor:
    """Return data as a float64 matrix, or say in one sentence why it cannot be one."""
    matrix = as_values(values, name).detach()
    if matrix.is_complex():
        raise ArgumentError(f"Expected real numbers in {name}, found {matrix.dtype}. Pass its parts as columns each.")
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64)
    matrix = as_matrix(matrix, name)
    if matrix.shape[0] < 2:
        raise ShapeError(f"Expected at least two rows in {name}, found {matrix.shape[0]}. One sample has no spectrum.")
    return matrix


def as_targets(values: Any, rows: int, name: str = "y") -> torch.Tensor:
    """Return regression targets as a float64 ``(rows, C)`` matrix."""
    targets = as_values(values, name).detach()
    if targets.ndim not in (1, 2) or targets.shape[0] != rows or targets.numel() == 0:
        raise ShapeError(f"Expected {name} with {rows} rows, like the features, found shape {tuple(targets.shape)}.")
    return as_data(targets.reshape(rows, -1), name)


def dtype_of_origin(values: Any, produced_dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which the data were computed, which decides what is rounding noise in them."""
    dtype = check_dtype(produced_dtype) or as_values(values, "the data").dtype
    return dtype if dtype.is_floating_point else torch.float64


def keep_above_noise(sigma: torch.Tensor, shape: Sequence[int], produced_dtype: torch.dtype) -> torch.Tensor:
    """Which singular values of data of this shape the rank rule keeps."""
    norm = check_result(math.hypot(*sigma.tolist()), "the norm of the data")
    cutoff = rank_cutoff(float(sigma[0]), norm, shape[0], shape[1], produced_dtype)
    return sigma > max(cutoff, grid_cutoff(shape[0], shape[1], produced_dtype))


def standardize(X: Any, name: str = "X") -> tuple[torch.Tensor, list[int]]:
    """Centre and scale every column by its standard deviation."""
    matrix = as_data(X, name)
    # Each column by a power of two near its size, so that no square leaves the range.
    matrix = torch.ldexp(matrix, -torch.frexp(matrix.abs().amax(0)).exponent)
    centred = matrix - matrix.mean(0)
    deviation = centred.square().sum(0).div(len(matrix) - 1).sqrt()
    constant = deviation <= 1e-14 * matrix.abs().amax(0)
    scaled = torch.where(constant, torch.zeros_like(centred), centred / deviation.where(~constant, deviation + 1))
    return scaled, constant.nonzero()[:, 0].tolist()


ARRAYS = (".npy", ".npz", ".safetensors")
TABLES = (".csv", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# What numpy, pandas, pyarrow and pillow raise on damaged files, between them.
_DAMAGE = (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
_PACKED_DAMAGE = (struct.error, zipfile.BadZipFile, zlib.error)


def read_pair(
    benign: Path,
    harmful: Path,
    *,
    key: str | None = None,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    fill: float | None = None,
    image_size: int = 28,
    notes: list[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read two data sets with the same columns."""
    if image_size < 1:
        raise ArgumentError(f"Expected images of at least one pixel a side, found {image_size}. Use --image-size 28.")
    if fill is not None and not math.isfinite(fill):
        raise ArgumentError(f"Expected a finite number to fill missing cells with, found {fill}. Use --fill 0.")
    for path in (benign, harmful):
        if not path.exists():
            raise DataError(f"Expected a file or folder, found no file {path}. Give two paths, benign first.")
    # What would have no effect is most often meant for another file.
    kinds = {path.suffix for path in (benign, harmful)}
    for option, given, of in (
        ("--key", key is not None, ARRAYS[1:]),
        ("--columns", columns is not None, TABLES),
        ("--drop", bool(drop), TABLES),
        ("--fill", fill is not None, TABLES),
    ):
        if given and kinds.isdisjoint(of):
            raise ArgumentError(
                f"Expected {option} with {' and '.join(of)} files alone, found {benign} and {harmful}. Leave it out."
            )
    tables = {path: _table(path, columns, drop) for path in (benign, harmful) if path.suffix in TABLES}
    if kinds.issubset(TABLES) and not any(_packed(table) for table in tables.values()):
        first, second, coded = _encode([tables[benign], tables[harmful]], (benign, harmful), fill)
        if coded and notes is not None:
            names = ", ".join(map(str, coded[:12])) + (" …" if len(coded) > 12 else "")
            notes.append(f"{len(coded)} text columns were coded as 0, 1, 2, … in the order of their values: {names}.")
        return first, second
    parts = []
    for path in (benign, harmful):
        part = _cells(tables[path], path, image_size) if path in tables else _array(path, key, image_size)
        # Other shapes and kinds of number have an error of their own later on.
        if part.ndim == 2 and part.is_floating_point():
            as_matrix(part.to(torch.float64), f"{path}")
        parts.append(part)
    return parts[0], parts[1]


def _array(path: Path, key: str | None, image_size: int) -> torch.Tensor:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
        if not files:
            raise DataError(f"Expected images ({', '.join(IMAGES)}) under {path}, found no images. Check the path.")
        return torch.stack([_image(file, f"{file}", image_size) for file in files])
    if path.suffix not in ARRAYS:
        raise DataError(f"Expected {', '.join(ARRAYS + TABLES)} or a folder of images, found {path}. Convert it.")
    with _reading(path):
        if path.suffix == ".npy":
            # Whatever the name says, numpy also opens archives.
            with path.open("rb") as file:
                found: Any = np.lib.format.read_array(file, allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                found = archive[_key(list(archive), key, path)]
        else:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as archive:
                found = archive.get_tensor(_key(list(archive.keys()), key, path))
    if isinstance(found, np.ndarray):
        if found.dtype.kind not in "biufc":
            raise DataError(f"Expected an array of numbers in {path}, found one of {found.dtype}. Save it as float64.")
        # Neither long doubles nor a foreign byte order reach torch.
        kind = np.float64 if found.dtype.kind == "f" and found.dtype.itemsize > 8 else found.dtype.type
        found = found.astype(kind, copy=False)
    tensor = torch.as_tensor(found)
    # Images in an array: one row each.
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into one sentence."""
    try:
        yield
    except ImmunizationError:
        raise
    except (*_DAMAGE, *_PACKED_DAMAGE, SafetensorError) as error:
        if "Object arrays" in str(error):
            message = f"Expected an array of numbers in {path}, found one of Python objects. Save it as float64."
        else:
            message = (
                f"Expected a {path.suffix} file that can be read, found {path}, which is empty, damaged or of another "
                f"kind ({type(error).__name__}). Check it and write it anew."
            )
        raise DataError(message) from error


def _key(keys: list[str], key: str | None, path: Path) -> str:
    if key is None and len(keys) == 1:
        return keys[0]
    if key not in keys:
        raise DataError(f"Expected one of the arrays of {path} by --key: {', '.join(keys)}, found {key!r}.")
    return key


def _table(path: Path, columns: Sequence[str] | None, drop: Sequence[str]) -> Any:
    import pandas

    with _reading(path):
        frame = pandas.read_csv(path, low_memory=False) if path.suffix == ".csv" else pandas.read_parquet(path)
    # Rows longer than the first line make pandas take their first cells for row names.
    if path.suffix == ".csv" and len(frame) and not frame.index.equals(pandas.RangeIndex(len(frame))):
        raise DataError(
            f"Expected as many cells in the rows of {path} as in its first line ({len(frame.columns)}), found "
            f"{len(frame.columns) + frame.index.nlevels}. Name every column in the first line."
        )
    missing = [name for name in (*(columns or ()), *drop) if name not in frame.columns]
    if missing:
        found = ", ".join(map(str, frame.columns[:12]))
        raise DataError(f"Expected column {missing[0]!r} in {path}, found {found} …. Choose out of these.")
    return frame[list(columns)] if columns else frame.drop(columns=list(drop))


def _packed(frame: Any) -> list[Any]:
    """The columns that hold images or whole feature vectors rather than one number per cell."""
    return [name for name in frame.columns if len(frame) and isinstance(frame[name].iloc[0], dict | list | np.ndarray)]


def _cells(frame: Any, path: Path, image_size: int) -> torch.Tensor:
    packed = _packed(frame)
    if len(packed) != 1:
        raise DataError(f"Expected one column of features or images in {path}, found {packed}. Choose by --columns.")
    cells = frame[packed[0]].tolist()
    if isinstance(cells[0], dict):
        return torch.stack([_image(cell.get("bytes"), f"{path}, row {i}", image_size) for i, cell in enumerate(cells)])
    try:
        return torch.as_tensor(np.stack([np.asarray(cell).reshape(-1) for cell in cells]))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"Expected feature vectors of one length in {path}, column {packed[0]!r}, found others. Leave them out."
        ) from error


def _image(source: Any, where: str, size: int) -> torch.Tensor:
    import io

    from PIL import Image

    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source or b"")) as image:
            grey = image.convert("L").resize((size, size))
    except (*_DAMAGE, *_PACKED_DAMAGE, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageDecodeError(f"Expected an image, found none in {where} ({type(error).__name__}).") from error
    return torch.as_tensor(np.asarray(grey, dtype=np.float64).reshape(-1) / 255)


def _encode(
    frames: list[Any], paths: tuple[Path, Path], fill: float | None
) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Both tables as numbers, and the names of the columns that were coded."""
    import pandas

    first, second = frames
    if list(first.columns) != list(second.columns):
        only = first.columns.symmetric_difference(second.columns, sort=False)
        what = f"{only[0]!r} in one only" if len(only) else "another order"
        raise DataError(f"Expected the same columns in {paths[0]} and {paths[1]}, found {what}. Use --drop.")
    size = len(first)

    def place(row: int) -> str:
        return f"{paths[0]}, row {row}" if row < size else f"{paths[1]}, row {row - size}"

    def refuse_typos(parsed: Any, texts: Any, name: Any) -> None:
        """In a column that holds numbers for the most part, in one of the files at least."""
        numeric = parsed.notna()
        if any(part.mean() > 0.5 for part in (numeric[numeric.index < size], numeric[numeric.index >= size])):
            row = int(numeric.index[~numeric][0])
            raise DataError(
                f"Expected numbers in column {name!r}, most of its cells are, found {texts[row]!r} in {place(row)} "
                f"({int((~numeric).sum())} such cells). Mend them, empty them and use --fill, or use --drop."
            )

    both = pandas.concat([first, second], ignore_index=True)
    numbers, coded = {}, []
    for name in both.columns:
        cells = both[name]
        if not pandas.api.types.is_numeric_dtype(cells):
            texts = cells.dropna().astype(str)
            parsed = pandas.to_numeric(texts, errors="coerce")
            if len(texts) and parsed.notna().all():
                cells = parsed.reindex(cells.index)
            else:
                refuse_typos(parsed, texts, name)
                codes = {text: float(i) for i, text in enumerate(sorted(set(texts)))}
                cells = texts.map(codes).reindex(cells.index)
                coded.append(name)
        numbers[name] = cells.astype(float)
    table = pandas.DataFrame(numbers)
    values = (table if fill is None else table.fillna(fill)).to_numpy(copy=True)
    for bad, expected, remedy in (
        (np.isnan(values), "a value in every cell, found none", "Fill them with --fill 0"),
        (~np.isfinite(values), "a finite number in every cell, found an infinite one", "Mend them"),
    ):
        cells = np.argwhere(bad)
        if len(cells):
            row, column = cells[0].tolist()
            raise NonFiniteError(
                f"Expected {expected} in {place(row)}, column {table.columns[column]!r} ({len(cells)} such cells). "
                f"{remedy} or leave columns out with --drop."
            )
    matrix = torch.as_tensor(values)
    return matrix[:size], matrix[size:], coded
