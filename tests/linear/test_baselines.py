import pytest
import torch

from hf_immunize.linear.algorithm import adapted_loss, log_kappa_gradient


@pytest.mark.parametrize("shape", [(12, 5), (4, 7)])
def test_log_kappa_gradient_agrees_with_autograd(shape):
    X = torch.randn(shape, dtype=torch.float64)
    theta = torch.randn(shape[1], shape[1], dtype=torch.float64, requires_grad=True)
    s = torch.linalg.svdvals(X @ theta)
    expected = torch.autograd.grad(2 * (s[0].log() - s[-1].log()), theta)[0]
    found = log_kappa_gradient(X, (X @ theta).detach())
    torch.testing.assert_close(found.tall @ found.flat, expected)


def test_adapted_loss_is_what_an_attacker_reaches_and_differentiable_through_every_step():
    X, targets = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    theta = torch.randn(3, 3, dtype=torch.float64)
    losses = [float(adapted_loss(theta, X, targets, steps)) for steps in (1, 3, 30, 3000)]
    assert losses == sorted(losses, reverse=True)
    best = (X @ torch.linalg.lstsq(X, targets).solution - targets).square().sum() / 10
    assert losses[-1] == pytest.approx(float(best), rel=1e-6)
    # The inner rate is a constant of the outer gradient, so the check holds the rate by scaling out the norm.
    moving = theta.clone().requires_grad_(True)
    gradient = torch.autograd.grad(adapted_loss(moving, X, targets, 3), moving)[0]
    rate = len(X) / (2 * torch.linalg.matrix_norm(X @ theta, 2).square())

    def fixed_rate(value):
        Z, w = X @ value, torch.zeros(3, 2, dtype=torch.float64)
        for _ in range(3):
            w = w - rate * 2 / 10 * Z.T @ (Z @ w - targets)
        return float((Z @ w - targets).square().sum() / 10)

    step = torch.zeros(3, 3, dtype=torch.float64)
    step[1, 2] = 1e-6
    numeric = (fixed_rate(theta + step) - fixed_rate(theta - step)) / 2e-6
    assert float(gradient[1, 2]) == pytest.approx(numeric, rel=1e-5)
