"""What every function asks of its input, the scale taken out before anything is squared, and the rule of the rank."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError, ImmunizationError, NonFiniteError, ShapeError


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# More classes than any data set has; a label beyond is a mistake, and rows that are one-hot in it fill the memory.
_MOST_CLASSES = 2**20


def as_values(value: Any, name: str) -> Tensor:
    """A dense tensor."""
    if isinstance(value, Tensor):
        tensor = value
    else:
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError, KeyError) as error:
            raise ArgumentError(
                f"Expected numbers in {name}, found {type(value).__name__} ({' '.join(str(error).split())[:200]}). "
                "Pass a tensor, an array, or nested lists of one length."
            ) from error
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ArgumentError(
            f"Expected numbers that can be read in {name}, found a tensor of {tensor.dtype} and {tensor.layout} on "
            f"{tensor.device}. Pass a dense one."
        )
    return tensor


def as_matrix(value: Any, name: str = "matrix") -> Tensor:
    """Check that `value` is a finite, non-empty, real floating-point matrix, and return it as a tensor."""
    matrix = as_values(value, name)
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ShapeError(
            f"Expected {name} of shape (N, D), not empty, found {tuple(matrix.shape)}. Flatten each sample to a row."
        )
    if matrix.dtype not in FLOATS:
        raise ArgumentError(f"Expected {name} as real floats of 16 bits or more, found {matrix.dtype}. Call .float().")
    # The sum is finite unless an entry is not (or it overflows): one cheap pass in the common case.
    finite = torch.ones(()) if bool(torch.isfinite(matrix.detach().sum())) else torch.isfinite(matrix)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise NonFiniteError(
            f"Expected finite values in {name}, found {matrix[row, column].item()} in row {row}, column {column} "
            f"({int((~finite).sum())} of {matrix.numel()} entries). Check the data and the weights that produced "
            "them; a smaller learning rate or full precision often mends it."
        )
    return matrix


def as_labels(value: Any, rows: int, name: str) -> Tensor:
    """Class numbers from 0, one a row, as int64."""
    numbers = as_values(value, name).detach()
    if numbers.is_complex() or numbers.ndim != 1 or len(numbers) != rows or rows == 0:
        raise ShapeError(
            f"Expected {rows} class numbers in {name}, found shape {tuple(numbers.shape)} of {numbers.dtype}."
        )
    if numbers.is_floating_point():
        numbers = numbers.to(torch.float64)
    elif numbers.dtype == torch.bool:
        numbers = numbers.long()
    lowest, highest = numbers.min().item(), numbers.max().item()
    if lowest < 0 or not highest < _MOST_CLASSES or bool((numbers != numbers.long()).any()):
        raise ShapeError(
            f"Expected class numbers, whole and from 0 up, in {name}, found {lowest} to {highest} of {numbers.dtype}. "
            "Renumber the classes 0, 1, 2, …"
        )
    return numbers.long()


def check_count(
    value: Any, name: str, least: int = 1, most: int = 10**7, error: type[ImmunizationError] = ArgumentError
) -> int:
    """A whole number within bounds that count as inside; what is counted beyond them would not end."""
    try:
        number = None if isinstance(value, bool) else value.__index__()
    except (AttributeError, TypeError, ValueError, RuntimeError):  # of what is no whole number, and tensors of many
        number = None
    if number is None or not least <= number <= most:
        raise error(f"Expected {name} as a whole number of at least {least} and at most {most}, found {value!r}.")
    return number


def check_number(value: Any, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number within bounds that count as inside."""
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not (least <= number <= most and abs(number) < math.inf):
        raise ArgumentError(
            f"Expected {name} as a finite number of at least {least} and at most {most}, found {value!r}."
        )
    return number


def check_result(value: Any, name: str) -> Any:
    """What was computed, a number or a tensor, where its dtype holds it."""
    if isinstance(value, Tensor):
        # As in `as_matrix`: one pass without a copy in the common case.
        finite = bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())
    else:
        finite = math.isfinite(value)
    if not finite:
        kind = value.dtype if isinstance(value, Tensor) else "float64"
        raise NonFiniteError(
            f"Expected {name} within the range of {kind}, found it beyond. Divide the data by their scale first, or "
            "pass float64."
        )
    return value


def check_dtype(value: Any, name: str = "produced_dtype") -> torch.dtype | None:
    """A real floating-point dtype of torch, or None."""
    if value is not None and value not in FLOATS:
        raise ArgumentError(f"Expected {name} out of {', '.join(map(str, FLOATS))}, or None, found {value!r}.")
    return value


@contextmanager
def decomposing(name: str) -> Iterator[None]:
    """Within, a decomposition that fails, as of numbers near the end of float64's range, is a named error."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise NonFiniteError(
            f"Expected {name} that can be decomposed in float64, found numbers out of its range on the way "
            f"({str(error)[:120]}). Divide them by their scale first."
        ) from error


def binary_scale(matrix: Tensor) -> float:
    """The power of two above the largest absolute value, which rounds nothing; 1 of zeros, NaN, infinity."""
    lowest, highest = torch.aminmax(matrix.detach())
    largest = max(-float(lowest), float(highest))
    # Kept among normal numbers, whose inverse is finite.
    return math.ldexp(1.0, min(max(math.frexp(largest)[1], -1021), 1021)) if 0 < largest < math.inf else 1.0


# How far above the norm of rounding noise a singular value must lie to count. The second singular value of the noise
# in float32 features of a convolutional network was seen at 8 units, so 10 keeps noise out and little signal with it.
_NOISE_MARGIN = 10.0


def rank_cutoff(
    sigma_max: float,
    frobenius: float,
    num_samples: int,
    dim: int,
    produced_dtype: torch.dtype,
    computed_dtype: torch.dtype = torch.float64,
    folds: int = 1,
) -> float:
    """Threshold below which a singular value of ``Z`` is rounding noise.

    ``10 · max( eps_f·(√N + √D)·‖Z‖_F/√(ND), eps_c·σ_max )``: the first is the expected norm of rounding errors of the
    dtype in which the features were *produced* (a later cast does not remove them), the second that of the
    decomposition. Folds of a streamed factor add up like a random walk (seen at ``0.15·√folds·eps_c·σ_max``), and one
    decomposition of uncentred 5,000 × 784 data was seen at 12 units: hence `growth`.
    """
    n, d = float(num_samples), float(dim)
    noise = torch.finfo(produced_dtype).eps * (math.sqrt(n) + math.sqrt(d)) * frobenius / math.sqrt(n * d)
    growth = max(1.0, math.sqrt(folds) / 4, math.sqrt(max(n, d)) / _NOISE_MARGIN)
    computed = torch.finfo(computed_dtype).eps * growth
    return _NOISE_MARGIN * max(noise, computed * sigma_max)


def grid_cutoff(num_samples: int, dim: int, produced_dtype: torch.dtype) -> float:
    """`rank_cutoff` of values below the normal ones of their dtype, all of which are rounded to one grid."""
    info = torch.finfo(produced_dtype)
    return _NOISE_MARGIN * info.smallest_normal * info.eps * (math.sqrt(num_samples) + math.sqrt(dim))
