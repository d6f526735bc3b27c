"""Two matrices from two files: arrays, tables or images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_immunize.errors import DataError, ImageDecodeError, NonFiniteError


ARRAYS = (".npy", ".npz", ".safetensors")
TABLES = (".csv", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read_pair(
    benign: Path,
    harmful: Path,
    *,
    key: str | None = None,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    fill: float | None = None,
    image_size: int = 28,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read two data sets with the same columns.

    Text columns of tables are coded by the order of their values, taken from both files together, so that one value
    has one code.

    Args:
        benign: A file or a folder of images.
        harmful: Another.
        key: Array of an .npz or .safetensors file; without it there must be a single one.
        columns: Columns of a table to take, all by default.
        drop: Columns of a table to leave out.
        fill: Value for missing cells.
        image_size: Side in pixels of images, which are made grey.

    Returns:
        ``(N_P, D)`` and ``(N_H, D)``.

    Raises:
        DataError: A file is missing, of an unknown kind, or lacks the key or a column.
        ImageDecodeError: A file is no image.
        NonFiniteError: A table misses a cell and no fill value is given.
    """
    for path in (benign, harmful):
        if not path.exists():
            raise DataError(f"There is no file or folder {path}; give two paths, benign first.")
    tables = [_table(path, columns, drop) if path.suffix in TABLES else None for path in (benign, harmful)]
    if tables[0] is not None and tables[1] is not None and not any(_packed(table) for table in tables):
        first, second = _encode(tables, (benign, harmful), fill)
        return first, second
    parts = [
        _cells(table, path, image_size) if table is not None else _array(path, key, image_size)
        for table, path in zip(tables, (benign, harmful), strict=True)
    ]
    return parts[0], parts[1]


def _array(path: Path, key: str | None, image_size: int) -> torch.Tensor:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
        if not files:
            raise DataError(f"There are no images under {path} (looked for {', '.join(IMAGES)}).")
        return torch.stack([_image(file, f"{file}", image_size) for file in files])
    if path.suffix == ".npy":
        found: Any = np.load(path, allow_pickle=False)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            found = archive[_key(list(archive), key, path)]
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as archive:
            found = archive.get_tensor(_key(list(archive.keys()), key, path))
    else:
        known = ", ".join((*ARRAYS, *TABLES))
        raise DataError(f"Expected {known} or a folder of images, found {path}.")
    tensor = torch.as_tensor(found)
    # Images in an array: one row each.
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _key(keys: list[str], key: str | None, path: Path) -> str:
    if key is None and len(keys) == 1:
        return keys[0]
    if key not in keys:
        raise DataError(f"Choose one of the arrays of {path} with --key: {', '.join(keys)}; found {key!r}.")
    return key


def _table(path: Path, columns: Sequence[str] | None, drop: Sequence[str]) -> Any:
    import pandas

    frame = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
    missing = [name for name in (*(columns or ()), *drop) if name not in frame.columns]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns[:12]))} …")
    return frame[list(columns)] if columns else frame.drop(columns=list(drop))


def _packed(frame: Any) -> bool:
    """Whether a column holds images or whole feature vectors rather than one number a cell."""
    return any(isinstance(frame[name].iloc[0], dict | list | np.ndarray) for name in frame.columns if len(frame))


def _cells(frame: Any, path: Path, image_size: int) -> torch.Tensor:
    packed = [
        name for name in frame.columns if len(frame) and isinstance(frame[name].iloc[0], dict | list | np.ndarray)
    ]
    if len(packed) != 1:
        raise DataError(f"Choose one column of features or images of {path} with --columns; found {packed}.")
    cells = frame[packed[0]].tolist()
    if isinstance(cells[0], dict):
        return torch.stack(
            [_image(cell.get("bytes"), f"{path}, row {row}", image_size) for row, cell in enumerate(cells)]
        )
    try:
        return torch.as_tensor(np.stack([np.asarray(cell).reshape(-1) for cell in cells]))
    except ValueError as error:
        raise DataError(f"The feature vectors of {path}, column {packed[0]!r}, differ in length.") from error


def _image(source: Any, where: str, size: int) -> torch.Tensor:
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            grey = image.convert("L").resize((size, size))
    except Exception as error:
        raise ImageDecodeError(f"{where} is not an image that can be read ({type(error).__name__}).") from error
    return torch.as_tensor(np.asarray(grey, dtype=np.float64).reshape(-1) / 255)


def _encode(frames: list[Any], paths: tuple[Path, Path], fill: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    import pandas

    first, second = frames
    if list(first.columns) != list(second.columns):
        only = [name for name in first.columns if name not in second.columns] or [
            name for name in second.columns if name not in first.columns
        ]
        what = f"{only[0]!r} is in one only" if only else "their order differs"
        raise DataError(f"{paths[0]} and {paths[1]} must have the same columns: {what}; use --columns or --drop.")
    both = pandas.concat([first, second], ignore_index=True)
    coded = {}
    for name in both.columns:
        cells = both[name]
        if not pandas.api.types.is_numeric_dtype(cells):
            codes = {text: float(i) for i, text in enumerate(sorted(set(cells.dropna().astype(str))))}
            cells = cells.map(lambda cell, codes=codes: codes.get(str(cell), float("nan")))
        coded[name] = cells.astype(float)
    table = pandas.DataFrame(coded)
    if fill is not None:
        table = table.fillna(fill)
    gaps = np.argwhere(table.isna().to_numpy())
    if len(gaps):
        row, column = gaps[0].tolist()
        path, row = (paths[0], row) if row < len(first) else (paths[1], row - len(first))
        raise NonFiniteError(
            f"Expected a value in every cell, found none in {path}, row {row}, column {table.columns[column]!r} "
            f"({len(gaps)} such cells in both files); fill them with --fill 0 or leave columns out with --drop."
        )
    matrix = torch.as_tensor(table.to_numpy(copy=True))
    return matrix[: len(first)], matrix[len(first) :]
