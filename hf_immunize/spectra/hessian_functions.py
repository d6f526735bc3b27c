"""Functions of the probing Hessian ``H = ZᵀZ``: one route from features to a value with its gradient in closed form.

``ZᵀZ`` (D×D) and ``ZZᵀ`` (N×N) share their non-zero spectrum. The smaller of the two, the *small side*, is formed in
float64 and decomposed. A function of H then gives its value and a symmetric matrix M of that size, with
``∂f/∂Z = M·Z`` (N ≤ D) or ``Z·M``. No backward pass runs through a decomposition, and no value is read on a GPU: there
a value that is not finite stays NaN, with a zero gradient; on a CPU it becomes a named error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_immunize.errors import ArgumentError, NonFiniteError, PerfectConditioningError, RankError, ShapeError
from hf_immunize.spectra.checks import (
    as_matrix,
    binary_scale,
    check_count,
    check_dtype,
    check_result,
    grid_cutoff,
    rank_cutoff,
    times_power,
)


# Rows cast to float64 at a time: the whole of Z is never copied.
CHUNK = 512
# Sizes of features of which the eighth power, which R_ill's gradient takes, neither overflows nor vanishes.
_ORDINARY = (1e-20, 1e20)
# What a Gram matrix in float64 loses, in singular values.
_GRAM_NOISE = torch.finfo(torch.float64).eps ** 0.5


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, on devices that know it."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def gram_matrix(tall: Tensor) -> Tensor:
    """``AᵀA`` of A, shape ``(m, n)``: shape ``(n, n)``, float64, symmetric, without a gradient."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in tall.detach().split(CHUNK):
        rows = rows.to(torch.float64)
        gram.addmm_(rows.mT, rows)
    return (gram + gram.mT) / 2


