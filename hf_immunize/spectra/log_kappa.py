"""``log κ`` itself as something to differentiate: the baseline "Opt κ" of Zheng et al. 2025."""

from __future__ import annotations

from torch import Tensor

from hf_immunize.spectra.closed_form import hessian_function
from hf_immunize.spectra.forms import LOG_KAPPA
from hf_immunize.spectra.hessian import Hessian


def hessian_log_kappa(features: Tensor | Hessian) -> Tensor:
    """``log κ(H) = log σ_1 − log σ_k`` of the probing Hessian ``H = ZᵀZ``, σ_k its smallest non-zero eigenvalue.

    The natural logarithm of Eq. 1 of Zheng et al. 2025 (arXiv:2505.23760), on the smaller of ``ZᵀZ`` and ``ZZᵀ``.
    Gradient with respect to Z: ``2(u_1u_1ᵀ/σ_1 − u_ku_kᵀ/σ_k) Z`` (N ≤ D, or from the right), averaged over the
    eigenspaces of repeated extremes. It depends on the extreme pairs alone, so that it says nothing of the values
    between them, and it jumps where another pair becomes extreme.

    Args:
        features: Z, shape ``(N, D)``, any real floating-point dtype, or their `Hessian`; computed in float64.

    Returns:
        0-D tensor, non-negative and dimensionless; differentiable once.

    Raises:
        ShapeError: If the features are not ``(N, D)``.
        NonFiniteError: If they hold NaN or infinity.
        RankError: If they are zero.

    Example:
        >>> import torch
        >>> round(hessian_log_kappa(torch.diag(torch.tensor([10.0, 1.0]))).item(), 4)  # log 100
        4.6052
    """
    return hessian_function(features, LOG_KAPPA)
