"""Builders of test matrices with a known spectrum, all seeded and in float64 unless asked otherwise."""

import math

import torch


def orthonormal(size, columns, seed):
    """A random ``(size, columns)`` matrix with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, columns, dtype=torch.float64, generator=generator)).Q


def with_singular_values(values, rows, columns, seed=0):
    """A random ``(rows, columns)`` matrix with these non-zero singular values; rank-deficient if there are fewer."""
    sigma = torch.as_tensor(values, dtype=torch.float64)
    u, v = orthonormal(rows, len(sigma), seed), orthonormal(columns, len(sigma), seed + 1)
    return (u * sigma) @ v.mT


def geometric(kappa, count):
    """`count` singular values from 1 down to ``1/kappa``, evenly spaced in logarithm."""
    return torch.logspace(0.0, -math.log10(kappa), count, dtype=torch.float64)


def gaussian(rows, columns, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).to(dtype)


def value_and_gradient(function, matrix, **options):
    leaf = matrix.detach().clone().requires_grad_()
    value = function(leaf, **options)
    value.backward()
    return value.detach(), leaf.grad


def relative_error(found, expected):
    expected = expected.to(torch.float64)
    return float((found.to(torch.float64) - expected).norm() / expected.norm())
