"""Scalar functions of a matrix whose gradients are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_immunize.spectra.conditioning import as_matrix
from hf_immunize.spectra.hessian import Hessian
from hf_immunize.spectra.small_forms import SmallGradient
from hf_immunize.spectra.small_side import SmallSide, side_of_features, side_of_hessian


# value and gradient of a spectral function at a detached matrix
ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]
# value and gradient of a function of H = ZᵀZ on the small side
SmallForm = Callable[[SmallSide], tuple[float, SmallGradient]]


class ClosedForm(torch.autograd.Function):
    """A scalar function of a matrix whose gradient is computed beside its value."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, function: ValueAndGradient, dtype: torch.dtype) -> Tensor:
        """The value, with autocast off, in float32 or better; the gradient is kept for the backward pass."""
        with torch.autocast(matrix.device.type, enabled=False):
            value, gradient = function(matrix.detach())
        ctx.save_for_backward(gradient)
        ctx.matrix_dtype = matrix.dtype
        return torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32), device=matrix.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """The gradient that was kept, times what comes from above."""
        (gradient,) = ctx.saved_tensors
        # Scaled before it is cast: a weight of 1e8 on a gradient of 1e-9 would vanish in half precision otherwise.
        return (grad_outputs[0] * gradient).to(ctx.matrix_dtype), None, None


def hessian_function(features: Tensor | Hessian, form: SmallForm) -> Tensor:
    """A function of ``H = ZᵀZ``, differentiable with respect to the features or to the Hessian, whichever is given.

    Args:
        features: Z of shape ``(N, D)``, or their `Hessian`.
        form: Value and gradient on the small side.

    Returns:
        0-D tensor, in the dtype of the features, float32 at least.

    Raises:
        ShapeError: If the features are not ``(N, D)``.
        NonFiniteError: If they hold NaN or infinity.
        RankError: If they are zero.
    """
    if isinstance(features, Hessian):

        def of_hessian(_: Tensor) -> tuple[float, Tensor]:
            side = side_of_hessian(features)
            value, gradient = form(side)
            return value, gradient.matrix(side.gram) / 2

        return ClosedForm.apply(features.matrix, of_hessian, features.dtype)

    def of_features(z: Tensor) -> tuple[float, Tensor]:
        side = side_of_features(z)
        value, gradient = form(side)
        return value, gradient.times(z, side.gram)

    # Shape and dtype only: that the features are finite and not zero is seen in the Gram matrix.
    features = as_matrix(features, "features", check_finite=False)
    return ClosedForm.apply(features, of_features, features.dtype)
