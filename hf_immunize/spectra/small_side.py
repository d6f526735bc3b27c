"""The matrix on which the spectrum of a probing Hessian is computed.

For features ``Z`` of shape ``(N, D)`` the matrices ``ZᵀZ`` (D×D) and ``ZZᵀ`` (N×N) share their non-zero spectrum. Where
the features are given, everything is computed on the smaller of the two, the *small side*; where the Hessian alone is
given, on the Hessian.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_immunize.errors import NonFiniteError, RankError
from hf_immunize.spectra.conditioning import as_matrix
from hf_immunize.spectra.hessian import Hessian


class SmallSide(NamedTuple):
    """A Gram matrix of features ``Z`` and what the rank rule must know of them.

    Attributes:
        gram: ``ZZᵀ`` or ``ZᵀZ``, shape ``(n, n)``, float64, detached.
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


def small_gram(features: Tensor) -> Tensor:
    """``ZZᵀ`` or ``ZᵀZ``, whichever is smaller, in float64, shape ``(n, n)``.

    Raises:
        NonFiniteError: If the features hold NaN or infinity, or their squares overflow.
        RankError: If they are zero.
    """
    z = features.detach().to(torch.float64)
    gram = z @ z.mT if wide(features) else z.mT @ z
    # Every entry of Z stands in the trace, squared: one look at n numbers tells what a look at N·D would.
    trace = float(gram.diagonal().sum())
    if not math.isfinite(trace):
        as_matrix(features, "features")  # names the entry
        raise NonFiniteError(
            f"Expected features whose squares are finite in float64, found values up to "
            f"{float(features.detach().abs().max()):.3g}. Divide them by their scale first."
        )
    if trace == 0:
        raise _rank_zero(features.shape[0], features.shape[1])
    return gram


def side_of_features(features: Tensor) -> SmallSide:
    """The small side of features of shape ``(N, D)``.

    Raises:
        NonFiniteError, RankError: See `small_gram`.
    """
    return SmallSide(small_gram(features), *features.shape, features.dtype, features.detach())


def side_of_hessian(hessian: Hessian) -> SmallSide:
    """The Hessian as it is, of size D even where N is smaller.

    Raises:
        NonFiniteError: If it holds NaN or infinity.
        RankError: If it is zero.
    """
    gram = hessian.matrix.detach()
    # Beyond its diagonal a positive semi-definite matrix has nothing larger, but a matrix with NaN is none.
    total = float(gram.sum())
    if not math.isfinite(total):
        as_matrix(gram, "the Hessian")
        raise NonFiniteError(
            f"Expected a Hessian whose sum is finite, found entries up to {float(gram.abs().max()):.3g}. Divide the "
            "features by their scale first."
        )
    if float(gram.diagonal().sum()) == 0:
        raise _rank_zero(hessian.rows, gram.shape[0])
    return SmallSide(gram, hessian.rows, gram.shape[0], hessian.dtype)


def _rank_zero(rows: int, dim: int) -> RankError:
    return RankError(
        f"Expected features of rank at least 1, found rank 0: all of {(rows, dim)} values are zero. "
        "Check that the network is not dead and the right layer is read."
    )