def times_rows(z: Tensor, small: Tensor, *, transposed: bool) -> Tensor:
    """``Z·M``, or ``M·Z`` if transposed: computed in float64, given in float32 at least."""
    product = torch.empty(z.shape, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    source, target = (z.mT, product.mT) if transposed else (z, product)
    for rows, out in zip(source.split(CHUNK), target.split(CHUNK), strict=True):
        out.copy_(rows.to(torch.float64) @ small)
    return product


class Gram(torch.autograd.Function):
    """``ZᵀZ`` in float64, differentiable: ``∂f/∂Z = Z(S + Sᵀ)`` with S the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        """With autocast off."""
        ctx.save_for_backward(features)
        with without_autocast(features.device):
            return gram_matrix(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """In float64, by chunks of rows."""
        (features,) = ctx.saved_tensors
        with without_autocast(features.device):
            twice = grad_outputs[0] + grad_outputs[0].mT
            return times_rows(features, twice, transposed=False).to(features.dtype)


@dataclass(frozen=True)
class Hessian:
    """``H = ZᵀZ`` in the place of Z: where processes hold a share of the rows each, the sum of their ``ZᵀZ``.

    It resolves singular values of Z down to ``√eps·σ_1`` (1.5e-8), enough for float32 features; give float64 ones as
    they are. The gradient flows to `matrix`: with ``∂f/∂Z = Z·M`` it is the symmetric ``∂f/∂H = M/2``, in float64.
    """

    matrix: Tensor  # H, (D, D), float64, symmetric, summed over all rows of all processes
    rows: int  # N, of all processes: the rank of H is at most N
    dtype: torch.dtype  # of the features, which says where their rounding noise lies

    def __post_init__(self) -> None:
        as_matrix(self.matrix, "a Hessian", check_finite=False)
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ShapeError(f"Expected a Hessian of shape (D, D), found {tuple(self.matrix.shape)}. Pass ZᵀZ.")
        if self.matrix.dtype != torch.float64:
            raise ArgumentError(f"Expected a Hessian in float64, found {self.matrix.dtype}. Form it in float64.")
        check_count(self.rows, "rows", most=2**62, error=ShapeError)
        if check_dtype(self.dtype, "dtype") is None:
            raise ArgumentError("Expected the dtype of the features of a Hessian, found None.")

    @classmethod
    def of(cls, features: Tensor) -> Hessian:
        """The Hessian of one process's features, shape ``(N, D)``; differentiable."""
        features = as_matrix(features, "features", check_finite=False)
        return cls(Gram.apply(features), features.shape[0], features.dtype)


class Spectrum(NamedTuple):
    """All eigenpairs of the small side, descending, with the rank rule as a mask."""

    values: Tensor  # (n,), eigenvalues, float64
    vectors: Tensor  # (n, n), columns
    kept: Tensor  # (n,), which values the rank rule keeps
    smallest: Tensor  # the smallest of these, 0-D
    gram: Tensor  # (n, n), the decomposed matrix
    dim: int  # D, the dimension of the features
    noise: float  # relative spread of equal eigenvalues once the features are rounded to their dtype

    def top(self) -> Tensor:
        """Average of uuᵀ over the eigenspace of the largest value."""
        return self._average(self.values >= self.values[0] * (1 - self.tie))

    def bottom(self) -> Tensor:
        """Average of uuᵀ over the eigenspace of the smallest value that is not zero."""
        return self._average(self.kept & (self.values <= self.smallest + self.tie * self.values[0]))

    def all_equal(self) -> Tensor:
        """Whether all non-zero values count as one, 0-D boolean."""
        return self.values[0] - self.smallest <= max(self.tie, self.noise) * self.values[0]

    @property
    def tie(self) -> float:
        """Relative distance below which two eigenvalues computed in float64 count as one repeated value."""
        return 16 * len(self.values) * torch.finfo(torch.float64).eps

    def _average(self, mask: Tensor) -> Tensor:
        weights = mask.to(self.vectors.dtype)  # of booleans the quotient would be in float32
        return (self.vectors * (weights / weights.sum())) @ self.vectors.mT


# The value of a function of H and the symmetric M on the small side for which ∂f/∂Z is M·Z or Z·M.
Form = Callable[[Spectrum], tuple[Tensor, Tensor]]


def _of_unit_mean(form: Form, degree: int) -> Form:
    """The function of ``cH``, ``c = D/tr H``, of a function that is homogeneous in H of the given degree."""

    def scaled(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        trace = spectrum.values.sum()
        value, small = form(spectrum)
        factor = (spectrum.dim / trace) ** degree
        value, small = factor * value, factor * small
        small.diagonal().sub_(2 * degree * torch.nan_to_num(value) / trace)
        return value, small

    return scaled


def hessian_function(
    features: Tensor | Hessian, form: Form, degree: int, *, scale_free: bool = False, raises: bool | None = None
) -> Tensor:
    """A function of ``H = ZᵀZ``, homogeneous of a degree in H, of features or their Hessian; differentiable once."""
    if scale_free:
        form, degree = _of_unit_mean(form, degree), 0
    # Shape and dtype only: that the features are finite and not zero is seen in the Gram matrix.
    matrix = features.matrix if isinstance(features, Hessian) else as_matrix(features, "features", check_finite=False)
    if raises is None:
        raises = matrix.device.type == "cpu"
    dtype = features.dtype if isinstance(features, Hessian) else matrix.dtype
    kind = torch.promote_types(matrix.dtype, torch.float32)

    def function(detached: Tensor) -> tuple[Tensor, Tensor]:
        given = replace(features, matrix=detached) if isinstance(features, Hessian) else detached
        # Read where errors are read, on the host alone.
        given, scale = _rescaled(given) if raises else (given, 1.0)
        spectrum, sound = _spectrum(given, dtype, scale)
        value, small = form(spectrum)
        sound = sound & torch.isfinite(value)
        if raises and not sound:
            raise _reason(given, spectrum)
        value, small = torch.where(sound, value, torch.nan), torch.where(sound, small, 0.0)
        value = times_power(value, scale, 2 * degree)
        if isinstance(given, Hessian):
            gradient = times_power(small / 2, scale, 2 * degree - 2)
        else:
            gradient = times_power(times_rows(given, small, transposed=_wide(given)), scale, 2 * degree - 1).to(kind)
        if raises:
            check_result(value.to(torch.promote_types(dtype, torch.float32)), "the value of a regularizer")
            if matrix.requires_grad:
                check_result(gradient, "the gradient of a regularizer")
        return value, gradient

    return ClosedForm.apply(matrix, function, dtype)


class ClosedForm(torch.autograd.Function):
    """A scalar function of a matrix whose gradient is computed beside its value."""

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> Tensor:
        """The value, in float32 or better; the gradient is kept."""
        with without_autocast(matrix.device):
            value, gradient = function(matrix.detach())
        ctx.save_for_backward(gradient)
        ctx.matrix_dtype = matrix.dtype
        return value.to(torch.promote_types(dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """The gradient that was kept, times what comes from above."""
        (gradient,) = ctx.saved_tensors
        # Scaled before it is cast: a weight of 1e8 on a gradient of 1e-9 would vanish in half precision otherwise.
        scaled = torch.empty_like(gradient, dtype=ctx.matrix_dtype)
        for rows, out in zip(gradient.split(CHUNK), scaled.split(CHUNK), strict=True):
            out.copy_(grad_outputs[0] * rows)
        return scaled, None, None


def _wide(features: Tensor) -> bool:
    """Whether ``ZZᵀ`` (N×N) is the small side."""
    return features.shape[0] <= features.shape[1]


def _rescaled(given: Tensor | Hessian) -> tuple[Tensor | Hessian, float]:
    """Features, or their Hessian, over a power of two of the features where powers of it would leave float64."""
    if isinstance(given, Hessian):
        scale = math.ldexp(1.0, math.frexp(binary_scale(given.matrix))[1] // 2)
    else:
        scale = binary_scale(given)
    if _ORDINARY[0] < scale < _ORDINARY[1]:
        return given, 1.0
    if isinstance(given, Hessian):
        return replace(given, matrix=given.matrix / scale / scale), scale
    return given.to(torch.float64) / scale, scale


def _spectrum(given: Tensor | Hessian, dtype: torch.dtype, scale: float) -> tuple[Spectrum, Tensor]:
    """The spectrum of the small side, and whether it is finite and not zero; of the identity where it is not."""
    if isinstance(given, Hessian):
        features, gram = None, given.matrix
        rows, dim = given.rows, gram.shape[0]
    else:
        features, gram = given, gram_matrix(given.mT if _wide(given) else given)
        rows, dim = given.shape
    sound = torch.isfinite(gram).all() & (gram.diagonal().sum() > 0)
    gram = torch.where(sound, gram, torch.eye(len(gram), dtype=torch.float64, device=gram.device))
    if features is not None and features.dtype == torch.float64:
        # The singular values of Z itself are more exact than those of its Gram matrix.
        identity = torch.eye(*features.shape, dtype=features.dtype, device=features.device)
        u, singular, vh = torch.linalg.svd(torch.where(sound, features, identity), full_matrices=False)
        vectors, computed_noise = u if _wide(features) else vh.mT, 0.0
    else:
        values, vectors = torch.linalg.eigh(gram)
        singular, vectors, computed_noise = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1), _GRAM_NOISE
        # Of a Hessian of few rows the eigenvalues beyond them are rounding.
        singular = singular * (torch.arange(len(gram), device=gram.device) < rows)
    # `rank_cutoff` is the larger of a multiple of either argument.
    of_frobenius = rank_cutoff(0.0, 1.0, rows, dim, dtype)
    of_largest = max(rank_cutoff(1.0, 0.0, rows, dim, dtype), computed_noise)
    cutoff = torch.maximum(of_frobenius * torch.linalg.vector_norm(singular), of_largest * singular[0])
    cutoff = cutoff.clamp(min=grid_cutoff(rows, dim, dtype) / scale)
    values, kept = singular.square(), singular > cutoff
    smallest = torch.where(kept, values, torch.inf).min()
    return Spectrum(values, vectors, kept, smallest, gram, dim, 8 * torch.finfo(dtype).eps), sound


def _reason(given: Tensor | Hessian, spectrum: Spectrum) -> NonFiniteError | RankError | PerfectConditioningError:
    """Why a function of H has no finite value."""
    name, values = ("the Hessian", given.matrix) if isinstance(given, Hessian) else ("features", given)
    as_matrix(values, name)  # names the entry that is not finite
    if not values.any() or not spectrum.kept.any():
        return RankError(
            f"Expected {name} of rank at least 1, found rank 0: all of {tuple(values.shape)} are zero or rounding. "
            "Check that the network is not dead and the right layer is read."
        )
    return PerfectConditioningError(
        "Expected κ > 1 in R_ill, found all non-zero singular values equal, where R_ill is undefined. Use at least "
        "two different samples in a harmful batch."
    )
