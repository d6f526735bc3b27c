"""The named regularization terms of each method, as functions of features, logits and labels.

A term knows nothing of models, trainers or weights, so a bare PyTorch loop uses the same functions. Adding an
objective is one function here and one line in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hf_immunize.spectra.regularizers import hessian_r_ill, hessian_r_well


@dataclass(frozen=True)
class Side:
    """One side, benign or harmful, of a batch after the forward pass.

    Attributes:
        features: Classifier inputs, shape ``(N, D)``, in the autograd graph; of all processes where there are several.
        logits: Classifier outputs, shape ``(N, C)``.
        labels: Class indices, shape ``(N,)``; None where the data have none.
    """

    features: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """Regularization terms to be minimized, by the side whose features they look at.

    Attributes:
        benign: Name to 0-D tensor; weighted by ``benign_weight``.
        harmful: Name to 0-D tensor; weighted by ``harmful_weight``.
    """

    benign: dict[str, Tensor] = field(default_factory=dict)
    harmful: dict[str, Tensor] = field(default_factory=dict)


def kappa(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """The paper's objective: ``R_well`` of the benign Hessian and ``R_ill`` of the harmful one.

    Eq. 9 of Zheng et al. 2025 (arXiv:2505.23760), with H = ZᵀZ of the batch.

    Args:
        benign: The benign side; its features are used.
        harmful: The harmful side; its features are used.
        scale_free: Take both of ``H·D/tr(H)``.

    Returns:
        Terms ``r_well`` (benign) and ``r_ill`` (harmful).

    Raises:
        NonFiniteError, RankError, PerfectConditioningError: See `hessian_r_well` and `hessian_r_ill`.

    Example:
        >>> import torch
        >>> Z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> terms = kappa(Side(Z), Side(Z))
        >>> terms.benign["r_well"].item(), round(terms.harmful["r_ill"].item(), 4)
        (3.75, 0.2667)
    """
    return Terms(
        benign={"r_well": hessian_r_well(benign.features, scale_free=scale_free)},
        harmful={"r_ill": hessian_r_ill(harmful.features, scale_free=scale_free)},
    )


def r_ill(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """The paper's baseline "R_ill only": nothing keeps the benign features well conditioned.

    Args:
        benign: The benign side; not used.
        harmful: The harmful side; its features are used.
        scale_free: Take it of ``H·D/tr(H)``.

    Returns:
        The term ``r_ill`` (harmful).
    """
    return Terms(harmful={"r_ill": hessian_r_ill(harmful.features, scale_free=scale_free)})


OBJECTIVES: dict[str, Callable[[Side, Side, bool], Terms]] = {
    "kappa": kappa,
    "r_ill": r_ill,
}
