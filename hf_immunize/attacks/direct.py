"""Attacks on features that count no steps: closed forms, solvers of softmax regression, and nearest neighbours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from hf_immunize.attacks.attacker import Attacker, Found, ProbeBudget
from hf_immunize.attacks.probe_data import Part, ProbeData, accuracy, best_index


S = TypeVar("S")


def _choose(
    data: ProbeData,
    budget: ProbeBudget,
    seed: int,
    settings: list[S],
    read: Callable[[Part, list[S]], list[float]],
    describe: Callable[[S], dict[str, Any]],
    path: bool = False,
) -> Found:
    """What the setting that validation prefers reads with all training rows."""
    # On a path each setting starts from the one before; that is most of the cost, so it is chosen in float32.
    tuning = data.at(torch.float32) if path else data
    name = read.__qualname__
    part = tuning.tuning(seed, budget.validation_fraction)
    tried = data.keep(seed, (name, tuning.dtype), lambda: read(part, settings))
    best = best_index(tried)
    used = settings[0 if path else best : best + 1]
    value = data.keep(None, (name, data.dtype, best), lambda: read(data.whole(), used)[-1])
    return Found(value, settings=describe(settings[best]), trials=len(settings), validation=tried[best])


def ridge(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Ridge regression on one-hot targets in closed form, with an intercept, over a wide range of strengths."""
    # Below eps the smallest direction kept is not shrunk by any strength.
    decades = min(budget.ridge_decades, round(-2 * math.log10(torch.finfo(data.dtype).eps)))

    def read(part: Part, strengths: list[float]) -> list[float]:
        s = part.spectrum.s
        # s²/(s² + λσ²) written so that nothing underflows.
        relative = (s / s[0]).double().square() if len(s) else s.double()
        return filter_accuracies(part, [(relative / (relative + strength)).to(s.dtype) for strength in strengths])

    strengths = [10.0**power for power in range(2, -decades - 1, -1)]
    return _choose(data, budget, seed, strengths, read, lambda strength: {"relative_strength": strength})


