"""Scalar functions of a matrix whose gradients are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_immunize.spectra.conditioning import as_matrix
from hf_immunize.spectra.gram import CHUNK, without_autocast
from hf_immunize.spectra.hessian import Hessian
from hf_immunize.spectra.mixed import estimable
from hf_immunize.spectra.small_side import SmallSide, single_side, small_side


# value and gradient of a spectral function at a detached matrix
ValueAndGradient = Callable[[Tensor], tuple[float | Tensor, Tensor]]


class SmallGradient(Protocol):
    """A symmetric matrix M of the small side's size, with ``∂f/∂Z = M·Z`` (N×N) or ``Z·M`` (D×D)."""

    def matrix(self, gram: Tensor) -> Tensor:
        """M in float64."""

    def times(self, z: Tensor, gram: Tensor) -> Tensor:
        """Its product with the features; what G holds is lost."""


class SpectralForm(NamedTuple):
    """Value and gradient of a function of ``H = ZᵀZ`` on the small side.

    Attributes:
        host: With the value on the host, errors raised, and the quickest route chosen by what is found.
        device: Without a look at any value, for devices that compute behind the host's back.
        single: As `host`, from the Gram matrix in float32 of float32 features with a large side (see `estimable`);
            None where it does not tell.
        inverse: Whether `single` needs the inverse of that matrix, which only well-conditioned features allow.
    """

    host: Callable[[SmallSide], tuple[float, SmallGradient]]
    device: Callable[[SmallSide], tuple[Tensor, SmallGradient]]
    single: Callable[[SmallSide], tuple[float, SmallGradient] | None] | None = None
    inverse: bool = False


class ClosedForm(torch.autograd.Function):
    """A scalar function of a matrix whose gradient is computed beside its value."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, function: ValueAndGradient, dtype: torch.dtype) -> Tensor:
        """The value, with autocast off, in float32 or better; the gradient is kept for the backward pass."""
        with without_autocast(matrix.device):
            value, gradient = function(matrix.detach())
        ctx.save_for_backward(gradient)
        ctx.matrix_dtype = matrix.dtype
        dtype = torch.promote_types(dtype, torch.float32)
        if isinstance(value, Tensor):
            return value.to(dtype)
        return torch.tensor(value, dtype=dtype, device=matrix.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """The gradient that was kept, times what comes from above."""
        (gradient,) = ctx.saved_tensors
        # Scaled before it is cast: a weight of 1e8 on a gradient of 1e-9 would vanish in half precision otherwise.
        if gradient.dtype == ctx.matrix_dtype:
            return grad_outputs[0] * gradient, None, None
        scaled = torch.empty_like(gradient, dtype=ctx.matrix_dtype)
        for rows, out in zip(gradient.split(CHUNK), scaled.split(CHUNK), strict=True):
            out.copy_(grad_outputs[0] * rows)
        return scaled, None, None


def hessian_function(features: Tensor | Hessian, form: SpectralForm, *, on_device: bool | None = None) -> Tensor:
    """A function of ``H = ZᵀZ``, differentiable with respect to the features or to the Hessian, whichever is given.

    Args:
        features: Z of shape ``(N, D)``, or their `Hessian`.
        form: Value and gradient on the small side.
        on_device: Whether to go without a look at any value; by default wherever the features are not on the CPU.

    Returns:
        0-D tensor, in the dtype of the features, float32 at least. On a device NaN in the place of NonFiniteError,
        RankError and PerfectConditioningError.

    Raises:
        ShapeError: If the features are not ``(N, D)``.
        NonFiniteError: If they hold NaN or infinity.
        RankError: If they are zero.
    """
    # Shape and dtype only: that the features are finite and not zero is seen in the Gram matrix.
    matrix = features.matrix if isinstance(features, Hessian) else as_matrix(features, "features", check_finite=False)
    if on_device is None:
        on_device = matrix.device.type != "cpu"

    def function(detached: Tensor) -> tuple[float | Tensor, Tensor]:
        given = replace(features, matrix=detached) if isinstance(features, Hessian) else detached
        found: tuple[float | Tensor, SmallGradient] | None = None
        single = form.single if not on_device else None
        if single is not None and isinstance(given, Tensor) and estimable(given, inverse=form.inverse):
            side = single_side(given)
            found = single(side)
        if found is None:
            side = small_side(given, check=not on_device)
            found = form.device(side) if on_device else form.host(side)
        value, gradient = found
        if isinstance(features, Hessian):
            return value, gradient.matrix(side.gram) / 2
        return value, gradient.times(detached, side.gram)

    return ClosedForm.apply(matrix, function, features.dtype)
