"""The spectrum of the probing Hessian ``H = ZᵀZ``, differentiable: one route from features to functions of H.

``ZᵀZ`` (D×D) and ``ZZᵀ`` (N×N) share their non-zero spectrum. The smaller of the two is formed in float64, by chunks
of rows, and its eigenvalues are taken. Their gradient, ``uuᵀ`` for each, divides by no difference of eigenvalues.
Float64 features hold more than their Gram matrix can: of these, singular values are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_immunize.errors import ArgumentError, NonFiniteError, RankError, ShapeError
from hf_immunize.spectra.checks import (
    as_matrix,
    binary_scale,
    check_count,
    check_dtype,
    check_result,
    decomposing,
    grid_cutoff,
    rank_cutoff,
)


# Rows cast to float64 at a time: the whole of Z is never copied.
CHUNK = 512
# Sizes of features of which the eighth power, which R_ill's gradient takes, neither overflows nor vanishes.
_ORDINARY = (1e-30, 1e30)
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
            gradient = torch.empty_like(features)
            for rows, out in zip(features.split(CHUNK), gradient.split(CHUNK), strict=True):
                out.copy_(rows.to(torch.float64) @ twice)
            # In half precision a loss that was scaled up may go beyond; the gradient scaler sees to that.
            return gradient if gradient.itemsize < 4 else check_result(gradient, "the gradient of a regularizer")


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
    """Eigenvalues of the smaller Gram matrix, in the autograd graph, with the rank rule as a mask."""

    values: Tensor  # (n,), descending, float64
    kept: Tensor  # (n,), which values the rank rule keeps
    dim: int  # D, the dimension of the features
    noise: float  # relative spread of equal eigenvalues once the features are rounded to their dtype

    def top(self) -> Tensor:
        """The largest value; its gradient is averaged over its eigenspace."""
        return _one_of(self.values, self.values >= self.values[0] * (1 - self.tie), self.values[0])

    def bottom(self) -> Tensor:
        """The smallest value that is not zero, likewise."""
        smallest = self.values[self.kept][-1]
        return _one_of(self.values, self.kept & (self.values <= smallest + self.tie * self.values[0]), smallest)

    def all_equal(self) -> bool:
        """Whether all non-zero values count as one."""
        spread = self.values[0] - self.values[self.kept][-1]
        return bool(spread <= max(self.tie, self.noise) * self.values[0])

    @property
    def tie(self) -> float:
        """Relative distance below which two eigenvalues computed in float64 count as one repeated value."""
        return 16 * len(self.values) * torch.finfo(torch.float64).eps


def _one_of(values: Tensor, alike: Tensor, value: Tensor) -> Tensor:
    """A value with the mean gradient of all that are alike."""
    mean = values[alike].mean()
    return value.detach() + (mean - mean.detach())


def hessian_function(
    features: Tensor | Hessian, form: Callable[[Spectrum], Tensor], *, scale_free: bool = False
) -> Tensor:
    """A function of the spectrum of H, or of ``H·D/tr(H)``, in float32 at least; differentiable once."""
    if isinstance(features, Hessian):
        matrix, name, dtype, degree = as_matrix(features.matrix, "the Hessian"), "the Hessian", features.dtype, 2
    else:
        matrix = as_matrix(features, "features")
        name, dtype, degree = "features", matrix.dtype, 1
    least, most = (limit**degree for limit in _ORDINARY)
    if not least < binary_scale(matrix) < most:
        raise NonFiniteError(
            f"Expected {name} of numbers between {least:g} and {most:g}, found {binary_scale(matrix):g}. Divide them "
            "by their scale first, or powers of them leave the range of float64."
        )
    with without_autocast(matrix.device), decomposing(name):
        spectrum = _spectrum(features if isinstance(features, Hessian) else matrix, dtype)
        if not bool(spectrum.kept.any()):
            raise RankError(
                f"Expected {name} of rank at least 1, found rank 0: all of {tuple(matrix.shape)} is zero or rounding. "
                "Check that the network is not dead and the right layer is read."
            )
        if scale_free:
            spectrum = spectrum._replace(values=spectrum.values * (spectrum.dim / spectrum.values.sum()))
        value = form(spectrum)
    return check_result(value.to(torch.promote_types(dtype, torch.float32)), "the value of a regularizer")


def _spectrum(given: Tensor | Hessian, dtype: torch.dtype) -> Spectrum:
    if isinstance(given, Hessian):
        rows, dim = given.rows, len(given.matrix)
        # Of a Hessian of few rows the eigenvalues beyond them are rounding.
        within = torch.arange(dim, device=given.matrix.device) < rows
        values, lost = _eigenvalues(given.matrix) * within, _GRAM_NOISE
    else:
        rows, dim = given.shape
        if dtype == torch.float64:
            values, lost = torch.linalg.svdvals(given).square(), 0.0
        else:
            values, lost = _eigenvalues(Gram.apply(given.mT if rows <= dim else given)), _GRAM_NOISE
    singular = values.detach().sqrt()
    # `rank_cutoff` is the larger of a multiple of either argument.
    of_frobenius = rank_cutoff(0.0, 1.0, rows, dim, dtype) * torch.linalg.vector_norm(singular)
    of_largest = max(rank_cutoff(1.0, 0.0, rows, dim, dtype), lost) * singular[0]
    kept = singular > torch.maximum(of_frobenius, of_largest).clamp(min=grid_cutoff(rows, dim, dtype))
    return Spectrum(values, kept, dim, 8 * torch.finfo(dtype).eps)


def _eigenvalues(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
