"""Gram matrices in float64, or in float32 for an estimate, of features in any dtype, never cast as a whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


# Rows cast at a time. Fewer make each product slower, more make the copy larger: 512 cost nothing at D = 768.
CHUNK = 512
# Columns to a block of the lower triangle; the blocks above the diagonal are mirrored, not computed.
_BLOCK = 128
# Entries up to which one product is faster than its parts.
_SMALL = 2**17


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, on devices that know it."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def gram_matrix(tall: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``AᵀA`` of A, shape ``(m, n)``: shape ``(n, n)``, symmetric, without a gradient.

    Beside the result there is never more than `CHUNK` rows of A in a dtype not their own, or a megabyte of them.

    Args:
        tall: A.
        dtype: What it is computed in.
    """
    n = tall.shape[1]
    if n <= _BLOCK and tall.numel() <= _SMALL:
        whole = tall.detach().to(dtype)
        return whole.mT @ whole
    gram = torch.zeros(n, n, dtype=dtype, device=tall.device)
    edges = [(left, min(left + _BLOCK, n)) for left in range(0, n, _BLOCK)]
    for rows in tall.detach().split(len(tall) if tall.dtype == dtype else CHUNK):
        rows = rows.to(dtype)
        for left, right in edges:
            gram[left:right, :right].addmm_(rows[:, left:right].mT, rows[:, :right])
    for left, right in edges:
        gram[:left, left:right] = gram[left:right, :left].mT
    return gram


def product_by_rows(
    z: Tensor, times: Callable[[Tensor], Tensor], compute: torch.dtype, *, transposed: bool = False
) -> Tensor:
    """A product with features that is taken in another dtype, `CHUNK` rows at a time.

    Args:
        z: Features, shape ``(N, D)``.
        times: The product with some rows of Z, or of Zᵀ, in the dtype it is taken in.
        compute: That dtype.
        transposed: Whether the rows are those of Zᵀ.

    Returns:
        The product, or its transpose, of Z's shape, in Z's dtype, float32 at least.
    """
    product = torch.empty(z.shape, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    source, target = (z.mT, product.mT) if transposed else (z, product)
    for rows, out in zip(source.split(CHUNK), target.split(CHUNK), strict=True):
        out.copy_(times(rows.to(compute)))
    return product


class Gram(torch.autograd.Function):
    """``ZᵀZ`` in float64, differentiable: ``∂f/∂Z = Z(S + Sᵀ)`` with S the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        """The matrix, with autocast off."""
        ctx.save_for_backward(features)
        with without_autocast(features.device):
            return gram_matrix(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """The product in float64, by chunks of rows."""
        (features,) = ctx.saved_tensors
        with without_autocast(features.device):
            both = grad_outputs[0] + grad_outputs[0].mT
            gradient = torch.empty_like(features)
            for source, target in zip(features.split(CHUNK), gradient.split(CHUNK), strict=True):
                target.copy_(source.to(torch.float64) @ both)
        return gradient
