"""Columns to mean 0 and deviation 1, constant ones to 0 rather than to NaN."""

from typing import Any

import torch

from hf_immunize.linear.checks import as_data


def standardize(X: Any, name: str = "X") -> tuple[torch.Tensor, list[int]]:
    """Centre and scale every column by its standard deviation.

    A column whose values differ by rounding only is constant: it becomes exactly 0 and is reported.

    Args:
        X: ``(N, D)`` data.
        name: What the caller calls them.

    Returns:
        ``(N, D)`` float64, and the numbers of the constant columns.

    Raises:
        ShapeError: Not a matrix of at least two rows.
        NonFiniteError: A cell is NaN or infinite.

    Example:
        >>> standardize([[1.0, 5.0], [3.0, 5.0]])
        (tensor([[-0.7071,  0.0000],
                [ 0.7071,  0.0000]], dtype=torch.float64), [1])
    """
    matrix = as_data(X, name)
    # Each column by a power of two near its size, so that no square leaves the range.
    matrix = torch.ldexp(matrix, -torch.frexp(matrix.abs().amax(0)).exponent)
    centred = matrix - matrix.mean(0)
    deviation = centred.square().sum(0).div(len(matrix) - 1).sqrt()
    constant = deviation <= 1e-14 * matrix.abs().amax(0)
    scaled = torch.where(constant, torch.zeros_like(centred), centred / deviation.where(~constant, deviation + 1))
    return scaled, constant.nonzero()[:, 0].tolist()
