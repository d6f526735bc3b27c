"""What every function of this room asks of its input: real, finite, two-dimensional, in float64."""

from typing import Any

import torch

from hf_immunize.errors import NonFiniteError, ShapeError


def as_matrix(values: Any, name: str = "Z") -> torch.Tensor:
    """Return data as a float64 matrix, or say in one sentence why it cannot be one.

    Args:
        values: ``(N, D)`` tensor, array or nested list, one row a sample.
        name: What the caller calls it, for the message.

    Returns:
        ``(N, D)`` float64 tensor, detached, on the device it came from (the CPU where that device has no float64).

    Raises:
        ShapeError: Not two-dimensional, fewer than two rows, or no column.
        NonFiniteError: A cell holds NaN or infinity; the message names its row and column.

    Example:
        >>> as_matrix([[1, 2], [3, float("nan")]], "X_benign")
        Traceback (most recent call last):
        hf_immunize.errors.NonFiniteError: X_benign has a non-finite value in row 1, column 1 (counted from 0), ...
    """
    matrix = torch.as_tensor(values).detach()
    if matrix.ndim != 2:
        raise ShapeError(
            f"{name} must be a matrix of shape (samples, features), found shape {tuple(matrix.shape)}; "
            "flatten images to one row each first."
        )
    if matrix.shape[0] < 2 or matrix.shape[1] < 1:
        raise ShapeError(
            f"{name} needs at least two rows and one column, found shape {tuple(matrix.shape)}; add samples."
        )
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64)
    bad = (~torch.isfinite(matrix)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise NonFiniteError(
            f"{name} has a non-finite value in row {row}, column {column} (counted from 0), "
            f"{len(bad)} such cells in all; drop these rows or fill the cells before."
        )
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
    """
    targets = torch.as_tensor(values).detach()
    if targets.ndim not in (1, 2) or targets.shape[0] != rows or targets.numel() == 0:
        raise ShapeError(
            f"{name} must hold one target for each of the {rows} rows, as ({rows},) or ({rows}, C), "
            f"found shape {tuple(targets.shape)}."
        )
    return as_matrix(targets.reshape(rows, -1), name)


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


def produced_eps(values: Any, produced_dtype: torch.dtype | None = None) -> float:
    """Machine epsilon of the dtype in which the data were computed, which decides what is rounding noise in them.

    Integer and boolean data are exact and count as float64; so do arrays and lists without a dtype torch knows.

    Args:
        values: The data as the caller gave them, before any cast.
        produced_dtype: Overrides the dtype they carry, for float32 features that were saved as float64.
    """
    dtype = produced_dtype or torch.as_tensor(values).dtype
    return torch.finfo(dtype).eps if dtype.is_floating_point else torch.finfo(torch.float64).eps


def rank_cutoff(shape: tuple[int, int], frobenius: float, sigma_max: float, eps: float) -> float:
    """Singular values at or below this are rounding noise.

    The first term is ten times the norm of random rounding noise in ``shape`` entries of relative size ``eps``, the
    second ten units of the arithmetic (float64) in which the spectrum was taken.

    Args:
        shape: ``(N, D)`` of the data.
        frobenius: Their Frobenius norm.
        sigma_max: Their largest singular value.
        eps: Machine epsilon of the dtype that produced them (:func:`produced_eps`).
    """
    n, d = shape
    noise = eps * (n**0.5 + d**0.5) * frobenius / (n * d) ** 0.5
    return 10 * max(noise, torch.finfo(torch.float64).eps * sigma_max)
