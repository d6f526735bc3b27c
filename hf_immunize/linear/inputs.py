"""Two matrices from memory or from two files: arrays or tables of numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_immunize.errors import ArgumentError, DataError, ImmunizationError, ShapeError
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


ENDINGS = (".npy", ".csv", ".parquet")
# What numpy, pandas and pyarrow raise on damaged files, between them.
_DAMAGE = (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error)


def read_pair(benign: Path, harmful: Path, drop: Sequence[str] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Read two data sets with the same columns."""
    read, names = [], []
    for path in (benign, harmful):
        if not path.is_file() or path.suffix not in ENDINGS:
            raise DataError(f"Expected a file that ends in {', '.join(ENDINGS)}, found {path}. Convert it.")
        try:
            values, found = (_array(path), None) if path.suffix == ".npy" else _table(path, drop)
        except ImmunizationError:
            raise
        except _DAMAGE as error:
            raise DataError(
                f"Expected numbers in {path}, found a {path.suffix} file that is empty, damaged or of another kind "
                f"({type(error).__name__}). Check it and write it anew."
            ) from error
        # Other shapes and kinds of number have an error of their own later on.
        if values.ndim == 2 and values.is_floating_point():
            as_matrix(values.to(torch.float64), f"{path}")
        read.append(values)
        names.append(found)
    if None not in names and names[0] != names[1]:
        raise DataError(
            f"Expected the same columns in {benign} and {harmful}, found others. Leave some out by --drop."
        )
    return read[0], read[1]


def _array(path: Path) -> torch.Tensor:
    # Whatever the name says, `numpy.load` also opens archives.
    with path.open("rb") as file:
        found = np.lib.format.read_array(file, allow_pickle=False)
    # Neither long doubles nor a foreign byte order reach torch.
    kind = np.float64 if found.dtype.kind == "f" and found.dtype.itemsize > 8 else found.dtype.type
    tensor = torch.as_tensor(found.astype(kind, copy=False))
    # Images in an array: one row each.
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _table(path: Path, drop: Sequence[str]) -> tuple[torch.Tensor, list[Any]]:
    """Columns of numbers, or one column of feature lists, with their names."""
    import pandas

    frame = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
    # Rows longer than the first line make pandas take their first cells for row names.
    if path.suffix == ".csv" and not frame.index.equals(pandas.RangeIndex(len(frame))):
        raise DataError(f"Expected as many cells in the rows of {path} as in its first line, found more. Name all.")
    missing = [name for name in drop if name not in frame.columns]
    if missing:
        found = ", ".join(map(str, frame.columns[:12]))
        raise DataError(f"Expected column {missing[0]!r} in {path}, found {found} …. Choose out of these.")
    frame = frame.drop(columns=list(drop))
    if len(frame.columns) == 1 and len(frame) and isinstance(frame.iloc[0, 0], list | np.ndarray):
        return torch.as_tensor(np.stack(frame.iloc[:, 0].tolist())), list(frame.columns)
    for name in frame.columns:
        if not pandas.api.types.is_numeric_dtype(frame[name]) or frame[name].isna().any():
            raise DataError(
                f"Expected a number in every cell of {path}, found others in column {name!r}. Code and fill it, or "
                "leave it out by --drop."
            )
    return torch.as_tensor(frame.to_numpy(dtype=np.float64, copy=True)), list(frame.columns)
