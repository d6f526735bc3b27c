"""How much each regularization term counts beside the benign loss."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_norm(value: Tensor, features: Tensor) -> Tensor:
    """Norm of the gradient of a scalar with respect to the features, without a pass through the network.

    The features are the last tensor that the benign loss and the regularizers share, so balancing gradients there
    costs one backward pass through the head and the regularizers' closed forms.

    Args:
        value: 0-D tensor that depends on the features.
        features: Shape ``(N, D)``, in the autograd graph; the graph is kept.

    Returns:
        ``‖∂value/∂features‖_F``, 0-D, float32, detached, on the features' device.
    """
    (gradient,) = torch.autograd.grad(value, features, retain_graph=True)
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def balanced_weight(loss_norm: Tensor, term_norm: Tensor, ratio: float) -> Tensor:
    """Weight under which a term's gradient on the features has `ratio` times the norm of the benign loss's.

    Args:
        loss_norm: Norm of the benign loss's gradient on the features.
        term_norm: Norm of the term's.
        ratio: Their wanted proportion.

    Returns:
        0-D tensor; zero where the term has no gradient, as ``R_well`` at κ = 1.

    Example:
        >>> balanced_weight(torch.tensor(2.0), torch.tensor(4.0), ratio=0.5).item()
        0.25
    """
    return torch.where(term_norm > 0, ratio * loss_norm / term_norm, torch.zeros_like(term_norm))
