"""Attackers on fixed features that are no linear probe: nearest neighbours and a small network."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from hf_immunize.attacks.descent import Clock, half_cosine, minibatches, standardize_part
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


# Inverse strengths of scikit-learn's logistic regression, on features scaled to a mean square of 1.
_INVERSE_STRENGTHS = (1e-2, 1e-1, 1.0)


def lbfgs(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Softmax regression by L-BFGS on standardized features, over penalties, each from the last one's weights.

    Args:
        data: Features and labels.
        seed: Draws the rows that the penalty is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.iterations`.

    Returns:
        The finding, without a curve.
    """
    penalties = (1e-1, 1e-2, 1e-3)
    iterations = max(1, budget.iterations // 3)

    def tune() -> list[float]:
        # The penalty in float32, whatever the precision of the attack: this is most of the cost.
        part = standardize_part(data.tuning(seed, budget.validation_fraction, torch.float32))
        return softmax_path(part, penalties, data.num_classes, iterations)

    best = best_index(data.keep(seed, "lbfgs", tune))

    def run() -> float:
        whole = standardize_part(data.whole(dtype))
        return softmax_path(whole, penalties[: best + 1], data.num_classes, iterations)[-1]

    value = data.keep(None, ("lbfgs", dtype, best), run)
    return Finding(value, settings={"penalty": penalties[best]}, trials=len(penalties))


def logistic_regression(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """scikit-learn's `LogisticRegression` on the features as they are but for one factor, over its ``C``.

    Args:
        data: Features and labels.
        seed: Draws the rows that ``C`` is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.iterations`.

    Returns:
        The finding, without a curve.
    """
    iterations = max(1, budget.iterations // 3)

    def tune() -> list[float]:
        part = data.tuning(seed, budget.validation_fraction, torch.float32)
        return _logistic_path(part, _INVERSE_STRENGTHS, iterations)

    best = best_index(data.keep(seed, "logistic_regression", tune))
    value = data.keep(
        None,
        ("logistic_regression", dtype, best),
        lambda: _logistic_path(data.whole(dtype), _INVERSE_STRENGTHS[: best + 1], iterations)[-1],
    )
    settings = {"C": _INVERSE_STRENGTHS[best], "scaled_to_mean_square": 1.0}
    return Finding(value, settings=settings, trials=len(_INVERSE_STRENGTHS))


def softmax_path(part: Part, penalties: tuple[float, ...], num_classes: int, iterations: int) -> list[float]:
    """Accuracy of softmax regression with the mean loss plus ``penalty/2D · ‖W‖²``, for falling penalties.

    Args:
        part: Rows to fit and to measure.
        penalties: Strengths, the largest first; each starts where the last one ended.
        num_classes: Number of classes.
        iterations: Of L-BFGS, for each.

    Returns:
        One accuracy a penalty.
    """
    d = part.Z.shape[1]
    weight = part.Z.new_zeros(d, num_classes, requires_grad=True)
    bias = part.Z.new_zeros(num_classes, requires_grad=True)
    values = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
        )

        def loss(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(part.Z @ weight + bias, part.y)
            value = value + penalty / (2 * d) * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            values.append(accuracy(part.Z_test @ weight + bias, part.y_test))
    return values


def _logistic_path(part: Part, strengths: tuple[float, ...], iterations: int) -> list[float]:
    size = float(part.Z.square().mean().sqrt()) or 1.0
    Z, Z_test = (part.Z / size).numpy(), (part.Z_test / size).numpy()
    values = []
    model = LogisticRegression(max_iter=iterations, warm_start=True, tol=1e-4)
    for strength in strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is the budget
            model.fit(Z, part.y.numpy())
        values.append(float((model.predict(Z_test) == part.y_test.numpy()).mean()))
    return values


_NEIGHBOURS = (1, 3, 5, 10, 20, 50)
_HIDDEN = 128


def knn(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """K nearest neighbours on three views of the features, k and the view chosen by validation.

    The views: as they are with cosine distance, standardized with Euclidean distance, and whitened (which undoes any
    invertible linear map) with cosine distance.

    Args:
        data: Features and labels.
        seed: Draws the rows that k and the view are chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.validation_fraction`.

    Returns:
        The finding, without a curve.
    """
    tuning, whole = data.tuning(seed, budget.validation_fraction, dtype), data.whole(dtype)
    counts = [k for k in _NEIGHBOURS if k <= len(tuning.Z)]
    settings = [(view, k) for view in ("cosine", "standardized", "whitened") for k in counts]
    tried = [_vote(tuning, data, seed, view, k) for view, k in settings]
    best = best_index(tried)
    view, k = settings[best]
    value = data.keep(None, ("knn", dtype, view, k), lambda: _vote(whole, data, None, view, k))
    return Finding(value, settings={"view": view, "k": k}, trials=len(settings))


def mlp(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """A network with one hidden layer of 128 ReLU on standardized features, AdamW, cosine schedule.

    Args:
        data: Features and labels.
        seed: Draws weights, batches and the rows that rate and stop are chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.steps`, `ProbeBudget.batch_size`.

    Returns:
        The finding with its curve.
    """
    rates = (1e-3, 5e-3)
    # Of the time, where it is limited, the search takes one half and the attack the other.
    seconds = None if budget.seconds is None else budget.seconds / 2

    def clock(among: int) -> Clock:
        return Clock(budget.steps, None if seconds is None else seconds / among)

    def tune() -> list[tuple[list[float], list[int]]]:
        part = standardize_part(data.tuning(seed, budget.validation_fraction, torch.float32))
        return [_train_mlp(part, data.num_classes, rate, clock(len(rates)), budget.batch_size, seed) for rate in rates]

    tried = data.keep(seed, "mlp", tune)
    best = best_index([max(curve) for curve, _ in tried])
    whole = standardize_part(data.whole(dtype))
    curve, steps = _train_mlp(whole, data.num_classes, rates[best], clock(1), budget.batch_size, seed)
    # The same part of the way as in the trial, which time may have ended earlier or later.
    values, taken = tried[best]
    part_way = taken[best_index(values)] / taken[-1]
    stop = min(range(len(steps)), key=lambda index: abs(steps[index] - part_way * steps[-1]))
    settings = {"learning_rate": rates[best], "hidden": _HIDDEN, "stop": steps[stop]}
    return Finding(curve[stop], steps, curve, settings, trials=len(rates))


def _vote(part: Part, data: ProbeData, seed: int | None, view: str, k: int) -> float:
    neighbours = data.keep(seed, ("neighbours", view, part.Z.dtype), lambda: _neighbours(part, data, seed, view))
    votes = one_hot(part.y[neighbours[:, :k]], data.num_classes, torch.float32).sum(dim=1)
    # Of classes with as many votes, the one of the nearest neighbour.
    nearest = one_hot(part.y[neighbours[:, 0]], data.num_classes, torch.float32)
    return accuracy(votes + 0.5 * nearest, part.y_test)


def _neighbours(part: Part, data: ProbeData, seed: int | None, view: str) -> Tensor:
    if view == "standardized":
        part = standardize_part(part)
    train, test = part.Z, part.Z_test
    if view == "whitened":
        spectrum = data.spectrum(part, seed, part.Z.dtype)
        train, test = spectrum.U, part.Z_test @ (spectrum.V / spectrum.s)
    if view != "standardized":
        train, test = (torch.nn.functional.normalize(rows, dim=1) for rows in (train, test))
    most = min(max(_NEIGHBOURS), len(train))
    found = [torch.cdist(rows, train).topk(most, largest=False).indices for rows in test.split(1024)]
    return torch.cat(found)


def _train_mlp(
    part: Part, num_classes: int, rate: float, clock: Clock, batch_size: int, seed: int
) -> tuple[list[float], list[int]]:
    """Accuracy along the way, and after which steps."""
    generator = torch.Generator().manual_seed(seed)
    d, dtype = part.Z.shape[1], part.Z.dtype
    # Drawn in float64, so that the same seed means the same start in any precision.
    shapes = ((d, _HIDDEN, math.sqrt(2 / d)), (_HIDDEN, num_classes, math.sqrt(1 / _HIDDEN)))
    drawn = [torch.randn(a, b, generator=generator, dtype=torch.float64) * scale for a, b, scale in shapes]
    W1, W2 = (weight.to(dtype).requires_grad_() for weight in drawn)
    b1, b2 = (part.Z.new_zeros(size, requires_grad=True) for size in (_HIDDEN, num_classes))
    optimizer = torch.optim.AdamW([W1, b1, W2, b2], lr=rate, weight_decay=0.01)
    curve, steps, wanted = [], [], set(log_steps(clock.steps))
    for step, rows in enumerate(minibatches(len(part.Z), batch_size, clock.steps, seed), start=1):
        optimizer.param_groups[0]["lr"] = rate * half_cosine(clock.progress(step - 1))
        scores = (part.Z[rows] @ W1 + b1).relu() @ W2 + b2
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, part.y[rows]).backward()
        optimizer.step()
        ended = clock.over(step)
        if step in wanted or ended:
            steps.append(step)
            with torch.no_grad():
                curve.append(accuracy((part.Z_test @ W1 + b1).relu() @ W2 + b2, part.y_test))
        if ended:
            break
    return curve, steps
