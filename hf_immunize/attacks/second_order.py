"""Linear probes that ill-conditioning does not slow: closed forms, whitening, conjugate gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_immunize.attacks.presets import ProbeBudget
from hf_immunize.attacks.probe_data import (
    Finding,
    Part,
    ProbeData,
    Spectrum,
    accuracy,
    best_index,
    log_steps,
    one_hot,
)


def ridge(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Ridge regression on one-hot targets in closed form, with an intercept, over a wide range of strengths.

    Args:
        data: Features and labels.
        seed: Draws the rows that the strength is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.ridge_decades`.

    Returns:
        The finding, without a curve.
    """
    # Below eps the smallest direction kept is not shrunk by any strength.
    decades = min(budget.ridge_decades, round(-2 * math.log10(torch.finfo(dtype).eps)))
    strengths = [10.0**power for power in range(2, -decades - 1, -1)]

    def filters(s: Tensor) -> list[Tensor]:
        # s²/(s² + λσ²) written so that nothing underflows.
        relative = (s / s[0]).double().square() if len(s) else s.double()
        return [(relative / (relative + strength)).to(s.dtype) for strength in strengths]

    found, best = _filtered(data, seed, dtype, budget, filters)
    return _with(found, relative_strength=strengths[best])


def whitening(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Least squares on whitened features: the leading k principal directions, each scaled to the same variance.

    On whitened features κ = 1, so gradient descent with exact line search is there after its first step; this is that
    step. k is chosen by validation.

    Args:
        data: Features and labels.
        seed: Draws the rows that k is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.validation_fraction`.

    Returns:
        The finding, without a curve.
    """
    largest = min(data.Z.shape)
    counts = sorted({max(1, round(k)) for k in np.geomspace(1, largest, 24)})

    def filters(s: Tensor) -> list[Tensor]:
        return [(torch.arange(len(s)) < count).to(s.dtype) for count in counts]

    found, best = _filtered(data, seed, dtype, budget, filters)
    return _with(found, directions=counts[best])


def lda(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Linear discriminant analysis in closed form, over shrinkages of the covariance within classes.

    Args:
        data: Features and labels.
        seed: Draws the rows that the shrinkage is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.validation_fraction`.

    Returns:
        The finding, without a curve.
    """
    lowest = 12 if dtype == torch.float64 else 6
    shrinkages = [10.0**power for power in range(0, -lowest - 1, -1)]
    tuning, whole = data.tuning(seed, budget.validation_fraction, dtype), data.whole(dtype)
    tried = _discriminants(tuning, shrinkages, data.num_classes)
    best = best_index(tried)
    value = data.keep(
        None, ("lda", dtype, best), lambda: _discriminants(whole, shrinkages[best : best + 1], data.num_classes)[0]
    )
    return Finding(value, settings={"shrinkage": shrinkages[best]}, trials=len(shrinkages))


def conjugate_gradient(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Conjugate gradient on the least-squares problem of each class, from zero, stopped where validation says.

    Args:
        data: Features and labels.
        seed: Draws the rows that the stop is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.iterations`.

    Returns:
        The finding; the curve is that of all training rows and does not depend on the seed.
    """
    steps = log_steps(max(budget.iterations, 2))
    tuning, whole = data.tuning(seed, budget.validation_fraction, dtype), data.whole(dtype)
    tried = _conjugate_curve(tuning, data.spectrum(tuning, seed, dtype), steps, data.num_classes)
    curve = data.keep(
        None,
        ("conjugate_gradient", dtype),
        lambda: _conjugate_curve(whole, data.spectrum(whole, None, dtype), steps, data.num_classes),
    )
    stop = best_index(tried)
    return Finding(curve[stop], steps, curve, {"stop": steps[stop]})


def conjugate_path(s: Tensor, coefficients: Tensor, steps: list[int]) -> list[Tensor]:
    """Conjugate gradient for ``diag(s²) W = diag(s) B``, column by column, from ``W = 0``.

    In the eigenbasis of ``ZᵀZ``, with ``B = UᵀY``; the iterates are those of the features' own coordinates, rotated.

    Args:
        s: Singular values, ``(r,)``.
        coefficients: ``B``, ``(r, C)``.
        steps: After which steps, ascending.

    Returns:
        ``W`` after each, ``(r, C)``.

    Example:
        >>> conjugate_path(torch.tensor([2.0, 1.0]), torch.tensor([[2.0], [3.0]]), [2])[0].flatten()
        tensor([1., 3.])
    """
    top = s.max() if len(s) else torch.ones(())
    q = (s / top).square()[:, None]
    residual = (s / top)[:, None] * coefficients
    weight, direction = torch.zeros_like(residual), residual.clone()
    size = residual.square().sum(dim=0)
    path, wanted = [], set(steps)
    for step in range(1, (steps[-1] if steps else 0) + 1):
        image = q * direction
        curvature = (direction * image).sum(dim=0)
        # Columns that are solved stand still.
        alpha = torch.where(curvature > 0, size / curvature.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
        weight = weight + alpha * direction
        residual = residual - alpha * image
        new = residual.square().sum(dim=0)
        beta = torch.where(size > 0, new / size.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
        direction, size = residual + beta * direction, new
        if step in wanted:
            path.append(weight / top)
    return path


def _filtered(
    data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget, filters: Any
) -> tuple[Finding, int]:
    """The best spectral filter by validation, and what it reaches with all training rows."""
    tuning, whole = data.tuning(seed, budget.validation_fraction, dtype), data.whole(dtype)
    spectrum = data.spectrum(tuning, seed, dtype)
    tried = filter_accuracies(tuning, spectrum, filters(spectrum.s), data.num_classes)
    best = best_index(tried)
    spectrum = data.spectrum(whole, None, dtype)
    (value,) = filter_accuracies(whole, spectrum, filters(spectrum.s)[best : best + 1], data.num_classes)
    return Finding(value, trials=len(tried), validation=tried[best]), best


def filter_accuracies(part: Part, spectrum: Spectrum, filters: list[Tensor], num_classes: int) -> list[float]:
    """Accuracy of ``W = V diag(h/s) Uᵀ(Y − 1bᵀ)`` with an intercept ``b`` that is not shrunk.

    Its normal equation ``1ᵀ(I − U diag(h) Uᵀ)(Y − 1bᵀ) = 0`` gives ``b`` without a decomposition of centred features.

    Args:
        part: Rows to fit and to measure.
        spectrum: Decomposition of the rows to fit.
        filters: ``h``, each ``(r,)``, between 0 and 1.
        num_classes: Number of classes.

    Returns:
        One accuracy a filter.
    """
    targets = one_hot(part.y, num_classes, part.Z.dtype)
    ones = part.Z.new_ones(len(part.Z))
    inside, ones_inside = spectrum.U.mT @ targets, spectrum.U.mT @ ones
    projected = part.Z_test @ spectrum.V
    values = []
    for h in filters:
        left = ones - spectrum.U @ (h * ones_inside)
        room = float(left @ ones)
        # Features that span the constant leave nothing for an intercept.
        bias = left @ targets / room if room > len(ones) * 1e-6 else torch.zeros_like(targets[0])
        weight = (h / spectrum.s)[:, None] * (inside - ones_inside[:, None] * bias)
        values.append(accuracy(projected @ weight + bias, part.y_test))
    return values


def _discriminants(part: Part, shrinkages: list[float], num_classes: int) -> list[float]:
    counts = torch.bincount(part.y, minlength=num_classes).to(part.Z.dtype)
    centre = part.Z.mean(dim=0)
    Z, Z_test = part.Z - centre, part.Z_test - centre
    means = one_hot(part.y, num_classes, Z.dtype).mT @ Z / counts.clamp_min(1)[:, None]
    within = Z - means[part.y]
    values, V = torch.linalg.eigh(within.mT @ within / len(Z))
    floor = float(values.clamp_min(0).mean())
    if floor == 0:
        floor = float(Z.square().mean()) or 1.0
    means, tests = means @ V, Z_test @ V
    # Classes without a row to learn from are never named.
    prior = torch.where(counts > 0, (counts / counts.sum()).clamp_min(1e-30).log(), -torch.inf)
    found = []
    for shrinkage in shrinkages:
        inverse = 1 / ((1 - shrinkage) * values.clamp_min(0) + shrinkage * floor)
        scores = tests @ (means * inverse).mT - 0.5 * (means.square() * inverse).sum(dim=1)
        found.append(float(((scores + prior).argmax(dim=1) == part.y_test).double().mean()))
    return found


def _conjugate_curve(part: Part, spectrum: Spectrum, steps: list[int], num_classes: int) -> list[float]:
    coefficients = spectrum.U.mT @ one_hot(part.y, num_classes, part.Z.dtype)
    projected = part.Z_test @ spectrum.V
    return [accuracy(projected @ weight, part.y_test) for weight in conjugate_path(spectrum.s, coefficients, steps)]


def _with(finding: Finding, **settings: Any) -> Finding:
    return replace(finding, settings=settings)
