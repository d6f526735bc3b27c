"""The matrix on which the spectrum of a probing Hessian is computed.

For features ``Z`` of shape ``(N, D)`` the matrices ``ZᵀZ`` (D×D) and ``ZZᵀ`` (N×N) share their non-zero spectrum.
Where the features are given, everything is computed on the smaller of the two, the *small side*; where the Hessian
alone is given, on the Hessian.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.errors import NonFiniteError, RankError
from hf_immunize.spectra.conditioning import as_matrix
from hf_immunize.spectra.gram import gram_matrix
from hf_immunize.spectra.hessian import Hessian


class SmallSide(NamedTuple):
    """A Gram matrix of features ``Z`` and what the rank rule must know of them.

    Attributes:
        gram: ``ZZᵀ`` or ``ZᵀZ``, shape ``(n, n)``, float64, detached; float32 where `single_side` says so.
        rows: N, of Z; at most ``min(N, D)`` eigenvalues are not zero, whatever n is.
        dim: D, of Z.
        dtype: The dtype in which Z was computed.
        features: Z itself, detached, where it is at hand: its singular values are more exact than those of `gram`.
    """

    gram: Tensor
    rows: int
    dim: int
    dtype: torch.dtype
    features: Tensor | None = None


def wide(features: Tensor) -> bool:
    """Whether ``ZZᵀ`` (N×N) is the small side."""
    return features.shape[0] <= features.shape[1]


def small_gram(features: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``ZZᵀ`` or ``ZᵀZ``, whichever is smaller, computed in float64, shape ``(n, n)``, without a gradient."""
    return gram_matrix(features.mT if wide(features) else features, dtype)


def single_side(features: Tensor) -> SmallSide:
    """The small side with its Gram matrix in float32, where no value has been looked at: for an estimate."""
    rows, dim = features.shape
    return SmallSide(small_gram(features, torch.float32), rows, dim, features.dtype, features.detach())


def small_side(features: Tensor | Hessian, *, check: bool = True) -> SmallSide:
    """The smaller Gram matrix of features, or a Hessian as it is, of size D even where N is smaller.

    Args:
        features: Z, shape ``(N, D)``, or their Hessian.
        check: Whether to look at the values; without it nothing is raised and nothing read back from a device.

    Raises:
        NonFiniteError: If the features hold NaN or infinity, or their squares overflow.
        RankError: If they are zero.
    """
    if isinstance(features, Hessian):
        gram = features.matrix.detach()
        side = SmallSide(gram, features.rows, gram.shape[0], features.dtype)
        # of a matrix that is no Gram matrix the diagonal does not tell all
        seen = gram.sum() if check else None
    else:
        rows, dim = features.shape
        gram = small_gram(features)
        side = SmallSide(gram, rows, dim, features.dtype, features.detach())
        # Every entry of Z stands in the trace, squared: one look at n numbers tells what a look at N·D would.
        seen = gram.diagonal().sum() if check else None
    if seen is None:
        return side
    if not math.isfinite(float(seen)):
        raise _not_finite(features)
    if float(gram.diagonal().sum()) == 0:
        raise RankError(
            f"Expected features of rank at least 1, found rank 0: all of {(side.rows, side.dim)} values are zero. "
            "Check that the network is not dead and the right layer is read."
        )
    return side


def _not_finite(features: Tensor | Hessian) -> NonFiniteError:
    name, values = ("the Hessian", features.matrix) if isinstance(features, Hessian) else ("features", features)
    as_matrix(values, name)  # names the entry
    return NonFiniteError(
        f"Expected {name} whose squares are finite in float64, found values up to "
        f"{float(values.detach().abs().max()):.3g}. Divide them by their scale first."
    )