def whitening(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Least squares on the leading k principal directions, each scaled to the same variance, so that κ = 1."""

    def read(part: Part, counts: list[int]) -> list[float]:
        s = part.spectrum.s
        return filter_accuracies(part, [(torch.arange(len(s)) < count).to(s.dtype) for count in counts])

    counts = sorted({max(1, round(k)) for k in np.geomspace(1, min(data.Z.shape), 24)})
    return _choose(data, budget, seed, counts, read, lambda count: {"directions": count})


def filter_accuracies(part: Part, filters: list[Tensor]) -> list[float]:
    """Accuracy of ``W = V diag(h/s) Uᵀ(Y − 1bᵀ)`` with an unshrunk intercept ``b``, for each filter ``h``."""
    # 1ᵀ(I − U diag(h) Uᵀ)(Y − 1bᵀ) = 0 gives b without a decomposition of centred features.
    targets, (U, s, V) = part.targets, part.spectrum
    ones = part.Z.new_ones(len(part.Z))
    inside, ones_inside = U.mT @ targets, U.mT @ ones
    projected = part.Z_test @ V
    values = []
    for h in filters:
        rest = ones - U @ (h * ones_inside)
        room = float(rest @ ones)
        # Features that span the constant leave nothing for an intercept.
        bias = rest @ targets / room if room > len(ones) * 1e-6 else torch.zeros_like(targets[0])
        weight = (h / s)[:, None] * (inside - ones_inside[:, None] * bias)
        values.append(accuracy(projected @ weight + bias, part.y_test))
    return values


def lda(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Linear discriminant analysis in closed form, over shrinkages of the covariance within classes."""
    lowest = 12 if data.dtype == torch.float64 else 6
    shrinkages = [10.0**power for power in range(0, -lowest - 1, -1)]
    return _choose(data, budget, seed, shrinkages, _discriminate, lambda value: {"shrinkage": value})


def _discriminate(part: Part, shrinkages: list[float]) -> list[float]:
    counts = torch.bincount(part.y, minlength=part.num_classes).to(part.Z.dtype)
    centre = part.Z.mean(dim=0)
    Z, Z_test = part.Z - centre, part.Z_test - centre
    means = part.targets.mT @ Z / counts.clamp_min(1)[:, None]
    within = Z - means[part.y]
    values, V = torch.linalg.eigh(within.mT @ within / len(Z))
    floor = float(values.clamp_min(0).mean()) or float(Z.square().mean()) or 1.0
    means, tests = means @ V, Z_test @ V
    # Classes without a row to learn from are never named.
    prior = torch.where(counts > 0, (counts / counts.sum()).clamp_min(1e-30).log(), -torch.inf)
    found = []
    for shrinkage in shrinkages:
        inverse = 1 / ((1 - shrinkage) * values.clamp_min(0) + shrinkage * floor)
        scores = tests @ (means * inverse).mT - 0.5 * (means.square() * inverse).sum(dim=1)
        found.append(float(((scores + prior).argmax(dim=1) == part.y_test).double().mean()))
    return found


def lbfgs(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Softmax regression by L-BFGS on standardized features, over penalties, each from the last one's weights."""

    def read(part: Part, penalties: list[float]) -> list[float]:
        return softmax_path(part.standardized(), penalties, max(1, budget.iterations // 3))

    return _choose(data, budget, seed, [1e-1, 1e-2, 1e-3], read, lambda value: {"penalty": value}, path=True)


def softmax_path(part: Part, penalties: list[float], iterations: int) -> list[float]:
    """Accuracy of softmax regression with the mean loss plus ``penalty/2D · ‖W‖²``, for falling penalties."""
    d = part.Z.shape[1]
    weight = part.Z.new_zeros(d, part.num_classes, requires_grad=True)
    bias = part.Z.new_zeros(part.num_classes, requires_grad=True)
    values = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
        )

        def loss(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = cross_entropy(part.Z @ weight + bias, part.y) + penalty / (2 * d) * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            values.append(accuracy(part.Z_test @ weight + bias, part.y_test))
    return values


def logistic_regression(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """scikit-learn's `LogisticRegression` on features divided by one number, over its ``C``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def read(part: Part, strengths: list[float]) -> list[float]:
        part, values = part.scaled(), []
        model = LogisticRegression(max_iter=max(1, budget.iterations // 3), warm_start=True, tol=1e-4)
        for strength in strengths:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is the budget
                model.set_params(C=strength).fit(part.Z.numpy(), part.y.numpy())
            values.append(float((model.predict(part.Z_test.numpy()) == part.y_test.numpy()).mean()))
        return values

    about = {"scaled_to_mean_square": 1.0}
    return _choose(data, budget, seed, [1e-2, 1e-1, 1.0], read, lambda value: {"C": value} | about, path=True)


_NEIGHBOURS = (1, 3, 5, 10, 20, 50)


def knn(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """K nearest neighbours on three views: cosine, standardized, and whitened, which undoes any invertible map."""
    most = len(data.tuning(seed, budget.validation_fraction).Z)
    settings = [(view, k) for view in ("cosine", "standardized", "whitened") for k in _NEIGHBOURS if k <= most]
    return _choose(data, budget, seed, settings, _vote, lambda chosen: {"view": chosen[0], "k": chosen[1]})


def _vote(part: Part, settings: list[tuple[str, int]]) -> list[float]:
    nearest = cache(lambda view: _neighbours(part, view))
    values = []
    for view, k in settings:
        votes = one_hot(part.y[nearest(view)], part.num_classes).float()
        # Of classes with as many votes, the one of the nearest neighbour.
        values.append(accuracy(votes[:, :k].sum(dim=1) + 0.5 * votes[:, 0], part.y_test))
    return values


def _neighbours(part: Part, view: str) -> Tensor:
    part = part.standardized() if view == "standardized" else part
    train, test = part.Z, part.Z_test
    if view == "whitened":
        train, test = part.spectrum.U, part.Z_test @ (part.spectrum.V / part.spectrum.s)
    if view != "standardized":
        train, test = normalize(train, dim=1), normalize(test, dim=1)
    most = min(max(_NEIGHBOURS), len(train))
    return torch.cat([torch.cdist(rows, train).topk(most, largest=False).indices for rows in test.split(1024)])


_SKLEARN = "logistic_regression", "scikit-learn's logistic regression"

ATTACKERS = (
    Attacker("ridge", "closed-form least squares (ridge)", "head_input", True, ridge, "quick"),
    Attacker("whitening", "least squares on whitened features", "head_input", True, whitening, "quick"),
    Attacker("lda", "linear discriminant analysis", "head_input", True, lda, "quick"),
    Attacker("lbfgs", "L-BFGS", "head_input", False, lbfgs, "quick"),
    Attacker(*_SKLEARN, "head_input", False, logistic_regression, "standard"),
    Attacker("knn", "k nearest neighbours", "head_input", True, knn, "quick"),
)
