"""The inner attacker of bi-level objectives: a linear head fitted to features, differentiably."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adapted_loss(features: Tensor, labels: Tensor, steps: int = 5) -> Tensor:
    """Cross-entropy of a linear head after some steps of gradient descent from zero, differentiable in the features.

    The inner problem of IMMA (Zheng & Yeh, ECCV 2024, arXiv:2311.18815) for linear probing: ``W ← W − α ∇_W CE(ZW)``,
    with the graph kept through every step. ``α = 2N/σ_1(ZᵀZ)``, one over a bound on the curvature of the mean loss, is
    a constant for the outer gradient: the attacker always descends, whatever the features' scale.

    Args:
        features: Z, shape ``(N, D)``.
        labels: Class indices, shape ``(N,)``; only the classes present matter.
        steps: Inner steps.

    Returns:
        0-D tensor, in nats; at most ``log(number of classes present)``, its value at ``W = 0``.

    Example:
        >>> Z, y = torch.eye(4), torch.tensor([0, 1, 2, 3])
        >>> bool(adapted_loss(Z, y, steps=9) < adapted_loss(Z, y, steps=1) < torch.log(torch.tensor(4.0)))
        True
    """
    rows = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    present, targets = torch.unique(labels, return_inverse=True)
    wanted = F.one_hot(targets, len(present)).to(rows.dtype)
    rate = 2 * len(rows) / torch.linalg.matrix_norm(rows.detach(), 2).square()
    weight = rows.new_zeros(rows.shape[1], len(present))
    for _ in range(steps):
        # The gradient is written out: autograd then differentiates through it without a second graph.
        weight = weight - rate / len(rows) * rows.mT @ (torch.softmax(rows @ weight, dim=1) - wanted)
    return F.cross_entropy(rows @ weight, targets)
