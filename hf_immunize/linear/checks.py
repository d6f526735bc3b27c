"""What every function of this room asks of its input: real, finite, two-dimensional, in float64."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_immunize.errors import ArgumentError, ShapeError
from hf_immunize.spectra.checks import as_matrix, as_values, check_dtype, check_result
from hf_immunize.spectra.conditioning import grid_cutoff, rank_cutoff


def as_data(values: Any, name: str = "Z") -> torch.Tensor:
    """Return data as a float64 matrix, or say in one sentence why it cannot be one.

    Args:
        values: ``(N, D)`` tensor, array or nested list, one row a sample, real or whole numbers.
        name: What the caller calls it, for the message.

    Returns:
        ``(N, D)`` float64 tensor, detached, on the device it came from (the CPU where that device has no float64).

    Raises:
        ShapeError: Not two-dimensional, fewer than two rows, or no column.
        NonFiniteError: A cell holds NaN or infinity; the message names its row and column.
        ArgumentError: They are no numbers, or complex.

    Example:
        >>> as_data([[1.0, 2.0], [3.0, float("nan")]], "X_benign")
        Traceback (most recent call last):
        hf_immunize.errors.NonFiniteError: Expected finite values in X_benign, found nan in row 1, column 1 ...
    """
    matrix = as_values(values, name).detach()
    if matrix.is_complex():
        raise ArgumentError(
            f"Expected real numbers in {name}, found {matrix.dtype}; pass its real part, its modulus, or real and "
            "imaginary part as columns of their own."
        )
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64)
    matrix = as_matrix(matrix, name)
    if matrix.shape[0] < 2:
        raise ShapeError(f"Expected at least two rows in {name}, found {matrix.shape[0]}; one sample has no spectrum.")
    return matrix


def as_targets(values: Any, rows: int, name: str = "y") -> torch.Tensor:
    """Return regression targets as a float64 ``(rows, C)`` matrix.

    Args:
        values: ``(N,)`` or ``(N, C)`` targets.
        rows: The number of samples they belong to.
        name: What the caller calls them, for the message.

    Raises:
        ShapeError: One-dimensional or two-dimensional targets were expected, or their number is not ``rows``.
        NonFiniteError: A target is NaN or infinite.
        ArgumentError: The targets are no numbers, or complex.
    """
    targets = as_values(values, name).detach()
    if targets.ndim not in (1, 2) or targets.shape[0] != rows or targets.numel() == 0:
        raise ShapeError(
            f"{name} must hold one target for each of the {rows} rows, as ({rows},) or ({rows}, C), "
            f"found shape {tuple(targets.shape)}."
        )
    return as_data(targets.reshape(rows, -1), name)


def same_columns(first: torch.Tensor, second: torch.Tensor, names: tuple[str, str]) -> None:
    """Refuse two matrices that are not over the same features.

    Raises:
        ShapeError: The numbers of columns differ.
    """
    if first.shape[1] != second.shape[1]:
        raise ShapeError(
            f"{names[0]} and {names[1]} must have the same columns, one map θ serves both; "
            f"found {first.shape[1]} and {second.shape[1]}: encode both tasks with the same features."
        )


def dtype_of_origin(values: Any, produced_dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which the data were computed, which decides what is rounding noise in them.

    Whole numbers are exact and count as float64.

    Args:
        values: The data as the caller gave them, before any cast.
        produced_dtype: Overrides the dtype they carry, for float32 features that were saved as float64.
    """
    dtype = check_dtype(produced_dtype) or as_values(values, "the data").dtype
    return dtype if dtype.is_floating_point else torch.float64


def keep_above_noise(sigma: torch.Tensor, shape: Sequence[int], produced_dtype: torch.dtype) -> torch.Tensor:
    """Which singular values of data of this shape the rank rule keeps.

    Args:
        sigma: ``(min(N, D),)`` singular values, falling.
        shape: ``(N, D)``.
        produced_dtype: :func:`dtype_of_origin` of the data.

    Returns:
        ``(min(N, D),)`` boolean.
    """
    norm = check_result(math.hypot(*sigma.tolist()), "the norm of the data")
    cutoff = rank_cutoff(float(sigma[0]), norm, shape[0], shape[1], produced_dtype)
    return sigma > max(cutoff, grid_cutoff(shape[0], shape[1], produced_dtype))
