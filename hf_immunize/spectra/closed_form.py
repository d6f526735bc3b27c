"""Scalar functions of a matrix whose gradients are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


# value and gradient of a spectral function at a detached matrix
ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]


class ClosedForm(torch.autograd.Function):
    """A scalar function of a matrix whose gradient is computed beside its value."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, function: ValueAndGradient) -> Tensor:
        """The value, with autocast off; the gradient is kept for the backward pass."""
        with torch.autocast(matrix.device.type, enabled=False):
            value, gradient = function(matrix.detach())
        ctx.save_for_backward(gradient)
        ctx.matrix_dtype = matrix.dtype
        return torch.tensor(value, dtype=torch.promote_types(matrix.dtype, torch.float32), device=matrix.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """The gradient that was kept, times what comes from above."""
        (gradient,) = ctx.saved_tensors
        # Scaled before it is cast: a weight of 1e8 on a gradient of 1e-9 would vanish in half precision otherwise.
        return (grad_outputs[0] * gradient).to(ctx.matrix_dtype), None
