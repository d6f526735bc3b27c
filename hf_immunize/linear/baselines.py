"""Gradients of the baselines that the paper compares with: IMMA and descent on log κ itself."""

import torch

from hf_immunize.linear.steps import Direction, feature_spectrum


def log_kappa_gradient(X: torch.Tensor, Z: torch.Tensor) -> Direction:
    """``∇_θ log κ(θᵀXᵀXθ)``, the direction of the baseline "Opt κ".

    ``log κ = 2 log s_1 − 2 log s_k`` over the singular values of ``Z = Xθ``, so the gradient is
    ``2Xᵀ(u_1u_1ᵀ/σ_1 − u_ku_kᵀ/σ_k)Z``: both extreme pairs, no preconditioner.

    Args:
        X: ``(n, D)`` data.
        Z: ``(n, D)`` features ``Xθ``.

    Returns:
        The ``(D, D)`` gradient, of rank two, as its factors.
    """
    values, left = feature_spectrum(Z)
    ends = left[:, [0, -1]]
    weights = torch.stack([1 / values[0], -1 / values[-1]])
    return Direction(2 * (X.T @ ends), weights[:, None] * (ends.T @ Z))


def adapted_loss(theta: torch.Tensor, X: torch.Tensor, targets: torch.Tensor, steps: int) -> torch.Tensor:
    """The harmful squared loss after an attacker has fitted a head for some steps, differentiable in ``θ``.

    The inner problem of IMMA (Zheng & Yeh, ECCV 2024) in the linear setting: ``w ← w − α∇_w L_H(w, θ)`` from
    ``w = 0``, with the graph kept through every step. ``α`` is one over the curvature at the current ``θ``, a constant
    for the outer gradient, so that the attacker always descends.

    Args:
        theta: ``(D, D)``, requires grad.
        X: ``(n, D)`` harmful data.
        targets: ``(n, C)`` harmful targets.
        steps: Inner steps.

    Returns:
        Scalar.
    """
    Z = X @ theta
    rate = len(Z) / (2 * torch.linalg.matrix_norm(Z.detach(), 2).square())
    weight = Z.new_zeros(Z.shape[1], targets.shape[1])
    for _ in range(steps):
        # The gradient is written out: autograd then differentiates through it without a second graph.
        weight = weight - rate * 2 / len(Z) * (Z.T @ (Z @ weight - targets))
    return (Z @ weight - targets).square().sum() / len(Z)
